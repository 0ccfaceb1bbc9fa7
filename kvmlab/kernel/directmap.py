"""The kernel's directmap: one 2M region that starts as one huge mapping and splits for good.

Modelled because the RMP check of a host write goes by the size of the mapping that it uses.  Left out: stale
host TLB entries after the _noflush helpers; splits end with a flush of all CPUs (set_memory.c).
"""

from __future__ import annotations

from ..hw import snp
from ..hw.memory import Gfn, Pfn
from ..model.state import View
from .locks import might_sleep

PRESENT, ABSENT = "present", "absent"


def _split(s: View) -> None:
    if s.directmap_2m:
        s.directmap_2m = False
        s.say("[2M directmap entry splits]")
        s.note("directmap-split")


def kvm_unmap_directmap(s: View, me: str, gfn: Gfn) -> None:
    """Remove the private PFN of `gfn` (set_direct_map_invalid_noflush(), v8 patch 15/56); may sleep."""
    might_sleep(s, me, "directmap update takes a mutex")
    _split(s)
    s.directmap[s.conf.backing["private", gfn]] = ABSENT
    s.note("directmap-unmap", gfn=gfn)


def unmap_folio(s: View, me: str, gfn: Gfn) -> None:
    """Before a fault's RMPUPDATE: unmap the whole 2M folio if none of it is assigned yet, else only `gfn`."""
    whole = not any(s.rmp[pfn].assigned for pfn in s.rmp)
    for g in s.conf.gfns if whole else (gfn,):
        kvm_unmap_directmap(s, me, g)


def kvm_map_directmap(s: View, me: str, gfn: Gfn) -> None:
    """Restore the private PFN of `gfn` (set_direct_map_default_noflush()); never merges; may sleep."""
    might_sleep(s, me, "directmap update takes a mutex")
    s.directmap[s.conf.backing["private", gfn]] = PRESENT
    s.note("directmap-map", gfn=gfn)


def adjust_direct_map(s: View, me: str, gfn: Gfn, request: tuple[Gfn, ...] = ()) -> None:
    """Split to 4K what is about to be a 4K RMP entry (adjust_direct_map(), v6.11); may sleep."""
    might_sleep(s, me, "set_memory_4k() takes a mutex")
    if not (s.conf.folio_2m and _goes_whole(s, request)):
        _split(s)


def _goes_whole(s: View, request: tuple[Gfn, ...]) -> bool:
    """Whether the RMPUPDATE that follows is a 2M one, for which a 2M mapping is good enough."""
    entries = [s.rmp[pfn] for pfn in s.rmp]
    whole = set(request) == set(s.conf.gfns)
    return all(not e.assigned or (e.size == snp.PG_2M and whole) for e in entries)


def host_write(s: View, pfn: Pfn) -> str:
    """One kernel write through the directmap to a PFN of the region: snp.OK, snp.HOST_PF or "absent"."""
    if s.directmap[pfn] == ABSENT:
        return ABSENT
    mapping = snp.PG_2M if s.directmap_2m else snp.PG_4K
    others = mapping == snp.PG_2M and any(s.rmp[p].assigned for p in s.rmp)
    page = s.rmp.get(pfn, snp.HYPERVISOR)
    return snp.host_access("write", mapping=mapping, page=page, region_assigned=others)

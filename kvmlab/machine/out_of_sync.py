"""out-of-sync: what must agree once nobody is inside an operation (Model.quiet)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..hw.memory import Gfn
from ..hw.tdx.sept import State
from ..hw.tdx.tlb import Age
from ..kernel.directmap import ABSENT
from ..kvm.mmu import leaf
from ..kvm.tdx import FROZEN
from ..model.state import View


@dataclass(frozen=True)
class OutOfSync:
    """out-of-sync, asked when nobody is inside an operation: what must hold of every machine, and of its parts."""

    parts: tuple[Callable[[View], None], ...] = ()

    def __call__(self, s: View) -> None:
        """Ask everything."""
        for clause in (four_places_agree, *self.parts):
            clause(s)


def four_places_agree(s: View) -> None:
    """Attributes, mappings and TLBs, the hardware's table and the directmap say the same."""
    conf = s.conf
    for gfn in conf.gfns:
        attr = s.attr[gfn]
        named = conf.backing[attr, gfn]
        mapped = [leaf(s, gfn), *(s.tlb[where] for where in s.tlb if where[1] == gfn)]
        if conf.tdx:
            _tdx_in_sync(s, gfn, attr, mapped)
            continue
        if any(pfn not in (None, named) for pfn in mapped):
            s.violate("out-of-sync", f"gfn {gfn} is {attr}, but a leaf or TLB entry maps another page")
        if not conf.has_rmp:
            continue
        private = conf.backing["private", gfn]
        entry = s.rmp[private]
        # In use: written.  A wrong read before that is reported as stale-mapping, at once or when it is repeated.
        used = conf.correct_guest and s.guest[gfn] == "ready"
        if used and (
            (attr == "private" and not (entry.assigned and entry.validated))
            or (conf.in_place and attr == "shared" and entry.assigned)
        ):
            s.violate(
                "out-of-sync", f"gfn {gfn} is {attr} and in use, but the RMP entry of {named} is {entry}"
            )
        if entry.assigned and s.directmap_2m and _shares_region(s):
            s.violate("out-of-sync", f"{private} is assigned under a 2M directmap entry that the host uses")
        if not entry.assigned and s.directmap[private] == ABSENT:
            s.violate("out-of-sync", f"{private} is the host's but missing from the directmap")
        if not conf.in_place and attr == "shared" and entry.assigned:
            s.count("residue")


def _shares_region(s: View) -> bool:
    """Whether a page of the host lies in the 2M region too; a 2M page of guest_memfd may have it for itself."""
    return not s.conf.folio_2m or any(not s.rmp[pfn].assigned for pfn in s.rmp)


def _tdx_in_sync(s: View, gfn: Gfn, attr: str, shared: list[str | None]) -> None:
    """The same for a TD: FREE or PENDING under private is in order, for TDX is lazy that way."""
    private = s.conf.backing["private", gfn]
    mirror, entry, usable = s.mirror[gfn], s.sept[gfn], _usable_private(s, gfn)
    if attr == "shared" and (entry != State.FREE or mirror is not None or s.pamt[private] != "NDA"):
        s.violate(
            "out-of-sync", f"gfn {gfn} is shared, but S-EPT {entry}, mirror {mirror}, PAMT {s.pamt[private]}"
        )
    if attr == "private" and any(shared):
        s.violate(
            "out-of-sync",
            f"gfn {gfn} is private, but the shared EPT or a TLB maps {next(filter(None, shared))}",
        )
    if FROZEN in (mirror, s.mirror_table):
        s.violate("out-of-sync", f"gfn {gfn}: a mirror SPTE is frozen, and nobody is at work on it")
    elif (mirror is not None) != (entry in (State.MAPPED, State.PENDING)):
        s.violate("out-of-sync", f"gfn {gfn}: mirror {mirror}, but S-EPT {entry}")
    if usable and s.pamt[private] == "NDA":
        s.violate("out-of-sync", f"gfn {gfn}: {usable} could still use {private}, which the TD has no longer")
    if attr == "shared" and s.directmap[private] == ABSENT:
        s.violate("out-of-sync", f"{private} is the host's but missing from the directmap")


def _usable_private(s: View, gfn: Gfn) -> str | None:
    """A vCPU with a private translation that it will not drop before it uses it."""
    for cpu in s.conf.vcpus:
        if s.ptlb[cpu, gfn] is not None and (s.mode[cpu] == "td" or s.vcpu_epoch[cpu] == Age.NOW):
            return str(cpu)
    return None

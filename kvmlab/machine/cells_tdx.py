"""What a TDX machine has besides: the secure EPT and its mirror, the PAMT, the module's locks and epochs, KeyIDs.

per gfn     sept, mirror, entry_lock, uptodate           the S-EPT entry; KVM's copy; who is in ACCEPT there; zeroed
one         sept_table, mirror_table                     the table above them (all gfns lie in one 2M region)
per PFN     pamt, bepoch, memory (a line), directmap     owner, epoch of the BLOCK, contents by KeyID
per vCPU    mode, vcpu_epoch, ptlb[vcpu, gfn]            in the TD or not, its epoch, its private translations
KVM         wait_for_sept_zap, kicked[vcpu], kicker      a zap that keeps vCPUs out; a kick under way
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from ..hw.memory import EMPTY
from ..hw.tdx.lines import HOST, ZERO, Line
from ..hw.tdx.sept import STATES, State
from ..hw.tdx.tlb import Age
from ..kernel.directmap import ABSENT, PRESENT
from ..kernel.keyids import HKID
from ..kvm.tdx import ABSENT as NO_TABLE
from ..kvm.tdx import FROZEN
from ..kvm.tdx import PRESENT as TABLE
from ..model.state import Field


def lines(contents: Sequence[Any]) -> tuple[Line, ...]:
    """Every line that a page can be: content, KeyID and poison in memory, and what is dirty over it."""
    values = (ZERO, *(c for c in contents if c != EMPTY))
    dirty = [
        tuple((key, value) for key, value in ((HOST, host), (HKID, td)) if value is not None)
        for host, td in product((None, *values), repeat=2)
    ]
    return tuple(
        Line(value, key, poison, over)
        for value, key, poison, over in product(values, (HOST, HKID), (False, True), dirty)
    )


def fields(conf: Any, actors: Sequence[str]) -> list[Field]:
    """The cells that only a TDX machine has."""
    gfns, vcpus, private = conf.gfns, conf.vcpus, conf.private_pfns
    leaves = tuple(s for s in STATES if s not in (State.NL_MAPPED, State.NL_BLOCKED))
    found = [
        Field("sept", leaves, gfns),
        Field("sept_table", (State.FREE, State.NL_MAPPED)),
        Field("mirror_table", (NO_TABLE, FROZEN, TABLE)),
        Field("entry_lock", (None, *vcpus), gfns),
        Field("uptodate", (False, True), gfns),
        Field("pamt", ("NDA", "REG"), private),
        Field("bepoch", (Age.OLDER, Age.PREVIOUS, Age.NOW), private),
        Field("mode", ("td", "host", "entering", "accepting"), vcpus),
        Field("vcpu_epoch", (Age.NOW, Age.PREVIOUS, Age.OLDER), vcpus),
        Field("wait_for_sept_zap", (False, True)),
        Field("kicked", (False, True), vcpus),
        Field("kicker", (None, *actors)),
        Field("directmap", (PRESENT, ABSENT), private),
        Field("directmap_2m", (False,)),
    ]
    for gfn in gfns:
        page = conf.backing["private", gfn]
        found.append(Field("mirror", (None, FROZEN, page), (gfn,)))
        found.append(Field("ptlb", (None, page), tuple((v, gfn) for v in vcpus)))
    return found

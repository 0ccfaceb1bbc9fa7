"""The parts of a machine that not every model has: each brings its cells and its clause of out-of-sync.

A model has a part if a thread of its scenario does, or if a step of its programs belongs to it.  The cells of a part
that a model does not have are fixed: they hold one value, and what is written to them is lost.  So steps need not ask
whether a part is there; what they do ask is the shape of memory (2M pages) and who the guest is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from ..kernel.failures import RMPUPDATE, SEAMCALL, XARRAY
from ..kvm.mmu import flush_if_zapped, had_rmp_bit, leaf
from ..model.state import Field, View
from ..model.step import Instr, Step
from .conf import (
    ADDS,
    DELETES,
    DISCARDS,
    FLUSH,
    FOLIO_2M,
    LARGE,
    MEMSLOTS,
    RESERVED,
    RMP_BIT,
    SMM,
    TD_FATAL,
    YIELDS,
    Conf,
)

Programs = Mapping[str, Sequence[Instr]]


class Part(NamedTuple):
    """A part: its name, one sentence, its cells, the steps that bring it, and what must hold when all is quiet.

    `absent` is the value that its cells hold where it is not there, if that is not the first of their domain.
    """

    name: str
    sentence: str
    fields: Callable[[Conf, Programs], list[Field]] = lambda conf, programs: []
    steps: frozenset[Step] = frozenset()
    quiet: Callable[[View], None] | None = None
    absent: Hashable = None

    def cells(self, conf: Conf, programs: Programs) -> list[Field]:
        """Its fields, fixed where the machine does not have it."""
        found = self.fields(conf, programs)
        if self.name in conf.parts:
            return found
        value = (lambda f: f.domain[0]) if self.absent is None else (lambda f: self.absent)
        return [field._replace(domain=(value(field),), fixed=True) for field in found]


def _may_fail(what: str, sentence: str) -> Part:
    """One failure of `what`, at any time."""
    return Part(what, sentence, lambda conf, programs: [Field("failures_left", (1, 0), (what,))], absent=0)


def _slot(conf: Conf, programs: Programs) -> list[Field]:
    deleted = ("valid", "invalid", "none")
    states = (
        ("none", "bound", "valid") if ADDS in conf.parts else deleted[: 3 if DELETES in conf.parts else 1]
    )
    found = tuple(state for state in states if state != "bound")
    return [Field("slot", states), Field("fault_slot", (None, *found), conf.vcpus)]


def _pages_in_use(conf: Conf, programs: Programs) -> list[Field]:
    holders = tuple(product((a for a in programs if a != "host"), conf.gfns))
    return [Field("gmem", ("cached", "dying", "free"), conf.gfns), Field("folio_ref", (False, True), holders)]


def _large(conf: Conf, programs: Programs) -> list[Field]:
    keys = tuple(page.key for page in conf.large)
    return [Field("npt_large", (None, "shared", "private"), keys), Field("mixed", (False, True), keys)]


def _npt_smm(conf: Conf, programs: Programs) -> list[Field]:
    leaves = [Field("npt_smm", conf.leaves(gfn), (gfn,)) for gfn in conf.gfns]
    return [Field("smm", (False, True), conf.vcpus), *leaves]


def mixed_flags_hold(s: View) -> None:
    """A large page is marked mixed if, and only if, the attributes of its gfns differ."""
    for page in s.conf.large:
        mixed = s.mixed[page.key]
        if mixed != (len({s.attr[gfn] for gfn in page.gfns}) > 1):
            s.violate(
                "out-of-sync",
                f"the {page.level} page is marked {'mixed' if mixed else 'uniform'}, and is not",
            )


def nothing_maps_what_has_no_memslot(s: View) -> None:
    """Once the memslot is gone no leaf and no TLB entry maps a page of it."""
    for gfn in s.conf.gfns if s.slot == "none" else ():
        if any((leaf(s, gfn), leaf(s, gfn, smm=True), *(s.tlb[where] for where in s.tlb if where[1] == gfn))):
            s.violate("out-of-sync", f"gfn {gfn} is in no memslot, but a leaf or TLB entry maps a page")


def nobody_in_smm_maps_another_page(s: View) -> None:
    """The page table of address space 1 maps what the attribute names, too."""
    for gfn in s.conf.gfns:
        attr = s.attr[gfn]
        if leaf(s, gfn, smm=True) not in (None, s.conf.backing[attr, gfn]):
            s.violate("out-of-sync", f"gfn {gfn} is {attr}, but a leaf or TLB entry maps another page")


def both_backings_are_counted(s: View) -> None:
    """A shared gfn whose private page is allocated as well takes memory twice: no violation, a measure."""
    for gfn in s.conf.gfns:
        if s.attr[gfn] == "shared" and s.gmem[gfn] == "cached":
            s.count("double")


PARTS = (
    Part(LARGE, "memory may be mapped in 2M and 1G pages", _large, quiet=mixed_flags_hold),
    Part(FOLIO_2M, "guest_memfd has one 2M page for all gfns",
         lambda conf, programs: [Field("tlb_2m", (False, True), conf.vcpus)]),
    Part(DISCARDS, "guest_memfd gives pages back", _pages_in_use, quiet=both_backings_are_counted),
    Part(MEMSLOTS, "it matters which memslot a fault finds", _slot, quiet=nothing_maps_what_has_no_memslot),
    Part(SMM, "vCPUs enter a second address space", _npt_smm, quiet=nobody_in_smm_maps_another_page),
    Part(DELETES, "kvm->srcu has readers for whom somebody waits",
         lambda conf, programs: [Field(name, (False, True), conf.vcpus) for name in ("srcu", "grace")]),
    Part(ADDS, "there is no memslot at first"),
    Part(RESERVED, "a reservation that failed leaves entries behind",
         lambda conf, programs: [Field("reserved", (False, True), conf.gfns)]),
    Part(FLUSH, "a text asks whether a zap has found anything",
         lambda conf, programs: [Field("flush", (False, True), tuple(programs))], frozenset({flush_if_zapped})),
    Part(RMP_BIT, "a handler asks for the RMP bit of a fault",
         lambda conf, programs: [Field("rmp_bit", (None, "RMP", "SIZEM"), conf.vcpus)], frozenset({had_rmp_bit})),
    Part(YIELDS, "a zap may yield mmu_lock between two gfns"),
    Part(TD_FATAL, "a machine check may have marked the TD fatal",
         lambda conf, programs: [Field("td_fatal", (False, True))]),
    _may_fail(RMPUPDATE, "one RMPUPDATE may fail"),
    _may_fail(XARRAY, "one allocation of the xarray may fail"),
    _may_fail(SEAMCALL, "one SEAMCALL may find a lock taken"),
)  # fmt: skip


def brought_by(programs: Programs) -> frozenset[str]:
    """The parts that steps of these programs bring."""
    steps = {instr.step for program in programs.values() for instr in program}
    return frozenset(part.name for part in PARTS if part.steps & steps)

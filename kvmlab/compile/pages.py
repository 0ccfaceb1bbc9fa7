"""The page model: what a design does to one page, compiled from its text for the range engine (explore/ranges.py).

One program has an entry for each call of KVM: the attribute ioctl and the fault in both directions (the handler of
RMP faults behind the fault), the punch, and what needs no text: the MMU notifier and the deletion of a memslot.
Every thread runs this program; a thread is one level of calls, for here a call may only run inside another one.  The
guest is not in it: who begins a call sets the cells that the guest would have set.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from ..design import Design, Row
from ..design.tree import Condition
from ..guest.access import Access
from ..hw.memory import Gfn
from ..hw.snp import PG_2M, PG_4K, RmpEntry
from ..kernel import locks
from ..kernel.failures import RMPUPDATE, SEAMCALL
from ..kvm import sev, tdx
from ..machine.cells import build_layout, with_usage
from ..machine.conf import (
    ADDS,
    DELETES,
    DISCARDS,
    FOLIO_2M,
    LARGE,
    MEMSLOTS,
    RESERVED,
    TD_FATAL,
    Conf,
    Switches,
)
from ..machine.properties import FATAL
from ..model.state import Cell, Field, Layout, ModelError, View
from ..model.step import Actor, Model
from .assemble import Draft, assemble, without_markers
from .programs import _unwound, fault_paths, inverted, punch_drafts
from .section import KINDS, Section

THREADS = tuple(f"T{level}" for level in range(6))  # a call inside a call inside ...
PARTS = frozenset({DISCARDS, MEMSLOTS, ADDS, DELETES, RESERVED})
PARTS_OF = {"snp": {RMPUPDATE}, "tdx": {SEAMCALL, TD_FATAL}}  # what one platform has besides
OTHER = "other"  # a leaf to a page that is neither backing
ELSEWHERE = Gfn(99)  # the gfn of an RMP entry that is for another page
MOST_PLACES, MOST_CHILDREN = 1024, 16
OF_A_VCPU = frozenset({"mode", "vcpu_epoch", "kicked"})  # and not of the thread that is named like it
OF_A_PAGE = frozenset(
    {"attr", "reserved", "npt", "tlb", "rmp", "directmap", "directmap_2m", "gmem", "slot", "uptodate",
     "invalidate_range", "failures_left", "memory", "guest", "checked", "npt_large", "mixed", "tlb_2m",
     "sept", "sept_table", "mirror", "mirror_table", "entry_lock", "ptlb", "pamt", "bepoch", "td_fatal"}
)  # fmt: skip


@dataclass(frozen=True)
class PageModel:
    """A model of one page with several entries; `ends` names the places at which a call is over.

    `rows` are the rows that each entry was compiled from.
    """

    model: Model
    entries: Mapping[str, int]
    ends: Mapping[int, str]
    rows: Mapping[str, tuple[Row, ...]]


class Shape(NamedTuple):
    """How many gfns a model has, all of one 2M page if more than one: they stand for its 512.

    The first is the page's first; the others are one for each situation that is met there.  `request` are those that
    a call is about; `folio`: guest_memfd has one 2M folio for them; `large_shared`: so has the shared memory.
    """

    children: int = 1
    request: tuple[Gfn, ...] = (Gfn(0),)
    folio: bool = False
    large_shared: bool = False


ONE_PAGE = Shape()


@lru_cache(None)
def rmp_entries(gfn: Gfn) -> tuple[RmpEntry, ...]:
    """Every RMP entry that the page of a gfn can have, for this gfn or for another."""
    flags = (False, True)
    rest = [
        (size, immutable, vmsa, validated)
        for size in (PG_4K, PG_2M) for immutable in flags for vmsa in flags for validated in flags
    ]  # fmt: skip
    owners = [(False, None), (True, gfn), (True, ELSEWHERE)]
    return tuple(
        RmpEntry(assigned, asid, gpa, *more) for assigned, gpa in owners for asid in range(4) for more in rest
    )


@lru_cache(256)
def page_model(
    design: Design, platform: str, backing: str, switches: Switches, shape: Shape = ONE_PAGE
) -> PageModel:
    """Compile the page model of a design.  What is not per page lies at the same bits whatever the shape is."""
    parts = PARTS | PARTS_OF.get(platform, set())
    parts |= {LARGE} if shape.children > 1 else set()
    parts |= {FOLIO_2M} if shape.folio else set()
    conf = Conf(
        platform, backing == "in-place", tuple(map(Gfn, range(shape.children))), KINDS[::-1], THREADS[0], THREADS,
        correct_guest=False, parts=parts, auto_convert=True, linux=design.version, switches=switches,
        children=shape.children, request=shape.request, large_shared=shape.large_shared,
    )  # fmt: skip
    compiler = _Compiler(design, conf)
    program = assemble(without_markers(compiler.compile()))
    if len(program) > MOST_PLACES or shape.children > MOST_CHILDREN:
        raise ModelError(f"a page model has at most {MOST_PLACES} places and {MOST_CHILDREN} gfns")
    programs = dict.fromkeys(THREADS, program)
    conf = replace(with_usage(conf, programs), inverted=inverted(frozenset(compiler.nests)), many=4)
    layout = _arranged(build_layout(conf, programs))
    actors = tuple(Actor(key, "thread", program) for key in THREADS)
    title = f"one page of {design.name} on {platform}, {backing}"
    model = Model(layout, actors, layout.pack({}), conf, FATAL, None, title)
    return PageModel(
        model,
        {instr.args[0]: pc for pc, instr in enumerate(program) if instr.step is enters},
        {pc: instr.args[0] for pc, instr in enumerate(program) if instr.step is ends},
        compiler.rows,
    )


def enters(s: View, me: str, name: str) -> None:
    """Where a call begins."""


def ends(s: View, me: str, how: str) -> None:
    """Where a call is over."""


def of_a_page(cell: Cell) -> bool:
    """Whether a cell belongs to the page and not to KVM as a whole."""
    return cell.name in OF_A_PAGE or (
        cell.name == "folio_ref" and cell.key not in [(thread, 0) for thread in THREADS]
    )


def _arranged(layout: Layout) -> Layout:
    """The same cells, KVM's before the page's, with what only a real machine holds besides."""
    accesses = (None, *(Access(kind, "write", Gfn(gfn), 0) for kind in KINDS for gfn in range(MOST_CHILDREN)))
    instead: dict[str, tuple[Hashable, ...]] = {"pc": tuple(range(MOST_PLACES)), "acc": accesses}
    more: dict[str, tuple[Hashable, ...]] = {
        "npt": (OTHER,),
        "slot": ("invalid",),
        "fault_slot": ("invalid",),
    }

    def domain(cell: Cell) -> tuple[Hashable, ...]:
        if cell.name == "rmp":
            return rmp_entries(Gfn(int(str(cell.key)[1:])))
        if (
            cell.name == "failures_left" and cell.bits
        ):  # which gfn's RMPUPDATE is made to fail, counted from 1
            return tuple(range(MOST_CHILDREN + 1))
        if cell.fixed:
            return cell.domain
        return instead.get(cell.name) or tuple(dict.fromkeys((*cell.domain, *more.get(cell.name, ()))))

    def field(cell: Cell) -> Field:
        return Field(cell.name, domain(cell), None if cell.key is None else (cell.key,), cell.fixed)

    return Layout(field(cell) for cell in sorted(layout.cells, key=of_a_page))


class _Compiler:
    """The drafts of all entries."""

    def __init__(self, design: Design, conf: Conf) -> None:
        self.design, self.conf = design, conf
        self.nests: set[tuple[str, str]] = set()
        self.rows: dict[str, tuple[Row, ...]] = {}

    def compile(self) -> list[Draft]:
        """Every entry, then the ends."""
        drafts: list[Draft] = []
        for kind in KINDS:
            drafts += self._ioctl(kind)
        drafts += self._punch()
        for name in ("notifier", "delete"):
            drafts += self._implied(name)
        for kind in KINDS:
            drafts.append(_enters(f"fault {kind}", f"fault-{kind}"))
            self.rows[f"fault {kind}"] = self.design.rows("fault", to=kind, platform=self.conf.platform)
            self.rows[f"rmp_fault {kind}"] = self.design.rows(
                "rmp_fault", to=kind, platform=self.conf.platform
            )
        paths, nests = fault_paths(self.design, self.conf)
        self.nests |= nests
        drafts += paths
        if self.conf.tdx:  # one SEAMCALL by itself, as a wrong host would do it
            block = Row("tdh_mem_range_block")
            args = (Gfn(0), block.call, None)
            drafts += self._call(
                "block", (), [Draft(tdx.zap_seamcall, args, block.call, block, "zap", loop=1)]
            )
        labels = ("guest", "killed", "userspace", "auto-private", "auto-shared", "done", "ENOMEM")
        drafts += [Draft(ends, (label,), label, label=label) for label in labels]
        drafts.append(Draft(locks.stuck, (), "hangs", label="stuck"))
        return drafts

    def _implied(self, name: str) -> list[Draft]:
        """What KVM does by itself: a notifier zaps what is shared, with a window; a memslot that goes, both kinds."""
        section = Section(self.conf, "punch", "private", name, self.conf.converted, self.design)
        window = name == "notifier"
        lock, unlock = (Row(call, lock="mmu_lock") for call in ("write_lock", "write_unlock"))
        zap, flush = Row("kvm_unmap_gfn_range"), Row("kvm_flush_remote_tlbs", when=(Condition("flush", ""),))
        section.compile((lock, *(Row("kvm_mmu_invalidate_begin"),) * window, zap))
        if self.conf.tdx and not window:  # tdx has a root for each kind
            section.kind = "shared"
            section.row(zap)
        section.groups((flush, *(Row("kvm_mmu_invalidate_end"),) * window, unlock))
        self.nests |= section.nests
        return self._call(name, (), section.drafts)

    def _call(
        self, name: str, rows: tuple[Row, ...], drafts: list[Draft], done: str = "returned"
    ) -> list[Draft]:
        """A call of user space: its drafts, and the return."""
        self.rows[name] = rows
        over = f"{name} {done}"
        return [
            _enters(name),
            *drafts,
            Draft(locks.leave, ("returns to user",), "return 0"),
            Draft(ends, (done,), done, label=over),
        ]

    def _ioctl(self, kind: str) -> list[Draft]:
        name = f"ioctl {kind}"
        section = Section(self.conf, "ioctl", kind, name, self.conf.converted, self.design)
        rows = self.design.rows("ioctl", to=kind, platform=self.conf.platform)
        section.compile(rows)
        self.nests |= section.nests
        drafts = self._call(name, rows, section.drafts)
        return _unwound(section, drafts, {"done": "done", "ENOMEM": "ENOMEM"})

    def _punch(self) -> list[Draft]:
        """A page that cannot be made shared is leaked, and the punch goes on."""
        drafts, nests = punch_drafts(self.design, self.conf, "punch", self.conf.converted)
        self.nests |= nests
        for draft in drafts:
            if draft.step is sev.rmpupdate:
                draft.jumps["failed"] = draft.jumps["unassigned"]
        return self._call(
            "punch", self.design.rows("punch", to="shared", platform=self.conf.platform), drafts
        )


def _enters(name: str, after: str | None = None) -> Draft:
    return Draft(enters, (name,), name, after=after)

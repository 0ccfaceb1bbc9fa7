"""A leaf as it is called on a Platform: how the questions of its checks are answered from the dictionaries there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from ..memory import PAGE, Gpa, Hpa
from . import sept, tlb
from .checks import CHECKS, Above, Answer, Check, Situation, came_to
from .entry import NO_PAGE
from .locks import NONE, Lock, acquire_entry, release_entry
from .pamt import PageType
from .platform import PamtKey, Platform
from .sept import LEVELS, TABLES
from .structures import Entry, Td, Vcpu
from .words import Leaf, Level, Status

_TAKES_TABLE = frozenset({Leaf.SEPT_ADD, Leaf.PAGE_DEMOTE})  # the page given is 4K, whatever the level


def on_td(machine: Platform, td: Td) -> Situation:
    """A leaf for a TD."""
    return Situation(
        td=lambda: td.life,
        held=lambda lock: machine.td_held(td, lock),
        previous_inside=lambda: tlb.track(td.epochs)[0] != Status.SUCCESS,
    )


def on_vcpu(machine: Platform, td: Td, vcpu: Vcpu, faulting: Sequence[Gpa]) -> Situation:
    """VP.ENTER; `faulting`: GPAs of the vCPU's zero-step mitigation that would raise an EPT violation now."""
    stepping = vcpu.stepping
    return on_td(machine, td)._replace(
        armed=lambda: stepping.armed, steps=lambda: tlb.steps(stepping, faulting)
    )


def on_page(machine: Platform, hpa: Hpa) -> Situation:
    """WBINVD or RDMD of a page."""
    return Situation(
        held=lambda lock: _page_held(machine, lock, hpa, Level.PT),
        form=lambda: machine.form(hpa, Level.PT),
        page=lambda: machine.free(hpa, Level.PT),
    )


def on_reclaim(machine: Platform, hpa: Hpa) -> Situation:
    """RECLAIM of a page, which is to be owned by a TD in teardown, and named by its first address."""
    size, first = machine.walk_pamt(hpa, Level.PT)
    entry = machine.pamt_of(first, size)
    root, owned = entry.type == PageType.TDR, entry.type not in (PageType.NDA, PageType.RSVD)

    def td() -> Td:
        return machine.tds[hpa if root else Hpa(entry.owner * PAGE)]

    def held(lock: Lock) -> str:
        """A root page's own PAMT entry is the TDR's lock, and taken by then."""
        if lock == Lock.TDR:
            return NONE if root else machine.td_held(td(), lock)
        return _page_held(machine, lock, hpa, Level.PT)

    wrong = Status.OPERAND_INVALID if hpa != first else Status.SUCCESS
    return on_page(machine, hpa)._replace(
        held=held,
        page=lambda: wrong if owned else Status.PAGE_METADATA_INCORRECT,
        td=lambda: td().life,
        ready=lambda: not root or not td().children,
    )


class EntryCall:
    """A leaf that works on an S-EPT entry; `page` is the one that comes with the call, if it wants any."""

    def __init__(
        self, machine: Platform, leaf: Leaf, td: Td, gpa: Gpa, level: Level, page: Hpa = NO_PAGE
    ) -> None:
        self.machine, self.leaf, self.td, self.gpa, self.level, self.page = (
            machine,
            leaf,
            td,
            gpa,
            level,
            page,
        )
        self.size = Level.PT if leaf in _TAKES_TABLE else level  # of the page given

    @cached_property
    def found(self) -> tuple[Level, Entry]:
        """Where the walk ends, and at which entry."""
        return self.td.walk(sept.asker(self.leaf), self.gpa, self.level)

    @property
    def entry(self) -> Entry:
        """The entry at which the walk ends."""
        return self.found[1]

    @property
    def own(self) -> PamtKey:
        """The PAMT key of the page or table that the entry points to."""
        return (self.level if self.entry.state.leaf else Level.PT), self.entry.hpa

    @property
    def situation(self) -> Situation:
        """How the questions of the leaf's checks are answered."""
        machine, td, gpa, level = self.machine, self.td, self.gpa, self.level
        return on_td(machine, td)._replace(
            held=self._held,
            named=lambda: LEVELS(leaf=self.leaf, level=level, top=td.top) and td.has_entry(gpa, level),
            level=lambda: level,
            above=self._above,
            entry_lock=lambda: self.entry.lock,
            state=lambda: self.entry.state,
            tracked=lambda: tlb.tracked(td.epochs, machine.pamt_at(self.own).bepoch),
            form=lambda: machine.form(self.page, self.size),
            page=lambda: machine.free(self.page, self.size),
            child_locked=lambda: td.busy_child(gpa, level) is not None,
            children=lambda: td.below_kind(gpa, level),
            interrupted=lambda: machine.interrupt_pending,
        )

    def _above(self) -> Above | None:
        at, entry = self.found
        return (at, entry.state) if at != self.level else None

    def _held(self, lock: Lock) -> str:
        """How others hold a lock: of the TD, of the page given, or else of the one that the entry points to."""
        if lock == Lock.LARGE:  # the page that DEMOTE splits or PROMOTE makes
            large = self.td.below(self.gpa, self.level)[0] if self.entry.state in TABLES else self.entry
            return self.machine.pamt_held(self.level, large.hpa)
        if lock not in (Lock.PARENTS, Lock.PAMT):
            return self.machine.td_held(self.td, lock)
        if Check.FORM in CHECKS[self.leaf]:
            return _page_held(self.machine, lock, self.page, self.size)
        return self.machine.pamt_held(*self.own)

    def leave_locks(self, answer: Answer) -> None:
        """Set TDHP in entries whose lock a host leaf that answered so did not get; clear it in one whose it did."""
        if came_to(self.leaf, Check.ENTRY, answer):
            status, lock = acquire_entry("host", self.entry.lock)
            self.entry.lock = lock if status else release_entry(lock)
        child = self.td.busy_child(self.gpa, self.level) if answer.by == Check.CHILD else None
        if child:
            _, child.lock = acquire_entry("host", child.lock)


def _page_held(machine: Platform, lock: Lock, hpa: Hpa, size: Level) -> str:
    """How others hold the PAMT entry of a page as pamt_walk() finds it, or those above."""
    where = machine.walk_pamt(hpa, size)
    return machine.pamt_held(*where) if lock == Lock.PAMT else machine.parents_held(*where)

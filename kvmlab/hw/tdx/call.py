"""A leaf as it is called on a Platform: what its checks ask, read from the dictionaries there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from ..memory import PAGE, Gpa, Hpa
from . import sept, tlb
from .checks import Answer, Check, Situation, came_to
from .locks import NONE, EntryLock, Lock, acquire_entry, release_entry
from .pamt import PageType, PamtEntry
from .platform import PamtKey, Platform
from .sept import LEVELS, TABLES, Children, State
from .structures import Entry, Td, Vcpu
from .td import TdState
from .words import Leaf, Level, Status

_TAKES_TABLE = frozenset({Leaf.SEPT_ADD, Leaf.PAGE_DEMOTE})  # the page given is 4K, whatever the level


class TdCall(Situation):
    """A leaf for a TD."""

    def __init__(self, machine: Platform, td: Td) -> None:
        self.machine, self.of = machine, td

    def td(self) -> TdState:
        """How far the TD is in its life."""
        return self.of.life

    def held(self, lock: Lock) -> str:
        """How others hold a lock of the TD."""
        if lock == Lock.TDR:
            return self.machine.tdr_held(self.of)
        return self.machine.held.get((lock, self.of.tdr), NONE)

    def previous_inside(self) -> bool:
        """Whether TRACK finds a vCPU of the epoch before this one."""
        return tlb.track(self.of.epochs)[0] != Status.SUCCESS


class LifeCall(TdCall):
    """A leaf that takes the TD a step further in its life; `ready`, another thing for each leaf, is told."""

    def __init__(self, machine: Platform, td: Td, ready: bool) -> None:
        super().__init__(machine, td)
        self._ready = ready

    def ready(self) -> bool:
        """Whether all is done that the leaf waits for."""
        return self._ready


class VcpuCall(TdCall):
    """VP.ENTER of a vCPU; `faulting`: GPAs of its zero-step mitigation that would raise an EPT violation now."""

    def __init__(self, machine: Platform, td: Td, vcpu: Vcpu, faulting: Sequence[Gpa]) -> None:
        super().__init__(machine, td)
        self.vcpu, self.faulting = vcpu, faulting

    def armed(self) -> bool:
        """Whether there are GPAs to look at."""
        return self.vcpu.stepping.armed

    def steps(self) -> bool:
        """Whether one of them would raise an EPT violation."""
        return tlb.steps(self.vcpu.stepping, self.faulting)


class EntryCall(TdCall):
    """A leaf that works on an S-EPT entry, and takes the page `page`, or none."""

    def __init__(
        self, machine: Platform, leaf: Leaf, td: Td, gpa: Gpa, level: Level, page: Hpa | None = None
    ) -> None:
        super().__init__(machine, td)
        self.leaf, self.gpa, self._level, self.given = leaf, gpa, level, page

    @cached_property
    def found(self) -> tuple[Level, Entry]:
        """Where the walk ends, and at which entry."""
        return self.of.walk(sept.asker(self.leaf), self.gpa, self._level)

    @property
    def entry(self) -> Entry:
        """The entry at which the walk ends."""
        return self.found[1]

    @property
    def own(self) -> PamtKey:
        """The PAMT key of the page or table that the entry points to."""
        return (self._level if self.entry.state.leaf else Level.PT), self.entry.hpa

    @property
    def large(self) -> PamtKey:
        """The PAMT key of the page that DEMOTE splits or PROMOTE makes."""
        table = self.entry.state in TABLES
        return self._level, self.of.below(self.gpa, self._level)[0].hpa if table else self.entry.hpa

    @property
    def size(self) -> Level:
        """The size of the page given."""
        return Level.PT if self.leaf in _TAKES_TABLE else self._level

    def held(self, lock: Lock) -> str:
        """How others hold a lock: of the TD, of the page given, or of the one that the entry points to."""
        if lock == Lock.LARGE:
            return self.machine.pamt_held(*self.large)
        if lock not in (Lock.PARENTS, Lock.PAMT):
            return super().held(lock)
        if self.given is None:
            return self.machine.pamt_held(*self.own)
        return _page_held(self.machine, lock, self.given, self.size)

    def named(self) -> bool:
        """Whether level and GPA name an entry."""
        taken: bool = LEVELS(leaf=self.leaf, level=self._level, top=self.of.top)
        return taken and self.of.has_entry(self.gpa, self._level)

    def level(self) -> Level:
        """The level that the call names."""
        return self._level

    def above(self) -> tuple[Level, State] | None:
        """The entry at which the walk ends, if it is above the named one."""
        at, entry = self.found
        return (at, entry.state) if at != self._level else None

    def entry_lock(self) -> EntryLock:
        """The lock bits of the entry."""
        return self.entry.lock

    def state(self) -> State:
        """The state of the entry."""
        return self.entry.state

    def tracked(self) -> bool:
        """Whether tracking is done for the BEPOCH of what the entry points to."""
        size, hpa = self.own
        return tlb.tracked(self.of.epochs, self.machine.pamt_of(hpa, size).bepoch)

    def form(self) -> Status:
        """Whether the page given is one."""
        assert self.given is not None
        return self.machine.form(self.given, self.size)

    def page(self) -> Status:
        """Whether the page given is free."""
        assert self.given is not None
        return self.machine.free(self.given, self.size)

    def child_locked(self) -> bool:
        """Whether PROMOTE meets a locked child."""
        return self.of.busy_child(self.gpa, self._level) is not None

    def children(self) -> Children:
        """What the entries below are."""
        return self.of.below_kind(self.gpa, self._level)

    def interrupted(self) -> bool:
        """Whether an interrupt is pending."""
        return self.machine.interrupt_pending

    def leave_locks(self, answer: Answer) -> None:
        """Set TDHP in entries whose lock a host leaf that answered so did not get; clear it in one whose it did."""
        if came_to(self.leaf, Check.ENTRY, answer):
            status, lock = acquire_entry("host", self.entry.lock)
            self.entry.lock = lock if status else release_entry(lock)
        child = self.of.busy_child(self.gpa, self._level) if answer.by == Check.CHILD else None
        if child:
            _, child.lock = acquire_entry("host", child.lock)


class PageCall(Situation):
    """A leaf that names a page of physical memory: WBINVD, RDMD and RECLAIM."""

    def __init__(self, machine: Platform, hpa: Hpa) -> None:
        self.machine, self.hpa = machine, hpa

    def held(self, lock: Lock) -> str:
        """How others hold the PAMT entries on the way to the page's."""
        return _page_held(self.machine, lock, self.hpa, Level.PT)

    def form(self) -> Status:
        """Whether it is a page at all."""
        return self.machine.form(self.hpa, Level.PT)

    def page(self) -> Status:
        """Whether it is free."""
        return self.machine.free(self.hpa, Level.PT)


class ReclaimCall(PageCall):
    """RECLAIM: the page is its TD's, and the TD in teardown."""

    @property
    def key(self) -> PamtKey:
        """The PAMT key of the page, which may be a large one."""
        return self.machine.walk_pamt(self.hpa, Level.PT)

    @property
    def entry(self) -> PamtEntry:
        """The PAMT entry of the page."""
        size, hpa = self.key
        return self.machine.pamt_of(hpa, size)

    @property
    def of(self) -> Td:
        """The TD that the page belongs to, or is the root of."""
        return self.machine.tds[self.hpa if self.entry.type == PageType.TDR else Hpa(self.entry.owner * PAGE)]

    def held(self, lock: Lock) -> str:
        """How others hold a lock; a root page's own PAMT entry is the TDR's lock, and taken by then."""
        if lock != Lock.TDR:
            return super().held(lock)
        return NONE if self.entry.type == PageType.TDR else self.machine.tdr_held(self.of)

    def page(self) -> Status:
        """Whether somebody owns it, and it is named by its first address."""
        if self.entry.type in (PageType.NDA, PageType.RSVD):
            return Status.PAGE_METADATA_INCORRECT
        return Status.OPERAND_INVALID if self.hpa != self.key[1] else Status.SUCCESS

    def td(self) -> TdState:
        """How far that TD is in its life."""
        return self.of.life

    def ready(self) -> bool:
        """Whether no other page of the TD is left when its root goes."""
        return self.entry.type != PageType.TDR or not self.of.children


def _page_held(machine: Platform, lock: Lock, hpa: Hpa, size: Level) -> str:
    """How others hold the PAMT entry of a page as pamt_walk() finds it, or those above."""
    where = machine.walk_pamt(hpa, size)
    return machine.pamt_held(*where) if lock == Lock.PAMT else machine.parents_held(*where)

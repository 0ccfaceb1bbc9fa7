"""What the module keeps of a TD: TDR and TDCS with the secure EPT, vCPUs, S-EPT entries; and registers returned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ..memory import PAGE, Gfn, Gpa, Hpa
from .entry import NO_PAGE, State, arch_entry, arch_info
from .locks import UNLOCKED, EntryLock
from .sept import DESCEND, WALK, Children
from .td import Lifecycle, OpState, TdState
from .tlb import CALM, START, Epochs, ZeroStep
from .words import CHILDREN, Guest, Level, is_shared, name, status_part


class Result(NamedTuple):
    """Registers after a SEAMCALL or TDCALL; `exit` says what became of a guest's instruction instead of a status."""

    rax: int = 0
    rcx: int = 0
    rdx: int = 0
    r8: int = 0
    exit: Guest | None = None

    @property
    def ok(self) -> bool:
        """Whether the status is TDX_SUCCESS and the guest's instruction, if it was one, did its work."""
        return status_part(self.rax) == 0 and self.exit in (None, Guest.DATA)

    def __str__(self) -> str:
        text = name(self.rax) if self.exit is None else str(self.exit)
        return text + (f" (RCX {self.rcx:#x}, RDX {self.rdx:#x})" if self.rcx or self.rdx else "")


@dataclass
class Entry:
    """An S-EPT entry: state, the page or table that it points to (bytes), accept counter, lock bits."""

    state: State = State.FREE
    hpa: Hpa = NO_PAGE
    accept_counter: int = 0
    lock: EntryLock = UNLOCKED

    def details(self, level: Level) -> tuple[int, int]:
        """RCX and RDX of an error that reports this entry."""
        return arch_entry(self.state, self.hpa, self.accept_counter), arch_info(self.state, level)


@dataclass
class Vcpu:
    """A vCPU: the TDVPS fields that matter to conversion, and the translations that its processor holds."""

    tdvpr: Hpa
    epoch: int = 0
    associated: bool = False
    inside: bool = False
    stepping: ZeroStep = CALM
    tlb: dict[Gfn, Hpa] = field(default_factory=dict)


@dataclass
class Td:
    """A TD: TDR, TDCS and secure EPT.  `top` is the level of the entries in the root page, which is always there."""

    tdr: Hpa
    hkid: int
    ve_disable: bool = True
    top: Level = Level.PML4
    lifecycle: Lifecycle = Lifecycle.KEYS_CONFIGURED
    op_state: OpState = OpState.INITIALIZED
    fatal: bool = False
    cache_written_back: bool = False
    children: int = 0  # TDR.CHLDCNT, in 4K pages
    epochs: Epochs = START
    vcpus: list[Vcpu] = field(default_factory=list)
    sept: dict[tuple[Level, int], Entry] = field(default_factory=dict)  # by level and number at that level

    @property
    def life(self) -> TdState:
        """How far the TD is in its life, as the leaves ask."""
        return TdState(self.lifecycle, self.op_state, self.fatal)

    @property
    def gpaw(self) -> bool:
        """Whether GPAs are 52 bits wide, so that the SHARED bit is bit 51."""
        return self.top == Level.PML5

    def has_entry(self, gpa: Gpa, level: Level) -> bool:
        """Whether a GPA (bytes) names an entry at a level: private, within the TD's width, aligned to the level."""
        fits = level <= self.top and not gpa % (level.pages * PAGE)
        return fits and not is_shared(gpa, gpaw=self.gpaw) and not gpa >> (52 if self.gpaw else 48)

    def key(self, gpa: Gpa, level: Level) -> tuple[Level, int]:
        """Where the entry of a GPA at a level is in `sept`."""
        return level, gpa // PAGE // level.pages

    def entry(self, gpa: Gpa, level: Level) -> Entry:
        """Return the entry of a GPA at a level; a new FREE one where nothing was put before."""
        return self.sept.setdefault(self.key(gpa, level), Entry())

    def walk(self, asker: str, gpa: Gpa, level: Level = Level.PT) -> tuple[Level, Entry]:
        """Walk down to a level, as a "SEAMCALL" or "ACCEPT" does: where it ended, which may be above."""
        for at in range(self.top, level, -1):
            entry = self.entry(gpa, Level(at))
            if WALK(asker=asker, state=entry.state) != DESCEND:
                return Level(at), entry
        return level, self.entry(gpa, level)

    def below(self, gpa: Gpa, level: Level) -> list[Entry]:
        """Return the 512 entries of the table that a GPA's entry at `level` points to."""
        first = gpa // PAGE // level.pages * CHILDREN
        keys = ((Level(level - 1), first + i) for i in range(CHILDREN))
        return [self.sept.setdefault(key, Entry()) for key in keys]

    def below_kind(self, gpa: Gpa, level: Level) -> Children:
        """Sum up those 512 entries as PROMOTE and SEPT.REMOVE see them."""
        return _kind(self.below(gpa, level), level)

    def busy_child(self, gpa: Gpa, level: Level) -> Entry | None:
        """Return the child whose lock stops PROMOTE, which locks one after another until one does not fit."""
        entries = self.below(gpa, level)
        for i, entry in enumerate(entries):
            if entry.lock.taken:
                fit = (Children.MAPPED, Children.PENDING)
                return entry if i == 0 or _kind(entries[:i], level) in fit else None
        return None


def _kind(entries: list[Entry], level: Level) -> Children:
    """What the first entries of a table are, if they are all alike; the table hangs from an entry at `level`."""
    states = {entry.state for entry in entries}
    if states == {State.FREE}:
        return Children.FREE
    size, first = Level(level - 1).pages * PAGE, entries[0].hpa
    contiguous = all(entry.hpa == first + i * size for i, entry in enumerate(entries))
    if len(states) > 1 or not contiguous or first % (level.pages * PAGE):
        return Children.MIXED
    return {State.MAPPED: Children.MAPPED, State.PENDING: Children.PENDING}.get(states.pop(), Children.MIXED)

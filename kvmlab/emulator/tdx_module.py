"""The TDX module at real size: S-EPT entries by gfn, PAMT by PFN, epochs, as arrays under the rules of hw/tdx.

KVM's SEAMCALLs are steps of the design's program, to which columns.py brings these arrays.  Here are the pages of the
tables, and what a guest does by itself: an ACCEPT of many pages is brought down to keys, one bit or three for each
thing that its checks ask about a page; each key is answered once by those checks.  One TD, finalized, 4-level; KVM
maps 4K leaves only, so entries above are tables or free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..hw.tdx import Leaf, Level, tlb
from ..hw.tdx import pamt as tdx_pamt
from ..hw.tdx import sept as tdx_sept
from ..hw.tdx.checks import Check, Situation, answer, around, told
from ..hw.tdx.entry import State
from ..hw.tdx.locks import EntryLock
from ..hw.tdx.pamt import PageType, PamtEntry
from ..hw.tdx.td import TdState
from .memory import U8, U32, grown, prefix
from .tdx_memory import TdMemory

U64 = NDArray[np.uint64]
CODE = {state: code for code, state in enumerate(tdx_sept.STATES)}
FREE = CODE[State.FREE]
BLOCKED = np.array([state in tdx_sept.ANY_BLOCKED for state in tdx_sept.STATES])
STATE_BITS, NO_TABLE, LOCKED = 7, 8, 16  # of a key
KEYS = [key for key in range(2 * LOCKED) if key & STATE_BITS < len(tdx_sept.STATES)]
TABLE_LEVELS = (Level.PML4, Level.PDPT, Level.PD)  # of entries that tables hang from; the root is there
_ADD = around(Leaf.SEPT_ADD, Check.TREE)[1]  # what SEPT.ADD asks about a table of its own


class Done(NamedTuple):
    """How many pages (or tables) a leaf dealt with, and RAX of the one that it refused, else 0."""

    n: int
    rax: int = 0


class Answers(NamedTuple):
    """The answers of ACCEPT by key: whether it did its work, the state afterwards, RAX."""

    ok: NDArray[np.bool_]
    after: U8
    rax: U64


@lru_cache(None)
def answers() -> Answers:
    """What ACCEPT answers about 4K pages by key."""
    found = Answers(*(np.zeros(2 * LOCKED, kind) for kind in (bool, np.uint8, np.uint64)))
    for key in KEYS:
        state = tdx_sept.STATES[key & STATE_BITS]
        said = answer(Leaf.ACCEPT, _told(key))
        found.ok[key], found.after[key], found.rax[key] = said.ok, CODE[said.state or state], said.rax
    return found


def _told(key: int) -> Situation:
    """What a key says, as the checks ask for it."""
    return told(
        above=(Level.PD, State.FREE if key & NO_TABLE else State.NL_MAPPED),
        entry_lock=EntryLock(taken=bool(key & LOCKED)),
        state=tdx_sept.STATES[key & STATE_BITS],
    )


class TdModule:
    """The module's side of one TD.  Pages are counted, gfns and PFNs index the arrays.

    `new_pfns(n)` gives pages for tables; `fatal` after a machine check in the TD, `off` after one in the module.
    """

    def __init__(self, memory: TdMemory, new_pfns: Callable[[int], int]) -> None:
        self.memory, self.new_pfns = memory, new_pfns
        self.fatal, self.off = False, False
        self.state: U8 = np.zeros(0, np.uint8)
        self.hpa: U32 = np.zeros(0, np.uint32)
        self.pamt: U8 = np.zeros(0, np.uint8)
        self.bepoch: U64 = np.zeros(0, np.uint64)
        self.tables: dict[Level, U8] = {level: np.zeros(0, np.uint8) for level in TABLE_LEVELS}
        self.epochs = tlb.START
        self.table_at: dict[int, tuple[Level, int]] = {}  # PFN of a table -> where it hangs
        self._pool: list[int] = []

    def grow(self, pfns: int) -> None:
        """Make room for PFNs below `pfns`; they are nobody's."""
        self.pamt, self.bepoch = grown(self.pamt, pfns), grown(self.bepoch, pfns)

    def states(self, lo: int, hi: int) -> U8:
        """The states of the entries of gfns [lo, hi), as codes (indices into tdx_sept.STATES), as a view."""
        if hi > len(self.state):
            self.state, self.hpa = grown(self.state, hi), grown(self.hpa, hi)
        return self.state[lo:hi]

    def entry(self, gfn: int) -> State:
        """The state of one gfn's entry."""
        return tdx_sept.STATES[int(self.states(gfn, gfn + 1)[0])]

    def pamt_entry(self, pfn: int) -> PamtEntry:
        """The PAMT entry of a PFN; the owner is this TD's TDR, given as 1."""
        kind = PageType(int(self.pamt[pfn]))
        return PamtEntry(kind, int(kind != PageType.NDA), int(self.bepoch[pfn]))

    @property
    def life(self) -> TdState:
        """How far the TD is in its life."""
        return TdState(fatal=self.fatal)

    # Tables.

    def has_table(self, level: Level, lo: int, hi: int) -> U8:
        """Of the entries at `level` that gfns [lo, hi) need: 1 where a table hangs.  A view."""
        first, end = lo // level.pages, (hi - 1) // level.pages + 1
        if end > len(self.tables[level]):
            self.tables[level] = grown(self.tables[level], end)
        return self.tables[level][first:end]

    def reachable(self, gfn: int, n: int) -> int:
        """How many of `n` gfns have all their tables, up to the first that has not."""
        there = self.has_table(Level.PD, gfn, gfn + n) != 0
        if there.all():
            return n
        return max(0, (gfn // 512 + prefix(there)) * 512 - gfn)

    def missing_tables(self, gfn: int, n: int) -> int:
        """How many tables `n` gfns lack, of all levels."""
        views = [self.has_table(level, gfn, gfn + n) for level in TABLE_LEVELS]
        return sum(len(view) - int(np.count_nonzero(view)) for view in views)

    def add_tables(self, gfn: int, n: int) -> None:
        """What TDH.MEM.SEPT.ADD does for each table that `n` gfns lack, top down."""
        for level in TABLE_LEVELS:
            view, added = self.has_table(level, gfn, gfn + n), list[int]()
            for at in np.flatnonzero(view == 0).tolist():
                pfn = self._table_page()
                page = tdx_pamt.is_free(Level.PT, self.pamt_entry(pfn))
                assert answer(Leaf.SEPT_ADD, told(level=level, page=page), _ADD).ok
                view[at] = 1
                self._note(Leaf.SEPT_ADD, tdx_pamt.OF_TABLE, pfn)
                self.table_at[pfn] = level, gfn // level.pages + at
                added.append(pfn)
            self.memory.watched.update(added)
            for lo, hi in spans(np.array(added, np.uint32)):
                self.memory.accept(lo, hi - lo)

    def walk(self, gfn: int, n: int) -> None:
        """The module reads the tables above `n` gfns; what the host has written into one is poison to it."""
        for pfn in sorted(self.memory.suspect):
            level, at = self.table_at[pfn]
            if gfn // level.pages <= at <= (gfn + n - 1) // level.pages:
                self.memory.read(pfn, key=self.memory.hkid, who="module")

    def _table_page(self) -> int:
        if not self._pool:
            base = self.new_pfns(512)
            self._pool = list(range(base + 511, base - 1, -1))
        return self._pool.pop()

    def _note(self, leaf: Leaf, of: str, pfn: int) -> None:
        """Write into one PAMT entry what the leaf leaves there."""
        after = tdx_pamt.after(leaf, of, self.pamt_entry(pfn), owner=1, td_epoch=self.epochs.td_epoch)
        self.pamt[pfn], self.bepoch[pfn] = after.type, after.bepoch

    def accept(self, gfn: int, n: int, locked: Iterable[int] = ()) -> Done:
        """TDG.MEM.PAGE.ACCEPT of `n` 4K pages: PENDING ones are zeroed and mapped; RAX 48 is a TD exit.

        `locked`: gfns whose entry somebody holds.
        """
        self.walk(gfn, n)
        states = self.states(gfn, gfn + n)
        keys = states.copy()
        keys[self.reachable(gfn, n) :] |= NO_TABLE  # nobody looks behind the first of them
        for at in locked:
            if gfn <= at < gfn + n:
                keys[at - gfn] |= LOCKED
        table = answers()
        done = prefix(table.ok[keys])
        states[:done] = table.after[keys[:done]]
        for lo, hi in spans(self.hpa[gfn : gfn + done]):
            self.memory.accept(lo, hi - lo)
        return Done(done, 0 if done == n else int(table.rax[keys[done]]))


def spans(pfns: U32) -> list[tuple[int, int]]:
    """The maximal ranges of consecutive PFNs, in order."""
    if not len(pfns):
        return []
    cuts = [0, *(np.flatnonzero(np.diff(pfns.astype(np.int64)) != 1) + 1).tolist(), len(pfns)]
    return [(int(pfns[a]), int(pfns[b - 1]) + 1) for a, b in pairwise(cuts)]

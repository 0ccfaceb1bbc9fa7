"""The TDX module at real size: S-EPT entries by gfn, PAMT by PFN, epochs, as arrays under the rules of hw/tdx.

A range is brought down to keys, one bit or three for each thing that the checks of a leaf ask about a page; each key
is answered once by those checks, and the answers are scattered with a look-up table.  One TD, finalized, 4-level;
KVM maps 4K leaves only, so entries above are tables or free.  Each leaf stops at the first page that it refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..hw.tdx import Leaf, Level, Status, tlb
from ..hw.tdx import pamt as tdx_pamt
from ..hw.tdx import sept as tdx_sept
from ..hw.tdx.checks import CHECKS, Check, Situation, answer, around, told
from ..hw.tdx.entry import State
from ..hw.tdx.locks import EntryLock
from ..hw.tdx.pamt import PageType, PamtEntry
from ..hw.tdx.td import TdState
from ..hw.tdx.tlb import TRACKED, Age
from .memory import U8, U32, grown, prefix
from .tdx_memory import TdMemory

U64 = NDArray[np.uint64]
CODE = {state: code for code, state in enumerate(tdx_sept.STATES)}
FREE = CODE[State.FREE]
STATE_BITS, UNTRACKED, USED, NO_TABLE, LOCKED = 7, 8, 16, 32, 64  # of a key
KEYS = [key for key in range(2 * LOCKED) if key & STATE_BITS < len(tdx_sept.STATES)]
TABLE_LEVELS = (Level.PML4, Level.PDPT, Level.PD)  # of entries that tables hang from; the root is there
AGES = tuple(Age)


class Done(NamedTuple):
    """How many pages (or tables) a leaf dealt with, and RAX of the one that it refused, else 0."""

    n: int
    rax: int = 0


class Answers(NamedTuple):
    """A leaf's answers by key: whether it did its work, the state afterwards, RAX."""

    ok: NDArray[np.bool_]
    after: U8
    rax: U64


@lru_cache(None)
def answers(leaf: Leaf) -> Answers:
    """What a leaf answers about 4K pages by key, once it has what it takes of the TD."""
    found = Answers(np.zeros(128, bool), np.zeros(128, np.uint8), np.zeros(128, np.uint64))
    for key in KEYS:
        state = tdx_sept.STATES[key & STATE_BITS]
        said = answer(leaf, _told(key), for_td_and_page(leaf)[1])
        found.ok[key], found.after[key], found.rax[key] = said.ok, CODE[said.state or state], said.rax
    return found


def _told(key: int) -> Situation:
    """What a key says, as the checks ask for it."""
    return told(
        above=(Level.PD, State.FREE if key & NO_TABLE else State.NL_MAPPED),
        entry_lock=EntryLock(taken=bool(key & LOCKED)),
        state=tdx_sept.STATES[key & STATE_BITS],
        tracked=not key & UNTRACKED,
        page=Status.PAGE_METADATA_INCORRECT if key & USED else Status.SUCCESS,
    )


def for_td_and_page(leaf: Leaf) -> tuple[tuple[Check, ...], tuple[Check, ...]]:
    """The checks of a leaf that many pages in a row answer alike, up to the tree's lock, and those of each page."""
    return around(leaf, Check.TREE) if Check.TREE in CHECKS[leaf] else ((), CHECKS[leaf])


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

    def sept_add(self, gfn: int, n: int) -> Done:
        """TDH.MEM.SEPT.ADD of each table that `n` gfns lack, top down."""
        count = 0
        for level in TABLE_LEVELS:
            view, added = self.has_table(level, gfn, gfn + n), list[int]()
            for at in np.flatnonzero(view == 0).tolist():
                pfn = self._table_page()
                page = tdx_pamt.is_free(Level.PT, self.pamt_entry(pfn))
                found = answer(Leaf.SEPT_ADD, told(level=level, page=page), for_td_and_page(Leaf.SEPT_ADD)[1])
                if not found.ok:
                    return Done(count, found.rax)
                view[at], count = 1, count + 1
                self._note(Leaf.SEPT_ADD, tdx_pamt.OF_TABLE, pfn)
                self.table_at[pfn] = level, gfn // level.pages + at
                added.append(pfn)
            self.memory.watched.update(added)
            for lo, hi in spans(np.array(added, np.uint32)):
                self.memory.accept(lo, hi - lo)
        return Done(count)

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

    # Leaves on ranges.  `locked`: gfns whose entry somebody holds.

    def aug(self, gfn: int, n: int, pfn: int, locked: Iterable[int] = ()) -> Done:
        """TDH.MEM.PAGE.AUG of `n` 4K pages, PFN after PFN."""
        used = self.pamt[pfn : pfn + n] != PageType.NDA
        done = self._run(Leaf.PAGE_AUG, gfn, n, locked, used * np.uint8(USED))
        self.hpa[gfn : gfn + done.n] = np.arange(pfn, pfn + done.n, dtype=np.uint32)
        self._effect(Leaf.PAGE_AUG, np.arange(pfn, pfn + done.n))
        return done

    def block(self, gfn: int, n: int, locked: Iterable[int] = ()) -> Done:
        """TDH.MEM.RANGE.BLOCK of `n` 4K entries."""
        done = self._run(Leaf.RANGE_BLOCK, gfn, n, locked)
        self._effect(Leaf.RANGE_BLOCK, self.hpa[gfn : gfn + done.n])
        return done

    def remove(self, gfn: int, n: int, locked: Iterable[int] = ()) -> Done:
        """TDH.MEM.PAGE.REMOVE of `n` 4K pages."""
        self.states(gfn, gfn + n)
        untracked = ~self.tracked(self.hpa[gfn : gfn + n])
        done = self._run(Leaf.PAGE_REMOVE, gfn, n, locked, untracked * np.uint8(UNTRACKED))
        self._effect(Leaf.PAGE_REMOVE, self.hpa[gfn : gfn + done.n])
        return done

    def wbinvd(self, pfns: U32) -> Done:
        """TDH.PHYMEM.PAGE.WBINVD with the TD's HKID, of pages that are free again."""
        done = _look_up(Leaf.PAGE_WBINVD, (self.pamt[pfns] != PageType.NDA) * np.uint8(USED))
        for lo, hi in spans(pfns[: done.n]):
            self.memory.wbinvd(lo, hi - lo)
        return done

    def accept(self, gfn: int, n: int, locked: Iterable[int] = ()) -> Done:
        """TDG.MEM.PAGE.ACCEPT of `n` 4K pages: PENDING ones are zeroed and mapped; RAX 48 is a TD exit."""
        done = self._run(Leaf.ACCEPT, gfn, n, locked)
        for lo, hi in spans(self.hpa[gfn : gfn + done.n]):
            self.memory.accept(lo, hi - lo)
        return done

    def tracked(self, pfns: U32) -> NDArray[np.bool_]:
        """is_tlb_tracked() of each page's BEPOCH, by its age."""
        epoch = self.epochs.td_epoch
        inside = self.epochs.refcount[(epoch - 1) & 1] > 0
        lut = np.array([TRACKED(bepoch=age, previous_inside=inside) for age in AGES])
        by_age: NDArray[np.bool_] = lut[np.minimum(np.uint64(epoch) - self.bepoch[pfns], np.uint64(2))]
        return by_age

    def _run(self, leaf: Leaf, gfn: int, n: int, locked: Iterable[int], more: U8 | None = None) -> Done:
        """Ask the checks of each page until one is refused, and bring those before it into their new states.

        `more`: what the keys have besides state, table and lock of the entry.
        """
        self.walk(gfn, n)
        states = self.states(gfn, gfn + n)
        keys = states.copy() if more is None else states | more
        keys[self.reachable(gfn, n) :] |= NO_TABLE  # nobody looks behind the first of them
        for at in locked:
            if gfn <= at < gfn + n:
                keys[at - gfn] |= LOCKED
        done = _look_up(leaf, keys)
        states[: done.n] = answers(leaf).after[keys[: done.n]]
        return done

    def _effect(self, leaf: Leaf, pfns: U32 | NDArray[np.int64]) -> None:
        """EFFECTS of a leaf on the PAMT entries of its pages."""
        change: tdx_pamt.Change = tdx_pamt.EFFECTS(leaf=leaf, of=tdx_pamt.OF_PAGE)
        if isinstance(change.type, PageType):
            self.pamt[pfns] = change.type
        if change.bepoch != tdx_pamt.KEEP:
            self.bepoch[pfns] = 0 if change.bepoch == "0" else self.epochs.td_epoch


def _look_up(leaf: Leaf, keys: U8) -> Done:
    """How many pages a leaf deals with, and RAX of the one that stops it."""
    table = answers(leaf)
    good = table.ok[keys]
    n = len(keys) if good.all() else prefix(good)
    return Done(n, 0 if n == len(keys) else int(table.rax[keys[n]]))


def spans(pfns: U32) -> list[tuple[int, int]]:
    """The maximal ranges of consecutive PFNs, in order."""
    if not len(pfns):
        return []
    cuts = [0, *(np.flatnonzero(np.diff(pfns.astype(np.int64)) != 1) + 1).tolist(), len(pfns)]
    return [(int(pfns[a]), int(pfns[b - 1]) + 1) for a, b in pairwise(cuts)]

"""The TDX module at real size: S-EPT entries by gfn, PAMT by PFN, epochs, as arrays under the tables of hw/tdx/*.py.

A range is brought down to keys (state, tracked, page free); each key is answered once by the scalar rule, and the
answers are scattered with a look-up table.  One TD, finalized, 4-level; KVM maps 4K leaves only, so entries above
are tables or free.  Each leaf stops at the first page that it refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..hw.tdx import Leaf, Level, Operand, Status, with_operand
from ..hw.tdx import pamt as tdx_pamt
from ..hw.tdx import sept as tdx_sept
from ..hw.tdx import td as tdx_td
from ..hw.tdx import tlb as tdx_tlb
from ..hw.tdx.entry import State
from ..hw.tdx.pamt import PageType, PamtEntry
from ..hw.tdx.tlb import TRACKED, Age
from .memory import U8, U32, grown, prefix
from .tdx_memory import TdMemory

U64 = NDArray[np.uint64]
CODE = {state: code for code, state in enumerate(tdx_sept.STATES)}
FREE = CODE[State.FREE]
TRACKED_BIT, FREE_BIT = 8, 16
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
def answers(leaf: Leaf, running: bool) -> Answers:
    """SEPT of hw/tdx/sept.py as arrays, for 4K entries."""
    found = Answers(np.zeros(32, bool), np.zeros(32, np.uint8), np.zeros(32, np.uint64))
    for key in range(32):
        if key % 8 < len(tdx_sept.STATES):
            state = tdx_sept.STATES[key % 8]
            tracked, free = bool(key & TRACKED_BIT), bool(key & FREE_BIT)
            answer = tdx_sept.seamcall(
                leaf, state, running=running, tracked=tracked, page_free=free, level=_level(leaf)
            )
            found.ok[key], found.after[key] = answer.ok, CODE[answer.state]
            found.rax[key] = answer.rax
    return found


def _level(leaf: Leaf) -> Level:
    return Level.PD if leaf == Leaf.SEPT_ADD else Level.PT


class TdModule:
    """The module's side of one TD.  Pages are counted, gfns and PFNs index the arrays.

    `new_pfns(n)` gives pages for tables; `fatal` after a machine check in the TD, `off` after one in the module.
    """

    def __init__(self, memory: TdMemory, new_pfns: Callable[[int], int]) -> None:
        self.memory, self.new_pfns = memory, new_pfns
        self.op_state, self.fatal, self.off = tdx_td.OpState.RUNNABLE, False, False
        self.state: U8 = np.zeros(0, np.uint8)
        self.hpa: U32 = np.zeros(0, np.uint32)
        self.pamt: U8 = np.zeros(0, np.uint8)
        self.bepoch: U64 = np.zeros(0, np.uint64)
        self.tables: dict[Level, U8] = {level: np.zeros(0, np.uint8) for level in TABLE_LEVELS}
        self.epochs = tdx_tlb.START
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

    def admit(self, leaf: Leaf) -> int:
        """RAX if the TD does not let a leaf in, else 0."""
        lifecycle = tdx_td.Lifecycle.KEYS_CONFIGURED
        return int(tdx_td.admitted(leaf, lifecycle=lifecycle, op_state=self.op_state, fatal=self.fatal))

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

    def sept_add(self, gfn: int, n: int) -> tuple[int, int]:
        """TDH.MEM.SEPT.ADD of each table that `n` gfns lack, top down: how many, and RAX of a refusal."""
        code, count = self.admit(Leaf.SEPT_ADD), 0
        if code:
            return 0, code
        for level in TABLE_LEVELS:
            view, added = self.has_table(level, gfn, gfn + n), list[int]()
            for at in np.flatnonzero(view == 0).tolist():
                pfn = self._table_page()
                answer = tdx_sept.seamcall(Leaf.SEPT_ADD, State.FREE, page_free=self._free(pfn), level=level)
                if not answer.ok:
                    return count, answer.rax
                view[at], count = 1, count + 1
                self._note(Leaf.SEPT_ADD, tdx_pamt.OF_TABLE, pfn)
                self.table_at[pfn] = level, gfn // level.pages + at
                added.append(pfn)
            self.memory.watched.update(added)
            for lo, hi in spans(np.array(added, np.uint32)):
                self.memory.accept(lo, hi - lo)
        return count, 0

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

    def _free(self, pfn: int) -> bool:
        return tdx_pamt.is_free(Level.PT, self.pamt_entry(pfn)) == Status.SUCCESS

    def _note(self, leaf: Leaf, of: str, pfn: int) -> None:
        """Write into one PAMT entry what the leaf leaves there."""
        after = tdx_pamt.after(leaf, of, self.pamt_entry(pfn), owner=1, td_epoch=self.epochs.td_epoch)
        self.pamt[pfn], self.bepoch[pfn] = after.type, after.bepoch

    # Leaves on ranges.

    def aug(self, gfn: int, n: int, pfn: int) -> Done:
        """TDH.MEM.PAGE.AUG of `n` 4K pages, PFN after PFN."""
        free = self.pamt[pfn : pfn + n] == PageType.NDA
        done = self._apply(Leaf.PAGE_AUG, gfn, n, free=free)
        self.hpa[gfn : gfn + done.n] = np.arange(pfn, pfn + done.n, dtype=np.uint32)
        self._effect(Leaf.PAGE_AUG, np.arange(pfn, pfn + done.n))
        return done

    def block(self, gfn: int, n: int) -> Done:
        """TDH.MEM.RANGE.BLOCK of `n` 4K entries."""
        done = self._apply(Leaf.RANGE_BLOCK, gfn, n)
        self._effect(Leaf.RANGE_BLOCK, self.hpa[gfn : gfn + done.n])
        return done

    def remove(self, gfn: int, n: int) -> Done:
        """TDH.MEM.PAGE.REMOVE of `n` 4K pages."""
        self.states(gfn, gfn + n)
        done = self._apply(Leaf.PAGE_REMOVE, gfn, n, tracked=self.tracked(self.hpa[gfn : gfn + n]))
        self._effect(Leaf.PAGE_REMOVE, self.hpa[gfn : gfn + done.n])
        return done

    def track(self) -> int:
        """TDH.MEM.TRACK: RAX."""
        code = self.admit(Leaf.TRACK)
        if not code:
            status, self.epochs = tdx_tlb.track(self.epochs)
            code = int(status)
        return code

    def wbinvd(self, pfns: U32) -> Done:
        """TDH.PHYMEM.PAGE.WBINVD with the TD's HKID, of pages that are free again."""
        free = self.pamt[pfns] == PageType.NDA
        n = len(free) if free.all() else prefix(free)
        for lo, hi in spans(pfns[:n]):
            self.memory.wbinvd(lo, hi - lo)
        return Done(n, 0 if n == len(free) else with_operand(Status.PAGE_METADATA_INCORRECT, Operand.RCX))

    def accept(self, gfn: int, n: int) -> Done:
        """TDG.MEM.PAGE.ACCEPT of `n` 4K pages: PENDING ones are zeroed and mapped; RAX 48 is a TD exit."""
        self.walk(gfn, n)
        view = self.states(gfn, gfn + n)
        table = answers(Leaf.ACCEPT, True)
        good = table.ok[view]
        done = n if good.all() else prefix(good)
        rax = 0 if done == n else int(table.rax[view[done]])
        for lo, hi in spans(self.hpa[gfn : gfn + done]):
            self.memory.accept(lo, hi - lo)
        view[:done] = table.after[view[:done]]
        return Done(done, rax)

    def tracked(self, pfns: U32) -> NDArray[np.bool_]:
        """is_tlb_tracked() of each page's BEPOCH, by its age."""
        epoch = self.epochs.td_epoch
        inside = self.epochs.refcount[(epoch - 1) & 1] > 0
        lut = np.array([TRACKED(bepoch=age, previous_inside=inside) for age in AGES])
        by_age: NDArray[np.bool_] = lut[np.minimum(np.uint64(epoch) - self.bepoch[pfns], np.uint64(2))]
        return by_age

    def _apply(
        self,
        leaf: Leaf,
        gfn: int,
        n: int,
        tracked: NDArray[np.bool_] | None = None,
        free: NDArray[np.bool_] | None = None,
    ) -> Done:
        """The checks in the module's order (TD, walk, state, page), then the new states."""
        if code := self.admit(leaf):
            return Done(0, code)
        self.walk(gfn, n)
        reach = self.reachable(gfn, n)
        keys = self.states(gfn, gfn + reach).copy()
        for flags, bit in ((tracked, TRACKED_BIT), (free, FREE_BIT)):
            if flags is not None:
                keys |= flags[:reach].astype(np.uint8) * np.uint8(bit)
        table = answers(leaf, tdx_td.running(self.op_state))
        good = table.ok[keys]
        done = reach if good.all() else prefix(good)
        self.state[gfn : gfn + done] = table.after[keys[:done]]
        if done < reach:
            return Done(done, int(table.rax[keys[done]]))
        if reach < n:
            stopped = tdx_sept.walk("SEAMCALL", State.FREE, Level.PD)
            assert stopped is not None
            return Done(done, stopped.rax)
        return Done(n)

    def _effect(self, leaf: Leaf, pfns: U32 | NDArray[np.int64]) -> None:
        """EFFECTS of a leaf on the PAMT entries of its pages."""
        change: tdx_pamt.Change = tdx_pamt.EFFECTS(leaf=leaf, of=tdx_pamt.OF_PAGE)
        if isinstance(change.type, PageType):
            self.pamt[pfns] = change.type
        if change.bepoch != tdx_pamt.KEEP:
            self.bepoch[pfns] = 0 if change.bepoch == "0" else self.epochs.td_epoch


def spans(pfns: U32) -> list[tuple[int, int]]:
    """The maximal ranges of consecutive PFNs, in order."""
    if not len(pfns):
        return []
    cuts = [0, *(np.flatnonzero(np.diff(pfns.astype(np.int64)) != 1) + 1).tolist(), len(pfns)]
    return [(int(pfns[a]), int(pfns[b - 1]) + 1) for a, b in pairwise(cuts)]

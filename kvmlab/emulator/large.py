"""2M pages as columns: each is run with one gfn for each situation that its pages are in (`compile.pages.Shape`).

No rule tells pages of a 2M apart but for its first one, those that a request is about, and the one that faults; so
the first page, that one, and one page for each distinct valuation among the others stand for all 512.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..compile.pages import Shape
from ..explore.ranges import Note, Ranges
from ..hw.memory import Gfn
from ..hw.snp import PG_2M
from ..hw.snp.pages import PAGES_2M
from ..kernel.failures import RMPUPDATE
from ..model.state import Cell
from .columns import FAMILIES, Codes, Column, Family, Placed
from .memory import prefix, runs
from .slots import MemSlot
from .vm_state import VmState

# What is not of each page, or is looked at another way.
OF_2M = frozenset({"directmap_2m", "slot", "invalidate_range", "failures_left", "npt"})
LEAVES = (None, "S", "P", "other")


class Kind(NamedTuple):
    """What pages of one kind have in common: a number for each family, the leaf, whether the request has them."""

    codes: tuple[int, ...]
    leaf: int
    asked: bool
    apart: bool
    place: int  # before a page whose RMPUPDATE was made to fail, that page, behind it


class Group(NamedTuple):
    """2M pages in one situation: the machine that runs them, and the kinds of pages that its gfns stand for."""

    engine: Ranges
    kinds: tuple[int, ...]


class Regions:
    """`units` consecutive 2M pages of a memslot (or of a file), of which a call is about `n` pages from `lo` on.

    `apart`: a page, counted from the first, that gets a gfn of its own: the one that faults.
    """

    def __init__(
        self, vm: VmState, shaped: Callable[[Shape], Ranges], whole: Column, asked: tuple[int, int],
        apart: int | None = None, private: bool = True,
    ) -> None:  # fmt: skip
        self.vm, self.shaped, self.whole, self.asked = vm, shaped, whole, asked
        self.apart, self.private = apart, private
        self.units = whole.n // PAGES_2M
        self.slot, self.file = whole.slot, whole.file
        self.loaded = False
        self.values: list[int] = []
        self.old: list[int] = []
        self.groups: list[Group] = []
        self.which: NDArray[np.uint16] = np.zeros(self.units, np.uint16)

    lo = property(lambda self: None if self.whole.lo is None else self.whole.lo + self.asked[0])
    n = property(lambda self: self.asked[1] - self.asked[0])
    at = property(lambda self: self.whole.at + self.asked[0])
    start = property(lambda self: self.whole.lo)
    pfn = property(lambda self: self.whole.pfn)
    shared = property(lambda self: self.whole.shared)

    def cut(self, n: int) -> None:
        """The call is about the first `n` of its pages only."""
        self.store()
        self.asked, self.loaded = (self.asked[0], self.asked[0] + n), False

    def split(self, n: int) -> tuple[Regions, Regions]:
        """The first `n` 2M pages, and the others."""
        self.store()
        self.loaded = False
        at = n * PAGES_2M
        first, rest = self.whole.split(at)
        lo, hi = self.asked
        return (
            Regions(self.vm, self.shaped, first, (lo, min(hi, at)), self.apart, self.private),
            Regions(self.vm, self.shaped, rest, (max(lo - at, 0), max(hi - at, 0)), None, self.private),
        )

    def plain(self, private: bool) -> bool:
        """Whether a fault in this one 2M page is one of a 4K page: nothing is large there, and nothing will be."""
        vm, whole = self.vm, self.whole
        assert whole.lo is not None and self.slot
        if (vm.mmu.leaves(whole.lo, whole.lo + 1) & 1).any():
            return False
        assigned = None
        if vm.has_rmp and whole.pfn is not None:
            assigned = vm.rmp.assigned(whole.pfn, PAGES_2M).any()
            if vm.rmp.big(whole.pfn, PAGES_2M).any():
                return False
        assigns = private and self.folio(0) and assigned is not None and not assigned
        return not (self.maps(private) or assigns)

    def maps(self, private: bool) -> bool:
        """Whether the first 2M page may be mapped by one leaf."""
        possible = self.folio(0) if private else self.large_shared(0)
        return bool(
            possible and self.slot and self.whole.lo is not None and self.slot.allows(self.whole.lo, "2M")
        )

    def is_large(self) -> bool:
        """Whether the first of them is mapped by one leaf."""
        assert self.whole.lo is not None
        return bool(self.vm.mmu.leaves(self.whole.lo, self.whole.lo + 1)[0] & 1)

    def leading(self) -> int:
        """How many 2M pages from the first on are in its situation."""
        return prefix(self.which == 0)

    def engine(self, group: int) -> Ranges:
        """The machine that runs a group."""
        return self.groups[group].engine

    def load(self) -> list[int]:
        """The distinct situations."""
        if self.loaded:
            return self.values
        self.loaded = True
        self._look()
        self.groups, self.values, which = [], [], np.zeros(self.units, np.uint16)
        seen: dict[tuple[Any, ...], int] = {}
        rows = self.of.reshape(self.units, PAGES_2M)
        same = rows.min(axis=1) == rows.max(axis=1)
        for unit in range(self.units):
            head = int(rows[unit, 0])
            others = (head,) if same[unit] else tuple(np.flatnonzero(np.bincount(rows[unit, 1:])).tolist())
            state = self._state(unit, head, others)
            if state not in seen:
                seen[state] = len(self.groups)
                self._new_group(state, unit, head, others)
            which[unit] = seen[state]
        self.which, self.old = which, list(self.values)
        return self.values

    def _look(self) -> None:
        """Give each page the number of its kind."""
        whole = self.whole
        n = whole.n
        columns = [family.gather(whole) for family in families_of_pages()]
        leaves = (
            self.vm.mmu.leaves(whole.lo, whole.lo + n) if whole.lo is not None else np.zeros(n, np.uint32)
        )
        self.leaves = leaves
        small, asked = _npt(whole, leaves), self._asked()
        found = [_plain(codes) for codes in (*columns, small, asked, self._places())]
        key, most = np.zeros(n, np.uint32), 1
        for codes in found:
            if not isinstance(codes, int):
                size = int(codes.max()) + 1
                key, most = key * np.uint32(size) + codes, most * size
        firsts, of = _numbered(key, most)
        if self.apart:
            firsts, of = [*firsts, self.apart], of.copy()
            of[self.apart] = len(firsts) - 1
        kinds = [
            Kind(tuple(at_page[:-3]), at_page[-3], bool(at_page[-2]), bool(self.apart and n == len(firsts) - 1),
                 at_page[-1])
            for n, page in enumerate(firsts)
            for at_page in [[codes if isinstance(codes, int) else int(codes[page]) for codes in found]]
        ]  # fmt: skip
        # Those that the request is about come first, for it is one run of gfns.
        order = sorted(range(len(kinds)), key=lambda k: (not kinds[k].asked, kinds[k].place))
        self.kinds = [kinds[k] for k in order]
        number = np.zeros(len(kinds), np.uint16)
        number[order] = np.arange(len(kinds), dtype=np.uint16)
        self.of: NDArray[np.uint16] = number[of]

    def _asked(self) -> Codes:
        """Which pages the call is about."""
        if self.asked == (0, self.whole.n):
            return 1
        asked = np.zeros(self.whole.n, np.uint8)
        asked[self.asked[0] : self.asked[1]] = 1
        return asked

    def _places(self) -> Codes:
        """0 before the first page of a 2M whose RMPUPDATE was made to fail, 1 there, 2 behind it."""
        if not self.vm.rmp.failures:
            return 0
        found, pfn = np.zeros(self.whole.n, np.uint8), self.whole.pfn
        for page in sorted(self.vm.rmp.failures, reverse=True) if pfn is not None else ():
            at = page - (pfn or 0)
            if 0 <= at < self.whole.n:
                end = at + PAGES_2M - at % PAGES_2M
                found[at - at % PAGES_2M : end] = 0
                found[at], found[at + 1 : end] = 1, 2
        return found

    def _state(self, unit: int, head: int, others: tuple[int, ...]) -> tuple[Any, ...]:
        """All that matters of one 2M page."""
        whole, vm = self.whole, self.vm
        at = unit * PAGES_2M
        leaf = int(self.leaves[at])
        large = 0
        if leaf & 1:
            pfn = (leaf >> 1) - 1
            large = 2 if pfn == (whole.pfn or -1) + at else 1
            if vm.in_place:
                large = 2 if self.private else 1
        gfn = None if whole.lo is None else whole.lo + at
        mixed = self.slot is None or gfn is None or not self.slot.allows(gfn, "2M")
        split = 1 if whole.pfn is None else int(vm.directmap.split[(whole.pfn + at) // PAGES_2M])
        inside = bool(self.asked[0] < at + PAGES_2M and at < self.asked[1])
        window = vm.mmu.window if vm.mmu.in_progress else None
        stale = window is not None and window[0] <= (whole.lo or 0) + at + (self.apart or 0) < window[1]
        stale = stale and self.apart is not None
        slot = 0 if self.slot is None or whole.gone() else 1 + self.slot.invalid
        folio, shared = self.folio(unit), self.large_shared(unit)
        return head, others, large, mixed, split, folio, shared, stale, slot, inside

    def folio(self, unit: int) -> bool:
        """Whether guest_memfd has one folio for it, or will; a 2M RMP entry that is left counts, too."""
        whole, at = self.whole, unit * PAGES_2M
        if whole.pfn is None or (whole.pfn + at) % PAGES_2M or not self.vm.private_2m:
            return False
        if whole.pfn is not None and self.vm.has_rmp and self.vm.rmp.big(whole.pfn + at, PAGES_2M).any():
            return True
        file = whole.file
        if file is None:
            return False
        first = whole.at + at
        present = file.present[first : first + PAGES_2M]
        return bool(first % PAGES_2M == 0 and len(present) == PAGES_2M and first not in file.broken
                    and (present.all() or not present.any()))  # fmt: skip

    def large_shared(self, unit: int) -> bool:
        """Whether the shared memory is backed by one 2M page."""
        shared = self.whole.shared
        return self.vm.huge(False) and shared is not None and (shared + unit * PAGES_2M) % PAGES_2M == 0

    def _new_group(self, state: tuple[Any, ...], unit: int, head: int, others: tuple[int, ...]) -> None:
        _, _, large, mixed, split, folio, shared, stale, slot, _ = state
        kinds = (head, *others)
        request = tuple(g for g, kind in enumerate(kinds) if self.kinds[kind].asked)
        if self.apart is not None or not request:
            request = tuple(range(len(kinds)))
        engine = self.shaped(Shape(len(kinds), tuple(map(Gfn, request)), folio, shared))
        value = 0
        names = families_of_pages()
        for gfn, kind in enumerate(kinds):
            placed = placed_pages(engine, gfn)
            for family, code in zip(names, self.kinds[kind].codes, strict=True):
                if family.name in placed:
                    value |= placed[family.name].bits(code)
            leaf = LEAVES[self.kinds[kind].leaf]
            if "npt" in engine.fields:
                cell = engine.cell("npt", gfn)
                value |= 0 if large else cell.code(_leaf_value(cell, leaf, gfn))
        set_: dict[tuple[str, Any], Any] = {
            ("npt_large", ("2M", 0)): (None, "shared", "private")[large], ("mixed", ("2M", 0)): mixed,
            ("directmap_2m", None): not split, ("slot", None): ("none", "valid", "invalid")[slot],
        }  # fmt: skip
        failing = [g for g, kind in enumerate(kinds) if self.kinds[kind].place == 1]
        if failing:
            set_["failures_left", RMPUPDATE] = failing[0] + 1
        if stale:
            set_["invalidate_range", None] = (self.faulting(kinds), self.faulting(kinds) + 1)
        for (name, key), what in set_.items():
            if name in engine.fields and (cell := engine.cell(name, key)).bits:
                value |= cell.code(what)
        self.groups.append(Group(engine, kinds))
        self.values.append(value)

    def faulting(self, kinds: tuple[int, ...]) -> int:
        """The gfn that stands for the page that faults."""
        if self.apart == 0:
            return 0
        return next(g for g, kind in enumerate(kinds) if g and self.kinds[kind].apart)

    def mask(self, group: int, gfn: int | None = None) -> NDArray[np.bool_]:
        """Which pages belong to a group, or to one gfn of it."""
        one = self.units == 1
        found = np.ones(self.whole.n, bool) if one else np.repeat(self.which == group, PAGES_2M)
        if gfn is not None:
            if gfn:
                found &= self.of == self.groups[group].kinds[gfn]
                found[::PAGES_2M] = False
            else:
                heads = found[::PAGES_2M].copy()
                found[:] = False
                found[::PAGES_2M] = heads
        return found

    def first(self, group: int) -> int:
        """The first page of a group that the call is about, counted from the column's."""
        return max(int((self.which == group).argmax()) * PAGES_2M, self.asked[0])

    def count(self, group: int) -> int:
        """How many 2M pages a group has."""
        return int(np.count_nonzero(self.which == group))

    def page_of(self, group: int, gfn: int) -> int:
        """The first page that a gfn of the model stands for."""
        return int(np.argmax(self.mask(group, gfn)))

    def unit(self, group: int) -> int:
        """The first 2M page of a group."""
        return int(np.argmax(self.which == group))

    def behind(self, unit: int) -> None:
        """What is behind a 2M page is as it was."""
        k = len(self.values)
        self.which[unit + 1 :] += np.uint16(k)
        self.values, self.old, self.groups = self.values + self.old, self.old * 2, self.groups * 2

    def refused(self, group: int) -> tuple[int, int]:
        """The page whose RMPUPDATE was made to fail, and how many pages that was about."""
        engine, kinds = self.groups[group]
        gfn = next(g for g, kind in enumerate(kinds) if self.kinds[kind].place == 1)
        page = int(self.mask(group, gfn).argmax())
        entry = engine.cell("rmp", f"P{gfn}").get(self.old[group])
        conf = engine.model.conf
        large = conf.folio_2m and conf.converted == conf.gfns and page % PAGES_2M == 0
        large = large and (entry.size == PG_2M if entry.assigned else True)
        return page, PAGES_2M if large else 1

    def pages_of(self, group: int, note: Note) -> tuple[int, int]:
        """Where something happened, and to how many pages (or 2M pages) of a group."""
        cell = self.engine(group).cell("npt_large", ("2M", 0))
        once = note.gfn is None or "2M" in note.text or (note.kind == "zap" and self.old[group] & cell.mask)
        if once:
            return int(np.argmax(self.which == group)) * PAGES_2M, self.count(group)
        mask = self.mask(group, note.gfn)
        return int(mask.argmax()), int(np.count_nonzero(mask))

    def spans(self, group: int) -> list[tuple[int, int]]:
        """The runs of pages of a group."""
        if self.units == 1:
            return [(0, self.whole.n)]
        return runs(self.mask(group), 0, self.whole.n)

    def allocated(self) -> None:
        """The pages that the call is about have just been allocated: with a folio all of its 2M."""
        if not self.folio(0):
            self.loaded = False
            return
        for group, value in enumerate(self.values):
            for cell in self._cells(group, "gmem"):
                value = value & ~cell.mask | cell.code("cached")
            self.values[group] = value
        self.old = list(self.values)

    def _cells(self, group: int, name: str) -> list[Cell]:
        """The cells of one name, gfn by gfn."""
        placed = [placed_pages(self.engine(group), gfn) for gfn in range(len(self.groups[group].kinds))]
        return [found[name].cell for found in placed if name in found]

    def store(self) -> None:
        """Write back what has changed."""
        if not self.loaded or self.values == self.old:
            return
        for group, (was, value) in enumerate(zip(self.old, self.values, strict=True)):
            if was != value:
                self._store(group, was, value)
        self.old = list(self.values)

    def _store(self, group: int, was: int, value: int) -> None:
        engine, kinds = self.groups[group]
        dropped = [(was ^ value) & cell.mask for cell in self._cells(group, "tlb")]
        if all(dropped) and self.whole.lo is not None:
            for lo, hi in self.spans(group):
                self.vm.mmu.drop_pages(self.whole.lo + lo, self.whole.lo + hi)
        for gfn in range(len(kinds)):
            mask: NDArray[np.bool_] | None = None
            for name, placed in placed_pages(engine, gfn).items():
                if name == "tlb" and all(dropped):
                    continue
                if placed.family.scatter and (was ^ value) & placed.cell.mask:
                    mask = self.mask(group, gfn) if mask is None else mask
                    placed.family.scatter(self.whole, mask, placed.cell.get(value))
        if self.whole.lo is not None:
            self._leaves(group, was, value)

    def _leaves(self, group: int, was: int, value: int) -> None:
        """The leaves: one of 2M on all its pages, or those of 4K."""
        engine, kinds = self.groups[group]
        large = engine.cell("npt_large", ("2M", 0))
        cells = [engine.cell("npt", gfn) for gfn in range(len(kinds))]
        if not any((was ^ value) & cell.mask for cell in (large, *cells)):
            return
        whole = self.whole
        assert whole.lo is not None
        view = self.vm.mmu.leaves(whole.lo, whole.lo + whole.n)
        if (kind := large.get(value)) is not None:
            base = (whole.pfn if kind == "private" or self.vm.in_place else whole.shared) or 0
            mask = self.mask(group)
            view[mask] = (whole.leaves(base) | np.uint32(1))[mask]
            return
        for gfn, cell in enumerate(cells):
            if not (was ^ value) & (cell.mask | large.mask):
                continue
            mask, leaf = self.mask(group, gfn), cell.get(value)
            if leaf is None:
                view[mask] = 0
            elif leaf != "other":
                base = (whole.pfn if str(leaf).startswith("P") else whole.shared) or 0
                view[mask] = whole.leaves(base)[mask]


def _leaf_value(cell: Cell, leaf: str | None, gfn: int) -> str | None:
    """A leaf in the model's words."""
    value = f"{leaf}{gfn}" if leaf in ("S", "P") else leaf
    return value if value in cell.codes else "other"


def _plain(codes: Codes) -> Codes:
    """One number if it is the same for all pages."""
    return codes if isinstance(codes, int) or not (codes == codes[0]).all() else int(codes[0])


def _numbered(key: NDArray[np.uint32], most: int) -> tuple[list[int], NDArray[np.int64]]:
    """The first pages of the distinct keys, and for each page the number of its key."""
    if most == 1:
        return [0], np.zeros(len(key), np.int64)
    if most > 1 << 16:
        _, firsts, of = np.unique(key, return_index=True, return_inverse=True)
        return firsts.tolist(), of.reshape(-1)
    distinct = np.flatnonzero(np.bincount(key))
    lut = np.zeros(most, np.int64)
    lut[distinct] = np.arange(len(distinct))
    return [int((key == one).argmax()) for one in distinct.tolist()], lut[key]


def _npt(whole: Column, leaves: NDArray[np.uint32]) -> Codes:
    """0 none or part of a 2M leaf, 1 the shared page, 2 the private one, 3 another."""
    if not leaves.any():
        return 0
    codes = np.where((leaves != 0) & (leaves & 1 == 0), 3, 0).astype(np.uint8)
    for code, base in ((1, whole.shared), (2, whole.pfn)):
        if base is not None:
            codes[leaves == whole.leaves(base)] = code
    return codes


@lru_cache(None)
def families_of_pages() -> tuple[Family, ...]:
    """The families that each page of a 2M has for itself."""
    return tuple(family for family in FAMILIES if family.name not in OF_2M)


@lru_cache(None)
def placed_pages(engine: Ranges, gfn: int) -> dict[str, Placed]:
    """Those families at one gfn of a machine."""
    found = {}
    for family in families_of_pages():
        cells = engine.fields.get(family.name)
        key = f"P{gfn}" if family.key == "P0" else ("T0", gfn) if isinstance(family.key, tuple) else gfn
        cell = cells.get(key) if isinstance(cells, dict) else None
        if isinstance(cell, Cell) and cell.bits:
            found[family.name] = Placed(family, cell)
    return found


def columns_of(
    vm: VmState, base: Ranges, shaped: Callable[[Shape], Ranges], slot: MemSlot, lo: int, hi: int
) -> list[Column | Regions]:
    """Gfns [lo, hi) of a memslot: 2M pages where its memory may be large, 4K pages elsewhere."""
    head, end = slot.base + -slot.base % PAGES_2M, slot.end - slot.end % PAGES_2M
    private = vm.private_2m and slot.gmem is not None and slot.private_pfn(head) % PAGES_2M == 0
    shared = vm.huge(False) and vm.backing_pfn(slot, head, False) % PAGES_2M == 0
    first, last = max(head, lo - lo % PAGES_2M), min(end, hi + -hi % PAGES_2M)
    if not (private or shared) or first >= last:
        return [Column.of_slot(vm, base, slot, lo, hi)]
    found: list[Column | Regions] = []
    if lo < first:
        found.append(Column.of_slot(vm, base, slot, lo, first))
    whole = Column.of_slot(vm, base, slot, first, last)
    found.append(Regions(vm, shaped, whole, (max(lo, first) - first, min(hi, last) - first)))
    if last < hi:
        found.append(Column.of_slot(vm, base, slot, last, hi))
    return found

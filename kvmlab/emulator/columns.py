"""Pages as columns: what the cells of the page model are in the arrays of a Vm, and back.

A `Column` is one run of pages: consecutive gfns, consecutive PFNs of either backing.  `load` brings it down to the
distinct valuations (`values`, in the order of their first pages) and tells which page has which; `store` writes what
has become of them into the arrays.  One table says for each cell how it is gathered and scattered.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compile.pages import ELSEWHERE, OTHER
from ..explore.ranges import Note, Ranges
from ..hw import snp
from ..hw.memory import Gfn
from ..hw.snp.pages import PAGES_2M
from ..hw.tdx import Level, State
from ..hw.tdx.pamt import PageType
from ..hw.tdx.sept import STATES
from ..hw.tdx.tlb import Age
from ..kernel.failures import RMPUPDATE
from ..kvm import tdx
from ..model.state import Cell
from .memory import LIMIT, U8, U32, grown, prefix, runs
from .rmp import SAME, decode, encode
from .slots import File, MemSlot
from .tdx_kvm import FROZEN, TABLES, TdxKvm
from .tdx_module import BLOCKED, CODE, FREE
from .vm_state import VmState

Where = slice | NDArray[np.bool_]
Codes = int | NDArray[Any]
ALL = slice(None)


class Column:
    """`n` pages: gfns from `lo` on (None: not in the guest), private PFNs from `pfn`, shared ones from `shared` on.

    `file` and `at`: where the private pages are in their guest_memfd.
    """

    def __init__(
        self, vm: VmState, ranges: Ranges, n: int, *, lo: int | None, pfn: int | None, shared: int | None,
        slot: MemSlot | None = None, file: File | None = None, at: int = 0,
    ) -> None:  # fmt: skip
        self.vm, self.ranges, self.n, self.lo, self.pfn, self.shared = vm, ranges, n, lo, pfn, shared
        self.slot, self.file, self.at = slot, file, at
        self.values: list[int] = []
        self.old: list[int] = []
        self.which: NDArray[np.uint16] | None = None
        self.loaded = False
        self.families = families(ranges)

    @classmethod
    def of_slot(cls, vm: VmState, ranges: Ranges, slot: MemSlot, lo: int, hi: int) -> Column:
        """Gfns [lo, hi) of a memslot."""
        shared = vm.backing_pfn(slot, lo, False)
        pfn = slot.private_pfn(lo) if slot.gmem else (shared if vm.in_place else None)
        at = slot.offset + lo - slot.base if slot.gmem else 0
        return cls(vm, ranges, hi - lo, lo=lo, pfn=pfn, shared=shared, slot=slot, file=slot.gmem, at=at)

    @classmethod
    def of_hole(cls, vm: VmState, ranges: Ranges, lo: int, hi: int) -> Column:
        """Gfns [lo, hi) that no memslot has."""
        return cls(vm, ranges, hi - lo, lo=lo, pfn=None, shared=None)

    @classmethod
    def of_file(cls, vm: VmState, ranges: Ranges, file: File, lo: int, hi: int) -> Column:
        """Pages [lo, hi) of a guest_memfd that no memslot is bound to."""
        return cls(vm, ranges, hi - lo, lo=None, pfn=file.base + lo, shared=None, file=file, at=lo)

    def gone(self) -> bool:
        """Whether the memslot has been deleted since."""
        return (
            self.slot is not None
            and self.vm.address_spaces[self.slot.as_id].by_id.get(self.slot.id) is not self.slot
        )

    def cut(self, n: int) -> None:
        """Leave out all pages from the n-th on, once what was loaded is stored."""
        self.store()
        self.n, self.loaded = n, False

    def split(self, n: int) -> tuple[Column, Column]:
        """The first `n` pages and the others, once what was loaded is stored."""
        self.store()
        self.loaded = False

        def part(lo: int, hi: int) -> Column:
            def moved(base: int | None) -> int | None:
                return None if base is None else base + lo

            return Column(
                self.vm, self.ranges, hi - lo, lo=moved(self.lo), pfn=moved(self.pfn), shared=moved(self.shared),
                slot=self.slot, file=self.file, at=self.at + lo,
            )  # fmt: skip

        return part(0, n), part(n, self.n)

    def load(self) -> list[int]:
        """The distinct valuations."""
        if self.loaded:
            return self.values
        self.loaded, self.which = True, None
        base = 0
        mixed: list[tuple[Placed, NDArray[Any]]] = []
        for placed in self.families:
            found = placed.family.gather(self)
            if not isinstance(found, int):
                found = int(found[0]) if self.n == 1 or (found == found[0]).all() else found
            if isinstance(found, int):
                base |= placed.bits(found)
            else:
                mixed.append((placed, found))
        if not mixed:
            self.values = [base]
        else:
            self._group(base, mixed)
        self.old = list(self.values)
        return self.values

    def _group(self, base: int, mixed: list[tuple[Placed, NDArray[Any]]]) -> None:
        keys = mixed[0][1].astype(np.uint32)
        for _, codes in mixed[1:]:
            keys = keys * np.uint32(int(codes.max()) + 1) + codes
        most = int(keys.max())
        distinct = np.flatnonzero(np.bincount(keys)) if most < 1 << 20 else np.unique(keys)
        firsts = sorted((int((keys == key).argmax()), int(key)) for key in distinct)
        if most < 1 << 20:
            lut = np.zeros(most + 1, np.uint16)
            lut[[key for _, key in firsts]] = np.arange(len(firsts), dtype=np.uint16)
            self.which = lut[keys]
        else:
            order = np.argsort([key for _, key in firsts])
            self.which = order[np.searchsorted(np.array(sorted(key for _, key in firsts)), keys)].astype(
                np.uint16
            )
        self.values = []
        for at, _ in firsts:
            value = base
            for placed, codes in mixed:
                value |= placed.bits(int(codes[at]))
            self.values.append(value)

    @property
    def start(self) -> int | None:
        """The gfn of the first page."""
        return self.lo

    def page_of(self, group: int, gfn: int) -> int:
        """The first page that a gfn of the model stands for."""
        return self.first(group)

    @property
    def units(self) -> int:
        """How many pages are run: each by itself."""
        return self.n

    def leading(self) -> int:
        """How many pages from the first on are in its situation."""
        return self.n if self.which is None else prefix(self.which == 0)

    def engine(self, group: int) -> Ranges:
        """The machine that runs a group."""
        return self.ranges

    def unit(self, group: int) -> int:
        """The first page of a group."""
        return self.first(group)

    def behind(self, unit: int) -> None:
        """What is behind a page is as it was."""
        if self.which is None:
            self.which = np.zeros(self.n, np.uint16)
        self.which[unit + 1 :] += np.uint16(len(self.values))
        self.values, self.old = self.values + self.old, self.old * 2

    def refused(self, group: int) -> tuple[int, int]:
        """The page whose RMPUPDATE was made to fail, and how many pages that was about."""
        return self.first(group), 1

    def pages_of(self, group: int, note: Note) -> tuple[int, int]:
        """Where something happened, and to how many pages of a group."""
        return self.first(group), self.count(group)

    def first(self, group: int) -> int:
        """The first page of a group, counted from the column's."""
        return 0 if self.which is None else int((self.which == group).argmax())

    def count(self, group: int) -> int:
        """How many pages a group has."""
        return self.n if self.which is None else int(np.count_nonzero(self.which == group))

    def spans(self, group: int) -> list[tuple[int, int]]:
        """The runs of pages of a group, counted from the column's first."""
        return [(0, self.n)] if self.which is None else runs(self.which == group, 0, self.n)

    def allocated(self) -> None:
        """All of its pages have just been allocated."""
        cell = self.ranges.cell("gmem", 0)
        self.values = self.old = [value & ~cell.mask | cell.code("cached") for value in self.values]
        self.old = list(self.old)

    def store(self) -> None:
        """Write back what has changed."""
        if not self.loaded or self.values == self.old:
            return
        changed = 0
        for was, value in zip(self.old, self.values, strict=True):
            changed |= was ^ value
        for placed in self.families:
            family, cell = placed.family, placed.cell
            if family.scatter is None or not changed & cell.mask:
                continue
            new: dict[Any, list[int]] = {}
            for group, (was, value) in enumerate(zip(self.old, self.values, strict=True)):
                if (was ^ value) & cell.mask:
                    new.setdefault(cell.get(value), []).append(group)
            for value, groups in new.items():
                which = self.which
                every = which is None or len(groups) == len(self.values)
                family.scatter(self, ALL if which is None or every else np.isin(which, groups), value)
        self.old = list(self.values)

    def leaves(self, base: int) -> U32:
        """The leaves that map PFNs from `base` on."""
        return np.arange(base + 1, base + self.n + 1, dtype=np.uint32) << np.uint32(1)


class Family:
    """One cell of a page: `gather` gives small numbers, which `domain` explains; `scatter` writes one value."""

    def __init__(
        self, name: str, key: Any, domain: Callable[[Cell, int], Any], gather: Callable[[Column], Codes],
        scatter: Callable[[Column, Where, Any], None] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.key, self.domain, self.gather, self.scatter = name, key, domain, gather, scatter


class Placed:
    """A family's cell in one machine, and the bits that its gathered numbers stand for."""

    def __init__(self, family: Family, cell: Cell) -> None:
        self.family, self.cell, self._bits = family, cell, dict[int, int]()

    def bits(self, code: int) -> int:
        """The bits that a gathered number stands for."""
        found = self._bits.get(code)
        if found is None:
            found = self._bits[code] = self.cell.code(self.family.domain(self.cell, code))
        return found


@lru_cache(None)
def families(ranges: Ranges) -> tuple[Placed, ...]:
    """The families that a machine has, but for those with one value."""
    found = []
    for family in (*FAMILIES, *OF_A_TD):
        cell = ranges.fields.get(family.name)
        if isinstance(cell, dict):
            cell = cell.get(family.key)
        if isinstance(cell, Cell) and cell.bits:
            found.append(Placed(family, cell))
    return tuple(found)


def _private(c: Column) -> Codes:
    return 0 if c.lo is None or c.lo + c.n > LIMIT else c.vm.attributes.get(c.lo, c.lo + c.n)


def _set_private(c: Column, where: Where, value: str) -> None:
    assert c.lo is not None
    c.vm.attributes.get(c.lo, c.lo + c.n)[where] = value == "private"


def _reserved(c: Column) -> Codes:
    reserved = c.vm.attributes.reserved
    if c.lo is None or len(reserved) <= c.lo:
        return 0
    return grown(reserved, c.lo + c.n)[c.lo : c.lo + c.n]


def _set_reserved(c: Column, where: Where, value: bool) -> None:
    assert c.lo is not None
    attributes = c.vm.attributes
    attributes.reserved = grown(attributes.reserved, c.lo + c.n)
    attributes.reserved[c.lo : c.lo + c.n][where] = value


def _npt(c: Column) -> Codes:
    """0 none, 1 the shared page, 2 the private one, 3 another."""
    if c.lo is None or c.slot is None:
        return 0
    leaves = c.vm.mmu.leaves(c.lo, c.lo + c.n)
    if not leaves.any():
        return 0
    codes = np.where(leaves != 0, 3, 0).astype(np.uint8)
    small = leaves & ~np.uint32(1)
    for code, base in ((1, c.shared), (2, c.pfn)):
        if base is not None and (code == 2 or base != c.pfn):
            codes[small == c.leaves(base)] = code
    return codes


def _set_npt(c: Column, where: Where, value: str | None) -> None:
    assert c.lo is not None
    view = c.vm.mmu.leaves(c.lo, c.lo + c.n)
    if value is None:
        view[where] = 0
        return
    base = c.pfn if value == "P0" else c.shared
    assert base is not None
    view[where] = c.leaves(base)[where]


def _rmp(c: Column) -> Codes:
    if c.pfn is None:
        return 0
    state = c.vm.rmp.state[c.pfn : c.pfn + c.n]
    if c.lo is None or not state.any():
        return state
    same = c.vm.rmp.gfn[c.pfn : c.pfn + c.n] == np.arange(c.lo, c.lo + c.n, dtype=np.uint32)
    codes: NDArray[np.uint16] = state | same.astype(np.uint16) * np.uint16(SAME)
    return codes


def _set_rmp(c: Column, where: Where, value: snp.RmpEntry) -> None:
    assert c.pfn is not None
    rmp = c.vm.rmp
    rmp.state[c.pfn : c.pfn + c.n][where] = encode(value)
    at = c.lo if value.assigned and c.lo is not None else None
    rmp.gfn[c.pfn : c.pfn + c.n][where] = 0 if at is None else np.arange(at, at + c.n, dtype=np.uint32)[where]


def _absent(c: Column) -> Codes:
    return 0 if c.pfn is None else c.vm.directmap.absent[c.pfn : c.pfn + c.n]


def _set_absent(c: Column, where: Where, value: str) -> None:
    assert c.pfn is not None
    c.vm.directmap.absent[c.pfn : c.pfn + c.n][where] = value == "absent"


def _split(c: Column) -> Codes:
    """1 where the 2M around a page is split."""
    if c.pfn is None:
        return 0
    first = c.pfn // PAGES_2M
    split = c.vm.directmap.split[first : (c.pfn + c.n - 1) // PAGES_2M + 1]
    if (split == split[0]).all():
        return int(split[0])
    return np.repeat(split, PAGES_2M)[c.pfn - first * PAGES_2M :][: c.n]


def _gmem(c: Column) -> Codes:
    """0 free, 1 cached, 2 dying."""
    if c.file is None:
        return 1
    present: U8 = c.file.present[c.at : c.at + c.n]
    if not c.file.dying:
        return present
    codes = present.copy()
    for lo, hi in c.file.dying:
        if lo < c.at + c.n and c.at < hi:
            codes[max(lo - c.at, 0) : hi - c.at] = 2
    return codes


def _set_gmem(c: Column, where: Where, value: str) -> None:
    if c.file is None:
        return
    flags = np.zeros(c.n, bool)
    flags[where] = True
    for lo, hi in runs(flags, 0, c.n):
        c.file.take_out(c.at + lo, c.at + hi)
    if value == "free":
        for lo, hi in [r for r in c.file.dying if c.at <= r[0] and r[1] <= c.at + c.n]:
            c.file.dying.remove((lo, hi))
            c.vm.log.add("gmem-free", page=c.file.base + lo, times=hi - lo)


def _window(c: Column) -> Codes:
    """1 inside the hull of what is being invalidated."""
    mmu = c.vm.mmu
    if c.lo is None or not mmu.in_progress or mmu.window is None:
        return 0
    lo, hi = max(mmu.window[0] - c.lo, 0), min(mmu.window[1] - c.lo, c.n)
    if lo >= hi:
        return 0
    if hi - lo == c.n:
        return 1
    codes = np.zeros(c.n, np.uint8)
    codes[lo:hi] = 1
    return codes


def _failing(c: Column) -> Codes:
    """1 where RMPUPDATE was made to fail."""
    failures = c.vm.rmp.failures
    if c.pfn is None or not failures:
        return 0
    codes = np.zeros(c.n, np.uint8)
    for pfn in failures:
        if c.pfn <= pfn < c.pfn + c.n:
            codes[pfn - c.pfn] = 1
    return codes


def _drop(c: Column, where: Where, value: str | None) -> None:
    if value is None and c.lo is not None:
        for lo, hi in _runs(c, where):
            c.vm.mmu.drop_pages(c.lo + lo, c.lo + hi)


def _runs(c: Column, where: Where) -> list[tuple[int, int]]:
    """The runs of pages that are meant."""
    return [(0, c.n)] if isinstance(where, slice) else runs(where, 0, c.n)


# Of a TD.


def _td(c: Column) -> TdxKvm:
    assert c.vm.tdx is not None
    return c.vm.tdx


def _sept(c: Column) -> Codes:
    return FREE if c.lo is None else _td(c).module.states(c.lo, c.lo + c.n)


def _set_sept(c: Column, where: Where, value: State) -> None:
    assert c.lo is not None
    module = _td(c).module
    module.states(c.lo, c.lo + c.n)[where] = CODE[value]
    if c.pfn is not None and value != State.FREE:
        pfns = np.arange(c.pfn, c.pfn + c.n, dtype=np.uint32)
        module.hpa[c.lo : c.lo + c.n][where] = pfns[where]


def _mirror(c: Column) -> Codes:
    """0 none, 1 FROZEN_SPTE, 2 the private page."""
    if c.lo is None:
        return 0
    view = _td(c).mirror_of(c.lo, c.lo + c.n)
    if not view.any():
        return 0
    codes: U8 = (view != 0).astype(np.uint8) + (view != FROZEN) * (view != 0)
    return codes


def _set_mirror(c: Column, where: Where, value: str | None) -> None:
    assert c.lo is not None
    view = _td(c).mirror_of(c.lo, c.lo + c.n)
    if value in (None, tdx.FROZEN):
        view[where] = FROZEN if value else 0
    else:
        assert c.pfn is not None
        view[where] = np.arange(c.pfn + 1, c.pfn + c.n + 1, dtype=np.uint32)[where]


def _by_2m(c: Column, tables: U8) -> Codes:
    """What each page finds at its 2M."""
    assert c.lo is not None
    if (tables == tables[0]).all():
        return int(tables[0])
    return np.repeat(tables, PAGES_2M)[c.lo % PAGES_2M :][: c.n]


def _table(c: Column) -> Codes:
    """1 where a table of the secure EPT hangs."""
    return 0 if c.lo is None else _by_2m(c, _td(c).module.has_table(Level.PD, c.lo, c.lo + c.n))


def _set_table(c: Column, where: Where, value: State) -> None:
    assert c.lo is not None
    for lo, hi in _runs(c, where):
        _td(c).module.add_tables(c.lo + lo, hi - lo)


def _mirror_table(c: Column) -> Codes:
    return 0 if c.lo is None else _by_2m(c, _td(c).mirror_tables_of(c.lo, c.lo + c.n))


def _set_mirror_table(c: Column, where: Where, value: str) -> None:
    assert c.lo is not None
    for lo, hi in _runs(c, where):
        _td(c).mirror_tables_of(c.lo + lo, c.lo + hi)[:] = TABLES.index(value)


def _pamt(c: Column) -> Codes:
    """1 where a page is somebody's."""
    if c.pfn is None:
        return 0
    codes: U8 = (_td(c).module.pamt[c.pfn : c.pfn + c.n] != PageType.NDA).astype(np.uint8)
    return codes


def _set_pamt(c: Column, where: Where, value: str) -> None:
    assert c.pfn is not None
    _td(c).module.pamt[c.pfn : c.pfn + c.n][where] = PageType[value]


def _bepoch(c: Column) -> Codes:
    """By how much the BEPOCH of a blocked page is behind TD_EPOCH: 0 two or more, 1 one, 2 nothing."""
    if c.pfn is None or c.lo is None:
        return 0
    module = _td(c).module
    blocked = BLOCKED[module.states(c.lo, c.lo + c.n)]
    if not blocked.any():
        return 0
    behind = np.uint64(module.epochs.td_epoch) - module.bepoch[c.pfn : c.pfn + c.n]
    codes: U8 = (blocked * (2 - np.minimum(behind, np.uint64(2)))).astype(np.uint8)
    return codes


def _entry_lock(c: Column) -> Codes:
    """1 where a vCPU in ACCEPT holds the entry's lock."""
    accepting = _td(c).accepting
    if c.lo is None or not accepting:
        return 0
    codes = np.zeros(c.n, np.uint8)
    for gfn in accepting:
        codes[gfn - c.lo : gfn - c.lo + 1] = c.lo <= gfn < c.lo + c.n
    return codes


def owned(entry: snp.RmpEntry, gfn: int) -> snp.RmpEntry:
    """The entry with the model's gfn for its own, or ELSEWHERE."""
    return entry if entry.gpa is None else entry._replace(gpa=ELSEWHERE if entry.gpa else Gfn(gfn))


def one_of(*values: Any) -> Callable[[Cell, int], Any]:
    """What gathered numbers mean, in order."""
    return lambda _, code: values[code]


FAMILIES = (
    Family("attr", 0, one_of("shared", "private"), _private, _set_private),
    Family("reserved", 0, one_of(False, True), _reserved, _set_reserved),
    Family("npt", 0, one_of(None, "S0", "P0", OTHER), _npt, _set_npt),
    Family("tlb", ("T0", 0), lambda cell, _: cell.domain[1], lambda c: 0, _drop),
    Family("rmp", "P0", lambda cell, code: owned(decode(code), int(str(cell.key)[1:])), _rmp, _set_rmp),
    Family("directmap", "P0", one_of("present", "absent"), _absent, _set_absent),
    Family("directmap_2m", None, one_of(True, False), _split),
    Family("gmem", 0, one_of("free", "cached", "dying"), _gmem, _set_gmem),
    Family("uptodate", 0, lambda cell, _: True, lambda c: 0),  # whoever allocates a page here clears it
    Family("invalidate_range", None, one_of(None, (0, 1)), _window),
    Family("failures_left", RMPUPDATE, one_of(0, 1), _failing),
    Family("slot", None, one_of("none", "valid", "invalid"),
           lambda c: 0 if c.slot is None or c.gone() else 1 + c.slot.invalid),
)  # fmt: skip
# What a TD's private pages are besides, which are of 4K always.
OF_A_TD = (
    Family("sept", 0, one_of(*STATES), _sept, _set_sept),
    Family("sept_table", None, one_of(State.FREE, State.NL_MAPPED), _table, _set_table),
    Family("mirror", 0, one_of(None, tdx.FROZEN, "P0"), _mirror, _set_mirror),
    Family("mirror_table", None, one_of(*TABLES), _mirror_table, _set_mirror_table),
    Family("pamt", "P0", one_of("NDA", "REG"), _pamt, _set_pamt),
    Family("bepoch", "P0", one_of(Age.OLDER, Age.PREVIOUS, Age.NOW), _bepoch),
    Family("entry_lock", 0, one_of(None, "T0"), _entry_lock),
    Family("td_fatal", None, one_of(False, True), lambda c: int(_td(c).module.fatal)),
)  # fmt: skip

"""The range engine: a page model (compile/pages.py) run on one situation at a time, for any number of pages in it.

A state is one packed int for all that is not per page, and for each page the packed valuation of its own cells; pages
with the same valuation are in the same situation.  A `Pass` is what a thread does from one place of its program up to
where somebody has to look: a loop over pages that begins or ends, a step that the caller named, a row, an end.  The
steps are run once for each distinct packed state; from then on the pass is looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, NamedTuple

from ..compile.pages import OF_A_VCPU, THREADS, PageModel, enters, of_a_page
from ..design import Row
from ..guest.access import Access
from ..hw.memory import Gfn
from ..kernel.failures import RMPUPDATE, SEAMCALL
from ..kvm import attributes
from ..model.state import Cell
from ..model.step import Instr, run_step

MOST_TRIES = 1000  # of a step that says "again": nobody else will ever make way
# Asks all pages of a request: yes if each one says yes.
FOR_ALL: frozenset[Callable[..., Any]] = frozenset({attributes.kvm_range_has_memory_attributes})
# Where a request of many pages has to be looked at, and one whose pages are all alike has not.
OF_MANY = FOR_ALL | {attributes.xa_reserve, attributes.kvm_vm_set_region_attr}
KNOWN = 1 << 16  # passes that are remembered


class Note(NamedTuple):
    """What a step told a log: the place of the program, the kind of event, words and a status code."""

    pc: int
    kind: str
    text: str
    code: int | None
    gfn: int | None = None


class Pass(NamedTuple):
    """Where a pass ended: the packed state, what was noted and violated, and whether the thread waits for ever."""

    after: int
    notes: tuple[Note, ...]
    violations: tuple[tuple[str, str], ...]
    blocked: bool = False
    fatal: bool = False


def unwrapped(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step itself, without what makes it one of the fault path or the last one of a fault."""
    while (inner := getattr(step, "step", None)) is not None:
        step = inner
    return step


def same_row(row: Row, other: Row) -> bool:
    """Whether two rows are one row of a text."""
    return row is other or (row == other and (row.line, row.origin) == (other.line, other.origin))


def _parts(key: Hashable) -> tuple[Hashable, ...]:
    return key if isinstance(key, tuple) else ()


class Ranges:
    """One page model and the passes that are known of it; a pass ends before a step of `stops` as well."""

    def __init__(self, pages: PageModel, stops: Collection[Callable[..., Any]] = ()) -> None:
        self.pages, self.model, self.stops = pages, pages.model, frozenset(stops)
        layout = self.model.layout
        self._cells: dict[tuple[str, Any], Cell] = {}
        self.fields = layout.fields
        self.program = self.model.actors[0].program
        self.steps = [unwrapped(instr.step) for instr in self.program]
        self.page_mask = sum(c.mask for c in layout.cells if of_a_page(c))
        self.page = self.model.initial & self.page_mask
        self.pc = [layout.cell("pc", thread) for thread in THREADS]
        self.locks = self._locks()
        others = self.page_mask | sum({cell.mask for _, _, cell, _ in self.locks})
        self._own = [
            sum(c.mask for c in layout.cells if thread in (c.key, *_parts(c.key)) and c.name not in OF_A_VCPU)
            & ~others
            for thread in THREADS
        ]
        self._reached: dict[str, list[int]] = {}
        self._uncompiled: dict[str, frozenset[int]] = {}
        self._known: dict[tuple[int, int, bool, bool], Pass] = {}

    def cell(self, name: str, key: Any = None) -> Cell:
        """One cell of the layout."""
        found = self._cells.get((name, key))
        if found is None:
            found = self._cells[name, key] = self.model.layout.cell(name, key)
        return found

    def reached(self, section: str) -> list[int]:
        """For each place of the program how many rows of a section are reached with it; 0: it is of none of them."""
        if section not in self._reached:
            rows = self.pages.rows[section]

            def until(row: Row | None) -> int:
                same = (n + 1 for n, other in enumerate(rows) if row and same_row(row, other))
                return next(same, 0)

            self._reached[section] = [until(instr.row) for instr in self.program]
        return self._reached[section]

    def uncompiled(self, section: str) -> frozenset[int]:
        """The rows of a section for which nothing was compiled, by number."""
        if section not in self._uncompiled:
            there = {number - 1 for number in self.reached(section)}
            self._uncompiled[section] = frozenset(range(len(self.pages.rows[section]))) - there
        return self._uncompiled[section]

    def set(self, x: int, cell: Cell, value: Any) -> int:
        """The packed state with another value in one cell."""
        return x & ~cell.mask | cell.code(value)

    def _locks(self) -> list[tuple[str, int, Cell, int]]:
        """Each lock, who could hold it (the number of the thread), its cell, and the bits that say that he does."""
        conf, found = self.model.conf, []
        for lock, who in conf.owners.items():
            found += [
                (lock, n, self.cell(lock), self.cell(lock).code(t)) for n, t in enumerate(THREADS) if t in who
            ]
        for lock, who in conf.writers.items():
            cell = self.cell(f"{lock}_writer")
            found += [(lock, n, cell, cell.code(t)) for n, t in enumerate(THREADS) if t in who]
        for lock, who in conf.readers.items():
            cells = [(n, self.cell(f"{lock}_reader", t)) for n, t in enumerate(THREADS) if t in who]
            found += [(lock, n, cell, cell.code(True)) for n, cell in cells]
        return found

    def held(self, x: int) -> dict[int, list[str]]:
        """Which threads hold which locks."""
        found: dict[int, list[str]] = {}
        for lock, thread, cell, code in self.locks:
            if x & cell.mask == code:
                found.setdefault(thread, []).append(lock)
        return found

    def begin(
        self, x: int, a: int, entry: str, kind: str = "private", rmp_bit: str | None = None, gfn: int = 0
    ) -> int:
        """The state in which thread number `a` begins a call."""
        thread = THREADS[a]
        x = self.set(self.forget(x, a), self.pc[a], self.pages.entries[entry])
        x = self.set(x, self.cell("acc", thread), Access(kind, "write", Gfn(gfn), 0))
        seen = self.cell("rmp_bit", thread)
        return self.set(x, seen, rmp_bit) if rmp_bit and seen.bits else x

    def forget(self, x: int, a: int) -> int:
        """Take back all that is the thread's own but for the locks that it holds."""
        return x & ~self._own[a] | self.model.initial & self._own[a]

    def unwind(self, x: int, a: int) -> int:
        """Drop every lock of the thread as well."""
        for _, thread, cell, code in self.locks:
            if thread == a and x & cell.mask == code:
                x = x & ~cell.mask | self.model.initial & cell.mask
        return self.forget(x, a)

    def _zapped(self, x: int, after: int, gfn: int | None) -> bool:
        """Whether a leaf of its own, or the large one around it, is gone."""
        large, mirror = self.fields.get("npt_large"), self.fields.get("mirror")
        cells = [self.cell("npt", gfn), *(large.values() if isinstance(large, dict) else ())]
        cells += [mirror[gfn]] if isinstance(mirror, dict) else []
        return any(cell.get(x) is not None and cell.get(after) is None for cell in cells)

    def place(self, entry: str, rows: Sequence[Row], in_loop: bool = True) -> int | None:
        """Where an entry's program comes to the first of these rows; None if it never does."""
        start = self.pages.entries[entry]
        for pc in range(start + 1, len(self.program)):
            instr = self.program[pc]
            if instr.step is enters:
                break
            if instr.row and bool(instr.loop) == in_loop and any(same_row(instr.row, row) for row in rows):
                return pc
        return None

    def _gfn(self, x: int, a: int, instr: Instr) -> int:
        """The gfn that a step is about."""
        given = instr.args[0] if instr.args and instr.step is unwrapped(instr.step) else None
        return given if isinstance(given, int) else self.cell("acc", THREADS[a]).get(x).gfn

    def at(self, x: int, a: int) -> int:
        """Where the thread is."""
        pc: int = self.pc[a].get(x)
        return pc

    def go(self, x: int, a: int, single: bool = False, alike: bool = False) -> Pass:
        """One pass from where the thread is; `single`: it ends before another row, too.

        `alike`: all pages that it is about are in one situation, so that it goes on through loops.
        """
        key = (x, a, single, alike)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= KNOWN:
                self._known.clear()
            found = self._known[key] = self._go(x, a, single, alike)
        return found

    def _go(self, x: int, a: int, single: bool, alike: bool) -> Pass:
        actor, pc_cell, failing = self.model.actors[a], self.pc[a], self.cell("failures_left", RMPUPDATE)
        busy = self.cell("failures_left", SEAMCALL)
        first = self.program[self.at(x, a)]
        notes: list[Note] = []
        violations: list[tuple[str, str]] = []
        before, tries = x, 0  # before the step that is being tried
        while True:
            pc = self.at(x, a)
            fails = failing.get(x)
            prefix = (int(fails == 1 + self._gfn(x, a, self.program[pc])),) if fails else (1,) * busy.get(x)
            view, enabled = run_step(self.model, actor, pc_cell, x, prefix)
            tries += 1
            if not enabled or tries > MOST_TRIES:
                return Pass(before, tuple(notes), tuple(violations), blocked=True)
            after = view.after
            notes += [Note(pc, *n) for n in view.notes if n[0] != "zap" or self._zapped(x, after, n[3])]
            whys = [text for text in view.said if text.partition(":")[0] in view.violations]
            violations += [(why.partition(":")[0], why.partition(": ")[2]) for why in whys]
            x = after
            if self.model.fatal.intersection(view.violations):
                return Pass(x, tuple(notes), tuple(violations), fatal=True)
            to = self.at(x, a)
            if to == pc:
                continue
            before, tries = x, 0
            instr = self.program[to]
            over = to in self.pages.ends or to < pc
            if alike:
                over = over or (self.steps[to] in self.stops and self.steps[to] not in OF_MANY)
            else:
                over = over or self.steps[to] in self.stops or self.steps[pc] in FOR_ALL
                over = over or instr.loop != first.loop
            if over or (single and instr.row is not first.row):
                return Pass(x, tuple(notes), tuple(violations))

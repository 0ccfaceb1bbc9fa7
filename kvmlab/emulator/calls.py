"""Calls of KVM, run by the range engine: the design's programs on columns of pages.

A `Kernel` keeps the state that is not per page; a `Call` is one thread inside it, from the entry of its program to an
end.  A step of one row is done to every page of a request before the next begins, but for a loop over several rows
(the op of the series), which goes page by page: by situation, in the order of first pages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from ..compile.pages import THREADS
from ..design import Row
from ..explore.ranges import FOR_ALL, Note, Pass, Ranges, same_row
from ..hw import tdx as hw_tdx
from ..hw.tdx import Leaf
from ..kernel.failures import RMPUPDATE, SEAMCALL
from ..kvm import mmu, tdx
from ..model.step import Instr
from .columns import Column
from .events import Deadlock, KernelBug, PlatformError, RmpFault, VmError
from .kvm_state import Step
from .large import Regions
from .tdx_kvm import VMFAILINVALID, TdxKvm
from .vm_state import VmState

MODEL_NAME = re.compile(r"\b(?:([PS])|gfn )(\d+)\b")
BY_PFN = frozenset(
    {"rmpupdate", "directmap-unmap", "directmap-map", "directmap-split", "clflush", "tdx-clear-page",
     Leaf.PAGE_WBINVD}
)  # fmt: skip
LEAF_BY_LEAF: frozenset[Step] = frozenset({tdx.kvm_unmap_gfn_range, tdx.zap_seamcall})
SEAMCALLS: frozenset[Step] = frozenset({tdx.zap_seamcall, tdx.aug_seamcall, tdx.tdh_phymem_page_wbinvd})
KICKS: frozenset[Step] = frozenset(
    {tdx.kvm_make_all_cpus_request, tdx.stop_vcpus, tdx.kvm_flush_remote_tlbs, mmu.kvm_flush_remote_tlbs}
)
WITHIN = ("zap", "aug")  # sections that are not a call's own
WALKS = (Leaf.RANGE_BLOCK, Leaf.PAGE_AUG, Leaf.PAGE_REMOVE)  # leaves of these calls that walk the secure EPT


class Call:
    """One call; the subclasses say which pages a loop is done to, and what bytes and numbers follow from a step."""

    def __init__(self, vm: VmState, name: str, entry: str, section: str) -> None:
        self.vm, self.kernel, self.name, self.entry = vm, vm.kernel, name, entry
        self.ranges, self.a = vm.kernel.ranges, vm.kernel.depth
        self.text(section)
        self.columns: list[Column | Regions] = []
        self.parts: list[Column | Regions] = []  # of the column that a loop is at
        self.slot_state, self.others = "none", 0
        self.in_progress, self.failing = (
            self.ranges.cell("in_progress"),
            self.ranges.cell("failures_left", RMPUPDATE),
        )
        self.first_pc = self.ranges.program[self.ranges.pages.entries[entry]].next
        self.inner: Row | None = None  # the row of another section that was reached last
        self.alike = False  # whether all its pages are in one situation, so that rows are not done one by one
        self.times = 1  # how many units of leaves a loop over a TD's private pages is done to
        self.tracks = 0  # how often each of them moves TD_EPOCH
        self.busy = self.ranges.cell("failures_left", SEAMCALL)

    def text(self, section: str) -> None:
        """The rows that are reached from here on."""
        self.section, self.next_row = section, 0
        self.rows, self.reached = self.ranges.pages.rows[section], self.ranges.reached(section)
        self.uncompiled = self.ranges.uncompiled(section)

    def adopt(self, engine: Ranges) -> None:
        """Go on in a machine of another shape."""
        if engine is self.ranges:
            return
        entry, ahead = engine.pages.entries[self.entry], self.ranges.at(self.kernel.x, self.a)
        ahead -= self.ranges.pages.entries[self.entry]
        self.ranges, self.first_pc = engine, engine.program[entry].next
        self.goto(max(entry, entry + ahead))
        self.rows, self.reached = engine.pages.rows[self.section], engine.reached(self.section)

    def aside(self, column: Regions, row: Row) -> None:
        """A row for which 4K pages have no step, done to 2M ones."""
        before, found = self.kernel.x, dict[Note, list[int]]()
        for group, value in enumerate(column.load()):
            engine = column.engine(group)
            if (at := engine.place(self.entry, [row], in_loop=False)) is None:
                continue
            self.goto(at)
            done = engine.go(self.global_state(value), self.a, True)
            column.values[group] = done.after & engine.page_mask
            for note in done.notes:
                found.setdefault(note, []).append(group)
            self.judge(done, column, group, engine)
        self._log(column, found)
        self.kernel.x = before

    # What a subclass says.

    def select(self, instr: Instr, step: Step) -> list[Column | Regions]:
        """The columns that a loop over pages works on."""
        return self.columns

    def before(self, instr: Instr, step: Step) -> None:
        """What is done before a step at which passes stop."""

    def outside(self, instr: Instr, step: Step) -> str | None:
        """Do a step that is not in the model: the jump that it takes, "" for none; None: the model has the step."""
        return None

    def skipped(self, row: Row) -> None:
        """A row of the text for which nothing was compiled."""

    def covers(self, instr: Instr) -> list[tuple[int, int]]:
        """The gfns that the window is widened to."""
        return [(column.lo, column.lo + column.n) for column in self.columns if column.lo is not None]

    def injected(self, column: Column | Regions, group: int) -> bool:
        """RMPUPDATE of a page was made to fail; whether the loop ends there."""
        return True

    # Running.

    def run(self, kind: str = "private", rmp_bit: str | None = None, gfn: int = 0) -> str:
        """Run to an end, and name it."""
        kernel, ranges = self.kernel, self.ranges
        if self.a >= len(THREADS):
            raise VmError(f"{self.name}: more than {len(THREADS)} calls inside one another")
        kernel.depth += 1
        self.others = self._others()
        kernel.names[self.a] = self.name
        kernel.x = ranges.begin(kernel.x, self.a, self.entry, kind, rmp_bit, gfn)
        try:
            return self._run()
        except BaseException:
            kernel.x = ranges.unwind(kernel.x, self.a)
            raise
        finally:
            kernel.x = ranges.forget(kernel.x, self.a)
            kernel.depth -= 1
            kernel.pages.pop()

    def _run(self) -> str:
        begun = False
        self.goto(self.first_pc)
        while True:
            ranges = self.ranges
            pc = ranges.at(self.kernel.x, self.a)
            if pc == self.first_pc:
                if begun:  # tdx: a private fault that is sent back begins again inside KVM
                    self.store()
                    return "again"
                begun = True
            if (end := ranges.pages.ends.get(pc)) is not None:
                self.store()
                if end == "returned":
                    self.reach_rows(len(self.rows))
                return end
            instr, step = ranges.program[pc], ranges.steps[pc]
            self.reach(pc)
            if self.vm.on_row is not None and not instr.loop:
                self.reach_inner(instr)
            if (jump := self.outside(instr, step)) is not None:
                at = ranges.program[ranges.at(self.kernel.x, self.a)]
                self.goto(at.jumps[jump] if jump else at.next)
                continue
            if self.single or step in ranges.stops:
                self.before(instr, step)
            if self.alike:
                self._alone()
            elif instr.loop:
                self.loop(pc, instr, step)
            elif step in FOR_ALL:
                self._for_all(step, instr)
            else:
                self._once()

    @property
    def single(self) -> bool:
        """Whether somebody looks on, so that rows are run one by one."""
        vm = self.vm
        if vm.on_row is not None or vm.on_point is not None:
            return True
        return vm.tdx is not None and bool(vm.failures or vm.tdx.at_odds)

    def goto(self, pc: int) -> None:
        """Go on at another place."""
        self.kernel.x = self.ranges.set(self.kernel.x, self.ranges.pc[self.a], pc)

    def store(self) -> None:
        """Write what pages have become into the arrays."""
        for column in (*self.columns, *self.parts):
            column.store()

    def reach(self, pc: int) -> None:
        """Rows up to that of this place are reached: `vm.on_row` is told of each."""
        if self.next_row < self.reached[pc]:
            self.reach_rows(self.reached[pc])

    def reach_rows(self, until: int) -> None:
        """The same for the first rows of the text."""
        for n in range(self.next_row, until):
            self.next_row = n + 1
            if n in self.uncompiled:
                self.skipped(self.rows[n])
            if self.vm.on_row is not None:
                self.hook(partial(self.vm.reached, self.rows[n]))

    def reach_inner(self, instr: Instr) -> None:
        """The same for a row of a section that has taken over."""
        if instr.section in WITHIN and instr.row is not None and instr.row is not self.inner:
            self.inner = instr.row
            self.hook(partial(self.vm.reached, instr.row))

    def hook(self, call: Callable[[], None]) -> None:
        """Let a script look on, or act as somebody else."""
        self.store()
        call()
        for column in (*self.columns, *self.parts):
            column.loaded = False

    def _others(self) -> int:
        """The references of calls around this one to pages that are none of its own; and note which pages are."""
        around, found = self.kernel.pages, 0
        mine = [(c.pfn, c.pfn + getattr(c, "whole", c).n) for c in self.columns if c.pfn is not None]
        for thread, theirs in enumerate(around):
            if not any(lo < end and start < hi for lo, hi in mine for start, end in theirs):
                found |= self.ranges.cell("folio_ref", (THREADS[thread], 0)).mask
        around.append(mine)
        return found

    def global_state(self, page: int) -> int:
        """The state with a page's cells, and the numbers of the window as the model has them."""
        cell, now = self.in_progress, self.vm.mmu.in_progress
        x = self.kernel.x & ~cell.mask | page
        x = x | min(now, 3) << cell.shift if now else x
        return self.kernel.with_vcpus(x, self.vm.tdx.inside()) if self.vm.tdx else x

    def _go(self, page: int, engine: Ranges | None = None) -> Pass:
        engine, td = engine or self.ranges, self.vm.tdx
        others = self.kernel.x & self.others
        busy = td is not None and self.single and self._busy(td, engine)
        x = self.global_state(page) ^ others
        done = engine.go(x | self.busy.code(1) if busy else x, self.a, self.single, self.alike)
        if busy and td:
            if not done.after & self.busy.mask:
                td.take_failure(busy)
            done = done._replace(after=done.after & ~self.busy.mask)
        self.kernel.x = done.after & ~engine.page_mask | others
        return done

    def _busy(self, td: TdxKvm, engine: Ranges) -> Leaf | None:
        """The leaf that is about to be called, if it is to be busy; poison and a dead module answer here."""
        at = engine.at(self.kernel.x, self.a)
        instr, (column, *_) = engine.program[at], self.parts or self.columns
        if engine.steps[at] not in SEAMCALLS:
            return None
        (call,) = [arg for arg in instr.args if arg in tdx.LEAVES] or ["tdh_phymem_page_wbinvd"]
        leaf = tdx.LEAVES[call]
        if td.module.off:
            self.store()
            td.log.add(leaf, hw_tdx.name(VMFAILINVALID), column.lo, 1, VMFAILINVALID)
            td.bug(f"KVM_BUG_ON: {call} = {hw_tdx.name(VMFAILINVALID)}", VMFAILINVALID)
        if leaf in WALKS and column.lo is not None:
            td.module.walk(column.lo, column.n)
        return leaf if leaf in self.vm.failures else None

    def _once(self) -> None:
        """Steps that are done once a request."""
        page = self.ranges.set(self.ranges.page, self.ranges.cell("slot"), self.slot_state)
        done = self._go(page)
        for note in done.notes:
            self.happens(note, None, 0, 0)
        self.judge(done, None, 0)

    def _alone(self) -> None:
        """All steps are about one column, whose pages are in the situation of the first."""
        (column,) = self.columns
        done = self._go(column.load()[0])
        column.values[0] = done.after & self.ranges.page_mask
        for note in done.notes:
            first, n = column.pages_of(0, note)
            self.happens(note, column, first, n, (0,))
        self.judge(done, column, 0)

    def _for_all(self, step: Step, instr: Instr) -> None:
        """A question that is answered yes if it is for every page."""
        start, ends = self.kernel.x, set[int]()
        columns, reserved = self.select(instr, step), self.ranges.cell("reserved", 0)
        for column in columns:
            for group, value in enumerate(column.load()):
                self.kernel.x = start
                engine = column.engine(group)
                if engine is not self.ranges:
                    at = engine.place(self.entry, [instr.row] if instr.row else [], in_loop=False) or 0
                    self.goto(at)
                    self.judge(self._go(value, engine), None, 0, engine)
                    no = engine.at(self.kernel.x, self.a) == engine.program[at].next
                    self.kernel.x = start
                    self.goto(instr.next if no else instr.jumps["done"])
                    ends.add(self.kernel.x)
                    continue
                if len(columns) == column.n == 1:  # xa_load() of one entry never returns a reserved one
                    value = self.ranges.set(value, reserved, False)
                self.judge(self._go(value), None, 0)
                ends.add(self.kernel.x)
        stays = [x for x in ends if self.ranges.at(x, self.a) == instr.next]
        self.kernel.x = (stays or list(ends) or [start])[0]

    def loop(self, pc: int, instr: Instr, step: Step) -> None:
        """A loop over pages, on each column by itself."""
        after, rows = pc, list[Row]()
        while self.ranges.program[after].loop == instr.loop:
            rows += filter(None, [self.ranges.program[after].row])
            after += 1
        last = max(self.reached[pc:after])
        columns = self.select(instr, step)
        if step in LEAF_BY_LEAF:
            self._leaf_by_leaf(columns, pc, rows)
            columns = []
        for column in columns:
            rest: Column | Regions | None = column
            went: int | None = None  # the situation of the page that went first
            while rest is not None and rest.units:
                part, rest = rest, None
                if (
                    self.single and self.next_row < last and part.units > 1
                ):  # somebody is told of each row before it
                    situation = part.load()[0]
                    alike = part.leading() if situation == went else 1
                    went = situation
                    if alike < part.units:
                        part, rest = part.split(alike)
                self.parts = [part] if rest is None else [part, rest]
                goes_on = self._column(part, pc, rows)
                for one in self.parts if part is not column or column not in self.columns else ():
                    one.store()
                if not goes_on:
                    break
            self.parts = []
        self.goto(after)

    def _leaf_by_leaf(self, columns: Iterable[Column | Regions], pc: int, rows: list[Row]) -> None:
        """A loop over a TD's private pages, which are of 4K: what a TRACK and a kick leave matters to the next one.

        They go in units of `vm.zap_batch`, each row on a whole unit.  Once a unit has left the vCPUs as it found
        them, those behind it that are alike do the same, and are run as one.
        """
        self.store()
        td, most = self.vm.tdx, self.vm.zap_batch
        assert td
        for column in columns:
            slot = column.slot
            rest: Column | None = None
            if slot is not None and column.lo is not None:
                rest = Column.of_slot(self.vm, self.kernel.ranges, slot, column.lo, column.lo + column.n)
            while rest is not None and rest.n:
                rest.load()
                alike = self._alike(rest)
                n = min(most, alike)
                for times in (1, max(0, alike // n - 1)):
                    if not times or (times > 1 and self.single):
                        break
                    before = td.inside()
                    part, rest = rest.split(n * times)
                    self.parts, self.times, self.inner = [part, rest], times, None
                    self._column(part, pc, rows)
                    part.store()
                    self.times = 1
                    if td.inside() != before:
                        break
            self.parts, column.loaded = [], False

    def _alike(self, column: Column) -> int:
        """How many pages from the first on are in its situation; each by itself if somebody looks on."""
        return 1 if self.single and self.vm.zap_batch == 1 else column.leading()

    def _column(self, column: Column | Regions, pc: int, rows: list[Row]) -> bool:
        """The rows of a loop on one column; whether no page ended the loop."""
        found: dict[Note, list[int]] = {}
        for group, value in enumerate(column.load()):
            engine, spent = column.engine(group), False
            begin = pc if engine is self.ranges else engine.place(self.entry, rows)
            if begin is None:
                continue
            self.goto(begin)
            while True:
                done = self._go(value, engine)
                after = done.after & engine.page_mask
                column.values[group] = after
                for note in done.notes:
                    if group not in found.setdefault(note, []):
                        found[note].append(group)
                spent = spent or bool((value ^ after) & engine.cell("failures_left", RMPUPDATE).mask)
                if done.violations or done.blocked:
                    self._log(column, found)
                    self.judge(done, column, group, engine)
                value = after
                at = engine.at(self.kernel.x, self.a)
                instr = engine.program[at]
                if not (instr.loop and instr.row and any(same_row(instr.row, row) for row in rows)):
                    break
                if self.next_row < (until := engine.reached(self.section)[at]):
                    self._log(column, found)
                    self.reach_rows(until)
                if self.vm.on_row is not None:
                    self._log(column, found)
                    self.reach_inner(instr)
                if not column.loaded:
                    value = column.load()[group]
                    if column.engine(group) is not engine:
                        engine = column.engine(group)
                        self.goto(engine.place(self.entry, [instr.row]) or at)
            if spent and self.injected(column, group):
                self._log(column, found)
                column.behind(column.unit(group))
                return False
        self._log(column, found)
        return True

    def _log(self, column: Column | Regions, found: dict[Note, list[int]]) -> None:
        """Note what happened, row by row; pages alike in one event."""
        self.tracks = sum(note.kind == Leaf.TRACK and not note.code for note in found)
        for note in sorted(found, key=lambda note: note.pc):
            where = [column.pages_of(group, note) for group in found[note]]
            self.happens(note, column, min(where)[0], sum(n for _, n in where), found[note])
        found.clear()

    def happens(
        self, note: Note, column: Column | Regions | None, first: int, n: int, groups: Iterable[int] = ()
    ) -> None:
        """What a step noted: the numbers of the window, the flush, and the log."""
        vm, kind = self.vm, note.kind
        if kind == "invalidate-begin":
            vm.mmu.begin(None)
            if self.ranges.program[note.pc].args[0] is not None:
                self._widen(note)
        elif kind == "invalidate-range-add":
            self._widen(note)
        elif kind == "invalidate-end":
            vm.mmu.seq += 1
            vm.mmu.in_progress -= bool(vm.mmu.in_progress)
        elif kind == "flush":
            vm.mmu.flush()
        elif kind == "kick" and vm.tdx:
            vm.tdx.kick(self.times)
        elif column is None:
            vm.log.add(kind, note.text, None, 1, note.code)
        elif kind == "directmap-split":
            self._splits(column, groups)
        else:
            base = column.pfn if kind in BY_PFN else column.start
            if vm.tdx:
                n = self._of_td(vm.tdx, note, column, first, n)
            vm.log.add(kind, note.text, None if base is None else base + first, n, note.code)
            if kind == "rmpupdate" and column.pfn is not None:
                self._updated(column, groups, note.gfn or 0)

    def _of_td(self, td: TdxKvm, note: Note, column: Column | Regions, first: int, n: int) -> int:
        """What a SEAMCALL or a cache flush does beyond the cells, to bytes and numbers; how many events that is."""
        module, kind, pfn = td.module, note.kind, (column.pfn or 0) + first
        if kind == "seamcall-busy" or note.code:
            return 1
        if kind == Leaf.TRACK:
            module.epochs = module.epochs._replace(td_epoch=module.epochs.td_epoch + self.times)
            return self.times
        if kind == Leaf.RANGE_BLOCK:
            units = np.repeat(np.arange(self.times, dtype=np.uint64), n // self.times)
            module.bepoch[pfn : pfn + n] = np.uint64(module.epochs.td_epoch) + units * np.uint64(self.tracks)
        elif kind == Leaf.SEPT_ADD:
            return module.missing_tables((column.lo or 0) + first, n)
        elif kind == Leaf.PAGE_WBINVD:
            td.memory.wbinvd(pfn, n)
        elif kind == "clflush":
            td.memory.flush(pfn, n)
        elif kind == "tdx-clear-page":
            td.memory.clear(pfn, n)
        return n

    def _widen(self, note: Note) -> None:
        for lo, hi in self.covers(self.ranges.program[note.pc]):
            self.vm.mmu.range_add(lo, hi)

    def _splits(self, column: Column | Regions, groups: Iterable[int]) -> None:
        """2M entries of the directmap, each once."""
        assert column.pfn is not None
        for lo, hi in sorted(span for group in groups for span in column.spans(group)):
            if count := self.vm.directmap.split_to_4k(column.pfn + lo, hi - lo):
                self.vm.log.add("directmap-split", page=column.pfn + lo, times=count)

    def _updated(self, column: Column | Regions, groups: Iterable[int], gfn: int) -> None:
        """RMPUPDATE resets the permissions of VMPLs, unless it changes nothing."""
        permissions = self.vm.rmp.permissions
        for group in groups if permissions else ():
            cell = column.engine(group).cell("rmp", f"P{gfn}")
            same = (column.old[group] ^ column.values[group]) & cell.mask == 0 and self.vm.rmp.keeps
            for lo, hi in [] if same else column.spans(group):
                for pfn in [pfn for pfn in permissions if lo <= pfn - (column.pfn or 0) < hi]:
                    del permissions[pfn]

    def judge(
        self, done: Pass, column: Column | Regions | None, group: int, engine: Ranges | None = None
    ) -> None:
        """What was violated: noted, or raised where the run ends; Deadlock where the thread waits for ever."""
        if not done.violations and not done.blocked:
            return
        vm = self.vm
        for name, why in done.violations:
            text = self._real(why, column, group)
            if name not in self.ranges.model.fatal:
                vm.log.violate(name, text)
                continue
            self.store()
            if name == "kernel-bug":
                raise KernelBug(text)
            if name == "host-rmp-fault":
                raise RmpFault((column.pfn or 0) + column.first(group) if column else 0, text)
            code = next((n.code for n in done.notes[::-1] if n.code), 0)
            if vm.tdx:
                vm.tdx.bug(text, code)
            raise PlatformError(text, code)
        if done.blocked:
            self.store()
            if self._vcpus_move(engine or self.ranges):
                return
            raise Deadlock(self._waits(engine or self.ranges))

    def _real(self, text: str, column: Column | Regions | None, group: int) -> str:
        """The text with numbers for the model's names."""
        if column is None:
            return text

        def number(match: re.Match[str]) -> str:
            base = {"P": column.pfn, "S": column.shared, None: column.start}[match[1]]
            where = (base or 0) + column.page_of(group, int(match[2]))
            return f"{'PFN' if match[1] else 'gfn'} {where:#x}"

        return MODEL_NAME.sub(number, text)

    def _vcpus_move(self, engine: Ranges) -> bool:
        """A kick waits until vCPUs have ended their module calls: let them; whether that was it."""
        td = self.vm.tdx
        if not td or engine.steps[engine.at(self.kernel.x, self.a)] not in KICKS or not td.end_module_calls():
            return False
        for column in (*self.columns, *self.parts):
            column.loaded = False
        return True

    def _waits(self, engine: Ranges) -> str:
        """Whom the thread waits for."""
        instr = engine.program[engine.at(self.kernel.x, self.a)]
        lock = instr.args[0] if instr.args and isinstance(instr.args[0], str) else ""
        others = [thread.name for thread in self.kernel.threads() if lock in thread.held]
        if others:
            return f"{self.name} waits for {lock}, held by {others[0]}"
        return f"{self.name} waits for ever{self._under()}: {instr.text}"

    def _under(self) -> str:
        """Whether it holds mmu_lock meanwhile."""
        return " under mmu_lock" if "mmu_lock" in self.ranges.held(self.kernel.x).get(self.a, []) else ""

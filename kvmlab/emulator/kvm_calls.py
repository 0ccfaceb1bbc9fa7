"""The calls of KVM that a Vm makes: the attribute ioctl, the fault, the punch, and what needs no text of a design.

What a program of the page model cannot say is here: input that real sizes have, bytes, errno, and which pages a loop
is done to.  With `range_add` the ioctl is the walk of v6.8: an RMPUPDATE made to fail is KVM_BUG_ON; without, it is
the v8 era, which warns and goes on.  With invalidate_lock first it is the ioctl of a guest_memfd.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

import numpy as np

from ..compile.pages import THREADS
from ..design import Row
from ..design.calls import INCLUSIVE
from ..explore.ranges import Note
from ..hw.snp import Npf, Rmpupdate
from ..hw.snp.pages import PAGES_2M
from ..kernel import directmap
from ..kvm import attributes, gmem, lpage, mmu, sev, tdx
from ..kvm.memslots import visits
from ..model.step import Instr
from .calls import Call
from .columns import Column
from .events import MEMORY_EXIT_FLAG_PRIVATE, InternalError, MemoryFaultExit, MmioExit, PlatformError, VmErrno
from .kvm_state import Step
from .large import Regions, columns_of
from .memory import LIMIT, PAGE, prefix
from .mixed_pages import hull, update_mixed
from .slots import File, MemSlot
from .vm_state import VmState

WHOLE = frozenset(
    {attributes.kvm_vm_set_region_attr, attributes.xa_reserve, attributes.kvm_range_has_memory_attributes}
)
PRIVATE_PAGES = frozenset(
    {sev.rmpupdate, directmap.kvm_unmap_directmap, directmap.kvm_map_directmap, directmap.adjust_direct_map,
     gmem.hold_page}
)  # fmt: skip
STOPS: frozenset[Step] = frozenset(
    {attributes.kvm_vm_set_region_attr, attributes.xa_reserve, gmem.hold_page, gmem.kvm_gmem_get_pfn,
     lpage.kvm_update_lpage_mixed_flag,
     attributes.kvm_range_has_memory_attributes}
)  # fmt: skip
BEFORE_ANYTHING = ("xa_reserve", "kvm_range_has_memory_attributes")
OF_MAPPINGS = frozenset(
    {"kvm_mmu_invalidate_begin", "kvm_mmu_invalidate_range_add", "kvm_mmu_invalidate_end", "kvm_flush_remote_tlbs"}
)  # fmt: skip
POINTS = {sev.snp_lookup_rmpentry: "snp_lookup_rmpentry", sev.psmash: "snp_rmptable_psmash"}


class SetAttributes(Call):
    """KVM_SET_MEMORY_ATTRIBUTES over gfns [start, end) towards private or shared, once its input is checked."""

    def __init__(self, vm: VmState, start: int, end: int, private: bool) -> None:
        word = "private" if private else "shared"
        super().__init__(vm, "ioctl", f"ioctl {word}", f"ioctl {word}")
        self.start, self.end, self.private, self.stored = start, end, private, end
        self.pieces = vm.pieces(start, end)
        self.asked = self.reserved = False
        self.slot_state = "valid" if self.pieces else "none"
        at = start
        for slot, lo, hi in self.pieces:
            if at < lo:
                self.columns.append(Column.of_hole(vm, self.ranges, at, lo))
            self.columns += columns_of(vm, self.ranges, self.kernel.shaped, slot, lo, hi)
            at = max(at, hi)
        if at < end:
            self.columns.append(Column.of_hole(vm, self.ranges, at, end))
        self.alike = self._quiet()

    def _quiet(self) -> bool:
        """Whether all gfns are in one situation, nobody else is about, and nothing is made to fail."""
        vm, column = self.vm, self.columns[0]
        if len(self.columns) > 1 or not isinstance(column, Column) or not (column.slot and column.slot.gmem):
            return False
        if self.single or self.a or vm.mmu.in_progress or vm.failures or vm.rmp.failures:
            return False
        leaf_by_leaf = vm.tdx is not None and not self.private and column.n > 1
        if leaf_by_leaf or vm.in_place or vm.attributes.reserved.any() or self.end > LIMIT:
            return False
        return len(column.load()) == 1

    def answer(self) -> tuple[int, int]:
        """Where it stopped, and how many gfns are left."""
        vm = self.vm
        vm.log.add("set-attributes", "private" if self.private else "shared", self.start)
        if not any(row.call == "xa_reserve" for row in self.rows):
            vm.attributes.reserve(self.end, self.end)  # nothing; but the host has so much memory only
        if self.run() == "done":
            return self.end, 0
        return self.stored, self.end - self.stored

    def reach(self, pc: int) -> None:
        """In-place, to private: before anything is done, nobody else may hold a page."""
        super().reach(pc)
        row = self.ranges.program[pc].row
        if (
            not self.asked
            and row
            and (row.lock == "mmu_lock" or not (row.lock or row.call in BEFORE_ANYTHING))
        ):
            self._nobody_holds()

    def _nobody_holds(self) -> None:
        """No PTEs of the VMM, EAGAIN if somebody else holds a page."""
        if self.asked or not (self.vm.merged and self.vm.in_place and self.private):
            return
        self.asked = True
        for slot, lo, hi in self.pieces:
            if self.vm.gmem_attributes:
                slot.user.present[lo - slot.base : hi - slot.base] = 0
            held = slot.gmem.pinned if slot.gmem else set()
            for page in sorted(held):
                if lo <= (gfn := page - slot.offset + slot.base) < hi:
                    raise VmErrno(
                        errno.EAGAIN, f"page at offset {page * PAGE:#x} (gpa {gfn * PAGE:#x}) is held"
                    )

    def select(self, instr: Instr, step: Step) -> list[Column | Regions]:
        """The request, or what memslots have of it; nothing is done for what was not stored."""
        if step in WHOLE:
            return self.columns
        walk = instr.row.walk if instr.row else None
        return [
            column
            for column in self.columns
            if column.slot and column.lo is not None and column.n
            and visits(walk, column.slot.as_id, column.lo, self.start)
            and (step not in PRIVATE_PAGES or column.slot.gmem)
        ]  # fmt: skip

    def before(self, instr: Instr, step: Step) -> None:
        """Failures that were injected, allocations, the words of large pages."""
        vm = self.vm
        if step is attributes.xa_reserve:
            self._reserve()
        elif step is attributes.kvm_vm_set_region_attr:
            self._may_store()
        elif step is gmem.hold_page and not vm.gmem_attributes:
            for column in self.select(instr, step):
                assert column.slot and column.lo is not None and column.file
                if not column.file.present[column.at : column.at + column.n].all():
                    column.store()
                    vm.touch_backing(column.slot, column.lo, column.n, True)
                    column.loaded = False
        elif step is lpage.kvm_update_lpage_mixed_flag:
            self.store()
            for slot, lo, hi in self.pieces:
                if lo < self.stored and instr.row:
                    end = min(hi, self.stored)
                    update_mixed(slot, lo, end, self.private, vm.attributes, instr.row.target == "reserved")

    def outside(self, instr: Instr, step: Step) -> str | None:
        """In-place nobody looks up the pages of a guest_memfd whose attributes these are."""
        return "" if step is gmem.hold_page and self.vm.gmem_attributes else None

    def _reserve(self) -> None:
        """ENOMEM at the entry that was made to fail, or beyond what the host has memory for."""
        at = self.vm.take_failure("xa_reserve")
        if at is not None:
            self.store()
        self.vm.attributes.reserve(self.start, self.end, at)
        self.reserved = True

    def _may_store(self) -> None:
        """A store may be made to fail: the rest is handed back; none does once it is reserved."""
        at = self.vm.take_failure("xa_store")
        if at is None or not self.start <= self.start + at < self.end:
            return
        if self.reserved:
            raise PlatformError("KVM_BUG_ON: xa_store() failed after its reservation")
        self.stored = self.start + at
        for column in self.columns:
            assert column.lo is not None
            column.cut(max(0, min(column.n, self.stored - column.lo)))
        self.columns = [column for column in self.columns if column.n]

    def skipped(self, row: Row) -> None:
        """range_add() with a word: the large pages at both ends (9129633d568e)."""
        if row.call == "kvm_mmu_invalidate_range_add" and row.target and self.vm.mmu.in_progress:
            for slot, lo, hi in self.pieces:
                self.vm.mmu.range_add(*hull(slot, lo, hi, row.target))

    def covers(self, instr: Instr) -> list[tuple[int, int]]:
        """v8 era: all of the request; else what memslots have of it."""
        if instr.step is attributes.kvm_mmu_invalidate_begin:
            return [(self.start, self.end)]
        return [(lo, hi) for _, lo, hi in self.pieces]

    def injected(self, column: Column | Regions, group: int) -> bool:
        """v8: a rate-limited warning, and the ioctl succeeds; since v6.8 there is no way back."""
        assert column.start is not None
        vm, gfn = self.vm, column.start + column.refused(group)[0]
        code = refused(self, column, group, "private" if self.private else "shared")
        if vm.merged:
            raise PlatformError(f"RMPUPDATE at gfn {gfn:#x} = {code.name}", int(code))
        vm.log.add("warn", f"update_mem_attr failed: {code.name}", gfn, code=int(code))
        return True


def refused(call: Call, column: Column | Regions, group: int, to: str) -> Rmpupdate:
    """Log an RMPUPDATE that was made to fail; rmpupdate() repeats FAIL_OVERLAP without end."""
    assert column.pfn is not None
    page, pages = column.refused(group)
    pfn = column.pfn + page
    code = call.vm.rmp.failures[pfn]
    call.vm.log.add("rmpupdate", f"{to} {'4K' if pages == 1 else '2M'} = {code.name}", pfn, 1, int(code))
    if code == Rmpupdate.FAIL_OVERLAP and call.vm.merged:
        raise PlatformError(f"rmpupdate() repeats for ever: PFN {pfn:#x} = FAIL_OVERLAP", int(code))
    return code


DONE, RETRY = "done", "RET_PF_RETRY"
LEAVE = "RET_PF_RETRY after leaving KVM"  # tdx since v6.18 (2bc2694fe20b): no loop inside


class Fault(Call):
    """`n` nested faults in a row from `gfn` on, all of one kind, and the handler of RMP faults behind each.

    Pages fault one after another; those in the situation of the first are dealt with at once, and `n` says how many.
    """

    def __init__(self, vm: VmState, vcpu: int, gfn: int, n: int, private: bool, write: bool) -> None:
        word = "private" if private else "shared"
        super().__init__(vm, f"vCPU {vcpu}", f"fault {word}", f"fault {word}")
        self.gfn, self.n, self.private, self.write, self.word = gfn, n, private, write, word
        self.answer, self.event, self.taken, self.root = DONE, -1, 1, vm.mmu.root
        self.slot, self.handles, self.seq, self.alike = vm.slots.find(gfn), False, 0, True

    def handle(self, kind: str, code: int, rmp_bit: str | None) -> tuple[str, int]:
        """DONE, RETRY or LEAVE, and how many pages that was; what goes to userspace is raised."""
        vm = self.vm
        self.event = vm.log.add(kind, self.word, self.gfn, 1, code)
        self._find()
        column, gfn = self.columns[0], 0
        column.load()
        if isinstance(column, Regions):
            self.adopt(column.engine(0))
            gfn = column.faulting(column.groups[0].kinds)
        elif column.which is not None:
            self.n = prefix(column.which == 0)
            self.columns = [column.split(self.n)[0]]
        try:
            end = self.run(self.word, rmp_bit, gfn)
            if end == "guest" and self.answer == DONE:
                self._maps_large()
            else:
                self.taken = 1
        finally:
            vm.log.amend(self.event, self.taken)
        if end == "killed":
            code = refused(self, self.columns[0], 0, "private")
            raise VmErrno(errno.EINVAL, f"KVM_RUN: RMPUPDATE of PFN {self.columns[0].pfn:#x} = {code.name}")
        if end == "userspace":
            raise MmioExit(self.gfn * PAGE, self.write)
        if end.startswith("auto"):
            raise MemoryFaultExit(self.gfn * PAGE, MEMORY_EXIT_FLAG_PRIVATE if self.private else 0)
        return self.answer, self.n

    def _find(self) -> None:
        """The pages, as far as the memslot goes; a private fault finds only memslots with a guest_memfd."""
        vm, slot = self.vm, self.slot
        if not vm.slots.by_id:
            raise InternalError("KVM_EXIT_INTERNAL_ERROR: the VM has no memory")
        if slot is None or (self.private and slot.gmem is None):
            self.n = 1
            column: Column | Regions = Column.of_hole(vm, self.ranges, self.gfn, self.gfn + 1)
        else:
            self.n = 1 if self.single else min(self.n, slot.end - self.gfn)
            column = self._large(slot) or Column.of_slot(vm, self.ranges, slot, self.gfn, self.gfn + self.n)
        self.columns = [column]

    def _large(self, slot: MemSlot) -> Regions | None:
        """The 2M page around the fault, if it matters that it is one; else only pages inside it fault together."""
        vm, many = self.vm, 1  # 2M pages that fault at their first page, where nothing sends a fault back
        if self.gfn % PAGES_2M == 0 and not (self.single or self.a or vm.mmu.in_progress):
            many = max(1, min(self.n, slot.end - self.gfn) // PAGES_2M)
        end = self.gfn + (1 if many == 1 else many * PAGES_2M)
        columns = columns_of(vm, self.kernel.ranges, self.kernel.shaped, slot, self.gfn, end)
        found = [column for column in columns if isinstance(column, Regions)]
        if not found or (self.vm.tdx and self.private):  # KVM maps private memory of a TD in 4K pages only
            return None
        (region,) = found
        if self.vm.huge(self.private):
            self.n = min(self.n, PAGES_2M - self.gfn % PAGES_2M)
        if region.plain(self.private):
            self.n = min(self.n, PAGES_2M - self.gfn % PAGES_2M)
            return None
        region.apart, region.private, self.n = region.asked[0], self.private, 1
        if many == 1 or not region.maps(self.private):
            return region if region.units == 1 else region.split(1)[0]
        region.load()
        alike = prefix(region.which == 0)
        return region if alike == region.units else region.split(alike)[0]

    def _maps_large(self) -> None:
        """How many faults it was, and how many pages are mapped now."""
        column, slot = self.columns[0], self.slot
        self.taken = self.n
        if isinstance(column, Regions) and slot and column.is_large():
            head = self.gfn - self.gfn % PAGES_2M
            pages = column.units * PAGES_2M
            self.vm.touch_backing(slot, head, pages, self.private)
            self.taken, self.n = column.units, head + pages - self.gfn

    def _alone(self) -> None:
        """In the machine of the 2M page's shape, if there is one, at the gfn that stands for the page that faults."""
        column = self.columns[0]
        column.load()
        if isinstance(column, Regions):
            self.adopt(column.engine(0))
            acc = self.ranges.cell("acc", THREADS[self.a])
            now = acc.get(self.kernel.x)._replace(gfn=column.faulting(column.groups[0].kinds))
            self.kernel.x = self.ranges.set(self.kernel.x, acc, now)
        super()._alone()

    def happens(
        self, note: Note, column: Column | Regions | None, first: int, n: int, groups: Iterable[int] = ()
    ) -> None:
        """Ends of a fault; the first that is sent back is the only one that was begun."""
        kind = note.kind
        if kind in ("retry", "leave"):
            self.answer = RETRY if kind == "retry" else LEAVE
            self.vm.log.add("retry", note.text, self.gfn)
        elif kind == "seamcall-busy":
            self.answer = RETRY
            self.vm.log.add(kind, note.text, self.gfn)
        elif kind == "exit-memory-fault":
            self.vm.log.add(kind, page=self.gfn, code=MEMORY_EXIT_FLAG_PRIVATE if self.private else 0)
        elif kind == "exit-mmio":
            self.vm.log.add(kind, page=self.gfn)
        elif kind == "psmash":
            self.vm.log.add(kind, note.text, (column.pfn or 0) if column else 0, 1, note.code)
        else:
            super().happens(note, column, first, n, groups)

    def before(self, instr: Instr, step: Step) -> None:
        """Allocate what the fault maps; let a script act inside the handler; a root that went makes a fault stale."""
        vm = self.vm
        if step is gmem.kvm_gmem_get_pfn and self.slot and (self.slot.gmem or not self.private):
            if not vm.has_pages(self.slot, self.gfn, self.n, self.private):
                self.store()
                vm.touch_backing(self.slot, self.gfn, self.n, self.private)
                if self.private or vm.in_place:
                    self.columns[0].allocated()
        elif point := POINTS.get(step):
            if vm.on_point is not None:
                self.hook(lambda: vm.at_point(point))
            if step is sev.snp_lookup_rmpentry:
                self._lost_page(instr)
        elif step is mmu.is_page_fault_stale and self.root != vm.mmu.root:
            snapshot = self.ranges.cell("snapshot", THREADS[self.a])
            self.kernel.x = self.ranges.set(self.kernel.x, snapshot, "moved")

    def reach(self, pc: int) -> None:
        """The rows of the handler come after those of the fault."""
        if not self.handles and self.ranges.program[pc].section == "rmp_fault":
            self.handles, self.seq = True, self.vm.mmu.seq
            self.text(f"rmp_fault {self.word}")
        super().reach(pc)

    def _lost_page(self, instr: Instr) -> None:
        """acafcf32c83e: whoever unassigned the page has invalidated the gfn since; else it is worth a warning."""
        vm, slot = self.vm, self.slot
        if (instr.row and instr.row.target == "warn") or not (slot and slot.gmem):
            return  # the step warns by itself
        lost = vm.attributes.is_private(self.gfn) and not vm.rmp.assigned(slot.private_pfn(self.gfn))[0]
        if lost and not vm.mmu.retry(self.gfn, self.seq):
            vm.log.add("warn", "RMP fault on an unassigned entry", self.gfn)

    def covers(self, instr: Instr) -> list[tuple[int, int]]:
        """The pages of the fault."""
        return [(self.gfn, self.gfn + self.n)]


def run_fault(
    vm: VmState, vcpu: int, gfn: int, n: int, private: bool, write: bool, code: int, kind: str = ""
) -> tuple[str, int]:
    """One nested fault (or `n` alike): DONE, RETRY or LEAVE, and how many pages it dealt with.

    Raises MemoryFaultExit or MmioExit for what goes to userspace, VmErrno if KVM_RUN fails.
    """
    rmp = vm.has_rmp and bool(code & Npf.RMP)
    bit = "SIZEM" if rmp and code & Npf.SIZEM else "RMP" if rmp else None
    kind = kind or ("npf-rmp" if rmp else "npf")
    return Fault(vm, vcpu, gfn, n, private, write).handle(kind, int(code), bit)


class Punch(Call):
    """PUNCH_HOLE over pages [start, end) of a guest_memfd, which is also what closing it does.

    The rows about mappings work on the gfns at which memslots are bound to the range, those about the RMP and the
    directmap on its pages.
    """

    def __init__(self, vm: VmState, file: File, start: int, end: int) -> None:
        super().__init__(vm, "punch hole", "punch", "punch")
        self.file, self.start, self.end, self.behind = file, start, end, None
        self.bound = [
            (slot, lo - at + slot.base, hi - at + slot.base) for lo, hi, at, slot in file.slots(start, end)
        ]
        self.columns = self._pages(start, end)
        self.slot_state = "valid" if self.bound else "none"

    def _pages(self, start: int, end: int) -> list[Column | Regions]:
        found, at = list[Column | Regions](), start
        for lo, hi, offset, slot in sorted(self.file.slots(start, end), key=lambda bound: bound[0]):
            if at < lo:
                found.append(Column.of_file(self.vm, self.ranges, self.file, at, lo))
            gfns = (lo - offset + slot.base, hi - offset + slot.base)
            found += columns_of(self.vm, self.ranges, self.kernel.shaped, slot, *gfns)
            at = hi
        return [*found, *([Column.of_file(self.vm, self.ranges, self.file, at, end)] if at < end else [])]

    def select(self, instr: Instr, step: Step) -> list[Column | Regions]:
        """The bound gfns for what is about mappings, else the pages; one more where the text says so."""
        if step in (mmu.kvm_unmap_gfn_range, tdx.kvm_unmap_gfn_range):
            return [column for column in self.columns if column.lo is not None]
        more = instr.row and instr.row.walk == INCLUSIVE and self.end < self.file.pages
        return self.columns + (self._pages(self.end, self.end + 1) if more else [])

    def outside(self, instr: Instr, step: Step) -> str | None:
        """Without a memslot there is no kvm whose mmu_lock it could be, and nothing is invalidated."""
        row = instr.row
        shares = step is tdx.kvm_unmap_gfn_range and self.vm.in_place
        if shares and any([self._unmap_shared(lo, hi) for _, lo, hi in self.bound]):
            self.vm.mmu.flush()
        return "" if row and not self.bound and (row.lock == "mmu_lock" or row.call in OF_MAPPINGS) else None

    def _unmap_shared(self, lo: int, hi: int) -> bool:
        """In-place a TD's shared root maps the same page."""
        leaves = self.vm.mmu.leaves(lo, hi)
        if count := int(np.count_nonzero(leaves)):
            self.vm.log.add("zap", page=lo, times=count)
            leaves[:] = 0
        return bool(count)

    def happens(
        self, note: Note, column: Column | Regions | None, first: int, n: int, groups: Iterable[int] = ()
    ) -> None:
        """What is made shared leaves the caches (wbinvd_on_all_cpus() or CLFLUSH, sev_gmem_invalidate())."""
        super().happens(note, column, first, n, groups)
        if note.kind == "rmpupdate" and column and column.pfn is not None:
            for lo, hi in [span for group in groups for span in column.spans(group)]:
                self._clflush(column.pfn + lo, hi - lo)

    def _clflush(self, pfn: int, n: int) -> None:
        if self.vm.switches.free_flushes_caches:
            self.vm.log.add("clflush", page=pfn, times=n)
            self.vm.memory.flush(pfn, n)

    @property
    def single(self) -> bool:
        """Row by row, too, where some rows are left out."""
        return super().single or not self.bound

    def injected(self, column: Column | Regions, group: int) -> bool:
        """A page that cannot be made shared is leaked (snp_leak_pages()), and the next one is begun."""
        assert column.pfn is not None
        code, (page, pages) = refused(self, column, group, "shared"), column.refused(group)
        pfn = column.pfn + page
        self.vm.log.add("warn", f"rmp_make_shared() = {code.name}: page leaked", pfn)
        self.vm.leaked.update(range(pfn, pfn + pages))
        self._clflush(pfn, pages)
        return False

    def skipped(self, row: Row) -> None:
        """psmash(): 2M entries of which only a part goes."""
        for column in self.columns if row.call == "psmash" and self.vm.has_rmp else ():
            if isinstance(column, Regions):
                self.aside(column, row)

    def covers(self, instr: Instr) -> list[tuple[int, int]]:
        """From the first bound gfn to the last, or each memslot's."""
        bound = [(lo, hi) for _, lo, hi in self.bound]
        if instr.step is attributes.kvm_mmu_invalidate_begin:
            return [(min(lo for lo, _ in bound), max(hi for _, hi in bound))]
        return bound


class Zap(Call):
    """What KVM does by itself to gfns [lo, hi): an MMU notifier, or the deletion of a memslot."""

    def __init__(self, vm: VmState, name: str, entry: str, slot: MemSlot, lo: int, hi: int) -> None:
        super().__init__(vm, name, entry, entry)
        self.columns = columns_of(vm, self.ranges, self.kernel.shaped, slot, lo, hi)

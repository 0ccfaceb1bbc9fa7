"""The fault path of one vCPU: the design's `fault:` and `rmp_fault:` rows, run on consecutive pages at once.

Pages fault one after another; where consecutive ones are in the same situation the rows run once on all of
them, and every count says how many faults that were.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from ..design import Row
from ..design.calls import DIRECTMAP
from ..hw.snp import PG_2M, PG_4K, Npf
from . import kvm_calls
from .events import MEMORY_EXIT_FLAG_PRIVATE, InternalError, MemoryFaultExit, MmioExit, VmErrno
from .locks import Thread
from .memory import PAGE, prefix
from .rmpfault import Handler, rmp_work
from .slots import MemSlot
from .tdx_aug import Aug

if TYPE_CHECKING:
    from .vm import Vm

DONE, RETRY = "done", "RET_PF_RETRY"
LEAVE = "RET_PF_RETRY after leaving KVM"  # tdx since v6.18 (2bc2694fe20b): no loop inside
FAULTS_2M = 512
PREPARES = ("rmp_prepare", "rmp_match")


@dataclass
class Fault:
    """`n` faults in a row from `gfn` on, all of one kind; the rest is found out on the way."""

    vm: Vm
    thread: Thread
    gfn: int
    n: int
    private: bool
    write: bool
    seq: int | None = None  # without a snapshot there is nothing to compare
    slot: MemSlot | None = None
    pfn: int = -1  # unknown, until the backing has been asked
    taken: int = 1  # how many faults it was
    looked: bool = False  # for its memslot
    invalid: bool = False  # KVM_MEMSLOT_INVALID, as it was then
    root: int = field(init=False)

    def __post_init__(self) -> None:
        self.root = self.vm.mmu.root

    def attributes_match(self) -> None:
        """kvm_mem_is_private(): only the pages before the first mismatch go on."""
        matches = self.vm.attributes.get(self.gfn, self.gfn + self.n) == self.private
        if not (n := prefix(matches)):
            self.exit()
        self.n = n

    def exit(self) -> NoReturn:
        """kvm_mmu_prepare_memory_fault_exit()."""
        self.thread.unwind()
        flags = MEMORY_EXIT_FLAG_PRIVATE if self.private else 0
        self.vm.log.add("exit-memory-fault", page=self.gfn, code=flags)
        raise MemoryFaultExit(self.gfn * PAGE, flags)

    def look_up(self) -> None:
        """kvm_vcpu_gfn_to_memslot(): what the fault believes of its memslot from here on."""
        self.slot, self.looked = self.vm.slots.find(self.gfn), True
        self.invalid = self.slot is not None and self.slot.invalid

    def find_slot(self) -> MemSlot:
        """The memslot; a private fault without one exits as a memory fault, a shared one is MMIO."""
        if not self.looked:
            self.look_up()
        slot = self.slot
        if slot is None:
            if not self.vm.slots.by_id:
                self.thread.unwind()
                raise InternalError("KVM_EXIT_INTERNAL_ERROR: the VM has no memory")
            if self.private:
                self.exit()
            self.thread.unwind()
            self.vm.log.add("exit-mmio", page=self.gfn)
            raise MmioExit(self.gfn * PAGE, self.write)
        self.n = min(self.n, slot.end - self.gfn)
        return slot

    def get_pfn(self) -> None:
        """kvm_gmem_get_pfn(), or GUP for a shared fault: allocates and zeroes, may sleep."""
        self.thread.might_sleep("kvm_gmem_get_pfn() may allocate")
        slot = self._backing()
        self.vm.touch_backing(slot, self.gfn, self.n, self.private)

    def _backing(self) -> MemSlot:
        """Find memslot and PFN; a private fault exits if the memslot has no guest_memfd."""
        slot = self.find_slot()
        if self.private and slot.gmem is None:
            self.exit()
        if self.vm.huge(self.private):
            self.n = min(self.n, FAULTS_2M - self.gfn % FAULTS_2M)
        self.pfn = self.vm.backing_pfn(slot, self.gfn, self.private)
        return slot

    def stale(self) -> bool:
        """is_page_fault_stale(), under mmu_lock."""
        self.thread.assert_mmu_lock("is_page_fault_stale()")
        if self.vm.mmu.in_progress and self.vm.mmu.window:
            lo = self.vm.mmu.window[0]
            if self.gfn < lo < self.gfn + self.n:
                self.n = lo - self.gfn
        return self.root != self.vm.mmu.root or self.vm.mmu.retry(self.gfn, self.seq)

    def level(self) -> str:
        """The level of the mapping: least of backing, memslot, RMP entry and mixed flag."""
        slot, head = self.slot, self.gfn - self.gfn % FAULTS_2M
        assert slot is not None
        if not self.vm.huge(self.private) or not slot.allows(head, "2M"):
            return PG_4K
        pfn = self.vm.backing_pfn(slot, head, self.private)
        if pfn % FAULTS_2M or (self.private and not self.vm.whole_folio(slot, head)):
            return PG_4K
        if self.private and self.vm.has_rmp and not self.vm.rmp.big(pfn)[0]:
            return PG_4K
        return PG_2M

    def install(self) -> int:
        """kvm_tdp_mmu_map(): how many faults these pages took (one for a 2M leaf); 0 for RET_PF_RETRY."""
        self.thread.assert_mmu_lock("kvm_tdp_mmu_map()")
        if self.pfn < 0:  # the text maps what it has not looked up
            self._backing()
        if self.vm.tdx and self.private:
            return self.n if Aug(self, self.vm.tdx).run() else 0
        if self.level() == PG_4K:
            self.vm.mmu.install(self.gfn, self.n, self.pfn, False)
            return self.n
        head = self.gfn - self.gfn % FAULTS_2M
        assert self.slot is not None
        pfn = self.vm.backing_pfn(self.slot, head, self.private)
        self.vm.touch_backing(self.slot, head, FAULTS_2M, self.private)
        self.vm.mmu.install(head, FAULTS_2M, pfn, True)
        self.n = FAULTS_2M - (self.gfn - head)
        return 1


def run_fault(
    vm: Vm, vcpu: int, gfn: int, n: int, private: bool, write: bool, code: int, kind: str = ""
) -> tuple[str, int]:
    """One nested fault (or `n` alike): DONE, RETRY or LEAVE, and how many pages it dealt with.

    Raises MemoryFaultExit or MmioExit for what goes to userspace, VmErrno if KVM_RUN fails.
    """
    rmp = vm.has_rmp and bool(code & Npf.RMP)
    kind = kind or ("npf-rmp" if rmp else "npf")
    if vm.by_ranges:
        bit = "SIZEM" if code & Npf.SIZEM else "RMP" if rmp else None
        return kvm_calls.Fault(vm, vcpu, gfn, n, private, write).handle(kind, int(code), bit)
    fault, answer = Fault(vm, vm.new_thread(f"vCPU {vcpu}"), gfn, n, private, write), DONE
    event = vm.log.add(kind, "private" if private else "shared", gfn, 1, int(code))
    rows = vm.rows("fault", private)
    if not any(row.call == "kvm_vcpu_gfn_to_memslot" for row in rows):
        fault.look_up()
    try:
        for row in rows:
            vm.reached(row)
            if (answer := _row(fault, row)) != DONE:
                fault.thread.unwind()
                break
        fault.thread.leave("enters the guest")
    except VmErrno:  # KVM_RUN fails: every error path lets go of its locks
        fault.thread.unwind()
        raise
    finally:
        vm.log.amend(event, fault.taken)
    if rmp:
        Handler(fault, Npf(code)).run()
    return answer, fault.n


def _row(fault: Fault, row: Row) -> str:
    """One row of the fault path: DONE to go on, else how it ends here."""
    if row.call == "memslot_invalid":
        fault.find_slot()
        if fault.invalid:
            fault.vm.log.add("retry", "KVM_MEMSLOT_INVALID", fault.gfn)
            return LEAVE if row.target == "leave" else RETRY
    elif row.call == "is_page_fault_stale":
        if fault.stale():
            fault.vm.log.add("retry", page=fault.gfn)
            return RETRY
    elif row.call == "kvm_tdp_mmu_map":
        taken = fault.install()
        fault.taken = taken or 1
        return DONE if taken else RETRY
    else:
        _plain_row(fault, row)
    return DONE


def _plain_row(fault: Fault, row: Row) -> None:
    """A row after which the fault path goes on, or exits."""
    vm = fault.vm
    if row.call == "kvm_vcpu_gfn_to_memslot":
        fault.look_up()
    elif row.call == "mmu_seq_snapshot":
        fault.seq = vm.mmu.seq
    elif row.call in ("kvm_mem_is_private", "kvm_gmem_is_private"):
        fault.attributes_match()
    elif row.call == "kvm_gmem_get_pfn":
        fault.get_pfn()
    elif row.call in PREPARES:
        _prepare(fault, row)
    elif row.lock:
        fault.thread.row(row)
    elif vm.has_rmp or (vm.tdx and row.call in DIRECTMAP):
        slot = fault.find_slot()
        if slot.gmem is not None:
            rmp_work(fault, row, slot.private_pfn(fault.gfn), fault.n, PG_4K)


def _prepare(fault: Fault, row: Row) -> None:
    """sev_gmem_prepare() (private faults on unassigned pages), or rmp_match() (either way), in its folio lock.

    rmp_match() looks at the PFN that is to be mapped: with split backing a shared fault has none in the RMP.
    """
    vm, slot = fault.vm, fault.slot
    if (
        not vm.has_rmp
        or slot is None
        or slot.gmem is None
        or (not fault.private and row.target != "private_pfn" and (row.call == "rmp_prepare" or not vm.in_place))
    ):
        return
    pfn = slot.private_pfn(fault.gfn)
    assigned = vm.rmp.assigned(pfn, fault.n)
    fault.n = prefix(assigned == assigned[0])
    if bool(assigned[0]) == fault.private:
        return
    fault.thread.take("folio_lock")
    size, n = PG_4K, fault.n
    if fault.private and vm.huge(True):
        head = fault.gfn - fault.gfn % FAULTS_2M
        base = pfn - (fault.gfn - head)
        fits = base % FAULTS_2M == 0 and slot.contains(head, "2M") and vm.whole_folio(slot, head)
        if fits and not vm.rmp.assigned(base, FAULTS_2M).any():
            size, pfn, n = PG_2M, base, FAULTS_2M
    for inner in row.body or ():
        if inner.call != "adjust_direct_map" or size == PG_4K:
            rmp_work(fault, inner, pfn, n, size)
    fault.thread.drop("folio_lock")

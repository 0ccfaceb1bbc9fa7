"""A TD vCPU's accesses: two roots, the secure EPT for private GPAs and the ordinary EPT for shared ones."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..hw import tdx
from ..hw.tdx import sept as tdx_sept
from . import walk
from .events import GuestSpins, MemoryFaultExit, VeFault
from .kvm_calls import LEAVE, RETRY, run_fault
from .memory import PAGE, U8, U32, prefix
from .tdx_kvm import TdxKvm
from .vmm import Vmm

DATA, EXIT, PENDING, VE = 0, 1, 2, 3
OUTCOMES = {tdx.Guest.DATA: DATA, tdx.Guest.EXIT: EXIT, tdx.Guest.EXIT_PENDING: PENDING, tdx.Guest.VE: VE}
READ, WRITE = 1, 2  # exit qualification


@lru_cache(None)
def private_outcomes(ve_disable: bool) -> U8:
    """ACCESS of hw/tdx/sept.py by state; a table stands at no 4K entry."""
    leaves = [s if s.leaf or s == tdx_sept.FREE else tdx_sept.FREE for s in tdx_sept.STATES]
    return np.array([OUTCOMES[tdx_sept.access(s, ve_disable=ve_disable)] for s in leaves], np.uint8)


class TdWalker:
    """One kind of access by one vCPU through private or shared GPAs; the counterpart of `walk.Walker`."""

    def __init__(self, vmm: Vmm, td: TdxKvm, vcpu: int, op: str, private: bool) -> None:
        self.vmm, self.vm, self.td, self.vcpu, self.op, self.private = vmm, vmm.vm, td, vcpu, op, private
        self.chunk, self.tries, self.stuck_at, self.why = walk.SMALLEST, 0, -1, ""

    def run(self, gfn: int, end: int) -> tuple[U32, NDArray[np.bool_]]:
        """Fault until the access at `gfn` goes through; the PFNs of it and of what goes through after it.

        VmDead or VeFault for a PENDING page, GuestSpins, and what userspace makes of its exits.
        """
        while True:
            self.td.enter(self.vcpu)
            leaves, outcomes = self._walk(gfn, min(end, gfn + self.chunk))
            first = int(outcomes[0])
            n = prefix(outcomes == first)
            if first == DATA:
                self.grew(n)
                tlb = self.td.vcpus[self.vcpu].tlb if self.private else self.vm.mmu.tlbs[self.vcpu]
                tlb.fill(gfn, leaves[:n])
                return (leaves[:n] >> np.uint32(1)) - np.uint32(1), (leaves[:n] & 1).astype(bool)
            if first == VE:
                self.vm.log.add("ve", page=gfn)
                raise VeFault(gfn * PAGE)
            if first == PENDING:
                self.td.pending(self.vcpu, gfn)
            # A private page is PENDING once it is mapped, so a plain access gets no further than the first.
            self.fault(gfn, 1 if self.private else n)

    def grew(self, n: int) -> None:
        """Look at more pages at once after a run of `n`."""
        self.chunk = min(walk.LARGEST, max(walk.SMALLEST, n * 4))

    def _walk(self, lo: int, hi: int) -> tuple[U32, U8]:
        """Leaves (as in gfn_arrays.py) and outcomes of gfns [lo, hi): the vCPU's TLB first."""
        if not self.private:
            leaves = self.vm.mmu.walk(self.vcpu, lo, hi)
            return leaves, np.where(leaves == 0, EXIT, DATA).astype(np.uint8)
        module = self.td.module
        outcomes = private_outcomes(self.vm.switches.sept_ve_disable)[module.states(lo, hi)]
        leaves = np.where(outcomes == DATA, (module.hpa[lo:hi] + np.uint32(1)) << np.uint32(1), np.uint32(0))
        self.td.vcpus[self.vcpu].tlb.overlay(lo, leaves)
        outcomes[leaves != 0] = DATA
        return leaves, outcomes

    def fault(self, gfn: int, n: int, accept: bool = False) -> None:
        """One EPT-violation TD exit (or `n` alike) and what KVM does; GuestSpins if the access gets nowhere."""
        vm, log = self.vm, self.vm.log
        slot = vm.slots.find(gfn)
        n = min(n, slot.end - gfn) if slot else 1
        self._count(gfn)
        self.td.leave(self.vcpu)
        if not self.private:
            vm.mmu.tlbs[self.vcpu].drop(gfn, gfn + n)
        qualification, before = WRITE if self.op != "read" or accept else READ, log.counters["ept-violation"]
        self.why = "not mapped"
        kind = "ept-violation"
        try:
            # tdx_handle_ept_violation() repeats a private fault by itself: the vCPU does not enter in between.
            while (answer := self._once(gfn, n, qualification, kind)) == RETRY and self.private:
                self.why, kind = "RET_PF_RETRY", "fault-again"
                self._count(gfn)
            if answer == LEAVE:
                self.why = f"{LEAVE}: the memslot is being deleted"
        except MemoryFaultExit as exit_:
            self.why = f"userspace re-enters after {exit_.strerror}"
            self.vmm.memory_fault(exit_)
        exits = log.counters["ept-violation"] - before
        if exits > 1:  # each but the last was followed by an entry of its own
            log.add(tdx.Leaf.VP_ENTER, f"vCPU {self.vcpu}", None, exits - 1)

    def _count(self, gfn: int) -> None:
        self.tries = self.tries + 1 if gfn == self.stuck_at else 1
        self.stuck_at = gfn
        if self.tries > walk.SPIN_LIMIT:
            raise GuestSpins(gfn * PAGE, self.why)

    def _once(self, gfn: int, n: int, qualification: int, kind: str) -> str:
        write = self.private or qualification == WRITE  # KVM takes every private fault for a write
        answer, _ = run_fault(self.vm, self.vcpu, gfn, n, self.private, write, qualification, kind)
        return answer

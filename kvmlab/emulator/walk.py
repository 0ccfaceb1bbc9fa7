"""A vCPU's accesses: translate, check the RMP, fault until it goes through, run by run of pages alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..hw.snp import VC_NOT_VALIDATED_CODE
from ..hw.snp import pages as snp_pages
from .events import GuestSpins, MemoryFaultExit, VcFault, VmplFault
from .kvm_calls import LEAVE, RETRY, run_fault
from .memory import PAGE, U8, U32, prefix
from .vmm import Vmm

OK, RMP, VC, ABSENT = 0, 1, 2, 3  # the first three are indices into rmp.OUTCOMES
SPIN_LIMIT = 8  # one page needs at most: not present, exit, not present, RMP (PSMASH), not present
SMALLEST, LARGEST = 512, 1 << 18


class Walker:
    """One kind of access by one vCPU, with the C-bit `enc`, over as many pages as one likes."""

    def __init__(
        self, vmm: Vmm, vcpu: int, op: str, enc: bool, vmpl: int = 0, validate: bool = False
    ) -> None:
        self.vmm, self.vm, self.vcpu, self.op, self.enc, self.vmpl = vmm, vmm.vm, vcpu, op, enc, vmpl
        self.validate = validate  # what a PVALIDATE asks for
        self.chunk, self.tries, self.stuck_at, self.why = SMALLEST, 0, -1, ""

    def run(self, gfn: int, end: int) -> tuple[U32, NDArray[np.bool_]]:
        """Fault until the access at `gfn` goes through; the PFNs of it and of what goes through after it.

        The second array tells which of them are mapped by 2M leaves.  VcFault, VmplFault, GuestSpins, and
        what userspace makes of its exits.
        """
        while True:
            leaves = self.vm.mmu.walk(self.vcpu, gfn, min(end, gfn + self.chunk))
            outcomes = self._check(gfn, leaves)
            first = int(outcomes[0])
            n = prefix(outcomes == first)
            if first == OK:
                self.chunk = min(LARGEST, max(SMALLEST, n * 4))
                self.vm.mmu.tlbs[self.vcpu].fill(gfn, leaves[:n])
                return (leaves[:n] >> np.uint32(1)) - np.uint32(1), (leaves[:n] & 1).astype(bool)
            if first == VC:
                self.vm.log.add("vc", page=gfn, code=VC_NOT_VALIDATED_CODE)
                raise VcFault(gfn * PAGE, VC_NOT_VALIDATED_CODE)
            sizem = first == RMP and self._size_alone(gfn, int(leaves[0]))
            self.fault(
                gfn, n if first == ABSENT else 1, present=first != ABSENT, rmp=first == RMP, sizem=sizem
            )

    def _check(self, gfn: int, leaves: U32) -> U8:
        outcomes = np.where(leaves == 0, ABSENT, OK).astype(np.uint8)
        ask = leaves != 0
        if self.vm.switches.rmp_checked_at == "fill" and self.op != "pvalidate":
            cached = np.zeros_like(leaves)
            self.vm.mmu.tlbs[self.vcpu].overlay(gfn, cached)
            ask &= cached == 0
        if self.vm.has_rmp and ask.any():
            pfns = (leaves[ask] >> np.uint32(1)) - np.uint32(1)
            gfns = (np.flatnonzero(ask) + gfn).astype(np.uint32)
            big = (leaves[ask] & 1).astype(bool)
            outcomes[ask] = self.vm.rmp.check(pfns, gfns, big, self.enc, self.op)
            if self.vmpl and self.enc and outcomes[0] == OK:
                self._vmpl(gfn, int(pfns[0]))
                outcomes[1:] = VC  # whatever they are: look at one page at a time
        return outcomes

    def _size_alone(self, gfn: int, leaf: int) -> bool:
        """Whether nothing but the size of the mapping is wrong, where such an access sets SIZEM."""
        if not self.vm.switches.access_sets_sizem:
            return False
        pfn, other = np.array([(leaf >> 1) - 1], np.uint32), np.array([not leaf & 1])
        found = self.vm.rmp.check(pfn, np.array([gfn], np.uint32), other, self.enc, self.op)
        return bool(found[0] != RMP)

    def _vmpl(self, gfn: int, pfn: int) -> None:
        """The last of the checks: what the entry lets this VMPL do."""
        permissions = self.vm.rmp.permissions.get(pfn, snp_pages.AFTER_RMPUPDATE)
        if not snp_pages.vmpl_allows(permissions, self.vmpl, self.op):
            code = snp_pages.npf_code(present=True, write=self.op == "write", enc=True, rmp=True, vmpl=True)
            self.vm.log.add("npf-vmpl", page=gfn, code=int(code))
            raise VmplFault(gfn * PAGE, int(code))

    def _pages_to_fault(self, gfn: int, n: int) -> int:
        """How many of `n` absent pages the access gets past once they are mapped; at least the first faults.

        One page after another, the access would stop at the first that it may not touch, so those behind it
        must not be faulted in either.
        """
        vm, slot = self.vm, self.vm.slots.find(gfn)
        if slot is None or self.vmpl or (self.enc and slot.gmem is None):
            return 1
        n = min(n, slot.end - gfn)
        prepares = vm.prepares and not vm.huge(True)  # a 2M entry may be made, and the mapping be 4K
        pfn = vm.backing_pfn(slot, gfn, self.enc)
        fits = vm.rmp.fits(pfn, n, gfn, self.enc, self.op, self.validate, prepares)
        return max(1, prefix(fits))

    def fault(self, gfn: int, n: int, *, present: bool, rmp: bool, sizem: bool = False) -> None:
        """One nested fault (or `n` alike); GuestSpins when the same access gets nowhere."""
        vm = self.vm
        self.tries = self.tries + 1 if gfn == self.stuck_at else 1
        self.stuck_at = gfn
        if self.tries > SPIN_LIMIT:
            raise GuestSpins(gfn * PAGE, self.why)
        vm.mmu.tlbs[self.vcpu].drop(gfn, gfn + n)
        private = self.enc if vm.has_rmp else vm.attributes.is_private(gfn)
        if not vm.has_rmp:
            n = prefix(vm.attributes.get(gfn, gfn + n) == private)
        elif n > 1:
            n = self._pages_to_fault(gfn, n)
        write, enc = self.op == "write", self.enc and vm.encrypts
        code = snp_pages.npf_code(present=present, write=write, enc=enc, rmp=rmp, sizem=sizem)
        self.why = "RMP fault, and the handler changes nothing" if rmp else "not present"
        try:
            answer, _ = run_fault(vm, self.vcpu, gfn, n, private, write, code)
            if answer == RETRY:
                self.why = "RET_PF_RETRY: the gfn is being invalidated"
            elif answer == LEAVE:
                self.why = f"{LEAVE}: the memslot is being deleted"
        except MemoryFaultExit as exit_:
            self.why = f"userspace re-enters after {exit_.strerror}"
            self.vmm.memory_fault(exit_)

"""Userspace: what it does with KVM_EXIT_MEMORY_FAULT and with the guest's conversion requests."""

from __future__ import annotations

import errno
from collections.abc import Callable

from . import kvm_calls
from .events import MEMORY_EXIT_FLAG_PRIVATE, MemoryFaultExit, VmErrno
from .host import Host
from .ioctl import set_memory_attributes
from .memory import PAGE
from .vm_state import VmState

POLICIES = {
    "convert": "convert to what was touched (implicit conversion), and run on",
    "rerun": "run again as if nothing had happened",
    "kill": "give up: the exit is raised",
}
DISCARDS = {
    "none": "the unused backing stays allocated",
    "before": "free it before the ioctl, as the KVM selftests do",
    "after": "free it after the ioctl, as QEMU does",
}
Policy = str | Callable[[MemoryFaultExit], None]


class Vmm:
    """A VMM with a policy for memory faults (a word, or a function) and for the unused backing.

    It is who runs the vCPUs of `vm`, and to whom they come out; its own access to the memory is `host`.
    """

    def __init__(self, vm: VmState, host: Host, policy: Policy, discard: str) -> None:
        self.vm, self.host, self.policy, self.discard = vm, host, policy, discard

    def memory_fault(self, exit_: MemoryFaultExit) -> None:
        """KVM_RUN came back with KVM_EXIT_MEMORY_FAULT."""
        if callable(self.policy):
            self.policy(exit_)
        elif self.policy == "kill":
            raise exit_
        elif self.policy == "convert":
            private = bool(exit_.flags & MEMORY_EXIT_FLAG_PRIVATE)
            slot = self.vm.slots.find(exit_.gpa // PAGE)
            if slot is None or (private and slot.gmem is None):
                raise exit_  # the attribute is not what is wrong: converting would change nothing
            self.convert(exit_.gpa, exit_.size, private)

    def convert(self, gpa: int, size: int, private: bool) -> None:
        """Set the attributes and, if that is the policy, free the backing that is no longer used."""
        if self.discard == "before":
            self._free_unused(gpa, size, private)
        left = set_memory_attributes(self.vm, gpa, size, private)
        while left.size:
            before, left = left, set_memory_attributes(self.vm, *left, private)
            if left == before:
                raise VmErrno(errno.ENOMEM, "KVM_SET_MEMORY_ATTRIBUTES makes no progress")
        if self.discard == "after":
            self._free_unused(gpa, size, private)

    def map_gpa_range(self, gpa: int, npages: int, private: bool) -> int:
        """KVM_HC_MAP_GPA_RANGE: hypercall.ret, 0 or an errno."""
        self.vm.log.add("exit-map-gpa-range", "private" if private else "shared", gpa // PAGE)
        try:
            self.convert(gpa, npages * PAGE, private)
        except VmErrno as wrong:
            return wrong.errno or 1
        return 0

    def _free_unused(self, gpa: int, size: int, private: bool) -> None:
        if self.vm.in_place:
            return
        for slot, lo, hi in self.vm.slots.pieces(gpa // PAGE, (gpa + size) // PAGE):
            if private:
                self.host.discard(lo * PAGE, (hi - lo) * PAGE)
            elif slot.gmem is not None:
                start = slot.offset + lo - slot.base
                kvm_calls.Punch(self.vm, slot.gmem, start, start + hi - lo).run("shared")

"""KVM_SET_MEMORY_ATTRIBUTES as userspace sees it: its input, checked in KVM's order, and what it leaves undone."""

from __future__ import annotations

import errno
from typing import NamedTuple

from . import kvm_calls
from .events import VmErrno
from .gfn_arrays import PRIVATE
from .memory import PAGE
from .vm_state import VmState

MASK64 = (1 << 64) - 1


class Remainder(NamedTuple):
    """What the ioctl left undone: all of it done is size 0.  (With xa_reserve() it is all or nothing.)"""

    gpa: int
    size: int


def set_memory_attributes(
    vm: VmState, gpa: int | None, size: int, private: bool, *, flags: int = 0, attributes: int | None = None
) -> Remainder:
    """The ioctl, or its guest_memfd form if the design locks that; `attributes` is what userspace says instead."""
    if vm.tdx:
        vm.tdx.check_alive()
    value = attributes if attributes is not None else PRIVATE * private
    start, end = _checked(vm, gpa, size, value, flags)
    in_files = sum(hi - lo for slot, lo, hi in vm.slots.pieces(start, end) if slot.gmem)
    if vm.gmem_attributes and in_files < end - start:
        raise VmErrno(errno.EINVAL, "the range is not all in a guest_memfd")
    at, left = kvm_calls.SetAttributes(vm, start, end, bool(value & PRIVATE)).answer()
    return Remainder(at * PAGE, left * PAGE)


def _checked(vm: VmState, gpa: int | None, size: int, attributes: int, flags: int) -> tuple[int, int]:
    """The input checks of kvm_vm_ioctl_set_mem_attributes(), in their order; the gfns."""
    if gpa is None:
        raise VmErrno(errno.EFAULT, "struct kvm_memory_attributes is not readable")
    if flags:
        raise VmErrno(errno.EINVAL, f"flags {flags:#x}")
    if attributes & ~vm.supported_attributes:
        raise VmErrno(errno.EINVAL, f"attributes {attributes:#x}")
    if not (0 <= gpa <= MASK64 and 0 < size <= MASK64) or (gpa + size) & MASK64 < gpa:
        raise VmErrno(errno.EINVAL, f"size {size:#x} is 0 or wraps")
    if gpa % PAGE or size % PAGE:
        raise VmErrno(errno.EINVAL, f"not page aligned: {gpa:#x}, {size:#x}")
    return gpa // PAGE, (gpa + size) // PAGE

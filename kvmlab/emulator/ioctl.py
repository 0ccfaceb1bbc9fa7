"""KVM_SET_MEMORY_ATTRIBUTES as userspace sees it: its input, checked in KVM's order, and what it leaves undone."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from .events import VmErrno
from .memory import PAGE

if TYPE_CHECKING:
    from .vm import Vm

PRIVATE = 1 << 3  # KVM_MEMORY_ATTRIBUTE_PRIVATE
MASK64 = (1 << 64) - 1


class Remainder(NamedTuple):
    """What the ioctl left undone: all of it done is size 0.  (With xa_reserve() it is all or nothing.)"""

    gpa: int
    size: int


def check_input(vm: Vm, gpa: int | None, size: int, attributes: int, flags: int) -> None:
    """The input checks of kvm_vm_ioctl_set_mem_attributes(), in their order."""
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

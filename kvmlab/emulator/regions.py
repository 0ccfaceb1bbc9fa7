"""KVM_SET_USER_MEMORY_REGION2: its checks in their order, and what creating, moving and deleting a memslot does."""

from __future__ import annotations

import errno

from ..errors import InputError
from . import kvm_calls
from .events import VmErrno
from .guest_memfd import GuestMemfd
from .memory import LIMIT, PAGE
from .mixed_pages import init_mixed
from .slots import GUEST_MEMFD, KVM_USER_MEM_SLOTS, LOG_DIRTY_PAGES, READONLY, File, MemSlot, UserMemory
from .vm_state import VmState

SYNCHRONIZE = "synchronize_srcu"  # the name under which `vm.on_point` is told of a deletion


def set_region(
    vm: VmState,
    number: int,
    gpa: int,
    size: int,
    gmem: object,
    offset: int,
    flags: int | None,
    user: UserMemory | None,
) -> None:
    """Create, move (same size) or delete (size 0) memslot `number` (address space in its upper 16 bits)."""
    flags = (GUEST_MEMFD if gmem is not None else 0) if flags is None else flags
    as_id, number = number >> 16, number & 0xFFFF
    _check(vm, as_id, number, gpa, size, flags)
    if size == 0:
        delete(vm, as_id, number)
        return
    space, pages = vm.address_spaces[as_id], size // PAGE
    old = space.by_id.get(number)
    if old is not None and (flags & GUEST_MEMFD or old.gmem or old.npages != pages):
        raise VmErrno(errno.EINVAL, "a memslot with guest_memfd, or of another size, cannot be changed")
    if flags & GUEST_MEMFD and not isinstance(gmem, GuestMemfd):
        raise VmErrno(errno.EBADF if gmem is None else errno.EINVAL, "not a guest_memfd")
    if any(other.id != number for other, _, _ in space.pieces(gpa // PAGE, (gpa + size) // PAGE)):
        raise VmErrno(errno.EEXIST, f"memslot {number} overlaps another one in guest addresses")
    file = gmem if flags & GUEST_MEMFD and isinstance(gmem, GuestMemfd) else None
    if user is not None and (why := _not_for_it(vm, pages, file, user)):
        raise InputError(f"this `user` memory cannot be that of a memslot of {pages} pages: {why}")
    if file:
        file.may_bind(vm, offset, pages)
    if user is None:
        user = old.user if old else _user_memory(vm, pages, file, offset)
    new = MemSlot(number, gpa // PAGE, pages, user, file, offset // PAGE if file else 0, flags, as_id)
    if file:
        file.bind(new)
    if old is not None:
        delete(vm, as_id, number)
    space.add(new)
    # The same hugepage_has_attrs() as in the ioctl, so what its text says of reserved entries holds here.
    update = [row for row in vm.rows("ioctl", True) if row.call == "kvm_update_lpage_mixed_flag"]
    reserved = any(row.target == "reserved" for row in update)
    if not any(vm.attributes.uniform(new.base, new.end, private, reserved) for private in (False, True)):
        init_mixed(new, vm.attributes, reserved)


def _not_for_it(vm: VmState, pages: int, file: File | None, user: UserMemory) -> str:
    if user.vm is not vm:
        return "it is another Vm's"
    if vm.in_place and file:
        return "the guest_memfd is mapped in its stead"
    return f"it has {user.pages}" if user.pages < pages else ""


def _user_memory(vm: VmState, pages: int, file: File | None, offset: int) -> UserMemory:
    """New anonymous memory; in-place it is the guest_memfd itself, mapped."""
    base = file.base + offset // PAGE if vm.in_place and file else vm.new_pfns(pages)
    return UserMemory(vm, base, pages)


def delete(vm: VmState, as_id: int, number: int) -> None:
    """Take a memslot away: its mappings are zapped, its guest_memfd range is free to be bound again.

    Between KVM_MEMSLOT_INVALID and the zap the deleter waits for readers: `vm.on_point` runs there.  The guest runs
    in address space 0, so the leaves that are modelled are those of that one.
    """
    space = vm.address_spaces[as_id]
    if number in space.by_id:
        space.by_id[number].invalid = True
        vm.at_point(SYNCHRONIZE)
    slot = space.remove(number)
    vm.mmu.root += 1
    if as_id == 0:  # both kinds go with the memslot
        kvm_calls.Zap(vm, "memslot deletion", "delete", slot, slot.base, slot.end).run()
    if slot.gmem:
        slot.gmem.unbind(slot)


def _check(vm: VmState, as_id: int, number: int, gpa: int, size: int, flags: int) -> None:
    known = LOG_DIRTY_PAGES | (0 if flags & GUEST_MEMFD else READONLY) | GUEST_MEMFD
    if flags & ~known or (flags & GUEST_MEMFD and flags & LOG_DIRTY_PAGES):
        raise VmErrno(errno.EINVAL, f"memslot flags {flags:#x}")
    aligned = gpa % PAGE == 0 and size % PAGE == 0 and size >= 0 <= gpa and gpa + size <= 1 << 52
    if not aligned or number >= KVM_USER_MEM_SLOTS or not 0 <= as_id < len(vm.address_spaces):
        raise VmErrno(errno.EINVAL, f"memslot {number} of address space {as_id} at {gpa:#x}, size {size:#x}")
    if gpa + size > LIMIT * PAGE:
        raise VmErrno(errno.ENOMEM, "the emulator holds 4 TiB of guest addresses")

"""The system calls on a guest_memfd: fallocate, mmap, close, and their errno (virt/kvm/guest_memfd.c).

What frees pages is the design's `punch:`; an offset that is allocated again has the same PFN, zeroed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import count
from typing import NoReturn

from . import kvm_calls
from .arguments import BYTES, DATA, FLAG, NUMBER, takes, whole
from .events import SigBus, VmErrno
from .memory import LIMIT, PAGE, pagewise
from .slots import File
from .vm_state import VmState

FLAG_MMAP, FLAG_INIT_SHARED = 1 << 0, 1 << 1
KEEP_SIZE, PUNCH_HOLE = 1, 2  # FALLOC_FL_*
OFFSET = whole(0, (1 << 63) - 1, "an offset into the file, from 0 on")
_inodes = count(1)


class GuestMemfd(File):
    """One guest_memfd.  Offsets and sizes in calls are in bytes."""

    def __init__(self, vm: VmState, size: int, flags: int = 0) -> None:
        if flags & ~(FLAG_MMAP | FLAG_INIT_SHARED):
            raise VmErrno(errno.EINVAL, "KVM_CREATE_GUEST_MEMFD: unknown flags")
        if size <= 0 or size % PAGE:
            raise VmErrno(errno.EINVAL, f"KVM_CREATE_GUEST_MEMFD: size {size}")
        if size // PAGE > LIMIT:
            raise VmErrno(errno.ENOMEM, "the emulator holds 4 TiB of a guest_memfd")
        super().__init__(vm.new_pfns(size // PAGE), size // PAGE)
        self.vm, self.flags, self.inode, self.closed = vm, flags, next(_inodes), False

    @property
    def st_size(self) -> int:
        """fstat(): the size in bytes; st_blksize is 4096."""
        return self.pages * PAGE

    def read(self, *_: object) -> NoReturn:
        """read() and pread() do not exist for this file."""
        raise VmErrno(errno.EINVAL, "read from a guest_memfd")

    def write(self, *_: object) -> NoReturn:
        """write() and pwrite() do not exist for this file."""
        raise VmErrno(errno.EINVAL, "write to a guest_memfd")

    @takes(offset=NUMBER, size=NUMBER)
    def allocate(self, offset: int, size: int) -> None:
        """fallocate(KEEP_SIZE): allocate the pages that are missing, zeroed."""
        self.fallocate(KEEP_SIZE, offset, size)

    @takes(offset=NUMBER, size=NUMBER)
    def punch_hole(self, offset: int, size: int) -> None:
        """fallocate(KEEP_SIZE | PUNCH_HOLE): unmap the pages from every VM, then free them."""
        self.fallocate(KEEP_SIZE | PUNCH_HOLE, offset, size)

    @takes(mode=NUMBER, offset=NUMBER, size=NUMBER)
    def fallocate(self, mode: int, offset: int, size: int) -> None:
        """fallocate() with its checks in order: EOPNOTSUPP for the mode, EINVAL for the range."""
        self.check_open()
        if not mode & KEEP_SIZE or mode & ~(KEEP_SIZE | PUNCH_HOLE):
            raise VmErrno(errno.EOPNOTSUPP, f"fallocate mode {mode:#x}")
        if offset < 0 or size <= 0 or offset % PAGE or size % PAGE:
            raise VmErrno(errno.EINVAL, f"fallocate({offset}, {size})")
        start, end = offset // PAGE, (offset + size) // PAGE
        if mode & PUNCH_HOLE:
            self._punch(start, min(end, self.pages))
        elif end > self.pages:
            raise VmErrno(errno.EINVAL, "fallocate beyond the end of the guest_memfd")
        else:
            self.vm.get_pages(self, start, end - start)

    def check_open(self) -> None:
        """EBADF for a file that is closed."""
        if self.closed:
            raise VmErrno(errno.EBADF, "the guest_memfd is closed")

    def close(self) -> None:
        """close(), the last one (kvm_gmem_release()): all is freed as by a punch; memslots lose their file."""
        if not self.closed:
            self._punch(0, self.pages)
        for _, _, slot in self.bindings:
            slot.gmem = None
        self.bindings, self.closed = [], True

    def _punch(self, start: int, end: int) -> None:
        if start < end:
            kvm_calls.Punch(self.vm, self, start, end).run("shared")

    def may_bind(self, vm: VmState, offset: int, npages: int) -> None:
        """kvm_gmem_bind()'s checks: EINVAL for another VM's file, a wrong offset, its end, or a bound range."""
        self.check_open()
        if vm is not self.vm:
            raise VmErrno(errno.EINVAL, "guest_memfd of another VM")
        if offset < 0 or offset % PAGE:
            why = "negative" if offset < 0 else "not a multiple of 4096"
            raise VmErrno(errno.EINVAL, f"offset {offset:#x} into the guest_memfd is {why}")
        lo, hi = offset // PAGE, offset // PAGE + npages
        if hi > self.pages:
            raise VmErrno(errno.EINVAL, "binding beyond the end of the guest_memfd")
        if any(True for _ in self.slots(lo, hi)):
            code = errno.EEXIST if vm.switches.bound_range_is_eexist else errno.EINVAL
            raise VmErrno(code, "range of the guest_memfd is bound already")

    @takes(shared=FLAG)
    def mmap(self, *, shared: bool = True) -> Mapping:
        """mmap(): ENODEV without the MMAP flag, EINVAL unless MAP_SHARED, EBADF once it is closed."""
        self.check_open()
        if not self.flags & FLAG_MMAP:
            raise VmErrno(errno.ENODEV, "mmap of a guest_memfd without GUEST_MEMFD_FLAG_MMAP")
        if not shared:
            raise VmErrno(errno.EINVAL, "mmap of a guest_memfd has to be MAP_SHARED")
        return Mapping(self, lambda page: bool(self.flags & FLAG_INIT_SHARED))


class Mapping:
    """A mapping of a guest_memfd into the VMM: bytes, or SIGBUS beyond the end and on what is not shared."""

    def __init__(self, gmem: GuestMemfd, may_touch: Callable[[int], bool]) -> None:
        self.gmem, self.may_touch = gmem, may_touch

    def _page(self, offset: int) -> int:
        page = offset // PAGE
        if not 0 <= page < self.gmem.pages or not self.may_touch(page):
            raise SigBus(f"SIGBUS at offset {offset:#x} of the guest_memfd")
        self.gmem.vm.get_pages(self.gmem, page, 1)
        return self.gmem.base + page

    @takes(offset=OFFSET, n=BYTES)
    def read(self, offset: int, n: int) -> bytes:
        """Load `n` bytes."""
        return b"".join(
            self.gmem.vm.memory.read(self._page(at), at % PAGE, step) for at, step in pagewise(offset, n)
        )

    @takes(offset=OFFSET, data=DATA)
    def write(self, offset: int, data: bytes) -> None:
        """Store bytes."""
        vm = self.gmem.vm
        for at, step in pagewise(offset, len(data)):
            part = data[at - offset : at - offset + step]
            vm.user_write(self._page(at), at % PAGE, part, large=vm.huge(False))

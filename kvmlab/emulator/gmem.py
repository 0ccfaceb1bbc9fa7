"""guest_memfd: allocation, punch hole, binding, mmap, and their errno (virt/kvm/guest_memfd.c).

A file keeps the PFN of each offset for life: freeing and allocating again gives the same PFN, zeroed then.  What
frees is the design's `punch:`, in punch.py.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from itertools import count
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from . import kvm_calls
from .arguments import BYTES, DATA, FLAG, NUMBER, takes, whole
from .events import Deadlock, SigBus, VmErrno
from .memory import LIMIT, PAGE, U8, runs

if TYPE_CHECKING:
    from .slots import MemSlot
    from .vm import Vm

FLAG_MMAP, FLAG_INIT_SHARED = 1 << 0, 1 << 1
KEEP_SIZE, PUNCH_HOLE = 1, 2  # FALLOC_FL_*
OFFSET = whole(0, (1 << 63) - 1, "an offset into the file, from 0 on")
_inodes = count(1)


class GuestMemfd:
    """One guest_memfd file of `pages` pages from PFN `base` on.  Offsets and sizes in calls are in bytes.

    `prepared` marks pages that are up to date (zeroed); `present` those that take memory.
    """

    def __init__(self, vm: Vm, size: int, flags: int = 0) -> None:
        if flags & ~(FLAG_MMAP | FLAG_INIT_SHARED):
            raise VmErrno(errno.EINVAL, "KVM_CREATE_GUEST_MEMFD: unknown flags")
        if size <= 0 or size % PAGE:
            raise VmErrno(errno.EINVAL, f"KVM_CREATE_GUEST_MEMFD: size {size}")
        if size // PAGE > LIMIT:
            raise VmErrno(errno.ENOMEM, "the emulator holds 4 TiB of a guest_memfd")
        self.vm, self.pages, self.flags, self.inode = vm, size // PAGE, flags, next(_inodes)
        self.base = vm.new_pfns(self.pages)
        self.present: U8 = np.zeros(self.pages, np.uint8)
        self.pinned: set[int] = set()  # offsets in pages that somebody else holds a reference to
        self.broken: set[int] = set()  # 2M of the file whose folio was split by a partial punch
        self.dying: list[tuple[int, int]] = []  # ranges that a punch took out and has not given back
        self.closed = False
        self.bindings: list[tuple[int, int, MemSlot]] = []

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
            self.get_pages(start, end - start)

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
            kvm_calls.Punch(self, start, end).run("shared")

    def take_out(self, start: int, end: int) -> list[tuple[int, int]]:
        """Truncate: which ranges leave the file; a 2M folio that goes only in part is split for good."""
        gone = runs(self.present, start, end)
        for lo, hi in gone:
            self.present[lo:hi] = 0
            for head in {lo - lo % 512, hi - hi % 512}:
                empty = not self.present[head : head + 512].any()
                (self.broken.discard if empty else self.broken.add)(head)
        self.dying += gone
        return gone

    def get_pages(self, start: int, n: int) -> None:
        """kvm_gmem_get_folio() of `n` pages: allocate and zero those that are missing.

        Deadlock if one was taken out by a punch that has not given it back: here it would be the same page again.
        """
        if self.vm.private_2m:
            start, n = self._whole_folios(start, n)
        new = n - int(np.count_nonzero(self.present[start : start + n]))
        if not new:
            return
        for lo, hi in self.dying:
            if max(lo, start) < min(hi, start + n):
                raise Deadlock(
                    f"kvm_gmem_get_pfn() waits for PFN {self.base + max(lo, start):#x} to be freed"
                )
        self.vm.fail_allocation()
        for lo, hi in [(0, n)] if new == n else runs(self.present[start : start + n] == 0, 0, n):
            self.vm.host.clear_highpage(self.base + start + lo, hi - lo)
        self.present[start : start + n] = 1
        self.vm.log.add("gmem-alloc", page=self.base + start, times=new)

    def _whole_folios(self, start: int, n: int) -> tuple[int, int]:
        """With 2M folios, an allocation in an empty 2M of the file takes all of it."""
        end, head = start + n, start - start % 512
        tail = end + -end % 512
        if not self.present[head:start].any() and not self.broken & {head}:
            start = head
        if tail <= self.pages and not self.present[end:tail].any() and not self.broken & {tail - 512}:
            end = tail
        return start, end - start

    def slots(self, start: int, end: int) -> Iterator[tuple[int, int, int, MemSlot]]:
        """Bindings that overlap pages [start, end): the clipped range, the slot's offset, the slot."""
        for lo, hi, slot in self.bindings:
            if max(lo, start) < min(hi, end):
                yield max(lo, start), min(hi, end), slot.offset, slot

    def may_bind(self, vm: Vm, offset: int, npages: int) -> None:
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

    def bind(self, slot: MemSlot) -> None:
        """kvm_gmem_bind(), once it may be."""
        self.bindings.append((slot.offset, slot.offset + slot.npages, slot))

    def unbind(self, slot: MemSlot) -> None:
        """kvm_gmem_unbind(), when the slot goes."""
        self.bindings = [b for b in self.bindings if b[2] is not slot]

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
        self.gmem.get_pages(page, 1)
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
        for at, step in pagewise(offset, len(data)):
            self.gmem.vm.host.user_write(self._page(at), at % PAGE, data[at - offset : at - offset + step])


def pagewise(start: int, n: int) -> Iterator[tuple[int, int]]:
    """The pieces of [start, start + n) that lie in one page each: where it starts, how long it is."""
    end = start + n
    while start < end:
        step = min(end - start, PAGE - start % PAGE)
        yield start, step
        start += step

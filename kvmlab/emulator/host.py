"""The host: its userspace mapping of guest memory, and the kernel's directmap."""

from __future__ import annotations

import numpy as np

from ..errors import InputError
from . import kvm_calls
from .arguments import ADDRESS, BYTE, BYTES, DATA, FLAG, PAGE_ADDRESS, PAGES, PFN, takes, whole
from .caches import CachedMemory
from .events import KernelBug, SigBus, VmError
from .memory import PAGE, pagewise, runs
from .slots import MemSlot
from .tdx_memory import LINE, TdMemory
from .vm_state import VmState


class Host:
    """What the VMM and the host kernel can do to guest memory.  Reads never fault; they give raw bytes.

    InputError for an address, a PFN or a length that does not exist, VmError for what has no meaning on this Vm.
    """

    def __init__(self, vm: VmState) -> None:
        self.vm = vm

    @takes(gpa=ADDRESS, n=BYTES)
    def read(self, gpa: int, n: int) -> bytes:
        """Load through the userspace mapping of the memslot (the shared backing)."""
        return b"".join(self.vm.memory.read(self._page(at), at % PAGE, step) for at, step in pagewise(gpa, n))

    @takes(gpa=ADDRESS, data=DATA)
    def write(self, gpa: int, data: bytes) -> None:
        """Store through the userspace mapping; RmpFault if it is the guest's page (in-place)."""
        for at, step in pagewise(gpa, len(data)):
            part, large = data[at - gpa : at - gpa + step], self.vm.huge(False)
            self.vm.user_write(self._page(at), at % PAGE, part, large=large)

    @takes(gpa=ADDRESS, n=BYTES, byte=BYTE)
    def fill(self, gpa: int, n: int, byte: int) -> None:
        """memset()."""
        self.write(gpa, bytes([byte]) * n)

    def _slot(self, gfn: int) -> MemSlot:
        slot = self.vm.slots.find(gfn)
        if slot is None:
            raise VmError(f"no memslot at gpa {gfn * PAGE:#x}: the VMM has nothing mapped for it")
        return slot

    def _page(self, gpa: int) -> int:
        slot = self._slot(gpa // PAGE)
        if self.vm.gmem_attributes and slot.gmem:
            self._fault(slot, gpa // PAGE)
        self.vm.touch_backing(slot, gpa // PAGE, 1, self.vm.in_place)
        return self.vm.backing_pfn(slot, gpa // PAGE, False)

    def _fault(self, slot: MemSlot, gfn: int) -> None:
        """kvm_gmem_fault_user_mapping() where the VMM has no PTE: it waits for invalidate_lock, to share it.

        A conversion to private takes the PTEs away and holds that lock alone, so until it is through the access
        waits (Deadlock here, where nobody else goes on); then it is SIGBUS.
        """
        if slot.user.present[gfn - slot.base]:
            return
        self.vm.kernel.wait_for("the VMM's page fault", "invalidate_lock")
        if self.vm.attributes.is_private(gfn):
            raise SigBus(f"SIGBUS: gpa {gfn * PAGE:#x} is private")
        slot.user.present[gfn - slot.base] = 1

    @takes(gpa=PAGE_ADDRESS, size=PAGES)
    def discard(self, gpa: int, size: int) -> None:
        """madvise(MADV_DONTNEED) on the shared backing: the MMU notifier zaps, the pages go, zeros come back."""
        vm, pieces = self.vm, self.vm.slots.pieces(gpa // PAGE, (gpa + size) // PAGE)
        if vm.in_place:
            raise VmError("in-place, the shared backing is the guest_memfd: punch it")
        if sum(hi - lo for _, lo, hi in pieces) * PAGE < size:
            raise VmError(
                f"not all of gpa {gpa:#x}, size {size:#x} is in memslots: the VMM has nothing mapped there"
            )
        for slot, lo, hi in pieces:
            kvm_calls.Zap(vm, "MMU notifier", "notifier", slot, lo, hi).run()
            for a, b in runs(slot.user.present, lo - slot.base, hi - slot.base):
                slot.user.present[a:b] = 0
                vm.memory.zero(slot.user.base + a, b - a)
                vm.log.add("user-free", page=slot.user.base + a, times=b - a)

    @takes(gpa=ADDRESS, pinned=FLAG)
    def pin(self, gpa: int, pinned: bool = True) -> None:
        """Take (or drop) the one reference to a guest_memfd page that somebody else has: a device, GUP."""
        slot = self._slot(gpa // PAGE)
        if slot.gmem is None:
            raise VmError(f"no guest_memfd behind gpa {gpa:#x}: there is no page to hold")
        page = slot.offset + gpa // PAGE - slot.base
        if pinned == (page in slot.gmem.pinned):
            raise VmError(f"the page at gpa {gpa:#x} is {'held already' if pinned else 'not held'}")
        (slot.gmem.pinned.add if pinned else slot.gmem.pinned.remove)(page)

    @takes(pfn=PFN, data=DATA)
    def directmap_write(self, pfn: int, data: bytes = b"host") -> None:
        """A kernel store to the beginning of a page through the directmap; RmpFault or KernelBug (an oops)."""
        _within(pfn, 0, len(data), PAGE, "page")
        self.vm.may_write(pfn)
        self.vm.memory.write(pfn, 0, data)

    @takes(pfn=PFN, data=DATA, offset=whole(0, PAGE - 1, "an offset in the page, from 0 to 4095"))
    def partial_write(self, pfn: int, data: bytes, offset: int = 0) -> None:
        """Less than a line at the memory controller (MOVNTI, an uncached mapping, a device): tdx's erratum.

        VmError on platforms where nothing is special about it; InputError for a line (64 bytes) or more.
        """
        if self.vm.tdx is None:
            raise VmError("partial writes matter on tdx only")
        _within(pfn, offset % LINE, len(data), LINE, "line")
        if len(data) in (0, LINE):
            raise InputError(f"a partial write is 1 to {LINE - 1} bytes, not {len(data)}")
        self.vm.directmap.oops_if_absent(np.array([pfn], np.uint32), "a write")
        self.vm.tdx.memory.partial_write(pfn, offset, data)

    @takes(pfn=PFN, n=BYTES)
    def directmap_read(self, pfn: int, n: int = PAGE) -> bytes:
        """A kernel load from the beginning of a page through the directmap: raw bytes, no RMP check."""
        _within(pfn, 0, n, PAGE, "page")
        if self.vm.directmap.absent[pfn]:
            raise KernelBug(f"oops: PFN {pfn:#x} is not present in the directmap")
        return self.vm.memory.read(pfn, 0, n)

    @takes(pfn=PFN, private=FLAG)
    def evict(self, pfn: int, private: bool) -> int:
        """Let the cache write back its dirty lines of a PFN with (or without) the C-bit, as it may at any time.

        How many there were; VmError unless the Vm has `caches=True`.
        """
        memory, key = self.vm.memory, self.vm.key
        if isinstance(memory, TdMemory) and memory.caches:
            return memory.evict(pfn, memory.hkid if private else 0)
        if not isinstance(memory, CachedMemory):
            raise VmError("this Vm keeps its caches coherent: Vm(..., caches=True)")
        return memory.evict(pfn, key if private and self.vm.encrypts else 0)


def _within(pfn: int, offset: int, n: int, size: int, what: str) -> None:
    """InputError if bytes do not lie in one page or one line."""
    if offset + n > size:
        raise InputError(
            f"{n} bytes from offset {offset} do not fit into a {what} of PFN {pfn:#x}: it has {size}"
        )

"""What all parts of one VM share: its design, its memslots, what they are backed by, and KVM's state."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import cached_property

import numpy as np

from ..design import Design, Row
from ..design.rows import adds_ranges
from .events import Deadlock, VmErrno
from .gfn_arrays import PRIVATE, Attributes, Mmu, PageTable
from .host_pages import HostPages
from .kvm_state import Held, Kernel, Step
from .memory import runs
from .slots import File, MemSlot, MemSlots
from .switches import VmSwitches
from .tdx_kvm import TdxKvm

GUEST_KEY = 0x5EED  # of the stand-in cipher; 0 is "in clear"


class VmState(HostPages):
    """One VM without its face: the state that KVM, the VMM and the guest work on; `tdx` on that platform only."""

    def __init__(
        self, platform: str, design: Design, backing: str, switches: VmSwitches, *, private: bool, shared_2m: bool,
        private_2m: bool, vcpus: int, tlb_entries: int, keep_events: int, caches: bool, zap_batch: int,
        stops: frozenset[Step],
    ) -> None:  # fmt: skip
        super().__init__(platform, switches, keep_events, caches)
        self.design, self.backing, self.in_place = design, backing, backing == "in-place"
        self.stops = stops  # steps of the design's programs at which a call has more to do
        self.shared_2m, self.private_2m, self.zap_batch = shared_2m, private_2m, zap_batch
        self.supported_attributes, self.hypercall_exits, self.key = PRIVATE, True, GUEST_KEY
        self.mmio: int | None = None  # what a read without a memslot gives; None raises MmioExit
        self.pending: Callable[[], bool] | None = None
        self.attributes, self.page_table = Attributes(), PageTable(private)
        self.mmu = Mmu(self.log, vcpus, tlb_entries, design.version)
        self._spaces = (MemSlots(), MemSlots())
        self.tdx: TdxKvm | None = None
        if platform == "tdx":
            self.tdx = TdxKvm(self, vcpus, tlb_entries, caches)
            self.memory, self.mmu.everybody_out = self.tdx.memory, self.tdx.everybody_out
            self.by_pfn += [self.tdx.memory.grow, self.tdx.module.grow]
        self._rows: dict[tuple[str, bool], tuple[Row, ...]] = {}

    # The design.

    def rows(self, section: str, private: bool) -> tuple[Row, ...]:
        """The design's rows for one direction on this platform."""
        key = (section, private)
        if key not in self._rows:
            self._rows[key] = self.design.rows(section, "private" if private else "shared", self.platform)
        return self._rows[key]

    @cached_property
    def merged(self) -> bool:
        """Whether the ioctl is the walk of v6.8 over memslots (it says range_add), or of the v8 era."""
        return adds_ranges(self.rows("ioctl", True) + self.rows("ioctl", False))

    @cached_property
    def prepares(self) -> bool:
        """Whether a private fault assigns an unassigned page (sev_gmem_prepare(), or rmp_match())."""
        return any(row.call in ("rmp_prepare", "rmp_match") for row in self.rows("fault", True))

    @cached_property
    def gmem_attributes(self) -> bool:
        """Whether the attributes live with the guest_memfd (the design's ioctl locks it)."""
        return any(row.lock == "invalidate_lock" for row in self.rows("ioctl", True)) and self.in_place

    @cached_property
    def kernel(self) -> Kernel:
        """KVM as the range engine runs it."""
        return Kernel(self.design, self.platform, self.backing, self.switches, self.stops)

    @property
    def threads(self) -> list[Held]:
        """Who holds locks now."""
        return self.kernel.threads()

    # Memslots and what is behind them.

    @property
    def address_spaces(self) -> tuple[MemSlots, ...]:
        """kvm_arch_nr_memslot_as_ids(): a VM with private memory has one; else x86 has a second one for SMM."""
        return self._spaces[: 1 if self.supported_attributes & PRIVATE else 2]

    @property
    def slots(self) -> MemSlots:
        """The memslots of address space 0, in which the guest runs (SMM is left out)."""
        return self._spaces[0]

    def pieces(self, start: int, end: int) -> list[tuple[MemSlot, int, int]]:
        """The walk over each address space and each memslot that overlaps gfns [start, end), clipped to it."""
        return [piece for space in self.address_spaces for piece in space.pieces(start, end)]

    def huge(self, private: bool) -> bool:
        """Whether that backing comes in 2M pages at all."""
        return self.private_2m if private or self.in_place else self.shared_2m

    def _file(self, slot: MemSlot, private: bool) -> File | None:
        """The guest_memfd that one backing is: of the two when split, the only one in-place."""
        return slot.gmem if private or self.in_place else None

    def backing_pfn(self, slot: MemSlot, gfn: int, private: bool) -> int:
        """The PFN behind a gfn."""
        return slot.private_pfn(gfn) if self._file(slot, private) else slot.shared_pfn(gfn)

    def has_pages(self, slot: MemSlot, gfn: int, n: int, private: bool) -> bool:
        """Whether one backing is all there."""
        file, at = self._file(slot, private), gfn - slot.base
        present = file.present[slot.offset + at :] if file else slot.user.present[at:]
        return bool(present[:n].all())

    def touch_backing(self, slot: MemSlot, gfn: int, n: int, private: bool) -> None:
        """Allocate (zeroed) what is missing of one backing."""
        file, at = self._file(slot, private), gfn - slot.base
        if file:
            self.get_pages(file, slot.offset + at, n)
            return
        view = slot.user.present[at : at + n]
        if new := n - int(np.count_nonzero(view)):
            view[:] = 1
            self.log.add("user-alloc", page=slot.user.base + at, times=new)

    def get_pages(self, file: File, start: int, n: int) -> None:
        """kvm_gmem_get_folio() of `n` pages of a guest_memfd: allocate and zero those that are missing.

        Deadlock if one was taken out by a punch that has not given it back: here it would be the same page again.
        """
        if self.private_2m:
            start, n = file.whole_folios(start, n)
        new = n - int(np.count_nonzero(file.present[start : start + n]))
        if not new:
            return
        for lo, hi in file.dying:
            if max(lo, start) < min(hi, start + n):
                raise Deadlock(
                    f"kvm_gmem_get_pfn() waits for PFN {file.base + max(lo, start):#x} to be freed"
                )
        if self.take_failure("gmem_alloc") is not None:
            raise VmErrno(errno.ENOMEM, "kvm_gmem_get_folio()")
        for lo, hi in [(0, n)] if new == n else runs(file.present[start : start + n] == 0, 0, n):
            self.clear_highpage(file.base + start + lo, hi - lo)
        file.present[start : start + n] = 1
        self.log.add("gmem-alloc", page=file.base + start, times=new)

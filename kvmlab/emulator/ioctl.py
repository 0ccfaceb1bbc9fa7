"""KVM_SET_MEMORY_ATTRIBUTES: input checks, then the rows of the design's `ioctl:` section on a whole range.

A store that no xa_reserve() came before may stop early; then the rest is handed back.  What else the text of a design
does not say follows from its form.  With `range_add` it is the walk of v6.8: mmu_lock is taken only if a memslot
overlaps.  Without, it is the v8 era: the window covers the request, and a platform op that fails only logs.  With
invalidate_lock it is the ioctl of a guest_memfd.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from ..design import Row
from ..design.calls import DIRECTMAP
from ..hw.snp import PG_2M, PG_4K, Rmpupdate
from ..hw.snp.pages import PAGES_2M
from ..kvm.memslots import visits
from .events import PlatformError, VmErrno
from .lpage import hull, update_mixed
from .memory import PAGE, U8, runs
from .sev import Shared, of_one_op
from .slots import MemSlot

if TYPE_CHECKING:
    from .vm import Vm

PRIVATE = 1 << 3  # KVM_MEMORY_ATTRIBUTE_PRIVATE
MASK64 = (1 << 64) - 1
MMU_ROWS = frozenset(
    {"kvm_mmu_invalidate_begin", "kvm_mmu_invalidate_range_add", "kvm_mmu_invalidate_end",
     "kvm_unmap_gfn_range", "kvm_flush_remote_tlbs", "kvm_update_lpage_mixed_flag"}
)  # fmt: skip
RMP_ROWS = frozenset({"rmpupdate", "adjust_direct_map", "kvm_unmap_directmap", "kvm_map_directmap"})


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


class _Unmapped(NamedTuple):
    """What a row took out of the directmap: from which PFN on, and what was absent before."""

    row: Row
    pfn: int
    was: U8


class SetAttributes:
    """One run of the ioctl over gfns [start, end) towards private or shared."""

    def __init__(self, vm: Vm, start: int, end: int, private: bool) -> None:
        self.vm, self.start, self.end, self.private = vm, start, end, private
        self.thread = vm.new_thread("ioctl")
        self.pieces = vm.pieces(start, end)
        self.stored = end  # the store went up to here
        self.did_store = self.did_reserve = self.flush = self.asked = False
        self.failed: dict[MemSlot, int] = {}  # the first gfn at which the platform op failed
        self.unmapped: _Unmapped | None = None
        self.shared: Shared | None = None

    def run(self) -> Remainder:
        """Execute the rows; the return value is userspace's."""
        vm, rows = self.vm, self.vm.rows("ioctl", self.private)
        vm.log.add("set-attributes", "private" if self.private else "shared", self.start)
        if not any(row.call == "xa_reserve" for row in rows):
            vm.attributes.reserve(self.end, self.end)  # nothing; but the host has so much memory only
        try:
            for row in rows:
                vm.reached(row)
                if self._row(row) == "return":
                    self.thread.unwind()
                    return Remainder(self.end * PAGE, 0)
        except BaseException:
            self.thread.unwind()
            raise
        self.thread.leave("returns to user")
        return Remainder(self.stored * PAGE, (self.end - self.stored) * PAGE)

    def _nobody_holds(self) -> None:
        """In-place, to private, before anything is done: no PTEs of the VMM, EAGAIN if somebody else holds a page."""
        if self.asked or not (self.vm.merged and self.vm.in_place and self.private):
            return
        self.asked = True
        for slot, lo, hi in self.pieces:
            if self.vm.gmem_attributes:
                slot.user.present[lo - slot.base : hi - slot.base] = 0
            held = slot.gmem.pinned if slot.gmem else set()
            for page in sorted(held):
                if lo <= (gfn := page - slot.offset + slot.base) < hi:
                    raise VmErrno(
                        errno.EAGAIN, f"page at offset {page * PAGE:#x} (gpa {gfn * PAGE:#x}) is held"
                    )

    def _row(self, row: Row) -> str | None:
        nowhere = self.vm.merged and not self.pieces  # no memslot, no mmu_lock, no invalidation
        if row.lock:
            if row.lock == "mmu_lock":
                self._nobody_holds()
            if row.lock != "mmu_lock" or not nowhere:
                self.thread.row(row)
            return None
        if row.under_flush and not self.flush:
            return None
        if row.call == "kvm_range_has_memory_attributes":
            done = self.vm.attributes.uniform(self.start, self.end, self.private, row.target == "reserved")
            return "return" if done else None
        if row.call == "xa_reserve":
            self._reserve()
            return None
        self._nobody_holds()
        if row.call == "kvm_vm_set_region_attr":
            self._store()
        elif not nowhere:
            self._on_memslots(row)
        return None

    def _on_memslots(self, row: Row) -> None:
        if row.call in MMU_ROWS:
            self._mmu(row)
        elif row.call == "kvm_gmem_get_pfn":
            self.thread.might_sleep("kvm_gmem_get_pfn() may allocate")
            for slot, lo, hi in self._visited(row):
                if slot.gmem is not None:
                    self.vm.touch_backing(slot, lo, hi - lo, True)
        elif row.call in RMP_ROWS and (self.vm.has_rmp or (self.vm.tdx and row.call in DIRECTMAP)):
            for slot, lo, hi in self._visited(row):
                self._platform(row, slot, lo, hi)

    def _reserve(self) -> None:
        """xa_reserve() of each gfn: ENOMEM at the first that fails; what was reserved stays so, and empty."""
        self.thread.might_sleep("xa_reserve() may allocate")
        self.vm.attributes.reserve(self.start, self.end, self.vm.take_failure("xa_reserve"))
        self.did_reserve = True

    def _store(self) -> None:
        """xa_store() of each gfn, up to the first that fails; none does once they are reserved."""
        at = self.vm.take_failure("xa_store")
        if at is not None and self.start <= self.start + at < self.end:
            if self.did_reserve:
                raise PlatformError("KVM_BUG_ON: xa_store() failed after its reservation")
            self.stored = self.start + at
        if self.stored > self.start:
            self.vm.attributes.store(self.start, self.stored, self.private)
        self.did_store = True

    def _visited(self, row: Row) -> list[tuple[MemSlot, int, int]]:
        """The clipped ranges that the row works on, cut to what was stored: nothing is done for the rest."""
        end = self.stored if self.did_store else self.end
        return [
            (slot, lo, min(hi, end))
            for slot, lo, hi in self.pieces
            if lo < end and visits(row.walk, slot.as_id, lo, self.start)
        ]

    def _mmu(self, row: Row) -> None:
        vm, mmu = self.vm, self.vm.mmu
        if row.call != "kvm_flush_remote_tlbs":
            self.thread.assert_mmu_lock(f"{row.call}()")
        if row.call == "kvm_mmu_invalidate_begin":
            mmu.begin(None if vm.merged else (self.start, self.end))
        elif row.call == "kvm_mmu_invalidate_range_add":
            for slot, lo, hi in self.pieces:
                mmu.range_add(*hull(slot, lo, hi, row.target))
        elif row.call == "kvm_mmu_invalidate_end":
            mmu.end()
        elif row.call == "kvm_unmap_gfn_range":
            for _, lo, hi in self._visited(row):
                self.flush |= vm.zap(self.thread, lo, hi, shared=self.private, private=not self.private)
        elif row.call == "kvm_flush_remote_tlbs":
            mmu.flush()
            self.flush = False
        else:
            for slot, lo, hi in self._visited(row):
                update_mixed(slot, lo, hi, self.private, vm.attributes, row.target == "reserved")

    def _platform(self, row: Row, slot: MemSlot, lo: int, hi: int) -> None:
        """Directmap and RMP calls on the private PFNs of one clipped range; a failure ends it there."""
        sev = self.vm.sev
        hi = min(hi, self.failed.get(slot, hi))
        if slot.gmem is None or lo >= hi:
            return
        if not self.vm.gmem_attributes:  # who works on PFNs has to look them up, which allocates
            self.vm.touch_backing(slot, lo, hi - lo, True)
        pfn, n = slot.private_pfn(lo), hi - lo
        if row.call == "adjust_direct_map":
            sev.adjust_direct_map(self.thread, pfn, n)
        elif row.call == "kvm_unmap_directmap":
            self.unmapped = _Unmapped(row, pfn, self.vm.directmap.absent[pfn : pfn + n].copy())
            sev.unmap_directmap(self.thread, pfn, n)
        elif row.call == "kvm_map_directmap":
            for start, end in [(pfn, pfn + n)] if self.shared is None else self.shared.or_all(row, pfn, pfn + n):
                sev.map_directmap(self.thread, start, end - start)
        else:
            self._rmpupdate(row, slot, lo, hi)

    def _rmpupdate(self, row: Row, slot: MemSlot, lo: int, hi: int) -> None:
        """RMPUPDATE of one clipped range.

        To private by 2M where a folio lies in the range whole; to shared by 4K, v8-era (sev_update_mem_attr(), RFC
        v8 48/56).  What is not assigned is let be (snp_make_page_shared(), sev_gmem_invalidate()).
        """
        sev, pfn = self.vm.sev, slot.private_pfn(lo)
        private = (row.target == "private") if row.target else self.private
        if private:
            todo = self._by_folio(slot, lo, hi)
        else:
            owned = runs(self.vm.rmp.assigned(pfn, hi - lo), 0, hi - lo)
            todo = [(pfn + start, pfn + end, PG_4K) for start, end in owned]
            self.shared = Shared(row)
        for start, end, size in todo:
            gfn, n = lo + start - pfn, end - start
            done, code = (
                sev.make_private(start, n, gfn, size)
                if private
                else sev.make_shared(start, n, gfn, large=self.vm.merged)
            )
            if not private and self.shared:
                self.shared.pages.append((start, start + done))
            if code != Rmpupdate.OK:
                self._op_failed(row, slot, gfn + done, code, PAGES_2M if size == PG_2M else 1)
                return

    def _by_folio(self, slot: MemSlot, lo: int, hi: int) -> list[tuple[int, int, str]]:
        """PFN ranges with the size of their RMPUPDATEs; the series' op takes the order of a folio."""
        pfn = slot.private_pfn(lo) - lo
        if self.vm.merged or not self.vm.private_2m:
            return [(pfn + lo, pfn + hi, PG_4K)]
        heads = range(lo + -lo % PAGES_2M, hi - PAGES_2M + 1, PAGES_2M)
        whole = [head for head in heads if (pfn + head) % PAGES_2M == 0 and self.vm.whole_folio(slot, head)]
        found, at = list[tuple[int, int, str]](), lo
        for head in whole:
            if found and found[-1][1] == pfn + head:
                found[-1] = (found[-1][0], pfn + head + PAGES_2M, PG_2M)
            else:
                found += [(pfn + at, pfn + head, PG_4K)] * (at < head)
                found.append((pfn + head, pfn + head + PAGES_2M, PG_2M))
            at = head + PAGES_2M
        return found + [(pfn + at, pfn + hi, PG_4K)] * (at < hi)

    def _op_failed(self, row: Row, slot: MemSlot, gfn: int, code: Rmpupdate, pages: int) -> None:
        """v8: a rate-limited warning, and the ioctl succeeds; in-place has no way back: KVM_BUG_ON.

        The op does all its work on one folio (of `pages` pages) and then on the next, so it had not begun those
        behind the one that fails.
        """
        if self.vm.merged:
            raise PlatformError(f"RMPUPDATE at gfn {gfn:#x} = {code.name}", int(code))
        self.failed[slot] = gfn
        if (unmapped := self.unmapped) and of_one_op(row, unmapped.row):
            rest = slot.private_pfn(gfn) + pages
            self.vm.directmap.absent[rest : unmapped.pfn + len(unmapped.was)] = unmapped.was[rest - unmapped.pfn :]
        self.vm.log.add("warn", f"update_mem_attr failed: {code.name}", gfn, code=int(code))

"""PUNCH_HOLE on a guest_memfd: the rows of the design's `punch:` section, each on the whole range.

The rows about mappings work on the gfns at which memslots are bound to the range, those about the RMP and the
directmap on its pages: in the file still, or taken out by truncate_inode_pages_range().
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..design import Row
from ..design.calls import DIRECTMAP, INCLUSIVE
from ..design.rows import adds_ranges
from ..hw.snp import Rmpupdate
from ..hw.snp.pages import PAGES_2M
from .memory import runs, without
from .sev import Shared, of_one_op

if TYPE_CHECKING:
    from .gmem import GuestMemfd
    from .slots import MemSlot

RMP = ("psmash", "adjust_direct_map", "rmpupdate")


class Punch:
    """One run over pages [start, end) of a file, which is also what closing it does."""

    def __init__(self, file: GuestMemfd, start: int, end: int) -> None:
        self.file, self.vm, self.start, self.end = file, file.vm, start, end
        self.thread = self.vm.new_thread("punch hole")
        self.bound: list[tuple[MemSlot, int, int]] = [
            (slot, lo - at + slot.base, hi - at + slot.base) for lo, hi, at, slot in file.slots(start, end)
        ]
        self.taken: list[tuple[int, int]] = []
        self.shared: Shared | None = None
        self.flush = False

    def run(self) -> None:
        """Execute the rows."""
        if self.start >= self.end:
            return
        try:
            for row in self.vm.rows("punch", False):
                self.vm.reached(row)
                self._row(row)
        except BaseException:
            self.thread.unwind()
            raise
        self.thread.leave("returns to user")

    def _row(self, row: Row) -> None:
        if row.under_flush and not self.flush:
            return
        if row.lock:
            if self.bound or row.lock != "mmu_lock":  # no memslot, no kvm whose lock it could be
                self.thread.row(row)
        elif row.call == "truncate_inode_pages_range":
            self.thread.might_sleep("truncate_inode_pages_range()")
            self.taken += self.file.take_out(self.start, self.end)
            for slot, lo, hi in self.bound if self.vm.gmem_attributes else ():  # with its PTEs in the VMM
                slot.user.present[lo - slot.base : hi - slot.base] = 0
        elif row.call == "folio_put":
            self._give_back()
        elif row.call in DIRECTMAP:
            if self.vm.has_rmp or self.vm.tdx:
                self._directmap(row)
        elif row.call in RMP:
            if self.vm.has_rmp:
                self._rmp(row)
        elif self.bound:
            self._mmu(row)

    def _mmu(self, row: Row) -> None:
        """The invalidation; without range_add it covers the request from its first gfn to its last."""
        vm, mmu = self.vm, self.vm.mmu
        if row.call == "kvm_flush_remote_tlbs":
            mmu.flush()
            self.flush = False
            return
        self.thread.assert_mmu_lock(f"{row.call}()")
        if row.call == "kvm_mmu_invalidate_begin":
            whole = min(lo for _, lo, _ in self.bound), max(hi for *_, hi in self.bound)
            mmu.begin(None if adds_ranges(vm.rows("punch", False)) else whole)
        elif row.call == "kvm_mmu_invalidate_range_add":
            for _, lo, hi in self.bound:
                mmu.range_add(lo, hi)
        elif row.call == "kvm_mmu_invalidate_end":
            mmu.end()
        else:
            for _, lo, hi in self.bound:
                self.flush |= vm.zap(self.thread, lo, hi, shared=vm.in_place, private=True)

    def _pages(self, row: Row) -> list[tuple[int, int]]:
        """The PFNs at stake: what was taken out, and what is in the file."""
        end = min(self.end + (row.walk == INCLUSIVE), self.file.pages)
        ranges = sorted(self.taken + runs(self.file.present, self.start, end))
        return [(self.file.base + lo, self.file.base + hi) for lo, hi in ranges]

    def _assigned(self, row: Row) -> list[tuple[int, int]]:
        """Those that are the guest's: sev_gmem_invalidate() asks page by page and skips the others."""
        return [
            (pfn + lo, pfn + hi)
            for pfn, end in self._pages(row)
            for lo, hi in runs(self.vm.rmp.assigned(pfn, end - pfn), 0, end - pfn)
        ]

    def _directmap(self, row: Row) -> None:
        """On each page, but for those that could not be made shared: nobody will use them."""
        sev, pages = self.vm.sev, self._pages(row)
        work = sev.unmap_directmap if row.call == "kvm_unmap_directmap" else sev.map_directmap
        if row.call == "kvm_map_directmap" and self.shared and of_one_op(row, self.shared.row):
            pages = self.shared.pages
        for lo, hi in pages:
            for at, end in without(lo, hi, self.vm.leaked):
                work(self.thread, at, end - at)

    def _rmp(self, row: Row) -> None:
        sev = self.vm.sev
        if row.call == "rmpupdate" and row.target == "private":
            for slot, lo, hi in self.bound:
                sev.make_private(slot.private_pfn(lo), hi - lo, lo)
            return
        assigned = self._assigned(row)
        if row.call == "rmpupdate":
            self.shared = Shared(row, assigned)
        for lo, hi in assigned:
            if row.call == "psmash":
                for head in sorted({lo - lo % PAGES_2M, hi - 1 - (hi - 1) % PAGES_2M}):
                    if sev.rmp.big(head)[0] and not lo <= head <= hi - PAGES_2M:
                        sev.psmash(head)
            elif row.call == "rmpupdate":
                self._make_shared(lo, hi)
            else:
                for at, end in sev.by_size(lo, hi - lo):
                    if not self._is_2m(at, end):  # for a 2M RMPUPDATE a 2M mapping is good enough
                        sev.adjust_direct_map(self.thread, at, end - at)

    def _is_2m(self, pfn: int, end: int) -> bool:
        """Whether a 2M entry begins at a PFN and ends no later than `end`."""
        return bool(self.vm.rmp.big(pfn)[0]) and pfn % PAGES_2M == 0 and pfn + PAGES_2M <= end

    def _make_shared(self, pfn: int, end: int) -> None:
        """rmp_make_shared() and CLFLUSH; what fails is leaked (snp_leak_pages())."""
        vm, at = self.vm, pfn
        while at < end:
            gfn, n = self._where(at, end)
            done, code = vm.sev.make_shared(at, n, gfn, splits=False)
            at += done
            if code != Rmpupdate.OK:
                vm.log.add("warn", f"rmp_make_shared() = {code.name}: page leaked", at)
                step = PAGES_2M if self._is_2m(at, end) else 1
                vm.leaked.update(range(at, at + step))
                at += step
        if vm.switches.free_flushes_caches:
            vm.log.add("clflush", page=pfn, times=end - pfn)
            vm.memory.flush(pfn, end - pfn)

    def _where(self, pfn: int, end: int) -> tuple[int | None, int]:
        """The gfn at which a PFN is bound, if it is, and for how many pages up to `end` that goes on."""
        for slot, lo, hi in self.bound:
            base = slot.private_pfn(lo)
            if base <= pfn < base + hi - lo:
                return lo + pfn - base, min(end, base + hi - lo) - pfn
            if base > pfn:
                end = min(end, base)
        return None, end - pfn

    def _give_back(self) -> None:
        """The last reference goes; the next user clears the page."""
        for lo, hi in self.taken:
            if (lo, hi) in self.file.dying:
                self.file.dying.remove((lo, hi))
                self.vm.log.add("gmem-free", page=self.file.base + lo, times=hi - lo)

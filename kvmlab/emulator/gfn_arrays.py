"""What one VM has by gfn, as arrays: attributes, NPT leaves, the guest's C-bits; TLBs and the invalidation window.

A leaf is (pfn + 1) << 1 | large, and 0 for none; a 2M leaf stands on all its 512 gfns.  A TLB is a small
dictionary with FIFO replacement: `entries` is a model's number, not a processor's.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..hw.memory import Gfn
from ..kvm.attributes import hull, must_retry
from .events import Log, VmErrno
from .memory import LIMIT, U8, U32, grown

PRIVATE = 1 << 3  # KVM_MEMORY_ATTRIBUTE_PRIVATE


class Attributes:
    """The xarray of memory attributes: one byte a gfn, 1 for private; no entry reads as shared."""

    def __init__(self) -> None:
        self.private: U8 = np.zeros(0, np.uint8)
        self.reserved: U8 = np.zeros(0, np.uint8)  # what a failed reservation left: XA_ZERO_ENTRY

    def get(self, lo: int, hi: int) -> U8:
        """The attributes of gfns [lo, hi)."""
        if hi > len(self.private):
            self.private = grown(self.private, min(hi, LIMIT))
        return self.private[lo:hi]

    def is_private(self, gfn: int) -> bool:
        """kvm_mem_is_private()."""
        return gfn < len(self.private) and bool(self.private[gfn])

    def uniform(self, lo: int, hi: int, private: bool, reserved: bool = False) -> bool:
        """kvm_range_has_memory_attributes(): whether all of [lo, hi) are so.

        `reserved`: an entry that is reserved and empty is taken for one with attributes (fixed by 277d3623d99a).
        """
        stored = self.private[lo : min(hi, len(self.private))]
        if private:
            return hi <= len(self.private) and bool(stored.all())
        # A single gfn is looked up by xa_load(), which never returned a reserved entry.
        misread = reserved and hi - lo > 1 and bool(self.reserved[lo:hi].any())
        return not misread and not stored.any()

    def uniform_by(
        self, lo: int, hi: int, size: int, private: bool, reserved: bool = False
    ) -> NDArray[np.bool_]:
        """`uniform` of each `size` gfns of [lo, hi)."""
        stored = self.get(lo, hi).reshape(-1, size)
        misread = np.zeros_like(stored)
        if reserved and not private and size > 1:
            self.reserved = grown(self.reserved, hi)
            misread = self.reserved[lo:hi].reshape(-1, size)
        found: NDArray[np.bool_] = np.all((stored == private) & (misread == 0), axis=1)
        return found

    def reserve(self, lo: int, hi: int, fails_at: int | None = None) -> None:
        """xa_reserve() of each gfn: ENOMEM beyond what the host has memory for, or `fails_at` entries on.

        What was reserved before a failure stays: entries that are there, and empty.
        """
        fails = fails_at is not None and fails_at < hi - lo
        if fails and fails_at and hi <= LIMIT:
            self.reserved = grown(self.reserved, lo + fails_at)
            self.reserved[lo : lo + fails_at] = self.get(lo, lo + fails_at) == 0
        if hi > LIMIT or fails:
            raise VmErrno(errno.ENOMEM, "xarray reservation failed")

    def store(self, lo: int, hi: int, private: bool) -> None:
        """xa_store() of each gfn."""
        self.get(lo, hi)[:] = private
        self.reserved[lo:hi] = 0


class PageTable:
    """The guest's own page table, as far as it matters: a C-bit a gfn, at first all `private`."""

    def __init__(self, private: bool) -> None:
        self.private, self._others = private, np.zeros(0, np.uint8)  # where it is no longer so

    def c_bits(self, lo: int, hi: int) -> U8:
        """The C-bits of gfns [lo, hi)."""
        self._others = grown(self._others, hi)
        return self._others[lo:hi] ^ np.uint8(self.private)

    def set(self, lo: int, hi: int, private: bool) -> None:
        """Set or clear the C-bits of gfns [lo, hi)."""
        self._others = grown(self._others, hi)
        self._others[lo:hi] = private != self.private


class Tlb:
    """One vCPU's nested translations: gfn (or the first gfn of a 2M region, negated) to leaf."""

    def __init__(self, entries: int) -> None:
        self.entries, self.leaves = entries, dict[int, int]()

    def overlay(self, lo: int, leaves: U32) -> None:
        """Put what the TLB holds over the leaves of the NPT from gfn `lo` on."""
        hi = lo + len(leaves)
        for key, leaf in self.leaves.items():
            if key >= 0:
                if lo <= key < hi:
                    leaves[key - lo] = leaf
            elif (start := max(lo, ~key)) < (end := min(hi, ~key + 512)):
                at = np.arange(start - ~key, end - ~key, dtype=np.uint32)
                leaves[start - lo : end - lo] = np.uint32(leaf) + (at << np.uint32(1))

    def fill(self, lo: int, leaves: U32) -> None:
        """Remember the newest of these translations."""
        first = max(0, len(leaves) - self.entries)
        newest = zip(range(lo + first, lo + len(leaves)), leaves[first:].tolist(), strict=True)
        self.leaves.update(
            (~(gfn & ~511), leaf - (gfn % 512 << 1)) if leaf & 1 else (gfn, leaf) for gfn, leaf in newest
        )
        while len(self.leaves) > self.entries:
            del self.leaves[next(iter(self.leaves))]

    def drop(self, lo: int, hi: int) -> None:
        """Forget every translation that overlaps [lo, hi)."""
        small = [g for g in self.leaves if g >= 0 and lo <= g < hi]
        for key in (*small, *(k for k in self.leaves if k < 0 and ~k < hi and lo < ~k + 512)):
            del self.leaves[key]


class Mmu:
    """NPT, TLBs and the invalidation counters; `window` is the shared hull of what is being invalidated."""

    def __init__(self, log: Log, vcpus: int, tlb_entries: int, linux: tuple[int, int]) -> None:
        self.log, self.linux = log, linux
        self.npt: U32 = np.zeros(0, np.uint32)
        self.tlbs = [Tlb(tlb_entries) for _ in range(vcpus)]
        self.seq = self.in_progress = 0
        self.root = 0  # kvm_mmu_zap_all_fast() makes it obsolete when a memslot goes
        self.window: tuple[int, int] | None = None
        self.everybody_out: Callable[[], None] | None = None  # what a flush does to vCPUs, where that matters

    def leaves(self, lo: int, hi: int) -> U32:
        """The NPT leaves of gfns [lo, hi), as a view."""
        if hi > len(self.npt):
            self.npt = grown(self.npt, hi)
        return self.npt[lo:hi]

    def walk(self, vcpu: int, lo: int, hi: int) -> U32:
        """What one vCPU translates [lo, hi) to: its TLB first, else the NPT."""
        found = self.leaves(lo, hi).copy()
        self.tlbs[vcpu].overlay(lo, found)
        return found

    def begin(self, covered: tuple[int, int] | None) -> None:
        """kvm_mmu_invalidate_begin(); v8-era with the whole request as `covered`."""
        if self.in_progress == 0:
            self.window = None
        self.in_progress += 1
        if covered:
            self.range_add(*covered)

    def range_add(self, lo: int, hi: int) -> None:
        """kvm_mmu_invalidate_range_add(): one hull for all invalidations in progress."""
        self.window = hull(self.window, (lo, hi))

    def retry(self, gfn: int, snapshot: int | None) -> bool:
        """mmu_invalidate_retry_gfn()."""
        return must_retry(
            self.window if self.in_progress else None, Gfn(gfn), snapshot not in (None, self.seq)
        )

    def flush(self) -> None:
        """kvm_flush_remote_tlbs(): one IPI a vCPU, counted as if every vCPU were in the guest."""
        self.log.add("flush")
        self.log.counters["ipi"] += len(self.tlbs)
        if self.everybody_out:
            self.everybody_out()
        for tlb in self.tlbs:
            tlb.leaves.clear()

    def drop_pages(self, lo: int, hi: int) -> None:
        """Drop the TLB entries of [lo, hi) everywhere: what the thread says RMPUPDATE does by itself."""
        for tlb in self.tlbs:
            if tlb.leaves:
                tlb.drop(lo, hi)

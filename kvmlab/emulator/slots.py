"""Memslots, and the two memories behind them as data: the VMM's own, and the pages of a guest_memfd.

From virt/kvm/kvm_main.c, arch/x86/kvm/mmu/mmu.c (what a memslot keeps on its large pages) and guest_memfd.c.
"""

from __future__ import annotations

import errno
from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..kvm.memslots import clip
from .events import VmErrno
from .memory import U8, U32, runs

LEVELS = {"2M": 9, "1G": 18}  # log2 of the pages of a huge page
KVM_USER_MEM_SLOTS = 32764  # SHRT_MAX - 3, include/linux/kvm_host.h
LPAGE_MIXED = np.uint32(1 << 31)  # KVM_LPAGE_MIXED_FLAG; the bits below count other reasons
LOG_DIRTY_PAGES, READONLY, GUEST_MEMFD = 1 << 0, 1 << 1, 1 << 2


@dataclass(eq=False)
class UserMemory:
    """Anonymous memory of the VMM of `vm`: `pages` pages from PFN `base` on; `present` once somebody touched one.

    Where it is a mapped guest_memfd whose attributes decide who may touch it, `present` is: the VMM has a PTE.
    """

    vm: object = field(repr=False)
    base: int
    pages: int
    present: U8 = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.present = np.zeros(self.pages, np.uint8)


class File:
    """A guest_memfd as data: `pages` pages from PFN `base` on; `present` marks those that take memory.

    Offsets and ranges are in pages.  Each offset keeps its PFN for life.
    """

    def __init__(self, base: int, pages: int) -> None:
        self.base, self.pages = base, pages
        self.present: U8 = np.zeros(pages, np.uint8)
        self.pinned: set[int] = set()  # offsets that somebody else holds a reference to
        self.broken: set[int] = set()  # 2M of the file whose folio was split by a partial punch
        self.dying: list[tuple[int, int]] = []  # ranges that a punch took out and has not given back
        self.bindings: list[tuple[int, int, MemSlot]] = []

    def slots(self, start: int, end: int) -> Iterator[tuple[int, int, int, MemSlot]]:
        """Bindings that overlap pages [start, end): the clipped range, the slot's offset, the slot."""
        for lo, hi, slot in self.bindings:
            if max(lo, start) < min(hi, end):
                yield max(lo, start), min(hi, end), slot.offset, slot

    def bind(self, slot: MemSlot) -> None:
        """kvm_gmem_bind(), once it may be."""
        self.bindings.append((slot.offset, slot.offset + slot.npages, slot))

    def unbind(self, slot: MemSlot) -> None:
        """kvm_gmem_unbind(), when the slot goes."""
        self.bindings = [b for b in self.bindings if b[2] is not slot]

    def take_out(self, start: int, end: int) -> None:
        """Truncate [start, end): its pages leave the file; a 2M folio that goes only in part is split for good."""
        gone = runs(self.present, start, end)
        for lo, hi in gone:
            self.present[lo:hi] = 0
            for head in {lo - lo % 512, hi - hi % 512}:
                empty = not self.present[head : head + 512].any()
                (self.broken.discard if empty else self.broken.add)(head)
        self.dying += gone

    def whole_folios(self, start: int, n: int) -> tuple[int, int]:
        """With 2M folios, an allocation in an empty 2M of the file takes all of it."""
        end, head = start + n, start - start % 512
        tail = end + -end % 512
        if not self.present[head:start].any() and not self.broken & {head}:
            start = head
        if tail <= self.pages and not self.present[end:tail].any() and not self.broken & {tail - 512}:
            end = tail
        return start, end - start


@dataclass(eq=False)
class MemSlot:
    """One memslot: gfns [base, base + npages), shared pages from `user`, private ones from `gmem` at `offset`.

    `offset` is in pages.  `lpage_info` holds, a level, the word disallow_lpage of each huge page.
    """

    id: int
    base: int
    npages: int
    user: UserMemory
    gmem: File | None = None
    offset: int = 0
    flags: int = 0
    as_id: int = 0
    invalid: bool = field(init=False, default=False)  # KVM_MEMSLOT_INVALID: it is being deleted
    lpage_info: dict[str, U32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.lpage_info = {level: self._disallowed_at_the_ends(shift) for level, shift in LEVELS.items()}

    def _disallowed_at_the_ends(self, shift: int) -> U32:
        """A huge page that sticks out of the memslot is never allowed (kvm_alloc_memslot_metadata())."""
        words = np.zeros((self.end - 1 >> shift) - (self.base >> shift) + 1, np.uint32)
        words[0] += self.base & (1 << shift) - 1 != 0
        words[-1] += self.end & (1 << shift) - 1 != 0
        return words

    @property
    def end(self) -> int:
        """The first gfn after the slot."""
        return self.base + self.npages

    def shared_pfn(self, gfn: int) -> int:
        """The PFN behind the userspace address of a gfn."""
        return self.user.base + gfn - self.base

    def private_pfn(self, gfn: int) -> int:
        """The PFN of guest_memfd behind a gfn; only of a slot that has one."""
        assert self.gmem is not None
        return self.gmem.base + self.offset + gfn - self.base

    def contains(self, gfn: int, level: str) -> bool:
        """Whether the whole huge page around a gfn lies inside the slot."""
        size = 1 << LEVELS[level]
        head = gfn - gfn % size
        return self.base <= head and head + size <= self.end

    def words(self, lo: int, hi: int, level: str) -> U32:
        """disallow_lpage of the huge pages that [lo, hi) touches, as a view."""
        shift = LEVELS[level]
        first = self.base >> shift
        return self.lpage_info[level][(lo >> shift) - first : (hi - 1 >> shift) + 1 - first]

    def allows(self, gfn: int, level: str) -> bool:
        """Whether a gfn may be mapped at that level: nothing disallows it, mixed attributes least of all."""
        return not self.words(gfn, gfn + 1, level)[0]

    def test_mixed(self, gfn: int, level: str) -> bool:
        """hugepage_test_mixed()."""
        return bool(self.words(gfn, gfn + 1, level)[0] & LPAGE_MIXED)

    def set_mixed(self, lo: int, hi: int, level: str, mixed: bool | NDArray[np.bool_]) -> None:
        """hugepage_set_mixed() or hugepage_clear_mixed() of each huge page in [lo, hi)."""
        words = self.words(lo, hi, level)
        words &= ~LPAGE_MIXED
        words |= LPAGE_MIXED * np.uint32(mixed)


class MemSlots:
    """The memslots of one address space, by gfn."""

    def __init__(self) -> None:
        self.by_id: dict[int, MemSlot] = {}
        self._bases: list[tuple[int, int]] = []

    def __iter__(self) -> Iterator[MemSlot]:
        return (self.by_id[slot] for _, slot in self._bases)

    def find(self, gfn: int) -> MemSlot | None:
        """gfn_to_memslot()."""
        at = bisect_right(self._bases, (gfn, KVM_USER_MEM_SLOTS)) - 1
        slot = self.by_id[self._bases[at][1]] if at >= 0 else None
        return slot if slot and gfn < slot.end else None

    def pieces(self, start: int, end: int) -> list[tuple[MemSlot, int, int]]:
        """Each slot that overlaps [start, end), with the range clipped to it; empty clips do not occur."""
        found = []
        at = max(bisect_right(self._bases, (start, KVM_USER_MEM_SLOTS)) - 1, 0)
        for base, slot_id in self._bases[at:]:
            if base >= end:
                break
            slot = self.by_id[slot_id]
            if part := clip(base, slot.end, start, end):
                found.append((slot, *part))
        return found

    def add(self, slot: MemSlot) -> None:
        """Insert a slot; EEXIST if it overlaps another one."""
        if self.pieces(slot.base, slot.end):
            raise VmErrno(errno.EEXIST, f"memslot {slot.id} overlaps another one in guest addresses")
        self.by_id[slot.id] = slot
        insort(self._bases, (slot.base, slot.id))

    def remove(self, slot_id: int) -> MemSlot:
        """Take a slot out; EINVAL if there is none."""
        slot = self.by_id.pop(slot_id, None)
        if slot is None:
            raise VmErrno(errno.EINVAL, f"there is no memslot {slot_id}")
        self._bases.remove((slot.base, slot_id))
        return slot

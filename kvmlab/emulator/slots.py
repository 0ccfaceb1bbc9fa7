"""Memslots and their large-page bookkeeping (virt/kvm/kvm_main.c, arch/x86/kvm/mmu/mmu.c)."""

from __future__ import annotations

import errno
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from .events import VmErrno
from .gmem import GuestMemfd
from .memory import U8

LEVELS = {"2M": 9, "1G": 18}  # log2 of the pages of a huge page
KVM_USER_MEM_SLOTS = 32764  # SHRT_MAX - 3, include/linux/kvm_host.h
LOG_DIRTY_PAGES, READONLY, GUEST_MEMFD = 1 << 0, 1 << 1, 1 << 2


@dataclass
class UserMemory:
    """Anonymous memory of the VMM: `pages` pages from PFN `base` on; `present` once somebody touched one."""

    base: int
    pages: int
    present: U8 = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.present = np.zeros(self.pages, np.uint8)


@dataclass(eq=False)
class MemSlot:
    """One memslot: gfns [base, base + npages), shared pages from `user`, private ones from `gmem` at `offset`.

    `offset` is in pages.  `mixed` holds, a level, which huge pages have KVM_LPAGE_MIXED_FLAG.
    """

    id: int
    base: int
    npages: int
    user: UserMemory
    gmem: GuestMemfd | None = None
    offset: int = 0
    flags: int = 0
    mixed: dict[str, U8] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.mixed = {
            level: np.zeros((self.end - 1 >> shift) - (self.base >> shift) + 1, np.uint8)
            for level, shift in LEVELS.items()
        }

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

    def test_mixed(self, gfn: int, level: str) -> bool:
        """hugepage_test_mixed()."""
        return bool(self.mixed[level][(gfn >> LEVELS[level]) - (self.base >> LEVELS[level])])

    def set_mixed(self, gfn: int, level: str, mixed: bool, count: int = 1) -> None:
        """hugepage_set_mixed() or hugepage_clear_mixed() of `count` huge pages."""
        first = (gfn >> LEVELS[level]) - (self.base >> LEVELS[level])
        self.mixed[level][first : first + count] = mixed


class MemSlots:
    """The memslots of one address space, by gfn (a VM with private memory has one address space only)."""

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
            if (lo := max(start, base)) < (hi := min(end, slot.end)):
                found.append((slot, lo, hi))
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


Uniform = Callable[[int, int, bool], bool]  # whether gfns [lo, hi) all carry the attribute


def has_attrs(slot: MemSlot, gfn: int, level: str, private: bool, uniform: Uniform) -> bool:
    """hugepage_has_attrs(): 2M looks at all its gfns, 1G at its 2M children and their first gfns."""
    if level == "2M":
        return uniform(gfn, gfn + 512, private)
    children = range(gfn, gfn + (1 << 18), 512)
    return all(not slot.test_mixed(g, "2M") and uniform(g, g + 1, private) for g in children)


def update_mixed(slot: MemSlot, lo: int, hi: int, private: bool, uniform: Uniform) -> None:
    """kvm_arch_post_set_memory_attributes() for one clipped range: head, fully covered pages, tail."""
    for level, shift in LEVELS.items():
        size = 1 << shift
        head, tail = lo - lo % size, hi - hi % size

        def edge(gfn: int, level: str = level) -> None:
            if slot.contains(gfn, level):
                slot.set_mixed(gfn, level, not has_attrs(slot, gfn, level, private, uniform))

        first = head
        if lo > head or head + size > hi:
            edge(head)
            first = head + size
        if first < tail:
            slot.set_mixed(first, level, False, (tail - first) >> shift)
        if hi > tail and tail != head:
            edge(tail)


def init_mixed(slot: MemSlot, uniform: Uniform) -> None:
    """kvm_mmu_init_memslot_memory_attributes(): a new slot is computed from what the xarray holds already."""
    for level, shift in LEVELS.items():
        size = 1 << shift
        for gfn in range(slot.base + -slot.base % size, slot.end - size + 1, size):
            mixed = not any(has_attrs(slot, gfn, level, private, uniform) for private in (False, True))
            slot.set_mixed(gfn, level, mixed)

"""Which 2M and 1G pages have mixed attributes, and how far the invalidation reaches for their sake.

From arch/x86/kvm/mmu/mmu.c: hugepage_has_attrs(), kvm_arch_pre_set_memory_attributes(),
kvm_arch_post_set_memory_attributes(), kvm_mmu_init_memslot_memory_attributes().
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..kvm.lpage import LEVELS as WIDENED
from .gfn_arrays import Attributes
from .slots import LEVELS, LPAGE_MIXED, MemSlot


def has_attrs(
    slot: MemSlot, lo: int, hi: int, level: str, private: bool, attributes: Attributes, reserved: bool
) -> NDArray[np.bool_]:
    """hugepage_has_attrs() of each huge page of [lo, hi); `reserved` as for `Attributes.uniform`.

    2M looks at all its gfns; 1G at the mixed flags of its 2M children and at the first gfn of each.
    """
    if level == "2M":
        return attributes.uniform_by(lo, hi, 512, private, reserved)
    children = slot.words(lo, hi, "2M") & LPAGE_MIXED == 0
    firsts = attributes.get(lo, hi)[::512] == private
    found: NDArray[np.bool_] = (children & firsts).reshape(-1, 512).all(axis=1)
    return found


def update_mixed(
    slot: MemSlot, lo: int, hi: int, private: bool, attributes: Attributes, reserved: bool = False
) -> None:
    """The post hook for one clipped range, 2M before 1G: head, fully covered pages, tail."""
    for level, shift in LEVELS.items():
        size = 1 << shift
        head, tail = lo - lo % size, hi - hi % size
        first = head
        if lo > head or head + size > hi:
            _edge(slot, head, level, private, attributes, reserved)
            first = head + size
        if first < tail:
            slot.set_mixed(first, tail, level, False)
        if hi > tail and tail != head:
            _edge(slot, tail, level, private, attributes, reserved)


def _edge(slot: MemSlot, gfn: int, level: str, private: bool, attributes: Attributes, reserved: bool) -> None:
    """A huge page that the range covers in part; one that sticks out of the memslot is let be."""
    if slot.contains(gfn, level):
        end = gfn + (1 << LEVELS[level])
        slot.set_mixed(gfn, end, level, ~has_attrs(slot, gfn, end, level, private, attributes, reserved))


def init_mixed(slot: MemSlot, attributes: Attributes, reserved: bool = False) -> None:
    """A new slot is computed from what the xarray holds already, each huge page that lies inside."""
    for level, shift in LEVELS.items():
        size = 1 << shift
        lo, hi = slot.base + -slot.base % size, slot.end - slot.end % size
        if lo < hi:
            shared, private = (
                has_attrs(slot, lo, hi, level, kind, attributes, reserved) for kind in (False, True)
            )
            slot.set_mixed(lo, hi, level, ~(shared | private))


def hull(slot: MemSlot, lo: int, hi: int, word: str | None) -> tuple[int, int]:
    """range_add() of a clipped range; with a word the huge pages at both ends too (9129633d568e, May 2025)."""
    first, last = lo, hi
    for level in WIDENED.get(word or "", ()):
        shift = LEVELS[level]
        for gfn in {lo >> shift << shift, (hi - 1) >> shift << shift}:
            end = gfn + (1 << shift)
            covered = lo <= gfn and end <= hi
            if not covered and slot.contains(gfn, level) and not slot.test_mixed(gfn, level):
                first, last = min(first, gfn), max(last, end)
    return first, last

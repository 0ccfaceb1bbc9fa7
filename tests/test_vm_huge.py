"""Large pages: which 2M and 1G pages are mixed, what may be mapped large, and the window around them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from kvmlab.emulator import GuestSpins, KernelBug, Vm
from kvmlab.emulator.slots import LEVELS

P, M2 = 4096, 1 << 21


def mixed(vm: Vm, level: str = "2M") -> list[bool]:
    slot, size = next(iter(vm.slots)), 1 << LEVELS[level]
    return [slot.test_mixed(gfn, level) for gfn in range(slot.base - slot.base % size, slot.end, size)]


@pytest.mark.parametrize(
    ("start", "size", "flags"),
    [
        (0, 2 * M2, [False, False, False]),
        (P, P, [True, False, False]),
        (P, M2, [True, True, False]),
        (0, 2 * M2 + P, [False, False, True]),
        (M2 - P, M2 + 2 * P, [True, False, True]),
    ],
)
def test_head_and_tail_become_mixed_and_the_middle_does_not(start: int, size: int, flags: list[bool]) -> None:
    vm = Vm("snp", 3 * 512)
    vm.set_memory_attributes(start, size, True)
    assert mixed(vm) == flags
    vm.set_memory_attributes(0, 3 * M2, False)
    assert mixed(vm) == [False] * 3


def test_a_1g_page_is_mixed_when_a_2m_child_is() -> None:
    vm = Vm("sw", 1 << 18)
    vm.set_memory_attributes(5 * M2 + P, P, True)
    assert mixed(vm, "1G") == [True]


def test_a_new_memslot_is_computed_from_what_the_xarray_holds_already() -> None:
    vm = Vm("snp", slots=[])
    vm.set_memory_attributes(P, P, True)
    vm.set_user_memory_region2(0, 0, 2 * M2, vm.create_guest_memfd(2 * M2))
    assert mixed(vm) == [True, False]


def test_huge_pages_outside_the_memslot_are_not_touched() -> None:
    vm = Vm("snp", slots=[(P, M2)])
    vm.set_memory_attributes(2 * P, P, True)
    assert mixed(vm) == [False, False]


def test_a_mixed_2m_range_is_never_mapped_large() -> None:
    vm = Vm("sw", 1024, shared_2m=True)
    vm.set_memory_attributes(0, P, True)
    vm.guest().touch(P, M2 - P)
    vm.guest().touch(M2, M2)
    assert (vm.mmu.leaves(0, 1024) & 1).tolist() == [0] * 512 + [1] * 512


@pytest.mark.parametrize(("design", "widens"), [("upstream", True), ("narrow-hull", False)])
def test_the_widened_window_keeps_a_huge_page_from_being_mapped_while_half_of_it_changes(
    design: str, widens: bool
) -> None:
    vm = Vm("snp", 512, design, shared_2m=True)

    def fault(row: Any) -> None:
        if row.call == "kvm_vm_set_region_attr":
            try:
                vm.guest().touch(M2 - P, P)
            except GuestSpins:
                assert widens

    vm.on_row = fault
    vm.set_memory_attributes(0, P, True)
    # 9129633d568e: without the widening a 2M leaf covers a private page.
    assert bool(vm.mmu.leaves(0, 1)[0] & 1) is not widens
    vm.on_row = None
    vm.guest().set_private(0, True)
    with nullcontext() if widens else pytest.raises(KernelBug, match="replaces present leaf"):
        vm.guest().pvalidate(0, True)


@pytest.mark.parametrize("page", [0, 5, 511, 512, 1023])
def test_a_large_leaf_that_the_range_only_overlaps_is_removed_whole(page: int) -> None:
    vm = Vm("sw", 1024, shared_2m=True)
    vm.guest().touch(0, 2 * M2)
    vm.set_memory_attributes(page * P, P, True)
    mapped = vm.mmu.leaves(0, 1024) != 0
    gone = slice(0, 512) if page < 512 else slice(512, 1024)
    assert not mapped[gone].any() and int(mapped.sum()) == 512 and vm.counters["zap"] == 1


def test_a_large_leaf_takes_the_place_of_a_table_with_a_flush() -> None:
    vm = Vm("sw", 512, shared_2m=True)
    vm.set_memory_attributes(0, P, True)
    vm.guest().touch(P, M2 - P)
    vm.set_memory_attributes(0, P, False)
    flushes = vm.counters.get("flush", 0)
    vm.guest().touch(0, P)
    assert (vm.mmu.leaves(0, 512) & 1).all()
    assert (vm.counters["zap"], vm.counters["flush"]) == (511, flushes + 1)

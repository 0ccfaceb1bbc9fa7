"""Large-page bookkeeping at 2M and 1G, rule by rule: disallow_lpage, the mixed flag, and the wider window."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvmlab.emulator import GuestSpins, Vm
from kvmlab.emulator.slots import LEVELS, LPAGE_MIXED, MemSlot

P, M2, G1 = 4096, 1 << 21, 1 << 30
PAGES_1G = 1 << 18


def slot(vm: Vm) -> MemSlot:
    return next(iter(vm.slots))


def mixed(vm: Vm, level: str) -> list[int]:
    size = 1 << LEVELS[level]
    first = slot(vm).base - slot(vm).base % size
    return [gfn // size for gfn in range(first, slot(vm).end, size) if slot(vm).test_mixed(gfn, level)]


def window(vm: Vm, gpa: int, size: int) -> tuple[int, int] | None:
    """The hull of the invalidation while an ioctl to private stores its attributes."""
    seen = []
    vm.on_row = lambda row: seen.append(vm.mmu.window) if row.call == "kvm_vm_set_region_attr" else None
    vm.set_memory_attributes(gpa, size, True)
    return seen[0]


@pytest.fixture
def vm() -> Vm:
    return Vm("sw", 3 * PAGES_1G)


# disallow_lpage


def test_the_mixed_flag_is_bit_31_and_one_reason_among_others(vm: Vm) -> None:
    vm.set_memory_attributes(P, P, True)
    words = [int(slot(vm).lpage_info[level][0]) for level in LEVELS]
    assert words == [1 << 31] * 2 and LPAGE_MIXED == 1 << 31


@pytest.mark.parametrize("level", ["2M", "1G"])
def test_a_huge_page_is_allowed_only_if_the_whole_word_is_0(vm: Vm, level: str) -> None:
    assert slot(vm).allows(0, level)
    slot(vm).lpage_info[level][0] += 1
    assert not slot(vm).allows(0, level) and not slot(vm).test_mixed(0, level)
    vm.set_memory_attributes(P, P, True)
    vm.set_memory_attributes(P, P, False)
    assert int(slot(vm).lpage_info[level][0]) == 1  # the flag comes and goes, the count stays


def test_a_huge_page_that_sticks_out_of_the_memslot_is_never_allowed() -> None:
    vm = Vm("sw", slots=[(P, M2), (4 * M2, 3 * M2 - P)])
    one, other = vm.slots
    assert [one.allows(gfn, "2M") for gfn in (1, 512)] == [False, False]
    assert [other.allows(gfn, "2M") for gfn in (2048, 2560, 3072)] == [True, True, False]
    assert not other.allows(2048, "1G")


# The post hook


@pytest.mark.parametrize(
    ("gpa", "size", "at_2m", "at_1g"),
    [
        (G1 - P, P, [511], [0]),  # the head alone
        (0, G1, [], []),  # fully covered
        (M2, M2, [], [0]),  # covered at 2M, head at 1G
        (P, 2 * G1, [0, 1024], [0, 2]),  # head, fully covered, tail
        (G1 + M2, G1 - 2 * M2, [], [1]),  # both ends in one 1G page
        (G1 - M2, 2 * M2, [], [0, 1]),
        (0, 2 * G1 + 3 * M2 + P, [1027], [2]),  # the tail alone
    ],
)
def test_head_and_tail_of_a_range_become_mixed_and_what_it_covers_does_not(
    vm: Vm, gpa: int, size: int, at_2m: list[int], at_1g: list[int]
) -> None:
    vm.set_memory_attributes(gpa, size, True)
    assert (mixed(vm, "2M"), mixed(vm, "1G")) == (at_2m, at_1g)


def test_levels_ascend_so_1g_sees_what_2m_has_just_become(vm: Vm) -> None:
    vm.set_memory_attributes(5 * M2 + P, P, True)
    vm.set_memory_attributes(5 * M2 + P, P, False)
    assert mixed(vm, "2M") == mixed(vm, "1G") == []


def test_a_range_that_covers_a_mixed_page_whole_clears_it(vm: Vm) -> None:
    vm.set_memory_attributes(G1 + P, P, True)
    vm.set_memory_attributes(G1, G1, True)
    assert mixed(vm, "2M") == mixed(vm, "1G") == []


def test_a_head_that_is_uniform_again_is_cleared(vm: Vm) -> None:
    vm.set_memory_attributes(0, G1 - P, True)
    assert mixed(vm, "1G") == [0]
    vm.set_memory_attributes(G1 - P, P, True)
    assert mixed(vm, "1G") == []


@pytest.mark.parametrize("gpa", [M2, G1 - M2, 2 * G1])
def test_huge_pages_not_inside_the_memslot_are_skipped_at_either_end(gpa: int) -> None:
    vm = Vm("sw", slots=[(M2, 2 * G1)])  # contains one 1G page, of three that it touches
    vm.set_memory_attributes(gpa, P, True)
    assert mixed(vm, "2M") == [gpa // M2] and mixed(vm, "1G") == []


def test_2m_looks_at_all_its_512_gfns(vm: Vm) -> None:
    for page in (0, 255, 511):
        vm.set_memory_attributes(page * P, P, True)
        assert mixed(vm, "2M") == [0]
        vm.set_memory_attributes(page * P, P, False)
        assert mixed(vm, "2M") == []


def test_1g_is_mixed_when_no_child_is_but_their_first_gfns_differ(vm: Vm) -> None:
    vm.set_memory_attributes(7 * M2, M2, True)
    assert (mixed(vm, "2M"), mixed(vm, "1G")) == ([], [0])


def test_1g_asks_for_the_flags_of_its_children_not_for_their_gfns(vm: Vm) -> None:
    vm.attributes.store(5 * 512 + 1, 5 * 512 + 2, True)  # as no ioctl could: the child is not flagged
    vm.set_memory_attributes(9 * M2, P, True)
    vm.set_memory_attributes(9 * M2, P, False)
    assert mixed(vm, "1G") == []


@pytest.mark.parametrize("base", [0, M2, P])
def test_a_new_memslot_is_computed_from_the_xarray_at_both_levels(base: int) -> None:
    vm = Vm("sw", slots=[])
    vm.set_memory_attributes(G1 + 6 * M2 + P, P, True)
    vm.set_memory_attributes(2 * G1, G1, True)
    vm.set_user_memory_region2(0, base, 3 * G1)
    assert (mixed(vm, "2M"), mixed(vm, "1G")) == ([518], [1])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("base", [0, 5 * M2, 3 * P])
def test_after_any_ioctls_a_huge_page_inside_is_mixed_if_its_attributes_are(base: int, seed: int) -> None:
    rng, vm = random.Random(seed), Vm("sw", slots=[(base, 2 * G1)])
    edges = [0, G1, 2 * G1, *(rng.randrange(2 * PAGES_1G) * P for _ in range(4)), rng.randrange(1024) * M2]
    for _ in range(12):
        lo, hi = sorted(rng.sample(edges, 2))
        if lo < hi:
            vm.set_memory_attributes(base + lo, hi - lo, rng.random() < 0.5)
    for level, shift in LEVELS.items():
        size, truth = 1 << shift, vm.attributes.get(0, slot(vm).end)
        inside = range(slot(vm).base + -slot(vm).base % size, slot(vm).end - size + 1, size)
        want = [gfn // size for gfn in inside if 0 < int(truth[gfn : gfn + size].sum()) < size]
        assert mixed(vm, level) == want


# C29


def test_a_1g_range_with_mixed_attributes_may_not_be_mapped_1g_until_they_are_one_again(vm: Vm) -> None:
    allowed = []
    for private in (True, False):
        vm.set_memory_attributes(G1 + 300 * M2 + P, P, private)
        allowed.append([slot(vm).allows(gigabyte * PAGES_1G, "1G") for gigabyte in range(3)])
    assert allowed == [[True, False, True], [True, True, True]]


# The window


def test_the_window_covers_the_1g_page_around_a_single_gfn(vm: Vm) -> None:
    assert window(vm, G1 + 5 * M2, P) == (PAGES_1G, 2 * PAGES_1G)


def test_the_window_covers_the_huge_pages_at_both_ends(vm: Vm) -> None:
    assert window(vm, G1 - P, G1 + 2 * P) == (0, 3 * PAGES_1G)
    vm = Vm("sw", 3 * 512)
    assert window(vm, M2 - P, M2 + 2 * P) == (0, 3 * 512)


def test_a_huge_page_that_is_mixed_already_is_no_reason_to_widen(vm: Vm) -> None:
    vm.set_memory_attributes(G1 + 9 * M2, P, True)
    assert window(vm, G1 + 5 * M2, P) == (PAGES_1G + 5 * 512, PAGES_1G + 6 * 512)
    assert window(vm, G1 + 9 * M2 + P, P) == (PAGES_1G + 9 * 512 + 1, PAGES_1G + 9 * 512 + 2)


def test_a_huge_page_that_is_covered_whole_is_no_reason_to_widen(vm: Vm) -> None:
    assert window(vm, G1, G1) == (PAGES_1G, 2 * PAGES_1G)


def test_a_huge_page_that_sticks_out_of_the_memslot_is_no_reason_to_widen() -> None:
    assert window(Vm("sw", slots=[(0, 3 * M2)]), M2, P) == (512, 1024)
    assert window(Vm("sw", slots=[(P, M2)]), M2, P) == (512, 513)


def test_a_fault_on_a_neighbour_in_the_same_1g_page_retries(vm: Vm) -> None:
    retried = []

    def neighbour(row: Any) -> None:
        if row.call == "kvm_vm_set_region_attr":
            for gpa in (G1 + 400 * M2, 2 * G1):
                try:
                    vm.guest().touch(gpa, P)
                except GuestSpins:
                    retried.append(gpa)

    vm.on_row = neighbour
    vm.set_memory_attributes(G1 + P, P, True)
    assert retried == [G1 + 400 * M2]

"""A reservation that fails leaves empty entries in the xarray; before 277d3623d99a they read as attributes."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kvmlab.design import Design
from kvmlab.emulator import Vm, VmErrno

P, M2 = 4096, 1 << 21
BUG = [True, False]
DESIGN = {True: "reserved-read-as-attributes", False: "upstream"}


def residue(bug: bool, at: Any = 5, pages: int = 512, **more: bool) -> Vm:
    """A VM after an ioctl to private whose reservation failed at index `at`."""
    vm = Vm("sw", pages, DESIGN[bug], **more)
    vm.fail("xa_reserve", at=at)
    with pytest.raises(VmErrno) as caught:
        vm.set_memory_attributes(0, 512 * P, True)
    assert caught.value.errno == errno.ENOMEM
    return vm


def test_what_was_reserved_before_the_failure_stays_and_holds_no_attributes() -> None:
    vm = residue(bug=True)
    assert vm.attributes.reserved.tolist() == [1] * 5 and vm.mmu.seq == 0
    assert not vm.attributes.get(0, 512).any() and not vm.attributes.is_private(0)


@pytest.mark.parametrize("bug", BUG)
def test_a_uniform_shared_range_does_not_return_early_because_of_residue(bug: bool) -> None:
    vm = residue(bug)
    vm.set_memory_attributes(0, 512 * P, False)
    assert vm.mmu.seq == bug


@pytest.mark.parametrize("bug", BUG)
def test_a_single_gfn_was_always_looked_up_right(bug: bool) -> None:
    vm = residue(bug)
    vm.set_memory_attributes(2 * P, P, False)
    assert vm.mmu.seq == 0


@pytest.mark.parametrize("bug", BUG)
def test_residue_never_reads_as_private(bug: bool) -> None:
    vm = residue(bug)
    assert not vm.attributes.uniform(0, 5, True, bug)
    assert not vm.attributes.uniform_by(0, 512, 512, True, bug).any()


@pytest.mark.parametrize("bug", BUG)
def test_residue_makes_a_uniform_2m_page_mixed_and_so_never_huge(bug: bool) -> None:
    vm = residue(bug, shared_2m=True)
    vm.set_memory_attributes(100 * P, P, True)
    vm.set_memory_attributes(100 * P, P, False)
    vm.guest().touch(0, P)
    assert next(iter(vm.slots)).test_mixed(0, "2M") is bug
    assert bool(vm.mmu.leaves(0, 1)[0] & 1) is not bug


@pytest.mark.parametrize("bug", BUG)
def test_residue_makes_the_1g_page_above_mixed_too(bug: bool) -> None:
    vm = residue(bug, pages=1 << 18)
    vm.set_memory_attributes(100 * P, P, True)
    vm.set_memory_attributes(100 * P, P, False)
    assert next(iter(vm.slots)).test_mixed(0, "1G") is bug


@pytest.mark.parametrize("bug", BUG)
def test_a_new_memslot_is_computed_wrongly_from_residue(bug: bool) -> None:
    vm = residue(bug)
    vm.set_user_memory_region2(0, 0, 0)
    vm.set_user_memory_region2(0, 0, M2)
    assert next(iter(vm.slots)).test_mixed(0, "2M") is bug


def test_an_ioctl_that_covers_the_residue_clears_it() -> None:
    vm = residue(bug=True)
    vm.set_memory_attributes(0, 512 * P, True)
    vm.set_memory_attributes(0, 512 * P, False)
    assert not vm.attributes.reserved.any() and vm.attributes.uniform(0, 512, False)


def test_entries_that_held_attributes_before_the_failure_keep_them() -> None:
    vm = Vm("sw", 512)
    vm.set_memory_attributes(2 * P, P, True)
    vm.fail("xa_reserve", at=5)
    with pytest.raises(VmErrno):
        vm.set_memory_attributes(0, 512 * P, True)
    assert vm.attributes.reserved[:5].tolist() == [1, 1, 0, 1, 1] and vm.attributes.is_private(2)


# The text


@pytest.mark.parametrize("design", ["v8-post-hook", "gmem-in-place", "narrow-hull"])
def test_where_the_text_reserves_nothing_no_reservation_fails(design: str) -> None:
    vm = Vm("snp", 8, design)
    vm.fail("xa_reserve", at=0)
    vm.set_memory_attributes(0, 8 * P, True)
    assert vm.attributes.uniform(0, 8, True) and vm.failures == {"xa_reserve": 0}


@pytest.mark.parametrize("design", ["gmem-in-place", "narrow-hull"])
def test_a_store_that_nothing_was_reserved_for_stops_at_the_first_failure(design: str) -> None:
    vm = Vm("snp", 8, design)
    vm.fail("xa_store", at=3)
    assert vm.set_memory_attributes(0, 8 * P, True) == (3 * P, 5 * P)
    assert vm.attributes.get(0, 8).tolist() == [1] * 3 + [0] * 5


def test_the_vmm_asks_again_for_what_was_not_stored() -> None:
    vm = Vm("snp", 8, "narrow-hull")
    vm.fail("xa_store", at=3)
    vm.guest().set_memory_encrypted(0, 8 * P)
    assert vm.attributes.uniform(0, 8, True) and vm.counters["set-attributes"] == 2


@pytest.mark.parametrize("design", ["gmem-in-place", "narrow-hull"])
def test_where_the_text_does_not_ask_a_uniform_range_is_invalidated_all_the_same(design: str) -> None:
    vm = Vm("snp", 8, design)
    vm.set_memory_attributes(0, 8 * P, False)
    assert vm.mmu.seq == 1


def test_reserving_under_mmu_lock_is_scheduling_while_atomic() -> None:
    text = "base: upstream\nioctl:\n    KVM_MMU_LOCK(kvm)\n    xa_reserve()\n    xa_store()\n    KVM_MMU_UNLOCK(kvm)"
    vm = Vm("sw", 8, Design.parse(text))
    vm.set_memory_attributes(0, P, True)
    assert [name for name, _ in vm.violations] == ["sleep-in-atomic"]

"""Address spaces: x86 has a second one for SMM, but not for a VM with private memory."""

from __future__ import annotations

import errno

import pytest

from kvmlab.design.calls import PLATFORMS
from kvmlab.emulator import InternalError, Vm, VmErrno

P, M2, SMM = 4096, 1 << 21, 1 << 16


@pytest.fixture
def two() -> Vm:
    """A VM without private memory: pages 0-3 in address space 0, pages 2-9 in address space 1."""
    vm = Vm("sw", slots=[])
    vm.supported_attributes = 0
    vm.set_user_memory_region2(0, 0, 4 * P)
    vm.set_user_memory_region2(SMM | 0, 2 * P, 8 * P)
    return vm


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_platform_that_ships_has_private_memory_and_so_one_address_space(platform: str) -> None:
    assert len(Vm(platform, 4).address_spaces) == 1


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("as_id", [1, 2, 0xFFFF])
def test_a_slot_in_an_address_space_that_there_is_not_is_einval(platform: str, as_id: int) -> None:
    with pytest.raises(VmErrno) as caught:
        Vm(platform, slots=[]).set_user_memory_region2(as_id << 16, 0, P)
    assert caught.value.errno == errno.EINVAL


def test_without_private_memory_there_are_two_and_no_third(two: Vm) -> None:
    assert [len(space.by_id) for space in two.address_spaces] == [1, 1]
    with pytest.raises(VmErrno):
        two.set_user_memory_region2(2 << 16, 0, P)


def test_slots_of_two_address_spaces_may_overlap_and_have_the_same_number(two: Vm) -> None:
    with pytest.raises(VmErrno, match="overlaps"):
        two.set_user_memory_region2(SMM | 1, 9 * P, P)
    two.set_user_memory_region2(1, 9 * P, P)


def test_the_walk_visits_every_address_space_and_clips_to_each_slot(two: Vm) -> None:
    assert [(slot.as_id, lo, hi) for slot, lo, hi in two.pieces(1, 6)] == [(0, 1, 4), (1, 2, 6)]


def test_the_attribute_ioctl_begins_and_ends_once_however_many_address_spaces(two: Vm) -> None:
    two.attributes.store(0, 6, True)
    windows = []
    two.on_row = lambda row: windows.append(two.mmu.window) if row.call == "kvm_vm_set_region_attr" else None
    two.set_memory_attributes(0, 6 * P, False)
    assert two.mmu.seq == 1 and two.mmu.in_progress == 0 and windows == [(0, 6)]


def test_the_walk_updates_the_mixed_flags_of_both_address_spaces() -> None:
    vm = Vm("sw", slots=[])
    vm.attributes.store(5, 6, True)
    vm.supported_attributes = 0
    for as_id in (0, 1):
        vm.set_user_memory_region2(as_id << 16, 0, M2)
    assert all(slot.test_mixed(0, "2M") for space in vm.address_spaces for slot in space)
    vm.set_memory_attributes(5 * P, P, False)
    assert not any(slot.test_mixed(0, "2M") for space in vm.address_spaces for slot in space)


def test_the_guest_runs_in_address_space_0(two: Vm) -> None:
    two.guest().write(2 * P, b"x")
    two.set_user_memory_region2(SMM | 0, 0, 0)
    assert two.guest().read(2 * P, 1) == b"x" and two.counters["npf"] == 1
    two.set_user_memory_region2(0, 0, 0)
    with pytest.raises(InternalError):
        two.guest().read(2 * P, 1)

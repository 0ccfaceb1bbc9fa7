"""Memslots: set_memory_region_test (tools/testing/selftests/kvm) with its sizes, and what it leaves out."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from kvmlab.emulator import GuestSpins, InternalError, MmioExit, Vm, VmErrno, VmSwitches
from kvmlab.emulator.regions import SYNCHRONIZE
from kvmlab.emulator.slots import GUEST_MEMFD, KVM_USER_MEM_SLOTS, LOG_DIRTY_PAGES, READONLY

P, M2, GPA = 4096, 1 << 21, 0xC0000000


@pytest.fixture
def vm() -> Vm:
    return Vm("sw", slots=[])


def refusal(vm: Vm, *arguments: Any, **more: int) -> str:
    with pytest.raises(VmErrno) as caught:
        vm.set_user_memory_region2(*arguments, **more)
    return errno.errorcode[caught.value.errno]


def test_invalid_memory_region_flags(vm: Vm) -> None:
    for bit in (*range(3, 32),):
        assert refusal(vm, 10, GPA, M2, flags=1 << bit) == "EINVAL"
    file = vm.create_guest_memfd(M2)
    for flags in (LOG_DIRTY_PAGES | GUEST_MEMFD, READONLY | GUEST_MEMFD):
        assert refusal(vm, 10, GPA, M2, file, flags=flags) == "EINVAL"


def test_the_old_ioctl_does_not_know_guest_memfd(vm: Vm) -> None:
    with pytest.raises(VmErrno) as caught:
        vm.set_user_memory_region(10, GPA, M2, flags=GUEST_MEMFD)
    assert caught.value.errno == errno.EINVAL
    vm.set_user_memory_region(10, GPA, M2)
    assert vm.guest().read(GPA, 1) == bytes(1)


def test_add_private_memory_region(vm: Vm) -> None:
    file = vm.create_guest_memfd(M2)
    for wrong in ("the fd of KVM", "the fd of the VM", "a memfd", Vm("sw", slots=[]).create_guest_memfd(M2)):
        assert refusal(vm, 10, GPA, M2, wrong) == "EINVAL"
    assert {refusal(vm, 10, GPA, M2, file, offset) for offset in range(1, P)} == {"EINVAL"}
    vm.set_user_memory_region2(10, GPA, M2, file)


def test_add_overlapping_private_memory_regions(vm: Vm) -> None:
    file = vm.create_guest_memfd(4 * M2)
    vm.set_user_memory_region2(10, GPA, 2 * M2, file, 0)
    vm.set_user_memory_region2(11, GPA * 2, 2 * M2, file, 2 * M2)
    vm.set_user_memory_region2(10, GPA, 0)
    assert refusal(vm, 10, GPA * 2 - M2, 2 * M2, file, 0) == "EEXIST"
    assert refusal(vm, 10, GPA * 2 + M2, 2 * M2, file, 0) == "EEXIST"


@pytest.mark.parametrize(("eexist", "code"), [(False, "EINVAL"), (True, "EEXIST")])
def test_overlapping_file_ranges_which_the_selftest_does_not_reach(eexist: bool, code: str) -> None:
    vm = Vm("sw", slots=[], switches=VmSwitches(bound_range_is_eexist=eexist))
    file = vm.create_guest_memfd(4 * M2)
    vm.set_user_memory_region2(11, GPA * 2, 2 * M2, file, M2)
    for offset, size in ((0, M2 + P), (0, 4 * M2), (M2, 2 * M2), (2 * M2, P), (3 * M2 - P, M2)):
        assert refusal(vm, 10, GPA, size, file, offset) == code
    vm.set_user_memory_region2(10, GPA, M2, file, 0)
    vm.set_user_memory_region2(12, GPA + M2, M2, file, 3 * M2)


def test_a_file_range_is_free_again_when_its_slot_is_deleted(vm: Vm) -> None:
    file = vm.create_guest_memfd(M2)
    vm.set_user_memory_region2(10, GPA, M2, file)
    vm.set_user_memory_region2(10, GPA, 0)
    vm.set_user_memory_region2(11, GPA * 2, M2, file)


def test_add_max_memory_regions(vm: Vm) -> None:
    vm.set_user_memory_region2(0, 0, M2)
    memory = vm.slots.by_id[0].user
    for slot in range(1, KVM_USER_MEM_SLOTS):
        vm.set_user_memory_region2(slot, slot * M2, M2, user=memory)
    assert refusal(vm, KVM_USER_MEM_SLOTS, KVM_USER_MEM_SLOTS * M2, M2) == "EINVAL"


def test_zero_memory_regions(vm: Vm) -> None:
    with pytest.raises(InternalError):
        vm.guest().read(0, 1)


def test_move_memory_region(vm: Vm) -> None:
    vm.set_user_memory_region2(0, 0, P)
    vm.set_user_memory_region2(10, GPA, M2)
    vm.mmio = 0xBEEF
    seen = set()
    for _ in range(10):
        vm.guest().write(GPA, (1).to_bytes(8, "little"))
        vm.set_user_memory_region2(10, GPA - P, M2)
        vm.host.write(GPA - P, (2).to_bytes(8, "little"))
        seen.add(int.from_bytes(vm.guest().read(GPA, 8), "little"))
        vm.host.write(GPA - P, (1).to_bytes(8, "little"))
        vm.set_user_memory_region2(10, GPA, M2)
        seen.add(int.from_bytes(vm.guest().read(GPA, 8), "little"))
    assert 1 in seen and 2 not in seen


def test_delete_memory_region(vm: Vm) -> None:
    vm.set_user_memory_region2(0, 0, P)
    vm.mmio = 0xBEEF
    for _ in range(10):
        vm.set_user_memory_region2(10, GPA, M2)
        assert vm.guest().read(GPA, 8) == bytes(8)
        vm.guest().write(GPA, b"old")
        vm.set_user_memory_region2(10, GPA, 0)
        assert vm.guest().read(GPA, 8) == (0xBEEF).to_bytes(8, "little")


def test_delete_slot_0_and_the_vcpu_cannot_run_at_all(vm: Vm) -> None:
    vm.set_user_memory_region2(0, 0, P)
    vm.guest().read(0, 1)
    vm.set_user_memory_region2(0, 0, 0)
    with pytest.raises(InternalError):
        vm.guest().read(0, 1)


def test_a_read_without_a_memslot_is_mmio(vm: Vm) -> None:
    vm.set_user_memory_region2(0, 0, P)
    with pytest.raises(MmioExit):
        vm.guest().read(GPA, 8)


# A memslot that is being deleted: the row memslot_invalid()


def deleting(act: Callable[..., Any], platform: str = "snp", design: str = "upstream") -> Vm:
    """Delete memslot 0; `act(vm)` runs while the deleter waits for kvm->srcu."""
    vm, seen = Vm(platform, 8, design, vmm="kill"), []

    def at_point(name: Any) -> None:
        if name == SYNCHRONIZE:
            seen.append(act(vm))

    vm.on_point = at_point
    vm.set_user_memory_region2(0, 0, 0)
    assert len(seen) == 1
    return vm


def spins(vm: Vm) -> str:
    with pytest.raises(GuestSpins) as caught:
        vm.guest().touch(0, P)
    return caught.value.why


def test_a_fault_on_a_memslot_that_is_being_deleted_retries() -> None:
    vm = deleting(lambda vm: "being deleted" in spins(vm) or pytest.fail("why?"))
    assert vm.counters["retry"] == 8 and "KVM_MEMSLOT_INVALID" in str(vm.events)


def test_once_the_memslot_is_gone_there_is_no_retry() -> None:
    vm = deleting(lambda vm: None)
    with pytest.raises(InternalError):
        vm.guest().touch(0, P)


def test_where_the_text_does_not_ask_the_fault_maps_the_page_and_the_deletion_zaps_it() -> None:
    vm = deleting(lambda vm: vm.guest().touch(0, P), design="v8-post-hook")
    assert vm.counters["zap"] == 1 and not vm.mmu.leaves(0, 1).any()


def private_fault(design: str) -> dict[str, int]:
    vm = deleting(lambda vm: (vm.guest().set_private(0, True), vm.attributes.store(0, 1, True), spins(vm)),
                  "tdx", design)  # fmt: skip
    return vm.counters


def test_on_tdx_such_a_private_fault_leaves_kvm_before_it_is_tried_again() -> None:
    counters = private_fault("upstream")
    assert counters["ept-violation"] == 8 and "fault-again" not in counters


def test_on_tdx_before_may_2025_it_looped_inside_kvm_while_the_deleter_waited() -> None:
    counters = private_fault("tdx-loops-on-deleted-slot")
    assert counters["ept-violation"] == 1 and counters["fault-again"] == 7

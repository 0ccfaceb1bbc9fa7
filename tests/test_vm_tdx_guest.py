"""tdx: MapGPA as KVM serves it, and the order of a Linux guest's conversions."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kvmlab.emulator import (
    MapGpaError,
    MemoryFaultExit,
    SetMemoryFailed,
    TdxError,
    Vm,
    VmDead,
    VmErrno,
    VmSwitches,
)
from kvmlab.emulator.tdx_guest import ALIGN_ERROR, INVALID_OPERAND, RETRY, SHARED, SUBFUNC_UNSUPPORTED, MapGpa
from kvmlab.hw.tdx import Status

P, M2 = 4096, 1 << 21
AGAIN = VmSwitches(eagain_is_retry=True)


@pytest.fixture
def td() -> Vm:
    return Vm("tdx", 4 * 512)


def refusing(code: int, **more: VmSwitches) -> Vm:
    """A VM whose userspace answers the second 2M of a conversion with an error."""
    vm = Vm("tdx", 4 * 512, **more)
    convert = vm.vmm.convert

    def refuse(gpa: Any, size: Any, private: Any) -> None:
        if gpa >= M2:
            raise VmErrno(code, "userspace")
        convert(gpa, size, private)

    vm.vmm.convert = refuse
    return vm


# MapGPA


def test_kvm_asks_userspace_in_chunks_of_2m(td: Vm) -> None:
    assert td.guest().map_gpa(0, 3 * M2 + P) == (0, 0)
    assert td.counters["exit-map-gpa-range"] == 4 and td.counters["TDG.VP.VMCALL<MapGPA>"] == 1
    assert td.attributes.uniform(0, 3 * 512 + 1, True) and not td.attributes.is_private(3 * 512 + 1)


def test_the_shared_bit_of_the_start_is_the_direction(td: Vm) -> None:
    td.guest().map_gpa(0, M2)
    td.guest().map_gpa(P | SHARED, P)
    assert [td.attributes.is_private(g) for g in (0, 1, 2)] == [True, False, True]


def test_kvm_itself_changes_nothing_if_userspace_does_nothing(td: Vm) -> None:
    td.vmm.convert = lambda *_: None
    assert td.guest().map_gpa(0, M2).status == 0 and not td.attributes.is_private(0)


@pytest.mark.parametrize(
    ("r12", "r13", "status"),
    [
        (0, 0, INVALID_OPERAND),
        (SHARED - P, 2 * P, INVALID_OPERAND),  # crosses the boundary
        (1 << 52, P, INVALID_OPERAND),
        (P // 2, P, ALIGN_ERROR),
        (0, P + 1, ALIGN_ERROR),
    ],
)
def test_a_bad_range_is_refused_without_an_exit(td: Vm, r12: int, r13: int, status: int) -> None:
    assert td.guest().map_gpa(r12, r13) == (status, r12)
    assert "exit-map-gpa-range" not in td.counters


def test_without_the_exit_enabled_it_is_unsupported(td: Vm) -> None:
    td.hypercall_exits = False
    assert td.guest().map_gpa(0, P) == (SUBFUNC_UNSUPPORTED, 0)


def test_pending_events_stop_it_between_chunks_with_retry_and_the_next_address(td: Vm) -> None:
    td.pending = lambda: True
    answer = td.guest().map_gpa(SHARED, 3 * M2)
    assert answer == (RETRY, M2 | SHARED) and td.counters["exit-map-gpa-range"] == 1
    assert str(answer).startswith("TDVMCALL_STATUS_RETRY")


def test_pending_events_after_the_last_chunk_matter_to_nobody(td: Vm) -> None:
    td.pending = lambda: True
    assert td.guest().map_gpa(0, M2).status == 0


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EINVAL, errno.ENOMEM])
def test_an_error_from_userspace_is_invalid_operand_with_the_failed_address(code: int) -> None:
    assert refusing(code).guest().map_gpa(0, 3 * M2) == (INVALID_OPERAND, M2)


def test_in_2026_eagain_is_a_retry_einval_stays_and_others_end_kvm_run() -> None:
    assert refusing(errno.EAGAIN, switches=AGAIN).guest().map_gpa(0, 3 * M2) == (RETRY, M2)
    assert refusing(errno.EINVAL, switches=AGAIN).guest().map_gpa(0, 3 * M2) == (INVALID_OPERAND, M2)
    with pytest.raises(VmErrno, match="KVM_RUN"):
        refusing(errno.ENOMEM, switches=AGAIN).guest().map_gpa(0, 3 * M2)


def test_in_place_a_held_page_makes_userspace_answer_eagain() -> None:
    vm = Vm("tdx", 4, "gmem-in-place", switches=AGAIN)
    vm.host.write(0, b"x")
    vm.host.pin(0)
    assert vm.guest().map_gpa(0, P) == (RETRY, 0)


# The guest's loop around it


def test_a_linux_guest_goes_on_from_r11(td: Vm) -> None:
    td.pending = lambda: True
    td.guest().page_state_change(0, 4 * M2, True)
    assert td.counters["TDG.VP.VMCALL<MapGPA>"] == 4 and td.attributes.uniform(0, 4 * 512, True)


def test_it_gives_up_after_three_tries_without_progress() -> None:
    vm = refusing(errno.EAGAIN, switches=AGAIN)
    with pytest.raises(MapGpaError, match="no progress in 3 tries") as caught:
        vm.guest().page_state_change(0, 3 * M2, True)
    assert caught.value.r11 == M2 and vm.counters["TDG.VP.VMCALL<MapGPA>"] == 1 + 3


def test_progress_in_between_starts_the_count_again(td: Vm) -> None:
    guest, answers = td.guest(), [0, 0, P, P, P, 2 * P, 2 * P]
    guest.map_gpa = lambda r12, r13: MapGpa(RETRY, answers.pop(0)) if answers else MapGpa(0)
    guest.page_state_change(0, M2, True)
    assert not answers


@pytest.mark.parametrize("r11", [M2, 1 << 40, SHARED])
def test_it_does_not_trust_an_r11_outside_of_the_range(td: Vm, r11: int) -> None:
    guest = td.guest()
    guest.map_gpa = lambda r12, r13: MapGpa(RETRY, r11)
    with pytest.raises(MapGpaError, match="outside"):
        guest.page_state_change(0, M2, True)


def test_any_other_status_is_a_failure(td: Vm) -> None:
    td.hypercall_exits = False
    with pytest.raises(MapGpaError) as caught:
        td.guest().page_state_change(0, M2, True)
    assert caught.value.status == SUBFUNC_UNSUPPORTED


# set_memory_*


def order(vm: Vm, *kinds: str) -> list[str]:
    return [e.kind for e in vm.events if e.kind in kinds]


def test_to_private_it_asks_accepts_and_only_then_changes_its_ptes(td: Vm) -> None:
    td.guest().set_memory_encrypted(0, P)
    assert order(td, "TDG.VP.VMCALL<MapGPA>", "TDG.MEM.PAGE.ACCEPT", "guest-flush") == [
        "TDG.VP.VMCALL<MapGPA>", "TDG.MEM.PAGE.ACCEPT", "guest-flush",
    ]  # fmt: skip


def test_to_shared_it_changes_its_ptes_and_flushes_before_it_asks_and_never_unaccepts(td: Vm) -> None:
    td.guest().set_memory_encrypted(0, P)
    td.log.events.clear()
    td.guest().set_memory_decrypted(0, P)
    assert order(td, "TDG.VP.VMCALL<MapGPA>", "TDG.MEM.PAGE.ACCEPT", "guest-flush") == [
        "guest-flush", "guest-flush", "TDG.VP.VMCALL<MapGPA>",
    ]  # fmt: skip


@pytest.mark.parametrize("to_private", [False, True])
def test_a_stray_access_in_the_window_of_either_order_meets_a_shared_mapping(to_private: bool) -> None:
    vm, seen = Vm("tdx", 8, vcpus=2), []
    if not to_private:
        vm.guest().set_memory_encrypted(0, P)

    def stray(row: Any) -> None:
        if row.call in ("mutex_lock", "mutex_unlock"):
            seen.append(int(vm.page_table.c_bits(0, 1)[0]))

    vm.on_row = stray
    (vm.guest().set_memory_encrypted if to_private else vm.guest().set_memory_decrypted)(0, P)
    assert seen and not any(seen)


def test_a_private_mapping_of_a_shared_page_instead_ends_in_an_exit_and_in_death() -> None:
    vm = Vm("tdx", 4, vmm="kill")
    vm.guest().set_private(0, True)
    with pytest.raises(MemoryFaultExit) as caught:
        vm.guest().read(0, 1)
    assert caught.value.flags == 8
    vm = Vm("tdx", 4)
    vm.guest().set_private(0, True)
    with pytest.raises(VmDead):
        vm.guest().read(0, 1)  # converted, mapped, never accepted


def test_a_linux_guest_tries_1g_2m_and_4k() -> None:
    vm = Vm("tdx", 1 << 18, private=True)
    vm.guest().set_memory_encrypted(0, 1 << 30)
    codes = [(e.code, e.times) for e in vm.events if e.kind == "TDG.MEM.PAGE.ACCEPT" and e.code]
    assert codes[0] == (0xC000010000000001, 1)
    assert sum(n for code, n in codes if code == 0xC0000B0B00000001) == 512
    assert vm.counters["TDG.MEM.PAGE.ACCEPT"] == (1 << 18) + 512 + 1


def test_pieces_that_are_not_aligned_are_accepted_4k_by_4k() -> None:
    vm = Vm("tdx", 2048, private=True)
    vm.guest().set_memory_encrypted(P, 2 * M2)
    assert vm.counters["TDG.MEM.PAGE.ACCEPT"] == 1024 + 1


def test_accepting_what_is_accepted_is_eio_and_the_memory_leaks(td: Vm) -> None:
    td.guest().set_memory_encrypted(0, P)
    with pytest.raises(SetMemoryFailed) as caught:
        td.guest().set_memory_encrypted(0, P)
    assert caught.value.errno == errno.EIO and isinstance(caught.value.why, TdxError)
    assert caught.value.why.status == Status.PAGE_ALREADY_ACCEPTED


def test_a_busy_accept_is_a_failure_too(td: Vm) -> None:
    td.fail("TDG.MEM.PAGE.ACCEPT")
    with pytest.raises(SetMemoryFailed, match="OPERAND_BUSY"):
        td.guest().set_memory_encrypted(0, P)
    assert not td.page_table.c_bits(0, 1)[0]


def test_a_refused_mapgpa_is_eio_and_going_shared_the_ptes_have_changed_already() -> None:
    vm = Vm("tdx", 4)
    vm.guest().set_memory_encrypted(0, P)
    vm.hypercall_exits = False
    with pytest.raises(SetMemoryFailed, match="SUBFUNC_UNSUPPORTED") as caught:
        vm.guest().set_memory_decrypted(0, P)
    assert isinstance(caught.value.why, MapGpaError) and not vm.page_table.c_bits(0, 1)[0]


def test_at_boot_accept_faults_pages_in_and_nobody_is_asked() -> None:
    vm = Vm("tdx", 1024, private=True)
    vm.guest().accept_range(0, 1024 * P)
    assert "exit-map-gpa-range" not in vm.counters and vm.counters["ept-violation"] == 1024


def test_a_guest_that_touches_through_the_other_kind_is_converted_by_its_access() -> None:
    vm = Vm("tdx", 4)
    vm.guest().set_memory_encrypted(0, P)
    vm.guest().write(0, b"mine")
    vm.guest().set_private(0, False)
    vm.guest().write(0, b"open")
    assert vm.host.read(0, 4) == b"open" and vm.counters["TDH.MEM.PAGE.REMOVE"] == 1


# What the KVM selftests do, as far as a TD can


def test_private_mem_kvm_exits_memslot_deleted_under_a_td() -> None:
    gpa = 0xC0000000
    vm = Vm("tdx", slots=[(gpa, P)], vmm="kill", private=True)
    vm.guest().accept(gpa)
    vm.set_user_memory_region2(0, gpa, 0)
    vm.set_user_memory_region2(1, 0, P)
    with pytest.raises(MemoryFaultExit) as caught:
        vm.guest().read(gpa, 8)
    assert (caught.value.gpa, caught.value.size, caught.value.flags) == (gpa, P, 1 << 3)


def test_private_mem_kvm_exits_memslot_not_private_under_a_td() -> None:
    vm = Vm("tdx", slots=[], vmm="kill", private=True)
    vm.set_user_memory_region2(0, 0xC0000000, P)
    vm.set_memory_attributes(0xC0000000, P, True)
    with pytest.raises(MemoryFaultExit) as caught:
        vm.guest().read(0xC0000000, 8)
    assert (caught.value.gpa, caught.value.flags) == (0xC0000000, 1 << 3)


def test_the_punching_half_of_private_mem_conversions_would_kill_a_td() -> None:
    vm = Vm("tdx", 513, private=True)
    vm.guest().accept_range(0, 513 * P)
    vm.guest().fill(0, P, 0xCC)
    vm.gmem.punch_hole(0, P)
    with pytest.raises(VmDead):  # the selftest reads zeros there: a TD has to accept again
        vm.guest().read(0, P)

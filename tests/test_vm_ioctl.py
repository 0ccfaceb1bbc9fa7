"""KVM_SET_MEMORY_ATTRIBUTES on real ranges: errno, memslots, partial stores, failing hooks, large pages."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from kvmlab.emulator import (
    Deadlock,
    GuestSpins,
    KernelBug,
    MemoryFaultExit,
    PlatformError,
    Vm,
    VmErrno,
)
from kvmlab.hw.snp import Rmpupdate

P, M2 = 4096, 1 << 21


def refusal(call: Callable[..., Any]) -> str:
    with pytest.raises(VmErrno) as caught:
        call()
    return errno.errorcode[caught.value.errno]


@pytest.mark.parametrize("design", ["upstream", "v8-post-hook"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (dict(gpa=None, size=P), "EFAULT"),
        (dict(gpa=0, size=P, flags=1), "EINVAL"),
        (dict(gpa=0, size=P, attributes=1), "EINVAL"),
        (dict(gpa=0, size=0), "EINVAL"),
        (dict(gpa=(1 << 64) - P, size=2 * P), "EINVAL"),
        (dict(gpa=1, size=P), "EINVAL"),
        (dict(gpa=0, size=P + 1), "EINVAL"),
        (dict(gpa=1 << 60, size=P), "ENOMEM"),
    ],
)
def test_bad_input_gives_the_errno_that_kvm_gives(
    design: str, arguments: dict[str, int | None], code: str
) -> None:
    vm = Vm("snp", 4, design)
    assert refusal(lambda: vm.set_memory_attributes(**arguments, private=True)) == code


def test_flags_are_checked_before_attributes_and_attributes_before_the_range() -> None:
    vm = Vm("snp", 4)
    with pytest.raises(VmErrno, match="flags"):
        vm.set_memory_attributes(1, 0, True, flags=1, attributes=1)
    with pytest.raises(VmErrno, match="attributes"):
        vm.set_memory_attributes(1, 0, True, attributes=1)


def test_a_vm_without_private_memory_takes_only_attributes_zero() -> None:
    vm = Vm("sw", 4)
    vm.supported_attributes = 0
    assert refusal(lambda: vm.set_memory_attributes(0, P, True)) == "EINVAL"
    assert vm.set_memory_attributes(0, P, False).size == 0


def test_a_uniform_range_returns_early_without_lock_or_sequence_change() -> None:
    vm = Vm("snp", 8)
    vm.set_memory_attributes(0, 8 * P, True)
    seq, zaps = vm.mmu.seq, vm.counters.get("flush")
    vm.set_memory_attributes(2 * P, P, True)
    assert (vm.mmu.seq, vm.counters.get("flush")) == (seq, zaps)


def test_v8_invalidates_a_uniform_range_all_the_same() -> None:
    vm = Vm("snp", 8, "v8-post-hook")
    vm.set_memory_attributes(0, P, False)
    assert vm.mmu.seq == 1


def test_without_a_memslot_the_merged_code_stores_and_invalidates_nothing() -> None:
    vm = Vm("snp", slots=[(0, 4 * P)])
    vm.set_memory_attributes(1 << 30, P, True)
    assert vm.attributes.is_private((1 << 30) // P) and vm.mmu.seq == 0


def test_without_a_memslot_v8_invalidates_all_the_same() -> None:
    vm = Vm("snp", design="v8-post-hook", slots=[(0, 4 * P)])
    vm.set_memory_attributes(1 << 30, P, True)
    assert vm.mmu.seq == 1


def test_v8_ops_visit_every_memslot_clipped_and_skip_holes() -> None:
    vm = Vm("snp", design="v8-post-hook", slots=[(0, 4 * P), (6 * P, 4 * P)])
    vm.set_memory_attributes(2 * P, 6 * P, True)
    assert [bool(vm.rmp.assigned(vm.pfn(g * P, True))[0]) for g in (0, 1, 2, 3, 6, 7, 8, 9)] == [
        False, False, True, True, True, True, False, False
    ]  # fmt: skip
    assert vm.counters["rmpupdate"] == 4


def test_the_window_covers_the_hull_of_all_memslots_in_the_range() -> None:
    vm, seen = Vm("snp", slots=[(0, 4 * P), (1 << 30, 4 * P)]), []
    vm.on_row = lambda row: seen.append(vm.mmu.window) if row.call == "kvm_vm_set_region_attr" else None
    vm.set_memory_attributes(P, 1 << 30, True)
    assert seen == [(1, (1 << 18) + 1)]


def test_v8_stops_at_the_failing_store_and_hands_the_rest_back() -> None:
    vm = Vm("snp", 8, "v8-post-hook")
    vm.fail("xa_store", at=3)
    assert vm.set_memory_attributes(0, 8 * P, True) == (3 * P, 5 * P)
    assert [vm.attributes.is_private(g) for g in range(8)] == [True] * 3 + [False] * 5
    assert vm.counters["rmpupdate"] == 3


def test_v8_runs_no_hook_when_the_first_store_fails() -> None:
    vm = Vm("snp", 8, "v8-post-hook")
    vm.fail("xa_store", at=0)
    assert vm.set_memory_attributes(0, 8 * P, True) == (0, 8 * P)
    assert "rmpupdate" not in vm.counters and vm.mmu.in_progress == 0


def test_the_merged_code_is_all_or_nothing() -> None:
    vm = Vm("snp", 8)
    vm.fail("xa_reserve")
    assert refusal(lambda: vm.set_memory_attributes(0, 8 * P, True)) == "ENOMEM"
    assert not vm.attributes.is_private(0) and vm.mmu.seq == 0
    vm.set_memory_attributes(0, 8 * P, True)


def test_a_store_that_fails_after_its_reservation_is_a_vm_bug() -> None:
    vm = Vm("snp", 8)
    vm.fail("xa_store", at=3)
    with pytest.raises(PlatformError):
        vm.set_memory_attributes(0, 8 * P, True)


@pytest.fixture
def failed_hook() -> Vm:
    """v8, to private, RMPUPDATE of the third of four pages fails."""
    vm = Vm("snp", 4, "v8-post-hook")
    vm.fail("rmpupdate", at=vm.pfn(2 * P, True), code=Rmpupdate.FAIL_INUSE)
    assert vm.set_memory_attributes(0, 4 * P, True).size == 0
    vm.guest().set_private(0, True, 4 * P)
    return vm


def test_a_failing_hook_only_warns_and_the_ioctl_succeeds(failed_hook: Vm) -> None:
    assert [e.code for e in failed_hook.events if e.kind == "warn"] == [Rmpupdate.FAIL_INUSE]


def test_a_failing_hook_leaves_the_pages_before_it_converted(failed_hook: Vm) -> None:
    guest = failed_hook.guest()
    guest.pvalidate(P, True)
    guest.write(P, b"mine")
    assert guest.read(P, 4) == b"mine"


@pytest.mark.parametrize("page", [2, 3])
def test_after_a_failing_hook_a_private_access_spins_from_the_failing_page_on(
    failed_hook: Vm, page: int
) -> None:
    with pytest.raises(GuestSpins, match="RMP fault"):
        failed_hook.guest().pvalidate(page * P, True)


def test_after_a_failing_hook_its_page_stays_out_of_the_directmap_and_those_behind_were_not_begun(
    failed_hook: Vm,
) -> None:
    with pytest.raises(KernelBug, match="not present"):
        failed_hook.host.directmap_write(failed_hook.pfn(2 * P, True))
    failed_hook.host.directmap_write(failed_hook.pfn(3 * P, True))


def test_after_a_failing_hook_a_shared_access_exits_and_converts_back(failed_hook: Vm) -> None:
    guest = failed_hook.guest()
    guest.set_private(2 * P, False)
    guest.write(2 * P, b"x")
    assert not failed_hook.attributes.is_private(2)


def test_going_shared_with_a_failing_hook_leaves_the_page_the_guests() -> None:
    vm = Vm("snp", 4, "v8-post-hook")
    vm.set_memory_attributes(0, 4 * P, True)
    vm.fail("rmpupdate", at=vm.pfn(2 * P, True))
    vm.set_memory_attributes(0, 4 * P, False)
    assert [bool(vm.rmp.assigned(vm.pfn(g * P, True))[0]) for g in range(4)] == [False, False, True, True]
    vm.guest().write(2 * P, b"split backing: the shared PFN was never assigned")


def test_a_failing_rmpupdate_at_a_private_fault_makes_kvm_run_fail() -> None:
    vm = Vm("snp", 4, private=True)
    vm.fail("rmpupdate", at=vm.pfn(0, True))
    assert refusal(lambda: vm.guest().pvalidate(0, True)) == "EINVAL"


def test_a_fault_inside_the_window_retries_until_it_closes() -> None:
    vm, spun = Vm("snp", 4), []

    def fault(row: Any) -> None:
        if row.call == "kvm_vm_set_region_attr":
            with pytest.raises(GuestSpins, match="RET_PF_RETRY") as caught:
                vm.guest().write(0, b"x")
            spun.append(caught.value)

    vm.on_row = fault
    vm.set_memory_attributes(0, P, True)
    assert spun and vm.counters["retry"] > 1


def test_a_fault_waits_while_the_ioctl_holds_mmu_lock() -> None:
    vm = Vm("snp", 4)

    def fault(row: Any) -> None:
        if row.call == "kvm_unmap_gfn_range":
            with pytest.raises(Deadlock, match="mmu_lock"):
                vm.guest().write(0, b"x")

    vm.on_row = fault
    vm.set_memory_attributes(0, P, True)


def test_userspace_may_kill_rerun_or_convert() -> None:
    for policy, error in (("kill", MemoryFaultExit), ("rerun", GuestSpins)):
        vm = Vm("snp", 4, vmm=policy)
        vm.guest().set_private(0, True)
        with pytest.raises(error):
            vm.guest().pvalidate(0, True)
    vm = Vm("snp", 4, vmm="convert")
    vm.guest().set_private(0, True)
    vm.guest().pvalidate(0, True)
    assert vm.attributes.is_private(0)


def test_the_merged_rmpupdate_repeats_for_ever_on_overlap() -> None:
    vm = Vm("snp", 4, private=True)
    vm.fail("rmpupdate", at=vm.pfn(0, True), code=Rmpupdate.FAIL_OVERLAP)
    with pytest.raises(PlatformError, match="for ever"):
        vm.guest().pvalidate(0, True)


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        (lambda: Vm("snp"), ValueError),
        (lambda: Vm("snp", -1), ValueError),
        (lambda: Vm("snp", 4, vmm="ask"), ValueError),
        (lambda: Vm("snp", 4, discard="later"), ValueError),
        (lambda: Vm("snp", 4).guest(1), ValueError),
        (lambda: Vm("snp", 4).guest().read(-1, 1), ValueError),
        (lambda: Vm("snp", 4).guest().read(1 << 60, 1), ValueError),
        (lambda: Vm("snp", 4).guest().pvalidate(0, True, 8192), ValueError),
        (lambda: Vm("snp", 4).fail("everything"), ValueError),
        (lambda: Vm("snp", 4).pfn(1 << 30, True), ValueError),
        (lambda: Vm("snp", slots=[]).gmem, ValueError),
        (lambda: Vm("snp", slots=[(0, P), (0, P)]), VmErrno),
        (lambda: Vm("snp", slots=[(1, P)]), VmErrno),
        (lambda: Vm("snp", slots=[(1 << 50, P)]), VmErrno),
        (lambda: Vm("snp", 4).set_memory_attributes(-P, P, True), VmErrno),
        (lambda: Vm("snp", 4).set_memory_attributes(0, -P, True), VmErrno),
        (lambda: Vm("snp", 4).create_guest_memfd(1 << 60), VmErrno),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(call: Callable[..., Any], wrong: type[Any]) -> None:
    with pytest.raises(wrong) as caught:
        call()
    assert str(caught.value)


def test_a_fault_with_an_older_snapshot_retries_whatever_its_gfn() -> None:
    vm = Vm("snp", 4)

    def once(row: Any) -> None:
        if row.call == "kvm_gmem_get_pfn" and vm.mmu.seq == 0:
            vm.set_memory_attributes(3 * P, P, True)

    vm.on_row = once
    vm.guest().write(0, b"x")
    assert vm.counters["retry"] == 1


def test_going_shared_with_a_failing_hook_restores_the_directmap_only_before_the_failure() -> None:
    vm = Vm("snp", 4, "v8-post-hook")
    vm.set_memory_attributes(0, 4 * P, True)
    vm.fail("rmpupdate", at=vm.pfn(2 * P, True))
    vm.set_memory_attributes(0, 4 * P, False)
    assert vm.directmap.absent[vm.pfn(0, True) :][:4].tolist() == [0, 0, 1, 1]


def test_a_row_that_the_first_page_skips_is_told_when_another_page_comes_to_it() -> None:
    vm, rows = Vm("snp", 4, "v8-post-hook"), list[str]()
    vm.set_memory_attributes(P, 3 * P, True)
    vm.on_row = lambda row: rows.append(row.call)
    vm.set_memory_attributes(
        0, 4 * P, False
    )  # nothing is to be restored for the page that was never assigned
    assert "kvm_map_directmap" in rows and not vm.directmap.absent[vm.pfn(0, True) :][:4].any()

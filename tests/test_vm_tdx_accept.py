"""tdx: ACCEPT, all that it may find and answer, and what touching an unaccepted page does."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kvmlab.emulator import (
    GuestSpins,
    MemoryFaultExit,
    ShutdownExit,
    TdxError,
    VeFault,
    Vm,
    VmDead,
    VmError,
    VmSwitches,
)
from kvmlab.hw import tdx
from kvmlab.hw.tdx import Leaf, Level, Operand, Status
from kvmlab.hw.tdx.pamt import PageType
from kvmlab.hw.tdx.sept import State

P, M2, G1 = 4096, 1 << 21, 1 << 30
ACCEPT = "TDG.MEM.PAGE.ACCEPT"


def private(pages: int = 1024, **more: Any) -> Vm:
    """A TD whose memory is private and FREE, as at boot."""
    return Vm("tdx", pages, private=True, **more)


def pending(vm: Vm, gfn: Any = 0) -> Vm:
    """Let KVM map a page that the guest has not accepted: an ACCEPT of its 2M does."""
    with pytest.raises(TdxError):
        vm.guest().accept(gfn * P, M2)
    assert vm.tdx.module.entry(gfn) == State.PENDING
    return vm


def codes(vm: Vm, kind: str) -> list[int | None]:
    return [e.code for e in vm.events if e.kind == kind]


# What ACCEPT finds


def test_accept_of_a_pending_page_zeroes_and_maps_it() -> None:
    vm = pending(private())
    before = vm.counters["ept-violation"]
    vm.guest().accept(0)
    assert vm.tdx.module.entry(0) == State.MAPPED and vm.guest().read(0, P) == bytes(P)
    assert vm.counters["ept-violation"] == before


def test_accept_of_a_free_page_leaves_the_td_faults_and_runs_again() -> None:
    vm = private()
    vm.guest().accept(0)
    kinds = [e.kind for e in vm.events]
    assert kinds == [
        "TDH.VP.ENTER", "ept-violation", "gmem-alloc", "TDH.MEM.SEPT.ADD", "clflush", "TDH.MEM.PAGE.AUG",
        "TDH.VP.ENTER", ACCEPT,
    ]  # fmt: skip


def test_accept_of_a_mapped_page_is_already_accepted_with_the_level_in_the_low_word() -> None:
    vm = private()
    vm.guest().accept(0)
    with pytest.raises(TdxError) as caught:
        vm.guest().accept(0)
    assert caught.value.rax == 0x00000B0A00000000 | Level.PT and caught.value.kind == tdx.WARNING
    assert caught.value.status == Status.PAGE_ALREADY_ACCEPTED and "ALREADY_ACCEPTED" in str(caught.value)


def test_accept_of_2m_over_a_4k_table_is_a_size_mismatch() -> None:
    vm = private()
    vm.guest().accept(3 * P)
    with pytest.raises(TdxError) as caught:
        vm.guest().accept(0, M2)
    assert caught.value.rax == 0xC0000B0B00000000 | Level.PD
    assert vm.counters["ept-violation"] == 1


@pytest.mark.parametrize("large", [False, True])
def test_accept_of_2m_without_a_table_faults_first_and_kvm_maps_4k_whatever_the_backing(large: bool) -> None:
    vm = private(private_2m=large)
    with pytest.raises(TdxError) as caught:
        vm.guest().accept(M2, M2)
    assert caught.value.status == Status.PAGE_SIZE_MISMATCH
    assert vm.counters["ept-violation"] == vm.counters["TDH.MEM.PAGE.AUG"] == 1


@pytest.mark.parametrize(("gpa", "size"), [(0, G1), (P, M2), (7, P), (1 << 47, P), (1 << 48, P)])
def test_accept_of_1g_of_an_odd_or_of_a_shared_address_is_operand_invalid(gpa: int, size: int) -> None:
    with pytest.raises(TdxError) as caught:
        private().guest().accept(gpa, size)
    assert caught.value.rax == tdx.with_operand(Status.OPERAND_INVALID, Operand.RCX)


def test_accept_takes_the_sizes_that_it_has() -> None:
    with pytest.raises(ValueError, match="4096"):
        private().guest().accept(0, 8192)


def test_accept_of_a_blocked_page_leaves_the_td() -> None:
    vm = private(design="tdx-no-remove")
    vm.guest().accept(0)
    vm.set_memory_attributes(0, P, False)
    assert vm.tdx.module.entry(0) == State.BLOCKED
    vm.set_memory_attributes(0, P, True)
    with pytest.raises(VmError, match="EPT_ENTRY_STATE_INCORRECT"):
        vm.guest().accept(0)  # AUG over it
    assert codes(vm, "ept-violation")[-1] is not None


def test_accept_of_a_pending_page_that_was_blocked_leaves_the_td() -> None:
    vm = pending(private(design="tdx-no-remove"))
    vm.set_memory_attributes(0, P, False)
    assert vm.tdx.module.entry(0) == State.PENDING_BLOCKED
    vm.set_memory_attributes(0, P, True)
    with pytest.raises(VmError, match="EPT_ENTRY_STATE_INCORRECT"):
        vm.guest().accept(0)


def test_accept_that_meets_the_entry_lock_is_busy() -> None:
    vm = private()
    vm.fail(ACCEPT)
    with pytest.raises(TdxError) as caught:
        vm.guest().accept(0)
    assert caught.value.rax == 0x8000020000000001 and caught.value.kind == tdx.RETRY
    vm.guest().accept(0)


def test_accept_of_a_shared_page_is_an_implicit_conversion() -> None:
    vm = Vm("tdx", 4)
    vm.guest().accept(0)
    assert vm.attributes.is_private(0) and vm.counters["exit-memory-fault"] == 1


@pytest.mark.parametrize(("vmm", "end"), [("rerun", GuestSpins), ("kill", MemoryFaultExit)])
def test_accept_of_a_shared_page_gets_nowhere_if_userspace_does_not_convert(vmm: str, end: type[Any]) -> None:
    with pytest.raises(end):
        Vm("tdx", 4, vmm=vmm).guest().accept(0)


def test_no_leaf_is_ever_larger_than_4k() -> None:
    vm = private(private_2m=True, shared_2m=True)
    vm.guest().set_memory_encrypted(0, 2 * M2)
    assert {vm.tdx.module.entry(g) for g in range(1024)} == {State.MAPPED}
    assert vm.counters["TDH.MEM.PAGE.AUG"] == 1024


def test_accept_is_tdxs() -> None:
    with pytest.raises(VmError, match="needs platform tdx, not snp"):
        Vm("snp", 4).guest().accept(0)


# What backs it


def test_each_2m_region_has_its_table_and_the_levels_above_have_theirs() -> None:
    vm = private(3 * 512)
    vm.guest().accept_range(0, 3 * M2)
    assert vm.counters["TDH.MEM.SEPT.ADD"] == 3 + 1 + 1
    kinds = [vm.tdx.module.pamt_entry(pfn).type for pfn in vm.tdx.module.table_at]
    assert kinds == [PageType.EPT] * 5


def test_a_table_is_added_once() -> None:
    vm = private()
    vm.guest().accept(0)
    vm.guest().accept(P)
    assert vm.counters["TDH.MEM.SEPT.ADD"] == 3


def test_aug_makes_the_page_the_tds_and_remove_gives_it_back() -> None:
    vm = private()
    pfn = vm.pfn(0, True)
    assert vm.tdx.module.pamt_entry(pfn).type == PageType.NDA
    vm.guest().accept(0)
    assert vm.tdx.module.pamt_entry(pfn) == (PageType.REG, 1, 0)
    vm.set_memory_attributes(0, P, False)
    assert vm.tdx.module.pamt_entry(pfn).type == PageType.NDA


def test_a_page_that_is_in_a_td_already_is_refused_by_its_pamt_entry() -> None:
    vm = private()
    vm.guest().accept(0)
    vm.tdx.module.pamt[vm.pfn(P, True)] = PageType.REG
    with pytest.raises(VmError, match=r"PAGE_METADATA_INCORRECT \| R8"):
        vm.guest().accept(P)


# PENDING


@pytest.mark.parametrize("op", ["read", "write"])
def test_touching_a_pending_page_kills_the_vm_and_every_call_gives_eio(op: str) -> None:
    vm = pending(private())
    with pytest.raises(VmDead) as caught:
        vm.guest().read(0, 1) if op == "read" else vm.guest().write(0, b"x")
    assert caught.value.errno == errno.EIO and codes(vm, "ept-violation")[-1] == 6
    for call in (lambda: vm.guest().accept(0), lambda: vm.set_memory_attributes(0, P, False)):
        with pytest.raises(VmDead):
            call()


def test_touching_a_free_private_page_maps_it_pending_and_so_kills_the_vm() -> None:
    vm = private()
    with pytest.raises(VmDead):
        vm.guest().write(0, b"x")
    assert vm.tdx.module.entry(0) == State.PENDING and vm.counters["TDH.MEM.PAGE.AUG"] == 1


def test_with_the_2026_code_it_is_a_shutdown_exit() -> None:
    vm = pending(private(switches=VmSwitches(pending_is_shutdown=True)))
    with pytest.raises(ShutdownExit):
        vm.guest().read(0, 1)
    vm.guest().accept(0)


def test_without_sept_ve_disable_it_is_a_ve_in_the_guest() -> None:
    vm = pending(private(switches=VmSwitches(sept_ve_disable=False)))
    with pytest.raises(VeFault):
        vm.guest().read(0, 1)


# The entry's lock, held by ACCEPT


def test_a_zap_while_accept_holds_the_entry_is_busy_kicks_and_goes_on() -> None:
    vm = private(vcpus=2)
    vm.guest().accept(0)
    vm.guest().accept(2 * P)

    def convert(point: Any) -> None:
        if point == Leaf.ACCEPT:
            vm.set_memory_attributes(0, P, False)

    vm.on_point = convert
    with pytest.raises(TdxError):
        vm.guest(1).accept(0)
    assert vm.counters["seamcall-busy"] == 1 and codes(vm, "TDH.MEM.RANGE.BLOCK") == [0x8000020000000001, 0]
    assert vm.tdx.module.entry(0) == State.FREE


def test_a_track_while_a_vcpu_is_in_vp_enter_is_busy_kicks_and_goes_on() -> None:
    vm = private(vcpus=2)
    vm.guest().accept(0)
    vm.on_point = lambda point: vm.set_memory_attributes(0, P, False) and None
    vm.guest(1).touch(P, 0)
    vm.guest(1).accept(3 * P)
    assert codes(vm, "TDH.MEM.TRACK") == [0x80000200000000A9, 0] and vm.counters["seamcall-busy"] == 1


def test_two_vcpus_may_not_accept_one_page_at_once() -> None:
    vm = private(vcpus=2)
    vm.guest().accept(3 * P)
    said = []

    def other(point: Any) -> None:
        if point == Leaf.ACCEPT:
            with pytest.raises(TdxError) as caught:
                vm.guest(1).accept(4 * P)
            said.append(caught.value.rax)

    vm.on_point = other
    vm.guest(0).accept(4 * P)
    assert said[-1] == 0x8000020000000001


def test_a_vcpu_that_meets_a_frozen_spte_retries() -> None:
    vm, said = private(vcpus=2), []
    vm.guest().accept(P)

    def other(row: Any) -> None:
        if row.call == "tdh_mem_page_aug":
            with pytest.raises(GuestSpins, match="RET_PF_RETRY"):
                vm.guest(1).accept(0)
            said.append(vm.counters["retry"])

    vm.on_row = other
    vm.guest(0).accept(0)
    assert said == [8] and vm.tdx.module.entry(0) == State.MAPPED

"""The guest's side: right and wrong orders of a conversion, and page state changes by MSR and by buffer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvmlab.emulator import (
    GuestSpins,
    GuestTerminated,
    InstructionError,
    MemoryFaultExit,
    PscError,
    VcFault,
    Vm,
    VmError,
    psc,
)
from kvmlab.hw.snp import Pvalidate

P, M2 = 4096, 1 << 21


@pytest.fixture
def shared() -> Vm:
    return Vm("snp", 8)


@pytest.fixture
def accepted() -> Vm:
    """Page 0 is private, accepted and holds b"secret"."""
    vm = Vm("snp", 8)
    vm.guest().set_memory_encrypted(0, P)
    vm.guest().write(0, b"secret")
    return vm


def kinds(vm: Vm) -> list[str]:
    return [e.kind for e in vm.events]


# The right orders


def test_a_linux_guest_goes_private_and_back_and_the_host_sees_only_the_shared_side() -> None:
    vm = Vm("snp", 1024, discard="after")
    guest = vm.guest()
    guest.write(M2 - 2, b"open")
    guest.set_memory_encrypted(0, 2 * M2)
    guest.write(M2 - 2, b"mine")
    assert guest.read(M2 - 2, 4) == b"mine" and vm.host.read(M2 - 2, 4) == bytes(4)
    guest.set_memory_decrypted(0, 2 * M2)
    guest.write(0, b"for the host")
    assert vm.host.read(0, 12) == b"for the host"
    assert vm.counters["rmpupdate"] == 2 * 1024 and vm.resident() == {"shared": 3, "private": 0}


def test_accept_orders_psc_before_pvalidate_and_rescind_before_psc(accepted: Vm) -> None:
    order = [k for k in kinds(accepted) if k in ("guest-flush", "psc-buffer", "pvalidate")]
    assert order == ["guest-flush", "psc-buffer", "pvalidate"]
    accepted.log.events.clear()
    accepted.guest().set_memory_decrypted(0, P)
    order = [k for k in kinds(accepted) if k in ("guest-flush", "psc-buffer", "pvalidate")]
    assert order == ["pvalidate", "psc-buffer", "guest-flush"]


# The wrong ones


def test_private_access_before_pvalidate_is_vc(shared: Vm) -> None:
    guest = shared.guest()
    guest.set_private(0, True)
    guest.page_state_change(0, P, True)
    with pytest.raises(VcFault):
        guest.write(0, b"x")


def test_pvalidate_before_psc_private_is_an_implicit_conversion(shared: Vm) -> None:
    guest = shared.guest()
    guest.set_private(0, True)
    guest.pvalidate(0, True)
    assert shared.attributes.is_private(0) and shared.counters["exit-memory-fault"] == 1


def test_pvalidate_before_psc_private_loops_if_userspace_ignores_it() -> None:
    vm = Vm("snp", 8, vmm="rerun")
    vm.guest().set_private(0, True)
    with pytest.raises(GuestSpins, match="MEMORY_FAULT"):
        vm.guest().pvalidate(0, True)


def test_psc_shared_before_rescind_flips_the_page_back_to_private(accepted: Vm) -> None:
    guest = accepted.guest()
    guest.page_state_change(0, P, False)
    guest.pvalidate(0, False)
    assert accepted.attributes.is_private(0)


def test_c_cleared_before_psc_shared_then_write_is_an_implicit_conversion(accepted: Vm) -> None:
    guest = accepted.guest()
    guest.set_private(0, False)
    guest.write(0, b"x")
    assert not accepted.attributes.is_private(0) and accepted.host.read(0, 1) == b"x"


def test_c_cleared_before_psc_shared_then_read_is_silent_ciphertext(accepted: Vm) -> None:
    guest = accepted.guest()
    guest.set_private(0, False)
    assert guest.read(0, 6) not in (b"secret", bytes(6)) and "exit-memory-fault" not in kinds(accepted)[-1]


def test_rescind_skipped_and_nothing_freed_pvalidate_finds_no_change(accepted: Vm) -> None:
    guest = accepted.guest()
    guest.page_state_change(0, P, False)
    guest.page_state_change(0, P, True)
    with pytest.raises(InstructionError) as caught:
        guest.pvalidate(0, True)
    assert caught.value.status == Pvalidate.NOUPDATE
    with pytest.raises(GuestTerminated) as ended:
        guest.set_memory_encrypted(0, P)
    assert ended.value.reason == 2


def test_rescind_done_and_nothing_freed_the_old_content_is_readable(accepted: Vm) -> None:
    guest = accepted.guest()
    guest.set_memory_decrypted(0, P)
    guest.set_memory_encrypted(0, P)
    assert guest.read(0, 6) == b"secret"


def test_punching_between_makes_the_old_content_noise(accepted: Vm) -> None:
    guest = accepted.guest()
    guest.set_memory_decrypted(0, P)
    accepted.gmem.punch_hole(0, P)
    guest.set_memory_encrypted(0, P)
    assert guest.read(0, 6) not in (b"secret", bytes(6))


def test_pvalidate_on_a_page_just_shared_faults_and_converts_it_back(accepted: Vm) -> None:
    guest = accepted.guest()
    guest.set_memory_decrypted(0, P)
    guest.set_private(0, True)
    guest.pvalidate(0, True)
    assert accepted.attributes.is_private(0)


def test_a_guest_that_never_asks_is_converted_by_its_accesses() -> None:
    vm = Vm("snp", 8)
    guest = vm.guest()
    guest.set_private(0, True)
    with pytest.raises(VcFault):
        guest.write(0, b"x")
    guest.pvalidate(0, True)
    guest.write(0, b"x")
    guest.set_private(0, False)
    guest.write(0, b"y")
    assert [e.code for e in vm.events if e.kind == "exit-memory-fault"] == [8, 0]


def test_all_vcpus_share_one_page_table() -> None:
    vm = Vm("snp", 8, vcpus=2)
    vm.guest(0).set_memory_encrypted(0, P)
    vm.guest(1).write(0, b"from the other")
    assert vm.guest(0).read(0, 14) == b"from the other"


# PSC by MSR


def msr(gfn: int, op: int) -> int:
    return psc.MSR_REQUEST | gfn << 12 | op << 52


def test_psc_by_msr_converts_one_page(shared: Vm) -> None:
    assert shared.guest().psc_msr(msr(3, psc.PRIVATE)) == psc.MSR_RESPONSE
    assert [shared.attributes.is_private(g) for g in (2, 3, 4)] == [False, True, False]
    assert shared.guest().psc_msr(msr(3, psc.SHARED)) == psc.MSR_RESPONSE
    assert not shared.attributes.is_private(3)


def test_psc_by_msr_refuses_a_bad_operation_without_an_exit(shared: Vm) -> None:
    response = shared.guest().psc_msr(msr(3, 5))
    assert response & 0xFFF == 0x015 and response >> 32 and "exit-map-gpa-range" not in shared.counters


@pytest.mark.parametrize("ask", ["psc_msr", "page_state_change"])
def test_psc_fails_if_userspace_did_not_enable_the_exit(shared: Vm, ask: str) -> None:
    shared.hypercall_exits = False
    if ask == "psc_msr":
        assert shared.guest().psc_msr(msr(0, psc.PRIVATE)) >> 32
    else:
        with pytest.raises(PscError):
            shared.guest().page_state_change(0, P, True)


# PSC by buffer


def buffer(*entries: tuple[int, ...]) -> Any:
    return np.array([cur | gfn << 12 | op << 52 | large << 56 for gfn, op, large, cur in entries], np.uint64)


def test_a_psc_header_beyond_253_entries_is_refused(shared: Vm) -> None:
    assert shared.guest().psc_buffer(0, 253, buffer(*[(0, 1, 0, 0)] * 254)) == psc.BAD_HEADER


def test_a_psc_header_with_nothing_left_to_do_succeeds(shared: Vm) -> None:
    assert shared.guest().psc_buffer(1, 0, buffer((0, 1, 0, 0))) == 0 and not shared.attributes.is_private(0)


@pytest.mark.parametrize("bad", [(1, 1, 1, 0), (0, 1, 0, 2), (0, 1, 1, 513)])
def test_a_bad_psc_entry_is_refused_after_those_before_it_were_done(bad: tuple[int, ...]) -> None:
    vm = Vm("snp", 1024)
    assert vm.guest().psc_buffer(0, 1, buffer((700, 1, 0, 0), bad)) == psc.BAD_ENTRY
    assert vm.attributes.is_private(700) and not vm.attributes.is_private(1)


def test_adjacent_entries_make_one_exit_and_others_make_their_own() -> None:
    vm = Vm("snp", 1024)
    entries = buffer((0, 1, 0, 0), (1, 1, 0, 0), (3, 1, 0, 0), (4, 2, 0, 0), (512, 1, 1, 0), (2, 1, 0, 0))
    assert vm.guest().psc_buffer(0, 5, entries) == 0
    assert vm.counters["exit-map-gpa-range"] == 5
    assert (entries & np.uint64(0xFFF)).tolist() == [1, 1, 1, 1, 512, 1]


def test_a_partly_done_2m_entry_goes_on_and_a_done_one_is_skipped() -> None:
    vm = Vm("snp", 1024)
    assert vm.guest().psc_buffer(0, 1, buffer((0, 1, 1, 500), (512, 1, 1, 512))) == 0
    assert [vm.attributes.is_private(g) for g in (499, 500, 511, 512)] == [False, True, True, False]


def test_smash_and_unsmash_count_as_done_with_no_effect(shared: Vm) -> None:
    assert shared.guest().psc_buffer(0, 1, buffer((0, 3, 0, 0), (1, 4, 0, 0))) == 0
    assert "exit-map-gpa-range" not in shared.counters


def test_a_refusing_userspace_is_the_generic_error(shared: Vm) -> None:
    shared.fail("xa_reserve")
    assert shared.guest().psc_buffer(0, 0, buffer((0, 1, 0, 0))) == psc.GENERIC


def test_a_linux_guest_terminates_when_psc_is_refused(shared: Vm) -> None:
    shared.fail("xa_reserve")
    with pytest.raises(GuestTerminated) as ended:
        shared.guest().set_memory_encrypted(0, P)
    assert ended.value.reason == 1


# Platforms


@pytest.mark.parametrize("platform", ["sev", "sw"])
def test_pvalidate_and_psc_are_snps(platform: str) -> None:
    with pytest.raises(VmError, match="needs platform snp"):
        Vm(platform, 4).guest().pvalidate(0, True)


def test_on_sev_the_host_reads_ciphertext_of_what_was_written_with_the_c_bit() -> None:
    vm = Vm("sev", 4)
    vm.guest().set_private(0, True)
    vm.guest().write(0, b"secret")
    assert vm.host.read(0, 6) != b"secret" and vm.guest().read(0, 6) == b"secret"


def test_on_sw_everything_is_clear() -> None:
    vm = Vm("sw", 4, private=True)
    vm.guest().write(0, b"secret")
    assert vm.host.directmap_read(vm.pfn(0, True), 6) == b"secret" and vm.host.read(0, 6) == bytes(6)


def test_a_private_exit_without_guest_memfd_cannot_be_converted_away() -> None:
    vm = Vm("snp", slots=[])
    vm.set_user_memory_region2(0, 0, 4 * P)
    vm.guest().set_private(0, True)
    with pytest.raises(MemoryFaultExit):
        vm.guest().read(0, 1)


def test_what_is_left_of_a_partly_done_2m_entry_merges_with_4k_entries_only() -> None:
    vm = Vm("snp", 2048)
    vm.guest().psc_buffer(0, 2, buffer((0, 1, 1, 500), (512, 1, 0, 0), (1024, 1, 1, 0)))
    assert vm.counters["exit-map-gpa-range"] == 2
    vm.guest().psc_buffer(0, 1, buffer((0, 2, 1, 500), (512, 2, 1, 0)))
    assert vm.counters["exit-map-gpa-range"] == 4

"""RMPUPDATE, PSMASH, PVALIDATE and RMPADJUST with page sizes and VMPLs, each alone and then through a Vm."""

from __future__ import annotations

from typing import Any

import pytest
from vm_tools import BIG, M2, OURS, VALID, P, private_vm, pvalidate

from kvmlab.emulator import (
    GpFault,
    GuestSpins,
    InstructionError,
    Vm,
    VmplFault,
)
from kvmlab.hw import snp
from kvmlab.hw.snp import HYPERVISOR, PG_2M, PG_4K, Npf, Pvalidate, RmpEntry, Rmpupdate
from kvmlab.hw.snp import pages as snp_pages
from kvmlab.hw.snp.pages import SIZEM, rmpupdate_at

# RMPUPDATE


@pytest.mark.parametrize(
    ("old", "new", "more", "code"),
    [
        (HYPERVISOR, OURS, {}, "OK"),
        (VALID, HYPERVISOR, {}, "OK"),
        (VALID._replace(immutable=True), HYPERVISOR, {}, "FAIL_PERMISSION"),
        (OURS, HYPERVISOR, {"locked": True}, "FAIL_INUSE"),
        (HYPERVISOR, OURS._replace(size=PG_2M), {"others": True}, "FAIL_OVERLAP"),
        (BIG, OURS, {"part": True}, "FAIL_OVERLAP"),
        (BIG, OURS, {}, "FAIL_OVERLAP"),
        (BIG, OURS, {"resizes": True}, "OK"),
        (HYPERVISOR, OURS._replace(size=PG_2M), {"part": True}, "FAIL_INPUT"),
        (HYPERVISOR, RmpEntry(assigned=True), {}, "FAIL_INPUT"),
        (HYPERVISOR, OURS._replace(validated=True), {}, "FAIL_INPUT"),
        (HYPERVISOR, OURS._replace(vmsa=True), {}, "FAIL_INPUT"),
        (VALID, RmpEntry(immutable=True), {}, "FAIL_INPUT"),
        (HYPERVISOR, OURS, {"covered": False}, "FAIL_INPUT"),
        (HYPERVISOR, HYPERVISOR, {"covered": False, "locked": True}, "FAIL_INPUT"),
        (HYPERVISOR, OURS, {"aligned": False}, "FAIL_INPUT"),
        (HYPERVISOR, OURS, {"part": True}, "OK"),
        (OURS, OURS, {"others": True}, "OK"),
        (BIG, BIG._replace(validated=False), {"others": True}, "FAIL_OVERLAP"),
        (BIG, BIG._replace(validated=False), {}, "OK"),
        (OURS, BIG._replace(validated=False), {}, "OK"),
        (VALID._replace(immutable=True), OURS._replace(vmsa=True), {"locked": True}, "FAIL_INPUT"),
        (VALID._replace(immutable=True), OURS, {"locked": True}, "FAIL_INUSE"),
    ],
)
def test_rmpupdate_answers(old: RmpEntry, new: RmpEntry, more: dict[str, bool], code: str) -> None:
    assert rmpupdate_at(old, new, **more)[0].name == code


@pytest.mark.parametrize("new", [OURS._replace(gpa=8), OURS._replace(asid=2), HYPERVISOR])
def test_reassigning_deassigning_and_a_new_gpa_clear_validated(new: RmpEntry) -> None:
    assert not rmpupdate_at(VALID, new)[1].validated


def test_a_page_size_change_clears_validated() -> None:
    assert not rmpupdate_at(VALID, OURS._replace(size=PG_2M))[1].validated


def test_an_identical_rmpupdate_keeps_validated_unless_told_otherwise() -> None:
    assert rmpupdate_at(VALID, OURS) == (Rmpupdate.OK, VALID)


def test_a_2m_entry_cannot_begin_within_another() -> None:
    assert (
        snp_pages.OVERLAP(asked=PG_2M, under="part of 2M", others=False, resizes=False)
        == Rmpupdate.FAIL_INPUT
    )


@pytest.mark.parametrize("keeps", [True, False])
def test_an_identical_rmpupdate_keeps_validated_only_by_the_switch(keeps: bool) -> None:
    assert rmpupdate_at(VALID, OURS, identical_keeps_validated=keeps)[1].validated is keeps


def test_the_arrays_answer_as_the_scalar_rule_does() -> None:
    vm = Vm("snp", 8)
    vm.rmp.update(512, 8, 100)
    vm.rmp.pvalidate(513, 2, 101, True, PG_4K, False)
    vm.rmp.put(515, RmpEntry(True, 2, 7))
    before = [vm.rmp.entry(p) for p in range(512, 520)]
    vm.rmp.update(512, 8, 100)
    want = [snp.rmpupdate(old, snp.assigned_to(1, 100 + i))[1] for i, old in enumerate(before)]
    assert [vm.rmp.entry(p) for p in range(512, 520)] == want


def test_a_range_stops_at_the_first_entry_that_fails() -> None:
    vm = Vm("snp", 8)
    vm.rmp.put(515, RmpEntry(True, 0, 0, immutable=True))
    assert vm.rmp.update(512, 8, 0) == (3, Rmpupdate.FAIL_PERMISSION)
    assert vm.rmp.assigned(512, 8).tolist() == [True] * 4 + [False] * 4


def test_2m_over_an_assigned_4k_entry_overlaps() -> None:
    vm = Vm("snp", 1024)
    vm.rmp.update(512 + 5, 1, 5)
    assert vm.rmp.update(512, 512, 0, PG_2M) == (0, Rmpupdate.FAIL_OVERLAP)
    assert vm.rmp.update(1024, 512, 512, PG_2M) == (512, Rmpupdate.OK)


def test_beyond_the_rmps_end_a_page_is_the_hypervisors_and_cannot_be_assigned() -> None:
    vm = Vm("snp", 8)
    end = len(vm.rmp.state)
    assert vm.rmp.entry(end) == vm.rmp.entry(-1) == HYPERVISOR
    assert vm.rmp.update(end - 2, 4, 0) == (2, Rmpupdate.FAIL_INPUT)
    assert vm.rmp.update(end, 1, 0) == vm.rmp.update(-1, 1, 0) == (0, Rmpupdate.FAIL_INPUT)
    assert vm.rmp.psmash(end + 512 - end % 512) == Rmpupdate.FAIL_INPUT


def test_a_2m_rmpupdate_within_a_region_is_fail_input() -> None:
    assert Vm("snp", 2048).rmp.update(513, 512, 1, PG_2M) == (0, Rmpupdate.FAIL_INPUT)


# PSMASH


def test_psmash_keeps_validated_and_gives_consecutive_gpas() -> None:
    vm = Vm("snp", 512)
    vm.rmp.update(512, 512, 1024, PG_2M)
    vm.rmp.pvalidate(512, 512, 1024, True, PG_2M, True)
    assert vm.rmp.psmash(512) == Rmpupdate.OK
    assert vm.rmp.entry(512 + 9) == RmpEntry(True, 1, 1024 + 9, PG_4K, validated=True)


@pytest.mark.parametrize(
    ("entry", "more", "code"),
    [(BIG, {}, "OK"), (BIG, {"locked": True}, "FAIL_INUSE"), (VALID, {}, "FAIL_INPUT"),
     (BIG, {"part": True}, "FAIL_INPUT"), (HYPERVISOR, {}, "FAIL_INPUT"),
     (BIG, {"covered": False}, "FAIL_INPUT"), (BIG, {"aligned": False, "locked": True}, "FAIL_INPUT")],
)  # fmt: skip
def test_psmash_answers(entry: RmpEntry, more: dict[str, bool], code: str) -> None:
    assert snp_pages.psmash_at(entry, **more)[0].name == code


# PVALIDATE


@pytest.mark.parametrize(
    ("entry", "more", "answer"),
    [
        (OURS, {}, Pvalidate.OK),
        (VALID, {}, Pvalidate.NOUPDATE),
        (OURS, {"validate": False}, Pvalidate.NOUPDATE),
        (HYPERVISOR, {}, snp.NPF_RMP),
        (OURS, {"asid": 2}, snp.NPF_RMP),
        (OURS, {"gpa": 9}, snp.NPF_RMP),
        (OURS._replace(immutable=True), {}, snp.NPF_RMP),
        (BIG, {}, SIZEM),
        (BIG, {"mapping": PG_2M}, SIZEM),
        (OURS, {"mapping": PG_2M}, snp.NPF_RMP),
        (OURS, {"asked": PG_2M}, Pvalidate.FAIL_SIZEMISMATCH),
        (BIG, {"asked": PG_2M}, Pvalidate.FAIL_SIZEMISMATCH),
        (BIG, {"asked": PG_2M, "mapping": PG_2M, "validate": False}, Pvalidate.OK),
        (BIG, {"asked": PG_2M, "mapping": PG_2M, "part": True}, Pvalidate.FAIL_INPUT),
        (OURS, {"vmpl": 1}, snp_pages.GP),
        (OURS, {"enc": False}, snp.NPF_RMP),
        (HYPERVISOR, {"enc": False}, snp.NPF_RMP),
        (OURS, {"mapping": snp.PG_1G}, snp.NPF_RMP),
        (BIG, {"mapping": snp.PG_1G}, SIZEM),
        (BIG, {"asked": PG_2M, "mapping": snp.PG_1G, "validate": False}, Pvalidate.OK),
        (OURS, {"asked": PG_2M, "mapping": PG_2M}, Pvalidate.FAIL_SIZEMISMATCH),
        (OURS, {"part": True}, Pvalidate.OK),
        (HYPERVISOR, {"asked": PG_2M, "part": True}, Pvalidate.FAIL_INPUT),
        (OURS, {"asked": PG_2M, "part": True, "vmpl": 3}, snp_pages.GP),
    ],
)
def test_pvalidate_answers(entry: RmpEntry, more: dict[str, Any], answer: Pvalidate | str) -> None:
    assert pvalidate(entry, **more)[0] == answer


def test_4k_pvalidate_of_a_2m_entry_takes_a_sizem_fault_and_the_host_psmashes() -> None:
    vm = Vm("snp", 512, private=True, private_2m=True)
    vm.guest().pvalidate(3 * P, True)
    codes = [Npf(e.code) for e in vm.events if e.kind == "npf-rmp"]
    assert [bool(code & Npf.SIZEM) for code in codes] == [True] and vm.counters["psmash"] == 1
    assert [vm.rmp_entry(vm.pfn(g * P, True)).validated for g in (2, 3, 4)] == [False, True, False]


def test_2m_pvalidate_of_a_2m_page_is_one_instruction() -> None:
    vm = Vm("snp", 512, private=True, private_2m=True)
    vm.guest().pvalidate(0, True, M2)
    assert vm.counters["pvalidate"] == vm.counters["rmpupdate"] == vm.counters["npf"] == 1
    vm.guest().write(M2 - 4, b"last")


def test_2m_pvalidate_of_4k_pages_is_a_size_mismatch() -> None:
    vm = Vm("snp", 512, private=True)
    with pytest.raises(InstructionError) as caught:
        vm.guest().pvalidate(0, True, M2)
    assert caught.value.status == Pvalidate.FAIL_SIZEMISMATCH


def test_misaligned_2m_pvalidate_is_fail_input() -> None:
    with pytest.raises(InstructionError) as caught:
        Vm("snp", 1024, private=True).guest().pvalidate(P, True, M2)
    assert caught.value.status == Pvalidate.FAIL_INPUT


def test_v8s_handler_acts_on_sizem_only() -> None:
    vm = Vm("snp", 512, "v8-post-hook")
    vm.set_memory_attributes(0, M2, True)
    vm.rmp.update(512, 512, None)
    vm.rmp.update(vm.pfn(0, True), 512, None)
    vm.rmp.update(vm.pfn(0, True), 512, 0, PG_2M)
    vm.guest().set_private(0, True, M2)
    vm.guest().pvalidate(0, True)  # 4K asked, 2M entry: SIZEM
    vm.rmp.update(vm.pfn(0, True), 512, None)
    vm.rmp.update(vm.pfn(0, True), 512, 0, PG_2M)
    with pytest.raises(GuestSpins):
        vm.guest().read(0, 1)  # the same mismatch without SIZEM


# RMPADJUST and VMPLs


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (dict(own=0, target=1, mask=3), "OK"),
        (dict(own=1, target=1, mask=0), "FAIL_PERMISSION"),
        (dict(own=1, target=0, mask=0), "FAIL_PERMISSION"),
        (dict(own=1, target=2, mask=1), "FAIL_PERMISSION"),
        (dict(own=0, target=4, mask=1), "FAIL_INPUT"),
        (dict(own=0, target=1, mask=1, asked=PG_2M), "FAIL_SIZEMISMATCH"),
        (dict(own=0, target=1, mask=1, asked=PG_2M, part=True), "FAIL_INPUT"),
        (dict(own=0, target=-1, mask=1), "FAIL_INPUT"),
        (dict(own=0, target=1, mask=16), "FAIL_INPUT"),
        (dict(own=0, target=3, mask=15), "OK"),
        (dict(own=2, target=1, mask=0, asked=PG_2M), "FAIL_PERMISSION"),
    ],
)
def test_rmpadjust_answers(more: dict[str, Any], code: str) -> None:
    answer, entry, permissions = snp_pages.rmpadjust(VALID, snp_pages.AFTER_RMPUPDATE, **more)
    assert answer.name == code
    assert answer == 0 or (entry, permissions) == (VALID, snp_pages.AFTER_RMPUPDATE)


def test_rmpadjust_changes_the_targets_permissions_and_no_others() -> None:
    before = (snp_pages.ALL, 3, 5, 9)
    after = [snp_pages.rmpadjust(VALID, before, own=0, target=t, mask=7)[2] for t in (1, 2, 3)]
    assert after == [(15, 7, 5, 9), (15, 3, 7, 9), (15, 3, 5, 7)]


def test_4k_rmpadjust_inside_a_2m_entry_is_a_nested_fault_with_sizem() -> None:
    answer, entry, permissions = snp_pages.rmpadjust(BIG, snp_pages.AFTER_RMPUPDATE, own=0, target=1, mask=1)
    assert (answer, entry, permissions) == (SIZEM, BIG, snp_pages.AFTER_RMPUPDATE)
    asked = snp_pages.rmpadjust(BIG, snp_pages.AFTER_RMPUPDATE, own=0, target=1, mask=1, asked=PG_2M)
    assert asked[0] == Rmpupdate.OK


def test_4k_rmpadjust_inside_a_2m_entry_is_run_again_after_the_hosts_psmash() -> None:
    vm = private_vm(512, private_2m=True)
    vm.guest().rmpadjust(3 * P, 1, snp_pages.READ)
    codes = [Npf(e.code) for e in vm.events if e.kind == "npf-rmp"]
    assert [bool(code & Npf.SIZEM) for code in codes] == [True] and vm.counters["psmash"] == 1
    vm.guest(0, vmpl=1).read(3 * P, 1)


def test_rmpadjust_of_vmpl0_makes_no_vmsa_unless_asked() -> None:
    assert snp_pages.rmpadjust(VALID, snp_pages.AFTER_RMPUPDATE, own=0, target=1, mask=1)[1] == VALID
    was = VALID._replace(vmsa=True)
    assert snp_pages.rmpadjust(was, snp_pages.AFTER_RMPUPDATE, own=0, target=1, mask=1)[1] == VALID


@pytest.mark.parametrize(("own", "vmsa"), [(0, True), (1, False)])
def test_rmpadjust_makes_a_vmsa_for_vmpl0_and_ignores_others(own: int, vmsa: bool) -> None:
    held = (snp_pages.ALL,) * 4
    answer, entry, _ = snp_pages.rmpadjust(VALID, held, own=own, target=2, mask=1, vmsa=True)
    assert (answer, entry.vmsa) == (Rmpupdate.OK, vmsa)


@pytest.mark.parametrize(("op", "bit"), [("read", 1), ("write", 2), ("execute as user", 4), ("execute", 8)])
def test_each_permission_is_a_bit_that_allows_one_kind_of_access(op: str, bit: int) -> None:
    for vmpl in range(4):
        held = [0, 0, 0, 0]
        held[vmpl] = bit
        assert snp_pages.vmpl_allows(tuple(held), vmpl, op)
        held = [15, 15, 15, 15]
        held[vmpl] = 15 - bit
        assert not snp_pages.vmpl_allows(tuple(held), vmpl, op)


def test_after_rmpupdate_vmpl0_may_do_all_and_the_others_nothing() -> None:
    assert snp_pages.AFTER_RMPUPDATE == (15, 0, 0, 0)


def test_another_vmpl_may_do_nothing_until_rmpadjust_allows_it() -> None:
    vm = private_vm()
    low = vm.guest(0, vmpl=1)
    with pytest.raises(VmplFault) as caught:
        low.read(0, 1)
    assert Npf(caught.value.error_code) & Npf.VMPL
    vm.guest().rmpadjust(0, 1, snp_pages.READ)
    low.read(0, 1)
    with pytest.raises(VmplFault):
        low.write(0, b"x")
    with pytest.raises(GpFault):
        low.pvalidate(0, True)

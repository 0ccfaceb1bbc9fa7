"""Which accesses SNP checks, in which order, and the codes of their faults, on a Vm."""

from __future__ import annotations

import pytest
from vm_tools import BIG, OURS, VALID, P, private_vm

from kvmlab.emulator import (
    GuestSpins,
    KernelBug,
    RmpFault,
    VcFault,
    Vm,
    VmSwitches,
)
from kvmlab.hw import snp
from kvmlab.hw.snp import HYPERVISOR, PG_2M, PG_4K, Npf, RmpEntry
from kvmlab.hw.snp import pages as snp_pages

# Which accesses are checked


@pytest.mark.parametrize("split", [True, False])
def test_a_host_write_through_a_2m_entry_faults_for_a_neighbours_sake(split: bool) -> None:
    vm = Vm("snp", 4)
    vm.rmp.update(512, 1, 0)
    vm.directmap.split[1] = split
    if split:
        vm.host.directmap_write(513)
    else:
        with pytest.raises(RmpFault, match="2M entry"):
            vm.host.directmap_write(513)


def test_a_host_write_to_an_assigned_page_faults() -> None:
    vm = private_vm()
    with pytest.raises(RmpFault) as caught:
        vm.host.directmap_write(vm.pfn(0, True))
    assert caught.value.error_code >> 31 & 1


def test_a_host_read_of_an_assigned_page_is_ciphertext_and_no_fault() -> None:
    vm = private_vm()
    vm.guest().write(0, b"secret")
    assert vm.host.directmap_read(vm.pfn(0, True), 6) not in (b"secret", bytes(6))


def test_a_c0_read_of_an_assigned_page_is_silent_ciphertext() -> None:
    vm = private_vm()
    vm.guest().write(0, b"secret")
    vm.guest().set_private(0, False)
    faults = vm.counters["npf"]
    assert vm.guest().read(0, 6) != b"secret" and vm.counters["npf"] == faults


def test_a_c0_write_to_an_assigned_page_faults_with_rmp_and_without_enc() -> None:
    vm = private_vm(vmm="kill")
    vm.guest().set_private(0, False)
    with pytest.raises(OSError, match="MEMORY_FAULT"):
        vm.guest().write(0, b"x")
    code = Npf([e for e in vm.events if e.kind == "npf-rmp"][-1].code)
    assert code & Npf.RMP and not code & Npf.ENC and code & Npf.WRITE


def test_a_c1_access_to_a_page_not_validated_is_vc_404() -> None:
    vm = Vm("snp", 4, private=True)
    with pytest.raises(VcFault) as caught:
        vm.guest().read(0, 1)
    assert (caught.value.error_code, caught.value.gpa) == (0x404, 0)


def test_ownership_comes_before_validated() -> None:
    vm = Vm("snp", 4, private=True)
    with pytest.raises(VcFault):
        vm.guest().read(0, 1)
    vm.rmp.put(vm.pfn(0, True), RmpEntry(True, 2, 0))
    with pytest.raises(GuestSpins, match="RMP"):
        vm.guest().read(0, 1)


def test_the_size_check_works_both_ways() -> None:
    vm = private_vm(512, private_2m=True)
    pfn = vm.pfn(0, True)
    vm.rmp.psmash(pfn)  # mapping 2M, entries 4K: the fault path maps 4K, then the handler finds nothing to do
    vm.guest().read(0, 1)
    assert (vm.counters["npf-rmp"], vm.counters["npt-split"]) == (1, 1) and "psmash" not in vm.counters
    vm = private_vm(512)
    pfn = vm.pfn(0, True)
    vm.rmp.update(pfn, 512, None)
    vm.rmp.update(pfn, 512, 0, PG_2M)
    vm.rmp.pvalidate(pfn, 512, 0, True, PG_2M, True)  # mapping 4K, entry 2M: PSMASH, and on
    vm.guest().read(0, 1)
    assert vm.counters["psmash"] == 1


def test_a_shared_write_through_a_2m_leaf_asks_for_the_whole_region() -> None:
    vm = Vm("snp", 512, shared_2m=True)
    vm.guest().touch(0, P)
    vm.rmp.update(vm.pfn(8 * P, False), 1, 0)
    with pytest.raises(GuestSpins, match="RMP"):
        vm.guest().write(0, b"x")


@pytest.mark.parametrize("where", ["access", "fill"])
def test_whether_the_rmp_is_asked_at_each_access_is_a_switch(where: str) -> None:
    vm = private_vm(switches=VmSwitches(rmp_checked_at=where))
    vm.guest().write(0, b"x")
    pfn = vm.pfn(0, True)
    vm.rmp.put(pfn, VALID._replace(asid=2))
    if where == "fill":
        vm.guest().read(0, 1)
    else:
        with pytest.raises(GuestSpins):
            vm.guest().read(0, 1)


@pytest.mark.parametrize(
    ("entry", "answer"), [(VALID, snp.OK), (OURS, snp.VC), (HYPERVISOR, snp.NPF_RMP), (BIG, snp.NPF_RMP)]
)
@pytest.mark.parametrize("write", [False, True])
def test_instruction_fetch_and_page_table_accesses_are_checked_as_c1(
    entry: RmpEntry, answer: str, write: bool
) -> None:
    assert snp_pages.implied_c1_access(entry, write=write, asid=1, gpa=0) == answer


@pytest.mark.parametrize(
    ("page", "mapping", "region", "answer"),
    [
        (HYPERVISOR, PG_4K, True, snp.OK),
        (OURS, PG_4K, False, snp.NPF_RMP),
        (HYPERVISOR, PG_2M, True, snp.NPF_RMP),
    ],
)
def test_a_write_of_a_guest_that_is_not_snp_needs_a_hypervisor_page(
    page: RmpEntry, mapping: str, region: bool, answer: str
) -> None:
    assert snp_pages.other_guest_write(page, mapping=mapping, region_assigned=region) == answer


def test_another_guest_is_asked_for_its_page_alone_unless_the_region_has_more() -> None:
    assert snp_pages.other_guest_write(HYPERVISOR, mapping=PG_2M) == snp.OK


@pytest.mark.parametrize("op", ["write", "page-table"])
def test_host_page_table_accesses_are_checked_as_host_writes(op: str) -> None:
    assert snp.host_access(op, mapping=PG_4K, page=OURS, region_assigned=True) == snp.HOST_PF


def test_rmpupdate_takes_the_other_vmpls_permissions_back() -> None:
    vm = private_vm()
    pfn = vm.pfn(0, True)
    vm.guest().rmpadjust(0, 1, snp_pages.READ)
    vm.rmp.update(pfn, 1, 0)
    assert vm.rmp.permissions[pfn][1] == snp_pages.READ  # identical: nothing changes
    vm.rmp.update(pfn, 1, None)
    assert pfn not in vm.rmp.permissions


# Error codes


def test_npf_error_code_bits_are_where_kvm_has_them() -> None:
    bits = [Npf.RMP, Npf.GUEST_FINAL, Npf.GUEST_PAGE, Npf.ENC, Npf.SIZEM, Npf.VMPL]
    assert [bit.bit_length() - 1 for bit in bits] == [31, 32, 33, 34, 35, 36]
    code = snp_pages.npf_code(present=True, write=False, enc=True, rmp=True, sizem=True, vmpl=True)
    assert code == Npf.PRESENT | Npf.USER | Npf.GUEST_FINAL | Npf.ENC | Npf.RMP | Npf.SIZEM | Npf.VMPL


def test_an_ordinary_fault_has_neither_sizem_nor_vmpl() -> None:
    code = snp_pages.npf_code(present=False, write=True, enc=True, rmp=False)
    assert code == Npf.WRITE | Npf.USER | Npf.GUEST_FINAL | Npf.ENC


def test_a_write_where_the_directmap_is_absent_is_an_oops() -> None:
    vm = Vm("snp", 4, "v8-post-hook")
    vm.set_memory_attributes(0, P, True)
    with pytest.raises(KernelBug, match="not present"):
        vm.host.directmap_write(vm.pfn(0, True))

"""tdx: bytes by KeyID: who reads what, what a host write does, and which flush keeps old lines from coming back."""

from __future__ import annotations

from typing import Any

import pytest

from kvmlab import Design
from kvmlab.emulator import KernelBug, MachineCheck, PlatformError, TdxError, Vm, VmDead, VmError, VmSwitches
from kvmlab.emulator.guest import Guest
from kvmlab.hw.tdx import Status
from kvmlab.hw.tdx.lines import HOST_MC, MACHINE_LOST, MAY_PANIC, TD_LOST, Line

P, M2 = 4096, 1 << 21


def td(pages: int = 4, **more: Any) -> tuple[Vm, Guest, int]:
    """Page 0 is private, accepted and holds b"secret"."""
    vm = Vm("tdx", pages, private=True, **more)
    vm.guest().accept(0)
    vm.guest().write(0, b"secret")
    return vm, vm.guest(), vm.pfn(0, True)


# Reads


def test_a_td_reads_what_it_wrote_and_memory_holds_ciphertext() -> None:
    vm, guest, pfn = td()
    assert guest.read(0, 6) == b"secret" and vm.tdx.memory.dram(pfn)[:6] not in (b"secret", bytes(6))


def test_a_host_read_of_td_memory_gives_zeros_and_hurts_nobody() -> None:
    vm, guest, pfn = td()
    assert vm.host.directmap_read(pfn, 64) == bytes(64)
    assert guest.read(0, 6) == b"secret"


def test_a_shared_page_is_the_same_bytes_to_both_sides() -> None:
    vm = Vm("tdx", 4)
    vm.guest().write(0, b"open")
    assert vm.host.read(0, 4) == b"open" == vm.tdx.memory.dram(vm.pfn(0, False))[:4]


def test_from_inside_a_td_too_a_shared_read_of_a_td_owned_page_gives_zeros() -> None:
    vm = Vm("tdx", 4, "v8-post-hook", "in-place", vmm="rerun")
    vm.place(0, "shared", attribute="private")  # a stray shared leaf
    vm.place(0, "MAPPED")
    vm.guest().write(0, b"secret")
    vm.guest().set_private(0, False)
    assert vm.guest().read(0, 6) == bytes(6)


def test_a_td_that_reads_another_tds_line_gets_poison_or_noise_by_the_part() -> None:
    for integrity in (True, False):
        vm, guest, pfn = td(switches=VmSwitches(integrity=integrity))
        vm.tdx.memory.page(pfn)[0] = Line(b"x" * 64, 18)  # as no TD could: the PAMT keeps it from happening
        if integrity:
            with pytest.raises(MachineCheck):
                guest.read(0, 6)
        else:
            assert guest.read(0, 6) not in (b"secret", b"x" * 6, bytes(6))


def test_poison_that_is_stored_stays_and_hits_the_host_too() -> None:
    vm, guest, pfn = td()
    vm.host.directmap_write(pfn, b"host")
    with pytest.raises(MachineCheck):
        guest.read(0, 1)
    with pytest.raises(MachineCheck) as caught:
        vm.host.directmap_read(pfn, 1)
    assert (caught.value.who, caught.value.end, caught.value.status) == ("host", HOST_MC, None)


# Writes


def test_a_host_write_is_not_checked_and_the_host_reads_back_its_own() -> None:
    vm, _, pfn = td()
    vm.host.directmap_write(pfn, b"host")
    assert vm.host.directmap_read(pfn, 4) == b"host"


def test_the_next_td_read_of_it_is_a_machine_check_and_the_td_is_lost() -> None:
    vm, guest, pfn = td(vcpus=2)
    vm.guest(1).accept(P)
    vm.host.directmap_write(pfn, b"host")
    with pytest.raises(MachineCheck) as caught:
        guest.read(0, 1)
    assert caught.value.end == TD_LOST and caught.value.status == Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE
    for index in (0, 1):
        with pytest.raises(TdxError) as entered:
            vm.guest(index).read(P, 1)
        assert (entered.value.leaf, entered.value.rax) == ("TDH.VP.ENTER", 0xE000060400000000)


def test_an_ordinary_td_write_fills_its_line_and_so_consumes_poison() -> None:
    vm, guest, pfn = td()
    vm.host.directmap_write(pfn, b"host")
    with pytest.raises(MachineCheck):
        guest.write(8, b"x")


def test_only_the_line_that_the_host_wrote_is_ruined() -> None:
    vm, guest, pfn = td()
    guest.write(64, b"next line")
    vm.host.directmap_write(pfn, b"host")
    assert guest.read(64, 9) == b"next line"


def test_without_seam_machine_checks_the_host_may_panic() -> None:
    vm, guest, pfn = td(switches=VmSwitches(seam_machine_check=False))
    vm.host.directmap_write(pfn, b"host")
    with pytest.raises(MachineCheck) as caught:
        guest.read(0, 1)
    assert caught.value.end == MAY_PANIC


def test_after_the_machine_check_the_module_lets_nothing_in_and_kvm_gives_up_the_vm() -> None:
    vm, guest, pfn = td()
    vm.host.directmap_write(pfn, b"host")
    with pytest.raises(MachineCheck):
        guest.read(0, 1)
    with pytest.raises(PlatformError, match="TDX_TD_FATAL"):
        vm.set_memory_attributes(0, P, False)
    with pytest.raises(VmDead):
        vm.set_memory_attributes(0, P, True)


def test_a_host_write_to_a_table_takes_the_module_down_at_its_next_walk() -> None:
    vm, guest, _ = td(1024)
    table = next(pfn for pfn, (level, _) in vm.tdx.module.table_at.items() if level == 1)
    vm.host.directmap_write(table, b"host")
    with pytest.raises(MachineCheck) as caught:
        guest.accept(P)
    assert (caught.value.who, caught.value.end) == ("module", MACHINE_LOST)
    with pytest.raises(PlatformError) as off:
        vm.set_memory_attributes(0, P, False)
    assert off.value.status == 0x8000FF00FFFF0000  # TDX_SEAMCALL_VMFAILINVALID


@pytest.mark.parametrize("erratum", [False, True])
def test_a_partial_write_poisons_at_once_on_parts_with_the_erratum(erratum: bool) -> None:
    vm, _, pfn = td(switches=VmSwitches(partial_write_erratum=erratum))
    vm.host.partial_write(pfn, b"host")
    if erratum:
        with pytest.raises(MachineCheck) as caught:
            vm.host.directmap_read(pfn, 1)
        assert caught.value.who == "host"
    else:
        assert vm.host.directmap_read(pfn, 4) == b"host"


def test_an_ordinary_host_store_does_not_trigger_the_erratum() -> None:
    vm, _, pfn = td(switches=VmSwitches(partial_write_erratum=True))
    vm.host.directmap_write(pfn, b"host")
    assert vm.host.directmap_read(pfn, 4) == b"host"


def test_accept_heals_poison_for_it_writes_full_lines() -> None:
    vm, guest, pfn = td()
    vm.guest().accept(P)
    vm.host.directmap_write(pfn + 1, b"host")
    vm.set_memory_attributes(P, P, False)
    vm.set_memory_attributes(P, P, True)
    guest.accept(P)
    assert guest.read(P, 4) == bytes(4)


def test_partial_writes_are_special_on_tdx_only() -> None:
    with pytest.raises(VmError, match="tdx only"):
        Vm("snp", 4).host.partial_write(512, b"x")


# Data is lost both ways


def test_neither_direction_of_a_conversion_preserves_data() -> None:
    vm, guest, pfn = td()
    guest.set_memory_decrypted(0, P)
    assert guest.read(0, 6) == bytes(6) and vm.host.directmap_read(pfn, P) == bytes(P)
    guest.write(0, b"open")
    guest.set_memory_encrypted(0, P)
    assert guest.read(0, P) == bytes(P) and vm.host.read(0, 4) == b"open"


def test_in_place_the_same_page_shows_neither_sides_data_to_the_other() -> None:
    vm = Vm("tdx", 4, "gmem-in-place", private=True)
    guest, pfn = vm.guest(), vm.pfn(0, True)
    guest.set_private(0, True)
    guest.accept(0)
    guest.write(0, b"secret")
    guest.set_memory_decrypted(0, P)
    assert vm.pfn(0, False) == pfn and vm.host.read(0, 6) == bytes(6) == guest.read(0, 6)
    vm.host.write(0, b"open")
    guest.set_memory_encrypted(0, P)
    assert guest.read(0, P) == bytes(P)


# Caches


def test_without_clflush_before_aug_the_zeroing_comes_back_over_the_tds_data() -> None:
    for design, lost in (("upstream", False), ("tdx-no-clflush", True)):
        vm, guest, pfn = td(design=design, caches=True)
        vm.host.evict(pfn, private=True)
        vm.host.evict(pfn, private=False)
        if lost:
            with pytest.raises(MachineCheck):
                guest.read(0, 1)
        else:
            assert guest.read(0, 6) == b"secret"


def test_without_wbinvd_after_remove_an_old_line_of_the_td_ruins_the_hosts_page() -> None:
    for design, lost in (("upstream", False), ("tdx-no-wbinvd", True)):
        vm, _, pfn = td(design=design, caches=True)
        vm.set_memory_attributes(0, P, False)
        vm.host.directmap_write(pfn, b"kernel")
        vm.host.evict(pfn, private=False)
        vm.host.evict(pfn, private=True)
        assert (vm.host.directmap_read(pfn, 6) == b"kernel") is not lost


def test_without_clearing_the_page_stays_td_owned_and_reads_as_zeros_until_somebody_writes() -> None:
    vm, _, pfn = td(design="tdx-no-clear")
    vm.set_memory_attributes(0, P, False)
    assert vm.tdx.memory.page(pfn)[0].td_owner and vm.host.directmap_read(pfn, 6) == bytes(6)
    vm.host.directmap_write(pfn, b"kernel")
    assert vm.host.directmap_read(pfn, 6) == b"kernel"


def test_only_a_vm_with_caches_can_evict() -> None:
    vm, _, pfn = td()
    with pytest.raises(VmError, match="caches=True"):
        vm.host.evict(pfn, private=True)


def test_lines_of_two_keyids_are_dirty_side_by_side() -> None:
    vm, guest, pfn = td(caches=True)
    vm.host.directmap_write(pfn, b"host")
    assert guest.read(0, 6) == b"secret" and vm.host.directmap_read(pfn, 4) == b"host"
    assert (vm.host.evict(pfn, private=False), vm.host.evict(pfn, private=True)) == (1, 1)
    assert guest.read(0, 6) == b"secret"


# The directmap


UNMAPS_FIRST = """// unmaps the private page
base: v8-post-hook

ioctl:
    mutex_lock(&kvm->slots_lock)
    if (attr == private)
        kvm_unmap_directmap()
    KVM_MMU_LOCK(kvm)
    kvm_mmu_invalidate_begin()
    KVM_MMU_UNLOCK(kvm)
    kvm_vm_set_region_attr()
    KVM_MMU_LOCK(kvm)
    kvm_mem_attrs_changed()
    kvm_mmu_invalidate_end()
    KVM_MMU_UNLOCK(kvm)
    if (attr == shared)
        kvm_map_directmap()
    mutex_unlock(&kvm->slots_lock)
"""


def unmapping() -> Design:
    return Design.parse(UNMAPS_FIRST)


def test_a_design_that_unmaps_before_the_page_is_used_oopses_in_clflush() -> None:
    vm = Vm("tdx", 4, unmapping())
    vm.guest().set_private(0, True)
    vm.set_memory_attributes(0, P, True)
    with pytest.raises(KernelBug, match="tdx_clflush_page"):
        vm.guest().accept(0)


def test_the_page_is_zeroed_before_it_is_unmapped_or_that_oopses() -> None:
    vm = Vm("tdx", 4, unmapping())
    vm.directmap.absent[vm.pfn(0, True)] = 1
    vm.attributes.store(0, 1, True)
    with pytest.raises(KernelBug, match="clear_highpage"):
        vm.guest().accept(0)


def test_a_design_that_unmaps_and_clears_after_remove_oopses_there() -> None:
    vm, _, pfn = td(design=Design.parse("base: upstream\nlinux: v6.16\n"))
    vm.directmap.absent[pfn] = 1
    with pytest.raises(KernelBug, match="tdx_clear_page"):
        vm.set_memory_attributes(0, P, False)


def test_the_op_and_rmpupdate_do_nothing_on_tdx() -> None:
    vm = Vm("tdx", 4, "v8-post-hook")
    vm.guest().set_memory_encrypted(0, 4 * P)
    vm.guest().set_memory_decrypted(0, 4 * P)
    snps = {"rmpupdate", "directmap-unmap", "directmap-map", "directmap-split", "psmash"}
    assert not snps & set(vm.counters)

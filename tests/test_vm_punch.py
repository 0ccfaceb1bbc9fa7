"""The rows of `punch:` on real sizes: what a wrong order leaves behind; closing the file."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from kvmlab.design import Design, Row, shipped
from kvmlab.emulator import (
    Deadlock,
    GuestSpins,
    MemoryFaultExit,
    PlatformError,
    RmpFault,
    Vm,
    VmErrno,
    VmSwitches,
)
from kvmlab.hw.tdx.sept import State

P, M2 = 4096, 1 << 21


def accepted(design: Design | str = "upstream", pages: Any = 8, platform: str = "snp", **more: str) -> Vm:
    """A VM whose guest uses all its memory as private."""
    vm = Vm(platform, pages, design, **more)
    vm.guest().set_memory_encrypted(0, pages * P)
    vm.guest().write(0, b"mine")
    return vm


def punching(*rows: str) -> Design:
    """upstream with another `punch:`."""
    return Design.parse("\n    ".join(["base: upstream\npunch:", *rows]))


def rows_seen(vm: Vm, act: Callable[..., Any]) -> list[str]:
    rows = []
    vm.on_row = lambda row: rows.append(row.call)
    act()
    vm.on_row = None
    return rows


@pytest.mark.parametrize("platform", ["snp", "sev", "sw", "tdx"])
def test_a_punch_runs_the_rows_of_the_text(platform: str) -> None:
    vm = Vm(platform, 8)
    text = [row.call for row in vm.design.rows("punch", "shared", platform)]
    assert rows_seen(vm, lambda: vm.gmem.punch_hole(0, P)) == text


@pytest.mark.parametrize("name", shipped())
def test_every_ordering_gives_a_punched_page_back_and_gets_it_again_as_zeros(name: str) -> None:
    vm = Vm("snp", 8, name)
    vm.set_memory_attributes(0, 8 * P, True)
    vm.gmem.allocate(0, 8 * P)
    vm.gmem.punch_hole(0, 8 * P)
    assert not vm.rmp.assigned(vm.pfn(0, True), 8).any() and vm.resident()["private"] == 0
    vm.gmem.allocate(0, 8 * P)
    assert vm.memory.read(vm.pfn(0, True)) == bytes(P)


# Wrong orders


def test_one_page_too_many_leaves_a_page_in_use_unassigned() -> None:
    vm = accepted("punch-one-too-many")
    vm.gmem.punch_hole(0, 2 * P)
    assert vm.rmp.assigned(vm.pfn(0, True), 4).tolist() == [False, False, False, True]
    with pytest.raises(GuestSpins, match="RMP fault"):
        vm.guest().read(2 * P, 1)
    vm.gmem.punch_hole(7 * P, P)  # at the end of the file there is none behind


def test_v7_punches_with_the_op_under_mmu_lock_and_schedules_while_atomic() -> None:
    vm = Vm("snp", 8, "v7-under-lock")
    vm.set_memory_attributes(0, P, True)
    vm.violations.clear()
    vm.gmem.punch_hole(0, P)
    name, text = vm.violations[-1]
    assert name == "sleep-in-atomic" and "scheduling while atomic: directmap update" in text


def test_a_page_that_was_never_assigned_gives_v7_nothing_to_sleep_for() -> None:
    vm = Vm("snp", 8, "v7-under-lock")
    vm.gmem.allocate(0, P)
    vm.gmem.punch_hole(0, P)
    assert not vm.violations


def test_v7_and_a_kernel_that_does_not_count_preemption_says_nothing() -> None:
    vm = Vm("snp", 8, "v7-under-lock", switches=VmSwitches(preempt_count=False))
    vm.gmem.allocate(0, P)
    vm.gmem.punch_hole(0, P)
    assert not vm.violations


def test_a_page_that_is_given_back_assigned_faults_whoever_uses_it_next() -> None:
    vm = accepted("punch-leaves-assigned")
    vm.gmem.punch_hole(0, P)
    with pytest.raises(RmpFault):
        vm.host.directmap_write(vm.pfn(0, True))


def test_a_page_that_is_given_back_assigned_cannot_be_cleared_for_its_next_use() -> None:
    vm = accepted("punch-leaves-assigned")
    vm.gmem.punch_hole(0, P)
    with pytest.raises(RmpFault):
        vm.gmem.allocate(0, P)
    assert vm.counters["host-rmp-fault"] == 1


def test_a_punch_without_a_zap_leaves_a_mapping_of_what_is_the_hosts() -> None:
    vm = accepted("punch-keeps-mapping", platform="sev")
    vm.gmem.punch_hole(0, P)
    faults = vm.counters["npf"]
    vm.guest().write(0, b"still there")
    assert vm.counters["npf"] == faults and not vm.gmem.present[0]


def test_on_snp_such_a_mapping_is_stopped_by_the_rmp_and_the_guest_is_told() -> None:
    vm = accepted("punch-keeps-mapping")
    vm.gmem.punch_hole(0, P)
    assert vm.mmu.leaves(0, 1)[0] and not vm.rmp_entry(vm.pfn(0, True)).assigned


def test_a_page_that_is_never_given_back_is_waited_for() -> None:
    vm = accepted(
        punching("filemap_invalidate_lock()", "truncate_inode_pages_range()", "filemap_invalidate_unlock()")
    )
    vm.gmem.punch_hole(0, P)
    with pytest.raises(Deadlock, match="to be freed"):
        vm.gmem.allocate(0, 2 * P)


def test_a_fault_between_truncate_and_folio_put_waits_for_the_page() -> None:
    vm, waited = accepted(), []

    def fault(row: Any) -> None:
        if row.call == "folio_put":
            with pytest.raises(Deadlock):
                vm.gmem.allocate(0, P)
            waited.append(True)

    vm.on_row = fault
    vm.gmem.punch_hole(0, P)
    assert waited


def test_a_zap_without_mmu_lock_breaks_lock_misuse() -> None:
    vm = accepted(punching("kvm_unmap_gfn_range()", "kvm_flush_remote_tlbs()"))
    vm.gmem.punch_hole(0, P)
    assert [name for name, _ in vm.violations] == ["lock-misuse"]


def test_rmpupdate_towards_private_is_run_as_it_stands() -> None:
    vm = Vm("snp", 8, punching("rmpupdate(private)"))
    vm.gmem.punch_hole(0, P)
    assert vm.rmp_entry(vm.pfn(0, True)).assigned


# 2M


def test_without_psmash_a_part_of_a_2m_entry_is_an_overlap_that_repeats_for_ever() -> None:
    vm = Vm("snp", 512, punching("truncate_inode_pages_range()", "rmpupdate(shared)", "folio_put()"),
            private=True, private_2m=True)  # fmt: skip
    vm.guest().pvalidate(0, True, M2)
    with pytest.raises(PlatformError, match="for ever"):
        vm.gmem.punch_hole(3 * P, P)


def test_a_punch_across_two_2m_pages_splits_the_entry_at_either_end() -> None:
    vm = Vm("snp", 3 * 512, private=True, private_2m=True)
    for gpa in range(0, 3 * M2, M2):
        vm.guest().pvalidate(gpa, True, M2)
    vm.gmem.punch_hole(M2 - P, M2 + 2 * P)
    assert vm.counters["psmash"] == 2
    assert [int(vm.rmp.assigned(vm.pfn(gpa, True), 512).sum()) for gpa in (0, M2, 2 * M2)] == [511, 0, 511]


def test_only_what_goes_in_4k_splits_the_direct_map() -> None:
    vm = Vm("snp", 2 * 512, private=True, private_2m=True)
    for gpa in (0, M2):
        vm.guest().pvalidate(gpa, True, M2)
    vm.gmem.punch_hole(0, M2 + P)
    first = vm.pfn(0, True) // 512
    assert vm.directmap.split[first : first + 2].tolist() == [0, 1]


def test_a_2m_page_that_cannot_be_made_shared_is_leaked_whole() -> None:
    vm = Vm("snp", 512, private=True, private_2m=True)
    vm.guest().pvalidate(0, True, M2)
    vm.fail("rmpupdate", at=vm.pfn(0, True))
    vm.gmem.punch_hole(0, M2)
    assert len(vm.leaked) == 512 and vm.counters["warn"] == 1


def test_a_leaked_page_is_neither_cleared_nor_a_fault_when_its_offset_is_allocated_again() -> None:
    vm = accepted()
    vm.fail("rmpupdate", at=vm.pfn(0, True))
    vm.gmem.punch_hole(0, 2 * P)
    before = vm.memory.read(vm.pfn(0, True))
    vm.gmem.allocate(0, 2 * P)
    assert vm.memory.read(vm.pfn(0, True)) == before != bytes(P)


# Mappings, pages


def test_v8_gives_a_punched_page_back_to_the_direct_map() -> None:
    vm = Vm("snp", 8, "v8-post-hook")
    vm.set_memory_attributes(0, 8 * P, True)
    vm.gmem.punch_hole(0, 4 * P)
    assert vm.directmap.absent[vm.pfn(0, True) :][:8].tolist() == [0] * 4 + [1] * 4


def test_v8_keeps_a_page_that_it_could_not_make_shared_out_of_the_direct_map() -> None:
    vm = Vm("snp", 4, "v8-post-hook")
    vm.set_memory_attributes(0, 4 * P, True)
    vm.fail("rmpupdate", at=vm.pfn(2 * P, True))
    vm.gmem.punch_hole(0, 4 * P)
    assert vm.directmap.absent[vm.pfn(0, True) :][:4].tolist() == [0, 0, 1, 0]


def test_an_oops_awaits_whoever_clears_a_page_that_is_not_in_the_direct_map() -> None:
    vm = Vm(
        "snp", 8, Design.parse("base: v8-post-hook\npunch:\n  truncate_inode_pages_range()\n  folio_put()")
    )
    vm.set_memory_attributes(0, P, True)
    vm.gmem.punch_hole(0, P)
    with pytest.raises(Exception, match=r"oops: clear_highpage\(\)"):
        vm.gmem.allocate(0, P)


def test_pages_that_were_never_assigned_cost_no_rmpupdate() -> None:
    vm = Vm("snp", 8)
    vm.gmem.allocate(0, 8 * P)
    vm.guest().set_memory_encrypted(0, 2 * P)
    vm.log.counters.clear()
    vm.gmem.punch_hole(0, 8 * P)
    assert (vm.counters["rmpupdate"], vm.counters["gmem-free"]) == (2, 8)


@pytest.mark.parametrize(("design", "window"), [("upstream", (1, 513)), ("v8-post-hook", (1, 513))])
def test_one_window_covers_every_memslot_that_the_range_is_bound_to(
    design: str, window: tuple[int, int]
) -> None:
    vm = Vm("snp", design=design, slots=[(0, 2 * P), (M2, 4 * P)])
    seen = []
    vm.on_row = lambda row: seen.append(vm.mmu.window) if row.call == "folio_put" else None
    vm.gmem.punch_hole(P, 2 * P)
    assert seen == [window] and vm.mmu.seq == 1 and not vm.mmu.in_progress


def test_a_range_that_no_memslot_is_bound_to_is_freed_without_mmu_lock_or_window() -> None:
    vm = Vm("snp", 8)
    file = vm.create_guest_memfd(4 * P)
    file.allocate(0, 4 * P)
    held = []
    vm.on_row = lambda row: held.append("mmu_lock" in str([t.held for t in vm.threads]))
    file.punch_hole(0, 4 * P)
    assert not any(held) and vm.mmu.seq == 0 and not file.present.any()


# TDX


def test_on_tdx_the_private_leaves_of_the_range_go_by_the_rows_of_zap() -> None:
    vm = accepted(platform="tdx")
    rows = rows_seen(vm, lambda: vm.gmem.punch_hole(0, P))
    at = rows.index("kvm_unmap_gfn_range") + 1
    assert rows[at:][:6] == [row.call for row in vm.design.rows("zap", "shared", "tdx")]
    assert vm.tdx.module.entry(0) == State.FREE


def test_on_tdx_a_wrong_order_in_zap_is_a_wrong_order_in_a_punch() -> None:
    vm = accepted("tdx-no-track", platform="tdx")
    with pytest.raises(PlatformError, match="TLB_TRACKING_NOT_DONE"):
        vm.gmem.punch_hole(0, P)


# Closing


def test_closing_the_file_frees_everything_by_the_rows_of_punch() -> None:
    vm = accepted()
    text = [row.call for row in vm.design.rows("punch", "shared", "snp")]
    assert rows_seen(vm, vm.gmem.close) == text
    assert vm.resident()["private"] == 0 and not vm.rmp.assigned(512, 8).any()


def test_closing_a_file_that_leaves_pages_assigned_leaves_them_assigned() -> None:
    vm = accepted("punch-leaves-assigned")
    pfn = vm.pfn(0, True)
    vm.gmem.close()
    with pytest.raises(RmpFault):
        vm.host.directmap_write(pfn)


def test_after_the_file_is_closed_private_accesses_exit() -> None:
    vm = accepted(vmm="kill")
    vm.gmem.close()
    with pytest.raises(MemoryFaultExit):
        vm.guest().read(0, 1)


def test_a_closed_file_is_no_descriptor_any_more_and_closing_it_again_does_nothing() -> None:
    vm = Vm("snp", 8)
    vm.gmem.close()
    vm.gmem.close()
    with pytest.raises(VmErrno) as caught:
        vm.gmem.allocate(0, P)
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize(("page", "waits"), [(0, True), (7, False)])
def test_a_punch_waits_for_a_fault_that_holds_the_page_and_for_no_other(page: int, waits: bool) -> None:
    vm, waited = Vm("snp", 8, private=True), list[bool]()
    vm.gmem.allocate(0, 8 * P)

    def punch(row: Row) -> None:
        if row.call == "rmp_prepare" and not waited:
            try:
                vm.gmem.punch_hole(page * P, P)
                waited.append(False)
            except Deadlock:
                waited.append(True)

    vm.on_row = punch
    with suppress(GuestSpins):  # a punch that waits for ever has its window open for ever
        vm.guest().pvalidate(0, True)
    assert waited == [waits]

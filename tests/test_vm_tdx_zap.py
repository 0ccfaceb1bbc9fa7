"""tdx: zapping private leaves: the SEAMCALLs in order, wrong orders and what the module answers, busy, batches."""

from __future__ import annotations

from typing import Any

import pytest

from kvmlab.design import Design
from kvmlab.emulator import GuestSpins, PlatformError, Vm
from kvmlab.emulator.events import Deadlock
from kvmlab.emulator.switches import VmSwitches
from kvmlab.emulator.tdx_load import batching
from kvmlab.hw.tdx import Leaf
from kvmlab.hw.tdx.sept import State

P, M2 = 4096, 1 << 21
BLOCK, TRACK, REMOVE = (str(leaf) for leaf in (Leaf.RANGE_BLOCK, Leaf.TRACK, Leaf.PAGE_REMOVE))
WBINVD = str(Leaf.PAGE_WBINVD)


def td(pages: int = 4, design: Design | str = "upstream", **more: VmSwitches | int) -> Vm:
    """A TD that has accepted its memory; its vCPUs are inside."""
    vm = Vm("tdx", pages, design, private=True, **more)
    vm.place(0, "MAPPED", pages * P)
    for index in range(len(vm.tdx.vcpus)):
        vm.guest(index).read(0, 1)
    vm.log.events.clear()
    return vm


def stray_shared_leaf() -> Vm:
    """A TD with a page that both roots map: a wrong host has stored the attribute and zapped nothing."""
    vm = Vm("tdx", 4)
    vm.place(0, "shared", attribute="private")
    vm.place(0, "MAPPED")
    return vm


def calls(vm: Vm) -> list[str]:
    return [e.kind for e in vm.events if e.kind.startswith("TDH") or e.kind in ("kick", "tdx-clear-page")]


# As merged


def test_one_private_leaf_goes_by_block_track_kick_remove_wbinvd() -> None:
    vm = td()
    vm.set_memory_attributes(0, P, False)
    assert calls(vm) == [BLOCK, TRACK, "kick", REMOVE, WBINVD]
    assert vm.tdx.module.entry(0) == State.FREE and not vm.tdx.mirror_of(0, 1)[0]


@pytest.mark.parametrize(("linux", "erratum"), [("v6.17", False), ("v6.17", True), ("v6.19", True)])
def test_the_page_is_cleared_before_v6_18_and_on_parts_with_the_erratum(linux: str, erratum: bool) -> None:
    design = Design.parse(f"base: upstream\nlinux: {linux}\n")
    vm = td(design=design, switches=VmSwitches(partial_write_erratum=erratum))
    vm.set_memory_attributes(0, P, False)
    assert calls(vm) == [BLOCK, TRACK, "kick", REMOVE, WBINVD, "tdx-clear-page"]


def test_each_leaf_has_its_own_track_and_kick() -> None:
    vm = td(1024)
    before = dict(vm.counters)
    vm.set_memory_attributes(0, M2, False)
    assert {vm.counters[k] - before.get(k, 0) for k in (BLOCK, TRACK, "kick", REMOVE, WBINVD)} == {512}
    assert vm.tdx.module.epochs.td_epoch == 513


def test_a_leaf_that_is_not_there_costs_no_seamcall() -> None:
    vm = Vm("tdx", 4, private=True)
    vm.set_memory_attributes(0, 4 * P, False)
    assert calls(vm) == [] and "zap" not in vm.counters


def test_going_private_zaps_the_shared_side_only_and_costs_no_seamcall() -> None:
    vm = Vm("tdx", 4)
    vm.guest().write(0, b"x")
    vm.log.events.clear()
    vm.set_memory_attributes(0, P, True)
    assert [e.kind for e in vm.events] == ["set-attributes", "zap", "flush"]


def test_going_shared_leaves_shared_leaves_alone() -> None:
    vm = stray_shared_leaf()
    vm.set_memory_attributes(0, P, False)
    assert vm.mmu.leaves(0, 1)[0]


def test_a_flush_takes_every_vcpu_out_and_is_no_track() -> None:
    vm = td(vcpus=2)
    vm.mmu.flush()
    assert {v.mode for v in vm.tdx.vcpus} == {"host"} and vm.tdx.module.epochs == (1, (0, 0))
    assert vm.tdx.vcpus[0].tlb.leaves  # private translations go when VP.ENTER finds an old epoch


def test_the_next_vp_enter_after_a_track_drops_private_translations() -> None:
    vm = td()
    vm.set_memory_attributes(P, P, False)
    assert vm.tdx.vcpus[0].tlb.leaves
    vm.guest().read(2 * P, 1)
    assert list(vm.tdx.vcpus[0].tlb.leaves) == [2]


def test_a_vcpu_that_stays_inside_goes_on_with_its_old_translation_until_it_leaves() -> None:
    vm, seen = td(vcpus=2), []
    vm.guest(1).write(0, b"old")

    def look(row: Any) -> None:
        if row.call == "kvm_make_all_cpus_request":
            seen.append((vm.tdx.module.entry(0), vm.guest(1).read(0, 3)))

    vm.on_row = look
    vm.set_memory_attributes(0, P, False)
    assert seen == [(State.BLOCKED, b"old")]


def test_both_ept_roots_may_map_one_gfn_at_once() -> None:
    vm = stray_shared_leaf()
    vm.guest().write(0, b"mine")
    vm.guest().set_private(0, False)
    assert vm.guest().read(0, 4) == bytes(4)
    vm.guest().set_private(0, True)
    assert vm.guest().read(0, 4) == b"mine"


def test_punching_zaps_private_leaves_and_discarding_only_shared_ones() -> None:
    vm = td()
    vm.gmem.punch_hole(0, P)
    assert vm.tdx.module.entry(0) == State.FREE and calls(vm)[0] == BLOCK
    vm.log.events.clear()
    vm.host.discard(P, P)
    assert vm.tdx.module.entry(1) == State.MAPPED and calls(vm) == []


def test_deleting_a_memslot_zaps_its_private_leaves() -> None:
    vm = td()
    vm.close()
    assert vm.counters[REMOVE] == 4 and not vm.tdx.mirror.any()


# Wrong orders


@pytest.mark.parametrize(
    ("design", "answer"),
    [
        ("tdx-no-block", "TDX_GPA_RANGE_NOT_BLOCKED | RCX"),
        ("tdx-no-track", "TDX_TLB_TRACKING_NOT_DONE | RCX"),
        ("tdx-track-first", "TDX_TLB_TRACKING_NOT_DONE | RCX"),
        ("tdx-no-kick", "TDX_TLB_TRACKING_NOT_DONE | RCX"),
        ("tdx-wbinvd-first", "TDX_PAGE_METADATA_INCORRECT | RCX"),
    ],
)
def test_a_wrong_order_is_refused_and_kvm_gives_up_the_vm(design: str, answer: str) -> None:
    vm = td(design=design)
    with pytest.raises(PlatformError) as caught:
        vm.set_memory_attributes(0, P, False)
    assert str(caught.value).endswith(answer) and vm.tdx.dead
    assert vm.tdx.module.pamt_entry(vm.pfn(0, True)).type == 3  # the page stays the TD's


def test_no_kick_is_no_harm_if_every_vcpu_happens_to_be_out() -> None:
    vm = td(design="tdx-no-kick")
    vm.tdx.everybody_out()
    vm.set_memory_attributes(0, 4 * P, False)
    assert vm.counters[REMOVE] == 4


def test_kicked_first_and_nobody_back_inside_goes_well_in_one_run() -> None:
    vm = td(design="tdx-kick-first")
    vm.set_memory_attributes(0, 4 * P, False)
    assert vm.counters[REMOVE] == 4


def test_a_second_track_under_a_vcpu_from_before_is_previous_epoch_busy_and_not_retried() -> None:
    vm = td()
    module = vm.tdx.module
    module.epochs = module.epochs._replace(td_epoch=module.epochs.td_epoch + 1)
    with pytest.raises(PlatformError, match="PREVIOUS_TLB_EPOCH_BUSY"):
        vm.set_memory_attributes(0, P, False)
    assert "seamcall-busy" not in vm.counters


def test_without_remove_the_way_back_is_refused() -> None:
    vm = td(design="tdx-no-remove")
    vm.set_memory_attributes(0, 4 * P, False)
    vm.set_memory_attributes(0, 4 * P, True)
    with pytest.raises(PlatformError, match=r"tdh_mem_page_aug = TDX_EPT_ENTRY_STATE_INCORRECT"):
        vm.guest().accept(0)


def test_busy_tested_by_bit_takes_a_missing_table_for_busy_and_the_fault_repeats_for_ever() -> None:
    vm = Vm("tdx", 4, "tdx-busy-by-bit", private=True)
    with pytest.raises(GuestSpins, match="RET_PF_RETRY"):
        vm.guest().accept(0)


# Busy


@pytest.mark.parametrize("leaf", [BLOCK, TRACK, REMOVE])
def test_a_busy_seamcall_kicks_and_is_repeated_once(leaf: str) -> None:
    vm = td(4)
    vm.fail(leaf)
    vm.set_memory_attributes(0, 4 * P, False)
    assert vm.counters["kick"] == 4 + 1 and vm.counters["seamcall-busy"] == 1 and vm.counters[leaf] == 4 + 1


@pytest.mark.parametrize("leaf", [BLOCK, TRACK, REMOVE])
def test_without_busy_handling_that_is_a_bug(leaf: str) -> None:
    vm = td(design="tdx-no-busy-handling")
    vm.fail(leaf)
    with pytest.raises(PlatformError, match="OPERAND_BUSY"):
        vm.set_memory_attributes(0, P, False)


@pytest.mark.parametrize("leaf", [str(Leaf.PAGE_AUG), str(Leaf.SEPT_ADD)])
def test_a_busy_aug_or_sept_add_retries_the_fault_without_entering(leaf: str) -> None:
    vm = Vm("tdx", 4, private=True)
    vm.fail(leaf)
    vm.guest().accept(0)
    assert [vm.counters[k] for k in ("seamcall-busy", "fault-again", "TDH.VP.ENTER")] == [1, 1, 2]


def test_retried_without_a_kick_a_lock_that_nobody_lets_go_is_for_ever() -> None:
    vm = Vm("tdx", 4, "tdx-retries-for-ever", private=True, vcpus=2)
    vm.guest().accept(0)
    vm.on_point = lambda point: vm.set_memory_attributes(0, P, False) and None
    with pytest.raises(Deadlock, match="for ever under mmu_lock"):
        vm.guest(1).accept(P)


def test_only_what_exists_can_be_injected() -> None:
    with pytest.raises(ValueError, match=r"TDH\.MEM\.TRACK"):
        td().fail("TDH.MEM.NOTHING")
    with pytest.raises(ValueError, match="there are"):
        Vm("snp", 4).fail(TRACK)


# Batches


@pytest.mark.parametrize("batch", [1, 8, 64, 512, 1000])
def test_one_track_and_one_kick_serve_a_batch_of_blocks(batch: int) -> None:
    vm = td(2048, zap_batch=batch)
    vm.set_memory_attributes(0, 2048 * P, False)
    batches = -(-2048 // batch)
    assert [vm.counters[k] for k in (BLOCK, TRACK, "kick", REMOVE)] == [2048, batches, batches, 2048]
    assert not vm.tdx.module.state.any() and vm.tdx.module.epochs.td_epoch == 1 + batches


def test_a_batch_with_a_busy_seamcall_goes_on_behind_the_page_that_was_busy() -> None:
    vm = td(64, zap_batch=64)
    vm.fail(REMOVE)
    vm.set_memory_attributes(0, 64 * P, False)
    assert vm.counters[REMOVE] == 65 and vm.counters[TRACK] == 1 and not vm.tdx.module.state.any()


@pytest.mark.parametrize("design", ["tdx-no-track", "tdx-no-block", "tdx-track-first", "tdx-no-kick"])
def test_a_wrong_order_is_as_wrong_in_a_batch(design: str) -> None:
    with pytest.raises(PlatformError):
        td(64, design, zap_batch=64).set_memory_attributes(0, 64 * P, False)


def test_the_counts_side_by_side_differ_in_tracks_and_kicks_only() -> None:
    found = batching(1024, (1, 512))
    one, many = found.counts[1], found.counts[512]
    assert {kind for kind in one if one[kind] != many[kind]} == {TRACK, "kick", "kick-ipi"}
    assert (one["kick-ipi"], many["kick-ipi"]) == (4096, 8)


def test_its_text_gives_seconds_where_they_are_published_and_bounds_where_not() -> None:
    _, _, one, many = (line.split() for line in batching(1024, (1, 512)).text().splitlines())
    assert one[-1] == "0.0154" and many[-3:] == ["0.00522", "..", "0.0154"]


def test_a_leaf_that_nobody_thawed_is_not_present_so_the_zap_leaves_its_entry_behind() -> None:
    vm = Vm("tdx", 4, Design.parse(open_ended("write_spte(leaf)")))
    vm.guest().set_memory_encrypted(0, 4 * P)
    vm.guest().set_memory_decrypted(0, 4 * P)
    assert vm.placed(0) == ("MAPPED", "shared") and BLOCK not in vm.counters


def open_ended(row: str) -> str:
    """upstream with an `aug:` that leaves out one row."""
    rows = ["freeze_spte(table)", "tdh_mem_sept_add()", "write_spte(table)", "freeze_spte(leaf)", "clflush()",
            "tdh_mem_page_aug()", "write_spte(leaf)"]  # fmt: skip
    return "\n    ".join(["base: upstream\naug:", *(other for other in rows if other != row)]) + "\n"


def test_a_dead_td_is_told_before_any_lock_is_tried() -> None:
    vm = td(vcpus=2)
    vm.tdx.module.fatal = True
    vm.fail("TDH.MEM.RANGE.BLOCK")
    with pytest.raises(PlatformError, match="tdh_mem_range_block = TDX_TD_FATAL"):
        vm.set_memory_attributes(0, P, False)

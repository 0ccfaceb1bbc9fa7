"""TDX in the explorer: the module's answers to right and wrong orders, and what a host write does, in every run."""

from __future__ import annotations

from typing import Any

import pytest

from kvmlab.design import Design
from kvmlab.machine.conf import Switches
from kvmlab.verdict.report import NEVER, SOMETIMES, check

SIZES = {
    ("upstream", "tiny", "split"): (4_018, 8_994, 67),
    ("v8-post-hook", "tiny", "split"): (3_696, 8_296, 59),
    ("gmem-in-place", "tiny", "in-place"): (3_505, 7_590, 62),
    ("upstream", "round-trip", "split"): (22_789, 50_024, 96),
}


@pytest.mark.parametrize(("design", "scenario", "backing"), SIZES)
def test_a_small_scenario_has_exactly_so_many_states_transitions_and_levels(
    design: str, scenario: str, backing: str
) -> None:
    report = check(design, "tdx", scenario, backing)
    assert (report.states, report.transitions, report.depth) == SIZES[design, scenario, backing]


def told(design: str, scenario: str, prop: str, backing: str = "split", **switches: Any) -> str:
    """What the last step of the shortest counterexample says."""
    run = check(design, "tdx", scenario, backing, Switches(**switches)).trace(prop)
    return " ".join(run.frames[-1].event.notes)


WRONG_ORDERS = {
    "tdx-no-block": "tdh_mem_page_remove = TDX_GPA_RANGE_NOT_BLOCKED | RCX",
    "tdx-no-track": "tdh_mem_page_remove = TDX_TLB_TRACKING_NOT_DONE | RCX",
    "tdx-track-first": "tdh_mem_page_remove = TDX_TLB_TRACKING_NOT_DONE | RCX",
    "tdx-no-kick": "tdh_mem_page_remove = TDX_TLB_TRACKING_NOT_DONE | RCX",
    "tdx-kick-first": "tdh_mem_page_remove = TDX_TLB_TRACKING_NOT_DONE | RCX",
    "tdx-wbinvd-first": "tdh_phymem_page_wbinvd = TDX_PAGE_METADATA_INCORRECT | RCX",
}


@pytest.mark.parametrize("design", WRONG_ORDERS)
def test_the_module_answers_a_wrong_order_with_the_code_of_its_table(design: str) -> None:
    assert WRONG_ORDERS[design] in told(design, "round-trip", "platform-error")


def test_without_a_kick_the_zap_succeeds_if_every_vcpu_happens_to_have_left() -> None:
    assert check("tdx-no-kick", "tdx", "round-trip").verdicts["platform-error"].verdict == SOMETIMES


def test_block_track_kick_remove_as_merged_meets_no_wrong_answer() -> None:
    assert check("upstream", "tdx", "to-shared").violated == []


def test_a_page_that_was_never_removed_cannot_be_augmented_again() -> None:
    assert "tdh_mem_page_aug = TDX_EPT_ENTRY_STATE_INCORRECT | RCX" in told(
        "tdx-no-remove", "round-trip", "platform-error"
    )


def test_busy_answers_arise_by_themselves() -> None:
    assert "TDX_OPERAND_BUSY" in told("tdx-no-busy-handling", "round-trip", "platform-error")


def test_one_kick_and_one_retry_are_enough_for_every_busy_answer() -> None:
    assert check("upstream", "tdx", "seamcall-busy").violated == []


def test_retrying_under_the_lock_has_no_bound() -> None:
    assert check("tdx-retries-for-ever", "tdx", "round-trip").measures["seamcall-busy"]["most"] is None
    assert check("upstream", "tdx", "round-trip").measures["seamcall-busy"]["most"] == 1


def test_each_going_shared_costs_one_kick_for_the_zap_and_one_for_the_flush() -> None:
    assert check("upstream", "tdx", "host-io").measures["kicks"]["least"] == 2


def test_a_private_fault_that_loops_in_kvm_holds_up_who_deletes_the_memslot() -> None:
    assert check("tdx-loops-on-deleted-slot", "tdx", "slot-deleted").violated == ["livelock"]
    assert check("upstream", "tdx", "slot-deleted").violated == []


def test_two_tracks_without_a_kick_meet_a_busy_that_kvm_does_not_take_for_busy() -> None:
    assert "tdh_mem_track = TDX_PREVIOUS_TLB_EPOCH_BUSY" in told(
        "tdx-track-twice", "round-trip", "platform-error"
    )


def test_a_second_aug_of_one_page_is_an_error() -> None:
    report = check("tdx-aug-twice", "tdx", "careless")
    assert report.violated == ["platform-error"]


def test_a_mirror_that_shows_a_table_too_early_lets_another_vcpu_walk_into_nothing() -> None:
    assert "tdh_mem_page_aug = TDX_EPT_WALK_FAILED | RCX" in told(
        "tdx-links-early", "range", "platform-error"
    )


def test_a_busy_test_by_bit_turns_a_walk_that_fails_into_a_loop() -> None:
    assert check("tdx-busy-by-bit", "tdx", "tiny").violated == ["livelock"]


def test_without_clflush_the_zeroing_comes_back_over_the_tds_data() -> None:
    assert "TD consumes poison" in told("tdx-no-clflush", "tiny", "host-machine-check")


def test_without_wbinvd_a_line_of_the_td_comes_back_over_shared_data() -> None:
    assert check("tdx-no-wbinvd", "tdx", "to-shared", "in-place").violated == ["integrity"]


def test_without_movdir64b_only_parts_with_the_erratum_suffer() -> None:
    assert check("tdx-no-clear", "tdx", "discard").violated == []
    assert check(
        "tdx-no-clear", "tdx", "discard", switches=Switches(partial_write_erratum=True)
    ).violated == ["host-machine-check"]


@pytest.mark.parametrize("integrity", [True, False])
def test_a_host_write_to_the_private_page_kills_the_td_with_a_mac_or_without(integrity: bool) -> None:
    report = check("upstream", "tdx", "host-writes-private", switches=Switches(integrity=integrity))
    assert report.verdicts["host-machine-check"].verdict == SOMETIMES


def test_a_host_write_is_never_fatal_at_the_moment_of_the_write() -> None:
    run = check("upstream", "tdx", "host-writes-private").trace("host-machine-check")
    assert run.frames[-1].event.actor != "host"


def test_with_the_erratum_a_partial_write_poisons_at_once() -> None:
    run = check(
        "upstream", "tdx", "host-writes-private", switches=Switches(partial_write_erratum=True)
    ).trace("host-machine-check")
    assert any(
        "poisoned at once" in line for frame in run.frames if frame.event for line in frame.event.notes
    )


def test_directmap_hooks_for_every_platform_oops_when_the_kernel_zeroes_the_page() -> None:
    assert "clear_highpage() of P0, which is not in" in told("pre-post-directmap", "tiny", "kernel-bug")


def test_and_in_place_where_nothing_is_zeroed_they_oops_at_clflush() -> None:
    assert "tdx_clflush_page() of P0, which is not in" in told(
        "pre-post-directmap", "tiny", "kernel-bug", "in-place"
    )


@pytest.mark.parametrize("scenario", ["tiny", "to-private", "to-shared", "round-trip"])
def test_directmap_hooks_for_snp_alone_are_clean_on_tdx(scenario: str) -> None:
    assert check("pre-post-snp-only", "tdx", scenario).violated == []


def test_the_op_of_the_series_leaves_nothing_to_do_on_tdx() -> None:
    calls = [row.call for row in Design.load("v8-post-hook").rows("ioctl", to="shared", platform="tdx")]
    assert not {"rmpupdate", "kvm_unmap_directmap", "kvm_map_directmap"} & set(calls)


def test_an_op_under_mmu_lock_does_not_sleep_where_it_is_absent() -> None:
    assert check("v7-under-lock", "tdx", "to-shared").verdicts["sleep-in-atomic"].verdict == NEVER


def test_without_the_zap_a_stray_read_goes_through_the_old_shared_mapping() -> None:
    run = check("no-zap", "tdx", "tiny").trace("stale-mapping")
    assert "stray read" in run.text()


def test_without_the_flush_going_shared_is_still_safe_for_the_module_guards_its_own_translations() -> None:
    assert check("no-flush", "tdx", "to-shared").violated == []


def test_a_vmm_that_converts_what_was_touched_loses_the_page_to_a_stray_read() -> None:
    assert check("upstream", "tdx", "auto-convert").violated == ["guest-killed"]
    assert check("upstream", "snp", "auto-convert").violated == []

"""Memslots: requests over several and over holes, one that comes or goes, two address spaces, the shared hull."""

from __future__ import annotations

from typing import Any

import pytest

from kvmlab.errors import NotApplicable
from kvmlab.kvm.memslots import SMM, MemSlot, Piece, clip, pieces, visits
from kvmlab.verdict.report import Report, check
from kvmlab.verdict.run import Case


def states(report: Report, *cells: str | tuple[str, Any]) -> set[tuple[Any, ...]]:
    """The values of these cells, (name, key) or a name, in every reachable state."""
    layout = report.case.model.layout
    found = [layout.cell(*(cell if isinstance(cell, tuple) else (cell,))) for cell in cells]
    packed = (report.graph.packed(i) for i in range(report.states))
    return {tuple(cell.get(x) for cell in found) for x in packed}


# The walk


@pytest.mark.parametrize(
    ("slot", "request_", "part"),
    [((0, 4), (0, 4), (0, 4)), ((0, 4), (2, 9), (2, 4)), ((3, 5), (0, 4), (3, 4)), ((0, 4), (4, 5), None)],
)
def test_a_request_is_clipped_to_the_memslot(
    slot: tuple[int, int], request_: tuple[int, int], part: tuple[int, int] | None
) -> None:
    assert clip(*slot, *request_) == part


def test_a_walk_takes_address_spaces_in_turn_and_memslots_by_gfn_and_skips_what_is_empty() -> None:
    slots = [MemSlot(0, 2, SMM), MemSlot(3, 2), MemSlot(0), MemSlot(9)]
    assert pieces(slots, (0, 1, 2, 3)) == [Piece(0, (0,)), Piece(0, (3,)), Piece(SMM, (0, 1))]


@pytest.mark.parametrize(
    ("walk", "visited"),
    [
        (None, [True, True, True]),
        ("kvm_memslots", [True, True, False]),
        ("gfn_to_memslot", [True, False, False]),
    ],
)
def test_a_hook_visits_every_piece_unless_it_takes_one_memslot_for_all(
    walk: str | None, visited: list[bool]
) -> None:
    assert [visits(walk, as_id, first, 0) for as_id, first in ((0, 0), (0, 5), (SMM, 0))] == visited


@pytest.mark.parametrize("design", ["upstream", "v8-post-hook"])
def test_in_a_hole_the_attribute_is_stored_and_nothing_else_happens(design: str) -> None:
    report = check(design, scenario="hole")
    assert ("private",) in states(report, ("attr", 1))
    assert {entry.assigned for (entry,) in states(report, ("rmp", "P1"))} == {False}
    assert states(report, ("directmap", "P1"), ("npt", 1)) == {("present", None)}


def test_the_hull_spans_the_hole() -> None:
    assert states(check("upstream", scenario="hole"), "invalidate_range") == {(None,), ((0, 1),), ((0, 3),)}


def test_a_post_hook_that_visits_only_the_first_memslot_leaves_the_second_faulting_for_ever() -> None:
    assert check("first-memslot-only", scenario="range").violated == ["livelock"]
    assert check("first-memslot-only", scenario="tiny").violated == []


@pytest.mark.parametrize("design", ["v8-post-hook", "upstream"])
def test_a_hook_that_visits_every_memslot_is_clean_over_a_hole(design: str) -> None:
    assert check(design, scenario="hole").violated == []


# No memslot yet


def test_as_merged_a_request_that_no_memslot_overlaps_invalidates_nothing() -> None:
    assert ("none", 1) not in states(check("upstream", scenario="slot-added"), "slot", "in_progress")


def test_in_the_v8_era_it_opens_the_window_all_the_same() -> None:
    assert ("none", 1) in states(check("v8-post-hook", scenario="slot-added"), "slot", "in_progress")


def test_that_is_safe_because_a_fault_looks_its_memslot_up_before_it_takes_its_snapshot() -> None:
    assert check("upstream", scenario="slot-added").violated == []
    assert "warning" in check("late-memslot", scenario="slot-added").violated


def test_v8_never_tells_the_rmp_about_attributes_that_are_older_than_the_memslot() -> None:
    assert check("v8-post-hook", scenario="slot-added").violated == ["livelock"]


def test_whoever_updates_the_rmp_at_the_fault_does_not_mind() -> None:
    for design, backing in (("upstream", "split"), ("gmem-in-place", "in-place")):
        assert check(design, scenario="slot-added", backing=backing).violated == []


@pytest.mark.parametrize("platform", ["snp", "tdx", "sev"])
def test_without_a_memslot_a_shared_access_is_mmio_and_a_private_one_a_memory_fault(platform: str) -> None:
    measures = check("upstream", platform, "slot-added").measures
    assert measures["mmio"]["most"] is None and measures["exits"]["most"] is None


def test_in_place_it_is_the_binding_that_counts_not_the_published_slot() -> None:
    assert ("bound", 1) in states(
        check("gmem-in-place", scenario="slot-added", backing="in-place"), "slot", "in_progress"
    )
    assert ("bound", 1) not in states(check("upstream", scenario="slot-added"), "slot", "in_progress")


# A memslot that goes


@pytest.mark.parametrize("platform", ["snp", "tdx", "sev", "sw"])
def test_a_memslot_may_be_deleted_during_a_conversion(platform: str) -> None:
    report = check("upstream", platform, "slot-deleted")
    assert report.violated == [] and report.measures["exits"]["most"] is None


def test_the_deleter_waits_for_faults_that_saw_the_slot_valid() -> None:
    report = check("upstream", scenario="slot-deleted")
    assert ("none", "valid") not in states(report, "slot", ("fault_slot", "CPU0"))
    assert ("invalid", "valid") in states(report, "slot", ("fault_slot", "CPU0"))


def test_a_fault_that_maps_into_an_invalid_memslot_leaves_a_mapping_behind() -> None:
    assert check("maps-into-invalid-slot", scenario="slot-deleted").violated == ["out-of-sync"]


# SMM


@pytest.mark.parametrize("platform", ["sev", "sw"])
def test_a_zap_of_one_address_space_leaves_smm_with_the_shared_page(platform: str) -> None:
    assert check("v8-post-hook", platform, "smm").violated == []
    assert "stale-mapping" in check("zaps-one-address-space", platform, "smm").violated


@pytest.mark.parametrize(
    ("design", "platform", "reason"),
    [("v8-post-hook", "snp", "a guest on snp has no SMM"), ("upstream", "sev", "has one address space")],
)
def test_where_there_is_one_address_space_the_scenario_does_not_apply(
    design: str, platform: str, reason: str
) -> None:
    with pytest.raises(NotApplicable, match=reason):
        check(design, platform, "smm")


# Two invalidations at once


@pytest.mark.parametrize("design", ["upstream", "v8-post-hook"])
def test_two_invalidations_share_one_hull_that_reaches_over_what_lies_between(design: str) -> None:
    report = check(design, scenario="two-ranges")
    assert (2, (0, 3)) in states(report, "in_progress", "invalidate_range")
    assert report.violated == []


def sent_back(report: Report, gfn: int) -> bool:
    """Whether a fault on `gfn` is ever retried."""
    label = {n for n, found in enumerate(report.graph.labels) if "retry" in found.counts}
    case: Case = report.case
    for i in range(report.states):
        edges = range(report.graph.start[i], report.graph.start[i + 1])
        for e in edges:
            if report.graph.label[e] in label:
                cpu = case.model.actors[report.graph.actor[e]].key
                if case.model.layout.cell("acc", cpu).get(report.graph.packed(i)).gfn == gfn:
                    return True
    return False


def test_a_fault_between_them_is_sent_back_though_nobody_changes_its_page() -> None:
    assert sent_back(check("upstream", scenario="two-ranges"), 1)


# Large pages


def test_the_hull_is_widened_to_both_ends_at_2m_and_to_the_1g_page() -> None:
    ranges = states(check("upstream", scenario="huge-1g"), "invalidate_range")
    assert ((1, 3),) in ranges and ((0, 6),) in ranges
    assert ((0, 4),) in states(check("hull-of-2m-only", scenario="huge-1g"), "invalidate_range")


def test_head_tail_and_the_1g_page_around_become_mixed_and_the_rest_does_not() -> None:
    report = check("upstream", scenario="huge-1g")
    keys = [("2M", 0), ("2M", 2), ("2M", 4), ("1G", 0)]
    assert states(report, *(("mixed", key) for key in keys)) == {(False,) * 4, (True, True, False, True)}


def test_a_neighbour_in_another_2m_page_maps_the_1g_page_over_a_changing_one_unless_the_hull_has_it() -> None:
    assert check("hull-of-2m-only", scenario="huge").violated == []
    assert "warning" in check("hull-of-2m-only", scenario="huge-1g").violated
    assert check("upstream", scenario="huge-1g").violated == []

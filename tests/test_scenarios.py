"""The scenarios: exact sizes, what must be reachable, and cases that do not exist."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest

from kvmlab.compile.build import build
from kvmlab.design import Design
from kvmlab.design.calls import CALLS
from kvmlab.errors import InputError, NotApplicable
from kvmlab.explore import arrays
from kvmlab.machine.conf import Switches
from kvmlab.machine.parts import PARTS, Part
from kvmlab.machine.scenario import Discards, HostWrites
from kvmlab.machine.scenarios import SCENARIOS, find_scenario
from kvmlab.verdict.matrix import dependence
from kvmlab.verdict.report import Report, check

UPSTREAM = Design.load("upstream")
SIZES = {
    ("v8-post-hook", "tiny"): (940, 2_770, 37),
    ("v8-post-hook", "round-trip"): (4_896, 14_956, 76),
    ("v8-post-hook", "host-io"): (4_243, 16_520, 47),
    ("v8-post-hook", "careless"): (9_165, 30_449, 52),
    ("v8-post-hook", "hostile"): (508_654, 1_560_826, 141),
    ("pre-post-directmap", "tiny"): (870, 2_562, 37),
    ("defer-to-fault", "tiny"): (1_375, 4_031, 48),
    ("defer-to-fault-takes-back", "tiny"): (3_259, 9_690, 74),
    ("upstream", "tiny"): (1_169, 3_429, 43),
    ("upstream", "discard"): (14_174, 51_035, 105),
    ("upstream", "discard-first"): (13_610, 48_237, 106),
    ("upstream", "discard-races"): (2_487, 7_985, 63),
    ("upstream", "huge-accept"): (4_059, 8_793, 88),
    ("upstream", "huge-split"): (98_575, 284_805, 129),
    ("upstream", "vmm-punches"): (11_084, 28_290, 119),
    ("upstream", "punch-4k"): (10_651, 24_999, 90),
    ("upstream", "zap-yields"): (10_549, 33_037, 66),
    ("upstream", "xarray-full"): (20_066, 63_056, 69),
    ("upstream", "reserve-fails"): (1_733, 5_147, 85),
    ("upstream", "range"): (10_247, 32_021, 67),
    ("upstream", "hole"): (10_453, 32_648, 69),
    ("upstream", "slot-added"): (3_773, 11_947, 63),
    ("upstream", "slot-deleted"): (402, 1_105, 53),
    ("upstream", "two-ranges"): (238_841, 953_557, 76),
    ("upstream", "huge-1g"): (70_019, 232_698, 73),
}


@pytest.mark.parametrize(("design", "scenario"), SIZES)
def test_a_small_scenario_has_exactly_so_many_states_transitions_and_levels(
    design: str, scenario: str
) -> None:
    report = check(design, scenario=scenario)
    assert (report.states, report.transitions, report.depth) == SIZES[design, scenario]


def test_the_scenario_with_smm_has_exactly_so_many_too() -> None:
    report = check("v8-post-hook", "sev", "smm")
    assert (report.states, report.transitions, report.depth) == (11_323, 25_032, 47)


def as_merged(scenario: str) -> Report:
    """The merged code in a scenario, on the first platform that has it; v8 where it has none."""
    for design, platform in (("upstream", "snp"), ("upstream", "tdx"), ("v8-post-hook", "sev")):
        with contextlib.suppress(NotApplicable):
            return check(design, platform, scenario)
    raise AssertionError(f"nobody has a case of {scenario}")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_in_every_scenario_the_conversion_returns_and_the_guest_gets_its_page(scenario: str) -> None:
    assert as_merged(scenario).witnesses == {"conversion returns": True, "guest uses the page": True}


def test_without_rmpupdate_the_guest_never_gets_its_page() -> None:
    assert check("never-rmpupdate", scenario="tiny").witnesses["guest uses the page"] is False


def test_v8_lets_a_guest_fault_without_bound_inside_the_window() -> None:
    assert check("v8-post-hook", scenario="tiny").measures["spurious-npf"] == {"least": 0, "most": None}


def test_with_rmpupdate_inside_the_window_there_is_no_spurious_fault() -> None:
    assert check("pre-post-directmap", scenario="tiny").measures["spurious-npf"] == {"least": 0, "most": 0}


def test_going_shared_the_v8_loop_exists_only_in_place() -> None:
    assert check("v8-post-hook", scenario="host-io").measures["spurious-npf"]["most"] == 2
    assert (
        check("v8-post-hook", scenario="host-io", backing="in-place").measures["spurious-npf"]["most"] is None
    )


def test_storing_before_the_zap_lets_a_shared_read_see_ciphertext_without_a_fault() -> None:
    assert check("v8-post-hook", scenario="host-io").measures["silent-read"]["most"] is None


@pytest.mark.parametrize(("design", "backing"), [("upstream", "split"), ("gmem-in-place", "in-place")])
def test_zapping_before_the_store_leaves_no_such_read(design: str, backing: str) -> None:
    assert check(design, scenario="host-io", backing=backing).measures["silent-read"]["most"] == 0


def test_the_merged_code_leaves_a_residue_and_v8_does_not() -> None:
    assert check("upstream", scenario="host-io").measures["residue"] == {"least": 1, "most": 1}
    assert check("v8-post-hook", scenario="host-io").measures["residue"] == {"least": 0, "most": 0}


def test_upstream_has_no_in_place_case() -> None:
    with pytest.raises(NotApplicable, match="upstream is a design for split backing"):
        check("upstream", backing="in-place")


def test_a_start_that_a_design_cannot_reach_is_not_applicable() -> None:
    with pytest.raises(NotApplicable, match="never gives the guest a private page"):
        check("never-rmpupdate", scenario="to-shared")


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ({"platform": "cca"}, "unknown platform 'cca'; there are: snp"),
        ({"scenario": "gigantic"}, "unknown scenario 'gigantic'; there are: tiny, to-private"),
        ({"backing": "both"}, "unknown backing 'both'; there are: split, in-place"),
    ],
)
def test_a_name_that_does_not_exist_is_refused_with_those_that_do(case: dict[str, str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        check("v8-post-hook", **case)


def test_whether_rmpupdate_flushes_matters_only_where_the_op_precedes_the_flush() -> None:
    changed = dependence(
        Switches(rmpupdate_flushes=False), ["v8-post-hook", "set-mem-attr-op", "no-zap"], ["tiny", "host-io"]
    )
    assert changed == [("set-mem-attr-op", "host-io", "split", "integrity", "Never", "Sometimes")]


@pytest.mark.parametrize(
    "chosen", [Switches(rmp_checked_at="fill"), Switches(identical_keeps_validated=False)]
)
def test_no_verdict_depends_on_when_the_rmp_is_checked_or_on_a_repeated_rmpupdate(chosen: Switches) -> None:
    assert dependence(chosen, ["v8-post-hook", "upstream", "pre-post-directmap"], ["tiny", "host-io"]) == []


def test_v8s_handler_would_psmash_4k_entries_if_an_ordinary_access_set_sizem() -> None:
    changed = dependence(Switches(access_sets_sizem=True), ["v8-post-hook", "upstream"], ["huge-split"])
    assert changed == [("v8-post-hook", "huge-split", "split", "warning", "Never", "Sometimes")]


def test_no_verdict_depends_on_whether_4k_may_go_over_the_head_of_a_2m_entry() -> None:
    chosen = Switches(head_4k_over_2m=True)
    assert (
        dependence(chosen, ["v8-post-hook", "upstream"], ["huge-accept", "huge-split", "vmm-punches"]) == []
    )


def test_a_repeated_rmpupdate_costs_the_guest_its_validation_where_it_does_not_keep_it() -> None:
    text = Design.load("upstream").text
    prepare = text[text.index("    sev_gmem_prepare()") : text.index("    read_lock(&kvm")]
    always = "    if (attr == private) {\n adjust_direct_map()\n rmpupdate(private)\n }\n"
    keeps, clears = (
        check(
            text.replace(prepare, always), scenario="host-io", switches=Switches(identical_keeps_validated=k)
        )
        for k in (True, False)
    )
    assert keeps.violated == []
    assert "conversion-refused" in clears.violated


def test_without_preempt_count_sleeping_in_atomic_context_is_not_reported() -> None:
    assert "sleep-in-atomic" in check("v7-under-lock", scenario="tiny").violated
    assert check("v7-under-lock", scenario="tiny", switches=Switches(preempt_count=False)).violated == []


def test_a_careless_guest_is_not_judged_by_its_own_fate() -> None:
    report = check("v8-post-hook", scenario="careless")
    assert report.verdicts["guest-killed"].verdict == "not judged"
    assert any("guest-killed" in text for text in report.not_checked)


def test_a_search_that_stops_early_says_that_it_is_not_complete() -> None:
    report = check("v8-post-hook", limit=100)
    assert not report.complete
    assert "NOT complete" in report.text()
    assert any("beyond the first" in text for text in report.not_checked)


def test_a_design_as_text_is_checked_like_one_that_ships() -> None:
    text = Design.load("v8-post-hook").text
    assert check(text, scenario="tiny").states == SIZES["v8-post-hook", "tiny"][0]


@pytest.mark.parametrize(
    ("platform", "scenario", "reason"),
    [
        ("sev", "hook-fails", "there is no RMPUPDATE to fail on sev"),
        ("sw", "host-stray", "nothing unmaps the directmap on sw"),
        ("sw", "host-writes-private", "user space cannot map"),
        ("sev", "huge-accept", "on sev no RMP entry has a size"),
        ("snp", "reserve-fails", "v8-post-hook reserves nothing"),
    ],
)
def test_a_scenario_about_what_is_not_there_does_not_apply(platform: str, scenario: str, reason: str) -> None:
    with pytest.raises(NotApplicable, match=reason):
        check("v8-post-hook", platform, scenario)


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [("discard", "nothing is discarded"), ("huge-split", "there is no 2M page to map")],
)
def test_what_needs_a_page_of_its_own_for_each_kind_does_not_apply_in_place(
    scenario: str, reason: str
) -> None:
    with pytest.raises(NotApplicable, match=reason):
        check("v8-post-hook", scenario=scenario, backing="in-place")


def test_without_an_rmp_a_host_write_to_the_private_page_goes_unnoticed() -> None:
    assert check("upstream", "sev", "host-writes-private").violated == ["integrity"]
    assert check("v8-post-hook", "snp", "host-writes-private").violated == ["kernel-bug"]


def test_where_hardware_checks_nothing_implicit_conversion_leaks() -> None:
    assert "confidentiality" in check("upstream", "sw", "auto-convert").violated
    assert check("upstream", "snp", "auto-convert").violated == []


def test_a_neighbour_s_fault_maps_a_2m_page_over_a_changing_one_unless_the_hull_is_wide() -> None:
    assert check("narrow-hull", scenario="huge").violated == ["kernel-bug", "out-of-sync"]
    assert check("upstream", scenario="huge").violated == []


def test_an_op_under_if_flush_runs_only_when_the_zap_found_a_leaf() -> None:
    text = Design.load("v8-post-hook").text
    changed = text.replace(
        "kvm_mem_attrs_changed()", "flush |= kvm_unmap_gfn_range()\n kvm_flush_remote_tlbs()"
    )
    guarded = changed.replace("    static_call(", "    if (flush)\n            static_call(")
    assert check(changed, scenario="tiny").violated == []
    assert check(guarded, scenario="tiny").violated == ["livelock"]


def test_a_stale_fault_drops_the_lock_in_the_way_in_which_it_holds_it() -> None:
    text = Design.load("v8-post-hook").text
    first = "    write_lock(mmu_lock)\n    is_page_fault_stale()\n    write_unlock(mmu_lock)\n"
    twice = text.replace("    read_lock(mmu_lock)\n", first + "    read_lock(mmu_lock)\n")
    assert check(twice, scenario="tiny").violated == []


def test_a_discard_before_the_ioctl_loses_a_write_of_the_guest_in_the_v8_era() -> None:
    assert check("v8-post-hook", scenario="discard-first").violated == ["integrity"]
    assert check("pre-post-directmap", scenario="discard-first").violated == ["integrity"]


def test_a_discard_that_makes_one_page_too_many_shared_costs_the_guest_the_next_one() -> None:
    assert check("punch-one-too-many", scenario="discard").violated == []
    assert check("punch-one-too-many", scenario="huge-split").violated == ["livelock", "out-of-sync"]


def test_a_discard_after_the_ioctl_loses_nothing() -> None:
    assert check("v8-post-hook", scenario="discard").violated == []


def test_rmpupdate_at_the_fault_makes_that_write_wait() -> None:
    text = Design.load("v8-post-hook").text
    prepare = "    rmp_prepare():\n        kvm_unmap_directmap()\n        rmpupdate(private)\n"
    prepared = text.replace("    read_lock(mmu_lock)\n", prepare + "    read_lock(mmu_lock)\n")
    early = "    truncate_inode_pages_range()\n"
    later = prepared.replace(early, "").replace(
        "    sev_invalidate_private", early + "    sev_invalidate_private"
    )
    assert check(later, scenario="discard-first").violated == []
    assert check("upstream", scenario="discard-first").violated == []


def test_rmpupdate_at_the_fault_and_v8s_discard_do_not_go_together() -> None:
    text = Design.load("v8-post-hook").text
    prepare = "    rmp_prepare():\n        kvm_unmap_directmap()\n        rmpupdate(private)\n"
    prepared = text.replace("    read_lock(mmu_lock)\n", prepare + "    read_lock(mmu_lock)\n")
    assert "host-rmp-fault" in check(prepared, scenario="discard").violated
    assert "host-rmp-fault" in check("defer-to-fault", scenario="discard").violated


def test_a_discard_that_races_with_a_conversion_gives_the_page_back_assigned_in_every_v8_order() -> None:
    for design in ("v8-post-hook", "v8-op-in-window", "pre-post-directmap"):
        assert check(design, scenario="discard-races").violated == ["kernel-bug"]
    assert check("upstream", scenario="discard-races").violated == []


def test_a_fault_that_is_stale_may_allocate_anew_what_was_just_discarded() -> None:
    report = check("upstream", scenario="huge-split")
    assert report.example("double").why == "double"
    assert report.measures["double"]["most"] <= 1


def test_as_merged_such_a_page_is_assigned_as_well() -> None:
    assert check("upstream", scenario="huge-split").measures["residue"] == {"least": 0, "most": 1}
    assert check("v8-post-hook", scenario="huge-split").measures["residue"] == {"least": 0, "most": 0}


def test_v7_sleeps_under_mmu_lock_in_a_discard_alone_as_the_splat_of_2023_says() -> None:
    trace = check("v7-under-lock", scenario="vmm-punches").trace("sleep-in-atomic")
    assert {frame.event.section for frame in trace.frames if frame.event} == {"punch"}


def test_the_v8_handler_warns_of_a_discard_and_the_merged_one_does_not() -> None:
    assert check("v8-post-hook", scenario="vmm-punches").violated == ["warning"]
    assert check("psmash-against-punch", scenario="vmm-punches").violated == ["warning"]
    assert check("upstream", scenario="vmm-punches").violated == []


def test_without_a_window_a_zap_that_yields_lets_a_stale_leaf_in() -> None:
    text = Design.load("upstream").text
    begin = "kvm_mmu_invalidate_begin()\n        kvm_mmu_invalidate_range_add()\n        "
    head, hook, tail = text.partition("kvm_arch_pre_set_memory_attributes():")
    late = head.replace(begin, "") + hook + tail.replace("if (flush)", begin + "if (flush)", 1)
    assert check(late, scenario="range").violated == []
    assert "warning" in check(late, scenario="zap-yields").violated


def half_stored(design: str) -> bool:
    """Whether the attributes of the range can differ while nobody is inside an ioctl."""
    report = check(design, scenario="xarray-full")
    cells = [report.case.model.layout.cell("attr", gfn) for gfn in (0, 1)]
    owner = report.case.model.layout.cell("slots_lock")
    states = (report.graph.packed(i) for i in range(report.states))
    return any(owner.get(x) is None and cells[0].get(x) != cells[1].get(x) for x in states)


def test_a_store_that_fails_leaves_half_of_the_range_in_v8_and_all_or_nothing_as_merged() -> None:
    assert half_stored("v8-post-hook")
    assert not half_stored("upstream")


@pytest.mark.parametrize("design", ["v8-post-hook", "upstream"])
def test_an_allocation_that_fails_in_the_xarray_costs_nothing_but_another_ioctl(design: str) -> None:
    assert check(design, scenario="xarray-full").violated == []


def test_an_entry_that_is_reserved_and_empty_must_not_read_as_one_with_attributes() -> None:
    assert check("reserved-read-as-attributes", scenario="reserve-fails").violated == ["out-of-sync"]
    assert check("upstream", scenario="reserve-fails").violated == []


@pytest.mark.parametrize(
    ("design", "backing"),
    [("pre-post-directmap", "split"), ("upstream", "split"), ("gmem-in-place", "in-place")],
)
def test_a_hostile_guest_does_the_host_no_harm(design: str, backing: str) -> None:
    assert check(design, scenario="hostile", backing=backing).violated == []


def test_a_hostile_guest_reaches_a_bug_where_the_zap_is_left_out() -> None:
    assert "kernel-bug" in check("no-zap", scenario="hostile").violated


# Scenarios are joined; machines are assembled.


def test_the_punch_of_4k_out_of_a_2m_page_needs_psmash() -> None:
    text = "\n".join(line for line in UPSTREAM.spelled("punch").splitlines() if "psmash" not in line)
    without = Design.parse(f"base: upstream\n{text}")
    assert check(without, "snp", "punch-4k").verdicts["platform-error"].verdict == "Sometimes"
    assert check(UPSTREAM, "snp", "punch-4k").verdicts["platform-error"].verdict == "Never"


def test_two_scenarios_are_joined_by_name() -> None:
    both = find_scenario("host-stray+discard")
    assert both.eras == SCENARIOS["host-stray"].eras
    assert both.threads == (HostWrites("stray"), Discards("after"), HostWrites("freed"))
    assert (
        check("v8-post-hook", "snp", "host-stray+discard").states
        > check("v8-post-hook", "snp", "host-stray").states
    )


def test_a_join_has_the_failures_of_both() -> None:
    assert find_scenario("hook-fails+xarray-full+host-io").may == ("rmpupdate", "xarray")


def test_scenarios_that_say_different_things_of_memory_do_not_fit() -> None:
    with pytest.raises(
        InputError, match=r"range and huge-1g do not fit: gfns is \(0, 1\) and \(0, 1, 2, 3, 4, 5\)"
    ):
        find_scenario("range+huge-1g")


def test_an_unknown_part_of_a_join_is_named() -> None:
    with pytest.raises(InputError, match="unknown scenario 'tinny'"):
        find_scenario("tiny+tinny")


@pytest.mark.parametrize(("racers", "states"), [(0, 32), (1, 940), (2, 22_401), (3, 490_621)])
def test_any_number_of_vcpus_may_race(racers: int, states: int) -> None:
    model = build(Design.load("v8-post-hook"), replace(SCENARIOS["tiny"], racers=racers))
    assert len(arrays.search(model).states) == states


def test_two_vmm_threads_have_names_of_their_own() -> None:
    model = build(UPSTREAM, find_scenario("two-vmms+slot-deleted"))
    assert [actor.key for actor in model.actors] == ["CPU0", "CPU1", "VMM1", "VMM2", "host"]


def test_every_part_that_a_call_needs_is_one_of_the_machine_s() -> None:
    assert {call.part for call in CALLS} - {""} <= {part.name for part in PARTS}


@pytest.mark.parametrize("part", [part for part in PARTS if part.quiet], ids=lambda part: part.name)
def test_out_of_sync_asks_for_a_part_only_where_it_is_there(part: Part) -> None:
    names = ("tiny", "huge", "discard", "slot-deleted")
    asked = [part.quiet in build(UPSTREAM, SCENARIOS[name]).quiet.parts for name in names]
    assert not asked[0]
    assert any(asked) or part.name == "SMM"

"""What a verdict may say: the kernel version decides, and nothing is claimed that was not looked at."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from kvmlab.compile.build import build, with_forgetful_tlbs
from kvmlab.design import Design, DesignError, shipped
from kvmlab.errors import InputError, NotApplicable
from kvmlab.explore import arrays, liveness, rows
from kvmlab.machine.scenarios import SCENARIOS
from kvmlab.verdict.report import UNJUDGED, check, explore


def violated(text: str, *case: str) -> set[str]:
    return set(check(text, *case).violated)


# rmp_match() looks at the PFN that the fault is about to map.


@pytest.mark.parametrize("scenario", ["tiny", "to-private", "to-shared", "round-trip", "host-io", "range"])
def test_deferring_rmpupdate_to_the_fault_is_clean_with_two_backings(scenario: str) -> None:
    assert violated("defer-to-fault", "snp", scenario) == set()


def test_taking_the_private_page_back_at_a_shared_fault_kills_a_guest() -> None:
    assert violated("defer-to-fault-takes-back") == {"guest-killed", "out-of-sync"}


def test_in_place_rmp_match_goes_both_ways() -> None:
    taken = check("defer-to-fault", "snp", "to-shared", "in-place").sample().text()
    assert "rmpupdate(shared)" in taken


# linux: VERSION decides what a fault does that finds a present leaf with another PFN.


@pytest.mark.parametrize(
    ("linux", "wrong"),
    [
        ("v6.2", {"kernel-bug", "out-of-sync"}),
        ("v6.12", {"kernel-bug", "out-of-sync"}),
        ("v6.13", {"livelock", "out-of-sync"}),
        ("v6.14", {"livelock", "out-of-sync"}),
        ("v6.15", {"warning", "livelock", "out-of-sync"}),
        ("v6.19", {"warning", "livelock", "out-of-sync"}),
        ("v7.0", {"warning", "livelock", "out-of-sync"}),
    ],
)
def test_without_the_zap_the_version_decides_between_a_bug_a_silent_loop_and_one_with_a_warning(
    linux: str, wrong: set[str]
) -> None:
    assert violated(f"base: upstream-no-zap\nlinux: {linux}\n") == wrong


@pytest.mark.parametrize(
    ("planted", "scenario"),
    [
        ("narrow-hull", "huge"),
        ("late-memslot", "slot-added"),
        ("hull-of-2m-only", "huge-1g"),
        ("upstream-no-zap", "tiny"),
    ],
)
def test_what_today_s_kernel_warns_of_and_repeats_for_ever_was_a_crash_in_2023(
    planted: str, scenario: str
) -> None:
    today, then = (
        violated(f"base: {planted}\nlinux: {linux}\n", "snp", scenario) for linux in ("v6.19", "v6.2")
    )
    assert {"warning", "livelock"} <= today and "kernel-bug" not in today
    assert "kernel-bug" in then and not {"warning", "livelock"} & then


def test_the_designs_of_the_thread_speak_of_the_kernel_of_2023() -> None:
    assert {Design.load(name).linux for name in shipped("thread")} == {"v6.2", "v6.19"}
    assert [name for name in shipped("thread") if Design.load(name).linux == "v6.19"] == ["upstream"]


def test_upstream_names_its_version() -> None:
    upstream = Design.load("upstream")
    assert upstream.linux in upstream.title and upstream.version == (6, 19)


def test_a_text_without_a_version_speaks_of_its_base_s() -> None:
    assert Design.parse("base: upstream\n").linux == "v6.19"
    assert Design.parse("kvm_mem_attrs_changed()\n").linux == Design.load("v8-post-hook").linux


def test_two_texts_that_differ_in_their_version_alone_have_different_digests() -> None:
    old, new = (Design.parse(f"base: upstream\nlinux: {linux}\n") for linux in ("v6.12", "v6.13"))
    assert old.digest != new.digest and old.sections == new.sections


def test_the_version_survives_an_edit_and_the_canonical_text() -> None:
    design = Design.parse("linux: v6.14\nioctl:\n    kvm_vm_set_region_attr()\n    kvm_flush_remote_tlbs()\n")
    assert design.move("ioctl", 1, -1).linux == "v6.14"
    assert Design.parse(design.canonical()).linux == "v6.14"


@pytest.mark.parametrize("said", ["6", "v6", "six", "v6.19-rc1", "v6.1.2"])
def test_a_version_that_is_none_is_refused_with_examples(said: str) -> None:
    with pytest.raises(DesignError, match=r"(?s)no version of Linux.*v6\.2, v6\.19"):
        Design.parse(f"linux: {said}\nbase: upstream\n")


def test_a_version_is_given_once() -> None:
    with pytest.raises(DesignError, match="'linux:' is given twice"):
        Design.parse("linux: v6.2\nlinux: v6.3\nbase: upstream\n")


@pytest.mark.parametrize(("linux", "clears"), [("v6.17", True), ("v6.18", False)])
def test_a_reclaimed_page_of_a_td_is_cleared_on_every_part_only_before_v6_18(
    linux: str, clears: bool
) -> None:
    run = check(f"base: upstream\nlinux: {linux}\n", "tdx", "host-io").sample().text()
    assert ("no X86_BUG_TDX_PW_MCE" in run) is not clears


# The op's own look-up.


def test_an_op_that_looks_its_pages_up_may_not_stand_under_mmu_lock() -> None:
    assert check("pre-post-op-looks-up").verdicts["sleep-in-atomic"].verdict == "Always"
    assert violated("pre-post-directmap") == set()


def test_the_op_is_absent_where_there_is_no_rmp_so_nothing_of_it_sleeps_there() -> None:
    assert violated("pre-post-op-looks-up", "sev") == set()


def test_the_first_thing_that_sleeps_in_v7_s_op_is_its_look_up() -> None:
    assert (
        "kvm_restrictedmem_get_pfn(P0)"
        in check("v7-under-lock", scenario="tiny").trace().frames[-1].event.call
    )


# tdx: a mirror SPTE that is frozen when all is quiet.


def test_a_leaf_that_is_never_written_stays_frozen_and_out_of_sync() -> None:
    assert violated("tdx-stays-frozen", "tdx", "tiny") == {"out-of-sync"}


# Always holds although TLBs may lose entries; a Sometimes does not need that.


def test_always_does_not_hang_on_a_tlb_entry_that_stays() -> None:
    report = check("no-flush", "tdx", "round-trip")
    assert not liveness.avoidable(report.graph, "out-of-sync")
    assert report.verdicts["out-of-sync"].verdict == "Sometimes"


@pytest.mark.parametrize("platform", ["snp", "sw"])
def test_no_property_is_reached_only_because_a_tlb_entry_vanishes(platform: str) -> None:
    for name in shipped("all"):
        try:
            model = build(
                Design.load(name), SCENARIOS["tiny"], platform, Design.load(name).backing or "split"
            )
        except NotApplicable:
            continue
        plain, forgetful = explore(model), explore(with_forgetful_tlbs(model))
        assert set(plain.hits) == set(forgetful.hits), name
        assert (liveness.livelock(plain) is None) == (liveness.livelock(forgetful) is None), name


# Nothing is said that was not looked at.


def test_an_incomplete_search_says_never_of_nothing() -> None:
    report = check("upstream", scenario="tiny", limit=20)
    said = {v.verdict for v in report.verdicts.values()}
    assert not report.complete and said == {UNJUDGED}
    assert report.not_checked == [f"interleavings beyond the first {report.states} states"]


def test_an_incomplete_search_says_always_of_nothing() -> None:
    report = check("v7-under-lock", scenario="tiny", limit=300)
    assert not report.complete and report.verdicts["sleep-in-atomic"].verdict == "Sometimes"


def test_every_part_of_the_graph_is_looked_at_for_a_livelock_however_many_there_are() -> None:
    """67 strongly connected parts with a fault of CPU1 in them: the array engine gives those of the dict engine."""
    model = build(Design.load("v8-post-hook"), SCENARIOS["to-private"])
    found, listed = arrays.search(model), rows.search(model)
    cell = model.layout.cell("acc", "CPU1")
    around = liveness._Arrays(found).around(1, cell)
    parts = [(around == number).nonzero()[0].tolist() for number in range(67)]
    others = liveness._parts(listed, 1, cell)
    assert around.max() == 66
    assert {frozenset(map(found.packed, part)) for part in parts} == {
        frozenset(map(listed.packed, part)) for part in others
    }


def test_both_engines_find_the_same_livelock_also_where_two_steps_lead_to_one_state() -> None:
    """scipy's search for strongly connected parts does not end on some matrices in which an entry stands twice."""
    found = 0
    for name in shipped("all")[::2]:
        with suppress(NotApplicable):
            model = build(Design.load(name), SCENARIOS["tiny"], "tdx")
            cycle = liveness.livelock(rows.search(model))
            assert liveness.livelock(arrays.search(model)) == cycle, name
            found += cycle is not None
    assert found


@pytest.mark.parametrize("search", [rows.search, arrays.search])
def test_a_search_that_is_told_to_stop_ends_where_it_is_and_is_not_complete(
    search: Callable[..., Any],
) -> None:
    whole = build(Design.load("no-zap"), SCENARIOS["to-private"])
    part = search(whole, watch=lambda states: states > 3_000)
    assert not part.complete and 0 < len(part.depth) < len(search(whole).depth)
    assert len(part.start) == len(part.depth) + 1 and len(part.quiet) == len(part.depth)


def test_a_check_that_runs_out_of_time_says_so_and_never_of_nothing() -> None:
    report = check("upstream", "tdx", "to-shared", seconds=1e-6)
    assert not report.complete and {v.verdict for v in report.verdicts.values()} == {UNJUDGED}


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), "soon"])
def test_a_time_that_is_none_is_refused(seconds: Any) -> None:
    with pytest.raises(InputError, match="above 0"):
        check("upstream", seconds=seconds)

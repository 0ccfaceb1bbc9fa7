"""Runs: shortest, with fewest switches; the diagram; the code; replay."""

from __future__ import annotations

import contextlib
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvmlab
from kvmlab.compile.build import build
from kvmlab.design import Design
from kvmlab.design.patch import patch_of, patched
from kvmlab.explore import arrays, liveness, paths, rows
from kvmlab.explore.graph import Hit
from kvmlab.machine.scenarios import SCENARIOS
from kvmlab.model.step import Model
from kvmlab.verdict.code import INITIALS, TEXT_DIGITS, claim_problem, digits
from kvmlab.verdict.replay import decode, replay
from kvmlab.verdict.report import check
from kvmlab.verdict.run import ReplayError, options, play
from kvmlab.verdict.trace import Trace

BAD = [
    ("rmp-under-lock-directmap-post", "tiny", "host-rmp-fault"),
    ("no-zap", "tiny", "kernel-bug"),
    ("v7-under-lock", "to-private", "sleep-in-atomic"),
    ("defer-to-fault-takes-back", "host-io", "integrity"),
    ("never-rmpupdate", "tiny", "livelock"),
    ("keeps-mmu-lock", "tiny", "deadlock"),
    ("never-maps-back", "host-io", "out-of-sync"),
    ("punch-leaves-assigned", "discard", "host-rmp-fault"),
    ("v8-post-hook", "discard-first", "integrity"),
    ("v8-post-hook", "vmm-punches", "warning"),
    ("reserved-read-as-attributes", "reserve-fails", "out-of-sync"),
]


def trace_of(design: str, scenario: str, prop: str) -> Trace:
    return check(design, scenario=scenario).trace(prop)


@pytest.mark.parametrize(("design", "scenario", "prop"), BAD)
def test_a_counterexample_ends_in_its_violation_and_not_before(design: str, scenario: str, prop: str) -> None:
    trace = trace_of(design, scenario, prop)
    seen = [prop in (f.event.violations if f.event else ()) for f in trace.frames]
    if prop not in ("livelock", "deadlock", "out-of-sync"):
        assert seen.index(True) == len(seen) - 1


@pytest.mark.parametrize(("design", "scenario", "prop"), BAD)
def test_a_diagram_is_ascii_and_at_most_75_columns_and_has_no_trailing_blanks(
    design: str, scenario: str, prop: str
) -> None:
    text = trace_of(design, scenario, prop).text()
    assert text.isascii()
    assert all(len(line) <= 75 and line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize(("design", "scenario", "prop"), BAD)
def test_a_code_gives_the_same_run_back(design: str, scenario: str, prop: str) -> None:
    trace = trace_of(design, scenario, prop)
    again = decode(trace.code)
    assert (again.schedule, again.cycle, again.why) == (trace.schedule, trace.cycle, trace.why)
    assert again.text() == trace.text()


@pytest.mark.parametrize(("design", "scenario", "prop"), BAD)
def test_a_code_is_one_mail_line_or_two_with_a_long_name_and_is_safe_in_a_shell_and_a_link(
    design: str, scenario: str, prop: str
) -> None:
    code = trace_of(design, scenario, prop).code
    assert len(code) <= 75 * (1 if design in kvmlab.design.shipped("thread") else 2)
    assert re.fullmatch(r"[a-z0-9:/@,.~_-]+", code)


@pytest.mark.parametrize("quote", ["", "> ", "> > ", ">> "])
def test_a_diagram_pasted_from_a_mail_replays(quote: str) -> None:
    trace = trace_of("defer-to-fault-takes-back", "host-io", "integrity")
    mail = "\n".join(["Hi,", "", *trace.text().splitlines(), "Thanks"])
    assert replay("\n".join(quote + line for line in mail.splitlines())).schedule == trace.schedule


def test_lines_that_a_mail_broke_or_indented_are_still_the_diagram() -> None:
    text = trace_of("no-zap", "tiny", "kernel-bug").text()
    assert replay(text.replace("BUG(): TDP MMU", "BUG():\n> TDP MMU")).text() == text
    assert replay("\n".join(f"\t{line}  " for line in text.splitlines())).text() == text


def edited(*changes: tuple[str, str]) -> Design:
    """v8-post-hook as a file of the reader's, with these parts replaced."""
    text = kvmlab.Design.load("v8-post-hook").text
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return kvmlab.Design.parse(text, "mine.kvm")


ONE = ("static_call(kvm_x86_update_mem_attr)()\n\n", "rmpupdate()\n\n")
FIVE = (
    ONE,
    ("    kvm_vm_set_region_attr()\n", "    kvm_unmap_directmap()\n    kvm_vm_set_region_attr()\n"),
    ("    kvm_update_lpage_mixed_flag()\n", ""),
    ("kvm_mem_is_private()\n", "kvm_mem_is_private()\n    if (attr == private)\n        rmp_prepare()\n"),
    ("    mutex_unlock", "    if (attr == shared)\n        kvm_map_directmap()\n    mutex_unlock"),
)  # fmt: skip


@pytest.mark.parametrize(("changes", "lines"), [((ONE,), 2), (FIVE, 3)])
def test_an_edited_design_travels_inside_its_code_as_what_was_edited(
    changes: tuple[tuple[str, str], ...], lines: int
) -> None:
    design = edited(*changes)
    trace = check(design, scenario="tiny").trace()
    again = replay(trace.text()).case.design
    assert len(trace.code) <= 75 * lines
    assert (again.digest, again.name) == (design.digest, "mine.kvm")


def test_what_inherits_from_a_file_needs_no_file_to_replay(tmp_path: Path) -> None:
    (tmp_path / "mine.kvm").write_text(edited(ONE).text)
    (tmp_path / "yours.kvm").write_text("base: mine\n\nrmp_fault:\n    return\n")
    trace = check(str(tmp_path / "yours.kvm"), scenario="tiny").trace()
    assert replay(trace.code).case.design.digest == kvmlab.Design.load(tmp_path / "yours.kvm").digest


@pytest.mark.parametrize("name", kvmlab.design.shipped("all"))
def test_any_ordering_is_written_as_an_edit_of_one_that_ships_and_read_back(name: str) -> None:
    design = kvmlab.Design.parse(kvmlab.Design.load(name).canonical(), "mine (1).kvm")
    base, edit = patch_of(design)
    again = patched(base, edit)
    assert (again.digest, again.backing, again.name) == (design.digest, design.backing, "mine (1).kvm")


def test_the_run_that_closes_a_cycle_comes_back_to_where_the_cycle_began() -> None:
    trace = trace_of("never-rmpupdate", "tiny", "livelock")
    assert trace.frames[trace.cycle].state == trace.frames[-1].state


@pytest.mark.parametrize(("design", "scenario"), [("never-rmpupdate", "tiny"), ("upstream-no-zap", "huge")])
def test_the_cycle_that_is_shown_is_fair_by_itself(design: str, scenario: str) -> None:
    assert claim_problem(trace_of(design, scenario, "livelock")) == ""


def test_several_counterexamples_differ_in_who_acts_or_in_the_last_step() -> None:
    report = check("no-zap", scenario="to-private")
    runs = report.traces("kernel-bug", most=3)
    assert runs[0].schedule == report.trace("kernel-bug").schedule
    assert len(runs) == 2 and runs[0].code != runs[1].code
    assert {run.steps for run in runs} == {runs[0].steps}


def test_when_nothing_is_violated_a_sample_run_is_shown_in_which_the_guest_uses_its_page() -> None:
    trace = check("pre-post-directmap", scenario="tiny").trace()
    assert trace.why == "sample"
    assert "a run in which nothing is violated" in trace.text()
    assert any("write done in P0" in note for f in trace.frames if f.event for note in f.event.notes)


def run_until(design: str, scenario: str, told: str) -> Trace | None:
    """A shortest run whose last step tells `told`, or None if no reachable state allows such a step."""
    report = check(design, scenario=scenario)
    model, graph = report.case.model, report.graph
    for i in range(report.states):
        for a in range(len(model.actors)):
            for choice, (event, _) in enumerate(options(model, graph.packed(i), a)):
                if told in event.notes:
                    run = paths.shortest(graph, [Hit(i, None, None)])
                    return Trace(report.case, (*run, (a, choice)), "by-hand")
    return None


def calls(trace: Trace, wanted: list[str]) -> list[str]:
    """The calls among `wanted` in the order in which the run makes them."""
    return [f.event.call for f in trace.frames if f.event and f.event.call in wanted]


def test_where_a_store_fails_v8_works_on_what_was_stored_and_is_asked_for_the_rest() -> None:
    trace = run_until("v8-post-hook", "xarray-full", "xa_store(1) = -ENOMEM (injected)")
    model, schedule = trace.case.model, trace.schedule
    while (frame := play(model, schedule)[-1]).event.call != "return 0":
        assert options(model, frame.state, 0)
        schedule = (*schedule, (0, 0))
    wanted = ["kvm_vm_set_region_attr(gfn 1, private)", "rmpupdate(P0, private)", "rmpupdate(P1, private)"]
    assert calls(Trace(trace.case, schedule, "by-hand"), wanted) == [
        wanted[0],
        wanted[1],
        wanted[0],
        wanted[2],
    ]


def test_as_merged_a_stale_fault_splits_the_2m_entry_that_it_has_just_made() -> None:
    trace = run_until("upstream", "huge-accept", "[2M RMP entry splits]")
    told = [note for f in trace.frames if f.event for note in f.event.notes]
    assert told[-2:] == ["stale: RET_PF_RETRY", "[2M RMP entry splits]"]


def test_in_v8_a_fault_in_the_window_costs_the_guest_its_2m_page() -> None:
    trace = run_until("v8-post-hook", "huge-accept", "[2M RMP entry splits]")
    assert any("FAIL_SIZEMISMATCH" in note for f in trace.frames if f.event for note in f.event.notes)


@pytest.mark.parametrize("design", ["pre-post-directmap", "v8-op-in-window"])
def test_with_rmpupdate_inside_the_window_the_guest_keeps_its_2m_page(design: str) -> None:
    assert run_until(design, "huge-accept", "[2M RMP entry splits]") is None


def every_run(model: Model, length: int) -> list[tuple[tuple[Any, ...], int]]:
    """All schedules of `length` steps, by brute force."""
    level: list[tuple[tuple[Any, ...], int]] = [((), model.initial)]
    for _ in range(length):
        level = [
            ((*run, (a, choice)), x)
            for run, state in level
            for a in range(len(model.actors))
            for choice, (_, x) in enumerate(options(model, state, a))
        ]
    return level


def test_among_the_shortest_runs_the_one_with_fewest_switches_is_chosen() -> None:
    model = build(kvmlab.Design.load("v8-post-hook"), SCENARIOS["tiny"])
    graph = rows.search(model)
    for target in [i for i, d in enumerate(graph.depth) if d == 5]:
        best = paths.shortest(graph, [Hit(target, None, None)])
        brute = [run for run, x in every_run(model, 5) if x == graph.packed(target)]
        assert len(best) == 5
        assert paths.switches(best) == min(map(paths.switches, brute))


@pytest.mark.parametrize(
    "design", ["v8-post-hook", "never-rmpupdate", "open-window", "keeps-mmu-lock", "no-zap"]
)
def test_both_engines_agree_on_liveness_and_on_shortest_runs(design: str) -> None:
    model = build(kvmlab.Design.load(design), SCENARIOS["tiny"])
    small, large = rows.search(model), arrays.search(model)
    one, other = liveness.livelock(small), liveness.livelock(large)
    assert (one is None) == (other is None)
    if one and other:
        assert {small.packed(i) for i in one.states} == {large.packed(i) for i in other.states}
    assert small.hit_depth == large.hit_depth
    for prop in small.hits:
        assert liveness.avoidable(small, prop) == liveness.avoidable(large, prop)
        a, b = paths.shortest(small, small.hits[prop]), paths.shortest(large, large.hits[prop])
        assert (len(a), paths.switches(a)) == (len(b), paths.switches(b))


def sealed(code: str) -> str:
    """The code with the digits that vouch for its characters, as another version could have made it."""
    return code + digits(code, TEXT_DIGITS)


def refusal(code: str) -> str:
    with pytest.raises(ReplayError) as refused:
        replay(code)
    return str(refused.value)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("spin:1:x", "there is no kvmlab code in this text"),
        ("kvmlab:3:snp/tiny/a1/v8-post-hook@aaaaaaaaaa", "not a kvmlab code"),
        ("kvmlab:2:snp", "damaged code"),
        ("kvmlab:2:snp/tiny/a1/v8-post-hook@aaaaaaaaaa", "damaged code"),
        (sealed("kvmlab:2:snp"), "cannot read code"),
        (sealed("kvmlab:2:snp/tiny/a1/nobody@aaaaaaaa"), "there is no design nobody"),
        (sealed("kvmlab:2:snp/tiny/a1/upstream~0000a@aaaaaaaa"), "edited in upstream, which has changed since"),
        (sealed("kvmlab:2:cca/tiny/a1/upstream@aaaaaaaa"), "unknown platform 'cca'"),
        (sealed("kvmlab:2:snp/tinz/a1/upstream@aaaaaaaa"), "unknown scenario 'tinz'"),
        (
            sealed("kvmlab:2:snp/tiny,rmp_checked_at.never/a1/upstream@aaaaaaaa"),
            "cannot be 'never'; allowed: access, fill",
        ),
        (sealed("kvmlab:2:snp/tiny,in-place/a1/upstream@aaaaaaaa"), "split backing"),
        (sealed("kvmlab:2:snp/tiny/z1/upstream@aaaaaaaa"), "there is no actor 'z'"),
        (sealed("kvmlab:2:snp/tiny/a999999/upstream@aaaaaaaa"), "more than 10000 steps"),
        (sealed("kvmlab:2:snp/tiny/a-7/upstream@aaaaaaaa"), "step 1: CPU0 cannot take choice 7; it has 1 possible"),
        (sealed("kvmlab:2:snp/tiny/1a/upstream@aaaaaaaa"), "cannot read the steps at '1a'"),
        (sealed("kvmlab:2:snp/tiny/a1/beauty/upstream@aaaaaaaa"), "neither a property nor a measure"),
        (sealed("kvmlab:2:snp/tiny/a1/upstream@aaaaaaaa"), "its run is another one today"),
    ],
)  # fmt: skip
def test_a_foreign_or_damaged_code_is_refused_with_the_reason(code: str, told: str) -> None:
    assert told in refusal(code)


def test_a_code_of_version_1_is_refused_with_the_command_that_searches_anew() -> None:
    told = refusal("kvmlab:1:snp/tiny/split,preempt_count=no/v8-post-hook@a673d112/a29/confidentiality")
    assert told.endswith(
        "kvmlab trace v8-post-hook --platform snp --scenario tiny --switch preempt_count=no "
        "--property confidentiality"
    )


def test_when_a_rule_has_changed_the_code_of_an_edit_tells_how_to_search_anew() -> None:
    design = edited(ONE)
    code = sealed(re.sub(r"@.*", "@aaaaaaaa", check(design, scenario="tiny").trace().code))
    told = refusal(code)
    command, _, text = told.partition("to search anew: ")[2].partition("\n")
    assert command == "kvmlab trace - --platform snp --scenario tiny --property host-rmp-fault <<'END'"
    assert kvmlab.Design.parse(text.removesuffix("END")).digest == design.digest


CLAIMS = {
    "confidentiality": "the run does not violate confidentiality",
    "out-of-sync": "the run does not violate out-of-sync",
    "deadlock": "the run does not violate deadlock",
    "livelock": "no fair cycle of faults",
    "kicks": "the run does not count kicks",
    "residue": "the run does not count residue",
}


@pytest.mark.parametrize("why", CLAIMS)
def test_a_code_cannot_claim_what_its_run_does_not_show(why: str) -> None:
    case = check("v8-post-hook", scenario="tiny").case
    assert CLAIMS[why] in refusal(Trace(case, ((0, 0),) * 5, why).code)


def test_a_property_that_is_not_judged_cannot_be_claimed() -> None:
    trace = check("v8-post-hook", scenario="careless").sample()
    assert "not judged in careless" in refusal(Trace(trace.case, trace.schedule, "integrity").code)


def test_a_cycle_has_to_come_back_to_where_it_began() -> None:
    trace = trace_of("never-rmpupdate", "tiny", "livelock")
    late = Trace(trace.case, trace.schedule, "livelock", trace.cycle + 1)
    assert "no fair cycle of faults" in refusal(late.code)


def test_a_cycle_in_which_somebody_who_could_go_on_never_does_is_not_fair() -> None:
    run = check("v8-post-hook", scenario="tiny").example("spurious-npf")  # CPU0 has RMPUPDATE still to do
    model, schedule = run.case.model, run.schedule
    states = [frame.state for frame in run.frames]
    while states[-1] not in states[:-1]:
        schedule = (*schedule, (schedule[-1][0], 0))
        states.append(play(model, schedule)[-1].state)
    spinning = Trace(run.case, schedule, "livelock", states.index(states[-1]))
    assert spinning.frames[-1].state == spinning.frames[spinning.cycle].state
    assert "no fair cycle of faults" in refusal(spinning.code)


def test_every_property_has_initials_of_its_own() -> None:
    assert len(INITIALS) == len(kvmlab.machine.properties.BY_NAME)


@pytest.mark.parametrize(
    ("said", "changed"),
    [
        ("no-zap, snp", "no-zap, tdx"),
        ("CPU1 (vCPU)", "CPU2 (vCPU)"),
        ("CPU0 (asks for the conversion)       CPU1", "CPU0 (asks for the conversion)      CPU1"),
        ("=> kernel-bug", "=> livelock"),
        ("29 steps", "28 steps"),
        ("2 switches", "3 switches"),
        ("                                     PVALIDATE(0, 1)", "PVALIDATE(0, 1)"),
        ("PVALIDATE(0, 1)\n", ""),
        (
            "                                           replaces present leaf",
            "          replaces present leaf",
        ),
    ],
)
def test_a_pasted_diagram_that_says_anything_else_than_its_code_is_refused(said: str, changed: str) -> None:
    text = trace_of("no-zap", "tiny", "kernel-bug").text()
    assert said in text
    assert "the pasted diagram is not what its code replays" in refusal(text.replace(said, changed))


def test_the_first_line_that_differs_is_told() -> None:
    text = trace_of("no-zap", "tiny", "kernel-bug").text()
    told = refusal(text.replace("kvm_mem_is_private", "is_private").replace("asks: to", "asks:"))
    assert "  pasted:  is_private()\n  the run: kvm_mem_is_private()\n" in told


def test_a_code_alone_in_a_mail_claims_no_diagram() -> None:
    trace = trace_of("no-zap", "tiny", "kernel-bug")
    assert replay(f"See {trace.code}, it is\nfatal.\n----\nme").schedule == trace.schedule


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=120))
def test_any_text_after_the_prefix_replays_or_is_refused(text: str) -> None:
    for prefix in ("kvmlab:1:", "kvmlab:2:"):
        with contextlib.suppress(ReplayError):
            replay(sealed(prefix + text))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=40))
def test_any_schedule_that_can_be_played_has_a_code_that_plays_it(wanted: list[tuple[int, int]]) -> None:
    case = check("v8-post-hook", scenario="tiny").case
    state, schedule = case.model.initial, []
    for a, choice in wanted:
        steps = options(case.model, state, a)
        if steps:
            schedule.append((a, choice % len(steps)))
            state = steps[choice % len(steps)][1]
    trace = Trace(case, tuple(schedule), "by-hand")
    assert decode(trace.code).schedule == trace.schedule
    assert play(case.model, trace.schedule)[-1].state == state


def test_stepping_all_the_way_is_the_same_as_running_all() -> None:
    trace = trace_of("no-zap", "tiny", "kernel-bug")
    model = trace.case.model
    states = list(
        itertools.accumulate(
            trace.schedule, lambda x, s: options(model, x, s[0])[s[1]][1], initial=model.initial
        )
    )
    assert states == [frame.state for frame in trace.frames]

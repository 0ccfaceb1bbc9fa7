"""Runs: shortest, with fewest switches; the diagram; the code; replay."""

import contextlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvmlab
from kvmlab.explore import arrays, liveness, paths, rows
from kvmlab.explore.graph import Hit
from kvmlab.report import check
from kvmlab.scenario import SCENARIOS, build
from kvmlab.trace import ReplayError, Trace, decode, options, play, replay

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


def trace_of(design, scenario, prop):
    return check(design, scenario=scenario).trace(prop)


@pytest.mark.parametrize(("design", "scenario", "prop"), BAD)
def test_a_counterexample_ends_in_its_violation_and_not_before(design, scenario, prop):
    trace = trace_of(design, scenario, prop)
    seen = [prop in (f.event.violations if f.event else ()) for f in trace.frames]
    if prop not in ("livelock", "deadlock", "out-of-sync"):
        assert seen.index(True) == len(seen) - 1


@pytest.mark.parametrize(("design", "scenario", "prop"), BAD)
def test_a_diagram_is_ascii_and_at_most_75_columns_and_has_no_trailing_blanks(design, scenario, prop):
    text = trace_of(design, scenario, prop).text()
    assert text.isascii()
    assert all(len(line) <= 75 and line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize(("design", "scenario", "prop"), BAD)
def test_a_code_gives_the_same_run_back(design, scenario, prop):
    trace = trace_of(design, scenario, prop)
    again = decode(trace.code)
    assert (again.schedule, again.cycle, again.why) == (trace.schedule, trace.cycle, trace.why)
    assert again.text() == trace.text()


@pytest.mark.parametrize("quote", ["", "> ", "> > ", ">> "])
def test_a_diagram_pasted_from_a_mail_replays(quote):
    trace = trace_of("defer-to-fault-takes-back", "host-io", "integrity")
    mail = "\n".join(["Hi,", "", *trace.text().splitlines(), "", "Thanks"])
    assert replay("\n".join(quote + line for line in mail.splitlines())).schedule == trace.schedule


def test_an_edited_design_travels_inside_its_code():
    text = kvmlab.Design.load("v8-post-hook").text.replace(
        "static_call(kvm_x86_update_mem_attr)()", "rmpupdate()"
    )
    trace = check(text, scenario="tiny").trace()
    assert trace.why == "host-rmp-fault"
    assert replay(trace.text()).frames[-1].event.violations == ("host-rmp-fault",)


def test_the_run_that_closes_a_cycle_comes_back_to_where_the_cycle_began():
    trace = trace_of("never-rmpupdate", "tiny", "livelock")
    assert trace.frames[trace.cycle].state == trace.frames[-1].state


def test_several_counterexamples_differ_in_who_acts_or_in_the_last_step():
    report = check("no-zap", scenario="to-private")
    runs = report.traces("kernel-bug", most=3)
    assert runs[0].schedule == report.trace("kernel-bug").schedule
    assert len(runs) == 2 and runs[0].code != runs[1].code
    assert {run.steps for run in runs} == {runs[0].steps}


def test_when_nothing_is_violated_a_sample_run_is_shown_in_which_the_guest_uses_its_page():
    trace = check("pre-post-directmap", scenario="tiny").trace()
    assert trace.why == "sample"
    assert "a run in which nothing is violated" in trace.text()
    assert any("write done in P0" in note for f in trace.frames if f.event for note in f.event.notes)


def run_until(design, scenario, told):
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


def calls(trace, wanted):
    """The calls among `wanted` in the order in which the run makes them."""
    return [f.event.call for f in trace.frames if f.event and f.event.call in wanted]


def test_where_a_store_fails_v8_works_on_what_was_stored_and_is_asked_for_the_rest():
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


def test_as_merged_a_stale_fault_splits_the_2m_entry_that_it_has_just_made():
    trace = run_until("upstream", "huge-accept", "[2M RMP entry splits]")
    told = [note for f in trace.frames if f.event for note in f.event.notes]
    assert told[-2:] == ["stale: RET_PF_RETRY", "[2M RMP entry splits]"]


def test_in_v8_a_fault_in_the_window_costs_the_guest_its_2m_page():
    trace = run_until("v8-post-hook", "huge-accept", "[2M RMP entry splits]")
    assert any("FAIL_SIZEMISMATCH" in note for f in trace.frames if f.event for note in f.event.notes)


@pytest.mark.parametrize("design", ["pre-post-directmap", "v8-op-in-window"])
def test_with_rmpupdate_inside_the_window_the_guest_keeps_its_2m_page(design):
    assert run_until(design, "huge-accept", "[2M RMP entry splits]") is None


def every_run(model, length):
    """All schedules of `length` steps, by brute force."""
    level = [((), model.initial)]
    for _ in range(length):
        level = [
            ((*run, (a, choice)), x)
            for run, state in level
            for a in range(len(model.actors))
            for choice, (_, x) in enumerate(options(model, state, a))
        ]
    return level


def test_among_the_shortest_runs_the_one_with_fewest_switches_is_chosen():
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
def test_both_engines_agree_on_liveness_and_on_shortest_runs(design):
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


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("spin:1:x", "not a kvmlab code"),
        ("kvmlab:1:snp", "damaged code"),
        ("kvmlab:2:snp/tiny/split/v8-post-hook@00000000/a1", "not a kvmlab code"),
        ("kvmlab:1:snp/tiny/split/v8-post-hook@00000000/a1", "has changed since this code was made"),
        ("kvmlab:1:snp/tiny/split/nobody@00000000/a1", "nobody"),
        ("kvmlab:1:snp/tiny/split/~AAAA/a1", "cannot be read"),
        ("kvmlab:1:cca/tiny/split/{v8}/a1", "unknown platform 'cca'"),
        ("kvmlab:1:snp/tiny,rmp_checked_at=never/split/{v8}/a1", "damaged code"),
        ("kvmlab:1:snp/tiny/split,rmp_checked_at=never/{v8}/a1", "cannot be 'never'; allowed: access, fill"),
        ("kvmlab:1:snp/tiny/split/{v8}/z1", "there is no actor 'z'"),
        ("kvmlab:1:snp/tiny/split/{v8}/a999999", "more than 10000 steps"),
        ("kvmlab:1:snp/tiny/split/{v8}/a'7", "step 1: CPU0 cannot take choice 7; it has 1 possible steps"),
        ("kvmlab:1:snp/tiny/split/{v8}/1a", "cannot read the steps at '1a'"),
        ("no code at all", "there is no kvmlab code in this text"),
    ],
)
def test_a_foreign_or_damaged_code_is_refused_with_the_reason(code, told):
    v8 = f"v8-post-hook@{kvmlab.Design.load('v8-post-hook').digest}"
    with pytest.raises(ReplayError, match=told.replace("(", r"\(")):
        (replay if "no code" in code else decode)(code.replace("{v8}", v8))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=120))
def test_any_text_after_the_prefix_replays_or_is_refused(text):
    with contextlib.suppress(ReplayError):
        replay("kvmlab:1:" + text)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=40))
def test_any_schedule_that_can_be_played_has_a_code_that_plays_it(wanted):
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


def test_stepping_all_the_way_is_the_same_as_running_all():
    trace = trace_of("no-zap", "tiny", "kernel-bug")
    model = trace.case.model
    states = list(
        itertools.accumulate(
            trace.schedule, lambda x, s: options(model, x, s[0])[s[1]][1], initial=model.initial
        )
    )
    assert states == [frame.state for frame in trace.frames]

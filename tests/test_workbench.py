"""The workbench without a browser: messages in, one value out; nothing that a message says can raise."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmlab.verdict.report import check_case

pytest.importorskip("anywidget", reason="needs anywidget")

from fuzz_messages import fuzz

import kvmlab
from kvmlab.design import DesignError
from kvmlab.errors import InputError
from kvmlab.explore.graph import Watch
from kvmlab.show import search_thread, widget
from kvmlab.show.widget import Workbench
from kvmlab.verdict.report import Report
from kvmlab.verdict.run import Case
from kvmlab.verdict.trace import Trace

FAULTY = "rmp-under-lock-directmap-post"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def bench() -> Workbench:
    return kvmlab.workbench(FAULTY)


def say(bench: Workbench, do: str, **message: Any) -> dict[str, Any]:
    """Send a message as the browser does, and return what it would see once all is explored."""
    bench._handle_custom_msg({"do": do, **message}, [])
    bench.wait()
    return dict(bench.view)


def say_at_once(bench: Workbench, do: str, **message: Any) -> dict[str, Any]:
    """Send a message as the browser does, and return what it sees then."""
    bench._handle_custom_msg({"do": do, **message}, [])
    return dict(bench.view)


def bad(seen: dict[str, Any]) -> list[str]:
    return [verdict["name"] for verdict in seen["verdicts"] if verdict["bad"]]


def line_of(bench: Workbench, text: str, section: str = "ioctl") -> int:
    return [line.strip() for line in bench.session.design.lines(section)].index(text)


def test_the_first_view_holds_what_was_asked_for(bench: Workbench) -> None:
    case = {"platform": "snp", "scenario": "tiny", "backing": "split", "design": FAULTY}
    assert bench.view["case"] == case
    assert bad(bench.view) == ["host-rmp-fault"]
    assert len(bench.view["trace"]["steps"]) == bench.session.trace.steps + 1


def test_the_view_is_json(bench: Workbench) -> None:
    assert json.loads(json.dumps(bench.view))["shown"] == "host-rmp-fault"


def test_an_edit_is_checked(bench: Workbench) -> None:
    text = bench.session.design.text.replace("rmpupdate()", "")
    seen = say(bench, "edit", text=text)
    assert (seen["problem"], seen["draft"]) == ("", None)
    assert bad(seen) != ["host-rmp-fault"]
    assert seen["case"]["design"] == f"{FAULTY}*"


def test_a_bad_edit_keeps_the_report_and_says_what_where_and_what_would_do(bench: Workbench) -> None:
    before = bench.report
    seen = say(bench, "edit", text="ioctl:\n    rmpupdat()\n")
    assert bench.report is before
    assert seen["draft"] == "ioctl:\n    rmpupdat()\n"
    assert f"{FAULTY}*:2: unknown call 'rmpupdat'" in seen["problem"]
    assert "    ^\n" in seen["problem"]
    assert "rmpupdate" in seen["problem"]


def test_a_moved_line_is_checked_and_keeps_the_focus(bench: Workbench) -> None:
    line = line_of(bench, "kvm_mmu_invalidate_begin()")
    seen = say(bench, "move", section="ioctl", line=line, by=-1)
    assert "lock-misuse" in bad(seen)
    assert seen["focus"] == ("ioctl", line - 1)
    assert seen["said"].startswith("Checked: ")


@pytest.mark.parametrize("by", [-3, -1, 2])
def test_a_dragged_line_lands_where_it_is_dropped(bench: Workbench, by: int) -> None:
    line = line_of(bench, "kvm_vm_set_region_attr()")
    seen = say(bench, "move", section="ioctl", line=line, to=line + by)
    assert line_of(bench, "kvm_vm_set_region_attr()") == line + by
    assert seen["focus"] == ("ioctl", line + by)


def test_a_line_at_the_end_stays_and_it_is_said_why(bench: Workbench) -> None:
    seen = say(bench, "move", section="ioctl", line=0, by=-1)
    assert (seen["case"]["design"], seen["undo"]) == (FAULTY, False)
    assert seen["problem"].endswith("cannot move up: it is the first of its section.")


def test_the_only_line_of_an_if_says_what_to_move_instead(bench: Workbench) -> None:
    seen = say(bench, "move", section="ioctl", line=line_of(bench, "kvm_unmap_directmap()"), by=-1)
    assert "it stays inside if (attr == private)" in seen["problem"]


def test_a_line_that_is_dropped_where_it_cannot_go_says_why(bench: Workbench) -> None:
    seen = say(bench, "move", section="ioctl", line=line_of(bench, "kvm_unmap_directmap()"), to=0)
    assert "it stays inside if (attr == private)" in seen["problem"]


def test_undo_takes_back_one_change_after_the_other(bench: Workbench) -> None:
    say(bench, "move", section="ioctl", line=1, by=1)
    say(bench, "choose", scenario="to-private")
    assert say(bench, "undo")["case"]["scenario"] == "tiny"
    seen = say(bench, "undo")
    assert (seen["case"]["design"], seen["undo"]) == (FAULTY, False)
    assert "nothing to undo" in say(bench, "undo")["problem"]


def test_choosing_another_scenario_keeps_the_ordering(bench: Workbench) -> None:
    assert say(bench, "choose", scenario="to-private", platform="snp")["case"]["scenario"] == "to-private"
    assert bench.session.design.name == FAULTY


def test_a_design_for_one_backing_brings_it_along(bench: Workbench) -> None:
    seen = say(bench, "load", design="gmem-in-place")
    assert (seen["problem"], seen["case"]["backing"]) == ("", "in-place")
    assert say(bench, "undo")["case"]["design"] == FAULTY


def test_a_design_for_one_backing_opens_in_it() -> None:
    assert kvmlab.workbench("gmem-in-place").session.case.backing == "in-place"


def test_each_violated_property_shows_its_run() -> None:
    bench = kvmlab.workbench("no-zap", show="out-of-sync")
    assert bench.view["shown"] == "out-of-sync"
    seen = say(bench, "show", property="kernel-bug")
    assert seen["shown"] == "kernel-bug"
    assert seen["trace"]["steps"][seen["position"]]["broken"] == ["kernel-bug"]


def test_a_sample_run_can_be_asked_for(bench: Workbench) -> None:
    assert say(bench, "show", property="sample")["shown"] == "sample"


def test_taking_over_drops_the_future_and_says_so(bench: Workbench) -> None:
    seen = say(bench, "take", at=3, actor="host", choice=0)
    assert seen["by_hand"]
    assert seen["position"] == 4
    assert len(seen["trace"]["steps"]) == 5
    assert "The 8 steps that followed are dropped." in seen["said"]


def test_a_step_that_cannot_be_taken_does_not_move_the_position(bench: Workbench) -> None:
    say(bench, "position", position=2)
    say(bench, "take", at=5, actor="CPU0", choice=99)
    assert bench.session.position == 2


def test_every_option_that_is_offered_can_be_taken(bench: Workbench) -> None:
    for position, step in enumerate(bench.view["trace"]["steps"]):
        for option in step["options"]:
            say(bench, "show", property="host-rmp-fault")
            seen = say(bench, "take", at=position, actor=option["actor"], choice=option["choice"])
            assert seen["problem"] == ""


def test_a_position_is_noted_without_an_answer(bench: Workbench) -> None:
    turn = bench.view["turn"]
    assert say(bench, "position", position=7)["turn"] == turn
    assert bench.session.position == 7


def test_another_ordering_stands_beside_this_one_and_goes_again(bench: Workbench) -> None:
    seen = say(bench, "versus", design="pre-post-directmap")
    assert "kvm_pre_mem_attrs_changed" in seen["versus"]["html"]
    assert say(bench, "versus", design=None)["versus"]["html"] == ""


def test_an_ordering_that_has_no_such_case_says_why(bench: Workbench) -> None:
    assert "in-place" in say(bench, "versus", design="gmem-in-place")["versus"]["problem"]


@pytest.mark.parametrize(
    "message",
    [
        None,
        17,
        "edit",
        [],
        {},
        {"do": None},
        {"do": ["edit"]},
        {"do": "explode"},
        {"do": "edit"},
        {"do": "edit", "text": 3},
        {"do": "edit", "text": "\0" * 9},
        {"do": "edit", "text": "x" * 1_000_000},
        {"do": "move"},
        {"do": "move", "section": "nowhere", "line": 0, "by": 1},
        {"do": "move", "section": "ioctl", "line": 999, "by": 1},
        {"do": "move", "section": "ioctl", "line": -1, "by": 1},
        {"do": "move", "section": "ioctl", "line": 0, "by": 10**9},
        {"do": "move", "section": "ioctl", "line": "0", "by": 1},
        {"do": "move", "section": "ioctl", "line": True, "by": 1},
        {"do": "move", "section": "ioctl", "line": 999, "to": 1},
        {"do": "choose"},
        {"do": "choose", "platform": "s390"},
        {"do": "choose", "scenario": "<b>"},
        {"do": "choose", "backing": {}},
        {"do": "load", "design": "no-such"},
        {"do": "load", "design": "-"},
        {"do": "load"},
        {"do": "show", "property": "no-such"},
        {"do": "show", "property": 3},
        {"do": "take"},
        {"do": "take", "at": 0, "actor": "CPU9", "choice": 0},
        {"do": "take", "at": 0, "actor": "CPU0", "choice": 99},
        {"do": "take", "at": 99, "actor": "CPU0", "choice": 0},
        {"do": "take", "at": 0, "actor": "CPU0", "choice": -1},
        {"do": "position", "position": -1},
        {"do": "position", "position": 1.5},
        {"do": "position", "position": 10**5000},
        {"do": "take", "at": -(10**5000), "actor": "CPU0", "choice": 0},
        {"do": "versus", "design": "no-such"},
        {"do": "versus", "design": 3},
        {"do": "undo"},
        {"do": "cancel"},
        {"do": "paste"},
        {"do": "paste", "text": " \n"},
        {"do": "paste", "text": "kvmlab:1:snp"},
        {"do": "move", "section": "ioctl", "line": 10**5000, "by": 1},
        {"do": "position", "position": -(10**5000)},
    ],
)
def test_a_message_that_makes_no_sense_is_told_and_changes_nothing(bench: Workbench, message: object) -> None:
    before = bench.report, bench.session.position, bench.session.trace.schedule
    bench._handle_custom_msg(message, [])
    assert bench.view["problem"]
    assert "has a bug" not in bench.view["problem"]
    assert (bench.report, bench.session.position, bench.session.trace.schedule) == before


def test_a_bug_is_told_too(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.session, "undo", None, raising=False)
    monkeypatch.setattr(bench, "history", [object()])
    assert "kvmlab has a bug here: AttributeError" in say(bench, "undo")["problem"]


def test_out_of_memory_is_told_in_words(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    before = bench.report
    monkeypatch.setattr("kvmlab.verdict.report.explore", exhausted)
    assert "out of memory; a limit on states" in say(bench, "choose", scenario="to-private")["problem"]
    assert "out of memory" in say(bench, "versus", design="upstream")["versus"]["problem"]
    assert bench.report is before


def test_the_next_message_clears_the_problem(bench: Workbench) -> None:
    say(bench, "choose", platform="s390")
    assert say(bench, "show", property="host-rmp-fault")["problem"] == ""


def test_the_stored_output_is_the_same_in_every_run_and_needs_no_kernel(bench: Workbench) -> None:
    bundle, _ = bench._repr_mimebundle_()
    again, _ = kvmlab.workbench(FAULTY)._repr_mimebundle_()
    stored = {mime: text for mime, text in bundle.items() if mime != WIDGET_VIEW}
    assert set(stored) == {"text/plain", "text/html"}
    assert stored == {mime: text for mime, text in again.items() if mime != WIDGET_VIEW}
    assert "=> host-rmp-fault" in stored["text/plain"]
    assert "Run this cell to make it live" in stored["text/html"]
    assert WIDGET_VIEW in bundle


def test_the_repr_is_short_and_stable(bench: Workbench) -> None:
    assert repr(bench) == f"Workbench('{FAULTY}', 'snp', 'tiny', 'split')"


def test_what_does_not_exist_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="unknown show 'no-such'"):
        kvmlab.workbench(show="no-such")
    with pytest.raises(DesignError):
        kvmlab.workbench(versus="no-such")


# -- what takes long


class Gate:
    """Stands before the explorer: a check that is held waits there until it is let through, or given up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real, self.held, self.open = check_case, threading.Event(), threading.Event()
        monkeypatch.setattr(widget, "check_case", self.check)
        monkeypatch.setattr(search_thread, "PROGRESS_EVERY", 0)

    def check(self, case: Case, watch: Watch | None = None, **more: Any) -> Report:
        assert watch is not None
        watch(17_000)
        self.held.set()
        self.open.wait(timeout=60)
        watch(18_000)
        return self.real(case, watch=watch, **more)


@pytest.fixture
def gate(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()
    bench.wait()


def ask(bench: Workbench, gate: Gate, do: str, **message: Any) -> None:
    """Send a message, and return when its check is held."""
    gate.held.clear()
    bench._handle_custom_msg({"do": do, **message}, [])
    assert gate.held.wait(timeout=60)


def test_while_a_check_runs_the_old_verdict_stands_and_what_is_explored_is_named(
    bench: Workbench, gate: Gate
) -> None:
    ask(bench, gate, "load", design="no-zap")
    assert bench.pending["case"]["design"] == "no-zap"
    assert bench.explored == 17_000
    assert (bench.view["case"]["design"], bad(bench.view)) == (FAULTY, ["host-rmp-fault"])
    gate.open.set()
    bench.wait()
    assert bench.pending == {}
    assert bench.view["case"]["design"] == "no-zap"


def test_a_check_that_is_given_up_leaves_everything_as_it_was(bench: Workbench, gate: Gate) -> None:
    before = bench.view["trace"]
    ask(bench, gate, "load", design="no-zap")
    seen = say_at_once(bench, "cancel")
    assert (seen["case"]["design"], seen["trace"], seen["undo"]) == (FAULTY, before, False)
    assert seen["said"].startswith("Given up")
    gate.open.set()
    bench.wait()
    assert (bench.view, bench.pending) == (seen, {})


def test_a_new_edit_gives_the_old_check_up_and_goes_on_from_its_text(bench: Workbench, gate: Gate) -> None:
    line = line_of(bench, "kvm_vm_set_region_attr()")
    ask(bench, gate, "move", section="ioctl", line=line, by=-1)
    ask(bench, gate, "move", section="ioctl", line=line - 1, by=-1)
    gate.open.set()
    bench.wait()
    assert line_of(bench, "kvm_vm_set_region_attr()") == line - 2
    assert bench.view["focus"] == ("ioctl", line - 2)
    assert len(bench.history) == 1


def test_undo_during_a_check_gives_it_up(bench: Workbench, gate: Gate) -> None:
    ask(bench, gate, "choose", scenario="to-private")
    assert say_at_once(bench, "undo")["case"]["scenario"] == "tiny"


def test_there_is_nothing_to_cancel_when_nothing_is_explored(bench: Workbench) -> None:
    assert say(bench, "cancel")["problem"] == "nothing is being explored"


def test_the_next_cell_waits_for_the_check_that_was_asked_for(bench: Workbench, gate: Gate) -> None:
    gate.open.set()
    bench._handle_custom_msg({"do": "load", "design": "no-zap"}, [])
    assert bench.report.violated == ["kernel-bug", "out-of-sync"]


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (MemoryError(), "out of memory"),
        (RecursionError(), "nested too deeply"),
        (InputError("no such thing"), "no such thing"),
        (ValueError("odd"), "kvmlab has a bug here: ValueError: odd"),
    ],
)
def test_a_check_that_fails_is_told_and_changes_nothing(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, failure: Exception, told: str
) -> None:
    def fail(case: Case, **more: Any) -> Report:
        raise failure

    monkeypatch.setattr(widget, "check_case", fail)
    seen = say(bench, "load", design="no-zap")
    assert told in seen["problem"]
    assert (seen["case"]["design"], bench.pending) == (FAULTY, {})


def test_what_is_not_judged_says_why() -> None:
    view = kvmlab.workbench("v8-post-hook", scenario="careless").view
    (entry,) = view["unjudged"]
    assert entry["why"] == "the guest is careless"
    assert entry["names"] == [v["name"] for v in view["verdicts"] if v["verdict"] == "not judged"] != []


def test_only_the_sections_that_run_are_shown_each_with_the_text_it_is_from() -> None:
    def shown(**case: str) -> dict[str, str]:
        sections = kvmlab.workbench("v8-post-hook", **case).view["design"]["sections"]
        return {section["name"]: section["from"] for section in sections}

    snp = {"ioctl": "", "fault": "", "rmp_fault": ""}
    assert shown(scenario="tiny") == snp
    assert shown(scenario="discard-races") == {**snp, "punch": ""}
    tdx = {"ioctl": "", "fault": "", "zap": "upstream", "aug": "upstream"}
    assert shown(platform="tdx", scenario="host-io") == tdx


# -- runs that come by mail


def run_of(name: str) -> Trace:
    return kvmlab.check(name, scenario="tiny").trace()


def quoted(text: str) -> str:
    return "".join(f"> {line}\n" for line in text.splitlines())


@pytest.mark.parametrize("form", [lambda run: run, lambda run: run.code, lambda run: quoted(run.text())])
def test_a_mailed_run_opens_in_its_own_case_at_its_failure(form: Callable[[Trace], str | Trace]) -> None:
    bench = kvmlab.workbench(form(run_of("no-zap")))
    assert (bench.session.design.name, bench.session.case.scenario) == ("no-zap", "tiny")
    assert bench.session.trace.schedule == run_of("no-zap").schedule
    assert bench.view["position"] == bench.session.trace.steps == 29


@pytest.mark.parametrize("do", ["paste", "edit"])
def test_a_code_or_diagram_that_is_pasted_is_opened(bench: Workbench, do: str) -> None:
    for text in (run_of("no-zap").code, quoted(run_of("no-zap").text())):
        seen = say(bench, do, text=text)
        assert (seen["case"]["design"], seen["shown"], seen["position"]) == ("no-zap", "kernel-bug", 29)
        assert seen["draft"] is None
        assert say(bench, "undo")["case"]["design"] == FAULTY


def test_a_code_that_is_cut_is_told_and_nothing_is_lost(bench: Workbench) -> None:
    seen = say(bench, "paste", text=run_of("no-zap").code[:30])
    assert seen["problem"]
    assert "has a bug" not in seen["problem"]
    assert seen["case"]["design"] == FAULTY


def test_another_text_that_is_pasted_waits_to_be_checked(bench: Workbench) -> None:
    seen = say(bench, "paste", text="rmpupdate()\n")
    assert (seen["draft"], seen["problem"], seen["case"]["design"]) == ("rmpupdate()\n", "", FAULTY)


def test_a_code_in_a_comment_does_not_make_a_text_a_run(bench: Workbench) -> None:
    text = f"// found as {run_of('no-zap').code}\n" + bench.session.design.text
    assert say(bench, "edit", text=text)["case"]["design"] == f"{FAULTY}*"


def test_a_run_brings_its_own_case() -> None:
    with pytest.raises(InputError, match="leave out: scenario"):
        kvmlab.workbench(run_of("no-zap").code, scenario="tiny")


def test_a_step_that_cannot_be_taken_leaves_the_position(bench: Workbench) -> None:
    seen = say(bench, "take", at=0, actor="CPU9", choice=0)
    assert seen["position"] == bench.session.trace.steps


def test_of_random_messages_none_escapes() -> None:
    found, faults = fuzz(200, seed=2)
    assert faults == []
    assert found["done"] > 50 < found["refused"]

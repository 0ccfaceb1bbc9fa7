"""The workbench without a browser: messages in, one value out; nothing that a message says can raise."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("anywidget", reason="needs anywidget")

import kvmlab
from kvmlab.design import DesignError
from kvmlab.scenario import InputError
from kvmlab.show.widget import Workbench

FAULTY = "rmp-under-lock-directmap-post"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def bench() -> Workbench:
    return kvmlab.workbench(FAULTY)


def say(bench: Workbench, do: str, **message: Any) -> dict[str, Any]:
    """Send a message as the browser does, and return what it would see."""
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


def test_a_line_at_the_end_stays(bench: Workbench) -> None:
    seen = say(bench, "move", section="ioctl", line=0, by=-1)
    assert (seen["case"]["design"], seen["problem"], seen["undo"]) == (FAULTY, "", False)


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


def test_each_violated_property_shows_its_run() -> None:
    bench = kvmlab.workbench("no-zap", show="out-of-sync")
    assert bench.view["shown"] == "out-of-sync"
    seen = say(bench, "show", property="kernel-bug")
    assert (seen["shown"], seen["position"]) == ("kernel-bug", 0)
    assert seen["trace"]["steps"][-1]["broken"] == ["kernel-bug"]


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
    monkeypatch.setattr("kvmlab.report.explore", exhausted)
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

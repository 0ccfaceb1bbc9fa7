"""The command line as scripts use it: what is printed, and the exit status."""

import io
import json
import re
import subprocess
import sys

import pytest
from bless_docs import BLOCK, pages

from kvmlab import cli
from kvmlab.design import shipped
from kvmlab.properties import BY_NAME
from kvmlab.scenario import SCENARIOS


@pytest.fixture
def run(capsys, monkeypatch):
    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        try:
            status = cli.main(arguments)
        except SystemExit as leaving:
            status = leaving.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return call


def test_the_lists_name_everything_once(run):
    assert [line.split()[0] for line in run("designs")[1].splitlines()] == [
        *shipped("thread"),
        *shipped("variant"),
    ]
    assert [line.split()[0] for line in run("scenarios")[1].splitlines()] == list(SCENARIOS)
    assert [line.split()[0] for line in run("properties")[1].splitlines()] == list(BY_NAME)


def test_planted_designs_are_listed_when_asked_for(run):
    assert "never-rmpupdate" not in run("designs")[1]
    assert "never-rmpupdate" in run("designs", "--planted")[1]


def test_the_list_of_calls_has_its_columns_one_below_the_other(run):
    lines = run("designs", "--calls")[1].splitlines()
    assert all(line[34] == line[70] == " " != line[35] and line[71] != " " for line in lines)


def test_show_prints_a_text_that_is_the_same_design_again(run):
    text = run("show", "pre-post-directmap")[1]
    status, out, _ = run("diff", "pre-post-directmap", "-", stdin=text)
    assert (status, out) == (0, "the same ordering\n")


def test_diff_prints_the_lines_in_which_two_designs_differ(run):
    out = run("diff", "v8-post-hook", "pre-post-directmap")[1]
    assert re.search(r"^\+\s+rmpupdate\(\)$", out, re.M)


def test_check_exits_0_when_nothing_bad_can_happen(run):
    status, out, _ = run("check", "v8-post-hook", "--scenario", "tiny")
    assert status == 0 and "940 states" in out and "complete" in out


def test_check_exits_1_when_something_can(run):
    status, out, _ = run("check", "no-zap", "--scenario", "tiny")
    assert status == 1 and "Sometimes kernel-bug" in out


def test_json_elements_have_the_promised_keys(run):
    status, out, _ = run("check", "v8-post-hook", "no-zap", "--scenario", "tiny", "--json")
    good, bad = json.loads(out)
    assert status == 1
    for key in (
        "design",
        "platform",
        "scenario",
        "backing",
        "complete",
        "states",
        "transitions",
        "depth",
        "seconds",
    ):
        assert key in good
    assert good["properties"]["livelock"] == {
        "verdict": "Never",
        "steps": None,
        "switches": None,
        "code": None,
    }
    assert bad["properties"]["kernel-bug"]["steps"] == 29
    assert bad["properties"]["kernel-bug"]["code"].startswith("kvmlab:1:")
    assert good["measures"]["spurious-npf"] == {"least": 0, "most": None}


def test_without_options_check_looks_at_both_directions(run):
    out = run("check", "upstream")[1]
    assert (
        "upstream, snp, to-private, split backing" in out and "upstream, snp, to-shared, split backing" in out
    )


def test_a_case_that_does_not_exist_prints_n_a(run):
    status, out, _ = run("check", "upstream", "--backing", "in-place", "--scenario", "tiny")
    assert status == 0 and "n/a" in out
    assert run("trace", "upstream", "--backing", "in-place")[1].startswith("n/a")


def test_a_switch_changes_what_is_explored(run):
    assert run("check", "v7-under-lock", "--scenario", "tiny", "--switch", "preempt_count=no")[0] == 0


def test_the_matrix_has_a_row_of_verdicts_with_its_states_and_fits_the_screen(run):
    status, out, _ = run("matrix", "--platform", "snp", "--scenario", "tiny", "--backing", "split")
    row = next(line.split() for line in out.splitlines() if line.startswith("tiny"))
    assert status == 1
    assert row[:5] == ["tiny", "ATOMIC!", "ok", "ATOMIC!", "BUG"]
    states = json.loads(
        run("matrix", "--platform", "snp", "--scenario", "tiny", "--backing", "split", "--json")[1]
    )
    assert row[-1] == f"{sum(square.get('states', 0) for square in states):,}"
    assert "all complete" in out
    assert max(map(len, out.splitlines())) <= 150


def test_the_matrix_as_json_has_an_element_a_cell(run):
    out = run("matrix", "--platform", "snp", "--scenario", "tiny", "--design", "upstream", "--json")[1]
    first, second = json.loads(out)
    assert first["states"] == 1_169 and "split" in second["n/a"]


def test_claims_prints_every_claim_with_its_answer_and_evidence_when_asked_by_id(run):
    status, out, _ = run("claims")
    assert status == 0 and len(re.findall(r"^C\d\d ", out, re.M)) == 40
    assert "no-zap, snp, tiny" in run("claims", "C12")[1]
    assert json.loads(run("claims", "C06", "--json")[1])[0]["answer"] == "confirmed"
    assert run("claims", "C99")[0] == 2


def test_report_writes_one_page_that_needs_nothing_else(run, tmp_path):
    page = tmp_path / "page.html"
    status, out, _ = run("report", "no-zap", "upstream", "--scenario", "tiny", "-o", str(page))
    assert status == 1 and "2 checks, 2 violations" in out
    assert "https://" not in page.read_text()
    assert run("report", "no-zap", "--scenario", "tiny", "-o", str(tmp_path / "no" / "page.html"))[0] == 2


def test_a_design_for_one_backing_is_checked_on_that_backing(run):
    assert (
        "gmem-in-place, snp, tiny, in-place backing" in run("check", "gmem-in-place", "--scenario", "tiny")[1]
    )


def test_an_unknown_option_is_refused(run):
    assert run("check", "no-zap", "--frobnicate")[0] == 2


def test_trace_can_show_a_run_that_counts_a_measure(run):
    out = run("trace", "v8-post-hook", "--scenario", "tiny", "--measure", "spurious-npf")[1]
    assert "[P0 already mapped]" in out and "=> spurious-npf:" in out
    assert run("trace", "v8-post-hook", "--measure", "joy")[0] == 2


def test_trace_then_replay_gives_the_same_diagram(run):
    status, diagram, _ = run("trace", "no-zap", "--scenario", "tiny")
    assert status == 1
    code = run("trace", "no-zap", "--scenario", "tiny", "--code")[1].strip()
    assert run("replay", code)[1] == diagram
    quoted = "".join(f"> {line}\n" for line in diagram.splitlines())
    assert run("replay", "-", stdin=quoted)[1:] == (diagram, "")


def test_a_diagram_of_an_edited_design_replays_from_a_mail_without_complaint(run, tmp_path):
    mine = tmp_path / "mine.kvm"
    mine.write_text(
        run("show", "v8-post-hook")[1].replace("static_call(kvm_x86_update_mem_attr)()", "rmpupdate()")
    )
    diagram = run("trace", str(mine), "--scenario", "tiny")[1]
    mail = "".join(f"> {line}\n" for line in ["Hi,", "", *diagram.splitlines(), "", "-- ", "me"])
    status, out, err = run("replay", "-", stdin=mail)
    assert (status, err) == (1, "") and "host-rmp-fault" in out


def test_a_pasted_diagram_that_was_changed_is_told_apart_from_its_code(run):
    diagram = run("trace", "no-zap", "--scenario", "tiny")[1]
    _, out, err = run(
        "replay",
        "-",
        stdin=diagram.replace("rmpupdate(P0, private)", "nothing at all").replace("invalidate_end", "begin"),
    )
    assert out == diagram and "not what its code replays" in err


def test_replay_can_show_the_machine_after_a_step(run):
    code = run("trace", "no-zap", "--scenario", "tiny", "--code")[1].strip()
    assert re.search(r"^NPT +gfn 0=S0$", run("replay", code, "--step", "28")[1], re.M)
    assert run("replay", code, "--step", "99")[0] == 2


BAD = {
    "no command": [],
    "unknown command": ["explode"],
    "unknown design": ["check", "v8-post-hok"],
    "unknown scenario": ["check", "v8-post-hook", "--scenario", "huge-ish"],
    "unknown platform": ["check", "v8-post-hook", "--platform", "cca"],
    "unknown backing": ["check", "v8-post-hook", "--backing", "none"],
    "unknown switch": ["check", "v8-post-hook", "--switch", "warp=yes"],
    "bad switch value": ["check", "v8-post-hook", "--switch", "preempt_count=maybe"],
    "bad limit": ["check", "v8-post-hook", "--limit", "-3"],
    "unknown property": ["trace", "v8-post-hook", "--property", "beauty"],
    "foreign code": ["replay", "spin:1:abc"],
    "no code on standard input": ["replay", "-"],
    "directory as design": ["show", "/"],
    "empty standard input": ["check", "-"],
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_exits_2_with_a_message_and_no_output(run, what):
    status, out, err = run(*BAD[what])
    assert (status, out) == (2, "")
    assert len(err.strip()) > 10


def test_a_design_with_a_mistake_is_told_line_and_caret(run, tmp_path):
    path = tmp_path / "mine.kvm"
    path.write_text("ioctl:\n    mutex_lock(slots_lock)\n    rmpupdat()\n")
    status, _, err = run("check", str(path))
    assert status == 2 and "mine.kvm:3" in err and "    ^" in err and "rmpupdate" in err


@pytest.mark.parametrize(
    ("page", "command", "shown"),
    [(page.name, *found) for page in pages() for found in BLOCK.findall(page.read_text())],
)
def test_a_page_shows_what_its_command_prints(run, page, command, shown):
    assert run(*command.split())[1] == shown != ""


def test_the_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "kvmlab", "scenarios"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("tiny")

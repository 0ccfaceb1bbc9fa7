"""The command line as scripts use it: what is printed, and the exit status."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bless_docs import BLOCK, pages

import kvmlab
from kvmlab import cli
from kvmlab.cli import commands
from kvmlab.design import shipped
from kvmlab.machine.conf import Switches
from kvmlab.machine.properties import BY_NAME
from kvmlab.machine.scenarios import SCENARIOS


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def call(*arguments: Any, stdin: Any = "") -> Any:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        try:
            status: object = cli.main(arguments)
        except SystemExit as leaving:
            status = leaving.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return call


def test_the_lists_name_everything_once(run: Callable[..., Any]) -> None:
    assert [line.split()[0] for line in run("designs")[1].splitlines()] == [
        *shipped("thread"),
        *shipped("variant"),
    ]
    assert [line.split()[0] for line in run("scenarios")[1].splitlines()] == list(SCENARIOS)
    assert [line.split()[0] for line in run("properties")[1].splitlines()] == list(BY_NAME)


def test_planted_designs_are_listed_when_asked_for(run: Callable[..., Any]) -> None:
    assert "never-rmpupdate" not in run("designs")[1]
    assert "never-rmpupdate" in run("designs", "--planted")[1]


def test_the_list_of_calls_has_its_columns_one_below_the_other(run: Callable[..., Any]) -> None:
    lines = run("designs", "--calls")[1].splitlines()
    assert all(line[34] == line[70] == " " != line[35] and line[71] != " " for line in lines)


def test_show_prints_a_text_that_is_the_same_design_again(run: Callable[..., Any]) -> None:
    text = run("show", "pre-post-directmap")[1]
    status, out, _ = run("diff", "pre-post-directmap", "-", stdin=text)
    assert (status, out) == (0, "the same ordering\n")


def test_diff_prints_the_lines_in_which_two_designs_differ(run: Callable[..., Any]) -> None:
    out = run("diff", "v8-post-hook", "pre-post-directmap")[1]
    assert re.search(r"^\+\s+rmpupdate\(\)$", out, re.M)


def test_check_exits_0_when_nothing_bad_can_happen(run: Callable[..., Any]) -> None:
    status, out, _ = run("check", "v8-post-hook", "--scenario", "tiny")
    assert status == 0 and "940 states" in out and "complete" in out


def test_check_exits_1_when_something_can(run: Callable[..., Any]) -> None:
    status, out, _ = run("check", "no-zap", "--scenario", "tiny")
    assert status == 1 and "Sometimes kernel-bug" in out


def test_json_elements_have_the_promised_keys(run: Callable[..., Any]) -> None:
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
    assert bad["properties"]["kernel-bug"]["code"].startswith("kvmlab:2:")
    assert good["measures"]["spurious-npf"] == {"least": 0, "most": None}


def test_without_options_check_looks_at_both_directions(run: Callable[..., Any]) -> None:
    out = run("check", "upstream")[1]
    assert (
        "upstream, snp, to-private, split backing" in out and "upstream, snp, to-shared, split backing" in out
    )


def test_a_case_that_does_not_exist_prints_n_a(run: Callable[..., Any]) -> None:
    status, out, _ = run("check", "upstream", "--backing", "in-place", "--scenario", "tiny")
    assert status == 0 and "n/a" in out
    assert run("trace", "upstream", "--backing", "in-place")[1].startswith("n/a")


def test_a_switch_changes_what_is_explored(run: Callable[..., Any]) -> None:
    assert run("check", "v7-under-lock", "--scenario", "tiny", "--switch", "preempt_count=no")[0] == 0


def test_the_matrix_has_a_row_of_verdicts_with_its_states_and_fits_the_screen(
    run: Callable[..., Any],
) -> None:
    status, out, _ = run("matrix", "--platform", "snp", "--scenario", "tiny", "--backing", "split")
    row = next(line.split() for line in out.splitlines() if line.startswith("tiny"))
    assert status == 1
    assert row[:5] == ["tiny", "ATOMIC!", "ok", "ATOMIC!", "BUG"]
    states = json.loads(
        run("matrix", "--platform", "snp", "--scenario", "tiny", "--backing", "split", "--json")[1]
    )
    assert row[-1] == f"{sum(square.get('states', 0) for square in states):,}"
    assert "all complete" in out
    assert max(map(len, out.splitlines())) <= 190


def test_the_matrix_as_json_has_an_element_a_cell(run: Callable[..., Any]) -> None:
    out = run("matrix", "--platform", "snp", "--scenario", "tiny", "--design", "upstream", "--json")[1]
    first, second = json.loads(out)
    assert first["states"] == 1_169 and "split" in second["n/a"]


def test_report_writes_one_page_that_needs_nothing_else(run: Callable[..., Any], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    status, out, _ = run("report", "no-zap", "upstream", "--scenario", "tiny", "-o", str(page))
    assert status == 1 and "2 checks, 2 violations" in out
    assert "https://" not in page.read_text()
    assert run("report", "no-zap", "--scenario", "tiny", "-o", str(tmp_path / "no" / "page.html"))[0] == 2


def test_a_design_for_one_backing_is_checked_on_that_backing(run: Callable[..., Any]) -> None:
    assert (
        "gmem-in-place, snp, tiny, in-place backing" in run("check", "gmem-in-place", "--scenario", "tiny")[1]
    )


def test_an_unknown_option_is_refused(run: Callable[..., Any]) -> None:
    assert run("check", "no-zap", "--frobnicate")[0] == 2


def test_trace_can_show_a_run_that_counts_a_measure(run: Callable[..., Any]) -> None:
    out = run("trace", "v8-post-hook", "--scenario", "tiny", "--measure", "spurious-npf")[1]
    assert "[P0 already mapped]" in out and "=> spurious-npf:" in out
    assert run("trace", "v8-post-hook", "--measure", "joy")[0] == 2


def test_trace_then_replay_gives_the_same_diagram(run: Callable[..., Any]) -> None:
    status, diagram, _ = run("trace", "no-zap", "--scenario", "tiny")
    assert status == 1
    code = run("trace", "no-zap", "--scenario", "tiny", "--code")[1].strip()
    assert run("replay", code)[1] == diagram
    quoted = "".join(f"> {line}\n" for line in diagram.splitlines())
    assert run("replay", "-", stdin=quoted)[1:] == (diagram, "")


def test_a_diagram_of_an_edited_design_replays_from_a_mail_without_complaint(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.kvm"
    mine.write_text(
        run("show", "v8-post-hook")[1].replace("static_call(kvm_x86_update_mem_attr)()", "rmpupdate()")
    )
    diagram = run("trace", str(mine), "--scenario", "tiny")[1]
    mail = "".join(f"> {line}\n" for line in ["Hi,", "", *diagram.splitlines(), "", "-- ", "me"])
    status, out, err = run("replay", "-", stdin=mail)
    assert (status, err) == (1, "") and "host-rmp-fault" in out


def test_a_pasted_diagram_that_says_more_than_its_run_is_bad_input(run: Callable[..., Any]) -> None:
    diagram = run("trace", "no-zap", "--scenario", "tiny")[1]
    status, out, err = run("replay", "-", stdin=diagram.replace("=> kernel-bug", "=> confidentiality"))
    assert (status, out) == (2, "") and "not what its code replays" in err and "=> confidentiality" in err


def test_a_garbled_property_in_a_code_is_bad_input(run: Callable[..., Any]) -> None:
    code = run("trace", "no-zap", "--scenario", "tiny", "--code")[1].strip()
    status, out, err = run("replay", code.replace("/kb/", "/kc/"))
    assert (status, out) == (2, "") and "damaged code" in err


@pytest.mark.parametrize(("design", "status"), [("never-rmpupdate", 1), ("no-zap", 1), ("upstream", 0)])
def test_the_status_of_a_replay_is_whether_the_run_shows_something_bad(
    run: Callable[..., Any], design: str, status: int
) -> None:
    code = run("trace", design, "--scenario", "tiny", "--code")[1].strip()
    assert run("replay", code)[0] == status


def test_trace_takes_the_backing_that_a_design_knows_as_check_does(run: Callable[..., Any]) -> None:
    status, out, _ = run("trace", "gmem-in-place", "--scenario", "tiny")
    assert status == 0 and out.startswith("gmem-in-place, snp, tiny, in-place backing")


@pytest.mark.parametrize(("prop", "status"), [("kernel-bug", 1), ("livelock", 0)])
def test_the_status_of_a_trace_is_the_verdict_on_the_property_asked_for(
    run: Callable[..., Any], prop: str, status: int
) -> None:
    assert run("trace", "no-zap", "--scenario", "tiny", "--property", prop)[0] == status


def test_replay_can_show_the_machine_after_a_step(run: Callable[..., Any]) -> None:
    code = run("trace", "no-zap", "--scenario", "tiny", "--code")[1].strip()
    assert re.search(r"^NPT +gfn 0=S0$", run("replay", code, "--step", "28")[1], re.M)
    assert run("replay", code, "--step", "99")[0] == 2


def test_without_a_command_there_is_help(run: Callable[..., Any]) -> None:
    status, out, err = run()
    assert (status, out) == (2, "") and "list the scenarios" in err and "Exit status" in err


# -- exit status


LIMITED = ["--scenario", "tiny", "--limit", "20"]


@pytest.mark.parametrize(
    "command",
    [
        ["check", "no-zap", *LIMITED],
        ["check", "no-zap", *LIMITED, "--json"],
        ["trace", "no-zap", *LIMITED],
        ["matrix", "--design", "no-zap", "--platform", "snp", "--backing", "split", *LIMITED],
        ["report", "no-zap", *LIMITED, "-o", "/dev/null"],
    ],
)
def test_nothing_bad_found_but_not_complete_is_3(run: Callable[..., Any], command: list[str]) -> None:
    assert run(*command)[0] == 3


def test_what_is_not_complete_never_says_never(run: Callable[..., Any]) -> None:
    out = run("check", "no-zap", *LIMITED)[1]
    assert "NOT complete" in out and "Never" not in out
    assert "beyond the first" in run("trace", "no-zap", *LIMITED)[2]


def test_every_search_has_a_limit_that_says_so_when_it_is_met(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmlab.verdict.report.LIMIT", 20)
    status, out, _ = run("check", "v8-post-hook", "--scenario", "tiny")
    assert status == 3 and "interleavings beyond the first" in out


def test_a_case_that_does_not_exist_cannot_go_wrong(run: Callable[..., Any]) -> None:
    assert run("check", "upstream", "no-zap", "--backing", "in-place", "--scenario", "tiny")[0] == 0
    assert run("check", "no-zap", "--scenario", "seamcall-busy", "--scenario", "tiny")[0] == 1


def test_out_of_memory_is_2_and_says_what_to_do(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("kvmlab.verdict.report.explore", exhausted)
    status, out, err = run("check", "no-zap", "--scenario", "tiny")
    assert (status, out) == (2, "") and "out of memory; a limit on states" in err


def test_a_bug_is_told_in_one_line_and_is_no_verdict(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmlab.verdict.report.explore", lambda *_: 1 / 0)
    status, out, err = run("check", "no-zap", "--scenario", "tiny")
    assert (status, out) == (2, "") and err.startswith("kvmlab: this is a bug in kvmlab: ZeroDivisionError")


def test_a_chain_of_bases_has_an_end(run: Callable[..., Any], tmp_path: Path) -> None:
    for n in range(600):
        (tmp_path / f"b{n}.kvm").write_text(f"base: b{n + 1}\n")
    status, _, err = run("check", str(tmp_path / "b0.kvm"))
    assert status == 2 and "more than 16 bases" in err


def started(*arguments: str, **more: Any) -> Any:
    command = [sys.executable, "-m", "kvmlab", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **more)


@pytest.mark.parametrize(("design", "status"), [("no-zap", 1), ("upstream", 0)])
@pytest.mark.parametrize("command", ["check", "trace"])
def test_a_closed_pipe_keeps_the_status_of_the_verdict(command: str, design: str, status: int) -> None:
    process = started(command, design, "--scenario", "tiny", stdout=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", status)
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("command", [["check", "upstream", "--scenario", "tiny"], ["designs"], ["--help"]])
def test_a_full_disk_is_2(command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvmlab", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (
        2,
        "kvmlab: cannot write to standard output: No space left on device\n",
    )


def test_what_an_output_cannot_show_is_2_in_words(tmp_path: Path) -> None:
    mine = tmp_path / "größe.kvm"
    mine.write_text("// größer\nbase: no-zap\n", encoding="utf-8")
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C.UTF-8"}
    shown, drawn = (
        subprocess.run(
            [sys.executable, "-m", "kvmlab", *command],
            env=ascii_only,
            capture_output=True,
            text=True,
            check=False,
        )
        for command in (["show", str(mine)], ["trace", str(mine), "--scenario", "tiny"])
    )
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith("kvmlab: standard output takes ascii only, and '\\xf6\\xdf' is none")
    assert drawn.returncode == 1 and drawn.stdout.startswith("gr\\xf6\\xdfe.kvm, snp, tiny")


# -- files and names


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    write = Path.write_text

    def half(path: Any, text: Any, **how: Any) -> None:
        write(path, text[:100], **how)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    status, _, err = run("report", "no-zap", "--scenario", "tiny", "-o", str(page))
    assert status == 2 and "No space left" in err
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"] and page.read_text() == "old"


def test_a_new_report_takes_the_place_and_the_mode_of_the_old_one(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    page, link = tmp_path / "page.html", tmp_path / "link.html"
    page.write_text("old")
    page.chmod(0o640)
    link.symlink_to(page)
    assert run("report", "no-zap", "--scenario", "tiny", "-o", str(link))[0] == 1
    assert link.is_symlink() and page.stat().st_mode & 0o777 == 0o640
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "no/such/folder"])
def test_a_report_with_an_impossible_name_is_bad_input(
    run: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    assert run("report", "no-zap", "--scenario", "tiny", "-o", f"{tmp_path}/{name}")[0] == 2


def test_what_a_file_is_called_reaches_the_terminal_escaped(run: Callable[..., Any], tmp_path: Path) -> None:
    mine = tmp_path / "a\x1b[31m\nb\u202e.kvm"
    mine.write_text("base: no-zap\n")
    page = tmp_path / "\x1b.html"
    outputs = [
        run("check", str(mine), "--scenario", "tiny"),
        run("trace", str(mine), "--scenario", "tiny"),
        run("report", str(mine), "--scenario", "tiny", "-o", str(page)),
        run("matrix", "--design", str(mine), "--platform", "snp", "--scenario", "tiny"),
        run("check", str(mine), "\x1b--\u202e"),
        run("check", str(mine), "--\x1b"),
    ]
    assert [status for status, _, _ in outputs] == [1, 1, 1, 1, 2, 2]
    assert not any(set("\x1b\u202e") & set(out + err) for _, out, err in outputs)
    assert outputs[0][1].startswith(r"a\x1b[31m\nb\u202e.kvm, snp, tiny")


def test_a_file_whose_name_has_parentheses_is_a_file(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine (1).kvm").write_text("base: no-zap\n")
    out = run("matrix", "--design", "mine (1).kvm", "--platform", "snp", "--scenario", "tiny")[1]
    assert "mine (1).kvm" in out and "BUG" in out
    assert kvmlab.check("mine (1).kvm", scenario="tiny").case.design.name == "mine (1).kvm"


# -- terminals


@pytest.fixture
def at_a_terminal(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A run whose standard output and error are a terminal of 80 columns."""

    def call(*arguments: Any) -> Any:
        monkeypatch.setenv("COLUMNS", "80")
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda: True)
        return run(*arguments)

    return call


@pytest.mark.parametrize("command", ["designs", "scenarios", "properties"])
def test_lists_are_broken_at_word_ends_on_a_terminal_only(
    run: Callable[..., Any], at_a_terminal: Callable[..., Any], command: str
) -> None:
    plain = run(command)[1]
    folded = at_a_terminal(command)[1]
    assert folded.split() == plain.split()
    assert max(map(len, folded.splitlines())) <= 80 <= max(map(len, plain.splitlines()))


def test_claims_are_folded_and_show_how_far_they_are(at_a_terminal: Callable[..., Any]) -> None:
    _, out, err = at_a_terminal("claims", "C04", "C06")
    assert max(map(len, out.splitlines())) <= 80
    assert "1 of 2: C04" in err and "2 of 2: C06" in err


def test_a_matrix_says_how_far_it_is_and_what_its_short_words_mean(at_a_terminal: Callable[..., Any]) -> None:
    arguments = ["--design", "no-zap", "--platform", "snp", "--backing", "split", "--scenario", "tiny"]
    _, out, err = at_a_terminal("matrix", *arguments, "--scenario", "host-io", "--scenario", "huge")
    assert "3 of 3: snp split no-zap huge" in err
    assert "BUG kernel-bug" in out and "RMPF" not in out


def test_check_and_switches_say_how_far_they_are(
    at_a_terminal: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvmlab.verdict import matrix as grid

    assert "2 of 2: no-zap snp to-shared split" in at_a_terminal("check", "no-zap")[2]
    monkeypatch.setattr(grid, "ALTERNATIVES", [("snp", Switches(preempt_count=False), ("tiny",))])
    assert re.search(r"switch 1 of 1, preempt_count: (\d+) of \1: snp in-place", at_a_terminal("switches")[2])


BAD = {
    "unknown command": ["explode"],
    "unknown design": ["check", "v8-post-hok"],
    "unknown scenario": ["check", "v8-post-hook", "--scenario", "huge-ish"],
    "unknown platform": ["check", "v8-post-hook", "--platform", "cca"],
    "unknown backing": ["check", "v8-post-hook", "--backing", "none"],
    "unknown switch": ["check", "v8-post-hook", "--switch", "warp=yes"],
    "bad switch value": ["check", "v8-post-hook", "--switch", "preempt_count=maybe"],
    "bad limit": ["check", "v8-post-hook", "--limit", "-3"],
    "limit that is a digit, but no number": ["check", "v8-post-hook", "--limit", "²"],
    "limit of 5,000 digits": ["check", "v8-post-hook", "--limit", "9" * 5000],
    "no process": ["matrix", "--jobs", "0"],
    "unknown property": ["trace", "v8-post-hook", "--property", "beauty"],
    "foreign code": ["replay", "spin:1:abc"],
    "no code on standard input": ["replay", "-"],
    "directory as design": ["show", "/"],
    "empty standard input": ["check", "-"],
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_exits_2_with_a_message_and_no_output(run: Callable[..., Any], what: str) -> None:
    status, out, err = run(*BAD[what])
    assert (status, out) == (2, "")
    assert len(err.strip()) > 10


def test_a_design_with_a_mistake_is_told_line_and_caret(run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "mine.kvm"
    path.write_text("ioctl:\n    mutex_lock(slots_lock)\n    rmpupdat()\n")
    status, _, err = run("check", str(path))
    assert status == 2 and "mine.kvm:3" in err and "    ^" in err and "rmpupdate" in err


@pytest.mark.parametrize(
    ("page", "command", "shown"),
    [(page.name, *found) for page in pages() for found in BLOCK.findall(page.read_text())],
)
def test_a_page_shows_what_its_command_prints(
    run: Callable[..., Any], page: str, command: str, shown: str
) -> None:
    assert run(*command.split())[1] == shown != ""


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvmlab", "scenarios"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("tiny")


@pytest.mark.parametrize("in_a_clone", [True, False])
def test_lab_keeps_opened_notebooks_as_they_are_where_it_finds_a_clone(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_a_clone: bool
) -> None:
    pytest.importorskip("jupyterlab", reason="needs jupyterlab")
    if not in_a_clone:
        monkeypatch.setattr(commands, "__file__", str(tmp_path / "kvmlab" / "cli" / "commands.py"))
    started = []

    def become(program: Any, command: Any) -> None:
        started.extend(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", become)
    assert run("lab", "--no-browser")[0] == 0
    python, *command = started
    assert python == sys.executable and command[-1] == "--no-browser"
    if in_a_clone:
        root = Path(commands.__file__).parents[2]
        assert command[:3] == [str(root / "tests/workbook/notebook_server.py"), "--notebook-dir", str(root)]
        assert "--LabApp.default_url=/lab/tree/notebooks/00_tour.ipynb" in command
    else:
        assert command[:2] == ["-m", "jupyterlab"] and "--notebook-dir" not in command

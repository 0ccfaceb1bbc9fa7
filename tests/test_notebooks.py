"""Committed notebooks are in normal form, each of its rules can fail, and nbval compares something."""

from __future__ import annotations

import copy
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import notebook_rules as rules
import pytest

import notebooks

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))

Cells = list[dict[str, Any]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_committed_notebook_is_in_normal_form(path: Path) -> None:
    assert notebooks.check(notebooks.load(path)) == []
    assert notebooks.dumps(notebooks.load(path)) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_nbval_compares_outputs_of_a_committed_notebook(path: Path) -> None:
    assert rules.compared(notebooks.load(path)) > 0


def rich(**data: str) -> dict[str, Any]:
    """An output with MIME parts, named with a double underscore for the slash."""
    parts = {name.replace("__", "/"): text for name, text in data.items()}
    return {"output_type": "display_data", "data": parts, "metadata": {}}


def sample() -> dict[str, Any]:
    """A small notebook in normal form."""
    node = nbformat.v4
    table = rich(text__plain="one page, private", text__html="<table><tr><td>private</td></tr></table>")
    fresh = node.new_notebook(
        cells=[
            node.new_markdown_cell("# One page\n\nSee [the other notebook](01_two.ipynb)."),
            node.new_code_cell("print('gfn 8, pfn 0x8000020000000008')"),
            node.new_code_cell("show()", outputs=[nbformat.from_dict(table)]),
            node.new_code_cell("assert 1 + 1 == 2"),
        ]
    )
    fresh.cells[1].outputs = [node.new_output("stream", text="gfn 8, pfn 0x8000020000000008\n")]
    return notebooks.normalise(fresh)


def output(**data: str) -> Callable[[dict[str, Any]], None]:
    """A mutation: the table's output gets other MIME parts."""

    def mutate(nb: dict[str, Any]) -> None:
        nb["cells"][2]["outputs"] = [nbformat.from_dict(rich(**data))]

    return mutate


def printed(text: str) -> Callable[[dict[str, Any]], None]:
    """A mutation: the first code cell has printed something else."""

    def mutate(nb: dict[str, Any]) -> None:
        nb["cells"][1]["outputs"][0]["text"] = text

    return mutate


def source(text: str, index: int = 2) -> Callable[[dict[str, Any]], None]:
    """A mutation: a cell has another source."""

    def mutate(nb: dict[str, Any]) -> None:
        nb["cells"][index]["source"] = text

    return mutate


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A mutation: the value at a path such as ``cells/1/id``."""

    def mutate(nb: dict[str, Any]) -> None:
        *inner, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        place: Any = nb
        for part in inner:
            place = place[part]
        place[last] = value

    return mutate


def strip(nb: dict[str, Any]) -> None:
    """A mutation: all outputs are gone, as after nbstripout."""
    for _, cell in rules.code(nb):
        cell["outputs"] = []


WIDGET = {rules.WIDGET_VIEW: "{}"}
IMAGE = "<img src='data:image/png;base64,/tmp/x'"
MUTATIONS: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
    ("metadata", change("metadata/widgets", {})),
    ("metadata", change("metadata/kernelspec/display_name", "my venv")),
    ("metadata", change("metadata/language_info/version", "3.11.7")),
    ("metadata", change("cells/2/metadata/scrolled", True)),
    ("ids", change("cells/1/id", "a1b2c3d4")),
    ("counts", change("cells/2/execution_count", 7)),
    ("counts", change("cells/2/execution_count", None)),
    ("private", printed("see /home/someone/kvmlab/model/state.py")),
    ("private", printed("C:\\Users\\someone")),
    ("private", printed("someone@host:~$ make test")),
    ("private", source("Open [it](/tmp/kvmlab/01_two.ipynb).", 0)),
    ("time", printed("started 12:34:56")),
    ("time", printed("explored in 0.52 ms")),
    ("time", printed(f"on {datetime.date.today()}")),
    ("address", printed("<kvmlab.Session object at 0x10f2b3c40>")),
    ("address", output(text__plain="Session(0x7f3a5c2b1d90)")),
    ("markup", output(text__plain="a table of pages", text__html="<div><svg></svg></div>")),
    ("markup", output(text__plain="a table of pages", text__html="<STYLE>td {}</STYLE>")),
    ("markup", output(text__plain="a table of pages", text__html="<script>alert()</script>")),
    ("markup", output(**{"text__plain": "a table of pages", "image__svg+xml": "<svg/>"})),
    ("widget", output(text__plain="Dropdown(value='snp')", **WIDGET)),
    ("widget", output(text__plain="Dropdown(value='snp')", text__html="<table></table>", **WIDGET)),
    ("alt", output(text__plain="<Figure size 640x480 with 1 Axes>", image__png="aaaa")),
    ("alt", output(text__plain="states a level", text__html=IMAGE + ">")),
    ("alt", output(text__plain="states a level", text__html=IMAGE + " alt=''>")),
    ("errors", change("cells/2/metadata/tags", ["raises-exception"])),
    ("errors", change("cells/1/outputs/0/name", "stderr")),
    ("compared", strip),
    ("compared", change("cells/1/metadata/tags", ["nbval-ignore-output"])),
    ("compared", source("# NBVAL_SKIP\nshow()")),
    ("size", printed("x" * 150_000)),
    ("length", source("a = 1\n" * 13)),
    ("capture", source("out = widgets.Output()")),
    ("capture", source("interact(show)")),
    ("capture", source("@widgets.interact\ndef show(): ...")),
    ("capture", source("from IPython.display import clear_output")),
    ("python", source("%matplotlib inline")),
    ("assert", source("1 + 1 == 2", 3)),
    ("assert", source("'we assert nothing'", 3)),
]


def test_the_sample_notebook_breaks_no_rule() -> None:
    assert notebooks.check(sample()) == []


@pytest.mark.parametrize(("rule", "mutate"), MUTATIONS)
def test_a_mutation_breaks_its_rule(rule: str, mutate: Callable[[dict[str, Any]], None]) -> None:
    nb = sample()
    mutate(nb)
    assert {line.split(": ")[1] for line in notebooks.check(nb)} == {rule}


def test_every_rule_has_a_mutation() -> None:
    assert {rule for rule, _ in MUTATIONS} == set(rules.RULES)


@pytest.mark.parametrize(
    "harmless",
    ["CPU0/CPU1, shared/private", "/dev/kvm, /sys/module/kvm_amd", "at 4:3, gfn 0x7f0000", "22 Mar 2023"],
)
def test_what_kernel_people_write_breaks_no_rule(harmless: str) -> None:
    nb = sample()
    printed(harmless)(nb)
    assert notebooks.check(nb) == []


def test_normalising_removes_what_an_editor_leaves_behind() -> None:
    nb = sample()
    for path, value in [
        ("metadata/widgets", {"state": {}}),
        ("cells/1/id", "x"),
        ("cells/1/execution_count", 9),
        ("cells/2/metadata/execution", {"iopub.status.busy": "12:00"}),
        ("cells/1/source", "print('gfn 8, pfn 0x8000020000000008')  \n"),
    ]:
        change(path, value)(nb)
    nb["cells"].append(nbformat.v4.new_code_cell(""))
    nb["cells"][2]["outputs"][0]["data"][rules.WIDGET_VIEW] = {"model_id": "d0"}
    assert notebooks.normalise(nb) == sample()


def test_normalising_twice_changes_nothing_more() -> None:
    assert notebooks.normalise(sample()) == sample()


def test_the_pieces_of_a_stream_become_one() -> None:
    nb = sample()
    whole = nb["cells"][1]["outputs"][0]
    first, second = copy.deepcopy(whole), copy.deepcopy(whole)
    first["text"], second["text"] = whole["text"][:5], whole["text"][5:]
    nb["cells"][1]["outputs"] = [first, second]
    assert notebooks.normalise(nb) == sample()


def test_what_is_printed_stays_on_its_side_of_what_is_displayed() -> None:
    nb = sample()
    table = nb["cells"][2]["outputs"][0]
    before, after = (nbformat.v4.new_output("stream", text=f"{word}\n") for word in ("before", "after"))
    nb["cells"][2]["outputs"] = [before, table, after]
    assert notebooks.normalise(nb) == nb


def test_a_live_view_without_fallback_is_kept_for_the_check_to_find() -> None:
    nb = sample()
    output(text__plain="Dropdown(value='snp')", **WIDGET)(nb)
    assert "store text/html" in notebooks.check(notebooks.normalise(nb))[0]


def test_a_traceback_is_dropped_and_its_message_kept() -> None:
    nb = sample()
    change("cells/2/metadata/tags", ["raises-exception"])(nb)
    fault = nbformat.v4.new_output("error", ename="RmpFault", evalue="gfn 8", traceback=["/home/x/y.py"])
    nb["cells"][2]["outputs"] = [fault]
    normal = notebooks.normalise(nb)
    assert notebooks.check(normal) == []
    assert dict(normal["cells"][2]["outputs"][0], output_type="") == {
        "output_type": "", "ename": "RmpFault", "evalue": "gfn 8", "traceback": [],
    }  # fmt: skip


LIVE = """
import anywidget
class View(anywidget.AnyWidget):
    _esm = "export default {}"
    def __repr__(self):
        return "one page"
    def _repr_mimebundle_(self, **kwargs):
        return super()._repr_mimebundle_(**kwargs)[0] | {"text/html": f"<b>{WORD}</b>", "text/plain": WORD}
WORD = "private"
View()
"""


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """A notebook with a live widget, a caught fault and a closing assert, without outputs."""
    node = nbformat.v4
    raising = node.new_code_cell("raise LookupError('gfn 8')", metadata={"tags": ["raises-exception"]})
    last = node.new_code_cell("print('Never')\nassert View")
    cells = [node.new_code_cell(LIVE.strip()), raising, last]
    path = tmp_path / "live.ipynb"
    path.write_text(nbformat.writes(node.new_notebook(cells=cells)), encoding="utf-8")
    return path


def nbval_results(folder: Path) -> dict[str, list[str]]:
    """The result of each cell under strict nbval, by the name of its notebook."""
    options = ["--nbval", "--nbval-current-env", "-v", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found: dict[str, list[str]] = {}
    for name, result in re.findall(r"^(\w+)::ipynb::Cell \d+ (PASSED|FAILED)", done.stdout, re.M):
        found.setdefault(name, []).append(result)
    return found


def test_a_run_notebook_passes_strict_nbval_which_sees_another_word_in_a_widgets_fallback(live: Path) -> None:
    assert notebooks.main(["run", str(live)]) == 0
    assert rules.WIDGET_VIEW not in live.read_text(encoding="utf-8")
    assert rules.compared(notebooks.load(live)) == 3
    stored = json.loads(live.read_text(encoding="utf-8"))
    stored["cells"][0]["outputs"][0]["data"]["text/html"] = ["<b>shared</b>"]
    (live.parent / "spoiled.ipynb").write_text(json.dumps(stored), encoding="utf-8")
    assert nbval_results(live.parent) == {"live": ["PASSED"] * 3, "spoiled": ["FAILED", "PASSED", "PASSED"]}


def test_a_failing_cell_is_named_though_later_ones_have_outputs_and_the_file_is_left_alone(
    live: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nb = notebooks.load(live)
    nb["cells"][2]["outputs"] = [nbformat.v4.new_output("stream", text="of an earlier run\n")]
    before = notebooks.dumps(nb).replace("raises-exception", "raises")
    live.write_text(before, encoding="utf-8")
    assert notebooks.main(["run", str(live)]) == 1
    assert "cell c01: LookupError: gfn 8" in capsys.readouterr().out
    assert live.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_what_is_no_notebook_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    if text is not None:
        (tmp_path / "x.ipynb").write_text(text)
    assert notebooks.main(["check", str(tmp_path / "x.ipynb")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "first"),
    [
        ("kvmlab.check('v8-post-hok')", "DesignError: "),
        ("kvmlab.check('no-zap', scenario='tinny')", "InputError: unknown scenario 'tinny'"),
        ("kvmlab.check('gmem-in-place')", "NotApplicable: "),
        ("kvmlab.replay('nothing')", "ReplayError: "),
        ("kvmlab.Design.parse('ioctl:\\n    oops()\\n')", "DesignError: (text):2: unknown call 'oops'"),
    ],
)
def test_a_notebook_shows_what_is_refused_without_a_traceback(
    source: str, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    result = InteractiveShell().run_cell(f"import kvmlab\n{source}")
    shown = capsys.readouterr().out
    assert shown == f"{type(result.error_in_exec).__name__}: {result.error_in_exec}\n"
    assert shown.startswith(first)

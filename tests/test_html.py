"""What people see without a kernel: escaped, the same in every run, legible on light, on dark and without styles."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from typing import Any

import notebook_rules
import pytest

import kvmlab
from kvmlab.design import Design
from kvmlab.machine.table import machine_text
from kvmlab.show import html, style
from kvmlab.show.lanes import rows
from kvmlab.show.page import page_html
from kvmlab.show.side_by_side import Side, paired
from kvmlab.show.style import el
from kvmlab.show.workbench_json import session_json, shown_lines
from kvmlab.verdict.display import Displayed
from kvmlab.verdict.session import Session

HOSTILE = '<img src=x onerror="alert(1)">'
TAGS = {"b", "div", "span", "table", "tbody", "td", "th", "thead", "tr", "wbr"}
ATTRIBUTES = {"colspan", "style", "title"}
FAULTY = "rmp-under-lock-directmap-post"


class Reader(HTMLParser):
    """What a piece of HTML consists of; an unbalanced tag fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.styles: set[str] = set()
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.styles |= {value or "" for name, value in attrs if name == "style"}
        if tag != "wbr":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        """What is left when tags and styles are dropped."""
        return " ".join("".join(self.words).split())


def report(design: str | Design = FAULTY, **case: Any) -> kvmlab.Report:
    return kvmlab.check(design, **{"scenario": "tiny", **case})


def hostile() -> Design:
    """A shipped ordering under a name and a title that are markup."""
    text = Design.load("v8-post-hook").text
    return Design.parse(f"// {HOSTILE}\n{text}", name=HOSTILE)


def pictures() -> dict[str, str]:
    faulty, fine, looping = report(), report("v8-post-hook"), report("never-rmpupdate")
    trace = faulty.trace()
    model, frames = trace.case.model, trace.frames
    designs = ["v8-post-hook", FAULTY, "gmem-in-place"]
    matrix = kvmlab.matrix(designs, ["snp"], ["tiny", "careless"], ["split"])
    return {
        "trace": html.trace_html(trace),
        "part": html.trace_html(trace, upto=5),
        "cycle": html.trace_html(looping.trace()),
        "sample": html.trace_html(fine.trace()),
        "report": html.report_html(faulty),
        "comparison": html.comparison_html([faulty, fine]),
        "sides": html.side_by_side_html(faulty, fine),
        "matrix": html.matrix_html(matrix),
        "machine": html.machine_html(model, frames[10].state, frames[9].state),
        "hostile": html.trace_html(report(hostile()).trace()) + html.report_html(report(hostile())),
    }


PICTURES = pictures()
each_picture = pytest.mark.parametrize("name", PICTURES)


def test_every_kind_of_result_is_text_and_html_in_a_notebook() -> None:
    found = report()
    results = [found, found.trace(), kvmlab.compare([FAULTY], scenario="tiny")]
    results.append(kvmlab.matrix([FAULTY], ["snp"], ["tiny"], ["split"]))
    assert {type(result) for result in results} == set(Displayed.__subclasses__())
    for result in results:
        bundle = result._repr_mimebundle_()
        assert bundle == {"text/plain": str(result), "text/html": html.as_html(result)}


@each_picture
def test_only_tags_that_every_viewer_keeps(name: str) -> None:
    reader = Reader(PICTURES[name])
    assert reader.tags <= TAGS
    assert reader.attributes <= ATTRIBUTES


@each_picture
def test_no_colour_of_text_without_its_ground_and_none_that_a_sanitizer_drops(name: str) -> None:
    for each in Reader(PICTURES[name]).styles:
        properties = dict(part.split(":", 1) for part in each.split(";"))
        assert "color" not in properties or "background" in properties
        assert not re.search(r"var\(|currentcolor|inherit|url\(", each, re.IGNORECASE)


@each_picture
def test_the_same_in_every_run(name: str) -> None:
    assert pictures()[name] == PICTURES[name]


@each_picture
def test_nothing_that_a_committed_notebook_may_not_hold(name: str) -> None:
    for rule in (notebook_rules.ADDRESS, notebook_rules.CLOCK, notebook_rules.ACTIVE, notebook_rules.PATH):
        assert not rule.search(PICTURES[name])


def test_a_hostile_name_stays_text() -> None:
    assert HOSTILE in Reader(PICTURES["hostile"]).text
    assert "<img" not in PICTURES["hostile"]


def test_text_becomes_markup_only_by_being_escaped() -> None:
    assert (
        el("b", "<i>", el("i", '"&'), title='">') == '<b title="&quot;&gt;">&lt;i&gt;<i>&quot;&amp;</i></b>'
    )


def test_white_on_vermillion_can_be_read() -> None:
    def light(hue: str) -> float:
        parts = [int(hue[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert 1.05 / (light(style.VERMILLION) + 0.05) >= 4.5


def test_a_violation_says_so_in_words() -> None:
    text = Reader(PICTURES["trace"]).text
    assert "!! host-rmp-fault: #PF RMP: host write to N" in text
    assert "!! Sometimes" in Reader(PICTURES["report"]).text


@pytest.mark.parametrize(
    ("design", "prop"),
    [
        ("no-zap", "out-of-sync"),
        ("keeps-mmu-lock", "deadlock"),
        ("no-zap", "kernel-bug"),
        (FAULTY, "host-rmp-fault"),
    ],
)
def test_every_counterexample_ends_with_its_violation(design: str, prop: str) -> None:
    trace = report(design).trace(prop)
    assert prop in [reason.split(":")[0] for reason in trace.violations(trace.steps)]
    assert f"!! {prop}: " in Reader(html.trace_html(trace)).text


def test_a_changed_cell_shows_the_value_that_it_had() -> None:
    assert "P0 hypervisor → guest gpa=0" in Reader(PICTURES["machine"]).text


def table_after(trace: kvmlab.Trace, told: str) -> str:
    """The machine's table in words, after the first step that tells `told`."""
    frame = next(f for f in trace.frames if f.event and any(told in note for note in f.event.notes))
    return machine_text(trace.case.model, frame.state)


def test_a_private_page_that_is_allocated_anew_shows_who_holds_it() -> None:
    text = table_after(report("v8-post-hook", scenario="huge-split").example("double"), "allocated, zeroed")
    assert "guest_memfd  gfn 0=cached, held by CPU1  gfn 1=cached\n" in text


def test_a_private_2m_page_shows_as_one_in_the_npt_the_tlb_and_the_rmp() -> None:
    text = table_after(report("upstream", scenario="huge-accept").sample(), "[TLB: gfn 0 -> P0]")
    assert "2M=private\n" in text and "CPU0=P0 (2M)" in text and "P0=guest gpa=0 2M" in text


def test_an_entry_that_is_reserved_and_empty_shows_as_such() -> None:
    trace = report("reserved-read-as-attributes", scenario="reserve-fails").trace()
    assert "gfn 0=shared (reserved)  gfn 1=private\n" in table_after(trace, "= -ENOMEM")


def test_a_cycle_says_where_it_begins_and_goes_back_to() -> None:
    trace = report("never-rmpupdate").trace()
    assert trace.cycle is not None
    text = Reader(PICTURES["cycle"]).text
    assert "from here on it repeats for ever" in text
    assert f"back to step {trace.cycle + 1}, for ever" in text


def test_a_part_of_a_run_says_what_is_left_out() -> None:
    trace, text = report().trace(), Reader(PICTURES["part"]).text
    assert f"... {trace.steps - 5} more steps" in text
    assert "the machine after step 5" in text
    assert "!! host-rmp-fault:" not in text


def test_the_matrix_shows_each_short_verdict_and_a_case_that_is_not() -> None:
    text = Reader(PICTURES["matrix"]).text
    square = kvmlab.matrix([FAULTY], ["snp"], ["tiny"], ["split"]).squares[0]
    assert f"{square.short} {square.states:,}" in text
    assert "n/a" in text


def test_the_bar_of_mmu_lock_lasts_from_the_call_that_takes_it_to_the_one_that_drops_it() -> None:
    trace = report("v8-post-hook").trace()
    held = [(row.event.call, row.held["CPU0"].mmu) for row in rows(trace)]
    first = next(n for n, (call, _) in enumerate(held) if call == "write_lock(mmu_lock)")
    last = next(n for n, (call, _) in enumerate(held) if call == "write_unlock(mmu_lock)")
    assert {mmu for _, mmu in held[first : last + 1]} == {"write"}
    assert held[first - 1][1] == held[last + 1][1] == ""


def test_the_window_opens_once_and_closes_once() -> None:
    found = [row.window for row in rows(report("v8-post-hook").trace())]
    assert (found.count("opens"), found.count("closes")) == (1, 1)
    assert set(found[found.index("opens") + 1 : found.index("closes")]) == {"open"}


def test_sides_face_each_other_and_a_moved_line_says_so() -> None:
    lines = [(" ", "a()", "a()"), ("-", "b()", None), ("-", "c()", None), ("+", None, "d()")]
    lines += [(" ", "e()", "e()"), ("+", None, "c()")]
    assert list(paired(lines)) == [
        (Side(" ", "a()"), Side(" ", "a()")),
        (Side("-", "b()"), Side("+", "d()")),
        (Side("~", "c()"), None),
        (Side(" ", "e()"), Side(" ", "e()")),
        (None, Side("~", "c()")),
    ]


def test_every_step_of_the_design_is_found_among_the_lines_shown() -> None:
    for name in ("v8-post-hook", "upstream", "defer-to-fault", FAULTY):
        session = Session(name)
        shown = {s["name"]: s["lines"] for s in session_json(session)["design"]["sections"]}
        for step, frame in zip(session_json(session)["trace"]["steps"], session.frames, strict=True):
            if frame.event and frame.event.line and frame.event.section in shown:
                section, index = step["line"]
                assert section == frame.event.section
                assert shown[section][index].strip()
        assert shown_lines(session.design)


def test_the_live_fragments_are_the_stored_ones_with_classes_for_styles() -> None:
    session = Session(FAULTY)
    sent = session_json(session)["trace"]
    rules = dict(re.findall(r"\.(k\w+)\{([^}]*)\}", sent["styles"]))
    row = re.sub(r'class="(k\w+)"', lambda found: f'style="{rules[found[1]]}"', sent["steps"][3]["row"])
    assert row in html.trace_html(session.trace)


def test_two_runs_on_one_page_do_not_mix_their_styles() -> None:
    found: dict[str, str] = {}
    for name in ("v8-post-hook", "no-zap", FAULTY):
        for cls, rule in re.findall(r"\.(k\w+)\{([^}]*)\}", session_json(Session(name))["trace"]["styles"]):
            assert found.setdefault(cls, rule) == rule


def test_a_page_holds_every_run_and_asks_nothing_of_the_network() -> None:
    page = page_html([report("no-zap"), report(hostile())])
    views = json.loads(page.partition('id="kvmlab-views">')[2].partition("</script>")[0])
    assert [set(each["runs"]) for each in views] == [{"kernel-bug", "out-of-sync", "sample"}, {"sample"}]
    assert "://" not in page
    assert "<img" not in page
    assert page_html([report("no-zap"), report(hostile())]) == page


def test_a_page_has_a_heading_and_a_row_a_check_that_leads_to_it() -> None:
    page = page_html([report("no-zap"), report("v8-post-hook")])
    text = Reader(page.partition("<body>")[2].partition("<h2")[0]).text
    assert "kvmlab: no-zap, v8-post-hook" in text
    assert "kernel-bug, out-of-sync" in text and "nothing is violated" in text
    assert set(re.findall(r'href="#([^"]+)"', page)) == set(re.findall(r'<h2 id="([^"]+)"', page))


def test_a_page_lets_no_script_run_but_its_own() -> None:
    page = page_html([report("no-zap")])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    script = page.rpartition('<script type="module">')[2].partition("</script>")[0]
    digest = b64encode(sha256(script.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{digest}'; style-src")


def test_the_matrix_says_what_its_short_verdicts_mean() -> None:
    assert "RMPF host-rmp-fault" in Reader(PICTURES["matrix"]).text

"""Verdicts as HTML tables: one report, several designs, the matrix."""

from __future__ import annotations

from collections.abc import Sequence

from ..machine.properties import BY_NAME
from ..verdict.matrix import Matrix, Square
from ..verdict.report import ALWAYS, NEVER, SOMETIMES, UNJUDGED, Report
from ..verdict.run import Case
from .style import (
    ALARM,
    LINE,
    MONO,
    SMALL,
    VERMILLION,
    Html,
    alarm,
    blank,
    block,
    el,
    join,
    plural,
    quiet,
    table,
    td,
    th,
    tint,
    tr,
)

RULED = f"padding:3px 12px 3px 0;border-bottom:1px solid {LINE}"
HOST_DOWN = ("host-rmp-fault", "kernel-bug", "platform-error", "deadlock")
MATRIX_KEY = "A trailing ! means: in every run that finishes. Solid: the host goes down."
MARKS = {NEVER: "·", SOMETIMES: "Sometimes", ALWAYS: "Always", UNJUDGED: "?"}


def case_line(case: Case) -> Html:
    """Which case it is: the design's name, then where it was checked."""
    where = str(case).removeprefix(f"{case.design.name}, ")
    return join((el("b", case.design.name), quiet(f"  {where}")))


def size_line(report: Report) -> str:
    """How much was explored, and whether that is all; without times, so that it can be stored."""
    done = "every interleaving explored" if report.complete else "NOT complete"
    states, edges = plural(report.states, "state"), plural(report.transitions, "transition")
    return f"{states}, {edges}, depth {report.depth}: {done}"


def verdict_table(report: Report) -> Html:
    """What can go wrong, a row each; then, in one line, what never does; then what was not checked."""
    never = [name for name, verdict in report.verdicts.items() if verdict.verdict == NEVER]
    lines = [f"Never: {', '.join(never)}"] if never else []
    lines += [f"Not seen: {name}" for name, seen in report.witnesses.items() if not seen]
    lines += [f"Not checked: {what}" for what in report.not_checked]
    bad = [table(_violated_row(report, name) for name in report.violated)] if report.violated else []
    return join((*bad, *(el("div", quiet(line), style="margin-top:4px") for line in lines)))


def _violated_row(report: Report, name: str) -> Html:
    verdict = report.verdicts[name]
    nowrap = f"{RULED};white-space:nowrap"
    return tr(
        td(alarm(f"!! {verdict.verdict}"), style=nowrap),
        td(el("b", name), style=nowrap),
        td(BY_NAME[name].sentence, quiet(f" (after {plural(verdict.depth or 0, 'step')})"), style=RULED),
    )


def report_html(report: Report) -> Html:
    """The verdicts of one check."""
    notes = [el("div", quiet(note)) for note in report.case.design.notes]
    return block(
        el("div", case_line(report.case)),
        *notes,
        el("div", quiet(size_line(report)), style="margin-bottom:6px"),
        verdict_table(report),
    )


def comparison_html(reports: Sequence[Report]) -> Html:
    """Designs down, violated properties across, states last."""
    names = [name for name in BY_NAME if any(name in report.violated for report in reports)]
    heads = [
        th("design", style=RULED),
        *(th(name, style=RULED) for name in names),
        th("states", number=True, style=RULED),
    ]
    lines = [tr(*heads)]
    for report in reports:
        cells = [_mark(MARKS[report.verdicts[name].verdict]) for name in names]
        size = f"{report.states:,}{'' if report.complete else ' +'}"
        lines.append(
            tr(td(el("b", report.case.design.name), style=RULED), *cells, td(size, number=True, style=RULED))
        )
    where = str(reports[0].case).removeprefix(f"{reports[0].case.design.name}, ") if reports else ""
    key = "Sometimes: in some runs. Always: in every run that finishes. · never."
    more = "" if all(report.complete for report in reports) else " + not complete."
    return block(
        el("div", quiet(where)), table(lines), el("div", quiet(key + more), style=f"margin-top:4px;{SMALL}")
    )


def _mark(word: str) -> Html:
    return td(alarm(word) if word in (SOMETIMES, ALWAYS) else quiet(word), style=RULED)


def matrix_html(matrix: Matrix) -> Html:
    """Scenarios down, designs across, a table for each platform and backing; the gravest verdict a cell."""
    tables: list[Html] = []
    for platform, backing in dict.fromkeys((s.platform, s.backing) for s in matrix.squares):
        here = [s for s in matrix.squares if (s.platform, s.backing) == (platform, backing)]
        tables += [
            el("div", el("b", platform), f", {backing} backing", style="margin:10px 0 2px 0"),
            _grid(here),
        ]
    checks = sum(not s.reason for s in matrix.squares)
    total = sum(s.states for s in matrix.squares)
    done = "all complete" if all(s.complete for s in matrix.squares) else "NOT all complete (+)"
    legend = f"{matrix.legend}. " if matrix.legend else ""
    key = f"{legend}{plural(checks, 'check')}, {total:,} states, {done}. {MATRIX_KEY}"
    return block(*tables, el("div", quiet(key), style=f"margin-top:4px;{SMALL}"))


def _grid(here: Sequence[Square]) -> Html:
    designs = list(dict.fromkeys(s.design for s in here))
    cells = {(s.design, s.scenario): s for s in here}
    lines = [tr(blank(), *(th(quiet(name), style=f"{SMALL};padding:0 6px 2px 0") for name in designs))]
    for scenario in dict.fromkeys(s.scenario for s in here):
        row = (_square(cells[design, scenario]) for design in designs)
        lines.append(tr(td(scenario, style="white-space:nowrap"), *row))
    return table(lines, MONO)


def _square(square: Square) -> Html:
    edge = f"border:1px solid {LINE};padding:1px 6px"
    if square.reason:
        return td(quiet("n/a"), title=square.reason, style=edge)
    size = el("span", f" {square.states:,}{'' if square.complete else '+'}", style=f"{SMALL};font-weight:400")
    if square.worst in ("ok", "?"):
        return td(quiet(square.worst, size), style=edge)
    ground = ALARM if square.worst in HOST_DOWN else f"background:{tint(VERMILLION, 0.2)};font-weight:700"
    return td(square.short, size, title=square.worst, style=f"{edge};{ground}")

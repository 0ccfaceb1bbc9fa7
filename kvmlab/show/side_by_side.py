"""Two orderings side by side, aligned where they agree, with the verdicts of each below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

from ..verdict.report import Report
from .style import MONO, ORANGE, SMALL, Html, blank, block, el, plural, quiet, table, td, th, tint, tr
from .verdict_tables import case_line, size_line, verdict_table

SAME, LEFT, RIGHT, MOVED = " ", "-", "+", "~"
KEY = "~ moved, - only left, + only right"


class Side(NamedTuple):
    """One line of one ordering and its mark."""

    mark: str
    text: str


Pair = tuple[Side | None, Side | None]
Line = tuple[str, str | None, str | None]  # mark, left, right, as `Design.aligned` gives them


def side_by_side_html(report_a: Report, report_b: Report) -> Html:
    """Two orderings, aligned where they agree, and under each its verdicts."""
    both = (report_a, report_b)
    aligned = report_a.case.design.aligned(report_b.case.design)
    lines = [
        tr(
            *(
                th(
                    case_line(report.case),
                    style="padding:0 20px 4px 0;width:50%;font-weight:400",
                    colspan="2",
                )
                for report in both
            )
        )
    ]
    for name in dict.fromkeys(section for section, *_ in aligned):
        lines += _section(
            name, [(mark, left, right) for section, mark, left, right in aligned if section == name]
        )
    verdicts = (
        td(el("div", quiet(size_line(r))), verdict_table(r), style="padding:10px 20px 0 0", colspan="2")
        for r in both
    )
    lines.append(tr(*verdicts))
    return block(table(lines, "width:100%"), el("div", quiet(KEY), style=f"margin-top:4px;{SMALL}"))


def _section(name: str, lines: Sequence[Line]) -> list[Html]:
    same = all(mark == SAME for mark, _, _ in lines)
    note = f"{name}: the same in both, {plural(len(lines), 'line')}" if same else f"{name}:"
    header = tr(td(quiet(note), style="padding:6px 0 2px 0", colspan="4"))
    return [header] if same else [header, *(tr(*_cells(a), *_cells(b)) for a, b in paired(lines))]


def paired(lines: Sequence[Line]) -> Iterator[Pair]:
    """The lines as rows of two sides: what differs stands face to face, what only moved says so."""
    gone = [left.strip() for mark, left, _ in lines if mark == LEFT and left]
    came = [right.strip() for mark, _, right in lines if mark == RIGHT and right]
    moved = set(gone) & set(came)
    left: list[Side] = []
    right: list[Side] = []
    for mark, a, b in lines:
        if mark == SAME or (mark == LEFT and right):
            yield from zip_longest(left, right)
            left, right = [], []
        if mark == SAME:
            yield Side(SAME, a or ""), Side(SAME, b or "")
        elif mark == LEFT and a is not None:
            left.append(Side(MOVED if a.strip() in moved else LEFT, a))
        elif b is not None:
            right.append(Side(MOVED if b.strip() in moved else RIGHT, b))
    yield from zip_longest(left, right)


def _cells(side: Side | None) -> tuple[Html, Html]:
    if side is None:
        return blank(), blank()
    ground = "" if side.mark == SAME else f";background:{tint(ORANGE, 0.2)}"
    text = side.text.lstrip(" ")
    lead = Html("&nbsp;" * (len(side.text) - len(text)))
    mark = td(side.mark.strip(), style=f"{MONO};width:14px;padding:1px 0 1px 4px{ground}")
    return mark, td(lead, text, style=f"{MONO};padding:1px 20px 1px 0{ground}")

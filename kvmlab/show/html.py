"""HTML that stands alone: pure functions from runs, reports and states to markup.

What they return survives JupyterLab's sanitizer and means the same without any style; see `style`.
"""

from __future__ import annotations

from ..machine.properties import BY_NAME, MEASURES
from ..model.step import Model
from ..verdict.display import Displayed
from ..verdict.matrix import Matrix
from ..verdict.report import Comparison, Report
from ..verdict.trace import Trace
from .lanes import lanes
from .machine_table import machine_table
from .side_by_side import side_by_side_html
from .style import MONO, SMALL, Html, alarm, block, el, join, plural, quiet
from .verdict_tables import case_line, comparison_html, matrix_html, report_html

__all__ = [
    "as_html",
    "comparison_html",
    "machine_html",
    "matrix_html",
    "report_html",
    "side_by_side_html",
    "trace_html",
    "trace_title",
]

KEY = (
    "Bars: thick, mmu_lock held (paler: for read); thin, a sleeping lock; grey, the invalidation window. "
    "A model, not hardware."
)


def as_html(result: Displayed) -> Html:
    """A result as a notebook shows it."""
    match result:
        case Report():
            return report_html(result)
        case Trace():
            return trace_html(result)
        case Comparison():
            return comparison_html(result.reports)
        case Matrix():
            return matrix_html(result)
    raise TypeError(f"{type(result).__name__} has no HTML")


def trace_html(trace: Trace, upto: int | None = None) -> Html:
    """A run as lanes, with the machine after its last step; with `upto`, the run and the machine up to that step."""
    return block(el("div", trace_title(trace)), el("div", case_line(trace.case)), run_html(trace, upto))


def run_html(trace: Trace, upto: int | None = None) -> Html:
    """What `trace_html` shows below its title."""
    last = trace.steps if upto is None else min(max(upto, 0), trace.steps)
    states = [frame.state for frame in trace.frames]
    after = machine_table(trace.case.model, states[last], states[max(last - 1, 0)])
    return block(
        el(
            "div",
            el("div", lanes(trace, last), style="margin:8px 32px 8px 0;overflow-x:auto"),
            el("div", quiet(f"the machine after step {last}"), after, style="margin:8px 0"),
            style="display:flex;flex-wrap:wrap;align-items:flex-start",
        ),
        el("div", quiet(KEY), style=SMALL),
        el("div", quiet(trace.code), style=f"{MONO};{SMALL};word-break:break-all"),
    )


def trace_title(trace: Trace) -> Html:
    """What a run shows, and how long it is."""
    size = f"{plural(trace.steps, 'step')}, {plural(trace.switches, 'switch', 'switches')}"
    if trace.cycle is not None:
        size += f", the last {trace.steps - trace.cycle} for ever"
    if trace.why in BY_NAME:
        what = join((alarm(f"!! {trace.why}"), f" {BY_NAME[trace.why].sentence} "))
    elif trace.why in MEASURES:
        what = join((el("b", trace.why), f" {MEASURES[trace.why]} "))
    else:
        how = el("b", "Scheduled by hand" if trace.why == "by-hand" else "A sample run")
        told = [part for prop in trace.violated for part in (" ", alarm(f"!! {prop}"))]
        what = join((how, *(told or [" in which nothing is violated"]), " "))
    return join((what, quiet(f"({size})")))


def machine_html(model: Model, x: int, before: int | None = None) -> Html:
    """The machine's table in state `x`; what differs from `before` is marked, with the value that it had."""
    return block(machine_table(model, x, before))

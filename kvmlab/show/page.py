"""One self-contained page: the same player as in a notebook, stepping without a kernel and without a network."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from html import escape
from pathlib import Path

from ..verdict.report import Report
from .html import report_html, trace_html
from .style import MONO, Html, alarm, el, quiet, table, td, tr
from .verdict_tables import RULED, case_line
from .workbench_json import Json, report_json, trace_json

_HERE = Path(__file__).parent
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src '{hash}'; \
style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 16px auto; max-width: 1500px; padding: 0 16px; background: Canvas; color: CanvasText; }}
h2 {{ margin: 32px 0 8px; }}
{css}
</style>
</head>
<body>
<h1>{title}</h1>
{summary}
{places}
<script type="application/json" id="kvmlab-views">{views}</script>
<script type="module">{script}</script>
</body>
</html>
"""
_SCRIPT = """
{js}
const views = JSON.parse(document.getElementById("kvmlab-views").textContent);
views.forEach((view, n) => {
  const el = document.getElementById(`kvmlab-${n}`);
  el.replaceChildren();
  render({ model: { get: () => view }, el });
});
"""
ABOUT = (
    "Every interleaving of each ordering was explored; a row is one check. Each has a run to step through below. "
    "A model, not hardware."
)


def script() -> str:
    """The browser half as one ES module, which exports `render` for anywidget."""
    return "\n".join((_HERE / name).read_text(encoding="utf-8") for name in ("player.js", "workbench.js"))


def stylesheet() -> str:
    """The workbench's own rules."""
    return (_HERE / "workbench.css").read_text(encoding="utf-8")


def page_html(reports: Sequence[Report]) -> str:
    """A page with each report's verdicts and a run for every property violated, to step through offline.

    A reader without scripts sees the same as lanes.  The page holds no times, so it is the same in every run.
    """
    places = (
        f'<h2 id="check-{n}">{case_line(report.case)}</h2>\n'
        f'<div id="kvmlab-{n}">{report_html(report)}{trace_html(report.trace())}</div>'
        for n, report in enumerate(reports)
    )
    names = ", ".join(dict.fromkeys(report.case.design.name for report in reports))
    views = json.dumps([_json(report) for report in reports], ensure_ascii=False).replace("<", "\\u003c")
    run = _SCRIPT.replace("{js}", script())
    return _PAGE.format(
        title=escape(f"kvmlab: {names}"),
        hash=f"sha256-{b64encode(sha256(run.encode()).digest()).decode()}",
        css=stylesheet(),
        summary=_summary(reports),
        places="\n".join(places),
        views=views,
        script=run,
    )


def _summary(reports: Sequence[Report]) -> Html:
    """One row a check, with a link to it: what is violated."""
    rows = (
        tr(
            td(el("a", case_line(report.case), href=f"#check-{n}"), style=RULED),
            td(alarm(", ".join(report.violated)) if report.violated else "nothing is violated", style=RULED),
            td("" if report.complete else quiet("not complete"), style=RULED),
        )
        for n, report in enumerate(reports)
    )
    return Html(f"{el('p', ABOUT)}\n{table(rows, MONO)}")


def _json(report: Report) -> Json:
    runs = {name: trace_json(report.trace(name)) for name in report.violated}
    runs["sample"] = trace_json(report.sample())
    seen = report_json(report, report.trace())
    return {**seen, "runs": runs, "position": seen["trace"]["first"], "problem": "", "draft": None}

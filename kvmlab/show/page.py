"""One self-contained page: the same player as in a notebook, stepping without a kernel and without a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..report import Report
from .html import report_html, trace_html
from .view import Json, report_view, trace_view

_HERE = Path(__file__).parent
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 16px auto; max-width: 1500px; padding: 0 16px; background: Canvas; color: CanvasText; }}
.kvmlab {{ margin-bottom: 24px; }}
{css}
</style>
</head>
<body>
{places}
<script type="application/json" id="kvmlab-views">{views}</script>
<script type="module">
{js}
const views = JSON.parse(document.getElementById("kvmlab-views").textContent);
views.forEach((view, n) => {{
  const el = document.getElementById(`kvmlab-${{n}}`);
  el.replaceChildren();
  render({{ model: {{ get: () => view }}, el }});
}});
</script>
</body>
</html>
"""


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
        f'<div id="kvmlab-{n}">{report_html(report)}{trace_html(report.trace())}</div>'
        for n, report in enumerate(reports)
    )
    names = ", ".join(dict.fromkeys(report.case.design.name for report in reports))
    views = json.dumps([_view(report) for report in reports], ensure_ascii=False).replace("<", "\\u003c")
    return _PAGE.format(
        title=escape(f"kvmlab: {names}"), css=stylesheet(), places="\n".join(places), views=views, js=script()
    )


def _view(report: Report) -> Json:
    runs = {name: trace_view(report.trace(name)) for name in report.violated}
    runs["sample"] = trace_view(report.sample())
    seen = report_view(report, report.trace())
    return {**seen, "runs": runs, "position": seen["trace"]["first"], "problem": "", "draft": None}

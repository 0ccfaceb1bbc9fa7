"""What is drawn for a person: HTML, pictures, the widget; pure functions of reports, traces and sessions."""

from __future__ import annotations

from ..verdict import display


def _as_html(result: display.Displayed) -> str:
    from .html import as_html

    return as_html(result)


display.as_html = _as_html  # late, because most commands draw no HTML

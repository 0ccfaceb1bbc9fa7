"""How HTML is written here: escaped by construction, styled inline, quiet, and legible on light and on dark.

JupyterLab shows a stored output of an untrusted notebook only after its sanitizer: tables and inline styles
stay, with colours written out (no `var()`, no `currentColor`); <style>, <script> and <svg> go.  GitHub drops
the styles too.  So text is never given a colour without a background, greys are translucent, and whatever a
colour says is also said by a word or a glyph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from html import escape

# Okabe and Ito's palette: hues that people with any kind of colour vision can tell apart.
BLUE, GREEN, ORANGE, SKY, PURPLE, YELLOW = "#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442"
VERMILLION = "#C44F00"  # a shade darker than theirs, so that white text on it can be read (4.7:1)
VCPU_HUES = (BLUE, GREEN, PURPLE, SKY)
HOST_HUE = ORANGE

LINE = "#7f7f7f47"
FAINT = "#7f7f7f1f"
WINDOW = "#808080"
CLEAR = "#0000"

PLAIN = "font-family:system-ui,sans-serif;font-size:13px;line-height:1.45"
MONO = "font-family:ui-monospace,Menlo,Consolas,monospace;font-size:12px"
QUIET = "opacity:0.62"
SMALL = "font-size:11px"
# JupyterLab centres tables, stripes their rows and aligns cells to the right; all that is undone here.
TABLE = "border-collapse:collapse;table-layout:auto;margin:0;line-height:1.45"
ROW = f"background:{CLEAR}"
CELL = "text-align:left;vertical-align:top;padding:1px 10px 1px 0"
NUMBER = "text-align:right;vertical-align:top;padding:1px 10px 1px 0"
EMPTY = "padding:0"
ALARM = f"background:{VERMILLION};color:#ffffff;font-weight:700"
CHANGED = f"background:{YELLOW};color:#000000;border-radius:3px;padding:0 4px"


class Html(str):
    """Markup.  A plain str is text, and is escaped as soon as it becomes part of markup."""

    __slots__ = ()


def el(tag: str, *inner: str, style: str = "", **attributes: str) -> Html:
    """One element around its inner parts; what is not `Html` among them, and every attribute, is escaped."""
    said = {"style": style, **attributes}
    inside = "".join(f' {name}="{escape(value)}"' for name, value in said.items() if value)
    return Html(f"<{tag}{inside}>{join(inner)}</{tag}>")


def join(parts: Iterable[str], between: str = "") -> Html:
    """The parts one after the other, text among them escaped."""
    return Html(_markup(between).join(_markup(part) for part in parts))


def _markup(part: str) -> str:
    return part if isinstance(part, Html) else escape(part)


def breakable(text: str) -> Html:
    """Code that may be wrapped after an opening parenthesis and between arguments."""
    return Html(escape(text).replace("(", "(<wbr>").replace("(<wbr>)", "()").replace(", ", ", <wbr>"))


@lru_cache(maxsize=1024)
def css(*styles: str) -> str:
    """Several inline styles as one; of a property's values the last one is taken."""
    pairs = (pair.split(":", 1) for style in styles for pair in style.split(";") if pair)
    return ";".join(f"{name}:{value}" for name, value in dict(pairs).items())


def quiet(*inner: str, style: str = "") -> Html:
    """Text that matters less: fainter."""
    return el("span", *inner, style=css(QUIET, style))


def alarm(*inner: str) -> Html:
    """A word or two that must not be missed."""
    return el("span", *inner, style=f"{ALARM};padding:0 5px;border-radius:3px")


def table(rows: Iterable[str], style: str = "") -> Html:
    """A table of the given rows (or heads and bodies)."""
    return el("table", *rows, style=css(TABLE, style))


def tr(*cells: str, style: str = "") -> Html:
    """A row of the given cells."""
    return el("tr", *cells, style=css(ROW, style))


def td(*inner: str, style: str = "", number: bool = False, **attributes: str) -> Html:
    """A cell; `number` aligns it to the right."""
    return el("td", *inner, style=css(NUMBER if number else CELL, style), **attributes)


def th(*inner: str, style: str = "", number: bool = False, **attributes: str) -> Html:
    """A heading cell."""
    return el("th", *inner, style=css(NUMBER if number else CELL, "font-weight:600", style), **attributes)


def blank(style: str = "", **attributes: str) -> Html:
    """An empty cell."""
    return el("td", style=css(EMPTY, style), **attributes)


def block(*inner: str, style: str = "") -> Html:
    """A whole output: the outermost box, with the page's type size."""
    return el("div", *inner, style=css(PLAIN, style))


def hues(actors: Sequence[str]) -> dict[str, str]:
    """One hue an actor, the same in every view: vCPUs in their order, then the host's thread."""
    vcpus = [key for key in actors if key != "host"]
    found = {key: VCPU_HUES[n % len(VCPU_HUES)] for n, key in enumerate(vcpus)}
    return {key: found.get(key, HOST_HUE) for key in actors}


def tint(hue: str, strength: float) -> str:
    """The hue, translucent: it lets the page's own background through."""
    return f"{hue}{round(255 * strength):02x}"


def plural(n: int, one: str, many: str = "") -> str:
    """The number with its noun: 1 step, 2 steps."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"

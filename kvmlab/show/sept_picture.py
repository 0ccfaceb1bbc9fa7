"""The state machine of a secure EPT entry as SVG: states, the leaves between them, and how the epochs stand.

Arrows and captions are read off the tables of hw/tdx/sept.py; only their places are chosen here.  The root's data-*
attributes say where the machine is, and the rules in its <style> mark it, so a script that walks has nothing to draw.
Greys fit a light and a dark page alike, for an <img> knows nothing of the page's theme.
"""

from __future__ import annotations

from base64 import b64encode
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import NamedTuple

from ..hw.tdx import Leaf, seamcall
from ..hw.tdx import sept as tdx_sept
from ..hw.tdx.entry import State
from ..hw.tdx.tlb import Age
from .sept_machine import ENTRY_STATES, BoardState, Click
from .style import BLUE, GREEN, VERMILLION

WIDTH, HEIGHT = 960, 426
BOX_WIDTH, BOX_HEIGHT = 208, 56
PLACES = {
    State.FREE: (124, 84),
    State.PENDING: (470, 84),
    State.MAPPED: (800, 84),
    State.PENDING_BLOCKED: (470, 234),
    State.BLOCKED: (800, 234),
}
# Of each arrow: its path, where its words stand, and how they are anchored.
ROUTES = {
    (State.FREE, State.PENDING): ("M228 84H365", 288, 76, "middle"),
    (State.PENDING, State.MAPPED): ("M574 84H695", 635, 76, "middle"),
    (State.PENDING, State.PENDING_BLOCKED): ("M452 112V205", 443, 156, "end"),
    (State.PENDING_BLOCKED, State.PENDING): ("M488 206V113", 497, 156, "start"),
    (State.MAPPED, State.BLOCKED): ("M782 112V205", 773, 156, "end"),
    (State.BLOCKED, State.MAPPED): ("M818 206V113", 827, 156, "start"),
    (State.PENDING_BLOCKED, State.FREE): ("M366 234H166Q142 234 142 210V113", 248, 226, "middle"),
    (State.BLOCKED, State.FREE): ("M800 262V276Q800 300 776 300H130Q106 300 106 276V113", 248, 292, "middle"),
}
SLOTS = {Age.OLDER: 340, Age.PREVIOUS: 480, Age.NOW: 620}
_SLOT_NAMES = {Age.OLDER: "older", Age.PREVIOUS: "TD_EPOCH - 1", Age.NOW: "TD_EPOCH"}
LINE_Y = 374


class Edge(NamedTuple):
    """A leaf that takes an entry from one state to another once the TD may run; `tracked`: only after tracking."""

    leaf: Leaf
    before: State
    after: State
    tracked: bool


def edges(*, running: bool = True) -> list[Edge]:
    """Every change of state that the tables allow a 4K entry, before finalize or once the TD may run."""
    cases = (True, False) if running else (True,)
    found: dict[tuple[Leaf, State, State], list[bool]] = {}
    for leaf in dict.fromkeys(click.leaf for click in Click if click.leaf in tdx_sept.LEAVES):
        for state in ENTRY_STATES:
            for tracked in cases:
                then = seamcall(leaf, state, running=running, tracked=tracked)
                if then.ok and then.state:
                    found.setdefault((leaf, state, then.state), []).append(tracked)
    return [Edge(*key, tracked=len(when) < len(cases)) for key, when in found.items()]


def before_finalize() -> str:
    """What the tables allow before finalize only, in words."""
    later = {edge[:3] for edge in edges()}
    early = [edge for edge in edges(running=False) if edge[:3] not in later]
    return ", ".join(f"{_short(e.leaf)} {e.before} -> {e.after}" for e in early)


def picture(at: BoardState) -> str:
    """The whole drawing with the machine at `at`: one <svg> element."""
    where = " ".join(f'data-{name}="{escape(value)}"' for name, value in data(at).items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="kvmlab-sept-picture" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escape(describe(at))}" {where}><style>{_style()}</style>{_heads()}'
        f"{_regions()}{''.join(map(_edge, edges()))}{''.join(map(_box, ENTRY_STATES))}{_epochs()}</svg>"
    )


def data(at: BoardState) -> dict[str, str]:
    """Where the machine is, as the root's data-* attributes."""
    return {
        "at": at.entry,
        "bepoch": at.bepoch or "none",
        "vcpu": at.vcpu,
        "inside": "yes" if at.inside else "no",
        "cached": "yes" if at.cached else "no",
        "tracked": "yes" if at.tracked else "no",
    }


def describe(at: BoardState) -> str:
    """Where the machine is, in words."""
    vcpu = "inside" if at.inside else "outside"
    return (
        f"State diagram of a secure EPT entry, which is {at.entry}; the vCPU is {vcpu}. "
        + "; ".join(f"{_short(e.leaf)} takes {e.before} to {e.after}" for e in edges())
        + "."
    )


def image(at: BoardState) -> str:
    """The drawing as a data: URI, which survives where <svg> does not."""
    return "data:image/svg+xml;base64," + b64encode(picture(at).encode()).decode()


def _short(leaf: Leaf) -> str:
    return next(str(click) for click in Click if click.leaf == leaf)


def _heads() -> str:
    """Arrow heads; one for each colour, since a marker does not take its line's."""
    heads = (("quiet", "var(--s-line)"), ("open", BLUE), ("shut", VERMILLION))
    markers = (
        f'<marker id="kvmlab-sept-{name}" viewBox="0 0 8 8" refX="6.5" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
        for name, colour in heads
    )
    return f"<defs>{''.join(markers)}</defs>"


def _regions() -> str:
    return (
        '<g class="region"><rect x="6" y="38" width="236" height="92" rx="10"/>'
        '<text x="14" y="28">PAMT: NDA, the page is the host\'s</text>'
        '<rect x="336" y="38" width="616" height="242" rx="10"/>'
        '<text x="344" y="28">PAMT: REG, the page is the TD\'s</text></g>'
    )


def _box(state: State) -> str:
    x, y = PLACES[state]
    found = tdx_sept.access(state)
    left, top = x - BOX_WIDTH // 2, y - BOX_HEIGHT // 2
    return (
        f'<g class="box" data-state="{state}">'
        f'<rect x="{left}" y="{top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8"/>'
        f'<text class="name" x="{x}" y="{y - 3}">{state}</text>'
        f'<text class="note" x="{x}" y="{y + 15}">access: {found}</text></g>'
    )


def _edge(edge: Edge) -> str:
    path, x, y, anchor = ROUTES[edge.before, edge.after]
    place, gap = ("", " ") if anchor == "middle" else (f' x="{x}" dy="15"', "")
    more = f'<tspan class="note"{place}>{gap}once tracked</tspan>'
    name = _short(edge.leaf)
    return (
        f'<g class="edge{" tracked" if edge.tracked else ""}" data-from="{edge.before}" data-leaf="{name}">'
        f'<path d="{path}"/><text x="{x}" y="{y}" text-anchor="{anchor}">{name}{more if edge.tracked else ""}'
        "</text></g>"
    )


def _epochs() -> str:
    """Three epochs in a row; the BEPOCH of the page stands above, the vCPU's below."""
    slots = "".join(
        f'<path d="M{x} {LINE_Y - 5}v10"/><text class="note" x="{x}" y="{LINE_Y + 22}">{_SLOT_NAMES[age]}</text>'
        for age, x in SLOTS.items()
    )
    return (
        f'<g class="epochs"><path d="M276 {LINE_Y}H684"/>{slots}'
        f'<text class="side" x="14" y="{LINE_Y - 20}">page blocked in (PAMT.BEPOCH)</text>'
        f'<text class="side" x="14" y="{LINE_Y + 44}">vCPU entered in (VCPU_EPOCH)</text>'
        f'<g class="bepoch"><path d="M-6 {LINE_Y - 16}h12l-6 9z"/><text x="0" y="{LINE_Y - 22}">BEPOCH</text></g>'
        f'<g class="vcpu"><circle cx="-28" cy="{LINE_Y + 39}" r="6"/><text x="-16" y="{LINE_Y + 44}">'
        '<tspan class="in">inside</tspan><tspan class="out">outside</tspan></text></g>'
        f'<g class="verdict"><text x="742" y="{LINE_Y - 20}" class="yes">tracked: REMOVE may go</text>'
        f'<text x="742" y="{LINE_Y - 20}" class="no">not tracked yet</text>'
        f'<text x="742" y="{LINE_Y + 44}" class="tlb">holds a translation</text></g></g>'
    )


@lru_cache(maxsize=1)
def _style() -> str:
    """What the root's attributes say, as rules; those that depend on places and states are made here."""
    text = (Path(__file__).parent / "sept_picture.css").read_text(encoding="utf-8").partition("*/")[2]
    rules = [text.replace("VERMILLION", VERMILLION).replace("GREEN", GREEN)]
    for age, x in SLOTS.items():
        rules.append(
            f'&[data-bepoch="{age}"] .bepoch,&[data-vcpu="{age}"] .vcpu{{transform:translateX({x}px)}}'
        )
    rules.append(
        f'&[data-bepoch="none"] .bepoch{{transform:translateX({SLOTS[Age.NOW]}px)}}'
    )  # it appears there
    for state in ENTRY_STATES:
        here, mine = f'&[data-at="{state}"]', f'[data-from="{state}"]'
        rules += [
            f'{here} [data-state="{state}"] rect{{fill:{BLUE};stroke:{BLUE}}}',
            f'{here} [data-state="{state}"] text{{fill:#fff}}{here} {mine} text{{font-weight:600}}',
            f"{here} {mine} path{{stroke:{BLUE};stroke-width:2.5;marker-end:url(#kvmlab-sept-open)}}",
            f'{here}[data-tracked="no"] .tracked{mine} path{{stroke:{VERMILLION};stroke-dasharray:4 4;'
            "marker-end:url(#kvmlab-sept-shut)}",
        ]
    return " ".join("".join(rules).replace("&", ".kvmlab-sept-picture").split())

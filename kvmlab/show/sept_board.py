"""The TDX module's state machine to click through: one secure EPT entry, one vCPU, every answer bit for bit.

All answers are computed beforehand (sept_machine.py), so the browser walks without a kernel; a stored output keeps
the drawing, what was clicked, and the table of all answers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from ..hw import tdx
from ..hw.rules import ANY, Rules, meant
from ..hw.tdx import Leaf, seamcall
from ..hw.tdx import sept as tdx_sept
from ..hw.tdx.sept import SEPT, Outcome, State
from ..hw.tdx.td import OpState
from . import sept_picture
from .page import stylesheet
from .sept_machine import (
    ENTRY_STATES,
    MEANINGS,
    Answer,
    BoardState,
    Click,
    answer,
    possible,
    reachable,
    walked,
)
from .style import FAINT, LINE, MONO, SMALL, Html, alarm, block, el, join, quiet, table, td, th, tr

_HERE = Path(__file__).parent
TITLE = "One secure EPT entry, one vCPU"
INVITATION = "Run this cell to make it live: click the leaves in any order, and read the module's answers."
KEY = "A 4K page of one TD with one vCPU; nobody else holds a lock of the module. A model, not hardware."
Json = dict[str, Any]


class SeptBoard:
    """A secure EPT entry and a vCPU, and what was clicked; `click()` here or the buttons in a notebook go on.

    `log` holds the answers so far, `at` the state after them, `rules` the part of the module's table that is used.
    """

    def __init__(self, clicks: Sequence[str] = (), finalized: bool = True) -> None:
        self.start = BoardState() if finalized else BoardState(op_state=OpState.INITIALIZED)
        self.log = walked(self.start, clicks)
        self.rules = rules(finalized)

    @property
    def at(self) -> BoardState:
        """Where the machine is now."""
        return self.log[-1].after if self.log else self.start

    @property
    def lines(self) -> list[str]:
        """The log, a line a click, for a terminal or a mail."""
        return [log_line(each) for each in self.log]

    @property
    def places(self) -> list[BoardState]:
        """Every state that some sequence of clicks reaches."""
        return reachable(self.start)

    def click(self, name: str) -> Answer:
        """Do one thing and return the answer; InputError for an unknown name, or for what the vCPU cannot do now."""
        self.log += walked(self.at, (name,))
        return self.log[-1]

    def text(self) -> str:
        """Where the machine is, what was clicked, and the table as the spec prints it."""
        where = ", ".join(f"{name} {value}" for name, value in facts(self.at))
        return "\n".join([where, *self.lines, "", self.rules.text()])

    __str__ = text

    def __repr__(self) -> str:
        return f"SeptBoard({self.at.entry}, {len(self.log)} clicks)"

    def html(self) -> str:
        """The drawing, what was clicked and all answers, for a reader without a kernel."""
        alt = sept_picture.describe(self.at)
        drawing = Html(
            f'<img src="{sept_picture.image(self.at)}" alt="{escape(alt)}" '
            f'style="width:{sept_picture.WIDTH}px;max-width:100%">'
        )
        clicked = [el("div", table(_log_rows(self.log), MONO), style=_APART)] if self.log else []
        answers = el("div", answers_html(self.start), style=f"overflow-x:auto;{_APART}")
        below = el("div", quiet(f"{KEY} {_early()}"), style=f"margin-top:6px;{SMALL}")
        return block(el("b", TITLE), el("div", drawing), *clicked, answers, below, quiet(INVITATION))

    def view(self) -> Json:
        """Everything that the browser needs to walk: the drawing, and each state's answers."""
        places, pool = self.places, {}  # type: ignore[var-annotated]
        number = {place: n for n, place in enumerate(places)}
        steps = [
            [_step(answer(at, click), number, pool) if possible(at, click) else None for click in Click]
            for at in places
        ]
        return {
            "title": TITLE,
            "picture": sept_picture.picture(self.start),
            "answers": answers_html(self.start),
            "key": f"{KEY} {_early()}",
            "clicks": [_button(click, self.start) for click in Click],
            "states": [{"data": sept_picture.data(at), "facts": facts(at)} for at in places],
            "steps": steps,
            "pool": list(pool.values()),
            "start": number[self.start],
            "log": [list(Click).index(each.click) for each in self.log],
        }

    def page(self) -> str:
        """The board as one HTML page that works without a kernel and without a network."""
        view = json.dumps(self.view(), ensure_ascii=False).replace("<", "\\u003c")
        return _PAGE.format(title=TITLE, css=style_sheet(), still=self.html(), view=view, js=script())

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        still = {"text/plain": self.text(), "text/html": self.html()}
        try:
            live = _live()(view=self.view())._repr_mimebundle_(**kwargs)
        except ImportError:  # without anywidget it is a picture
            return still
        bundle, metadata = live if isinstance(live, tuple) else (live or {}, {})
        return {**bundle, **still}, metadata


def sept_board(*clicks: str, finalized: bool = True) -> SeptBoard:
    """The module's state machine of one secure EPT entry, after some clicks: "AUG", "VP.ENTER", "ACCEPT", "kick" ...

    `finalized` False starts before TDH.MR.FINALIZE.  InputError for an unknown click, or one that cannot be.
    """
    return SeptBoard(clicks, finalized)


_PLAIN = {Click.KICK: "an IPI makes the vCPU leave the TD", Click.ACCESS: "the TD reads or writes the page"}
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>kvmlab: {title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 16px auto; max-width: 1500px; padding: 0 16px; background: Canvas; color: CanvasText; }}
{css}
</style>
</head>
<body>
<div id="board">{still}</div>
<script type="application/json" id="view">{view}</script>
<script type="module">
{js}
const view = JSON.parse(document.getElementById("view").textContent), el = document.getElementById("board");
el.replaceChildren();
render({{ model: {{ get: () => view }}, el }});
</script>
</body>
</html>
"""


def script() -> str:
    """The board's browser half as one ES module."""
    return "\n".join((_HERE / name).read_text(encoding="utf-8") for name in ("player.js", "sept.js"))


def style_sheet() -> str:
    """The workbench's rules and the board's own."""
    return stylesheet() + (_HERE / "sept.css").read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _live() -> Any:
    import anywidget
    import traitlets

    traits = {"_esm": script(), "_css": style_sheet(), "view": traitlets.Dict().tag(sync=True)}
    return type("LiveSeptBoard", (anywidget.AnyWidget,), traits)


def rules(finalized: bool = True) -> Rules:
    """The module's answers as far as they concern this board: leaves, states of one 4K page, and TLB tracking."""
    clicks = [click.leaf for click in Click]
    leaves = tuple(leaf for leaf in tdx_sept.LEAVES if leaf in clicks)
    tracking = {"missing": False, "done": True} if finalized else {"not needed": False}
    rows = []
    for leaf in leaves:
        alike: dict[tuple[Outcome, frozenset[str]], list[State]] = {}
        for state in _in_the_order_of_the_table(leaf):
            said: dict[Outcome, set[str]] = {}
            for name, done in tracking.items():
                said.setdefault(_outcome(leaf, state, finalized, done), set()).add(name)
            for outcome, names in said.items():
                alike.setdefault((outcome, frozenset(names)), []).append(state)
        for (outcome, when), states in alike.items():
            rows.append((leaf, _cell_of(states, ENTRY_STATES), _cell_of(when, tracking), outcome))
    return Rules(SEPT.source, {"leaf": leaves, "state": ENTRY_STATES, "tracking": tuple(tracking)}, rows)


def _in_the_order_of_the_table(leaf: Leaf) -> list[State]:
    """The board's states, as SEPT has its rows."""
    rows = (row for row in SEPT if leaf in meant(row[0], tdx_sept.LEAVES))
    return [state for row in rows for state in meant(row[1], ENTRY_STATES)]


def _outcome(leaf: Leaf, state: State, running: bool, tracked: bool) -> Outcome:
    """What a leaf answers, in the words of SEPT where it is SEPT that decides."""
    found, row = seamcall(leaf, state, running=running, tracked=tracked), SEPT(leaf=leaf, state=state)
    if found.status == row.status:
        return Outcome(*row)
    return Outcome(found.status, tdx.Operand(found.operand) if found.operand else None)


def _cell_of(values: Collection[Any], domain: Collection[Any]) -> Any:
    """A cell of a row that stands for these values of a column."""
    if len(values) == len(domain):
        return ANY
    return next(iter(values)) if len(values) == 1 else frozenset(values)


def facts(at: BoardState) -> list[tuple[str, str]]:
    """Where the machine is, as (what, value)."""
    since = {"now": "in this epoch", "previous": "in the epoch before this one", "older": "longer ago"}
    found = [("entry", str(at.entry)), ("PAMT", at.pamt.name), ("vCPU", "inside" if at.inside else "outside")]
    if at.cached:
        found.append(("TLB", "a translation of the page"))
    if at.bepoch is not None:
        found.append(("blocked", f"{since[at.bepoch]}, {'tracked' if at.tracked else 'not tracked'}"))
    if at.op_state != OpState.RUNNABLE:
        found.append(("TD", at.op_state))
    return found


def log_line(each: Answer) -> str:
    """One click as a line for a terminal or a mail."""
    if each.rax is None:
        return f"{each.click:<14}{each.said}"
    return f"{each.click:<14}{each.rax:#018x} {each.name if each.rax else each.said}"


def _log_rows(log: Sequence[Answer]) -> list[Html]:
    rows = []
    for n, each in enumerate(log, 1):
        code = "" if each.rax is None else f"{each.rax:#018x}"
        name = each.name if each.rax else ""
        bad = each.kind not in ("", tdx.OK)
        shown = join((alarm(name) if bad else name, " " if name else "", quiet(each.said)))
        rows.append(tr(td(quiet(str(n))), td(el("b", each.click)), td(code), td(shown)))
    return rows


def _button(click: Click, start: BoardState) -> Json:
    useless = click == Click.FINALIZE and start.op_state == OpState.RUNNABLE
    full = click.leaf or click
    return {
        "name": click,
        "full": full,
        "side": click.side,
        "title": _PLAIN.get(click, full),
        "hidden": useless,
    }


def _step(each: Answer, number: dict[BoardState, int], pool: dict[Json, Json]) -> list[int]:
    """Where a click leads, and the number of its answer in the pool."""
    key: Any = each[:3]
    if key not in pool:
        pool[key] = {
            "rax": "" if each.rax is None else f"{each.rax:016x}",
            "name": each.name if each.rax is not None else "",
            "kind": each.kind,
            "said": each.said,
            "line": log_line(each),
        }
    return [number[each.after], list(pool).index(key)]


def answers_html(start: BoardState) -> Html:
    """All answers as one table: leaves down, states of the entry across."""
    head = tr(th("", style=_EDGE), *(th(state, style=_EDGE) for state in ENTRY_STATES))
    leaves = [click for click in Click if click.leaf in tdx_sept.LEAVES]
    rows = [
        tr(td(el("b", click), style=_EDGE), *(td(*_cell(click, start, s), style=_EDGE) for s in ENTRY_STATES))
        for click in leaves
    ]
    return table([head, *rows], f"{MONO};{SMALL}")


_APART = "margin-top:10px"
_EDGE = f"border:1px solid {LINE};padding:3px 8px"


def _cell(click: Click, start: BoardState, state: Any) -> list[Html]:
    """What one leaf answers in one state; twice where tracking makes a difference."""
    assert click.leaf is not None
    running = start.op_state == OpState.RUNNABLE
    found = [seamcall(click.leaf, state, running=running, tracked=done) for done in (True, False)]
    words = [_words(each) for each in found]
    if words[0] == words[1]:
        return [words[0]]
    return [el("div", words[0], quiet(" tracked")), el("div", words[1], quiet(" not tracked"))]


def _words(found: tdx.Answer) -> Html:
    if found.ok:
        return el("b", f"-> {found.state}", style=f"background:{FAINT};padding:0 3px;border-radius:3px")
    name = (
        tdx.name(found.rax).removeprefix("TDX_")
        if found.status in MEANINGS or found.rax >> 32
        else found.status
    )
    return Html(escape(str(name)).replace("_", "_<wbr>"))


def _early() -> str:
    return f"Only before TDH.MR.FINALIZE: {sept_picture.before_finalize()}."

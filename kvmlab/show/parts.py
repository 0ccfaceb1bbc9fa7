"""The machine's table as HTML: what each part holds, with what has just changed marked."""

from __future__ import annotations

from functools import lru_cache

from ..model.step import Model
from .machine import Part, machine
from .style import CHANGED, LINE, MONO, Html, breakable, el, join, quiet, table, td, th, tr

NOTHING = "-"


def machine_table(model: Model, x: int, before: int | None = None) -> Html:
    """The machine in state `x`; where it differs from `before` the old value stands with an arrow."""
    return table(machine_lines(model, x, before), MONO)


def machine_lines(model: Model, x: int, before: int | None = None) -> list[Html]:
    """The table's rows, one a part; equal rows are equal strings."""
    old = {part.name: part for part in machine(model, x if before is None else before)}
    return [_line(part, old.get(part.name)) for part in machine(model, x)]


def values(part: Part) -> dict[str, str]:
    """The cells of a part by key; several values of one key are joined."""
    found: dict[str, str] = {}
    for key, value in part.cells:
        found[key] = f"{found[key]}, {value}" if key in found else value
    if part.name == "locks":
        found.pop("", None)
    return found


def changes(model: Model, before: int, after: int) -> list[tuple[str, str, str, str]]:
    """What differs between two states: (part, key, old value, new value), in the table's order."""
    old = {part.name: values(part) for part in machine(model, before)}
    found = []
    for part in machine(model, after):
        was, now = old.get(part.name, {}), values(part)
        for key in dict.fromkeys((*was, *now)):
            pair = was.get(key, NOTHING), now.get(key, NOTHING)
            if pair[0] != pair[1]:
                found.append((part.name, key, *pair))
    return found


@lru_cache(maxsize=4096)  # from one step to the next most parts stay as they are
def _line(part: Part, before: Part | None) -> Html:
    was, now = values(before) if before else {}, values(part)
    cells = [_cell(key, was.get(key, NOTHING), now.get(key, NOTHING)) for key in dict.fromkeys((*now, *was))]
    under = f"border-bottom:1px solid {LINE}"
    return tr(
        th(quiet(part.name), title=part.hint, style=f"{under};padding:3px 14px 3px 0;font-weight:400"),
        td(join(cells, " ") if cells else quiet("none held"), style=f"{under};padding:3px 0"),
    )


def _cell(key: str, was: str, now: str) -> Html:
    """One value behind its key; a change shows the value that it had."""
    name = (quiet(f"{key} "),) if key else ()
    if was == now:
        value = quiet(now) if now == NOTHING else breakable(now)
    else:
        value = el("b", f"{was} → {now}", style=CHANGED)
    return el("span", *name, value, style="display:inline-block;margin-right:7px")

"""The machine's table as HTML: a row a part, with what has just changed marked."""

from __future__ import annotations

from functools import lru_cache

from ..machine.table import TableRow, machine_rows
from ..model.step import Model
from .style import CHANGED, LINE, MONO, Html, breakable, el, join, quiet, table, td, th, tr

NOTHING = "-"


def machine_table(model: Model, x: int, before: int | None = None) -> Html:
    """The machine in state `x`; where it differs from `before` the old value stands with an arrow."""
    return table(machine_trs(model, x, before), MONO)


def machine_trs(model: Model, x: int, before: int | None = None) -> list[Html]:
    """The table's rows as <tr>; equal rows are equal strings."""
    old = {row.name: row for row in machine_rows(model, x if before is None else before)}
    return [_tr(row, old.get(row.name)) for row in machine_rows(model, x)]


def values(row: TableRow) -> dict[str, str]:
    """The cells of a row by key; several values of one key are joined."""
    found: dict[str, str] = {}
    for key, value in row.cells:
        found[key] = f"{found[key]}, {value}" if key in found else value
    if row.name == "locks":
        found.pop("", None)
    return found


def changes(model: Model, before: int, after: int) -> list[tuple[str, str, str, str]]:
    """What differs between two states: (row, key, old value, new value), in the table's order."""
    old = {row.name: values(row) for row in machine_rows(model, before)}
    found = []
    for row in machine_rows(model, after):
        was, now = old.get(row.name, {}), values(row)
        for key in dict.fromkeys((*was, *now)):
            pair = was.get(key, NOTHING), now.get(key, NOTHING)
            if pair[0] != pair[1]:
                found.append((row.name, key, *pair))
    return found


@lru_cache(maxsize=4096)  # from one step to the next most rows stay as they are
def _tr(row: TableRow, before: TableRow | None) -> Html:
    was, now = values(before) if before else {}, values(row)
    cells = [_cell(key, was.get(key, NOTHING), now.get(key, NOTHING)) for key in dict.fromkeys((*now, *was))]
    under = f"border-bottom:1px solid {LINE}"
    return tr(
        th(quiet(row.name), title=row.hint, style=f"{under};padding:3px 14px 3px 0;font-weight:400"),
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

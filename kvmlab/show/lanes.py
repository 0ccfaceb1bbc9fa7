"""A run as lanes: a column a CPU, a row a step, locks and the invalidation window drawn as bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..kernel import locks
from ..model.step import Actor
from ..verdict.diagram import CLOSES, OPENS
from ..verdict.run import Event, Frame, Run
from .style import (
    CLEAR,
    FAINT,
    LINE,
    MONO,
    SMALL,
    VERMILLION,
    WINDOW,
    Html,
    blank,
    breakable,
    css,
    el,
    hues,
    plural,
    quiet,
    table,
    td,
    th,
    tint,
    tr,
)

THICK = "mmu_lock"
PAD = "padding:1px 10px 1px 16px"
HANGING = "padding:1px 10px 1px 32px;text-indent:-16px"  # a call that is wrapped goes on further to the right


class Held(NamedTuple):
    """What one CPU holds during a step: any sleeping lock, and "write", "read" or "" for mmu_lock."""

    sleeping: bool
    mmu: str


class Row(NamedTuple):
    """One step as it is drawn: its number from 1, its event, what each CPU holds, the invalidation window.

    `turn` says that another CPU acted in the step before.
    """

    number: int
    event: Event
    held: dict[str, Held]
    window: str
    turn: bool


def acting(run: Run) -> list[Actor]:
    """The actors that take a step in this run."""
    keys = {frame.event.actor for frame in run.frames if frame.event}
    return [actor for actor in run.case.model.actors if actor.key in keys]


def rows(run: Run) -> list[Row]:
    """The steps of a run with what surrounds them."""
    keys = [actor.key for actor in acting(run)]
    found: list[Row] = []
    for n, (before, after) in enumerate(zip(run.frames, run.frames[1:], strict=False), 1):
        event = after.event
        assert event is not None
        held = {key: _held(run, before, after, key) for key in keys}
        turn = not found or found[-1].event.actor != event.actor
        found.append(Row(n, event, held, _window(run, before, after), turn))
    return found


def _held(run: Run, before: Frame, after: Frame, key: str) -> Held:
    """During a step a lock counts as held if it is before or after it: taking and dropping are part of it."""
    sleeping, mmu = False, ""
    for frame in (before, after):
        view = run.case.model.view(frame.state)
        mine = locks.held(view, key)
        sleeping = sleeping or any(lock != THICK for lock in mine)
        if THICK in mine:
            mmu = "write" if locks.holds_write(view, key, THICK) else "read"
    return Held(sleeping, mmu)


def _window(run: Run, before: Frame, after: Frame) -> str:
    was, now = (run.case.model.view(frame.state).in_progress for frame in (before, after))
    if was and now:
        return "open"
    return "opens" if now else "closes" if was else ""


def head(run: Run) -> Html:
    """The heads of the lanes: each CPU with its hue and what it is for."""
    actors = acting(run)
    hue = hues([actor.key for actor in run.case.model.actors])
    cells = [
        th(quiet("step", style=SMALL), number=True, style="padding:0 10px 4px 0"),
        th("", title="invalidation window", style="padding:0 0 4px 0"),
    ]
    for actor in actors:
        under = f"{PAD};padding-bottom:5px;box-shadow:inset 0px -2px {hue[actor.key]}"
        cells.append(
            th(
                _dot(hue[actor.key]),
                f" {actor.key} ",
                quiet(actor.role, style=f"{SMALL};font-weight:400"),
                style=under,
            )
        )
    return el("thead", tr(*cells))


def _dot(hue: str) -> Html:
    return el("span", style=f"display:inline-block;width:9px;height:9px;border-radius:9px;background:{hue}")


def step_bodies(run: Run) -> list[Html]:
    """One <tbody> a step: its row, the properties that it breaks, and the rule at which a cycle begins."""
    actors = acting(run)
    hue = hues([actor.key for actor in run.case.model.actors])
    depth = dict.fromkeys((actor.key for actor in actors), 0)
    out = []
    for row in rows(run):
        lines = []
        if row.number - 1 == run.cycle:
            lines.append(_rule("↻ from here on it repeats for ever", len(actors)))
        lines.append(_step(row, actors, hue, _indent(row.event, depth)))
        lines += [_alarm(row, reason, len(actors)) for reason in run.violations(row.number)]
        out.append(el("tbody", *lines))
    return out


def _indent(event: Event, depth: dict[str, int]) -> int:
    """How deep the call stands, as in the plain text: calls under mmu_lock are indented."""
    takes = ("write_lock(mmu", "read_lock(mmu")
    drops = ("write_unlock(mmu", "read_unlock(mmu")
    if event.call.startswith(drops):
        depth[event.actor] = max(0, depth[event.actor] - 1)
    here = depth[event.actor]
    if event.call.startswith(takes) and "[waits]" not in event.notes:
        depth[event.actor] += 1
    return here


def _step(row: Row, actors: Sequence[Actor], hue: dict[str, str], indent: int) -> Html:
    cells = [td(quiet(str(row.number), style=SMALL), number=True), _window_cell(row.window)]
    for actor in actors:
        mine = actor.key == row.event.actor
        bars = _bars(row.held[actor.key], hue[actor.key], mine)
        cells.append(td(*_words(row.event, indent), style=css(HANGING, bars)) if mine else blank(bars))
    return tr(*cells, style=f"border-top:1px solid {LINE}" if row.turn else "")


def _words(event: Event, indent: int) -> Iterator[Html]:
    call, notes, _ = event.text
    yield Html("&nbsp;" * (2 * indent))
    yield breakable(call)
    if notes:
        yield quiet("  ", Html("&nbsp; "), "  ".join(notes))
    if event.call.startswith((OPENS, CLOSES)):
        yield quiet(
            Html("&nbsp; "), "[window", Html("&nbsp;"), "opens]" if "begin" in event.call else "closes]"
        )


def _bars(held: Held, hue: str, acts: bool) -> str:
    """The left edge of a lane: a thin bar for a sleeping lock, a thick one for mmu_lock (paler for a reader)."""
    ground = tint(hue, 0.12) if acts else CLEAR
    thin = hue if held.sleeping else ground
    thick = {"write": hue, "read": tint(hue, 0.45), "": ground}[held.mmu]
    if thin == thick == ground:
        return f"background:{ground}" if acts else ""
    return _stripes(f"{thin} 0px 2px", f"{ground} 2px 4px", f"{thick} 4px 9px", f"{ground} 9px")


def _stripes(*stripes: str) -> str:
    """Vertical stripes from left to right, each a colour with its edges; the last one goes on to the end."""
    return f"background:linear-gradient(to right,{','.join(stripes)})"


def _window_cell(window: str) -> Html:
    """The bar of the invalidation window; its glyphs stand there for readers without colours."""
    if not window:
        return blank()
    glyph = {"opens": "┬", "open": "│", "closes": "┴"}[window]
    bar = _stripes(f"{WINDOW} 0px 7px", f"{CLEAR} 7px")
    return td(
        glyph, style=f"padding:0 6px 0 0;line-height:1;color:{WINDOW};{bar}", title="invalidation window open"
    )


def _alarm(row: Row, reason: str, lanes: int) -> Html:
    style = f"padding:3px 10px 3px 16px;background:{VERMILLION};color:#ffffff;font-weight:700"
    return tr(
        blank(),
        _window_cell("open" if row.window in ("open", "opens") else ""),
        td(f"!! {reason}", style=style, colspan=str(lanes)),
    )


def _rule(text: str, lanes: int) -> Html:
    edge = f"border-top:2px solid {WINDOW}"
    return tr(
        td(text, colspan=str(lanes + 2), style=f"padding:3px 10px;background:{FAINT};{edge};font-weight:600")
    )


def foot(run: Run, left_out: int = 0) -> Html:
    """What closes the lanes: the way back of a cycle, or how many steps are not shown."""
    if left_out:
        return el("tbody", _rule(f"... {plural(left_out, 'more step')}", len(acting(run))))
    if run.cycle is None:
        return Html("")
    return el("tbody", _rule(f"↺ back to step {run.cycle + 1}, for ever", len(acting(run))))


def lanes(run: Run, upto: int) -> Html:
    """The picture of a run's first `upto` steps."""
    shown = step_bodies(run)[:upto]
    return table((head(run), *shown, foot(run, run.steps - len(shown))), MONO)

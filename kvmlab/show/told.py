"""What a run tells at each step: an event in words, and what is wrong with a state in which nobody is at work."""

from __future__ import annotations

from typing import NamedTuple

from ..machine.properties import BY_NAME
from ..model.step import Model
from ..verdict.trace import Event, Trace, options


class Said(NamedTuple):
    """An event's words: the call, what came of it, and which properties it breaks, each with its reason."""

    call: str
    notes: tuple[str, ...]
    broken: tuple[str, ...]


def said(event: Event) -> Said:
    """Part an event's words; a guest's or the hardware's step has no call, so its first note stands for it."""
    broken = tuple(note for note in event.notes if note.split(":")[0] in BY_NAME)
    notes = tuple(note for note in event.notes if note not in broken)
    if event.call or not notes:
        return Said(event.call or "(nothing)", notes, broken)
    return Said(notes[0], notes[1:], broken)


def broken(trace: Trace, n: int) -> tuple[str, ...]:
    """The properties that step `n` breaks, each with its reason: by what it does, or by the state it leads to."""
    model, frame = trace.case.model, trace.frames[n]
    if frame.event is None:
        return state_reasons(model, frame.state)
    found = said(frame.event).broken
    if frame.event.fatal:
        return found
    before = state_reasons(model, trace.frames[n - 1].state)
    return (*found, *(reason for reason in state_reasons(model, frame.state) if reason not in before))


def state_reasons(model: Model, x: int) -> tuple[str, ...]:
    """What is wrong with a state: the watch's findings when all are idle, a deadlock when nobody busy can move."""
    busy = [
        n for n, actor in enumerate(model.actors) if not actor.program[_counter(model, actor.key, x)].idle
    ]
    if busy:
        names = ", ".join(model.actors[n].key for n in busy)
        return () if any(options(model, x, n) for n in busy) else (f"deadlock: {names} cannot go on",)
    if model.quiet is None:
        return ()
    view = model.view(x)
    model.quiet(view)
    return tuple(reason for reason in view.said if reason.split(":")[0] in BY_NAME)


def waits(model: Model, x: int, actor: int) -> bool:
    """Whether an actor has work left in state `x` and cannot go on with it."""
    key = model.actors[actor].key
    return not model.actors[actor].program[_counter(model, key, x)].idle and not options(model, x, actor)


def _counter(model: Model, key: str, x: int) -> int:
    return int(model.layout.cell("pc", key).get(x))

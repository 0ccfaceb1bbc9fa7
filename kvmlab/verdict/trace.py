"""A run, step by step: what each CPU did, and the machine after it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

from ..compile.scenario import InputError, build, find_scenario
from ..design import Design
from ..errors import Refusal
from ..explore.paths import Schedule, switches
from ..machine.conf import WORDS, Switches
from ..model.step import Model, run_step

DEFAULTS = Switches()


@dataclass(frozen=True)
class Case:
    """What was checked: a design in a scenario on a platform, with a backing and the open switches."""

    design: Design
    platform: str = "snp"
    scenario: str = "to-private"
    backing: str = "split"
    switches: Switches = DEFAULTS

    @cached_property
    def model(self) -> Model:
        """The model of this case; NotApplicable or InputError when there is none."""
        return build(self.design, find_scenario(self.scenario), self.platform, self.backing, self.switches)

    def __str__(self) -> str:
        odd = "".join(f", {name}={value}" for name, value in changed(self.switches).items())
        return f"{self.design.name}, {self.platform}, {self.scenario}, {self.backing} backing{odd}"


def changed(chosen: Switches) -> dict[str, str]:
    """The switches that differ from their defaults, as text."""
    default = Switches()
    return {
        f.name: _switch_text(getattr(chosen, f.name))
        for f in fields(chosen)
        if getattr(chosen, f.name) != getattr(default, f.name)
    }


def _switch_text(value: bool | str) -> str:
    return value if isinstance(value, str) else ("yes" if value else "no")


def parse_switches(pairs: Iterable[str]) -> Switches:
    """Read `name=value` pairs; InputError names the switches and values that exist."""
    chosen: dict[str, bool | str] = {}
    names = [f.name for f in fields(Switches)]
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in names:
            raise InputError(f"unknown switch {name[:40]!r}; there are: {', '.join(names)}")
        values = {_switch_text(value): value for value in WORDS.get(name, (True, False))}
        if value not in values:
            raise InputError(f"switch {name} cannot be {value[:40]!r}; allowed: {', '.join(values)}")
        chosen[name] = values[value]
    return Switches(**chosen)  # type: ignore[arg-type]


class Event(NamedTuple):
    """One step of a run: who, which call, what it told, which properties it broke, and the design's line."""

    actor: str
    call: str
    notes: tuple[str, ...]
    violations: tuple[str, ...]
    counts: tuple[str, ...]
    section: str
    line: int
    fatal: bool


class Frame(NamedTuple):
    """The machine after an event (the first frame has none)."""

    state: int
    event: Event | None


class ReplayError(Refusal, ValueError):
    """A trace code cannot be replayed: says why and where."""


def options(model: Model, x: int, a: int) -> list[tuple[Event, int]]:
    """Every step that actor number `a` can take in state `x`: the event and the state after it."""
    actor = model.actors[a]
    cell = model.layout.cell("pc", actor.key)
    instr = actor.program[cell.get(x)]
    found: list[tuple[Event, int]] = []
    prefix: tuple[int, ...] | None = ()
    while prefix is not None:
        view, enabled = run_step(model, actor, cell, x, prefix)
        if enabled:
            violations = tuple(dict.fromkeys(view.violations))
            fatal = bool(model.fatal & set(violations))
            event = Event(
                actor.key,
                instr.text,
                tuple(view.said),
                violations,
                tuple(view.counts),
                instr.section,
                instr.line,
                fatal,
            )
            found.append((event, view.after))
        prefix = view.next_prefix()
    return found


def letter(actor: int) -> str:
    """The letter of an actor's number: a is the CPU that asks."""
    return chr(ord("a") + actor)


def play(model: Model, schedule: Schedule) -> list[Frame]:
    """Run the schedule from the start; ReplayError at a step that cannot be taken."""
    frames = [Frame(model.initial, None)]
    for n, (a, choice) in enumerate(schedule, 1):
        if frames[-1].event is not None and frames[-1].event.fatal:
            raise ReplayError(f"step {n}: the run has ended with {', '.join(frames[-1].event.violations)}")
        if a >= len(model.actors):
            raise ReplayError(
                f"step {n}: there is no actor {letter(a)!r}; the last is {letter(len(model.actors) - 1)!r}"
            )
        steps = options(model, frames[-1].state, a)
        if choice >= len(steps):
            can = f"it has {len(steps)} possible steps here" if steps else "it is blocked here"
            raise ReplayError(f"step {n}: {model.actors[a].key} cannot take choice {choice}; {can}")
        event, state = steps[choice]
        frames.append(Frame(state, event))
    return frames


@dataclass(frozen=True)
class Trace:
    """A run of a case: its schedule, what it shows (`why`: a property, a measure, "sample" or "by-hand"),
    and where a cycle begins."""

    case: Case
    schedule: Schedule
    why: str = "by-hand"
    cycle: int | None = None

    @cached_property
    def frames(self) -> list[Frame]:
        """The machine before the first step, then after each step."""
        return play(self.case.model, self.schedule)

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.schedule)

    @property
    def switches(self) -> int:
        """Number of times that the acting CPU changes."""
        return switches(self.schedule)

    @cached_property
    def code(self) -> str:
        """A short code that `kvmlab.replay` and `kvmlab replay` turn back into this run."""
        from .code import encode

        return encode(self)

    def text(self, width: int = 75) -> str:
        """The run as a plain-text race diagram, ASCII, at most `width` columns, CPU columns as in mails."""
        from ..show.text import diagram

        return diagram(self, width)

    def __str__(self) -> str:
        return self.text()

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        from ..show.html import trace_html

        return {"text/plain": self.text(), "text/html": trace_html(self)}

"""A run, step by step: what each CPU did, the machine after it, and the properties that it violates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

from ..compile.build import build
from ..design import Design
from ..errors import InputError, Refusal
from ..explore.paths import Schedule, switches
from ..machine.conf import WORDS, Switches
from ..machine.properties import BY_NAME
from ..machine.scenario import Scenario
from ..machine.scenarios import find_scenario
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
        return build(self.design, self.scene, self.platform, self.backing, self.switches)

    @property
    def scene(self) -> Scenario:
        """The scenario itself: `scenario` is its name, or its text if it is none that ships."""
        return find_scenario(self.scenario)

    def __str__(self) -> str:
        odd = "".join(f", {name}={value}" for name, value in changed(self.switches).items())
        return f"{self.design.name}, {self.platform}, {self.scene.name}, {self.backing} backing{odd}"


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


class EventText(NamedTuple):
    """An event in words: the call, what came of it, and the properties that it violates, each with its reason."""

    call: str
    notes: tuple[str, ...]
    violations: tuple[str, ...]


class Event(NamedTuple):
    """One step of a run: who took it, which call, notes on what came of it, which properties it violates, and the
    design's section and line."""

    actor: str
    call: str
    notes: tuple[str, ...]
    violations: tuple[str, ...]
    counts: tuple[str, ...]
    section: str
    line: int
    fatal: bool

    @property
    def text(self) -> EventText:
        """The event in words; a step of the guest or the hardware has no call, so its first note stands for it."""
        violations = tuple(note for note in self.notes if note.split(":")[0] in BY_NAME)
        notes = tuple(note for note in self.notes if note not in violations)
        if self.call or not notes:
            return EventText(self.call or "(nothing)", notes, violations)
        return EventText(notes[0], notes[1:], violations)


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


def state_violations(model: Model, x: int) -> tuple[str, ...]:
    """What is wrong with state `x`, each property with its reason.

    When all actors are idle: what the model's watch of quiet states finds.  When nobody with work left can move: a
    deadlock.
    """
    busy = [n for n, actor in enumerate(model.actors) if not _idle(model, x, n)]
    if busy:
        names = ", ".join(model.actors[n].key for n in busy)
        return () if any(options(model, x, n) for n in busy) else (f"deadlock: {names} cannot go on",)
    if model.quiet is None:
        return ()
    view = model.view(x)
    model.quiet(view)
    return tuple(reason for reason in view.said if reason.split(":")[0] in BY_NAME)


def waits(model: Model, x: int, a: int) -> bool:
    """Whether actor number `a` has work left in state `x` and cannot go on with it."""
    return not _idle(model, x, a) and not options(model, x, a)


def _idle(model: Model, x: int, a: int) -> bool:
    actor = model.actors[a]
    return bool(actor.program[model.layout.cell("pc", actor.key).get(x)].idle)


@dataclass(frozen=True)
class Run:
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

    def violations(self, n: int) -> tuple[str, ...]:
        """The properties that step `n` violates, each with its reason: by what it does, or by the state after it.

        Step 0 is the state before the first step.
        """
        model, frame = self.case.model, self.frames[n]
        if frame.event is None:
            return state_violations(model, frame.state)
        done = frame.event.text.violations
        if frame.event.fatal:
            return done
        before = state_violations(model, self.frames[n - 1].state)
        return (*done, *(reason for reason in state_violations(model, frame.state) if reason not in before))

    @cached_property
    def violated(self) -> tuple[str, ...]:
        """Names of the properties that the run violates, in the order in which it does; a livelock comes last."""
        steps = range(len(self.frames))
        names = dict.fromkeys(reason.split(":")[0] for n in steps for reason in self.violations(n))
        return (*names, *(("livelock",) if self.why == "livelock" else ()))

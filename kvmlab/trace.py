"""A run, step by step: what each CPU did, the machine after it, and a short code that replays it anywhere."""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

from .design import Design
from .design.errors import Refusal
from .explore.paths import Schedule, switches
from .machine import Switches
from .scenario import InputError, NotApplicable, build, find_scenario
from .step import Model, run_step

DEFAULTS = Switches()
PREFIX = "kvmlab:1:"
LONGEST_RUN = 10_000  # steps; a code that asks for more is refused


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
    allowed = {"rmp_checked_at": {"access": "access", "fill": "fill"}}
    yes_no: dict[str, bool | str] = {"yes": True, "no": False}
    chosen: dict[str, bool | str] = {}
    names = [f.name for f in fields(Switches)]
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in names:
            raise InputError(f"unknown switch {name[:40]!r}; there are: {', '.join(names)}")
        values: dict[str, bool | str] = {**allowed.get(name, yes_no)}
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


def play(model: Model, schedule: Schedule) -> list[Frame]:
    """Run the schedule from the start; ReplayError at a step that cannot be taken."""
    frames = [Frame(model.initial, None)]
    for n, (a, choice) in enumerate(schedule, 1):
        if frames[-1].event is not None and frames[-1].event.fatal:
            raise ReplayError(f"step {n}: the run has ended with {', '.join(frames[-1].event.violations)}")
        if a >= len(model.actors):
            raise ReplayError(
                f"step {n}: there is no actor {_letter(a)!r}; the last is {_letter(len(model.actors) - 1)!r}"
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
    """A run of a case: its schedule, what it shows (`why`, a property or a witness), and where a cycle begins."""

    case: Case
    schedule: Schedule
    why: str = ""
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

    @property
    def code(self) -> str:
        """A short code that `kvmlab.replay` and `kvmlab replay` turn back into this run."""
        return encode(self)

    def text(self, width: int = 75) -> str:
        """The run as a plain-text race diagram, ASCII, at most `width` columns, CPU columns as in mails."""
        from .show.text import diagram

        return diagram(self, width)

    def __str__(self) -> str:
        return self.text()

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        from .show.html import trace_html

        return {"text/plain": self.text(), "text/html": trace_html(self)}


def encode(trace: Trace) -> str:
    """Write a trace as one code: `kvmlab:1:PLATFORM/SCENARIO/BACKING[,SWITCH=VALUE]/DESIGN/STEPS`.

    A shipped design stands as NAME@DIGEST, any other carries its whole text.  STEPS: a letter an actor
    (a is the asking CPU), a count of its steps, 'N for a step with choice N, ( ) around a cycle.
    """
    case = trace.case
    odd = "".join(f",{name}={value}" for name, value in changed(case.switches).items())
    parts = [case.platform, case.scenario, case.backing + odd, _design_text(case.design), _steps(trace)]
    return PREFIX + "/".join([*parts, *filter(None, [trace.why])])


def _letter(actor: int) -> str:
    return chr(ord("a") + actor)


def _design_text(design: Design) -> str:
    from .design import shipped

    if design.name in shipped("all") and Design.load(design.name).digest == design.digest:
        return f"{design.name}@{design.digest}"
    rows = re.sub(r"(?m)^//.*\n", "", design.canonical()).split("\nexpect ")[0]
    packed = zlib.compress(rows.encode(), 9)
    return "~" + base64.urlsafe_b64encode(packed).decode().rstrip("=")


def _steps(trace: Trace) -> str:
    out: list[str] = []
    run: list[object] = ["", 0]

    def flush() -> None:
        if run[1]:
            out.append(f"{run[0]}{run[1]}")
        run[:] = ["", 0]

    for n, (a, choice) in enumerate(trace.schedule):
        if n == trace.cycle:
            flush()
            out.append("(")
        letter = _letter(a)
        if choice or run[0] != letter:
            flush()
        if choice:
            out.append(f"{letter}'{choice}")
            continue
        run[:] = [letter, int(str(run[1])) + 1]
    flush()
    return "".join(out) + (")" if trace.cycle is not None else "")


_CODE = re.compile(
    r"kvmlab:1:(?P<platform>[\w-]+)/(?P<scenario>[\w-]+)/(?P<backing>[\w-]+)(?P<switches>(?:,[\w=-]+)*)"
    r"/(?P<design>[\w.-]+@[0-9a-f]{8}|~[\w-]+)/(?P<steps>[a-z0-9'()]*)(?:/(?P<why>[\w-]+))?"
)
_TOKEN = re.compile(r"(?P<open>\()|(?P<close>\))|(?P<actor>[a-z])(?:'(?P<choice>\d{1,3})|(?P<count>\d{1,6}))")


def decode(code: str) -> Trace:
    """Read a code back; ReplayError says what is wrong with it, or that its design has changed since."""
    code = "".join(code.split())
    if not code.startswith(PREFIX):
        raise ReplayError(f"not a kvmlab code: {code[:40]!r}; one begins with {PREFIX!r}")
    match = _CODE.fullmatch(code)
    if match is None:
        raise ReplayError(
            f"damaged code {code[:40]!r}; its form is {PREFIX}PLATFORM/SCENARIO/BACKING/DESIGN/STEPS"
        )
    try:
        chosen = parse_switches(filter(None, match["switches"].split(",")))
        case = Case(
            _read_design(match["design"]), match["platform"], match["scenario"], match["backing"], chosen
        )
        case.model  # noqa: B018 - builds it now, so that a bad name is told here
    except (InputError, NotApplicable) as problem:
        raise ReplayError(str(problem)) from None
    schedule, cycle = _read_steps(match["steps"])
    trace = Trace(case, schedule, match["why"] or "", cycle)
    trace.frames  # noqa: B018 - replays it now, so that a wrong step is told here
    return trace


def _read_design(text: str) -> Design:
    if text.startswith("~"):
        try:
            unpacker = zlib.decompressobj()
            raw = unpacker.decompress(
                base64.urlsafe_b64decode(text[1:] + "=" * (-len(text[1:]) % 4)), 256_000
            )
            return Design.parse(raw.decode(), name="(from the code)")
        except (ValueError, zlib.error) as problem:
            raise ReplayError(f"the design inside the code cannot be read: {problem}") from None
    name, _, digest = text.partition("@")
    try:
        design = Design.load(name)
    except ValueError as problem:
        raise ReplayError(str(problem)) from None
    if design.digest != digest:
        raise ReplayError(
            f"design {name} has changed since this code was made ({digest} then, {design.digest} now)"
        )
    return design


def _read_steps(text: str) -> tuple[Schedule, int | None]:
    schedule: list[tuple[int, int]] = []
    cycle: int | None = None
    at = 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            form = "a step is a letter and a count, or a letter, ' and a choice"
            raise ReplayError(f"cannot read the steps at {text[at : at + 12]!r}; {form}")
        at = token.end()
        if token["open"]:
            cycle = len(schedule)
        elif token["actor"]:
            actor = ord(token["actor"]) - ord("a")
            schedule += [(actor, int(token["choice"] or 0))] * int(token["count"] or 1)
        if len(schedule) > LONGEST_RUN:
            raise ReplayError(f"the code asks for more than {LONGEST_RUN} steps")
    return tuple(schedule), cycle


def replay(text: str) -> Trace:
    """Replay a code, or the code inside a pasted race diagram (quoted or not); ReplayError when there is none."""
    lines = [re.sub(r"^(?:\s*>)+ ?", "", line).strip() for line in text.splitlines()]
    found = next((n for n, line in enumerate(lines) if PREFIX in line), None)
    if found is None:
        raise ReplayError(
            f"there is no kvmlab code in this text; a diagram carries one, beginning with {PREFIX!r}"
        )
    code = lines[found][lines[found].index(PREFIX) :]
    for line in lines[found + 1 :]:
        if not line or " " in line:
            break
        code += line
    return decode(code)

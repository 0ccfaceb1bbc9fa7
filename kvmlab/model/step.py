"""Steps, programs and models: what an actor may do next, and the rows that the engines learn from it.

A step is a plain function `fn(s, me, *args)` over a `View`; it returns None (go on to the next
instruction) or the name of a jump.  It is atomic: whatever another actor could observe half-done must be
two steps.  The engines never run a step per state.  `Learner` runs it once for each distinct valuation of
the cells that it reads and keeps the outcome as a row; everything else applies rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .state import Blocked, Cell, Layout, ModelError, View

Step = Callable[..., str | None]


@dataclass(frozen=True)
class Instr:
    """One instruction of an actor's program: a step, its arguments, and where it leads.

    `idle` marks a place where the actor owes nothing (a vCPU in the guest between two accesses).
    `text` is what a trace prints; `row` is the design's row that it comes from (None: not of the design).
    `loop` is the same number for all that is done to one page of a request before the next page (0: once a request).
    """

    step: Step
    args: tuple[Any, ...] = ()
    next: int = -1
    jumps: Mapping[str, int] = field(default_factory=dict)
    idle: bool = False
    text: str = ""
    row: Any = None
    section: str = ""
    loop: int = 0

    @property
    def line(self) -> int:
        """The line of the design's text that it comes from; 0: none."""
        return self.row.line if self.row else 0

    def acts_as(self, other: Instr) -> bool:
        """Whether it does the same and leads to the same places: only what a trace prints may differ."""
        mine = (self.step, self.args, self.next, self.jumps, self.idle)
        return mine == (other.step, other.args, other.next, other.jumps, other.idle)


@dataclass(frozen=True)
class Actor:
    """A CPU that runs a program; `key` names it in cells and traces, `role` says what it is for."""

    key: str
    role: str
    program: tuple[Instr, ...]


@dataclass(frozen=True)
class Model:
    """A machine and its actors: everything the engines need.

    `fatal` names the properties whose violation ends the run; `quiet` is called in each quiet state (every actor is
    idle) and may violate further properties.
    """

    layout: Layout
    actors: tuple[Actor, ...]
    initial: int
    conf: Any = None
    fatal: frozenset[str] = frozenset()
    quiet: Callable[[View], None] | None = None
    title: str = ""

    def is_machine_of(self, other: Model) -> bool:
        """Whether the cells, what never changes, and what is watched for are the same; programs may differ."""
        mine = (self.fatal, self.quiet, self.conf, self.layout.places)
        return mine == (other.fatal, other.quiet, other.conf, other.layout.places)

    def view(self, x: int) -> View:
        """Return a fresh view of the packed state `x`."""
        return View(self.layout, x, self.conf)


class Outcome(NamedTuple):
    """One edge out of a state: `x & keep | put` is the successor.

    `violations` and `counts` are property and measure names; `choice` is the edge's number among those
    of the same actor in the same state; `fatal` means that the run ends here.
    """

    keep: int
    put: int
    violations: tuple[str, ...]
    counts: tuple[str, ...]
    choice: int
    fatal: bool


Row = tuple[Outcome, ...]


def run_step(
    model: Model, actor: Actor, pc_cell: Cell, x: int, prefix: tuple[int, ...] = ()
) -> tuple[View, bool]:
    """Run the actor's current step on state `x` once; returns its view and whether it was enabled."""
    pc = pc_cell.get(x)
    instr = actor.program[pc]
    view = View(model.layout, x, model.conf, prefix)
    try:
        jump = instr.step(view, actor.key, *instr.args)
    except Blocked:
        return view, False
    try:
        target = instr.next if jump is None else instr.jumps[jump]
    except KeyError:
        raise ModelError(f"{instr.text!r} of {actor.key} has no way out called {jump!r}") from None
    if target != pc:
        view.write(pc_cell, target)
    return view, True


class Table:
    """The rows learned for one (actor, pc): for each footprint that a run of the step had, outcomes by its value.

    What a step reads depends on what it has read before, so its footprints differ.  A state that agrees with a row
    in the row's footprint makes the step read just that and do just the same; so at most one row fits a state.
    """

    __slots__ = ("footprints", "idle")

    def __init__(self, idle: bool) -> None:
        self.idle = idle
        self.footprints: list[tuple[int, dict[int, Row]]] = []

    def find(self, x: int) -> Row | None:
        """The row that fits the packed state `x`, if it is known."""
        for mask, rows in self.footprints:
            row = rows.get(x & mask)
            if row is not None:
                return row
        return None

    def add(self, x: int, reads: int, row: Row) -> Row:
        """Learn from a run on `x` that read `reads`; returns the row."""
        for mask, rows in self.footprints:
            if mask == reads:
                rows[x & mask] = row
                return row
        self.footprints.append((reads, {x & reads: row}))
        return row


class Learner:
    """Rows for a model: runs a step once for each way in which it can read the state, on demand.

    `calls` counts how often Python step code ran.  Rows that an `earlier` learner has are shared with it, where
    the machine and the instruction are the same: whatever a step can see or name then is.
    """

    def __init__(self, model: Model, earlier: Learner | None = None) -> None:
        self.model = model
        self.calls = 0
        self.pc = [model.layout.cell("pc", actor.key) for actor in model.actors]
        self.tables = [[Table(instr.idle) for instr in actor.program] for actor in model.actors]
        self.quiet_table = Table(idle=True)
        if earlier is not None and model.is_machine_of(earlier.model):
            self._share(earlier)

    def _share(self, earlier: Learner) -> None:
        self.quiet_table = earlier.quiet_table
        lent = dict(
            zip((actor.key for actor in earlier.model.actors), enumerate(earlier.tables), strict=True)
        )
        for actor, mine in zip(self.model.actors, self.tables, strict=True):
            a, theirs = lent.get(actor.key, (0, []))
            for pc, (instr, table) in enumerate(zip(actor.program, theirs, strict=False)):
                if instr.acts_as(earlier.model.actors[a].program[pc]):
                    mine[pc] = table

    def outcomes(self, a: int, x: int) -> Row:
        """Every edge of actor number `a` out of state `x`; empty when it is blocked."""
        table = self.tables[a][self.pc[a].get(x)]
        found = table.find(x)
        return self._learn(a, table, x) if found is None else found

    def _learn(self, a: int, table: Table, x: int) -> Row:
        model, actor = self.model, self.model.actors[a]
        outcomes: list[Outcome] = []
        prefix: tuple[int, ...] | None = ()
        reads = 0
        while prefix is not None:  # what any of the choices reads, decides about all of them
            view, enabled = run_step(model, actor, self.pc[a], x, prefix)
            self.calls += 1
            reads |= view.reads
            if enabled:
                outcomes.append(self._outcome(view, len(outcomes)))
            prefix = view.next_prefix()
        return table.add(x, reads, tuple(outcomes))

    def _outcome(self, view: View, choice: int) -> Outcome:
        keep, put = -1, 0
        for cell, code in view.writes.items():
            keep &= ~cell.mask
            put |= code
        violations = tuple(dict.fromkeys(view.violations))
        fatal = any(p in self.model.fatal for p in violations)
        if fatal:  # the run ends: only the property that ended it is charged
            violations = tuple(p for p in violations if p in self.model.fatal)[:1]
        return Outcome(keep, put, violations, tuple(view.counts), choice, fatal)

    def quiet(self, x: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Violations and counts that the model's `quiet` watch finds in the quiet state `x`."""
        if self.model.quiet is None:
            return (), ()
        row = self.quiet_table.find(x)
        if row is None:
            view = self.model.view(x)
            self.model.quiet(view)
            self.calls += 1
            found = Outcome(-1, 0, tuple(dict.fromkeys(view.violations)), tuple(view.counts), 0, False)
            row = self.quiet_table.add(x, view.reads, (found,))
        return row[0].violations, row[0].counts

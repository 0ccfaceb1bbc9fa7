"""What the workbench does, without a widget: edit an ordering, see the verdicts, walk a run, or schedule by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from threading import RLock
from typing import Any, NamedTuple, TypeVar, cast

from ..compile.build import check_names
from ..design import Design
from ..errors import InputError, Refusal
from ..explore.paths import Schedule
from ..machine.conf import Switches
from ..machine.properties import PROPERTIES
from ..machine.scenarios import find_scenario
from .replay import replay
from .report import Report, as_design, check, check_case
from .run import Case, Event, Frame, options
from .trace import Trace

BY_HAND = "by-hand"

Method = TypeVar("Method", bound=Callable[..., Any])


def _one_thread(method: Method) -> Method:
    """Let one thread at a time read or change the run and the position; a check runs outside this lock."""

    @wraps(method)
    def locked(self: Session, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(Method, locked)


class Option(NamedTuple):
    """A step that could be taken now: which actor, which of its choices, and what it would do."""

    actor: str
    number: int
    choice: int
    event: Event


class Session:
    """What one reviewer works on: a case, its report, and a run with a position in it.

    Every change re-explores the case.  A change that is refused (a bad text, a case that does not exist)
    leaves everything as it was and says why in `problem`.  Several threads may use it.
    """

    def __init__(
        self,
        design: Design | str = "v8-post-hook",
        platform: str = "snp",
        scenario: str = "tiny",
        backing: str = "split",
        switches: Switches | None = None,
    ) -> None:
        self._lock = RLock()
        self.problem: str | None = None
        self.draft: str | None = None
        self.adopt(check(as_design(design), platform, scenario, backing, switches))

    @classmethod
    def of(cls, run: Trace) -> Session:
        """A session on this run, with the verdicts of its case."""
        case = run.case
        session = cls(case.design, case.platform, case.scenario, case.backing, case.switches)
        session.walk(run)
        return session

    # -- what is being looked at

    @property
    def case(self) -> Case:
        """The case as checked."""
        return self.report.case

    @property
    def design(self) -> Design:
        """The design as checked."""
        return self.case.design

    @property
    def trace(self) -> Trace:
        """The run being walked, whole."""
        return self._trace

    @property
    def frames(self) -> list[Frame]:
        """The machine before the first step and after each."""
        return self._trace.frames

    @property
    @_one_thread
    def frame(self) -> Frame:
        """Where the run stands now."""
        return self.frames[self.position]

    # -- changing the case

    def edit(self, text: str) -> Report:
        """Take a new text for the design and re-check; a bad text is kept as `draft`, with its `problem`."""
        self.draft = text
        return self._try(lambda: changed_case(self.case, design=self.design.replace_text(text)))

    def move(self, section: str, line: int, by: int) -> Report:
        """Move statement number `line` of a section up (`by` < 0) or down among its neighbours."""
        return self._try(lambda: changed_case(self.case, design=self.design.move(section, line, by)))

    def load(self, design: Design | str) -> Report:
        """Take another design."""
        return self._try(lambda: changed_case(self.case, design=as_design(design)))

    def choose(self, **changes: Any) -> Report:
        """Change platform, scenario, backing or switches (`switches` is a `Switches`)."""
        unknown = set(changes) - {"platform", "scenario", "backing", "switches"}
        if unknown:
            raise TypeError(f"choose() has no {', '.join(sorted(unknown))}")
        return self._try(lambda: changed_case(self.case, **changes))

    def open(self, text: str) -> Report:
        """Walk the run of a code, or of a pasted diagram, in its own case."""
        try:
            run = replay(text)
            report = check_case(run.case, earlier=self.report)
        except (Refusal, MemoryError) as problem:
            self.problem = str(problem) or "out of memory"
        else:
            self.adopt(report, run)
        return self.report

    def _try(self, change: Callable[[], Case]) -> Report:
        try:
            report = check_case(change(), earlier=self.report)
        except (Refusal, MemoryError) as problem:
            self.problem = str(problem) or "out of memory"
        else:
            self.adopt(report)
        return self.report

    @_one_thread
    def adopt(self, report: Report, run: Trace | None = None) -> None:
        """Go over to a report, and to a run of its case (default: that of the gravest property violated)."""
        self.report = report
        self.problem = self.draft = None
        self.walk(run or report.trace())

    # -- walking a run

    @_one_thread
    def show(self, prop: str | None = None) -> Trace:
        """Walk the counterexample of a property (default: the gravest violated, or a sample run)."""
        return self.walk(self.report.trace(prop))

    @_one_thread
    def walk(self, run: Trace) -> Trace:
        """Walk a run of this case from its start."""
        self._trace = run
        self.position = 0
        self.by_hand = run.why == BY_HAND
        return run

    @_one_thread
    def step(self) -> Frame:
        """Go one step forward, if there is one."""
        return self.jump(self.position + 1)

    @_one_thread
    def back(self) -> Frame:
        """Go one step back."""
        return self.jump(self.position - 1)

    @_one_thread
    def jump(self, position: int) -> Frame:
        """Go to a position; beyond either end means the end."""
        self.position = min(max(position, 0), len(self.frames) - 1)
        return self.frame

    # -- scheduling by hand

    @_one_thread
    def enabled(self) -> list[Option]:
        """Every step that some actor can take at this position."""
        if self.frame.event is not None and self.frame.event.fatal:
            return []
        return [
            Option(actor.key, a, choice, event)
            for a, actor in enumerate(self.case.model.actors)
            for choice, (event, _) in enumerate(options(self.case.model, self.frame.state, a))
        ]

    @_one_thread
    def blocked(self) -> list[str]:
        """Actors that have work left but cannot move now."""
        can = {option.actor for option in self.enabled()}
        model = self.case.model
        cells = {a.key: model.layout.cell("pc", a.key) for a in model.actors}
        return [
            a.key
            for a in model.actors
            if a.key not in can and not a.program[cells[a.key].get(self.frame.state)].idle
        ]

    @_one_thread
    def take(self, actor: str, choice: int = 0, at: int | None = None) -> Frame:
        """Let `actor` take a step here, or at another position; what followed in the run before is dropped.

        InputError when that actor cannot move or has fewer choices, and the position is the old one.
        """
        before = self.position
        if at is not None:
            self.jump(at)
        try:
            return self._take(actor, choice)
        except InputError:
            self.position = before
            raise

    def _take(self, actor: str, choice: int) -> Frame:
        found = next((o for o in self.enabled() if o.actor == actor and o.choice == choice), None)
        if found is None:
            can = sorted({o.actor for o in self.enabled()}) or ["nobody: the run has ended"]
            raise InputError(f"{actor} cannot take choice {choice} here; able to move: {', '.join(can)}")
        schedule: Schedule = (*self._trace.schedule[: self.position], (found.number, choice))
        self._trace = Trace(self.case, schedule, BY_HAND)
        self.by_hand = True
        return self.jump(len(schedule))

    @_one_thread
    def so_far(self) -> dict[str, bool]:
        """For each property: whether it still holds in the run up to this position."""
        seen = {p for f in self.frames[: self.position + 1] if f.event for p in f.event.violations}
        return {p.name: p.name not in seen for p in PROPERTIES}


def changed_case(case: Case, **changes: Any) -> Case:
    """The case with another design, platform, scenario, backing or switches, and its model.

    InputError for a name that does not exist, NotApplicable for a case that does not.
    """
    changed = replace(case, **changes)
    check_names(changed.platform, changed.backing)
    find_scenario(changed.scenario)
    changed.model  # noqa: B018 - builds it now, so that a case that does not exist is told here
    return changed

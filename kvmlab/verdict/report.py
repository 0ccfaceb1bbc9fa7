"""Check a design: explore everything, give one verdict a property, and the runs that show it."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

from ..compile.build import with_forgetful_tlbs
from ..design import Design
from ..design.files import is_text
from ..errors import InputError
from ..explore import liveness, paths, rows
from ..explore.graph import Graph, Hit, Watch
from ..machine.conf import Switches
from ..machine.properties import BY_NAME, MEASURES, PROPERTIES
from ..machine.scenarios import read_scenario
from ..model.step import Learner, Model
from .diagram import WIDTH
from .display import Displayed
from .questions import Asked, ask
from .run import Case
from .trace import Trace

NEVER, SOMETIMES, ALWAYS, UNJUDGED = "Never", "Sometimes", "Always", "not judged"
HITS_TRIED = 40  # how many shortest violations are looked at for runs that differ
LIMIT = 16_000_000  # states after which a search stops unless told otherwise: some 4 GB; what ships needs 12 million
WIDE = 300  # states of a level from which on the array engine is the faster one


@dataclass(frozen=True)
class Verdict:
    """What the exploration says of one property; `depth` is the length of a shortest violation."""

    name: str
    verdict: str
    depth: int | None = None


@dataclass
class Report(Displayed):
    """The outcome of one check.  `complete` only if every interleaving was explored."""

    case: Case
    graph: Graph = field(repr=False)
    seconds: float
    watch: Watch | None = field(default=None, repr=False)  # of the search, and of those that a verdict needs

    @property
    def complete(self) -> bool:
        """Whether every interleaving was explored."""
        return self.graph.complete

    @property
    def states(self) -> int:
        """Number of reachable states."""
        return len(self.graph.depth)

    @property
    def transitions(self) -> int:
        """Number of edges between them."""
        return self.graph.transitions

    @property
    def depth(self) -> int:
        """Steps to the farthest state."""
        return self.graph.max_depth

    @cached_property
    def verdicts(self) -> dict[str, Verdict]:
        """One verdict a property, in the order of `properties`."""
        judged = [p for p in PROPERTIES if self.case.model.conf.correct_guest or not p.guest]
        depths = {p.name: depth for p in judged if (depth := self._depth(p.name)) is not None}
        always = self._unavoidable(list(depths))
        clean = {p.name for p in judged} if self.complete else set()

        def word(name: str) -> str:
            if name in depths:
                return ALWAYS if name in always else SOMETIMES
            return NEVER if name in clean else UNJUDGED

        return {p.name: Verdict(p.name, word(p.name), depths.get(p.name)) for p in PROPERTIES}

    @cached_property
    def _livelock(self) -> liveness.Cycle | None:
        return liveness.livelock(self.graph)

    def _depth(self, name: str) -> int | None:
        """Steps to a nearest violation, if there is any."""
        if name == "livelock" and (cycle := self._livelock):
            return min(int(self.graph.depth[i]) for i in cycle.states)
        return self.graph.hit_depth.get(name)

    def _unavoidable(self, names: Sequence[str]) -> list[str]:
        """Those that every run that finishes violates, even if TLB entries may vanish at any time (Always).

        For a single property the search does not go past its violation.
        """

        def never_avoided(graph: Graph, name: str) -> bool:
            ends = name in ("deadlock", "livelock")  # what never finishes cannot be avoided by finishing
            return graph.complete and not (
                liveness.finishes(graph) if ends else liveness.avoidable(graph, name)
            )

        names = [name for name in names if never_avoided(self.graph, name)]
        if not names:
            return []
        shun = names[0] if len(names) == 1 else None
        model = with_forgetful_tlbs(self.case.model)
        forgetful = explore(model, watch=self.watch, earlier=self.graph.learner, shun=shun)
        return [name for name in names if never_avoided(forgetful, name)]

    @property
    def violated(self) -> list[str]:
        """Names of the properties that some run violates."""
        return [v.name for v in self.verdicts.values() if v.verdict in (SOMETIMES, ALWAYS)]

    @cached_property
    def asked(self) -> list[Asked]:
        """What the scenario asks itself, answered."""
        return [ask(self.graph, word, text) for word, text in self.case.scene.asked]

    @property
    def bad(self) -> bool:
        """Whether something bad can happen: a property is violated, or what the scenario asks for does not hold."""
        return bool(self.violated) or any(asked.broken(self.complete) for asked in self.asked)

    def reach(self, number: int = 0) -> Trace:
        """A shortest run to where the scenario's expression of that number is true; else the sample run."""
        hits = self.asked[number].hits
        return Trace(self.case, paths.shortest(self.graph, hits), "by-hand") if hits else self.sample()

    @cached_property
    def witnesses(self) -> dict[str, bool]:
        """Good things that must be reachable: the conversion returns; the guest gets to use its page."""
        return {
            "conversion returns": len(self.graph.calm()) > 0,
            "guest uses the page": self._used() is not None,
        }

    def _used(self) -> int | None:
        """The nearest quiet state in which the guest has used its pages as it asked for them last."""
        model = self.case.model
        guest = [model.layout.cell("guest", gfn) for gfn in model.conf.used]
        ready, mask = sum(cell.code("ready") for cell in guest), sum(cell.mask for cell in guest)
        return next((i for i in self.graph.calm() if self.graph.packed(i) & mask == ready), None)

    @cached_property
    def measures(self) -> dict[str, dict[str, int | None]]:
        """Least and most of each measure over the finishing runs; `most` is None when unbounded."""
        return liveness.measures(self.graph, MEASURES)

    def trace(self, prop: str | None = None) -> Trace:
        """The shortest run, with the fewest changes of CPU, that violates `prop` (default: the gravest violated).

        If nothing is violated: a sample run to a quiet end.  KeyError for an unknown property.
        """
        name = prop or next(iter(self.violated), None)
        if name is None or (prop is not None and self.verdicts[prop].depth is None):
            return self.sample()
        if name == "livelock" and self._livelock is not None:
            stem, loop = paths.lasso(self.graph, self._livelock)
            return Trace(self.case, stem + loop, name, len(stem))
        return Trace(self.case, paths.shortest(self.graph, self.graph.hits[name]), name)

    def traces(self, prop: str, most: int = 3) -> list[Trace]:
        """Up to `most` shortest runs that violate `prop` and differ in who acts after whom, or in the last step.

        The first is `trace(prop)`.  Only shortest violations are remembered, so there may be fewer.
        """
        first = self.trace(prop)
        if prop not in self.graph.hits or self.verdicts[prop].depth is None:
            return [first]
        found = {_shape(first): first}
        for hit in self.graph.hits[prop][:HITS_TRIED]:
            run = Trace(self.case, paths.shortest(self.graph, [hit]), prop)
            found.setdefault(_shape(run), run)
        return sorted(found.values(), key=lambda run: run.switches)[:most]

    def example(self, measure: str) -> Trace:
        """A shortest run that counts `measure`, or the sample run if none does; InputError if there is no such."""
        if measure not in MEASURES:
            raise InputError(f"unknown measure {measure!r}; there are: {', '.join(MEASURES)}")
        hits = liveness.first_edges(self.graph, measure)
        hits = (
            hits
            or [Hit(i, None, None) for i, found in self.graph.quiet_found.items() if measure in found[1]][:1]
        )
        return Trace(self.case, paths.shortest(self.graph, hits), measure) if hits else self.sample()

    def sample(self) -> Trace:
        """A shortest run to a quiet end in which the guest has used its page, or as far as any run gets."""
        end = self._used()
        if end is None:
            end = next(iter(self.graph.calm()), len(self.graph.depth) - 1)
        return Trace(self.case, paths.shortest(self.graph, [Hit(end, None, None)]), "sample")

    def as_json(self) -> dict[str, Any]:
        """The element that `kvmlab check --json` prints."""
        properties: dict[str, Any] = {}
        for name, verdict in self.verdicts.items():
            trace = self.trace(name) if verdict.depth is not None else None
            properties[name] = {
                "verdict": verdict.verdict if verdict.verdict != UNJUDGED else None,
                "steps": trace.steps if trace else None,
                "switches": trace.switches if trace else None,
                "code": trace.code if trace else None,
            }
        return {
            "design": self.case.design.name,
            "platform": self.case.platform,
            "scenario": self.case.scene.name,
            "backing": self.case.backing,
            "complete": self.complete,
            "states": self.states,
            "transitions": self.transitions,
            "depth": self.depth,
            "seconds": round(self.seconds, 3),
            "properties": properties,
            "measures": self.measures,
            "witnesses": self.witnesses,
            "asked": [
                {
                    "question": f"{asked.word}: {asked.text}",
                    "holds": None
                    if not asked.hits and not self.complete
                    else not asked.broken(self.complete),
                    "code": self.reach(n).code if asked.hits else None,
                }
                for n, asked in enumerate(self.asked)
            ],
            "not_checked": list(self.not_checked),
            "notes": list(self.case.design.notes),
        }

    @property
    def not_checked(self) -> list[str]:
        """What this run does not say anything about, in words."""
        careless = [p.name for p in PROPERTIES if p.guest and not self.case.model.conf.correct_guest]
        left = [f"{', '.join(careless)}: not judged, the guest is careless"] if careless else []
        if not self.complete:
            left.append(f"interleavings beyond the first {self.states:,} states")
        return left

    def _answer(self, asked: Asked) -> str:
        if asked.hits:
            found = f"Sometimes, after {int(self.graph.depth[asked.hits[0].state])} steps"
        else:
            found = "Never" if self.complete else "not seen"
        held = "as asked" if not asked.broken(self.complete) else "NOT as asked"
        return (
            f"{asked.word}: {asked.text}: {found}, {held if asked.hits or self.complete else 'not complete'}"
        )

    def text(self) -> str:
        """The verdicts as plain text: what can go wrong first, then what never does."""
        done = "complete" if self.complete else "NOT complete"
        lines = [str(self.case), *(f"  ({note})" for note in self.case.design.notes)]
        lines.append(
            f"  {self.states:,} states, {self.transitions:,} transitions, depth {self.depth}, {done}"
        )
        for verdict in self.verdicts.values():
            if verdict.depth is not None:
                lines.append(f"  {verdict.verdict:<9} {verdict.name:<18} {_sentence(verdict.name)}")
        never = [v.name for v in self.verdicts.values() if v.verdict == NEVER]
        if never:
            text, indent = f"Never     {', '.join(never)}", " " * 12
            lines += textwrap.wrap(
                text, WIDTH, initial_indent="  ", subsequent_indent=indent, break_on_hyphens=False
            )
        lines += [f"  {self._answer(asked)}" for asked in self.asked]
        lines += [f"  Not seen  {name}" for name, seen in self.witnesses.items() if not seen]
        lines += [f"  Not checked: {what}" for what in self.not_checked]
        return "\n".join(lines)


def _sentence(name: str) -> str:
    text = BY_NAME[name].sentence
    return text if len(text) <= 46 else text[:44] + ".."


def _shape(run: Trace) -> tuple[object, ...]:
    """Who acts after whom, and what the last step is: runs alike in this tell the same story."""
    turns = tuple(actor for actor, _ in groupby(actor for actor, _ in run.schedule))
    last = run.frames[-1].event
    return (turns, last.call if last else "", last.actor if last else "")


def explore(
    model: Model,
    limit: int = LIMIT,
    watch: Watch | None = None,
    earlier: Learner | None = None,
    shun: str | None = None,
) -> Graph:
    """Explore a model with the engine that fits the width of its levels; complete unless `limit` states are exceeded.

    `watch` is told now and then how many states are known; it may end the search.  Rows of an `earlier` learner
    are used again where they apply.  Steps that violate the property to `shun` are not followed.
    """
    graph = rows.search(model, limit, watch, Learner(model, earlier), WIDE, shun)
    if not graph.begun:
        return graph
    from ..explore import arrays

    return arrays.search(model, limit, watch=watch, begun=graph, shun=shun)


def check(
    design: Design | str,
    platform: str = "snp",
    scenario: str = "to-private",
    backing: str = "split",
    switches: Switches | None = None,
    limit: int | None = None,
    seconds: float | None = None,
    vcpus: int | None = None,
    gfns: int | None = None,
) -> Report:
    """Explore every interleaving of `design` in one scenario and return the verdicts.

    `design` is a `Design`, the name of one that ships, a file, or a text with line breaks; `scenario` is names joined
    by "+", a file, or a text, with other numbers of `vcpus` and `gfns` if they are given.  After `limit` states
    (default: LIMIT) or so many `seconds` the search stops, and the report is not `complete`.  Raises DesignError
    for a bad design, InputError for a name that does not exist, NotApplicable for a case that does not,
    MemoryError in words.
    """
    scene = read_scenario(scenario, vcpus, gfns)
    case = Case(as_design(design), platform, scene, backing, switches or Switches())
    began = time.perf_counter()
    if seconds is None:
        return check_case(case, limit)
    if not isinstance(seconds, int | float) or not seconds > 0:
        raise InputError("the seconds are a number above 0")
    return check_case(case, limit, lambda states: time.perf_counter() - began > seconds)


def check_case(
    case: Case, limit: int | None = None, watch: Watch | None = None, earlier: Report | None = None
) -> Report:
    """Check a case as `check` does; `watch` as for `explore`.

    An `earlier` report of a like case saves time, and changes nothing else: what its instructions do is known.
    """
    most = LIMIT if limit is None else limit
    if not isinstance(most, int) or most < 1:
        raise InputError("the limit is a positive whole number of states")
    began = time.perf_counter()
    report = None
    try:
        lent = None if earlier is None else earlier.graph.learner
        report = Report(case, explore(case.model, most, watch, lent), 0.0, watch)
        report.verdicts  # noqa: B018 - part of the check, so part of its time
    except MemoryError:  # raised anew below, where the memory is free again
        report = None
    if report is None:
        words = "out of memory; a limit on states, or a smaller scenario, takes less"
        raise MemoryError(f"{case}: {words}")
    report.seconds = time.perf_counter() - began
    report.watch = None
    return report


def as_design(design: Design | str) -> Design:
    """Take a design, or parse a text, or load a name."""
    if isinstance(design, Design):
        return design
    if not isinstance(design, str | os.PathLike):
        raise InputError(f"a design is a Design, a name, a file or a text; this is a {type(design).__name__}")
    return Design.parse(design) if isinstance(design, str) and is_text(design) else Design.load(design)


@dataclass
class Comparison(Displayed):
    """Several designs in the same scenario, property by property."""

    reports: Sequence[Report]

    def text(self) -> str:
        """A table: designs down, violated properties across; S for Sometimes, A for Always, . for Never."""
        names = [p for p in BY_NAME if any(p in r.violated for r in self.reports)]
        left = max((len(r.case.design.name) for r in self.reports), default=6)
        letters = {NEVER: ".", SOMETIMES: "S", ALWAYS: "A"}
        lines = [" " * (left + 2) + "  |" * n + "  " + name for n, name in enumerate(names)]
        lines.append("".ljust(left) + "  " + "  |" * len(names) + f"{'states':>11}")
        for r in self.reports:
            marks = "".join(f"  {letters.get(r.verdicts[name].verdict, '?')}" for name in names)
            lines.append(f"{r.case.design.name:<{left}}  {marks}{r.states:>11,}{'' if r.complete else ' +'}")
        lines.append("S some runs, A every run that finishes, . never")
        return "\n".join(lines)

    __repr__ = text


def compare(designs: Iterable[Design | str], **case: Any) -> Comparison:
    """Check several designs in one scenario; keyword arguments as for `check`."""
    return Comparison([check(design, **case) for design in designs])

"""The matrix: every design in every scenario, the worst verdict a cell, in one screen."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

from ..compile.build import check_names
from ..design import Design, shipped
from ..design.calls import BACKINGS
from ..errors import InputError, NotApplicable
from ..machine.conf import PLATFORMS, Switches
from ..machine.properties import BY_NAME
from ..machine.scenarios import SCENARIOS, find_scenario
from ..pool import spread
from .diagram import WIDTH
from .display import Displayed
from .report import ALWAYS, SOMETIMES, as_design, check

SHORT = {
    "host-rmp-fault": "RMPF", "host-machine-check": "MCE", "kernel-bug": "BUG", "platform-error": "PLATF",
    "deadlock": "DEADL",
    "sleep-in-atomic": "ATOMIC", "lock-misuse": "LOCK", "confidentiality": "LEAK", "integrity": "INTEGR",
    "guest-killed": "KILLED", "conversion-refused": "REFUSE", "livelock": "LOOP", "stale-mapping": "STALE",
    "out-of-sync": "SYNC", "warning": "WARN",
}  # fmt: skip
assert set(SHORT) == set(BY_NAME)


@dataclass(frozen=True)
class Square:
    """One cell of the matrix: what one check found, without its graph; or the `reason` why there is none."""

    design: str
    platform: str
    scenario: str
    backing: str
    verdicts: Mapping[str, str] = field(default_factory=dict)
    states: int = 0
    complete: bool = True
    reason: str = ""
    element: Mapping[str, Any] | None = None

    @property
    def worst(self) -> str:
        """The gravest property violated, "ok", "?" where the search did not get to its end, or "n/a"."""
        if self.reason:
            return "n/a"
        clean = "ok" if self.complete else "?"
        return next((name for name in BY_NAME if self.verdicts[name] in (SOMETIMES, ALWAYS)), clean)

    @property
    def short(self) -> str:
        """`worst` in few letters; a trailing ! where every finishing run violates it."""
        if self.worst not in SHORT:
            return self.worst
        return SHORT[self.worst] + ("!" if self.verdicts[self.worst] == ALWAYS else "")

    def as_json(self) -> dict[str, Any]:
        """The element that `kvmlab matrix --json` prints."""
        where = {
            "design": self.design,
            "platform": self.platform,
            "scenario": self.scenario,
            "backing": self.backing,
        }
        return {**where, "n/a": self.reason} if self.reason else dict(self.element or where)


@dataclass(frozen=True)
class Matrix(Displayed):
    """Designs down, scenarios across, for each platform and backing asked for."""

    squares: tuple[Square, ...]

    @property
    def legend(self) -> str:
        """What the short verdicts in it stand for, gravest first."""
        found = {square.worst for square in self.squares}
        return ", ".join(f"{short} {name}" for name, short in SHORT.items() if name in found)

    def text(self) -> str:
        """Scenarios down, designs across, the states of each scenario last; a table a platform and backing."""
        lines: list[str] = []
        for platform, backing in dict.fromkeys((s.platform, s.backing) for s in self.squares):
            here = [s for s in self.squares if (s.platform, s.backing) == (platform, backing)]
            lines += ["", *_table(f"{platform}, {backing}", {(s.design, s.scenario): s for s in here})]
        total = sum(s.states for s in self.squares)
        checks = sum(not s.reason for s in self.squares)
        all_or_not = "all complete" if all(s.complete for s in self.squares) else "NOT all complete (+)"
        lines.append("")
        lines += textwrap.wrap(self.legend, max(WIDTH, *map(len, lines)), break_on_hyphens=False)
        lines.append(f"{checks} checks, {total:,} states, {all_or_not}; ! in every run that finishes")
        return "\n".join(line.rstrip() for line in lines[1:])

    __repr__ = text


def _table(title: str, here: Mapping[tuple[str, str], Square]) -> list[str]:
    """The lines of one table of the matrix; `here` has its squares by design and scenario."""
    designs = list(dict.fromkeys(design for design, _ in here))
    scenarios = list(dict.fromkeys(scenario for _, scenario in here))
    left = max(len(name) for name in [*scenarios, title]) + 1
    lines = []
    for n, design in enumerate(designs):
        lines.append(("" if n else title).ljust(left) + "       |" * n + "       " + design)
    lines.append(" " * left + "       |" * len(designs) + "       states")
    for scenario in scenarios:
        row = [here[design, scenario] for design in designs]
        verdicts = "".join(f"{s.short}{'' if s.complete else '+'}".rjust(8) for s in row)
        lines.append(f"{scenario.ljust(left)}{verdicts}{sum(s.states for s in row):>13,}")
    return lines


Progress = Callable[[str], Any]
Where = tuple[tuple[str, str | None], str, str, str]  # a design (see `_named`), platform, scenario, backing


def matrix(
    designs: Iterable[Design | str] | None = None,
    platforms: Iterable[str] = tuple(PLATFORMS),
    scenarios: Iterable[str] = tuple(SCENARIOS),
    backings: Iterable[str] = BACKINGS,
    progress: Progress | None = None,
    elements: bool = False,
    jobs: int = 1,
    limit: int | None = None,
    seconds: float | None = None,
) -> Matrix:
    """Check every design (default: those of the thread and their variants) in every scenario.

    `progress` is called with a line before each check (with `jobs` processes: when its result is awaited);
    `elements` keeps what `--json` prints; `limit` and `seconds`, of each, as for `check`.  InputError for a name
    that does not exist, or no process at all.
    """
    named = _named(designs)
    cases = [
        (design, platform, scenario, backing)
        for platform, backing in product(platforms, backings)
        for design, scenario in product(named, scenarios)
    ]
    if not cases:
        raise InputError("nothing to check: a list of names is empty")
    if jobs < 1:
        raise InputError(f"a matrix needs at least one process, not {jobs}")
    for _, platform, scenario, backing in cases:
        check_names(platform, backing)
        find_scenario(scenario)
    squares = []
    with spread(partial(_square, elements=elements, limit=limit, seconds=seconds), cases, jobs) as results:
        waiting = iter(results)
        for n, ((name, _), platform, scenario, backing) in enumerate(cases, 1):
            if progress:
                progress(f"{n} of {len(cases)}: {platform} {backing} {name} {find_scenario(scenario).name}")
            squares.append(next(waiting))
    return Matrix(tuple(squares))


def _named(designs: Iterable[Design | str] | None) -> list[tuple[str, str | None]]:
    """Each design by a name of its own, with its text unless it ships: what can be sent to another process."""
    seen: Counter[str] = Counter()
    named: list[tuple[str, str | None]] = []
    for design in map(as_design, shipped() if designs is None else designs):
        seen[design.name] += 1
        name = design.name if seen[design.name] == 1 else f"{design.name} {seen[design.name]}"
        ships = design.name in shipped("all") and design == Design.load(design.name)
        named.append((name, None if ships else design.canonical()))
    return named


def _square(
    where: Where,
    elements: bool = False,
    switches: Switches | None = None,
    limit: int | None = None,
    seconds: float | None = None,
) -> Square:
    (name, text), platform, scenario, backing = where
    design = Design.load(name) if text is None else Design.parse(text, name)
    empty = Square(name, platform, find_scenario(scenario).name, backing)
    try:
        report = check(design, platform, scenario, backing, switches, limit, seconds)
    except NotApplicable as reason:
        return replace(empty, reason=str(reason))
    return replace(
        empty,
        verdicts={v.name: v.verdict for v in report.verdicts.values()},
        states=report.states,
        complete=report.complete,
        element=report.as_json() if elements else None,
    )


_SMALL, _WRITES = ("tiny", "round-trip", "host-io"), ("tiny", "round-trip", "host-io", "host-writes-private")
_LARGE = ("huge-accept", "huge-split", "vmm-punches")
ALTERNATIVES = (  # of the platform, in these scenarios
    ("snp", Switches(rmpupdate_flushes=False), _SMALL),
    ("snp", Switches(rmp_checked_at="fill"), _SMALL),
    ("snp", Switches(identical_keeps_validated=False), _SMALL),
    ("snp", Switches(access_sets_sizem=True), _LARGE),
    ("snp", Switches(head_4k_over_2m=True), _LARGE),
    ("snp", Switches(preempt_count=False), _SMALL),
    ("tdx", Switches(integrity=False), _WRITES),
    ("tdx", Switches(partial_write_erratum=True), _WRITES),
)


def dependence(
    chosen: Switches,
    designs: Iterable[Design | str] | None = None,
    scenarios: Iterable[str] = _SMALL,
    platform: str = "snp",
    jobs: int = 1,
    progress: Progress | None = None,
) -> list[tuple[str, str, str, str, str, str]]:
    """The verdicts that depend on a switch: (design, scenario, backing, property, by default, as chosen).

    Default: the designs of the thread and their variants, in a few small scenarios.  `progress` as for `matrix`.
    """
    every = product(_named(designs), scenarios, BACKINGS)
    cases = [(design, platform, scenario, backing) for design, scenario, backing in every]
    both: list[tuple[Where, Switches | None]] = [
        (case, switches) for case in cases for switches in (None, chosen)
    ]
    changed = []
    with spread(_switched, both, jobs) as results:
        waiting = iter(results)
        for n, ((name, _), _, scenario, backing) in enumerate(cases, 1):
            if progress:
                progress(f"{n} of {len(cases)}: {platform} {backing} {name} {scenario}")
            before, after = next(waiting), next(waiting)
            changed += [
                (name, scenario, backing, prop, verdict, after.verdicts[prop])
                for prop, verdict in before.verdicts.items()
                if after.verdicts[prop] != verdict
            ]
    return changed


def _switched(what: tuple[Where, Switches | None]) -> Square:
    return _square(what[0], switches=what[1])

"""The matrix: every design in every scenario, the worst verdict a cell, in one screen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

from .design import shipped
from .design.calls import BACKINGS
from .machine import PLATFORMS, Switches
from .properties import BY_NAME
from .report import ALWAYS, SOMETIMES, as_design, check
from .scenario import SCENARIOS, InputError, NotApplicable, check_names, find_scenario

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
        """The gravest property violated, "ok", or "n/a"."""
        if self.reason:
            return "n/a"
        return next((name for name in BY_NAME if self.verdicts[name] in (SOMETIMES, ALWAYS)), "ok")

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
class Matrix:
    """Designs down, scenarios across, for each platform and backing asked for."""

    squares: tuple[Square, ...]

    def text(self) -> str:
        """One table a platform and backing; in each cell the gravest violation over the number of states."""
        from .show.text import matrix_text

        return matrix_text(self)

    __str__ = text
    __repr__ = text

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        from .show.html import matrix_html

        return {"text/plain": self.text(), "text/html": matrix_html(self)}


def matrix(
    designs: Iterable[str] | None = None,
    platforms: Iterable[str] = tuple(PLATFORMS),
    scenarios: Iterable[str] = tuple(SCENARIOS),
    backings: Iterable[str] = BACKINGS,
    progress: Callable[[str], Any] | None = None,
    elements: bool = False,
    jobs: int = 1,
) -> Matrix:
    """Check every design (default: those of the thread and their variants) in every scenario.

    `progress` is called with a line before each check (with `jobs` processes: when its result is awaited);
    `elements` keeps what `--json` prints.  InputError for a name that does not exist, or no process at all.
    """
    names = list(designs) if designs is not None else [*shipped("thread"), *shipped("variant")]
    cases = [
        (name, platform, scenario, backing)
        for platform, backing in product(platforms, backings)
        for name, scenario in product(names, scenarios)
    ]
    if not cases:
        raise InputError("nothing to check: a list of names is empty")
    if jobs < 1:
        raise InputError(f"a matrix needs at least one process, not {jobs}")
    for name in names:
        as_design(name)
    for _, platform, scenario, backing in cases:
        check_names(platform, backing)
        find_scenario(scenario)
    squares = []
    with _workers(jobs) as work:
        for case, square in zip(cases, work(partial(_square, elements=elements), cases), strict=True):
            if progress:
                progress(f"{case[1]} {case[3]} {case[0]} {case[2]}")
            squares.append(square)
    return Matrix(tuple(squares))


@contextmanager
def _workers(jobs: int) -> Iterator[Callable[..., Iterable[Square]]]:
    """A map over cases: in this process, or in several (each check is independent)."""
    if jobs == 1:
        yield map
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield pool.map


def _square(
    where: tuple[str, str, str, str], elements: bool = False, switches: Switches | None = None
) -> Square:
    name, platform, scenario, backing = where
    try:
        report = check(as_design(name), platform, scenario, backing, switches)
    except NotApplicable as reason:
        return Square(*where, reason=str(reason))
    verdicts = {v.name: v.verdict for v in report.verdicts.values()}
    return Square(
        *where, verdicts, report.states, report.complete, element=report.as_json() if elements else None
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
    designs: Iterable[str] | None = None,
    scenarios: Iterable[str] = _SMALL,
    platform: str = "snp",
    jobs: int = 1,
) -> list[tuple[str, str, str, str, str, str]]:
    """The verdicts that depend on a switch: (design, scenario, backing, property, by default, as chosen).

    Default: the designs of the thread and their variants, in a few small scenarios.
    """
    names = list(designs) if designs is not None else [*shipped("thread"), *shipped("variant")]
    cases = [(name, platform, *rest) for name, *rest in product(names, scenarios, BACKINGS)]
    with _workers(jobs) as work:
        squares = zip(work(_square, cases), work(partial(_square, switches=chosen), cases), strict=True)
        pairs = list(squares)
    changed = []
    for before, after in pairs:
        name, scenario, backing = before.design, before.scenario, before.backing
        changed += [
            (name, scenario, backing, prop, verdict, after.verdicts[prop])
            for prop, verdict in before.verdicts.items()
            if after.verdicts[prop] != verdict
        ]
    return changed

"""Measure an edit in a session that is open: from moving a line to the verdicts and the run shown, by phase.

    python tests/bench/bench_edit.py [PLATFORM:SCENARIO...]      default: snp and tdx, to-private and to-shared

For every design that ships and has the case, up to EDITS lines are moved, each in a session that holds the design
as it ships: what is known already is what the edit leaves as it was.  Times are of the processor, not of the clock.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from kvmlab.design import Design
from kvmlab.design.files import shipped
from kvmlab.errors import Refusal
from kvmlab.explore import arrays, liveness, paths, rows
from kvmlab.model.step import Learner
from kvmlab.verdict import report, run
from kvmlab.verdict.session import Session

EDITS = 3
CASES = ("snp:to-private", "snp:to-shared", "tdx:to-private", "tdx:to-shared")
# Where a phase's code is; what runs inside "Always" belongs to it, otherwise the innermost phase counts.
PHASES: tuple[tuple[str, Any, str], ...] = (
    ("parse", Design, "move"),
    ("build", run, "build"),
    ("learn", Learner, "_learn"),
    ("search", rows, "search"),
    ("search", arrays, "search"),
    ("livelock", liveness, "livelock"),
    ("Always", report.Report, "_unavoidable"),
    ("trace", paths, "shortest"),
    ("trace", paths, "lasso"),
    ("play", run, "play"),
)
NAMES = tuple(dict.fromkeys(name for name, _, _ in PHASES))


class Clock:
    """Seconds by phase, each counted once."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        now = time.process_time()
        if self._running:
            phase = "Always" if "Always" in self._running else self._running[-1]
            self.spent[phase] = self.spent.get(phase, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """Count what happens meanwhile as `phase`."""
        self._turn()
        self._running.append(phase)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def around(self, phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.inside(phase):
                return work(*args, **kwargs)

        return timed


def edits(design: Design, platform: str, case: str) -> Iterator[tuple[dict[str, float], int]]:
    """Seconds by phase of each edit, and the step calls that it took."""
    session = Session(design, platform, case)
    done = 0
    for line in range(len(session.design.lines("ioctl"))):
        if done == EDITS or design.why_stuck("ioctl", line, 1):
            continue
        session.load(design)
        clock, calls = Clock(), 0
        gc.collect()
        wrapped = [
            patch.object(home, name, clock.around(phase, getattr(home, name))) for phase, home, name in PHASES
        ]
        try:
            for each in wrapped:
                each.start()
            with clock.inside("rest"):
                found = session.move("ioctl", line, 1)
                session.frames  # noqa: B018 - what is looked at
        finally:
            for each in wrapped:
                each.stop()
        if session.problem is None:
            done += 1
            calls = found.graph.learner.calls
            yield clock.spent, calls


def measure(platform: str, case: str) -> None:
    """Print one table: median and worst over all designs, in milliseconds, and as a ratio to the search."""
    found = []
    for name in shipped("all"):
        try:
            mine = list(edits(Design.load(name), platform, case))
        except Refusal:
            continue
        found += mine
    whole = [sum(spent.values()) for spent, _ in found]
    print(
        f"\n{platform}, {case}: {len(found)} edits, step calls {statistics.median(c for _, c in found):,.0f} (median)"
    )
    print(f"  {'':10}{'median ms':>10}{'worst ms':>10}{'/ search':>10}")
    search = [spent["search"] for spent, _ in found]
    fixed = [total - spent["search"] for total, (spent, _) in zip(whole, found, strict=True)]
    columns = {name: [spent.get(name, 0.0) for spent, _ in found] for name in (*NAMES, "rest")}
    for name, seconds in (columns | {"not search": fixed, "all": whole}).items():
        ratio = statistics.median(s / most for s, most in zip(seconds, search, strict=True))
        print(
            f"  {name:10}{1000 * statistics.median(seconds):>10.1f}{1000 * max(seconds):>10.0f}{ratio:>10.2f}"
        )


def main(cases: list[str]) -> None:
    """Measure the cases given."""
    for each in cases or CASES:
        measure(*each.split(":"))


if __name__ == "__main__":
    main(sys.argv[1:])

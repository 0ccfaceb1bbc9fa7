"""Measure what a person waits for: whole commands, and the time from an edit to the verdict.

python tests/bench/bench_cli.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS = 5


def timed(run: Callable[[], object]) -> list[float]:
    """Seconds of each of RUNS runs."""
    seconds = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return seconds


def row(what: str, seconds: list[float]) -> None:
    """Print best and median in milliseconds."""
    print(f"  {what:52}{1000 * min(seconds):>8.0f}{1000 * statistics.median(seconds):>10.0f}")


def command(*arguments: str) -> Callable[[], object]:
    """A whole `python -m kvmlab` command; exit status 1 only says that something bad can happen."""

    def run() -> None:
        full = [sys.executable, "-m", "kvmlab", *arguments]
        done = subprocess.run(full, cwd=ROOT, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise SystemExit(f"kvmlab {' '.join(arguments)} failed:\n{done.stderr}")

    return run


def edits(scenario: str) -> Callable[[], object]:
    """An edit of the design, there and back, in a session that is open."""
    from kvmlab.verdict.session import Session

    session = Session("v8-post-hook", scenario=scenario)
    ours, other = session.design.text, Session("v7-under-lock", scenario=scenario).design.text
    turns = 0

    def run() -> None:
        nonlocal turns
        turns += 1
        session.edit(other if turns % 2 else ours)
        if session.problem:
            raise SystemExit(f"the edit was refused: {session.problem}")

    return run


def main() -> None:
    """Print one plain table."""
    print(f"  {'':52}{'best ms':>8}{'median ms':>10}")
    row("python -c pass", timed(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True)))
    for scenario in ("tiny", "to-private", "to-shared"):
        arguments = ("check", "v8-post-hook", "--scenario", scenario)
        row(f"kvmlab {' '.join(arguments)}", timed(command(*arguments)))
    for scenario in ("tiny", "to-private"):
        row(f"edit to verdict in a session, {scenario}", timed(edits(scenario)))


if __name__ == "__main__":
    main()

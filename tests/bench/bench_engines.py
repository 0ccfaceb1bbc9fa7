"""Measure the engines on one protocol, in one run, against each other and against SPIN.

    python tests/bench/bench_engines.py [P V [ORDER...]]        default: 4 3 0 2

The runs take turns; medians are shown.  State and transition counts must be equal, or it stops.
"""

from __future__ import annotations

import gc
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import promela
import snpconv

from kvmlab.explore import arrays, rows
from kvmlab.model.step import Model

RUNS = 3
Run = Callable[[], tuple[int, int, float]]  # states, transitions, seconds


def of_engine(search: Callable[[Model], object], model: Model) -> Run:
    """A run of one of kvmlab's engines, tables learned anew each time."""

    def run() -> tuple[int, int, float]:
        gc.collect()
        begun = time.perf_counter()
        graph: object = search(model)
        seconds = time.perf_counter() - begun
        return len(graph.states), graph.transitions, seconds  # type: ignore[attr-defined]

    return run


def compile_pan(P: int, V: int, order: int, folder: Path, breadth_first: bool) -> Path:
    """SPIN's verifier for the protocol, compiled with gcc -O2; returns the program's path."""
    steps = snpconv.converter_steps(range(P), order)
    (folder / "model.pml").write_text(promela.write(P, V, steps, check_seq=order != 3))
    pan = folder / ("bfs" if breadth_first else "dfs")
    flags = ["-DBFS"] if breadth_first else ["-DSAFETY"]
    subprocess.run(["spin", "-a", "model.pml"], cwd=folder, check=True, capture_output=True)
    compile_it = ["gcc", "-O2", "-w", "-DNOREDUCE", *flags, "-o", str(pan), "pan.c"]
    subprocess.run(compile_it, cwd=folder, check=True)
    return pan


def run_pan(pan: Path) -> tuple[int, int, float]:
    """States, transitions and seconds of one exhaustive run, as SPIN reports them.

    SPIN counts the initial state as a transition; we do not.
    """
    command = [str(pan), "-E", "-m1000000"]
    said = subprocess.run(command, cwd=pan.parent, check=True, capture_output=True, text=True).stdout

    def number(pattern: str) -> float:
        found = re.search(pattern, said)
        if found is None:
            raise SystemExit(f"SPIN did not report {pattern!r}:\n{said}")
        return float(found.group(1))

    states, transitions = number(r"(\d+) states, stored"), number(r"(\d+) transitions")
    return int(states), int(transitions) - 1, number(r"elapsed time ([\d.]+)")


def contestants(P: int, V: int, order: int, folder: Path) -> dict[str, Run]:
    """Everything that can run here, by name."""
    model = snpconv.build(P, V, order)
    runs = {
        "arrays, no edges": of_engine(arrays.sweep, model),
        "arrays, graph": of_engine(arrays.search, model),
        "dict, graph": of_engine(rows.search, model),
    }
    missing = [tool for tool in ("spin", "gcc") if not shutil.which(tool)]
    if missing:
        print(f"SPIN is left out: {' and '.join(missing)} not found")
        return runs
    for name, breadth_first in (("SPIN -O2 BFS", True), ("SPIN -O2 DFS", False)):
        pan = compile_pan(P, V, order, folder, breadth_first)
        runs[name] = lambda pan=pan: run_pan(pan)  # type: ignore[misc]
    return runs


def measure(runs: dict[str, Run]) -> tuple[int, int, dict[str, float]]:
    """States, transitions, and each contestant's median seconds; SystemExit when counts differ."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    counts: dict[tuple[int, int], str] = {}
    for _ in range(RUNS):
        for name, run in runs.items():
            states, transitions, seconds = run()
            times[name].append(seconds)
            counts.setdefault((states, transitions), name)
    if len(counts) > 1:
        raise SystemExit(f"the engines disagree: {counts}")
    return *next(iter(counts)), {name: statistics.median(seconds) for name, seconds in times.items()}


def table(P: int, V: int, order: int) -> None:
    """Print one plain table: each contestant's rate, and how many times that of the others it is."""
    with tempfile.TemporaryDirectory() as folder:
        states, transitions, seconds = measure(contestants(P, V, order, Path(folder)))
    print(f"\nsnpconv {P} pages, {V} vCPUs, order {order} ({snpconv.NAMES[order]}): ", end="")
    print(f"{states:,} states, {transitions:,} transitions, medians of {RUNS}")
    others = [name for name in ("dict, graph", "SPIN -O2 BFS", "SPIN -O2 DFS") if name in seconds]
    print(f"  {'':18}{'seconds':>9}{'states/s':>12}", *(f"{'x ' + name:>16}" for name in others))
    for name, took in seconds.items():
        ratios = (f"{seconds[other] / took:>16.2f}" for other in others)
        print(f"  {name:18}{took:>9.3f}{states / took:>12,.0f}", *ratios)


def main(arguments: list[str]) -> None:
    """Measure the size and the orders given."""
    P, V, *orders = [int(a) for a in arguments] or [4, 3]
    for order in orders or [0, 2]:
        table(P, V, order)


if __name__ == "__main__":
    main(sys.argv[1:])

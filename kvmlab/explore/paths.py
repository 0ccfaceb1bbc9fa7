"""Shortest runs, and among the shortest the one that changes actors least.

Interleaving noise is what readers of counterexamples complain about; breadth-first search alone returns any
shortest run.  All shortest runs to the violation form a small acyclic graph; the fewest changes come from one
pass over it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from .graph import Graph, Hit
from .liveness import EXIT, FAULT, Cycle, owes

Schedule = tuple[tuple[int, int], ...]  # (actor, choice) step by step


def switches(schedule: Schedule) -> int:
    """Number of times that the actor changes."""
    return sum(a != b for (a, _), (b, _) in pairwise(schedule))


def shortest(graph: Graph, hits: Iterable[Hit]) -> Schedule:
    """Return the shortest schedule that ends in one of `hits` (all equally far) with the fewest switches."""
    wanted: dict[int, list[tuple[int, int] | None]] = {}
    for hit in hits:
        last = None if hit.actor is None or hit.choice is None else (hit.actor, hit.choice)
        wanted.setdefault(hit.state, []).append(last)
    best = _cheapest(graph, set(wanted))
    ends = [
        (
            cost + int(last is not None and before not in (None, last[0])),
            last or (-1, -1),
            before if before is not None else -1,
            state,
        )
        for state, lasts in wanted.items()
        for before, (cost, _) in best[state].items()
        for last in lasts
    ]
    _, last, before, state = min(ends)
    run = _back(best, state, None if before == -1 else before)
    return (*run, last) if last != (-1, -1) else run


_Best = dict[int, dict[int | None, tuple[int, tuple[int, int, int | None] | None]]]


def _cheapest(graph: Graph, targets: set[int]) -> _Best:
    """For each state on a shortest way to `targets` and each last actor: fewest switches, and where from."""
    before = _predecessors(graph, targets)
    best: _Best = {0: {None: (0, None)}}
    for state in sorted(before):  # breadth-first order: sources come before their successors
        ways: dict[int | None, tuple[int, tuple[int, int, int | None] | None]] = {}
        for src, actor, choice in before[state]:
            for last, (cost, _) in best[src].items():
                total = cost + int(last not in (None, actor))
                if actor not in ways or total < ways[actor][0]:
                    ways[actor] = (total, (src, choice, last))
        best[state] = ways
    return best


def _predecessors(graph: Graph, targets: set[int]) -> dict[int, list[tuple[int, int, int]]]:
    """Edges of all shortest paths to `targets`: state -> [(source, actor, choice)]."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    depth, start = graph.depth, graph.start
    at = max(int(depth[t]) for t in targets)
    wanted: set[int] = set()
    while at:
        first, last = bisect_left(depth, at - 1), bisect_left(depth, at)
        wanted |= {t for t in targets if depth[t] == at}
        found |= {state: [] for state in wanted}
        for e in _leading(graph.dst, range(int(start[first]), int(start[last])), wanted):
            src = bisect_right(start, e) - 1
            found[int(graph.dst[e])].append((src, int(graph.actor[e]), graph.labels[graph.label[e]].choice))
        wanted = {src for state in wanted for src, _, _ in found[state]}
        at -= 1
    return found


def _leading(dst: Any, edges: range, wanted: set[int]) -> list[int]:
    """Those among some edges that lead to a wanted state."""
    ends = dst[edges.start : edges.stop]
    if isinstance(ends, list):
        return [edges[k] for k, end in enumerate(ends) if end in wanted]
    import numpy as np

    mark = np.zeros(max(wanted) + 1, bool)
    mark[list(wanted)] = True
    there = mark.take(ends, mode="clip") & (ends >= 0)
    there &= ends < len(mark)
    found: list[int] = (there.nonzero()[0] + edges.start).tolist()
    return found


def _back(best: _Best, state: int, last: int | None) -> Schedule:
    run: list[tuple[int, int]] = []
    while True:
        came = best[state][last][1]
        if came is None:
            return tuple(reversed(run))
        src, choice, earlier = came
        assert last is not None
        run.append((last, choice))
        state, last = src, earlier


def lasso(graph: Graph, cycle: Cycle) -> tuple[Schedule, Schedule]:
    """A shortest stem to the fair cycle, and a round of it that is fair by itself.

    Every actor that owes a step all along the round moves in it.
    """
    entry = min(cycle.states, key=lambda i: (int(graph.depth[i]), i))
    stem = shortest(graph, [Hit(entry, None, None)])
    needed = list(cycle.needed)
    while True:
        loop, states = _round(graph, cycle, entry, needed)
        others = set(range(len(graph.model.actors))) - {a for a, _ in loop} - set(needed)
        left = [a for a in sorted(others) if all(owes(graph, a, i) for i in states)]
        if not left:
            return stem, tuple(loop)
        needed += left


def _round(
    graph: Graph, cycle: Cycle, entry: int, needed: Iterable[int]
) -> tuple[list[tuple[int, int]], set[int]]:
    """A walk from `entry` back to it in which each actor needed moves or, where it may, owes nothing; its states."""
    faults = {n for n, label in enumerate(graph.labels) if FAULT in label.counts}
    here, states = entry, {entry}
    loop: list[tuple[int, int]] = []
    for a in needed:

        def moves(e: int, a: int = a) -> bool:
            if a not in cycle.needed and not owes(graph, a, int(graph.dst[e])):
                return True
            return graph.actor[e] == a and (a != cycle.actor or graph.label[e] in faults)

        run, seen = _nearest(graph, cycle, here, moves)
        here, loop, states = seen[-1], loop + run, states | set(seen)
    if here != entry:
        run, seen = _nearest(graph, cycle, here, lambda e: graph.dst[e] == entry)
        loop, states = loop + run, states | set(seen)
    return loop, states


def _nearest(
    graph: Graph, cycle: Cycle, here: int, wanted: Callable[[int], bool]
) -> tuple[list[tuple[int, int]], list[int]]:
    """Walk inside the cycle from `here` over the nearest edge `wanted`: its steps, and the state after each."""
    came: dict[int, tuple[int, int]] = {}
    todo = deque([here])
    seen = {here}
    while todo:
        i = todo.popleft()
        for e in range(int(graph.start[i]), int(graph.start[i + 1])):
            j = int(graph.dst[e])
            leaves = graph.actor[e] == cycle.actor and EXIT in graph.labels[graph.label[e]].counts
            if j not in cycle.states or leaves:  # to come back from the VMM is no part of the cycle
                continue
            if wanted(e):
                run, states = [_step(graph, e)], [j]
                while i != here:
                    states.append(i)
                    i, back = came[i]
                    run.append(_step(graph, back))
                return run[::-1], states[::-1]
            if j not in seen:
                seen.add(j)
                came[j] = (i, e)
                todo.append(j)
    raise AssertionError("a fair cycle must contain a step of every actor that it needs")


def _step(graph: Graph, e: int) -> tuple[int, int]:
    return int(graph.actor[e]), graph.labels[graph.label[e]].choice

"""Properties of the whole graph: fair cycles, what no finishing run avoids, and the measures.

Small graphs (lists, from the dict engine) are walked in plain Python, large ones (arrays) with scipy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.state import Cell
from .graph import END, Graph, Hit

FAULT, EXIT = "npf", "exits"
AT_THE_END = ("residue", "double")  # measures of a state in which a run is over, not of steps


@dataclass(frozen=True)
class Cycle:
    """A fair strongly connected part of the graph in which one access of `actor` faults again and again."""

    actor: int
    states: frozenset[int]
    needed: tuple[int, ...]  # actors that must move in the cycle for it to be fair


def livelock(graph: Graph) -> Cycle | None:
    """Return the fair fault cycle nearest to the start, or None.

    Weak fairness: an actor inside an operation that can move in every state of the cycle does move.  An idle
    actor owes nothing.  Repeating an access after KVM_EXIT_MEMORY_FAULT is the VMM's policy and no cycle of
    the design, so those edges do not count.
    """
    arrays = _Arrays(graph) if graph.engine == "arrays" else None
    found = [cycle for v in range(len(graph.model.actors)) for cycle in _of_actor(graph, v, arrays)]
    return min(found, key=lambda c: min(c.states), default=None)


def _of_actor(graph: Graph, v: int, arrays: _Arrays | None) -> list[Cycle]:
    family = graph.model.layout.fields.get("acc")
    key = graph.model.actors[v].key
    if not isinstance(family, dict) or key not in family:
        return []
    parts = (
        _parts_lists(graph, v, family[key])
        if arrays is None
        else _parts_arrays(graph, arrays, v, family[key])
    )
    return [cycle for part in parts if (cycle := _fair(graph, v, part)) is not None]


def _labels_counting(graph: Graph, event: str) -> set[int]:
    return {n for n, label in enumerate(graph.labels) if event in label.counts}


def _parts_lists(graph: Graph, v: int, cell: Cell) -> list[frozenset[int]]:
    """Strongly connected parts, within one pending access of `v`, that contain a fault of `v`."""
    faults, exits = _labels_counting(graph, FAULT), _labels_counting(graph, EXIT)
    start, dst, label, actor, mask = graph.start, graph.dst, graph.label, graph.actor, cell.mask
    access = [x & mask for x in graph.states]
    seeds = [
        i
        for i, a in enumerate(access)
        if a
        for e in range(start[i], start[i + 1])
        if label[e] in faults and actor[e] == v
    ]

    def successors(i: int) -> list[int]:
        a = access[i]
        return [
            j
            for e in range(start[i], start[i + 1])
            if (j := dst[e]) != END and access[j] == a and not (actor[e] == v and label[e] in exits)
        ]

    parts = []
    for part in _tarjan(seeds, successors):
        inside = frozenset(part)
        if any(
            label[e] in faults and actor[e] == v and dst[e] in inside
            for i in part
            for e in range(start[i], start[i + 1])
        ):
            parts.append(inside)
    return parts


def _tarjan(roots: Iterable[int], successors: Any) -> list[list[int]]:
    """Strongly connected components reachable from `roots`, without recursion."""
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    components: list[list[int]] = []
    for root in roots:
        if root in number:
            continue
        work = [(root, iter(successors(root)))]
        number[root] = low[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for child in rest:
                if child not in number:
                    number[child] = low[child] = len(number)
                    stack.append(child)
                    on_stack.add(child)
                    work.append((child, iter(successors(child))))
                    break
                if child in on_stack and number[child] < low[node]:
                    low[node] = number[child]
            else:
                work.pop()
                if work and low[node] < low[work[-1][0]]:
                    low[work[-1][0]] = low[node]
                if low[node] == number[node]:
                    component = []
                    while True:
                        top = stack.pop()
                        on_stack.discard(top)
                        component.append(top)
                        if top == node:
                            break
                    components.append(component)
    return components


def _parts_arrays(graph: Graph, arrays: _Arrays, v: int, cell: Cell) -> list[frozenset[int]]:
    import numpy as np
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    access = arrays.bits(cell)
    events = np.array([[FAULT in la.counts, EXIT in la.counts] for la in graph.labels], dtype=bool)
    fault = events[arrays.label, 0] & (arrays.actor == v)
    exits = events[arrays.label, 1] & (arrays.actor == v)
    keep = (arrays.dst != END) & ~exits
    keep &= access[arrays.src] != 0
    keep[keep] = access[arrays.src[keep]] == access[arrays.dst[keep]]
    if not (keep & fault).any():
        return []
    n = len(access)
    matrix = csr_matrix(
        (np.ones(int(keep.sum()), dtype=bool), (arrays.src[keep], arrays.dst[keep])), shape=(n, n)
    )
    _, part = connected_components(matrix, directed=True, connection="strong")
    inside = keep & fault
    inside[inside] = part[arrays.src[inside]] == part[arrays.dst[inside]]
    wanted = np.zeros(int(part.max()) + 1, dtype=bool)
    wanted[part[arrays.src[inside]]] = True
    members = np.flatnonzero(wanted[part])
    members = members[np.argsort(part[members], kind="stable")]
    cuts = np.flatnonzero(np.diff(part[members])) + 1
    return [frozenset(states.tolist()) for states in np.split(members, cuts)]


class _Arrays:
    """A graph's columns as numpy arrays, with the source of each edge."""

    def __init__(self, graph: Graph) -> None:
        import numpy as np

        self.graph = graph
        start = np.asarray(graph.start)
        self.src = np.repeat(np.arange(len(start) - 1), np.diff(start))
        self.dst, self.label, self.actor = (
            np.asarray(graph.dst),
            np.asarray(graph.label),
            np.asarray(graph.actor),
        )

    def bits(self, cell: Cell) -> Any:
        """The bits of one cell in every state, in place within their word."""
        import numpy as np

        states = np.asarray(self.graph.states, dtype=np.uint64)
        column = states if states.ndim == 1 else states[:, cell.shift // 64]
        return column & np.uint64(cell.mask >> (cell.shift // 64 * 64))


def _fair(graph: Graph, v: int, part: frozenset[int]) -> Cycle | None:
    """The cycle through all of `part`, if every actor that owes a step all along takes one."""
    moves = {graph.actor[e] for i in part for e in _edges(graph, i) if graph.dst[e] in part}
    needed = [v]
    for a in range(len(graph.model.actors)):
        if a == v or not all(owes(graph, a, i) for i in part):
            continue
        if a not in moves:
            return None
        needed.append(a)
    return Cycle(v, part, tuple(needed))


def _edges(graph: Graph, i: int) -> range:
    return range(int(graph.start[i]), int(graph.start[i + 1]))


def owes(graph: Graph, a: int, i: int) -> bool:
    """Whether actor `a` is inside an operation in state `i` and can move."""
    pc = graph.learner.pc[a].get(graph.packed(i))
    return not graph.model.actors[a].program[pc].idle and any(graph.actor[e] == a for e in _edges(graph, i))


def finishes(graph: Graph) -> bool:
    """Whether any run ends: everybody idle, or a fatal step."""
    return any(graph.quiet) or any(label.fatal for label in graph.labels)


def avoidable(graph: Graph, prop: str) -> bool:
    """Whether some run that finishes (all idle, or a fatal end) never violates `prop`."""
    bad = {n for n, label in enumerate(graph.labels) if prop in label.violations}
    other_end = {n for n, label in enumerate(graph.labels) if label.fatal and n not in bad}
    bad_states = {i for i, found in graph.quiet_found.items() if prop in found[0]}
    if graph.engine == "arrays":
        return _avoidable_arrays(graph, bad, other_end, bad_states)
    seen = {0}
    todo = [0]
    while todo:
        i = todo.pop()
        if graph.quiet[i] and i not in bad_states:
            return True
        if i in bad_states:
            continue
        for e in _edges(graph, i):
            n, j = graph.label[e], graph.dst[e]
            if n in other_end:
                return True
            if n not in bad and j not in seen:
                seen.add(j)
                todo.append(j)
    return False


def _avoidable_arrays(graph: Graph, bad: set[int], other_end: set[int], bad_states: set[int]) -> bool:
    import numpy as np

    arrays = _Arrays(graph)
    quiet = np.asarray(graph.quiet, dtype=bool).copy()
    banned = np.zeros(len(quiet), dtype=bool)
    banned[list(bad_states)] = True
    kinds = len(graph.labels)
    is_bad = np.isin(np.arange(kinds), list(bad))[arrays.label]
    ends = np.isin(np.arange(kinds), list(other_end))[arrays.label]
    reached = reach(len(quiet), arrays.src, arrays.dst, ~is_bad & (arrays.dst != END) & ~banned[arrays.src])
    return bool((quiet & ~banned & reached).any() or (ends & reached[arrays.src] & ~banned[arrays.src]).any())


def reach(n: int, src: Any, dst: Any, keep: Any, roots: Sequence[int] = (0,)) -> Any:
    """Boolean array: the states reachable from `roots` over the edges in the mask `keep`."""
    import numpy as np
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import breadth_first_order

    extra = len(roots)  # one more node leads to every root
    rows = np.concatenate([src[keep], np.full(extra, n)])
    cols = np.concatenate([dst[keep], np.asarray(roots)])
    matrix = csr_matrix((np.ones(len(rows), dtype=bool), (rows, cols)), shape=(n + 1, n + 1))
    reached = np.zeros(n + 1, dtype=bool)
    reached[breadth_first_order(matrix, n, return_predecessors=False)] = True
    return reached[:n]


def first_edges(graph: Graph, event: str) -> list[Hit]:
    """The edges nearest to the start that count `event`; empty when none does."""
    counting = _labels_counting(graph, event)
    found: list[Hit] = []
    for i in range(len(graph.depth)):  # breadth-first order, so the first depth found is the least
        if found and graph.depth[i] > graph.depth[found[0].state]:
            break
        for e in _edges(graph, i):
            if int(graph.label[e]) in counting:
                found.append(Hit(i, int(graph.actor[e]), graph.labels[graph.label[e]].choice))
    return found


def measures(graph: Graph, names: Iterable[str]) -> dict[str, dict[str, int | None]]:
    """Least and most of each measure over all finishing runs; `most` is None where a cycle contains one."""
    import numpy as np
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    arrays = _Arrays(graph)
    n = len(graph.depth)
    alive = arrays.dst != END
    matrix = csr_matrix(
        (np.ones(int(alive.sum()), dtype=bool), (arrays.src[alive], arrays.dst[alive])), shape=(n, n)
    )
    _, part = connected_components(matrix, directed=True, connection="strong")
    answer: dict[str, dict[str, int | None]] = {}
    for name in names:
        weight = np.array([label.counts.count(name) for label in graph.labels] or [0])[arrays.label]
        if name in AT_THE_END:
            per_state = [
                graph.quiet_found.get(i, ((), ()))[1].count(name)
                for i in np.flatnonzero(np.asarray(graph.quiet)).tolist()
            ]
            answer[name] = {"least": min(per_state, default=0), "most": max(per_state, default=0)}
            continue
        src, dst = arrays.src, arrays.dst
        in_cycle = alive & (weight > 0)
        in_cycle[in_cycle] = part[src[in_cycle]] == part[dst[in_cycle]]
        most = None if in_cycle.any() else _most(part, arrays, alive, weight)
        answer[name] = {"least": _least(graph, arrays, alive, weight), "most": most}
    return answer


def _most(part: Any, arrays: _Arrays, alive: Any, weight: Any) -> int:
    """Longest path by weight over the graph of strongly connected parts, by relaxation."""
    import numpy as np

    best = np.zeros(int(part.max()) + 1, dtype=np.int64)
    cross = alive.copy()
    cross[alive] = part[arrays.src[alive]] != part[arrays.dst[alive]]
    ends = int((weight * ~alive).max(initial=0))
    if not weight[cross].any():
        return ends
    tail, head, w = part[arrays.src[cross]], part[arrays.dst[cross]], weight[cross]
    while True:
        better = best.copy()
        np.maximum.at(better, head, best[tail] + w)
        if (better == best).all():
            return max(int(best.max()), ends)
        best = better


def _least(graph: Graph, arrays: _Arrays, alive: Any, weight: Any) -> int | None:
    """Fewest events on a finishing run, or None if no run finishes."""
    import numpy as np

    quiet = np.asarray(graph.quiet, dtype=bool)
    roots: Any = np.array([0])
    events, counts_and_ends = 0, False
    while True:
        reached = reach(len(quiet), arrays.src, arrays.dst, alive & (weight == 0), roots)
        ends = reached[arrays.src] & ~alive
        if counts_and_ends or (quiet & reached).any() or (ends & (weight == 0)).any():
            return events
        counts_and_ends = bool(ends.any())
        step = alive & (weight > 0) & reached[arrays.src]
        if not counts_and_ends and reached[arrays.dst[step]].all():
            return None  # one event more leads nowhere new
        roots = np.union1d(np.flatnonzero(reached), arrays.dst[step])
        events += 1

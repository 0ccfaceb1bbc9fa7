"""Properties of the whole graph: fair cycles, what no finishing run avoids, and the measures.

Small graphs (lists, from the dict engine) are walked in plain Python, large ones (arrays) with scipy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..model.state import WORD, Cell
from .graph import END, Graph, Hit

FAULT, EXIT = "npf", "exits"
FEW = 1_000  # states that are walked one by one before all are taken at once
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
    family = graph.model.layout.fields.get("acc")
    pending = family if isinstance(family, dict) else {}
    arrays = _Arrays(graph) if graph.engine == "arrays" else None
    found = []
    for v, actor in enumerate(graph.model.actors):
        if (cell := pending.get(actor.key)) is None:
            continue
        if arrays is not None:
            found += arrays.fair(v, cell)
        else:
            found += [c for part in _parts(graph, v, cell) if (c := _fair(graph, v, part)) is not None]
    return min(found, key=lambda c: min(c.states), default=None)


def _labels_counting(graph: Graph, event: str) -> set[int]:
    return {n for n, label in enumerate(graph.labels) if event in label.counts}


def _parts(graph: Graph, v: int, cell: Cell) -> list[frozenset[int]]:
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


class _Arrays:
    """A graph's columns as numpy arrays; edges lie in the order of their sources."""

    def __init__(self, graph: Graph) -> None:
        import numpy as np

        self.graph, self.start = graph, np.asarray(graph.start)
        self.degree = np.diff(self.start)
        self.dst, self.label, self.actor = map(np.asarray, (graph.dst, graph.label, graph.actor))

    @cached_property
    def src(self) -> Any:
        """The source of each edge."""
        import numpy as np

        return self.of_source(np.arange(len(self.degree)))

    def of_source(self, values: Any) -> Any:
        """For each edge, the value that its source has among `values`."""
        import numpy as np

        return np.repeat(values, self.degree)

    def counting(self, event: str) -> Any:
        """For each label, whether it counts `event`."""
        import numpy as np

        return np.array([event in label.counts for label in self.graph.labels] or [False])

    def bits(self, cell: Cell, states: Any = slice(None)) -> Any:
        """The code of one cell in some states, or in all."""
        import numpy as np

        words = np.asarray(self.graph.states, dtype=np.uint64)[states].reshape(
            -1, self.graph.model.layout.words
        )
        code = words[:, cell.shift // WORD] >> np.uint64(cell.shift % WORD) & np.uint64((1 << cell.bits) - 1)
        return code.astype(np.uint8 if cell.bits <= 8 else np.uint32)

    def matrix(self, keep: Any, roots: Any = ()) -> Any:
        """The kept edges as a sparse matrix; with `roots`, one more node leads to each of them."""
        import numpy as np
        from scipy.sparse import csr_matrix

        before = np.zeros(len(keep) + 1, np.int32)
        np.cumsum(keep, out=before[1:])
        ends, first = self.dst[keep], before.take(self.start)
        if len(roots):
            ends, first = np.concatenate([ends, roots]), np.append(first, len(ends) + len(roots))
        n = len(first) - 1
        # Of bools scipy makes numbers, and one edge of parallel ones; with those its search for parts may never end.
        return csr_matrix((np.ones(len(ends), bool), ends.astype(np.int32, copy=False), first), shape=(n, n))

    def reach(self, keep: Any, roots: Any = (0,)) -> Any:
        """For each state, whether it can be reached from `roots` over the kept edges."""
        import numpy as np
        from scipy.sparse.csgraph import breadth_first_order

        n = len(self.degree)
        reached = np.zeros(n + 1, bool)
        reached[breadth_first_order(self.matrix(keep, roots), n, return_predecessors=False)] = True
        return reached[:n]

    def parts(self, keep: Any) -> Any:
        """For each state, the number of its strongly connected part over the kept edges."""
        from scipy.sparse.csgraph import connected_components

        return connected_components(self.matrix(keep), directed=True, connection="strong")[1]

    def around(self, v: int, cell: Cell) -> Any:
        """For each state, which part with a fault of `v` in it, within one pending access, it is in; -1 for none."""
        import numpy as np

        access = self.bits(cell)
        pending = self.of_source(access)
        keep = access.take(self.dst) == pending
        keep &= pending != 0
        keep &= self.dst != END
        mine = (self.actor == v).nonzero()[0]
        label = self.label.take(mine)
        keep[mine[self.counting(EXIT).take(label)]] = False
        fault = mine[self.counting(FAULT).take(label) & keep.take(mine)]
        if not len(fault):
            return np.full(len(access), -1)
        part = self.parts(keep)
        found = part.take(np.searchsorted(self.start, fault, side="right") - 1)
        found = np.unique(found[found == part.take(self.dst.take(fault))])
        number = np.full(int(part.max()) + 1, -1)
        number[found] = np.arange(len(found))
        return number.take(part)

    def fair(self, v: int, cell: Cell) -> list[Cycle]:
        """The fair one among the parts with a fault of `v` that is nearest to the start, if there is one."""
        inside = self.around(v, cell)
        members = (inside >= 0).nonzero()[0]
        if not len(members):
            return []
        part = inside.take(members)
        fair, needed = self._moved(v, members, inside)
        best = part[fair.take(part)]
        if not len(best):
            return []
        others = [a for a in needed[:, best[0]].nonzero()[0].tolist() if a != v]
        return [Cycle(v, frozenset(members[part == best[0]].tolist()), (v, *others))]

    def _moved(self, v: int, members: Any, inside: Any) -> tuple[Any, Any]:
        """For each part: is it fair to all but `v`?  For each (actor, part): does it owe a step all along?"""
        import numpy as np

        model, degree = self.graph.model, self.degree.take(members)
        edge = np.repeat(self.start.take(members) - np.cumsum(degree) + degree, degree)
        edge += np.arange(len(edge))
        source, actor, end = (
            np.repeat(np.arange(len(members)), degree),
            self.actor.take(edge),
            self.dst.take(edge),
        )
        owes = np.zeros((len(model.actors), len(members)), bool)
        owes[actor, source] = True
        for a, cell in enumerate(self.graph.learner.pc):
            idle = np.array([instr.idle for instr in model.actors[a].program])
            owes[a] &= ~idle.take(self.bits(cell, members))
        part = inside.take(members)
        parts = int(part.max()) + 1
        needed = np.array([np.bincount(part, ~owed, parts) == 0 for owed in owes])
        moves = np.zeros((len(model.actors), parts), bool)
        stays = (end != END) & (inside.take(end) == part.take(source))
        moves[actor[stays], part.take(source[stays])] = True
        moves[v] = True
        return (moves | ~needed).all(axis=0), needed


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


def _some(column: Any, edges: range) -> list[int]:
    """What a column says of some edges."""
    part = column[edges.start : edges.stop]
    found: list[int] = part if isinstance(part, list) else part.tolist()
    return found


def owes(graph: Graph, a: int, i: int) -> bool:
    """Whether actor `a` is inside an operation in state `i` and can move."""
    pc = graph.learner.pc[a].get(graph.packed(i))
    return not graph.model.actors[a].program[pc].idle and any(graph.actor[e] == a for e in _edges(graph, i))


def finishes(graph: Graph) -> bool:
    """Whether any run ends: everybody idle, or a fatal step."""
    return len(graph.calm()) > 0 or any(label.fatal for label in graph.labels)


def avoidable(graph: Graph, prop: str) -> bool:
    """Whether some run that finishes (all idle, or a fatal end) never violates `prop`."""
    bad = {n for n, label in enumerate(graph.labels) if prop in label.violations}
    other_end = {n for n, label in enumerate(graph.labels) if label.fatal and n not in bad}
    bad_states = {i for i, found in graph.quiet_found.items() if prop in found[0]}
    seen = {0}
    todo = [0]
    while todo:
        i = todo.pop()
        if graph.quiet[i] and i not in bad_states:
            return True
        if i in bad_states:
            continue
        out = _edges(graph, i)
        for n, j in zip(*(_some(column, out) for column in (graph.label, graph.dst)), strict=True):
            if n in other_end:
                return True
            if n not in bad and j not in seen:
                seen.add(j)
                todo.append(j)
        if graph.engine == "arrays" and len(seen) > FEW:
            return _avoidable_arrays(graph, bad, other_end, bad_states)
    return False


def _avoidable_arrays(graph: Graph, bad: set[int], other_end: set[int], bad_states: set[int]) -> bool:
    import numpy as np

    arrays = _Arrays(graph)
    banned = np.zeros(len(arrays.degree), dtype=bool)
    banned[list(bad_states)] = True
    is_bad, ends = (np.isin(np.arange(len(graph.labels)), list(some)) for some in (bad, other_end))
    reached = (
        arrays.reach(~is_bad.take(arrays.label) & (arrays.dst != END) & ~arrays.of_source(banned)) & ~banned
    )
    return bool((graph.quiet & reached).any() or (ends.take(arrays.label) & arrays.of_source(reached)).any())


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

    arrays = _Arrays(graph)
    alive = arrays.dst != END
    part = arrays.parts(alive)
    answer: dict[str, dict[str, int | None]] = {}
    for name in names:
        weight = np.array([label.counts.count(name) for label in graph.labels] or [0])[arrays.label]
        if name in AT_THE_END:
            per_state = [graph.quiet_found.get(i, ((), ()))[1].count(name) for i in graph.calm()]
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
        reached = arrays.reach(alive & (weight == 0), roots)
        ends = reached[arrays.src] & ~alive
        if counts_and_ends or (quiet & reached).any() or (ends & (weight == 0)).any():
            return events
        counts_and_ends = bool(ends.any())
        step = alive & (weight > 0) & reached[arrays.src]
        if not counts_and_ends and reached[arrays.dst[step]].all():
            return None  # one event more leads nowhere new
        roots = np.union1d(np.flatnonzero(reached), arrays.dst[step])
        events += 1

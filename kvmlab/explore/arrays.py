"""The array engine: the breadth-first search of `rows.search`, on whole levels of states at once.

States are rows of uint64 words, learned rows are gathered (`tables`), and a hash table that compares whole
states numbers them (`dedup`).  States, edges and labels get the numbers that the dict engine gives them, so
the graphs of the two engines are equal column by column.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.step import Learner, Model
from .dedup import MULTIPLIERS, Multipliers, Numbers, StateSet, Words, where
from .graph import END, Graph, Hit, Label, Watch
from .levels import LevelSpace, chunks
from .tables import INSIDE, Edges, QuietRows, Rows, split


def search(
    model: Model,
    limit: int | None = None,
    graph: bool = True,
    learner: Learner | None = None,
    multipliers: Multipliers = MULTIPLIERS,
    watch: Watch | None = None,
    begun: Graph | None = None,
    shun: str | None = None,
) -> Graph:
    """Explore `model` completely, or until `limit` states are known (then the graph is not `complete`).

    With `graph=False` only states and shortest violations are kept, as a `LevelSpace` (see `sweep`).
    `learner` lends rows that it has learned already.  The hash's `multipliers` can change the time taken,
    never the result.  `watch` is told before each chunk how many states are known.  Goes on from a graph that the
    dict engine has `begun`; `shun` as there.
    """
    if begun is None:
        begun = Graph(model, learner or Learner(model), states=[model.initial], depth=[0], start=[0])
    return _Search(begun, limit, graph, multipliers, watch, shun).run()


def sweep(model: Model, limit: int | None = None, learner: Learner | None = None) -> LevelSpace:
    """Explore `model` as `search` does, but keep no edges: for millions of states."""
    space = search(model, limit, False, learner)
    assert isinstance(space, LevelSpace)
    return space


class _Search:
    """One search: the states, what was found, and the edges' columns in pieces, a piece a chunk."""

    def __init__(
        self,
        begun: Graph,
        limit: int | None,
        graph: bool,
        multipliers: Multipliers,
        watch: Watch | None,
        shun: str | None,
    ) -> None:
        self.limit, self.keep_edges, self.watch = limit, graph, watch
        model, learner = begun.model, begun.learner
        self.rows, self.quiet_rows = Rows(learner, shun), QuietRows(learner)
        self.seen = StateSet(model.layout.words, multipliers)
        self.seen.tail(len(begun.states))[:] = split(begun.states, self.seen.words)
        self.seen.intern(len(begun.states))
        self.space = LevelSpace(model, learner, engine="levels", rows=self.rows, edges=len(begun.dst))
        self.space.hits, self.space.hit_depth, self.space.quiet_found = (
            begun.hits,
            begun.hit_depth,
            begun.quiet_found,
        )
        starts = np.flatnonzero(np.diff(begun.depth, prepend=-1))
        self.space.levels = [*starts.tolist(), len(begun.states)]
        numbers = [self.rows.labels.setdefault(label, len(self.rows.labels)) for label in begun.labels]
        self.degrees: list[NDArray[np.int32]] = [np.diff(begun.start).astype(np.int32)]
        self.actors: list[NDArray[np.int8]] = [np.array(begun.actor, np.int8)]
        self.ends: list[NDArray[np.int32]] = [np.array(begun.dst, np.int32)]
        self.labels: list[NDArray[np.int16]] = [np.array([numbers[n] for n in begun.label], np.int16)]
        self.quiet: list[NDArray[np.bool_]] = [np.array(begun.quiet, np.bool_)]

    def run(self) -> Graph:
        seen, space = self.seen, self.space
        low, high = space.levels[-2:]
        depth = len(space.levels) - 2
        while low < high:
            for start, stop in chunks(low, high):
                told = self.watch is not None and bool(self.watch(seen.n))
                cut = self.chunk(start, stop, depth, told)
                if cut is not None:
                    space.levels[-1] = seen.n = cut
                    space.complete = False
                    return self.result()
            low, high, depth = high, seen.n, depth + 1
            space.levels.append(high)
        space.levels.pop()
        return self.result()

    def chunk(self, start: int, stop: int, depth: int, told: bool) -> int | None:
        """Expand states `start : stop`; returns where to cut when the limit was passed, or if `told` to stop."""
        rows, seen = self.rows, self.seen
        states = seen.states[start:stop]
        row = rows.find(states)
        flags = np.bitwise_or.reduce(rows.flags.a.take(row), axis=0)
        edges = rows.edges(row)
        ends = self.follow(states, edges)
        cut = self.cut(edges, ends)
        if cut is None and told:
            cut = stop - start - 1
        if cut is not None:
            stop, flags = start + cut + 1, flags[: cut + 1]
            last = int(np.searchsorted(edges.source, cut, side="right"))
            row, edges, ends = row[:, : cut + 1], Edges(*(column[:last] for column in edges)), ends[:last]
        self.note_violations(start, depth, edges)
        self.note_states(start, depth, states, flags)
        self.space.edges += len(ends)
        if self.keep_edges:
            self.degrees.append(rows.count.a.take(row).sum(axis=0))
            self.actors.append(edges.actor.astype(np.int8))
            self.ends.append(ends.astype(np.int32))
            self.labels.append(rows.label.a.take(edges.outcome))
            self.quiet.append(flags & INSIDE == 0)
        return None if cut is None else stop

    def follow(self, states: Words, edges: Edges) -> Numbers:
        """Make the successors, and number them: END after a fatal step."""
        rows, seen = self.rows, self.seen
        source, outcome = edges.source, edges.outcome
        if not rows.any_over:
            rows.successors(states, source, outcome, seen.tail(len(source)))
            return seen.intern(len(source))
        live = where(~rows.over.a.take(outcome))
        rows.successors(states, source.take(live), outcome.take(live), seen.tail(len(live)))
        ends = np.full(len(source), END, np.int64)
        ends[live] = seen.intern(len(live))
        return ends

    def cut(self, edges: Edges, ends: Numbers) -> int | None:
        """The source (in its chunk) that made the states known exceed the limit."""
        if self.limit is None or self.seen.n <= self.limit:
            return None
        passed = where(ends == self.limit)
        return int(edges.source[passed[0]]) if self.limit > 0 else 0

    def note_violations(self, start: int, depth: int, edges: Edges) -> None:
        """Record the violations on edges, unless all their properties have shorter ones already."""
        known = self.space.hit_depth
        alarm = np.zeros(len(self.rows.labels), np.bool_)
        labels = list(self.rows.labels)
        for number, (violations, _, _, _) in enumerate(labels):
            alarm[number] = any(known.get(prop, depth + 1) > depth for prop in violations)
        if not alarm.any():
            return
        label = self.rows.label.a.take(edges.outcome)
        for e in where(alarm.take(label)).tolist():
            found = labels[label[e]]
            hit = Hit(start + int(edges.source[e]), int(edges.actor[e]), found.choice)
            for prop in found.violations:
                self.space.hit(prop, depth + 1, hit)

    def note_states(self, start: int, depth: int, states: Words, flags: NDArray[np.uint8]) -> None:
        """Record deadlocks, and what the watch finds in quiet states."""
        space = self.space
        if space.hit_depth.get("deadlock", depth) >= depth:
            for i in where(flags == INSIDE).tolist():
                space.hit("deadlock", depth, Hit(start + i, None, None))
        if space.model.quiet is None:
            return
        calm = where(flags & INSIDE == 0)
        if not len(calm):
            return
        number = self.quiet_rows.find(states.take(calm, axis=0))
        for k in where(number).tolist():
            found, i = self.quiet_rows.found[number[k]], start + int(calm[k])
            if self.keep_edges:
                space.quiet_found[i] = found
            for prop in found[0]:
                space.hit(prop, depth, Hit(i, None, None))

    def result(self) -> Graph:
        """The graph, or the levels without edges."""
        space, n = self.space, self.seen.n
        states: Any = self.seen.close()
        space.states = states[:, 0] if self.seen.words == 1 else states
        if not self.keep_edges:
            return space
        graph = Graph(space.model, space.learner, space.complete, space.states, engine="arrays")
        graph.hits, graph.hit_depth, graph.quiet_found = space.hits, space.hit_depth, space.quiet_found
        columns: Any = graph
        columns.depth = np.repeat(np.arange(len(space.levels) - 1, dtype=np.int32), np.diff(space.levels))
        columns.start = np.concatenate([[0], np.cumsum(np.concatenate(self.degrees))])
        columns.actor, columns.quiet = np.concatenate(self.actors), np.concatenate(self.quiet)
        columns.dst = np.concatenate(self.ends)
        if not space.complete:
            columns.dst[columns.dst >= n] = END
        columns.label, graph.labels = _by_first_use(np.concatenate(self.labels), list(self.rows.labels))
        return graph


def _by_first_use(label: NDArray[np.int16], labels: list[Label]) -> tuple[Any, list[Label]]:
    """Renumber labels in the order in which edges use them; those that no edge uses are left out."""
    first = np.full(len(labels), len(label))
    first[label[::-1]] = np.arange(len(label))[::-1]
    order = [k for k in np.argsort(first, kind="stable").tolist() if first[k] < len(label)]
    number = np.zeros(len(labels), np.int16)
    number[order] = np.arange(len(order))
    return number.take(label), [labels[k] for k in order]

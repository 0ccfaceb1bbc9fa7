"""What the array engine keeps of millions of states: the states level by level, and no edges.

A shortest run is found backwards: the states one level up are expanded again, all at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .dedup import hash_words, where
from .graph import Graph, joined
from .tables import Rows, split

CHUNK = 1 << 14  # states expanded at once: the temporaries stay in the processor's cache


def chunks(low: int, high: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most CHUNK that make up `low : high`."""
    for start in range(low, high, CHUNK):
        yield start, min(start + CHUNK, high)


@dataclass
class LevelSpace(Graph):
    """A Graph without columns of edges, depth and quiet: states `levels[d] : levels[d + 1]` have depth d.

    `hits` and `hit_depth` are those of a Graph.
    """

    rows: Rows | None = None
    levels: list[int] = field(default_factory=list)
    edges: int = 0

    @property
    def transitions(self) -> int:
        """Number of edges that were followed, fatal ones included."""
        return self.edges

    @property
    def max_depth(self) -> int:
        """Steps to the farthest state."""
        return len(self.levels) - 2

    def depth_of(self, i: int) -> int:
        """Steps to state number `i`."""
        return bisect_right(self.levels, i) - 1

    def predecessors(self, d: int, targets: set[int]) -> list[tuple[int, int, int, int]]:
        """Every edge (source, actor, choice, target) from level `d - 1` into `targets`; states are packed."""
        if not targets:
            return []
        rows = self.rows or Rows(self.learner)
        hashes = np.sort(hash_words(split(targets, rows.words)))
        labels = list(rows.labels)
        found = []
        for low, high in chunks(self.levels[d - 1], self.levels[d]):
            states = np.asarray(self.states[low:high]).reshape(-1, rows.words)
            edges = rows.edges(rows.find(states))
            after = np.empty((len(edges.source), rows.words), np.uint64)
            rows.successors(states, edges.source, edges.outcome, after)
            h = hash_words(after)
            near = hashes.take(np.searchsorted(hashes, h), mode="clip") == h
            near &= ~rows.over.a.take(edges.outcome)
            for e in where(near).tolist():
                y = joined(after[e])
                if y in targets:
                    choice = labels[rows.label.a[edges.outcome[e]]].choice
                    found.append((joined(states[edges.source[e]]), int(edges.actor[e]), choice, y))
        return found

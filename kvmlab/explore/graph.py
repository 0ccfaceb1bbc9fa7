"""What a search found: states with their depth, labelled edges, and the first place of each violation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from ..model.state import WORD
from ..model.step import Learner, Model

# Is told how many states are known.  What it raises ends the search; if it says True, the search stops where it is.
Watch = Callable[[int], bool | None]
END = -1  # the successor of a fatal edge: the run is over


def joined(state: Any) -> int:
    """A packed state as one Python int, from a number or from a row of 64-bit words, low to high."""
    if not getattr(state, "shape", ()):
        return int(state)
    return sum(word << (WORD * w) for w, word in enumerate(state.tolist()))


class Label(NamedTuple):
    """What an edge says: properties it violates, measures it counts, its choice number, whether it is fatal."""

    violations: tuple[str, ...]
    counts: tuple[str, ...]
    choice: int
    fatal: bool


class Hit(NamedTuple):
    """A shortest violation: in `state` (an index), by the edge of `actor` with `choice`, or (None) in the state."""

    state: int
    actor: int | None
    choice: int | None


@dataclass
class Graph:
    """All reachable states and edges of a model, in breadth-first order.

    `states[i]` is the packed state, `depth[i]` its distance; edges of state i are `start[i]:start[i+1]` in
    `actor`, `dst` (END after a fatal step) and `label` (an index into `labels`).  `quiet[i]`: nobody is inside
    an operation.  `hits` holds, for each property, every violation at the smallest depth.  The columns are
    lists (dict engine) or numpy arrays (array engine).  Of a graph that is only `begun`, the states of the last
    level have no edges yet.
    """

    model: Model
    learner: Learner
    complete: bool = True
    states: Sequence[Any] = field(default_factory=list)
    depth: Sequence[int] = field(default_factory=list)
    start: Sequence[int] = field(default_factory=list)
    actor: Sequence[int] = field(default_factory=list)
    dst: Sequence[int] = field(default_factory=list)
    label: Sequence[int] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    quiet: Sequence[bool] = field(default_factory=list)
    quiet_found: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    hits: dict[str, list[Hit]] = field(default_factory=dict)
    hit_depth: dict[str, int] = field(default_factory=dict)
    engine: str = "dict"
    begun: bool = False

    @property
    def transitions(self) -> int:
        """Number of edges, fatal ones included."""
        return len(self.dst)

    @property
    def max_depth(self) -> int:
        """Steps to the farthest state."""
        return int(self.depth[-1]) if len(self.depth) else 0

    def packed(self, i: int) -> int:
        """The packed state number `i` as one Python int."""
        return joined(self.states[i])

    def calm(self) -> Sequence[int]:
        """The numbers of the quiet states."""
        if isinstance(self.quiet, list):
            return [i for i, quiet in enumerate(self.quiet) if quiet]
        found: list[int] = cast(Any, self.quiet).nonzero()[0].tolist()
        return found

    def hit(self, prop: str, depth: int, hit: Hit) -> None:
        """Note a violation found at `depth` steps; only the shortest are kept."""
        known = self.hit_depth.get(prop)
        if known is None or depth < known:
            self.hit_depth[prop] = depth
            self.hits[prop] = [hit]
        elif depth == known:
            self.hits[prop].append(hit)

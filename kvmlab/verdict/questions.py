"""What a scenario asks besides the properties: `never: EXPR` and `sometimes: EXPR`, over all reachable states."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..explore.graph import Graph, Hit
from ..machine.expressions import parse_expression
from ..model.state import WORD, Cell


class Asked(NamedTuple):
    """One question: `word` (never or sometimes), the expression, and the nearest states in which it is true."""

    word: str
    text: str
    hits: tuple[Hit, ...]

    @property
    def depth(self) -> bool:
        """Whether some run gets there."""
        return bool(self.hits)

    def broken(self, complete: bool) -> bool:
        """Whether what is asked for does not hold: never, and some run gets there; sometimes, and none does."""
        return bool(self.hits) if self.word == "never" else complete and not self.hits


def ask(graph: Graph, word: str, text: str) -> Asked:
    """Look for states in which an expression is true; InputError for what the machine does not have."""
    import numpy as np

    from ..explore.tables import split

    layout = graph.model.layout
    states: Any = graph.states
    words = (
        split(states, layout.words)
        if isinstance(states, list)
        else np.asarray(states).reshape(-1, layout.words)
    )

    def test(cell: Cell, codes: frozenset[int]) -> Any:
        column, shift = words[:, cell.shift // WORD], cell.shift % WORD
        values = (column >> np.uint64(shift)) & np.uint64((1 << cell.bits) - 1)
        return np.isin(values, [code >> cell.shift for code in codes])

    quiet = np.asarray(graph.quiet, dtype=bool)
    true = parse_expression(text).holds(layout, test, quiet)
    found = np.flatnonzero(true).tolist()
    nearest = [i for i in found if graph.depth[i] == graph.depth[found[0]]]
    return Asked(word, text, tuple(Hit(i, None, None) for i in nearest))

"""A hardware rule as a table that is checked to be total and unambiguous."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import product
from typing import Any

ANY = object()


class Rules:
    """A decision table: every combination of inputs is decided by exactly one row.

    `source` is the spec's title and section; `inputs` maps each column to its possible values; a row is
    one value (or ANY, or a frozenset of values) a column, then the outcome.  ValueError at construction when
    a combination has no row or two.
    """

    def __init__(
        self,
        source: str,
        inputs: Mapping[str, Sequence[Any]],
        rows: Sequence[tuple[Any, ...]],
        outcome: str = "outcome",
    ) -> None:
        self.source, self.inputs, self.rows, self.outcome = source, dict(inputs), tuple(rows), outcome
        self._answers: dict[tuple[Any, ...], Any] = {}
        for row in self.rows:
            if len(row) != len(self.inputs) + 1:
                raise ValueError(
                    f"{source}: row {row} does not have {len(self.inputs)} inputs and an outcome"
                )
        decided: dict[tuple[Any, ...], list[Any]] = {}
        for row in self.rows:
            for combination in product(*map(meant, row, self.inputs.values())):
                decided.setdefault(combination, []).append(row[-1])
        for combination in product(*self.inputs.values()):
            outcomes = decided.get(combination, [])
            if len(outcomes) != 1:
                named = ", ".join(f"{k}={v}" for k, v in zip(self.inputs, combination, strict=True))
                raise ValueError(f"{source}: {len(outcomes)} rows decide {named}; exactly one must")
            self._answers[combination] = outcomes[0]

    def __call__(self, **inputs: Any) -> Any:
        """Return the outcome for one value of each input; ValueError for a value outside the table."""
        try:
            return self._answers[tuple(map(inputs.__getitem__, self.inputs))]
        except KeyError:
            raise ValueError(self._outside(inputs)) from None

    def _outside(self, inputs: Mapping[str, Any]) -> str:
        """What is wrong with a call that no row can answer."""
        if inputs.keys() != self.inputs.keys():
            return f"{self.source}: the inputs are {', '.join(self.inputs)}, not {', '.join(inputs)}"
        name = next(name for name, values in self.inputs.items() if inputs[name] not in values)
        values = ", ".join(map(_cell_text, self.inputs[name]))
        return f"{self.source}: no {name} is {_cell_text(inputs[name])}; it is one of {values}"

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.rows)

    def text(self) -> str:
        """Return the table as plain text, one row a line, as the spec prints it."""
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        return "\n".join([self.source, lines[0], "  ".join("-" * w for w in widths), *lines[1:]])

    def cells(self) -> list[list[str]]:
        """The table's rows as text, the heads first."""
        return [[*self.inputs, self.outcome], *([_cell_text(value) for value in row] for row in self.rows)]

    def html(self) -> str:
        """Return the table as HTML; a long name may be wrapped at its underscores."""
        lines = []
        for n, row in enumerate(self.cells()):
            tag = "td" if n else "th"
            shown = (escape(cell).replace("/", " / ").replace("_", "_<wbr>") for cell in row)
            lines.append("".join(f'<{tag} style="text-align:left">{cell}</{tag}>' for cell in shown))
        table = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<div>{escape(self.source)}</div><table>{table}</table>"

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        return {"text/plain": self.text(), "text/html": self.html()}


def meant(want: Any, values: Sequence[Any]) -> Sequence[Any]:
    """Return the values of a column that a row's entry stands for, in the order of `values`."""
    if want is ANY:
        return values
    chosen = want if isinstance(want, frozenset) else {want}
    return [value for value in values if value in chosen]


def _cell_text(value: Any) -> str:
    if value is ANY:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, frozenset):
        return "/".join(sorted(map(_cell_text, value)))
    return str(value)

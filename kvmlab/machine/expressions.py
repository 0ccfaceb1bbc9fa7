"""Expressions over the machine's cells, for a reader's own properties: `attr[0] == private && rmp[P0] == hypervisor`.

Cells have the names and values that the machine's table and `repr(cell)` show.  A value may be one word of several
(`rmp[P0] == validated`); a cell by itself is true where it holds something (`mmu_lock_writer`); `quiet` is true where
nobody is inside an operation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..design.errors import quoted
from ..errors import InputError
from ..model.state import Cell, Layout

_TOKEN = re.compile(r"\s*(&&|\|\||==|!=|!|\(|\)|\w[\w*-]*(?:\[[^\]\n]*\])?|\"[^\"\n]*\")")
QUIET = "quiet"
DEEPEST = 16

# Asks which states have one of these codes in a cell; what it gives can be joined by & and | and ~.
Ask = Callable[[Cell, frozenset[int]], Any]


@dataclass(frozen=True)
class Expression:
    """One expression: `text` as written, and its tree of ("&&", "||", "!", "quiet" or a test of a cell) and parts."""

    text: str
    tree: tuple[Any, ...]

    def holds(self, layout: Layout, ask: Ask, quiet: Any) -> Any:
        """Where it is true; InputError for a cell or value that this machine does not have."""
        cells = {repr(cell).replace(" ", ""): cell for cell in layout.cells if cell.bits}

        def of(tree: tuple[Any, ...]) -> Any:
            match tree:
                case ("&&", a, b):
                    return of(a) & of(b)
                case ("||", a, b):
                    return of(a) | of(b)
                case ("!", a):
                    return ~of(a)
                case ("quiet",):
                    return quiet
                case (name, value):
                    cell = cells.get(name)
                    if cell is None:
                        raise self._unknown("cell", name, cells)
                    return ask(cell, self._codes(cell, value))
            raise AssertionError(tree)

        return of(self.tree)

    def _codes(self, cell: Cell, value: str | None) -> frozenset[int]:
        """The codes of a cell's values that are meant."""
        if value is None:
            return frozenset(
                code << cell.shift for v, code in cell.codes.items() if v not in (None, False, 0, "none")
            )
        shown = {_shown(v): code for v, code in cell.codes.items()}
        found = [code for text, code in shown.items() if value == text]
        found = found or [code for text, code in shown.items() if value in text.split()]
        if not found:
            raise self._unknown(f"value of {cell!r}", value, shown)
        return frozenset(code << cell.shift for code in found)

    def _unknown(self, what: str, name: str, known: Any) -> InputError:
        near = get_close_matches(name, known, 6, 0.4) or list(known)[:12]
        return InputError(
            f"{self.text}: no {what} {quoted(name)!r} in this machine; there are: {', '.join(near)}"
        )


def _shown(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def parse_expression(text: str) -> Expression:
    """Read an expression; InputError says where it goes wrong, and what would be allowed there."""
    return Expression(text.strip(), _Parser(text.strip()).whole())


class _Parser:
    """Reads `||` of `&&` of tests."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0
        self.tokens: list[tuple[str, int]] = list(self._split())

    def _split(self) -> Iterator[tuple[str, int]]:
        at = 0
        while self.text[at:].strip():
            found = _TOKEN.match(self.text, at)
            if found is None:
                raise self._wrong(at, "a cell, a value, ==, !=, &&, ||, !, ( or )")
            yield found[1], found.start(1)
            at = found.end()

    def _wrong(self, at: int, allowed: str) -> InputError:
        return InputError(
            f"cannot read the expression\n    {self.text}\n    {' ' * at}^\nallowed here: {allowed}"
        )

    def _next(self, *wanted: str) -> str | None:
        """The next token if it is one of these."""
        if self.at < len(self.tokens) and self.tokens[self.at][0] in wanted:
            self.at += 1
            return self.tokens[self.at - 1][0]
        return None

    def _word(self, what: str) -> str:
        token, at = self.tokens[self.at] if self.at < len(self.tokens) else ("", len(self.text))
        if not re.match(r'[\w"]', token):
            raise self._wrong(at, what)
        self.at += 1
        return token.strip('"')

    def whole(self) -> tuple[Any, ...]:
        found = self._either()
        if self.at < len(self.tokens):
            raise self._wrong(self.tokens[self.at][1], "&&, ||, or the end")
        return found

    def _either(self) -> tuple[Any, ...]:
        found = self._both()
        while self._next("||"):
            found = ("||", found, self._both())
        return found

    def _both(self) -> tuple[Any, ...]:
        found = self._test()
        while self._next("&&"):
            found = ("&&", found, self._test())
        return found

    def _test(self) -> tuple[Any, ...]:
        self.depth += 1
        if self.depth > 4 * DEEPEST:
            raise self._wrong(len(self.text) - 1, f"at most {4 * DEEPEST} tests")
        if self._next("!"):
            return ("!", self._test())
        if self._next("("):
            found = self._either()
            if not self._next(")"):
                raise self._wrong(
                    self.tokens[self.at][1] if self.at < len(self.tokens) else len(self.text), ")"
                )
            return found
        name = self._word("a cell such as attr[0], quiet, ! or (").replace(" ", "")
        if name == QUIET:
            return (QUIET,)
        compared = self._next("==", "!=")
        if compared is None:
            return (name, None)
        test = (name, self._word("a value"))
        return test if compared == "==" else ("!", test)

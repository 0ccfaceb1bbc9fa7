"""What is said when a design cannot be read: what is wrong, where, and what would be allowed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..errors import Refusal

WIDTH = 75  # columns of a quoted source line: it is pasted into mails


class Place(NamedTuple):
    """Where something stands: the design's name, the line and the column (both from 1)."""

    name: str
    line: int
    column: int


NOWHERE = Place("(text)", 0, 0)


class DesignError(Refusal, ValueError):
    """A design that cannot be read; `str()` of it is the whole message, with the line and a caret.

    `line` and `column` count from 1, and are 0 where no line is to blame; `allowed` lists what would do
    instead, and `offer` is the word before it ("allowed", "nearest known", ...).
    """

    def __init__(
        self,
        message: str,
        place: Place = NOWHERE,
        source_line: str = "",
        allowed: Iterable[str] = (),
        offer: str = "allowed",
    ) -> None:
        self.message = message
        self.name, self.line, self.column = place
        self.source_line = source_line
        self.allowed = tuple(allowed)
        self.offer = offer
        super().__init__(self._text())

    def _text(self) -> str:
        where = quoted(self.name) + (f":{self.line}" if self.line else "")
        lines = [f"{where}: {self.message}"]
        if self.line and self.source_line.strip():
            lines += _excerpt(self.source_line, self.column)
        if self.allowed:
            lines.append(f"{self.offer}: {', '.join(self.allowed)}")
        return "\n".join(lines)


def quoted(text: str, width: int = 40) -> str:
    """The text made safe to print: control characters escaped, cut to `width` columns."""
    safe = "".join(map(_printable, text[: width + 1]))
    return safe if len(safe) <= width else safe[: width - 3] + "..."


def _printable(char: str) -> str:
    if char.isprintable():
        return char
    return " " if char == "\t" else char.encode("unicode_escape").decode("ascii")


def _excerpt(line: str, column: int) -> list[str]:
    """The source line without its indentation, and the caret under the column."""
    lead = len(line) - len(line.lstrip())
    before = "".join(map(_printable, line[lead : max(lead, column - 1)]))
    after = "".join(map(_printable, line[max(lead, column - 1) :][: WIDTH + 1]))
    room = WIDTH - 4
    if len(before) > room // 2:
        before = "..." + before[-(room // 2) + 3 :]
    shown = before + after
    if len(shown) > room:
        shown = shown[: room - 3] + "..."
    return [f"    {shown.rstrip()}", f"    {' ' * len(before)}^"]

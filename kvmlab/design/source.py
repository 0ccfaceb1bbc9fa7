"""The text of a design without what mail and C add to it, and where everything stood."""

from __future__ import annotations

import re
from collections.abc import Iterable
from unicodedata import category

from .calls import SECTIONS
from .errors import DesignError, Place
from .tree import Note

LIMIT = 256 * 1024  # characters, and bytes of a file

_QUOTED = re.compile(r"(?:[ \t]*>)+ ?")
_BLANK = dict.fromkeys(map(ord, "\u00a0\u2007\u202f\u200b\ufeff"), " ")  # what web archives put for a space
_ELLIPSIS = frozenset(("...", "\u2026", "[...]", "[\u2026]"))
_COMMENT = re.compile(r"//|/\*")
_HEADER = re.compile(rf"\s*(?:{'|'.join(SECTIONS)}|expect\s+[\w-]+|base|backing|linux)\s*:")
_BINARY = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_REORDERS = re.compile("[\u202a-\u202e\u2066-\u2069]")  # bidirectional: what is shown is not what is read


class Source:
    """One text: its lines as given, and as cleaned for the parser, line by line.

    Mail quoting is cut off; comments and `...` lines become blank.  The parser sees an empty line first, so
    that every line, also the first, begins with a newline and its indentation.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.lines = re.split(r"\r\n|\n|\r", text)
        self._check(text)
        self.shift: list[int] = []  # columns cut off at the left of each line
        self.clean: list[str] = []
        self.header: list[str] = []  # the comment that opens the text
        self._notes: dict[int, Note] = {}
        self._read()

    def _check(self, text: str) -> None:
        if len(text) > LIMIT:
            raise DesignError(f"more than {LIMIT // 1024} kB: not a design", Place(self.name, 0, 0))
        if found := _BINARY.search(text):
            raise self._hidden(found, f"a control character (0x{ord(found[0]):02x}): not a text")
        if found := _REORDERS.search(text):
            raise self._hidden(
                found, f"an invisible character (U+{ord(found[0]):04X}) that reorders what is shown"
            )

    def _hidden(self, found: re.Match[str], message: str) -> DesignError:
        before = re.split(r"\r\n|\n|\r", found.string[: found.start()])
        return self.error(message, Place(self.name, len(before), len(before[-1]) + 1))

    def _read(self) -> None:
        above: list[str] = []
        in_comment = 0  # the line in which an open /* stands
        in_header = True
        for number, raw in enumerate(self.lines, 1):
            line = raw.translate(_BLANK)
            quote = _QUOTED.match(line)
            self.shift.append(quote.end() if quote else 0)
            code, comment, open_ = _split(line[self.shift[-1] :], bool(in_comment))
            in_comment = (in_comment or number) if open_ else 0
            blank = not code.strip()
            if hidden := next((c for c in code if category(c) == "Cf"), None):
                place = Place(self.name, number, self.shift[-1] + code.index(hidden) + 1)
                raise self.error(f"an invisible character (U+{ord(hidden):04X})", place)
            if in_header and blank and comment is not None:
                self.header.append(comment)
            elif blank and comment is not None:
                above.append(comment)
            elif not blank:
                self._notes[number] = Note(tuple(above), comment or "")
                above = []
            in_header = in_header and blank and comment is not None
            self.clean.append("" if blank else code)
        if in_comment:
            raise self.error("'/*' is never closed", Place(self.name, in_comment, 1))

    def code(self) -> str:
        """What the parser reads."""
        return "\n" + "\n".join(self.clean) + "\n"

    def place(self, line: int, column: int) -> Place:
        """The place of a position that the parser names."""
        line = min(max(line - 1, 1), len(self.lines))
        return Place(self.name, line, column + self.shift[line - 1])

    def last_place(self) -> Place:
        """The end of the last line that is not blank."""
        line = max((n for n, code in enumerate(self.clean, 1) if code), default=1)
        return Place(self.name, line, len(self.lines[line - 1].rstrip()) + 1)

    def note(self, place: Place) -> Note:
        """The comments of the statement that begins there."""
        return self._notes.get(place.line, Note())

    def error(
        self, message: str, place: Place, allowed: Iterable[str] = (), offer: str = "allowed"
    ) -> DesignError:
        """The error to raise about that place."""
        return DesignError(message, place, self.lines[place.line - 1], allowed, offer)

    def begins(self, place: Place, pattern: str) -> bool:
        """Whether the last section header up to that line matches the pattern."""
        for code in reversed(self.clean[: place.line]):
            if _HEADER.match(code):
                return re.match(rf"\s*{pattern}", code) is not None
        return False


def _split(line: str, inside: bool) -> tuple[str, str | None, bool]:
    """The code of a line, its comment (None if there is none), and whether a /* is still open behind it."""
    if not inside and line.lstrip().startswith("#"):
        return "", line.strip().lstrip("#").strip(), False
    code: list[str] = []
    comments: list[str] = []
    at = 0
    while at < len(line):
        if inside:
            end = line.find("*/", at)
            inside, stop = end < 0, len(line) if end < 0 else end
            comments.append(line[at:stop].strip().lstrip("*").strip())
            code.append(" " * (stop - at + 2))
            at = stop + 2
        else:
            mark = _COMMENT.search(line, at)
            code.append(line[at : mark.start() if mark else len(line)])
            at = mark.end() if mark else len(line)
            if mark and mark[0] == "//":
                comments.append(line[at:].strip())
                break
            if mark:
                code.append("  ")
                inside = True
    text = "".join(code)
    if text.strip() in _ELLIPSIS:
        text = ""
    return text, (" ".join(filter(None, comments)) if comments else None), inside

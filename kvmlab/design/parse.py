"""The parser of the design language: lark, and what it cannot say by itself about blocks and errors.

Indentation means something in one place only: what stands deeper below an `if`, an `else` or a `call():` is
its body.  With nothing deeper, an `if` governs the next statement, as in C without braces, so a text whose
indentation a mail archive has eaten still reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from lark import Lark, Token, Tree, UnexpectedCharacters, UnexpectedInput, UnexpectedToken
from lark.lark import PostLex

from .calls import CONDITIONS, EXPECTATIONS, STATEMENTS
from .errors import DesignError, Place
from .source import Source

_SETTLED = (None, "_NL", "_INDENT", "_DEDENT", "LBRACE", "RBRACE")


class _Misplaced(Exception):
    """A brace or an indentation that cannot be understood, before the parser sees it."""

    def __init__(self, message: str, token: Token) -> None:
        super().__init__(message)
        self.token = token


class _Blocks(PostLex):
    """Ends statements (at newlines and `;`) and turns deeper lines below an opener into blocks."""

    always_accept = ("SEMI", "_NL")

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        """The tokens with _NL, _INDENT and _DEDENT where they mean something."""
        lines = _Lines()
        for token in stream:
            for out in lines.feed(token):
                lines.last = out.type
                yield out
        if lines.braces:
            raise _Misplaced("'{' is never closed", lines.braces[-1])


class _Lines:
    """Where in the text the lexer is: the open blocks, and whether the line so far opens one."""

    def __init__(self) -> None:
        self.stack: list[str | None] = []  # the indentation of each opener's line; None: a brace
        self.braces: list[Token] = []
        self.indent = ""
        self.opener = ""  # "if" or ":" when the line up to here is one
        self.header = False
        self.last: str | None = None

    def feed(self, token: Token) -> Iterator[Token]:
        kind = token.type
        if kind == "_NL":
            yield from self._newline(token)
        elif kind == "SEMI":
            yield from self._end(token)
        elif kind == "RBRACE":
            yield from self._close_brace(token)
        else:
            if kind == "LBRACE":
                self.stack.append(None)
                self.braces.append(token)
            elif kind in ("SECTION", "BASE", "EXPECT"):
                self.header = True
            self.opener = self._opens(kind)
            yield token

    def _opens(self, kind: str) -> str:
        if kind == "ELSE" or (kind == "ARGS" and self.last == "IF"):
            return "if"
        return ":" if kind == "COLON" and not self.header else ""

    def _newline(self, token: Token) -> Iterator[Token]:
        if self.last == "COMMA":
            return
        indent = token.rsplit("\n", 1)[1]
        if self.opener and _deeper(indent, self.indent, token):
            self.stack.append(self.indent)
            yield Token.new_borrow_pos("_INDENT", "", token)
        elif self.opener != "if":
            yield from self._end(token)
        while self.stack and (top := self.stack[-1]) is not None and not _deeper(indent, top, token):
            self.stack.pop()
            yield Token.new_borrow_pos("_DEDENT", "", token)
        self.indent, self.opener, self.header = indent, "", False

    def _end(self, token: Token) -> Iterator[Token]:
        if self.last not in _SETTLED:
            yield Token.new_borrow_pos("_NL", "", token)

    def _close_brace(self, token: Token) -> Iterator[Token]:
        if not self.braces:
            raise _Misplaced("'}' closes nothing", token)
        yield from self._end(token)
        while self.stack.pop() is not None:
            yield Token.new_borrow_pos("_DEDENT", "", token)
        self.braces.pop()
        self.opener = ""
        yield token


def _deeper(indent: str, than: str, token: Token) -> bool:
    """Whether one indentation is deeper; tabs may be 8 wide or 1, so the answer must not hang on that."""
    answers = {len(indent.expandtabs(size)) > len(than.expandtabs(size)) for size in (8, 1)}
    if len(answers) > 1:
        at = Token.new_borrow_pos("_NL", "", token)
        at.line, at.column = token.end_line, token.end_column
        raise _Misplaced("tabs and spaces are mixed: it is not clear what this line stands below", at)
    return answers.pop()


@lru_cache(maxsize=1)
def _parser() -> Lark:
    grammar = Path(__file__).with_name("grammar.lark").read_text(encoding="utf-8")
    return Lark(grammar, parser="lalr", lexer="basic", postlex=_Blocks())


def parse_source(source: Source) -> Tree[Token]:
    """The parse tree of a cleaned text; DesignError if it is not in the language."""
    try:
        return _parser().parse(source.code())
    except _Misplaced as wrong:
        raise source.error(str(wrong), at(wrong.token, source)) from None
    except UnexpectedInput as wrong:
        raise _explain(wrong, source) from None


def at(token: Token, source: Source) -> Place:
    """Where a token stands in the text as given."""
    return source.place(token.line or 1, token.column or 1)


def _explain(wrong: UnexpectedInput, source: Source) -> DesignError:
    """What a reader would say about the place where the parser stopped."""
    if isinstance(wrong, UnexpectedCharacters):
        place = source.place(wrong.line, wrong.column)
        if wrong.char in ("(", ")"):
            opens = "'(' is never closed, or nests deeper than three"
            return source.error(opens if wrong.char == "(" else "')' closes nothing", place)
        return _not_a_statement(place, source)
    assert isinstance(wrong, UnexpectedToken)
    kind, expected = wrong.token.type, wrong.expected
    place = source.last_place() if kind == "$END" else at(wrong.token, source)
    if kind == "ELSE":
        return source.error("'else' without an if before it", place)
    if {"_INDENT", "NAME"} <= expected:
        return source.error("an if or else with no statement of its own", place, STATEMENTS)
    if kind in ("SECTION", "BASE", "EXPECT"):
        return source.error("a section cannot begin inside a block", place)
    if expected == {"ARGS"}:
        return source.error("the condition of an if stands in parentheses", place, CONDITIONS)
    return _not_a_statement(place, source)


def _not_a_statement(place: Place, source: Source) -> DesignError:
    if source.begins(place, "expect"):
        return source.error("not a line of expected verdicts", place, EXPECTATIONS)
    return source.error("not a statement of the design language", place, STATEMENTS)

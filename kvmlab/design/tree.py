"""A section of a design as a tree of statements, and its lines as they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from .errors import Place

INDENT = "    "


@dataclass(frozen=True, slots=True)
class Condition:
    """What an `if` asks: `attr`, `platform` or `flush` (whose value is empty)."""

    var: str
    value: str
    negated: bool = False

    def __str__(self) -> str:
        if self.var == "flush":
            return "!flush" if self.negated else "flush"
        return f"{self.var} {'!=' if self.negated else '=='} {self.value}"

    def inverse(self) -> Condition:
        """The condition of the `else`."""
        return replace(self, negated=not self.negated)


@dataclass(frozen=True, slots=True)
class Note:
    """The comments of a statement: full lines above it, and the one behind it on its line."""

    above: tuple[str, ...] = ()
    behind: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """One call as written; `text` has its spaces squeezed, `args` is what stands between the parentheses."""

    name: str
    args: str
    text: str
    place: Place = field(compare=False)
    note: Note = field(default=Note(), compare=False)


@dataclass(frozen=True, slots=True)
class Title:
    """`name():` with nothing deeper below it, until it is known whether it is a title or the call."""

    head: Call


@dataclass(frozen=True, slots=True)
class Body:
    """`name():` and the deeper lines that are its body."""

    head: Call
    body: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class If:
    """An `if`; what stands in `orelse` runs when the condition does not hold."""

    test: Condition
    then: tuple[Node, ...]
    orelse: tuple[Node, ...]
    place: Place = field(compare=False)
    note: Note = field(default=Note(), compare=False)
    else_note: Note = field(default=Note(), compare=False)


@dataclass(frozen=True, slots=True)
class Leave:
    """`return`: the section ends here."""

    place: Place = field(compare=False)
    note: Note = field(default=Note(), compare=False)


Node: TypeAlias = Call | Title | Body | If | Leave
Where: TypeAlias = tuple[tuple[int, str], ...]  # the way down to a list of statements: (index, branch) ...


@dataclass(frozen=True, slots=True)
class Shown:
    """One displayed line: the statement at `index` of the list at `where` begins (or has its else) here."""

    depth: int
    text: str
    where: Where
    index: int
    note: Note


def shown(
    nodes: tuple[Node, ...], spell: Callable[[Call], str], where: Where = (), depth: int = 0
) -> Iterator[Shown]:
    """The displayed lines of some statements, every call spelled by `spell`."""
    for i, node in enumerate(nodes):
        if isinstance(node, Leave):
            yield Shown(depth, "return", where, i, node.note)
        elif isinstance(node, If):
            yield from _shown_if(node, spell, where, i, depth)
        elif isinstance(node, Body):
            yield Shown(depth, f"{spell(node.head)}:", where, i, node.head.note)
            yield from shown(node.body, spell, (*where, (i, "body")), depth + 1)
        elif isinstance(node, Call):
            yield Shown(depth, spell(node), where, i, node.note)


def _shown_if(node: If, spell: Callable[[Call], str], where: Where, i: int, depth: int) -> Iterator[Shown]:
    """An `if` with all its `else if`s; each of those lines stands for the whole."""
    way, lead, note = where, (i, "then"), node.note
    word = "if"
    while True:
        yield Shown(depth, f"{word} ({node.test})", where, i, note)
        yield from shown(node.then, spell, (*way, lead), depth + 1)
        way = (*way, (lead[0], "orelse"))
        word, note, lead = "else if", node.else_note, (0, "then")
        if len(node.orelse) != 1 or not isinstance(node.orelse[0], If):
            break
        node = node.orelse[0]
    if node.orelse:
        yield Shown(depth, "else", where, i, node.else_note)
        yield from shown(node.orelse, spell, way, depth + 1)


def branch_of(node: Node, branch: str) -> tuple[Node, ...]:
    """The statements below a statement: "body" of a Body, "then" or "orelse" of an If."""
    if isinstance(node, Body):
        return node.body
    assert isinstance(node, If)
    return node.then if branch == "then" else node.orelse


def with_branch(node: Node, branch: str, inner: tuple[Node, ...]) -> Node:
    """The statement with other statements below it."""
    if isinstance(node, Body):
        return replace(node, body=inner)
    assert isinstance(node, If)
    return replace(node, then=inner) if branch == "then" else replace(node, orelse=inner)


def as_written(call: Call) -> str:
    """The spelling of the source."""
    return call.text


def commented(line: Shown, lead: str = INDENT) -> list[str]:
    """The line with its comments, indented below a section header."""
    margin = lead + INDENT * line.depth
    above = [f"{margin}// {text}".rstrip() for text in line.note.above]
    return [*above, f"{margin}{line.text}" + (f"    // {line.note.behind}" if line.note.behind else "")]


def calls_in(nodes: tuple[Node, ...]) -> Iterator[Call]:
    """Every call, in the order of the text; the name over a body is not one."""
    for node in nodes:
        if isinstance(node, Call):
            yield node
        elif isinstance(node, Body):
            yield from calls_in(node.body)
        elif isinstance(node, If):
            yield from calls_in(node.then)
            yield from calls_in(node.orelse)


def first_call(node: Node) -> Call | None:
    """The call with which a statement begins."""
    if isinstance(node, If):
        return first_call(node.then[0]) if node.then else None
    if isinstance(node, (Body, Title)):
        return node.head
    return node if isinstance(node, Call) else None


def substitute(nodes: tuple[Node, ...], name: str, by: tuple[Node, ...]) -> tuple[Node, ...]:
    """The statements with every call (or body) called `name` replaced by the statements `by`."""
    out: list[Node] = []
    for node in nodes:
        if isinstance(node, If):
            then, orelse = (substitute(part, name, by) for part in (node.then, node.orelse))
            out.append(replace(node, then=then, orelse=orelse))
        elif isinstance(node, Body) and node.head.name != name:
            out.append(replace(node, body=substitute(node.body, name, by)))
        elif isinstance(node, (Call, Body)) and _name(node) == name:
            out.extend(by)
        else:
            out.append(node)
    return tuple(out)


def _name(node: Call | Body) -> str:
    return node.head.name if isinstance(node, Body) else node.name

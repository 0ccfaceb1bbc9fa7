"""The statements of a design, made from the parse tree."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import chain, islice

from lark import Token, Tree

from . import calls
from .calls import ATTRIBUTES, BACKINGS, CONDITIONS, PLATFORMS, STATEMENTS
from .errors import DesignError, Place, quoted
from .parse import at, parse_source
from .source import Source
from .tree import Body, Call, Condition, If, Leave, Node, Note, Title, calls_in, first_call

DEEPEST = 16  # ifs and bodies inside one another
MOST = 200  # calls in a section
ASSIGNED = ("flush", "ret", "r", "rc", "err")  # variables whose assignment is just the call
VERDICTS = ("Never", "Sometimes", "Always")
_STATEMENT_RULES = ("call", "title", "body", "leave", "cond")
_NAME = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")

_VERSION = re.compile(r"v[0-9]{1,3}\.[0-9]{1,3}")

Expect = dict[str, dict[str, dict[str, str]]]  # platform, scenario, property: verdict


@dataclass
class Parsed:
    """What one text says itself, nothing inherited; `base_place` is where it names its base."""

    source: Source
    sections: dict[str, tuple[Node, ...]] = field(default_factory=dict)
    base: str | None = None
    base_place: Place | None = None
    backing: str | None = None
    linux: str | None = None
    expect: Expect = field(default_factory=dict)


def read(source: Source) -> Parsed:
    """Parse a text; DesignError if it is not in the language."""
    tree = parse_source(source)
    reader = _Reader(source)
    reader.take(statements(tree, source))
    for part in _trees(tree):
        if part.data in ("section", "base", "backing", "linux", "expect"):
            getattr(reader, part.data)(part)
    return reader.done()


class _Reader:
    """Goes through the parts of a text in order; `current` is the section that statements go to."""

    def __init__(self, source: Source) -> None:
        self.parsed = Parsed(source)
        self.source = source
        self.current = "ioctl"
        self.lists: dict[str, list[Node]] = {}
        self.headers: dict[str, Place] = {}

    def take(self, nodes: list[Node]) -> None:
        """Statements of the current section, or of the ioctl from its function's name on."""
        for node in nodes:
            head = node.head if isinstance(node, (Title, Body)) else None
            if head and head.name == calls.IOCTL_TITLE:
                if self.current != "ioctl" or self.lists.get("ioctl"):
                    self._open("ioctl", head.place)
                self.lists.setdefault("ioctl", []).extend(node.body if isinstance(node, Body) else ())
            else:
                self.lists.setdefault(self.current, []).append(node)

    def _open(self, section: str, place: Place) -> None:
        if section in self.headers or self.lists.get(section):
            raise self.source.error(f"'{section}:' is given twice", place)
        self.headers[section] = place
        self.current = section

    def section(self, tree: Tree[Token]) -> None:
        """`ioctl:` and its like."""
        token = tree.children[0]
        assert isinstance(token, Token)
        self._open(str(token), at(token, self.source))
        self.take(statements(tree, self.source))

    def base(self, tree: Tree[Token]) -> None:
        """`base: NAME`."""
        place, name = at(_token(tree, 0), self.source), str(_token(tree, 1))
        if self.parsed.base is not None:
            raise self.source.error("'base:' is given twice", place)
        self.parsed.base, self.parsed.base_place = name, at(_token(tree, 1), self.source)
        self.take(statements(tree, self.source))

    def backing(self, tree: Tree[Token]) -> None:
        """`backing: split` or `backing: in-place`, for a design that knows only one."""
        token = _token(tree, 1)
        place = at(token, self.source)
        if str(token) not in BACKINGS:
            raise self.source.error(f"unknown backing '{quoted(token)}'", place, BACKINGS)
        if self.parsed.backing is not None:
            raise self.source.error("'backing:' is given twice", place)
        self.parsed.backing = str(token)
        self.take(statements(tree, self.source))

    def linux(self, tree: Tree[Token]) -> None:
        """`linux: v6.19`, the kernel version that the text speaks of."""
        token = _token(tree, 1)
        place = at(token, self.source)
        if not _VERSION.fullmatch(token):
            raise self.source.error(
                f"'{quoted(token)}' is no version of Linux", place, ("v6.2", "v6.19"), "such as"
            )
        if self.parsed.linux is not None:
            raise self.source.error("'linux:' is given twice", place)
        self.parsed.linux = str(token)
        self.take(statements(tree, self.source))

    def expect(self, tree: Tree[Token]) -> None:
        """`expect PLATFORM:` and its lines."""
        platform = _token(tree, 1)
        if platform not in PLATFORMS:
            message = f"unknown platform '{quoted(platform)}'"
            raise self.source.error(message, at(platform, self.source), PLATFORMS)
        into = self.parsed.expect.setdefault(str(platform), {})
        for line in _trees(tree):
            name = "/".join(str(part) for part in _tree(line, 0).children)
            place = at(_token(_tree(line, 0), 0), self.source)
            if name in into:
                raise self.source.error(f"'{quoted(name)}' is given twice", place)
            if not all(_NAME.fullmatch(part) for part in name.split("/")):
                raise self.source.error(f"'{quoted(name)}' is no scenario's name", place, ("to-private",))
            into[name] = self._verdicts(line)

    def _verdicts(self, line: Tree[Token]) -> dict[str, str]:
        found: dict[str, str] = {}
        for pair in _trees(line)[1:]:
            name, verdict = _token(pair, 0), _token(pair, 1)
            if verdict not in VERDICTS:
                message = f"unknown verdict '{quoted(verdict)}'"
                raise self.source.error(message, at(verdict, self.source), VERDICTS)
            if not _NAME.fullmatch(name) or name in found:
                message = f"'{quoted(name)}' is {'given twice' if name in found else 'no name of a property'}"
                raise self.source.error(message, at(name, self.source), ("sleep-in-atomic Never",))
            found[str(name)] = str(verdict)
        if "all" in found and found != {"all": "Never"}:
            place = at(_token(_tree(line, 0), 0), self.source)
            raise self.source.error("'all' stands alone, with Never", place, ("SCENARIO: all Never",))
        return {} if "all" in found else found

    def done(self) -> Parsed:
        """Settle what is a title, and refuse sections without a statement."""
        for section, nodes in self.lists.items():
            if settled := settle(nodes, self.source):
                self.parsed.sections[section] = settled
            if excess := next(islice(calls_in(settled), MOST, None), None):
                raise self.source.error(f"more than {MOST} calls in {section}:", excess.place)
        for section, place in self.headers.items():
            if section not in self.parsed.sections:
                allowed = ("a call", "return, for a section that does nothing")
                raise self.source.error(f"the section '{section}:' is empty", place, allowed)
        if not self.parsed.sections and self.parsed.base is None:
            raise DesignError("no statement in it", Place(self.source.name, 0, 0), allowed=STATEMENTS)
        return self.parsed


def statements(tree: Tree[Token], source: Source, depth: int = 1) -> list[Node]:
    """The statements below a node of the parse tree; a `name():` without a body is still a Title."""
    trees = [child for child in _trees(tree) if child.data in _STATEMENT_RULES]
    nodes = [_statement(child, source, depth) for child in trees]
    for child, node in zip(trees, nodes[1:], strict=False):
        if (title := _dangling(child)) and _is_part(_call(_tree(title, 0), source), first_call(node)):
            place = _call(_tree(title, 0), source).place
            raise source.error("is this the title of the next lines? Indent them, or drop the colon", place)
    return nodes


def _dangling(tree: Tree[Token]) -> Tree[Token] | None:
    """The `name():` with which an unindented if ends, if it does."""
    while tree.data == "cond" and (branch := _tree(tree, -1)).data == "single":
        tree = _tree(branch, 0)
        if tree.data == "title":
            return tree
    return None


def _statement(tree: Tree[Token], source: Source, depth: int) -> Node:
    if tree.data == "leave":
        place = at(_token(tree, 0), source)
        return Leave(place, source.note(place))
    if tree.data == "cond":
        return _if(tree, source, depth)
    head = _call(_tree(tree, 0), source)
    if tree.data in ("title", "body") and head.text == head.name and not _is_name(head.name):
        known = [f"{section}:" for section in (*calls.SECTIONS, "base")]
        message = f"unknown section '{quoted(head.name)}:'"
        raise source.error(message, head.place, calls.nearest(f"{head.name}:", known), "nearest known")
    if tree.data == "title":
        return Title(head)
    return Body(head, _block(_tree(tree, 1), source, depth, head.place)) if tree.data == "body" else head


def _if(tree: Tree[Token], source: Source, depth: int) -> If:
    place = at(_token(tree, 0), source)
    test = _condition(_token(tree, 1), source)
    orelse: tuple[Node, ...] = ()
    else_note = Note()
    if len(tree.children) > 3:
        other = at(_token(tree, 3), source)
        if test.var == "flush":
            raise source.error("'if (flush)' has no else: flush only says whether to flush", other)
        orelse, else_note = _block(_tree(tree, 4), source, depth, other, branch=True), source.note(other)
    then = _block(_tree(tree, 2), source, depth, place, branch=True)
    if orelse and not then:
        return If(test.inverse(), orelse, (), place, source.note(place), else_note)
    return If(test, then, orelse, place, source.note(place), else_note)


def _block(
    tree: Tree[Token], source: Source, depth: int, head: Place, *, branch: bool = False
) -> tuple[Node, ...]:
    """The statements below the if, else (a `branch`, which `{ }` leaves empty) or call at `head`."""
    if depth >= DEEPEST:
        raise source.error(f"nested deeper than {DEEPEST}", head)
    nodes = settle(statements(tree, source, depth + 1), source)
    if not nodes and not branch:
        raise source.error("a block with no statement in it", head, STATEMENTS)
    return nodes


def _condition(args: Token, source: Source) -> Condition:
    text = " ".join(args[1:-1].split())
    if text == "flush":
        return Condition("flush", "")
    match = re.fullmatch(r"(attr|platform) ?(==|!=) ?(\w+)", text)
    if match and match[3] in (ATTRIBUTES if match[1] == "attr" else PLATFORMS):
        return Condition(match[1], match[3], match[2] == "!=")
    place = at(args, source)
    raise source.error(f"unknown condition '{quoted(text)}'", place, CONDITIONS)


def _call(tree: Tree[Token], source: Source) -> Call:
    """A call; `flush |= call()` and `static_call(name)(...)` are the call itself."""
    tokens = [_token(tree, i) for i in range(len(tree.children))]
    text = " ".join("".join(f" {t} " if t.type == "ASSIGN" else t for t in tokens).split())
    start = at(tokens[0], source)
    if len(tokens) > 1 and tokens[1].type == "ASSIGN":
        if tokens[0] not in ASSIGNED:
            message = f"nothing keeps '{quoted(tokens[0])}'"
            raise source.error(message, start, (f"{name} =" for name in ASSIGNED))
        tokens = tokens[2:]
    name, *args = tokens
    place = at(name, source)
    if name == "static_call" and args:
        name, *args = Token("NAME", args[0][1:-1].strip()), *args[1:]
    if len(args) > 1:
        raise source.error("two argument lists", at(args[1], source), ("static_call(name)(...)",))
    return Call(str(name), args[0][1:-1].strip() if args else "", text, place, source.note(start))


def settle(nodes: list[Node], source: Source) -> tuple[Node, ...]:
    """Decide of each `name():` without a body: a title if a call of its own follows, else the call.

    An if with nothing in it is nothing.
    """
    nodes = [node for node in nodes if not isinstance(node, If) or node.then]
    out: list[Node] = []
    for i, node in enumerate(nodes):
        following = first_call(nodes[i + 1]) if i + 1 < len(nodes) else None
        if not isinstance(node, Title):
            out.append(node)
        elif _is_part(node.head, following):
            if calls.keeps_body(node.head.name):
                message = f"the body of {node.head.name}() has to stand deeper than its name"
                raise source.error(message, node.head.place)
        elif not calls.holds_calls(node.head.name):
            out.append(node.head)
    return tuple(out)


def _is_name(name: str) -> bool:
    return calls.known(name) is not None or calls.holds_calls(name)


def _is_part(head: Call, following: Call | None) -> bool:
    call, after = calls.known(head.name), calls.known(following.name) if following else None
    return call is not None and after is not None and after.name in chain(*call.parts.values())


def _token(tree: Tree[Token], i: int) -> Token:
    child = tree.children[i]
    assert isinstance(child, Token)
    return child


def _tree(tree: Tree[Token], i: int) -> Tree[Token]:
    child = tree.children[i]
    assert isinstance(child, Tree)
    return child


def _trees(tree: Tree[Token]) -> list[Tree[Token]]:
    return [child for child in tree.children if isinstance(child, Tree)]

"""From statements to rows: which call, on what condition; and the rows of one conversion, laid out flat."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from . import calls
from .errors import DesignError, quoted
from .source import Source
from .tree import Body, Call, Condition, If, Leave, Node


@dataclass(frozen=True, slots=True)
class Row:
    """One call of a section, with the conditions of the ifs around it.

    `call` is the canonical name ("return" for a return); `lock` the lock of a lock call; `target` the word
    (`Call.words`) that the text names, and in `Design.rows` of each `rmpupdate` the direction that it takes;
    `body` is there for `rmp_prepare` and `rmp_match` only.  `text`, `line` and `origin` (a design's name)
    tell where the row was written (line 0: nowhere, it is implied); rows that differ only there are equal.
    `walk`, in `Design.rows`, is the word of `calls.SECTIONS_OF_WORD` that it was given.
    """

    call: str
    target: str | None = None
    when: tuple[Condition, ...] = ()
    line: int = field(default=0, compare=False)
    text: str = field(default="", compare=False)
    body: tuple[Row, ...] | None = None
    lock: str | None = None
    origin: str = field(default="", compare=False)
    walk: str | None = None

    @property
    def under_flush(self) -> bool:
        """Whether it runs only if a zap before it has found something (`if (flush)`)."""
        return any(test.var == "flush" for test in self.when)


def adds_ranges(rows: Iterable[Row]) -> bool:
    """Whether the window is widened range by range, as since v6.8 (kvm_mmu_invalidate_range_add()).

    Else, as in RFC v8 02/56, it covers the whole request from kvm_mmu_invalidate_begin() on.
    """
    return any(calls.does(row.call, "widens") for row in rows)


def build(nodes: Iterable[Node], section: str, source: Source) -> tuple[Row, ...]:
    """The rows of a section; DesignError for a call that is unknown, misplaced or misused."""
    return tuple(_Builder(section, source).rows(nodes, ()))


class _Builder:
    """Makes the rows of one section; `within` is the call whose body is being read under the folio lock."""

    def __init__(self, section: str, source: Source, within: str = "") -> None:
        self.section = section
        self.source = source
        self.within = within

    def rows(self, nodes: Iterable[Node], when: tuple[Condition, ...]) -> Iterator[Row]:
        for node in nodes:
            if isinstance(node, If):
                self._check_flush(node)
                yield from self.rows(node.then, (*when, node.test))
                yield from self.rows(node.orelse, (*when, node.test.inverse()))
            elif isinstance(node, Body):
                yield from self._body(node, when)
            elif isinstance(node, Leave):
                yield self._return(node, when)
            elif isinstance(node, Call):
                yield self._row(node, when)

    def _check_flush(self, node: If) -> None:
        if node.test.var == "flush" and (self.section not in calls.FLUSHES or self.within):
            message = "'if (flush)' follows a zap by kvm_unmap_gfn_range(), and there is none here"
            raise self.source.error(message, node.place, [f"{s}:" for s in calls.FLUSHES], "it may stand in")

    def _return(self, node: Leave, when: tuple[Condition, ...]) -> Row:
        if self.within:
            raise self.source.error(f"no return inside {self.within}(): the folio lock is held", node.place)
        if any(test.var == "flush" for test in when):
            allowed = [test for test in calls.CONDITIONS if test != "flush"]
            raise self.source.error("no return under 'if (flush)'", node.place, allowed, "it may stand under")
        return Row("return", None, when, node.place.line, "return", origin=node.place.name)

    def _body(self, node: Body, when: tuple[Condition, ...]) -> Iterator[Row]:
        """The rows of `name():` and its body: the body itself, except where it is work on a condition."""
        if calls.holds_calls(node.head.name):
            yield from self.rows(node.body, when)
            return
        head = self._row(node.head, when)
        if head.lock:
            raise self.source.error(f"{quoted(node.head.name)}() has no body", node.head.place)
        if calls.keeps_body(head.call):
            inner = _Builder(self.section, self.source, head.call)
            yield replace(head, body=tuple(inner.rows(node.body, ())))
        elif (
            calls.meanings(head.call)[0].on == calls.HAS_OP
        ):  # the body of an op runs where the op does something
            yield from self.rows(node.body, (*when, Condition("platform", *calls.HAS_RMP)))
        else:
            yield from self.rows(node.body, when)

    def _row(self, node: Call, when: tuple[Condition, ...]) -> Row:
        call = calls.known(node.name)
        if call is None:
            raise self._unknown(node)
        here = calls.meanings(node.name, self.section)
        if not here:
            message = f"{node.name}() cannot stand in {self.section}:"
            fits = [f"{s}:" for s in calls.sections(call.name)]
            raise self.source.error(message, node.place, fits, "it may stand in")
        call = here[0]
        if self.within and not call.in_folio_lock:
            message = f"{node.name}() cannot stand inside {self.within}()"
            fits = list(dict.fromkeys(c.name for c in calls.CALLS if c.in_folio_lock))
            raise self.source.error(message, node.place, fits, "in there may stand")
        lock = self._lock(node, call)
        word = self._word(node, call)
        return Row(call.name, word, when, node.place.line, node.text, None, lock, node.place.name)

    def _unknown(self, node: Call) -> DesignError:
        if calls.holds_calls(node.name):
            message = f"{node.name}() only holds other calls: write those, below {node.name}():"
            return self.source.error(message, node.place)
        if hint := calls.HINTS.get(node.name):
            return self.source.error(f"unknown call '{node.name}'", node.place, hint, "use")
        message = f"unknown call '{quoted(node.name)}'"
        return self.source.error(message, node.place, calls.nearest(node.name), "nearest known")

    def _lock(self, node: Call, call: calls.Call) -> str | None:
        """The lock of a lock call; its name carries meaning, so it has to be the right one."""
        if not call.lock or not calls.names_its_lock(node.name):
            return call.lock
        named = re.sub(r"^&?\s*(?:\w+\s*(?:->|\.)\s*)*", "", node.args)
        if named != call.lock:
            what = f"does not take '{quoted(named)}'" if named else "has to name its lock"
            raise self.source.error(f"{node.name}() {what}", node.place, (call.lock,))
        return call.lock

    def _word(self, node: Call, call: calls.Call) -> str | None:
        """The argument that carries meaning, if there is one; DesignError for one that cannot be meant."""
        words = calls.words(call.name)
        named = [word for word in dict.fromkeys(re.findall(r"\w+", node.args)) if word in words]
        if wrong := self._wrong_word(node.args, call, named):
            raise self.source.error(
                f"{node.name}() {wrong}", node.place, calls.words(call.name, self.section)
            )
        return named[0] if named else call.usual

    def _wrong_word(self, args: str, call: calls.Call, named: list[str]) -> str:
        """What is wrong with the words that a call was given; "" if nothing is."""
        words, here = calls.words(call.name), calls.words(call.name, self.section)
        if len(named) > 1:
            one_way = set(named) == set(calls.ATTRIBUTES)
            return "goes one way only" if one_way else "takes only one of its words"
        if named and named[0] not in here:
            (only, *_) = (s for s in calls.SECTIONS if named[0] in calls.words(call.name, s))
            return f"takes '{named[0]}' only in {only}:"
        if named:
            return ""
        if call.needs:
            return call.needs
        near = [word for word in words if args.startswith(word[0]) and f"{word}_" not in args]
        misspelt = re.fullmatch(r"\w+", args) and get_close_matches(args, near, cutoff=0.7)
        return f"does not know '{quoted(args)}'" if misspelt else ""


def spelled(call: Call) -> str:
    """The call in canonical spelling, with those arguments only that carry meaning."""
    known = calls.known(call.name)
    if known is None:
        return f"{call.name}()"
    if known.lock:
        return f"{known.name}({known.lock if calls.names_its_lock(known.name) else ''})"
    meant = calls.words(known.name)
    said = (word for word in re.findall(r"\w+", call.args) if word in meant)
    return f"{known.name}({next(said, known.usual or '')})"


def resolve(rows: Iterable[Row], to: str, platform: str) -> tuple[Row, ...]:
    """The rows that run when converting `to` on `platform`: ifs decided, returns obeyed, helpers expanded."""
    out: list[Row] = []
    for row in rows:
        if not all(_holds(test, to, platform) for test in row.when if test.var != "flush"):
            continue
        if row.call == "return":
            break
        left = tuple(test for test in row.when if test.var == "flush")
        out += _expand(replace(row, when=left), to, platform)
    return tuple(out)


def _holds(test: Condition, to: str, platform: str) -> bool:
    return (test.value == (to if test.var == "attr" else platform)) != test.negated


def _expand(row: Row, to: str, platform: str) -> list[Row]:
    """The calls for which a row stands, each with the direction that it takes and over what it goes."""
    call = calls.meanings(row.call)[0]
    if call.parts and platform not in call.on:
        return []  # the op is not implemented there, so nothing of it runs
    if row.target in calls.SECTIONS_OF_WORD:
        row = replace(row, target=None, walk=row.target)
    if to in call.words:
        row = replace(row, target=row.target or to)
    if call.lays == "in_folio_lock":
        return [replace(row, body=_body(row, call, to, platform))]
    if call.lays != "step" or not call.parts:
        return [row]
    return [_part(row, part, row.target or to) for part in call.parts[row.target or to]]


def _part(row: Row, call: str, towards: str) -> Row:
    """One of the calls for which a row stands."""
    return replace(row, call=call, target=towards if towards in calls.words(call) else None)


def _body(row: Row, call: calls.Call, to: str, platform: str) -> tuple[Row, ...]:
    """The work under the folio lock: the body given or the usual one; some calls go one way only."""
    to = to if to in call.parts else next(iter(call.parts))
    if row.body is not None:
        return resolve(row.body, to, platform)
    return tuple(_part(row, part, to) for part in call.parts[to])


def frozen(text: Iterable[Row], rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The `rows` of an aug section with the freezing of the mirror, if its `text` leaves that to the reader.

    The table is frozen, given to the secure EPT and written, then the leaf is frozen, and written at the end;
    where the text adds the table itself, what stands up to there belongs to the table.
    """
    text = tuple(text)
    if not text or any(calls.does(row.call, role) for row in text for role in ("freezes", "writes")):
        return rows
    adds = [i for i, row in enumerate(rows) if calls.does(row.call, "adds the table")]
    cut = adds[-1] + 1 if adds else 0
    said = any(calls.does(row.call, "adds the table") for row in text)
    table = rows[:cut] if said else (_implied("adds the table"),)
    leaf = (_implied("freezes", "leaf"), *rows[cut:], _implied("writes", "leaf"))
    return (_implied("freezes", "table"), *table, _implied("writes", "table"), *leaf)


def _implied(role: str, word: str | None = None) -> Row:
    """A row that the text leaves to the reader: the call with that role."""
    call = calls.with_role(role)
    return Row(call, word, text=f"{call}({word or ''})")


def digest(sections: Mapping[str, tuple[Row, ...]], linux: str) -> str:
    """Eight hex digits of the SHA-256 of rows and version: the same for texts that differ in comments or spelling."""
    plain = [linux, *((name, [_plain(row) for row in sections[name]]) for name in sorted(sections))]
    return hashlib.sha256(repr(plain).encode()).hexdigest()[:8]


def _plain(row: Row) -> tuple[object, ...]:
    body = None if row.body is None else [_plain(part) for part in row.body]
    return row.call, row.target, [str(test) for test in row.when], body, row.lock

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

ABSENT_OPS = ("kvm_x86_update_mem_attr", "rmp_prepare", "rmp_match")  # on tdx: not implemented there


@dataclass(frozen=True, slots=True)
class Row:
    """One call of a section, with the conditions of the ifs around it.

    `call` is the canonical name ("return" for a return); `lock` the lock of a lock call; `target` the word of
    `calls.WORDS` that the text names, and in `Design.rows` of each `rmpupdate` the direction that it takes;
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
    return any(row.call == "kvm_mmu_invalidate_range_add" for row in rows)


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
        if node.head.name in calls.TITLES:
            yield from self.rows(node.body, when)
            return
        head = self._row(node.head, when)
        if head.lock:
            raise self.source.error(f"{quoted(node.head.name)}() has no body", node.head.place)
        if head.call in calls.KEEPS_BODY:
            inner = _Builder(self.section, self.source, head.call)
            yield replace(head, body=tuple(inner.rows(node.body, ())))
        elif head.call in ABSENT_OPS:  # the body of an op runs where the op is implemented
            yield from self.rows(node.body, (*when, Condition("platform", "snp")))
        else:
            yield from self.rows(node.body, when)

    def _row(self, node: Call, when: tuple[Condition, ...]) -> Row:
        call = calls.known(node.name)
        if call is None:
            raise self._unknown(node)
        if self.section not in call.sections:
            message = f"{node.name}() cannot stand in {self.section}:"
            raise self.source.error(message, node.place, [f"{s}:" for s in call.sections], "it may stand in")
        if self.within and call.name not in calls.UNDER_FOLIO_LOCK:
            message = f"{node.name}() cannot stand inside {self.within}()"
            raise self.source.error(message, node.place, calls.UNDER_FOLIO_LOCK, "in there may stand")
        lock = self._lock(node, call)
        word = self._word(node, call)
        return Row(call.name, word, when, node.place.line, node.text, None, lock, node.place.name)

    def _unknown(self, node: Call) -> DesignError:
        if node.name in calls.TITLES:
            message = f"{node.name}() only holds other calls: write those, below {node.name}():"
            return self.source.error(message, node.place)
        if hint := calls.HINTS.get(node.name):
            return self.source.error(f"unknown call '{node.name}'", node.place, hint, "use")
        message = f"unknown call '{quoted(node.name)}'"
        return self.source.error(message, node.place, calls.nearest(node.name), "nearest known")

    def _lock(self, node: Call, call: calls.KnownCall) -> str | None:
        """The lock of a lock call; its name carries meaning, so it has to be the right one."""
        if not call.lock or not calls.names_its_lock(node.name):
            return call.lock
        named = re.sub(r"^&?\s*(?:\w+\s*(?:->|\.)\s*)*", "", node.args)
        if named != call.lock:
            what = f"does not take '{quoted(named)}'" if named else "has to name its lock"
            raise self.source.error(f"{node.name}() {what}", node.place, (call.lock,))
        return call.lock

    def _word(self, node: Call, call: calls.KnownCall) -> str | None:
        """The argument that carries meaning, if there is one; DesignError for one that cannot be meant."""
        words = calls.WORDS.get(call.name, ())
        named = [word for word in dict.fromkeys(re.findall(r"\w+", node.args)) if word in words]
        if wrong := self._wrong_word(node.args, call.name, named):
            fits = [w for w in words if self.section in calls.SECTIONS_OF_WORD.get(w, calls.SECTIONS)]
            raise self.source.error(f"{node.name}() {wrong}", node.place, fits)
        return named[0] if named else calls.USUAL_WORD.get(call.name)

    def _wrong_word(self, args: str, name: str, named: list[str]) -> str:
        """What is wrong with the words that a call was given; "" if nothing is."""
        words = calls.WORDS.get(name, ())
        if len(named) > 1:
            one_way = set(named) == set(calls.ATTRIBUTES)
            return "goes one way only" if one_way else "takes only one of its words"
        if named and self.section not in (only := calls.SECTIONS_OF_WORD.get(named[0], calls.SECTIONS)):
            return f"takes '{named[0]}' only in {only[0]}:"
        if named:
            fits = self.section in calls.WORD_ONLY_IN.get(name, calls.SECTIONS)
            return "" if fits else f"takes no word in {self.section}:, only in {calls.WORD_ONLY_IN[name][0]}:"
        if name in calls.NEEDS_WORD:
            return "has to name its SEAMCALL"
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
    meant = calls.WORDS.get(known.name, ())
    said = (word for word in re.findall(r"\w+", call.args) if word in meant)
    return f"{known.name}({next(said, calls.USUAL_WORD.get(known.name, ''))})"


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
    if row.target in calls.SECTIONS_OF_WORD:
        row = replace(row, target=None, walk=row.target)
    towards = row.target or to
    if row.call == "rmpupdate":
        return [replace(row, target=towards)]
    if row.call == "kvm_mem_attrs_changed":
        return [replace(row, call="kvm_unmap_gfn_range"), replace(row, call="kvm_flush_remote_tlbs", walk=None)]
    if row.call in ABSENT_OPS and platform == "tdx":
        return []  # the op is not implemented there, so nothing of it runs
    if row.call == "kvm_x86_update_mem_attr":
        return _helper(row, towards)
    if row.call in calls.KEEPS_BODY:
        return [replace(row, body=_locked_work(row, to, platform))]
    return [row]


def _helper(row: Row, towards: str) -> list[Row]:
    """The series' helper: the directmap entry is gone whenever the page is the guest's."""
    update = replace(row, call="rmpupdate", target=towards)
    if towards == "private":
        return [replace(row, call="kvm_unmap_directmap", target=None), update]
    return [update, replace(row, call="kvm_map_directmap", target=None)]


def _locked_work(row: Row, to: str, platform: str) -> tuple[Row, ...]:
    """The work under the folio lock: the body given or the usual one; rmp_prepare only makes private."""
    if row.call == "rmp_prepare":
        to = "private"
    if row.body is not None:
        return resolve(row.body, to, platform)
    if row.call == "rmp_match":
        return tuple(_helper(row, to))
    return replace(row, call="adjust_direct_map"), replace(row, call="rmpupdate", target="private")


def frozen(text: Iterable[Row], rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The `rows` of an aug section with the freezing of the mirror, if its `text` leaves that to the reader.

    The table is frozen, given to the secure EPT and written, then the leaf is frozen, and written at the end;
    where the text adds the table itself, what stands up to there belongs to the table.
    """
    said = [row.call for row in text]
    if not said or "freeze_spte" in said or "write_spte" in said:
        return rows
    adds = [i for i, row in enumerate(rows) if row.call == "tdh_mem_sept_add"]
    cut = adds[-1] + 1 if adds else 0
    table = rows[:cut] if "tdh_mem_sept_add" in said else (_implied("tdh_mem_sept_add"),)
    leaf = (_implied("freeze_spte", "leaf"), *rows[cut:], _implied("write_spte", "leaf"))
    return (_implied("freeze_spte", "table"), *table, _implied("write_spte", "table"), *leaf)


def _implied(call: str, word: str | None = None) -> Row:
    return Row(call, word, text=f"{call}({word or ''})")


def digest(sections: Mapping[str, tuple[Row, ...]], linux: str) -> str:
    """Eight hex digits of the SHA-256 of rows and version: the same for texts that differ in comments or spelling."""
    plain = [linux, *((name, [_plain(row) for row in sections[name]]) for name in sorted(sections))]
    return hashlib.sha256(repr(plain).encode()).hexdigest()[:8]


def _plain(row: Row) -> tuple[object, ...]:
    body = None if row.body is None else [_plain(part) for part in row.body]
    return row.call, row.target, [str(test) for test in row.when], body, row.lock

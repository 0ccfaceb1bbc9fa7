"""Designs: orderings written as text, read into sections of rows.

A design is one text: its header comment says what it is and where it comes from, its sections say what the
ioctl, the fault path, the RMP fault handler, guest_memfd's hole punching and, under TDX, the zap and the
augmenting of a private leaf do, one call a line.  What it does not say it inherits.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType

from .calls import (
    ATTRIBUTES,
    DEFAULTED,
    DEFAULTS_FROM,
    ONE_WAY,
    PLATFORMS,
    SECTIONS,
    does,
    nearest,
    with_role,
)
from .edit import Aligned, align, hunks, move, shown_lines, stuck
from .errors import DesignError, Place, quoted
from .files import BaseLoader, decode, from_file, from_stdin, shipped, shipped_text, siblings
from .rows import Row, build, digest, frozen, resolve, spelled
from .source import Source
from .tree import Condition, Node, as_written, calls_in, commented, shown, substitute

__all__ = ["Condition", "Design", "DesignError", "Row", "shipped"]

DEFAULT_BASE = "v8-post-hook"
LONGEST_NAME = (
    80  # signs of a design's name; one that cannot be printed, as in a file's, stands as its number
)
DEEPEST_BASE = 16  # bases of a base
REPLACED = with_role("zaps and flushes")  # the call whose place a fragment takes


@dataclass(frozen=True)
class Design:
    """One ordering: every section as rows, what its verdicts should be, and what it says about itself.

    `sections` holds all sections, inherited ones included; `base` is whom it inherits from, if anybody;
    `expect` maps platform, scenario and property to a verdict word (what is not listed should be Never);
    `backing` is the only one that the design knows, if it says so; `linux` is the kernel version of which it
    speaks, such as "v6.19", its base's if it names none: what changed between versions is as it was there;
    `notes` are sentences that a reader should see, such as which part is inherited.
    """

    name: str
    title: str
    source: str
    base: str | None
    text: str = field(repr=False)
    sections: Mapping[str, tuple[Row, ...]] = field(repr=False, hash=False)
    expect: Mapping[str, Mapping[str, Mapping[str, str]]] = field(repr=False, hash=False)
    notes: tuple[str, ...] = ()
    about: str = field(default="", repr=False)
    backing: str | None = None
    linux: str = ""
    own: tuple[str, ...] = field(default=(), repr=False)
    _says_linux: bool = field(default=False, repr=False, compare=False)
    _trees: Mapping[str, tuple[Node, ...]] = field(
        default_factory=dict, repr=False, compare=False, hash=False
    )
    _header: tuple[str, ...] = field(default=(), repr=False, compare=False)
    _loader: BaseLoader | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def parse(text: str, name: str = "(text)", base_loader: BaseLoader | None = None) -> Design:
        """The design that a text says; `base_loader` may give the text of a base that does not ship."""
        return _parse(text, name, base_loader, ())

    @staticmethod
    def load(which: str | os.PathLike[str]) -> Design:
        """The design of a shipped name, of a file, or of standard input ("-"); else DesignError."""
        name = os.fspath(which)
        if name == "-":
            return Design.parse(decode(from_stdin(), "(stdin)"), "(stdin)")
        if name in shipped("all"):
            return _shipped(name)
        path = Path(name)
        return Design.parse(decode(from_file(path), path.name), path.name, siblings(path.parent))

    def rows(self, section: str, to: str = "private", platform: str = "snp") -> tuple[Row, ...]:
        """The rows of a section that run for a conversion (in the fault path: a fault) `to` on `platform`.

        Ifs on the attribute and the platform are decided, `return` cuts, helpers are spelled out; of the
        conditions only `flush` is left in `when`.  In punch `to` is always shared, in aug private; aug has the
        mirror's freezing in it also where the text leaves it out.
        """
        _check_words((section, SECTIONS), (to, ATTRIBUTES), (platform, PLATFORMS))
        text = self.sections[section]
        rows = resolve(text, ONE_WAY.get(section, to), platform)
        return frozen(text, rows) if section == "aug" else rows

    def lines(self, section: str) -> tuple[str, ...]:
        """The lines of a section for display: as written, without comments, indented by what governs them."""
        _check_words((section, SECTIONS))
        return shown_lines(self._trees[section])

    def aligned(self, other: Design) -> list[tuple[str, str, str | None, str | None]]:
        """Both designs side by side: (section, mark, left, right), mark " " for both, "-" left, "+" right."""
        return [(name, *line) for name in SECTIONS for line in self._align(name, other)]

    def diff(self, other: Design) -> str:
        """The lines in which the two differ, as a unified diff by section; empty if they do not."""
        out: list[str] = []
        for name in SECTIONS:
            if body := list(hunks(self._align(name, other))):
                out += [f"@@ {name} @@", *body]
        return "\n".join([f"--- {quoted(self.name)}", f"+++ {quoted(other.name)}", *out, ""]) if out else ""

    def _align(self, section: str, other: Design) -> list[Aligned]:
        return list(align(self._trees[section], other._trees[section]))

    def canonical(self) -> str:
        """The whole design as one text that inherits nothing, canonically spelled; its rows are equal."""
        out = [f"// {line}".rstrip() for line in self._header]
        out += ["", f"linux: {self.linux}"]
        out += ["", f"backing: {self.backing}"] if self.backing else []
        for name in (name for name in SECTIONS if self._trees[name]):
            out += ["", self.spelled(name)]
        for platform, scenarios in self.expect.items():
            out += ["", f"expect {platform}:"]
            for scenario, verdicts in scenarios.items():
                said = ", ".join(f"{name} {verdict}" for name, verdict in verdicts.items())
                out.append(f"    {scenario}: {said or 'all Never'}")
        return "\n".join(out).strip() + "\n"

    def spelled(self, section: str) -> str:
        """A section with its header in canonical spelling, without comments; empty if it has no line."""
        lines = ["    " * (line.depth + 1) + line.text for line in shown(self._trees[section], spelled)]
        return "\n".join([f"{section}:", *lines]) if lines else ""

    @cached_property
    def digest(self) -> str:
        """Eight hex digits that stand for rows and version: comments and spelling do not change them."""
        return digest(self.sections, self.linux)

    @property
    def version(self) -> tuple[int, int]:
        """The kernel version as numbers, to compare."""
        major, minor = self.linux.removeprefix("v").split(".")
        return int(major), int(minor)

    def replace_text(self, text: str) -> Design:
        """The design that an edited text says; its name gets a `*`, as it is no longer the one that ships."""
        if text == self.text:
            return self
        return _parse(text, self.name if self.name.endswith("*") else f"{self.name}*", self._loader, ())

    def move(self, section: str, line_index: int, by: int) -> Design:
        """The design with the statement shown at a line of `lines(section)` moved down (up if negative)."""
        return self.moved(section, line_index, by)[0]

    def moved(self, section: str, line_index: int, by: int) -> tuple[Design, int]:
        """What `move` gives, and the line at which the statement then stands.

        An `if` moves with what it governs and is stepped over whole; at the end of its block a statement
        stays.  Expected verdicts are dropped: they were those of the other ordering.
        """
        _check_words((section, SECTIONS))
        nodes = self._trees[section]
        if not 0 <= line_index < len(shown_lines(nodes)):
            raise DesignError(f"{section}: has no line {line_index}", Place(self.name, 0, 0))
        for _ in range(abs(by)):
            nodes, line_index = move(nodes, line_index, 1 if by > 0 else -1)
        if nodes == self._trees[section]:
            return self, line_index
        return self.replace_text(self._rewritten(section, nodes)), line_index

    def why_stuck(self, section: str, line_index: int, by: int) -> str:
        """Why `move` leaves the statement at this line where it is, in words; empty if it moves."""
        _check_words((section, SECTIONS))
        return stuck(self._trees[section], line_index, 1 if by > 0 else -1)

    def _rewritten(self, changed: str, nodes: tuple[Node, ...]) -> str:
        """The text with one section changed, comments kept."""
        blocks = ["\n".join(f"// {line}".rstrip() for line in self._header)] if self._header else []
        if self.base:
            blocks.append(f"base: {self.base}")
        if self._says_linux:
            blocks.append(f"linux: {self.linux}")
        if self.backing:
            blocks.append(f"backing: {self.backing}")
        for name in SECTIONS:
            if name in self.own or name == changed:
                tree = nodes if name == changed else self._trees[name]
                lines = [text for line in shown(tree, as_written) for text in commented(line)]
                blocks.append("\n".join([f"{name}:", *lines]))
        return "\n\n".join(blocks) + "\n"


@cache
def _shipped(name: str) -> Design:
    return _parse(shipped_text(name), name, None, (), ships=True)


def _parse(
    text: str, name: str, loader: BaseLoader | None, chain: tuple[str, ...], ships: bool = False
) -> Design:
    """Read a text and what it inherits; `chain` are the bases on the way here."""
    from .syntax import read  # brings lark: only those pay for it who read a design

    name = quoted(name, LONGEST_NAME)
    source = Source(name, text)
    parsed = read(source)
    for section, nodes in parsed.sections.items():
        build(nodes, section, source)
    trees = dict(parsed.sections)
    fragment = "ioctl" in trees and not _does(trees["ioctl"], "stores")
    missing = [s for s in SECTIONS if s not in trees and s not in DEFAULTED]
    base: Design | None = None
    if missing or fragment or parsed.base:
        place = parsed.base_place or Place(name, 1, 1)
        base = _base(parsed.base or DEFAULT_BASE, place, source, loader, chain)
        if fragment:
            trees["ioctl"] = _replaced(base, trees["ioctl"], place, source)
    heir = base or (None if ships and name == DEFAULTS_FROM else _shipped(DEFAULTS_FROM))
    trees = {s: trees[s] if s in trees else heir._trees[s] if heir else () for s in SECTIONS}
    told = [] if ships and not fragment else _notes(base, parsed.base, missing, fragment, trees["ioctl"])
    header, origin, about = _about(source.header)
    return Design(
        name,
        title=header or name,
        source=origin,
        base=base.name if base else None,
        text=text,
        sections=MappingProxyType({s: build(trees[s], s, source) for s in SECTIONS}),
        expect=MappingProxyType(parsed.expect),
        notes=tuple(told),
        about=about,
        backing=parsed.backing or (base.backing if base else None),
        linux=parsed.linux or (base or _shipped(DEFAULT_BASE)).linux,
        own=tuple(section for section in SECTIONS if section in parsed.sections),
        _says_linux=parsed.linux is not None,
        _trees=MappingProxyType(trees),
        _header=tuple(source.header),
        _loader=loader,
    )


def _does(nodes: tuple[Node, ...], role: str) -> bool:
    return any(does(call.name, role) for call in calls_in(nodes))


def _base(
    name: str, place: Place, source: Source, loader: BaseLoader | None, chain: tuple[str, ...]
) -> Design:
    if name in chain:
        message = f"base cycle: {' -> '.join((*chain[chain.index(name) :], name))}"
        raise source.error(message, place, shipped(), "a base that ships")
    if name in shipped("all"):
        return _shipped(name)
    if len(chain) >= DEEPEST_BASE:
        raise source.error(f"more than {DEEPEST_BASE} bases, each of the other", place)
    text = loader(name) if loader else None
    if text is None:
        raise source.error(f"unknown base '{quoted(name)}'", place, nearest(name, shipped()), "nearest known")
    return _parse(text, name, loader, (*chain, name))


def _replaced(base: Design, part: tuple[Node, ...], place: Place, source: Source) -> tuple[Node, ...]:
    """The base's ioctl with the fragment in place of the call."""
    whole = base._trees["ioctl"]
    if substitute(whole, REPLACED, ()) == whole:
        message = f"the text never stores the attributes, and {base.name} has no {REPLACED}() to replace"
        raise source.error(message, place, ("kvm_vm_set_region_attr()", f"base: {DEFAULT_BASE}"))
    return substitute(whole, REPLACED, part)


def _notes(
    base: Design | None, named: str | None, missing: list[str], fragment: bool, ioctl: tuple[Node, ...]
) -> list[str]:
    notes = []
    if base and fragment:
        notes.append(
            f"This text never stores the attributes, so it takes the place of {REPLACED}() in the ioctl of "
            f"{base.name}."
        )
    elif base and not named:
        parts = " and ".join(filter(None, (", ".join(f"{s}:" for s in missing[:-1]), f"{missing[-1]}:")))
        notes.append(f"What the text does not give ({parts}) is that of {base.name}.")
    if _does(ioctl, "opens") and not _does(ioctl, "closes"):
        notes.append("The ioctl begins an invalidation and never ends it.")
    return notes


def _about(header: list[str]) -> tuple[str, str, str]:
    """Title, source (the line "From: ...", with what is indented below it), and what else the header says."""
    lines = [line for line in header if line]
    title = lines[0] if lines else ""
    origin = [line[5:].strip() for line in lines[1:] if line.startswith("From:")]
    rest = [line for line in lines[1:] if not line.startswith("From:")]
    return title, " ".join(origin), " ".join(rest)


def _check_words(*pairs: tuple[str, Collection[str]]) -> None:
    for word, allowed in pairs:
        if word not in allowed:
            raise DesignError(f"unknown: '{quoted(str(word))}'", Place("design", 0, 0), allowed=allowed)

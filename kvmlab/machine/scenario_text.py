"""Scenarios as text: what `kvmlab show --scenario NAME` prints, and what a reader writes for a case of his own.

One statement a line; comments, indentation and mail quoting as in designs.  What is not said is as in `tiny`: one gfn
in one memslot, two vCPUs of a correct guest, nothing fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ..design.errors import DesignError, Place, quoted
from ..design.source import Source
from ..errors import InputError
from ..kernel.failures import FAILURES
from ..kvm.memslots import SMM, MemSlot
from .conf import YIELDS
from .expressions import parse_expression
from .scenario import (
    AFTER,
    ANY_TIME,
    BEFORE,
    GUESTS,
    MOST_GFNS,
    MOST_VCPUS,
    Converts,
    CreatesMemslot,
    DeletesMemslot,
    Discards,
    HostWrites,
    Scenario,
    Thread,
)

KINDS = ("shared", "private")
ASKS = ("never", "sometimes")
MAY = {**{name: f"{name} fails" for name in FAILURES}, YIELDS: YIELDS}
WRITES = {
    "io": "write(shared page)", "stray": "write(present page)", "private": "write(private page)",
    "freed": "write(freed page)",
}  # fmt: skip
GFNS = r"gfns? (?P<lo>\d+)(?: ?- ?(?P<hi>\d+))?"
EXAMPLES = {
    "start": "start: shared", "asks": "asks: private, shared", "guest": "guest: careless", "vcpus": "vcpus: 2",
    "exits": "exits: convert", "memory": "memory:", "threads": "threads:", "may": "may: rmpupdate fails",
    "never": "never: attr[0] == private && rmp[P0] == hypervisor && quiet",
    "sometimes": "sometimes: guest[0] == ready",
}  # fmt: skip
MEMORY = (
    "gfns 0-1", "memslot: gfn 0", "memslot: gfn 0, smm", "mapped in 2M", "guest_memfd in 2M",
    "converted: gfn 0", "unused: gfn 1",
)  # fmt: skip
THREADS = (
    "vmm: punch()", "vmm: punch(gfn 0)", "vmm: punch() after the ioctl", "vmm: punch() before the ioctl",
    "vmm: ioctl(gfn 1)", "vmm: ioctl(gfn 1) cannot reserve", "vmm: delete_slot()", "vmm: create_slot()",
    *(f"host: {what}" for what in WRITES.values()),
)  # fmt: skip


def parse_scenario(text: str, name: str = "own") -> Scenario:
    """Read a scenario; DesignError says what is wrong, where, and what would be allowed.

    The comment that opens the text is its title, with its name before a colon if it has another one than `name`.
    """
    reader = _Reader(Source(name, text))
    for number, line in enumerate(reader.source.clean, 1):
        if line.strip():
            reader.line(number, line)
    return reader.done()


def spelled(scenario: Scenario) -> str:
    """The text of a scenario, as `parse_scenario` reads it."""
    usual, out = Scenario("", "", ()), [f"// {scenario.name}: {scenario.title}"]
    start, *asks = scenario.eras
    out += [f"start: {start}", *([f"asks: {', '.join(asks)}"] if asks else [])]
    out += [f"vcpus: {scenario.racers + 1}"] if scenario.racers != usual.racers else []
    words = [
        word for word, fields in GUESTS.items() if all(getattr(scenario, f) == v for f, v in fields.items())
    ]
    out += [f"guest: {words[-1]}"] if words[-1] != "correct" else []
    out += ["exits: convert"] if scenario.auto_convert else []
    if memory := _memory(scenario):
        out += ["memory:", *(f"    {line}" for line in memory)]
    if scenario.threads:
        out += ["threads:", *(f"    {_thread(thread)}" for thread in scenario.threads)]
    out += [f"{word}: {text}" for word, text in scenario.asked]
    out += [f"may: {', '.join(MAY.get(what, what) for what in scenario.may)}"] if scenario.may else []
    return "\n".join(out) + "\n"


def _memory(scenario: Scenario) -> list[str]:
    lines = [_range(scenario.gfns)] if scenario.gfns != (0,) else []
    for slot in scenario.memslots:
        gfns = tuple(range(slot.base, slot.base + slot.npages))
        lines.append(f"memslot: {_range(gfns)}{', smm' if slot.as_id == SMM else ''}")
    lines += ["mapped in 2M"] if scenario.huge else []
    lines += ["guest_memfd in 2M"] if scenario.folio_2m else []
    lines += [f"converted: {_range(scenario.request)}"] if scenario.request else []
    lines += [f"unused: {_range(scenario.unused)}"] if scenario.unused else []
    return lines


def _range(gfns: tuple[int, ...]) -> str:
    return f"gfn {gfns[0]}" if len(gfns) == 1 else f"gfns {gfns[0]}-{gfns[-1]}"


def _thread(thread: Thread) -> str:
    match thread:
        case HostWrites(what):
            return f"host: {WRITES[what]}"
        case Discards(when, gfns):
            return f"vmm: punch({_range(gfns) if gfns else ''})" + (
                "" if when == ANY_TIME else f" {when} the ioctl"
            )
        case Converts(gfns, refused):
            return f"vmm: ioctl({_range(gfns)})" + (" cannot reserve" if refused else "")
        case DeletesMemslot():
            return "vmm: delete_slot()"
        case _:
            return "vmm: create_slot()"


@dataclass
class _Reader:
    """Goes through the lines; `within` is the list that indented lines belong to."""

    source: Source
    said: dict[str, Any] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    within: str = ""

    def line(self, number: int, line: str) -> None:
        """One line that is not blank."""
        indented, place = line[0] in " \t", self.source.place(number + 1, len(line) - len(line.lstrip()) + 1)
        text = re.sub(r"\s+", " ", line.strip().rstrip(";"))
        if indented and self.within:
            getattr(self, f"_in_{self.within}")(text, place)
            return
        key, colon, value = text.partition(":")
        if not colon or key not in EXAMPLES:
            near = get_close_matches(key, EXAMPLES, 3) or list(EXAMPLES)
            raise self.source.error(f"unknown line '{quoted(text)}'", place, [EXAMPLES[k] for k in near])
        if key in self.places and key not in ASKS:
            raise self.source.error(f"'{key}:' is given twice", place)
        self.places[key], self.within = place, key if key in ("memory", "threads") else ""
        value = value.strip()
        if self.within and value:
            raise self.source.error(f"'{key}:' is a list: its lines stand below it, indented", place)
        if not self.within:
            getattr(self, f"_{key}")(value, place)

    def _one(self, value: str, allowed: Iterable[str], place: Place) -> str:
        if value not in (allowed := tuple(allowed)):
            raise self.source.error(f"'{quoted(value)}' is not known here", place, allowed)
        return value

    def _start(self, value: str, place: Place) -> None:
        self.said["start"] = self._one(value, KINDS, place)

    def _asks(self, value: str, place: Place) -> None:
        self.said["asks"] = [self._one(kind.strip(), KINDS, place) for kind in value.split(",")]

    def _guest(self, value: str, place: Place) -> None:
        self.said |= GUESTS[self._one(value, GUESTS, place)]

    def _vcpus(self, value: str, place: Place) -> None:
        self.said["racers"] = int(self._one(value, map(str, range(1, MOST_VCPUS + 1)), place)) - 1

    def _exits(self, value: str, place: Place) -> None:
        self.said["auto_convert"] = self._one(value, ("rerun", "convert"), place) == "convert"

    def _may(self, value: str, place: Place) -> None:
        words = {text: name for name, text in MAY.items()}
        self.said["may"] = tuple(words[self._one(part.strip(), words, place)] for part in value.split(","))

    def _asked(self, word: str, value: str, place: Place) -> None:
        try:
            found = parse_expression(value)
        except InputError as wrong:
            raise self.source.error(str(wrong), place) from None
        self.said["asked"] = (*self.said.get("asked", ()), (word, found.text))

    def _never(self, value: str, place: Place) -> None:
        self._asked("never", value, place)

    def _sometimes(self, value: str, place: Place) -> None:
        self._asked("sometimes", value, place)

    def _gfns(self, match: re.Match[str], place: Place) -> tuple[int, ...]:
        lo = int(match["lo"])
        hi = int(match["hi"] or lo)
        if not lo <= hi < MOST_GFNS:
            raise self.source.error("no range of gfns", place, [f"0 to {MOST_GFNS - 1}, the lower one first"])
        return tuple(range(lo, hi + 1))

    def _in_memory(self, text: str, place: Place) -> None:
        flags = {"mapped in 2M": "huge", "guest_memfd in 2M": "folio_2m"}
        found = re.fullmatch(rf"(?:(?P<key>memslot|converted|unused): ?)?{GFNS}(?P<smm>, ?smm)?", text)
        if text in flags:
            self.said[flags[text]] = True
            return
        if not found or (found["smm"] and found["key"] != "memslot"):
            raise self.source.error(f"'{quoted(text)}' says nothing of memory", place, MEMORY, "such as")
        gfns, key = self._gfns(found, place), found["key"] or "gfns"
        self.places.setdefault(f"memory {key}", place)
        if key == "memslot":
            smm = bool(found["smm"])
            slot = MemSlot(gfns[0], len(gfns), as_id=SMM if smm else 0, gmem=not smm)
            self.said["memslots"] = (*self.said.get("memslots", ()), slot)
        else:
            self.said["request" if key == "converted" else key] = gfns

    def _in_threads(self, text: str, place: Place) -> None:
        self.said["threads"] = (*self.said.get("threads", ()), self._thread(text, place))

    def _thread(self, text: str, place: Place) -> Thread:
        for pattern, make in _THREADS:
            if found := re.fullmatch(pattern, text):
                gfns = self._gfns(found, place) if found.groupdict().get("lo") else ()
                return make(found, gfns)
        near = get_close_matches(text, THREADS, 3, 0.5) or THREADS
        raise self.source.error(f"'{quoted(text)}' is no thread", place, near, "such as")

    def done(self) -> Scenario:
        """What was said, if it fits together."""
        said, source = self.said, self.source
        if "start" not in said:
            raise DesignError(
                "a scenario begins with 'start: shared' or 'start: private'", source.last_place()
            )
        name, colon, title = " ".join(source.header).partition(":")
        if not colon or not re.fullmatch(r"[\w+-]+", name):
            name, title = source.name, " ".join(source.header)
        eras = (said.pop("start"), *said.pop("asks", ()))
        if twice := [n for n in range(1, len(eras)) if eras[n] == eras[n - 1]]:
            message = f"it is {eras[twice[0]]} already when the guest asks for it"
            raise source.error(message, self.places["asks"], ["the other kind each time"])
        gfns = said.get("gfns", (0,))
        if gfns[0]:
            raise source.error("gfns are counted from 0", self.places["memory gfns"], [f"gfns 0-{gfns[-1]}"])
        for key, what in (("converted", "request"), ("unused", "unused")):
            if not set(said.get(what, ())) <= set(gfns):
                raise source.error("not all of that is memory", self.places[f"memory {key}"], [_range(gfns)])
        if any(slot.base + slot.npages > len(gfns) for slot in said.get("memslots", ())):
            raise source.error("not all of that is memory", self.places["memory memslot"], [_range(gfns)])
        for thread in said.get("threads", ()):
            if not set(getattr(thread, "gfns", ())) <= set(gfns):
                raise source.error(
                    "a thread works on what is no memory", self.places["threads"], [_range(gfns)]
                )
        return Scenario(name, title.strip(), eras, **said)


_Make = Callable[["re.Match[str]", tuple[int, ...]], Thread]
_THREADS: tuple[tuple[str, _Make], ...] = (
    (rf"vmm: ?punch\((?:{GFNS})?\)(?: at any time)?", lambda m, gfns: Discards(ANY_TIME, gfns)),
    (rf"vmm: ?punch\((?:{GFNS})?\) (?P<when>{BEFORE}|{AFTER}) the ioctl", lambda m, gfns: Discards(m["when"], gfns)),
    (rf"vmm: ?ioctl\({GFNS}\)(?P<refused> cannot reserve)?", lambda m, gfns: Converts(gfns, bool(m["refused"]))),
    (r"vmm: ?delete_slot\(\)", lambda m, gfns: DeletesMemslot()),
    (r"vmm: ?create_slot\(\)", lambda m, gfns: CreatesMemslot()),
    *((f"host: ?{re.escape(text)}", (lambda m, gfns, what=what: HostWrites(what))) for what, text in WRITES.items()),
)  # fmt: skip

"""What a scenario says: who acts, which conversion, what may go wrong.  Two of them can be joined, and resized."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeAlias

from ..errors import InputError
from ..kvm.memslots import SMM as ADDRESS_SPACE_SMM
from ..kvm.memslots import MemSlot
from .conf import ADDS, DELETES, DISCARDS, FOLIO_2M, LARGE, MEMSLOTS, RESERVED, SMM


@dataclass(frozen=True)
class HostWrites:
    """What the host's kernel thread writes as well: the shared page while it is the host's ("io"), the private page
    whenever the directmap has it ("stray"), at any time ("private"), or once guest_memfd has given it back ("freed").
    """

    what: str


ANY_TIME, BEFORE, AFTER = "any time", "before", "after"
MOST_GFNS, MOST_VCPUS = 8, 6


@dataclass(frozen=True)
class Discards:
    """The VMM gives private pages back (PUNCH_HOLE): all that are asked for, if no `gfns` are named.

    `when`: "before" or "after" the ioctl that makes them shared, in the same thread; or at "any time", in another.
    """

    when: str
    gfns: tuple[int, ...] = ()


@dataclass(frozen=True)
class Converts:
    """Another VMM thread converts `gfns` at the same time; `refused`: its last reservation fails for certain."""

    gfns: tuple[int, ...]
    refused: bool = False


@dataclass(frozen=True)
class DeletesMemslot:
    """A VMM thread deletes the memslot, once, at any time."""


@dataclass(frozen=True)
class CreatesMemslot:
    """There is no memslot until a VMM thread creates one, at any time."""


Thread: TypeAlias = HostWrites | Discards | Converts | DeletesMemslot | CreatesMemslot
BRINGS: dict[type, frozenset[str]] = {
    Discards: frozenset({DISCARDS}),
    DeletesMemslot: frozenset({MEMSLOTS, DELETES}),
    CreatesMemslot: frozenset({MEMSLOTS, ADDS}),
}


@dataclass(frozen=True)
class Scenario:
    """Who acts: the kinds of the page era by era, the vCPUs that race, memory, what else runs, what may happen.

    A thread of the host always writes a neighbouring page through the directmap; `threads` are those beside it and
    the vCPUs ("Who acts" in docs/model.md).  `may` names failures that may strike once, and that a zap may yield.
    """

    name: str
    title: str
    eras: tuple[str, ...]
    racers: int = 1
    correct_guest: bool = True
    gfns: tuple[int, ...] = (0,)
    request: tuple[int, ...] = ()  # the gfns that are converted, if not all
    huge: bool = False  # memory may be mapped in 2M (two gfns) or 1G (more)
    folio_2m: bool = False  # guest_memfd has one 2M page for all gfns
    memslots: tuple[MemSlot, ...] = ()  # if not one over all gfns
    unused: tuple[int, ...] = ()  # gfns that the guest leaves alone
    stray: bool = False  # a vCPU may also write through the old kind
    hostile: bool = False  # a careless guest that rescinds at any time, too
    auto_convert: bool = False  # the VMM converts to what was touched
    threads: tuple[Thread, ...] = ()
    may: tuple[str, ...] = ()
    asked: tuple[
        tuple[str, str], ...
    ] = ()  # "never" or "sometimes", and an expression: machine/expressions.py

    @property
    def parts(self) -> frozenset[str]:
        """What the machine needs for its threads, its memory and its failures."""
        found = frozenset(self.may).union(*(BRINGS.get(type(thread), frozenset()) for thread in self.threads))
        found |= {LARGE} if self.huge else set()
        found |= {FOLIO_2M} if self.folio_2m else set()
        found |= {SMM, MEMSLOTS} if self.smm else set()
        found |= {RESERVED} if any(isinstance(t, Converts) and t.refused for t in self.threads) else set()
        return found

    @property
    def smm(self) -> bool:
        """Whether vCPUs enter a second address space."""
        return any(slot.as_id == ADDRESS_SPACE_SMM for slot in self.memslots)

    def joined(self, other: Scenario) -> Scenario:
        """This scenario with what else acts and may happen in the other; the conversions stay its own.

        InputError if both say of memory or guest, and differ.
        """
        said = dict[str, object]()
        for name in (
            f.name for f in fields(self) if f.name not in ("name", "title", "eras", "threads", "may", "asked")
        ):
            mine, theirs, usual = getattr(self, name), getattr(other, name), getattr(_USUAL, name)
            if usual not in (mine, theirs) and mine != theirs and name != "racers":
                raise InputError(f"{self.name} and {other.name} do not fit: {name} is {mine} and {theirs}")
            said[name] = theirs if mine == usual else mine
        said |= {"racers": self.racers, "threads": tuple(dict.fromkeys(self.threads + other.threads))}
        said |= {"may": tuple(dict.fromkeys(self.may + other.may)), "name": f"{self.name}+{other.name}"}
        said |= {"asked": tuple(dict.fromkeys(self.asked + other.asked))}
        return replace(self, title=f"{self.title}; with {other.name}", **said)  # type: ignore[arg-type]

    def resized(self, vcpus: int | None = None, gfns: int | None = None) -> Scenario:
        """The same with another number of vCPUs, or of gfns, all of which are converted.

        InputError where the number is out of range, or the memory is laid out gfn by gfn.
        """
        found, name = self, self.name
        if vcpus is not None:
            if not 1 <= vcpus <= MOST_VCPUS:
                raise InputError(f"a scenario has 1 to {MOST_VCPUS} vCPUs, not {vcpus}")
            found, name = replace(found, racers=vcpus - 1), f"{name}+vcpus-{vcpus}"
        if gfns is not None:
            if not 1 <= gfns <= MOST_GFNS:
                raise InputError(f"a scenario has 1 to {MOST_GFNS} gfns, not {gfns}")
            placed = [n for n in ("memslots", "request", "unused", "huge", "folio_2m") if getattr(self, n)]
            threads = any(getattr(thread, "gfns", ()) for thread in self.threads)
            if placed or threads:
                raise InputError(
                    f"{self.name} says which gfn is what: another number of gfns would be another scenario"
                )
            found, name = replace(found, gfns=tuple(range(gfns))), f"{name}+gfns-{gfns}"
        return replace(found, name=name)


_USUAL = Scenario("", "", ())
# What a guest may be, in one word, and what that is.
GUESTS: dict[str, dict[str, bool]] = {
    word: {"correct_guest": correct, "stray": stray, "hostile": hostile}
    for word, correct, stray, hostile in (
        ("correct", True, False, False),
        ("strays", True, True, False),
        ("careless", False, False, False),
        ("hostile", False, False, True),
    )
}

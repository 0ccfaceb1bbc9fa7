"""Scenarios: who acts, which conversion, what may go wrong.  They are data, and two of them can be joined."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeAlias

from ..errors import InputError
from ..kernel.failures import RMPUPDATE, SEAMCALL, XARRAY
from ..kvm.memslots import SMM as ADDRESS_SPACE_SMM
from ..kvm.memslots import MemSlot
from .conf import ADDS, DELETES, DISCARDS, FOLIO_2M, LARGE, MEMSLOTS, RESERVED, SMM, YIELDS


@dataclass(frozen=True)
class HostWrites:
    """What the host's kernel thread writes as well: the shared page while it is the host's ("io"), the private page
    whenever the directmap has it ("stray"), at any time ("private"), or once guest_memfd has given it back ("freed").
    """

    what: str


ANY_TIME = "any time"


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
            f.name for f in fields(self) if f.name not in ("name", "title", "eras", "threads", "may")
        ):
            mine, theirs, usual = getattr(self, name), getattr(other, name), getattr(_USUAL, name)
            if usual not in (mine, theirs) and mine != theirs and name != "racers":
                raise InputError(f"{self.name} and {other.name} do not fit: {name} is {mine} and {theirs}")
            said[name] = theirs if mine == usual else mine
        said |= {"racers": self.racers, "threads": tuple(dict.fromkeys(self.threads + other.threads))}
        said |= {"may": tuple(dict.fromkeys(self.may + other.may)), "name": f"{self.name}+{other.name}"}
        return replace(self, title=f"{self.title}; with {other.name}", **said)  # type: ignore[arg-type]


_USUAL = Scenario("", "", ())
_ALL = (
    Scenario("tiny", "to private, one racing vCPU", ("shared", "private")),
    Scenario("to-private", "to private, two racing vCPUs", ("shared", "private"), racers=2),
    Scenario("to-shared", "to shared, two racing vCPUs", ("private", "shared"), racers=2),
    Scenario(
        "round-trip", "private, shared, and private again; one racing vCPU", ("private", "shared", "private")
    ),
    Scenario(
        "round-trip-shared",
        "shared, private, and shared again; one racing vCPU",
        ("shared", "private", "shared"),
    ),
    Scenario(
        "host-io",
        "to shared; the host also writes the page while it is the host's",
        ("private", "shared"),
        threads=(HostWrites("io"),),
    ),
    Scenario(
        "host-stray",
        "to private and back; the host writes any page present in the directmap",
        ("shared", "private", "shared"),
        threads=(HostWrites("stray"),),
    ),
    Scenario(
        "host-writes-private",
        "to private; the host writes the private page itself",
        ("shared", "private"),
        threads=(HostWrites("private"),),
    ),
    Scenario(
        "range",
        "to private, two gfns in two memslots; one racing vCPU",
        ("shared", "private"),
        gfns=(0, 1),
        memslots=(MemSlot(0), MemSlot(1)),
    ),
    Scenario(
        "hole",
        "to private, three gfns, the middle one in no memslot; one racing vCPU",
        ("shared", "private"),
        gfns=(0, 1, 2),
        memslots=(MemSlot(0), MemSlot(2)),
    ),
    Scenario(
        "slot-added",
        "to private; there is no memslot until a VMM thread creates it, at any time",
        ("shared", "private"),
        threads=(CreatesMemslot(),),
    ),
    Scenario(
        "smm",
        "to private; vCPUs enter SMM, which has an address space and memslots of its own",
        ("shared", "private"),
        memslots=(MemSlot(0), MemSlot(0, as_id=ADDRESS_SPACE_SMM, gmem=False)),
    ),
    Scenario(
        "two-vmms",
        "to private, two gfns; another VMM thread converts one of them at the same time",
        ("shared", "private"),
        gfns=(0, 1),
        threads=(Converts((1,)),),
    ),
    Scenario(
        "two-ranges",
        "to private, the first of three gfns; a VMM thread discards the private page of the last at any time",
        ("shared", "private"),
        gfns=(0, 1, 2),
        request=(0,),
        threads=(Discards(ANY_TIME, (2,)),),
        unused=(2,),
    ),
    Scenario(
        "auto-convert",
        "to private; the VMM answers an exit by converting to what was touched",
        ("shared", "private"),
        auto_convert=True,
    ),
    Scenario("stray-write", "to private; a vCPU also writes as if shared", ("shared", "private"), stray=True),
    Scenario(
        "huge",
        "to private, one page of a shared 2M page (of two children)",
        ("shared", "private"),
        gfns=(0, 1),
        request=(0,),
        huge=True,
    ),
    Scenario(
        "huge-1g",
        "to private, two gfns of a shared 1G page: the tail of one 2M page and the head of the next",
        ("shared", "private"),
        gfns=(0, 1, 2, 3, 4, 5),
        request=(1, 2),
        huge=True,
        unused=(2, 3, 4),
    ),
    Scenario("hook-fails", "to private; one RMPUPDATE may fail", ("shared", "private"), may=(RMPUPDATE,)),
    Scenario(
        "discard",
        "to shared and back; the VMM discards the private page after the ioctl, the host then uses it",
        ("private", "shared", "private"),
        threads=(Discards("after"), HostWrites("freed")),
    ),
    Scenario(
        "discard-first",
        "the same, but the VMM discards it before the ioctl, as the selftests do",
        ("private", "shared", "private"),
        threads=(Discards("before"), HostWrites("freed")),
    ),
    Scenario(
        "discard-races",
        "to private, while a VMM thread discards the private page, at any time; a careless guest",
        ("shared", "private"),
        racers=0,
        correct_guest=False,
        threads=(Discards(ANY_TIME), HostWrites("freed")),
    ),
    Scenario(
        "huge-accept",
        "to private, both pages of one 2M guest_memfd page; the guest validates 2M",
        ("shared", "private"),
        gfns=(0, 1),
        huge=True,
        folio_2m=True,
    ),
    Scenario(
        "huge-split",
        "to shared, one page of a private 2M page, discarded afterwards",
        ("private", "shared"),
        gfns=(0, 1),
        request=(0,),
        huge=True,
        folio_2m=True,
        threads=(Discards("after"), HostWrites("freed")),
    ),
    Scenario(
        "vmm-punches",
        "a careless vCPU on a private 2M page, which a VMM thread discards at any time",
        ("private",),
        racers=0,
        correct_guest=False,
        gfns=(0, 1),
        huge=True,
        folio_2m=True,
        threads=(Discards(ANY_TIME), HostWrites("freed")),
    ),
    Scenario(
        "punch-4k",
        "a careless vCPU on a private 2M page, of which a VMM thread discards one 4K page at any time",
        ("private",),
        racers=0,
        correct_guest=False,
        gfns=(0, 1),
        huge=True,
        folio_2m=True,
        threads=(Discards(ANY_TIME, (1,)), HostWrites("freed")),
    ),
    Scenario(
        "zap-yields",
        "to private, two gfns; the zap may yield mmu_lock between them",
        ("shared", "private"),
        gfns=(0, 1),
        may=(YIELDS,),
    ),
    Scenario(
        "xarray-full",
        "to private, two gfns; one allocation of the xarray may fail, and the VMM asks again",
        ("shared", "private"),
        gfns=(0, 1),
        may=(XARRAY,),
    ),
    Scenario(
        "seamcall-busy",
        "to shared and back; one SEAMCALL may answer OPERAND_BUSY",
        ("private", "shared", "private"),
        may=(SEAMCALL,),
    ),
    Scenario(
        "slot-deleted",
        "to private; a VMM thread deletes the memslot at any time",
        ("shared", "private"),
        racers=0,
        threads=(DeletesMemslot(),),
    ),
    Scenario(
        "reserve-fails",
        "to private and back, one page of a shared 2M page; another ioctl cannot reserve its entries",
        ("shared", "private", "shared"),
        racers=0,
        gfns=(0, 1),
        request=(1,),
        huge=True,
        threads=(Converts((0, 1), refused=True),),
    ),
    Scenario(
        "hostile",
        "private and back; vCPUs use any C-bit and rescind at any time, the VMM converts to what they touch",
        ("shared", "private", "shared"),
        correct_guest=False,
        hostile=True,
        auto_convert=True,
    ),
    Scenario(
        "careless", "to private; vCPUs use any C-bit at any time", ("shared", "private"), correct_guest=False
    ),
)
SCENARIOS = {scenario.name: scenario for scenario in _ALL}


def find_scenario(name: str) -> Scenario:
    """Return a scenario by name, or several joined by "+"; InputError names those that exist."""
    found: Scenario | None = None
    for part in name.split("+"):
        if part not in SCENARIOS:
            raise InputError(f"unknown scenario {part!r}; there are: {', '.join(SCENARIOS)}")
        found = found.joined(SCENARIOS[part]) if found else SCENARIOS[part]
    assert found is not None
    return found

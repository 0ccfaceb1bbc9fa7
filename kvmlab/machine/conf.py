"""What never changes while a model runs: `Conf`, the open `Switches`, and the names of a machine's parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from ..design.calls import DISCARDS as DISCARDS
from ..design.calls import FOLIO_2M as FOLIO_2M
from ..design.calls import LARGE as LARGE
from ..design.calls import MEMSLOTS as MEMSLOTS
from ..design.calls import PLATFORMS as PLATFORMS
from ..errors import InputError, shown
from ..hw.memory import Gfn, Pfn
from ..kvm.lpage import LargePage, large_pages
from ..kvm.memslots import MemSlot, Piece, pieces

NEIGHBOUR = "N"
TLB = "TLB"  # who drops entries of TLBs, where that is asked: compile.build.with_forgetful_tlbs()

# The parts that not every machine has (machine/parts.py), beside those that a call needs (design/calls.py).
DELETES, ADDS, SMM, RESERVED = "deletes a memslot", "adds a memslot", "SMM", "reserved entries"
FLUSH, RMP_BIT, YIELDS, TD_FATAL = "if (flush)", "RMP bit", "zap yields", "fatal TD"


WORDS: dict[str, tuple[bool | str, bool | str]] = {"rmp_checked_at": ("access", "fill")}  # not True or False


@dataclass(frozen=True)
class Switches:
    """Choices that sources leave open; the defaults are what the thread says.

    `rmpupdate_flushes`: RMPUPDATE drops the page's TLB entries on all CPUs (thread: yes; APM: silent).
    `rmp_checked_at`: "access" or "fill", when a guest access meets the RMP check.
    `identical_keeps_validated`: RMPUPDATE of an identical state keeps Validated (verismo; APM: silent).
    `access_sets_sizem`: an ordinary access that fails for its size alone sets SIZEM, too (APM: PVALIDATE, RMPADJUST).
    `head_4k_over_2m`: a 4K RMPUPDATE may resize the 2M entry whose first page it names (APM: silent).
    `preempt_count`: CONFIG_PREEMPT_COUNT, without which sleeping in atomic context is not reported.
    `integrity`: tdx: memory with MAC and owner bit (Ci); without, only the owner bit (Li).
    `partial_write_erratum`: tdx: X86_BUG_TDX_PW_MCE, and a host that writes less than a line.
    """

    rmpupdate_flushes: bool = True
    rmp_checked_at: str = "access"
    identical_keeps_validated: bool = True
    access_sets_sizem: bool = False
    head_4k_over_2m: bool = False
    preempt_count: bool = True
    integrity: bool = True
    partial_write_erratum: bool = False

    def __post_init__(self) -> None:
        """InputError for a value that a switch does not have."""
        for name in (switch.name for switch in fields(self)):
            value, (on, off) = getattr(self, name), WORDS.get(name, (True, False))
            if type(value) is not type(on) or value not in (on, off):
                raise InputError(f"switch {name} cannot be {shown(value)}; allowed: {on}, {off}")


@dataclass(frozen=True)
class Conf:
    """What never changes while a model runs; steps read it as `s.conf`, untracked."""

    platform: str
    in_place: bool
    gfns: tuple[Gfn, ...]
    eras: tuple[str, ...]
    asker: str
    vcpus: tuple[str, ...]
    correct_guest: bool
    ioctls: int = 1  # how many ioctls serve one request
    parts: frozenset[str] = frozenset()  # what else the machine has: machine/parts.py
    request: tuple[Gfn, ...] = ()  # the gfns that are converted, if not all
    stray: bool = False  # vCPUs may also write with the C-bit of the kind that the page no longer has
    auto_convert: bool = False  # the VMM answers KVM_EXIT_MEMORY_FAULT by converting to what was touched
    hostile: bool = False  # a careless guest that also rescinds at any time
    children: int = 2  # of a 2M page: so many gfns stand for its 512
    large_shared: bool = False  # shared memory is backed by 2M pages
    memslots: tuple[MemSlot, ...] = ()  # if not one over all gfns
    unused: tuple[Gfn, ...] = ()  # gfns that the guest leaves alone
    linux: tuple[int, int] = (6, 2)  # the kernel version of which the design speaks: kvm/versions.py
    switches: Switches = Switches()
    owners: Mapping[str, frozenset[str]] = field(default_factory=dict)
    writers: Mapping[str, frozenset[str]] = field(default_factory=dict)
    readers: Mapping[str, frozenset[str]] = field(default_factory=dict)
    inverted: frozenset[tuple[str, str]] = frozenset()
    many: int = 1  # more invalidations in progress than can be if each is ended
    backing: Mapping[tuple[str, Gfn], Pfn] = field(init=False)

    def __post_init__(self) -> None:
        """Name the backing pages: S and P are two PFNs of a gfn, or one and the same when in-place."""
        shared = "P" if self.in_place else "S"
        pages = {
            (kind, g): f"{p}{g}" for g in self.gfns for kind, p in (("shared", shared), ("private", "P"))
        }
        object.__setattr__(self, "backing", pages)

    @property
    def converted(self) -> tuple[Gfn, ...]:
        """The gfns that the request covers; the others keep the kind of the first era."""
        return self.request or self.gfns

    @property
    def used(self) -> tuple[Gfn, ...]:
        """The gfns that the guest uses: all that lie in a memslot, but those left alone."""
        inside = (g for piece in self.pieces(self.gfns) if piece.as_id == 0 for g in piece.gfns)
        return tuple(g for g in inside if g not in self.unused)

    @property
    def large(self) -> tuple[LargePage, ...]:
        """The large pages, 2M before 1G, where memory may be mapped so."""
        return large_pages(self.gfns, self.children) if LARGE in self.parts else ()

    @property
    def folio_2m(self) -> bool:
        """Whether guest_memfd has one 2M page for all gfns."""
        return FOLIO_2M in self.parts

    @property
    def smm(self) -> bool:
        """Whether vCPUs enter a second address space."""
        return SMM in self.parts

    def leaves(self, gfn: Gfn) -> tuple[str | None, ...]:
        """What the page table under KVM's own control may map a gfn to; tdx: the shared backing only."""
        pages = (None, *dict.fromkeys((self.backing["shared", gfn], self.backing["private", gfn])))
        return pages[:2] if self.tdx else pages

    def pieces(self, gfns: Sequence[Gfn]) -> list[Piece]:
        """The memslots that a request for `gfns` overlaps, each with its part."""
        return pieces(self.memslots or (MemSlot(self.gfns[0], len(self.gfns)),), gfns)

    @property
    def gfn_of(self) -> Mapping[str, int]:
        """The gfn of each private PFN."""
        return {self.backing["private", g]: g for g in self.gfns}

    @property
    def tdx(self) -> bool:
        """Whether the TDX module keeps the private side."""
        return self.platform == "tdx"

    @property
    def has_rmp(self) -> bool:
        """Whether hardware keeps an ownership table."""
        return self.platform == "snp"

    @property
    def encrypts(self) -> bool:
        """Whether the C-bit selects the guest's key."""
        return self.platform in ("snp", "sev", "tdx")

    @property
    def kind_from_c_bit(self) -> bool:
        """Whether a fault's kind is the C-bit (SHARED bit) of the access; otherwise the attribute at entry."""
        return self.platform in ("snp", "tdx")

    @property
    def accesses_from_asked(self) -> bool:
        """Whether hardware stands in the way, so that a guest may try the new kind from the moment it asked."""
        return self.platform in ("snp", "tdx")

    integrity = property(lambda self: self.switches.integrity)
    partial_write_erratum = property(lambda self: self.switches.partial_write_erratum)
    rmpupdate_flushes = property(lambda self: self.switches.rmpupdate_flushes)
    rmp_checked_at = property(lambda self: self.switches.rmp_checked_at)
    identical_keeps_validated = property(lambda self: self.switches.identical_keeps_validated)
    access_sets_sizem = property(lambda self: self.switches.access_sets_sizem)
    head_4k_over_2m = property(lambda self: self.switches.head_4k_over_2m)
    preempt_count = property(lambda self: self.switches.preempt_count)

    @property
    def private_pfns(self) -> tuple[Pfn, ...]:
        """The PFNs that can be assigned to the guest."""
        return tuple(self.backing["private", g] for g in self.gfns)

    @property
    def pfns(self) -> tuple[Pfn, ...]:
        """Every backing PFN, each once."""
        return tuple(dict.fromkeys(self.backing.values()))

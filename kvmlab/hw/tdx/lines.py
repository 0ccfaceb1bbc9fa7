"""One 64-byte line of memory under MKTME and TDX: who wrote it, who reads what, and what poison does.

A page is modelled as one line (what happens to one happens to the others).  Memory keeps the content, the KeyID
that it was written with and poison; caches keep at most one dirty line for each KeyID, not coherent with one another.
Sources: TDX Module Base Architecture Specification, chapter 16 "Memory Integrity Protection and Machine Check
Handling": not read by us, but study notes that restate it, whose revision we cannot name; TDX module 1.5.01;
arch/x86/virt/vmx/tdx/tdx.c; Documentation/arch/x86/tdx.rst "Erratum".
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from ..rules import ANY, Rules

HOST = 0  # the one KeyID that Linux uses itself; in this model every other one is a TD's, private
ZERO = 0  # content of a line of zeros; other contents are the caller's, compared and never looked into

# What a reader gets.
DATA, ZEROS, NOISE, POISON = "data", "zeros", "noise", "poison"


class Line(NamedTuple):
    """A line in memory, and the dirty lines over it in caches: (KeyID, content) pairs in the order of KeyIDs."""

    content: Hashable = ZERO
    keyid: int = HOST
    poison: bool = False
    dirty: tuple[tuple[int, Hashable], ...] = ()

    @property
    def td_owner(self) -> bool:
        """The TD-owner bit: the line was last written with a private KeyID."""
        return self.keyid != HOST

    def cached(self, keyid: int) -> bool:
        """Whether a dirty line of this KeyID is in a cache."""
        return any(key == keyid for key, _ in self.dirty)


class Read(NamedTuple):
    """What a load got (DATA, ZEROS, NOISE or POISON), the content, and the line after it."""

    got: str
    content: Hashable
    line: Line


READS = Rules(
    "TDX Base Specification, memory integrity: a read that goes to memory",
    {
        "reader": ("private", "shared"),  # KeyID of the access; a TD's shared GPA is "shared"
        "written": (
            "shared",
            "same key",
            "other private",
        ),  # for a shared reader the two private ones are alike
        "integrity": (True, False),  # Ci: owner bit and MAC; Li: owner bit only
        "poison": (False, True),  # stored before
    },
    [
        ("private", "same key", ANY, False, DATA),
        # 16.2: a private read of a line whose owner bit is 0 gets zeros, and new poison is stored.
        ("private", "shared", ANY, False, POISON),
        # 16.2: the MAC of another private KeyID does not match; without a MAC only the owner bit is looked at.
        ("private", "other private", True, False, POISON),
        ("private", "other private", False, False, NOISE),  # not caught; the PAMT keeps it from happening
        ("shared", "shared", ANY, False, DATA),
        # 16.2: a shared read of a TD's line gets zeros and leaves no poison, so neither speculation nor a careless
        # read hurts anyone.
        ("shared", frozenset({"same key", "other private"}), ANY, False, ZEROS),
        (ANY, ANY, ANY, True, POISON),
    ],
    outcome="got",
)

FULL, MERGED, POISONED = "line replaced", "filled, then dirty in the cache", "poisoned"

WRITES = Rules(
    "TDX Base Specification, memory integrity: a write; writes are not checked",
    {
        "write": ("store", "direct", "partial"),  # cached store; MOVDIR64B; MOVNTI, UC or WC mapping, device
        "key": ("private", "shared"),
        "owner": ("TD", "host"),  # TD-owner bit of the line in memory
        "erratum": (False, True),  # X86_BUG_TDX_PW_MCE
        "poison": (False, True),  # stored before
    },
    [
        ("store", ANY, ANY, ANY, ANY, MERGED),  # the fill is a read, which may consume poison
        # 16.2.4: a full line needs no fill, is not checked, and takes owner, MAC and old poison away with it.
        ("direct", ANY, ANY, ANY, ANY, FULL),
        ("partial", ANY, ANY, ANY, True, POISONED),  # part of the old line stays
        ("partial", ANY, ANY, False, False, FULL),
        ("partial", ANY, "host", True, False, FULL),
        ("partial", "private", "TD", True, False, FULL),  # the TD's own
        # tdx.rst, "Erratum": poison at once, which the next read by anyone consumes.
        ("partial", "shared", "TD", True, False, POISONED),
    ],
    outcome="effect",
)

TD_LOST, MACHINE_LOST, HOST_MC, MAY_PANIC = (
    "TD fatal", "TDX off, CPU shut down", "#MC in the host", "TD fatal, host may panic"
)  # fmt: skip

CONSUMED = Rules(
    "TDX Base Specification, machine check handling: who consumes poison",
    {"reader": ("TD", "module", "host"), "seam_nr": (True, False)},  # commit 7911f145de5f: #MC in SEAM mode
    [
        ("TD", True, TD_LOST),  # the page becomes hwpoison; VP.ENTER: TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE
        ("TD", False, MAY_PANIC),
        ("module", ANY, MACHINE_LOST),  # every later SEAMCALL ends in VMfailInvalid
        ("host", ANY, HOST_MC),
    ],
    outcome="end",
)


def read(line: Line, keyid: int, *, integrity: bool = True) -> Read:
    """Load with a KeyID: from the cache if that KeyID's line is dirty there, else from memory by READS."""
    for key, content in line.dirty:
        if key == keyid:
            return Read(DATA, content, line)
    got: str = READS(
        reader="shared" if keyid == HOST else "private",
        written="shared" if line.keyid == HOST else "same key" if line.keyid == keyid else "other private",
        integrity=integrity,
        poison=line.poison,
    )
    if got == POISON:
        return Read(POISON, ZERO, line._replace(poison=True))
    return Read(got, {DATA: line.content, ZEROS: ZERO}.get(got, NOISE), line)


def store(line: Line, keyid: int, content: Hashable, *, integrity: bool = True) -> Read:
    """Store through the cache: fill the line, which is a load, then keep it dirty; POISON if the fill consumed it."""
    fill = read(line, keyid, integrity=integrity)
    if fill.got == POISON:
        return fill
    return Read(fill.got, content, _dirty(line, keyid, content))


def direct_store(line: Line, keyid: int, content: Hashable) -> Line:
    """MOVDIR64B: replace the whole line in memory, and drop this KeyID's cached one; other KeyIDs' lines stay."""
    return Line(content, keyid, False, _without(line, keyid))


def zero(line: Line, keyid: int) -> Line:
    """Zero by MOVDIR64B: the module for ACCEPT with the TD's HKID, tdx_clear_page() with KeyID 0."""
    return direct_store(line, keyid, ZERO)


def partial_write(line: Line, keyid: int, content: Hashable, *, erratum: bool) -> Line:
    """Write less than a line at the memory controller; `content` is what the line then holds, poison apart.

    On a part with X86_BUG_TDX_PW_MCE one to TD memory with a shared KeyID poisons the line at once.
    """
    effect: str = WRITES(
        write="partial",
        key="shared" if keyid == HOST else "private",
        owner="TD" if line.td_owner else "host",
        erratum=erratum,
        poison=line.poison,
    )
    if effect == POISONED:
        return line._replace(poison=True, dirty=_without(line, keyid))
    return direct_store(line, keyid, content)


def write_back(line: Line, keyid: int) -> Line:
    """Evict this KeyID's dirty line, which hardware may do at any time: a full write, and the line is clean."""
    for key, content in line.dirty:
        if key == keyid:
            return direct_store(line, keyid, content)
    return line


def clflush(line: Line) -> Line:
    """CLFLUSH through the directmap: write back and invalidate the line of KeyID 0 only."""
    return write_back(line, HOST)


def wbinvd(line: Line, hkid: int) -> Line:
    """TDH.PHYMEM.PAGE.WBINVD with an HKID in the address: write back and invalidate the line of that HKID."""
    return write_back(line, hkid)


def consumed(reader: str, *, seam_nr: bool = True) -> str:
    """Return who goes down when "TD", "module" or "host" gets POISON; `seam_nr`: the host can be told and live."""
    answer: str = CONSUMED(reader=reader, seam_nr=seam_nr)
    return answer


def _without(line: Line, keyid: int) -> tuple[tuple[int, Hashable], ...]:
    return tuple(pair for pair in line.dirty if pair[0] != keyid)


def _dirty(line: Line, keyid: int, content: Hashable) -> Line:
    pairs = (*_without(line, keyid), (keyid, content))
    return line._replace(dirty=tuple(sorted(pairs, key=lambda pair: pair[0])))

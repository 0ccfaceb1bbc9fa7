"""What all leaves of a module share: physical memory with its PAMT, the TDs, and locks that a reader may hold.

MNG.CREATE, KEY.CONFIG, ADDCX and INIT are one method, and so are VP.CREATE, ADDCX and INIT; TDCX pages are left out.
Source: TDX module 1.5.01, one file a leaf, pamt_manager.c.
"""

from __future__ import annotations

from collections.abc import Hashable

from ..memory import PAGE, Gpa, Hpa
from .locks import EXCLUSIVE, NONE, SHARED, EntryLock, Lock
from .pamt import NDA, PageType, PamtEntry, is_free
from .structures import Td, Vcpu
from .words import Level, Status

PamtKey = tuple[Level, Hpa]  # size, first byte


class Platform:
    """Physical memory of `size` bytes in one TDMR from address 0, its PAMT, and the TDs."""

    def __init__(self, size: int = 1 << 40) -> None:
        self.size = size
        self.pamt: dict[PamtKey, PamtEntry] = {}
        self.tds: dict[Hpa, Td] = {}
        self.held: dict[tuple[Lock, Hashable], str] = {}
        self.interrupt_pending = False  # makes DEMOTE and PROMOTE return TDX_INTERRUPTED_RESTARTABLE

    def hold(self, lock: Lock, where: Hashable, mode: str = EXCLUSIVE) -> None:
        """Hold a lock, as a leaf on another CPU would, until release(): `where` is a TD's tdr or a PAMT key.

        A PAMT key is (size, HPA).  ValueError for a place that has no such lock, or where it is held already.
        """
        if mode not in (SHARED, EXCLUSIVE):
            raise ValueError(f"a lock is held {SHARED} or {EXCLUSIVE}, not {mode!r}")
        if wrong := self._no_such_lock(lock, where):
            raise ValueError(f"nothing to hold: {wrong}")
        if (lock, where) in self.held:
            raise ValueError(
                f"{lock} at {where} is held {self.held[lock, where]} already; release() it first"
            )
        self.held[lock, where] = mode

    def release(self, lock: Lock, where: Hashable) -> None:
        """Release what hold() took; ValueError if it is not held."""
        if (lock, where) not in self.held:
            held = ", ".join(f"{name} at {place}" for name, place in self.held) or "nothing is"
            raise ValueError(f"{lock} at {where} is not held; {held}")
        del self.held[lock, where]

    def _no_such_lock(self, lock: Lock, where: Hashable) -> str:
        """Why there is no such lock there; empty if there is."""
        if lock == Lock.ENTRY:
            return "the lock of an S-EPT entry is a bit of the entry: hold_entry(td, gpa, level)"
        if lock in (Lock.PARENTS, Lock.LARGE):
            return f"{lock} is {Lock.PAMT} at the larger size: hold(Lock.PAMT, (size, HPA))"
        if lock == Lock.PAMT:
            return self._no_pamt_entry(where)
        if where in self.tds:
            return ""
        tdrs = ", ".join(map(hex, self.tds)) or "there is none yet"
        return f"the {lock} lock is a TD's, named by its tdr ({tdrs}), not by {where!r}"

    def _no_pamt_entry(self, where: Hashable) -> str:
        match where:
            case (Level.PT, int(hpa)) if hpa in self.tds:
                return f"the PAMT entry of a TDR is Lock.TDR at {hpa:#x}"
            case (Level() as size, int(hpa)) if size <= Level.PDPT and 0 <= hpa < self.size:
                if not hpa % (size.pages * PAGE):
                    return ""
        return f"a PAMT key is (Level.PT, PD or PDPT, an aligned HPA below {self.size:#x}), not {where!r}"

    def hold_entry(self, td: Td, gpa: Gpa, level: Level = Level.PT, *, taken: bool = True) -> None:
        """Take an S-EPT entry's lock from outside, or release it (which leaves TDHP as it is).

        ValueError for a GPA that has no entry at that level.
        """
        if not td.has_entry(gpa, level):
            raise ValueError(
                f"no S-EPT entry: {gpa:#x} at {level}; a private GPA, aligned to the level, has one"
            )
        entry = td.entry(gpa, level)
        entry.lock = EntryLock(taken, entry.lock.host_priority)

    def pamt_of(self, hpa: Hpa, size: Level = Level.PT) -> PamtEntry:
        """Return the PAMT entry of a page."""
        return self.pamt_at((size, hpa))

    def pamt_at(self, key: PamtKey) -> PamtEntry:
        """Return the PAMT entry of a key."""
        return self.pamt.get(key, NDA)

    def create_td(self, tdr: Hpa, hkid: int, *, ve_disable: bool = True, top: Level = Level.PML4) -> Td:
        """Create a TD whose root page is `tdr`, before finalize; ValueError if the page is taken."""
        self._take(tdr, PamtEntry(PageType.TDR))
        self.tds[tdr] = Td(tdr, hkid, ve_disable, top)
        return self.tds[tdr]

    def create_vcpu(self, td: Td, tdvpr: Hpa) -> Vcpu:
        """Create a vCPU with its page; ValueError if the page is taken."""
        self._take(tdvpr, PamtEntry(PageType.TDVPR, td.tdr // PAGE))
        td.vcpus.append(Vcpu(tdvpr))
        td.children += 1
        return td.vcpus[-1]

    def _take(self, hpa: Hpa, entry: PamtEntry) -> None:
        if self.form(hpa, Level.PT) or self.free(hpa, Level.PT):
            raise ValueError(f"page {hpa:#x} is not free; any page of 4K below {self.size:#x} that is NDA is")
        self.pamt[Level.PT, hpa] = entry

    # What a leaf finds out about a page.

    def form(self, hpa: Hpa, size: Level) -> Status:
        """Whether an address is that of a page of this size."""
        if hpa % (size.pages * PAGE):
            return Status.OPERAND_INVALID
        return Status.SUCCESS if hpa + size.pages * PAGE <= self.size else Status.OPERAND_ADDR_RANGE_ERROR

    def free(self, hpa: Hpa, size: Level) -> Status:
        """Whether a leaf may take a page."""
        pages = range(hpa, hpa + size.pages * PAGE, PAGE) if size == Level.PD else ()
        return is_free(
            size,
            self.pamt_of(hpa, size),
            larger=self.walk_pamt(hpa, size)[0] != size,
            children=all(self.pamt_of(Hpa(page)).type == PageType.NDA for page in pages),
        )

    def walk_pamt(self, hpa: Hpa, size: Level) -> PamtKey:
        """Where pamt_walk() for a page ends: at the entry of its size, or above at one that is PT_REG."""
        larger = (key for key in _parents(size, hpa) if self.pamt_at(key).type == PageType.REG)
        return next(larger, (size, hpa))

    def pamt_held(self, size: Level, hpa: Hpa) -> str:
        """How others hold a PAMT entry; a TDR's goes by the name of Lock.TDR."""
        if size == Level.PT and hpa in self.tds:
            return self.td_held(self.tds[hpa], Lock.TDR)
        return self.held.get((Lock.PAMT, (size, hpa)), NONE)

    def parents_held(self, size: Level, hpa: Hpa) -> str:
        """How others hold the PAMT entries above one: EXCLUSIVE if one of them is."""
        return EXCLUSIVE if EXCLUSIVE in (self.pamt_held(*key) for key in _parents(size, hpa)) else NONE

    def td_held(self, td: Td, lock: Lock) -> str:
        """How others hold a lock of a TD: each vCPU inside holds the TDR shared."""
        inside = lock == Lock.TDR and any(vcpu.inside for vcpu in td.vcpus)
        return self.held.get((lock, td.tdr), SHARED if inside else NONE)


def _parents(size: Level, hpa: Hpa) -> list[PamtKey]:
    """The PAMT keys of the larger pages over one, from the top."""
    return [(up, Hpa(hpa - hpa % (up.pages * PAGE))) for up in (Level.PDPT, Level.PD) if up > size]

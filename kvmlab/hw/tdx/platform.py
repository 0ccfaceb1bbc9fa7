"""What TDX modules' leaves share: the PAMT, locks that a reader may hold, and the life of TDs.

MNG.CREATE, KEY.CONFIG, ADDCX and INIT are one method, and so are VP.CREATE, ADDCX and INIT; TDCX pages are left out.
Source: TDX module 1.5.01, one file a leaf.
"""

from __future__ import annotations

from collections.abc import Hashable

from . import td as tdx_td
from .locks import EXCLUSIVE, NONE, SHARED, EntryLock, Lock, contended
from .pamt import NDA, OF_PAGE, PAGE_OPERAND, PageType, PamtEntry, after, is_free
from .parts import PAGE, Result, Td, Vcpu
from .words import Leaf, Level, Operand, Status, with_operand

PamtKey = tuple[Level, int]  # size, HPA


class Platform:
    """Physical memory of `size` bytes in one TDMR from address 0, its PAMT, and the TDs."""

    def __init__(self, size: int = 1 << 40) -> None:
        self.size = size
        self.pamt: dict[PamtKey, PamtEntry] = {}
        self.tds: dict[int, Td] = {}
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

    def hold_entry(self, td: Td, gpa: int, level: Level = Level.PT, *, taken: bool = True) -> None:
        """Take an S-EPT entry's lock from outside, or release it (which leaves TDHP as it is).

        ValueError for a GPA that has no entry at that level.
        """
        if not td.has_entry(gpa, level):
            raise ValueError(
                f"no S-EPT entry: {gpa:#x} at {level}; a private GPA, aligned to the level, has one"
            )
        entry = td.entry(gpa, level)
        entry.lock = EntryLock(taken, entry.lock.host_priority)

    def pamt_of(self, hpa: int, size: Level = Level.PT) -> PamtEntry:
        """Return the PAMT entry of a page."""
        return self.pamt.get((size, hpa), NDA)

    def create_td(self, tdr: int, hkid: int, *, ve_disable: bool = True, top: Level = Level.PML4) -> Td:
        """Create a TD whose root page is `tdr`, before finalize; ValueError if the page is taken."""
        self._take(tdr, PamtEntry(PageType.TDR))
        self.tds[tdr] = Td(tdr, hkid, ve_disable, top)
        return self.tds[tdr]

    def create_vcpu(self, td: Td, tdvpr: int) -> Vcpu:
        """Create a vCPU with its page; ValueError if the page is taken."""
        self._take(tdvpr, PamtEntry(PageType.TDVPR, td.tdr // PAGE))
        td.vcpus.append(Vcpu(tdvpr))
        td.children += 1
        return td.vcpus[-1]

    def _take(self, hpa: int, entry: PamtEntry) -> None:
        if self._free_status(hpa, Level.PT):
            raise ValueError(f"page {hpa:#x} is not free; any page of 4K below {self.size:#x} that is NDA is")
        self.pamt[Level.PT, hpa] = entry

    def _covering(self, hpa: int, above: Level) -> Level | None:
        """Return the size of a PT_REG entry larger than `above` over a page."""
        for size in (Level.PDPT, Level.PD):
            start = hpa - hpa % (size.pages * PAGE)
            if size > above and self.pamt_of(start, size).type == PageType.REG:
                return size
        return None

    def _free_status(self, hpa: int, size: Level) -> Status:
        step = size.pages * PAGE
        if hpa % step:
            return Status.OPERAND_INVALID
        pages = range(hpa, hpa + step, PAGE) if size == Level.PD else ()
        return is_free(
            size,
            self.pamt_of(hpa, size),
            larger=self._covering(hpa, size) is not None,
            children=all(self.pamt_of(page).type == PageType.NDA for page in pages),
            in_tdmr=hpa + step <= self.size,
        )

    def _page_error(self, leaf: Leaf, hpa: int, size: Level = Level.PT) -> int:
        """RAX of a leaf that wants this free page, because of the PAMT or its lock; 0 if it gets it."""
        status = self._free_status(hpa, size)
        if status in (Status.OPERAND_INVALID, Status.OPERAND_ADDR_RANGE_ERROR):
            return with_operand(status, PAGE_OPERAND[leaf])
        locked = self._pamt_busy(leaf, hpa, size)
        return locked or (with_operand(status, PAGE_OPERAND[leaf]) if status else 0)

    def _pamt_busy(self, leaf: Leaf, hpa: int, size: Level) -> int:
        parents = [(up, hpa - hpa % (up.pages * PAGE)) for up in (Level.PDPT, Level.PD) if up > size]
        for lock, key in [*((Lock.PARENTS, p) for p in parents), (Lock.PAMT, (size, hpa))]:
            code = contended(leaf, lock, self._pamt_held(*key))
            if code is not None:
                return code
        return 0

    def _busy(self, leaf: Leaf, lock: Lock, td: Td, *, armed: bool = False) -> int:
        """RAX if a lock of the TD stops the leaf, else 0.  Each vCPU inside holds the TDR shared."""
        held = self._tdr_held(td) if lock == Lock.TDR else self.held.get((lock, td.tdr), NONE)
        return contended(leaf, lock, held, armed=armed) or 0

    def _tdr_held(self, td: Td) -> str:
        inside = SHARED if any(vcpu.inside for vcpu in td.vcpus) else NONE
        return self.held.get((Lock.TDR, td.tdr), inside)

    def _pamt_held(self, size: Level, hpa: int) -> str:
        """How others hold a PAMT entry; a TDR's goes by the name of Lock.TDR."""
        if size == Level.PT and hpa in self.tds:
            return self._tdr_held(self.tds[hpa])
        return self.held.get((Lock.PAMT, (size, hpa)), NONE)

    def _admit(self, leaf: Leaf, td: Td) -> int:
        """RAX if the TD's locks or its state do not let a leaf in, else 0."""
        code = self._busy(leaf, Lock.TDR, td)
        if code:
            return code
        status = tdx_td.admitted(leaf, lifecycle=td.lifecycle, op_state=td.op_state, fatal=td.fatal)
        if status in (Status.SUCCESS, Status.OP_STATE_INCORRECT):
            return self._busy(leaf, Lock.OP_STATE, td) or status
        return status

    def tdh_mr_finalize(self, td: Td) -> Result:
        """TDH.MR.FINALIZE: the TD may run, and TLB tracking counts from now on."""
        code = self._admit(Leaf.MR_FINALIZE, td) or (0 if td.vcpus else Status.NO_VCPUS)
        if not code:
            td.op_state = tdx_td.OpState.RUNNABLE
        return Result(code)

    def tdh_vp_flush(self, td: Td, vcpu: Vcpu) -> Result:
        """TDH.VP.FLUSH: take the vCPU off its processor."""
        code = self._busy(Leaf.VP_FLUSH, Lock.TDR, td)
        if not code and td.lifecycle != tdx_td.Lifecycle.KEYS_CONFIGURED:
            code = Status.TD_KEYS_NOT_CONFIGURED
        if not code and not vcpu.associated:
            code = Status.VCPU_NOT_ASSOCIATED
        if not code:
            vcpu.associated = False
            vcpu.tlb.clear()
        return Result(code)

    def _end(self, leaf: Leaf, td: Td, ready: bool, then: tdx_td.Lifecycle) -> Result:
        code = self._busy(leaf, Lock.TDR, td)
        code = code or tdx_td.TEARDOWN(leaf=leaf, lifecycle=td.lifecycle, ready=ready)
        if not code:
            td.lifecycle = then
        return Result(code)

    def tdh_mng_vpflushdone(self, td: Td) -> Result:
        """TDH.MNG.VPFLUSHDONE: no vCPU is on a processor any more; the HKID may be flushed."""
        ready = not any(vcpu.associated for vcpu in td.vcpus)
        return self._end(Leaf.MNG_VPFLUSHDONE, td, ready, tdx_td.Lifecycle.BLOCKED)

    def tdh_phymem_cache_wb(self) -> Result:
        """TDH.PHYMEM.CACHE.WB on every package: write back the lines of all HKIDs that are flushed."""
        waiting = [td for td in self.tds.values() if td.lifecycle == tdx_td.Lifecycle.BLOCKED]
        for td in waiting:
            td.cache_written_back = True
        return Result(0 if waiting else Status.NO_HKID_READY_TO_WBCACHE)

    def tdh_mng_key_freeid(self, td: Td) -> Result:
        """TDH.MNG.KEY.FREEID: the HKID is free, the TD's pages may be reclaimed."""
        return self._end(Leaf.MNG_KEY_FREEID, td, td.cache_written_back, tdx_td.Lifecycle.TEARDOWN)

    def tdh_phymem_page_reclaim(self, hpa: int) -> Result:
        """TDH.PHYMEM.PAGE.RECLAIM of a page of a TD in teardown, the TDR's last; RCX type, RDX owner, R8 size."""
        size = self._covering(hpa, Level.PT) or Level.PT
        entry = self.pamt_of(hpa - hpa % (size.pages * PAGE), size)
        code = self._not_readable(Leaf.PAGE_RECLAIM, hpa, size)
        if not code and entry.type in (PageType.NDA, PageType.RSVD):
            code = with_operand(Status.PAGE_METADATA_INCORRECT, Operand.RCX)
        if code:
            return Result(code)
        code = self._not_reclaimable(hpa, size, entry)
        if not code:
            self.pamt[size, hpa] = after(Leaf.PAGE_RECLAIM, OF_PAGE, entry, owner=entry.owner, td_epoch=0)
            if entry.type != PageType.TDR:
                self.tds[entry.owner * PAGE].children -= size.pages
        return Result(code, entry.type, entry.owner * PAGE, size)

    def _not_readable(self, leaf: Leaf, hpa: int, size: Level) -> int:
        """RAX of RECLAIM and RDMD where they cannot read the page's PAMT entry, else 0."""
        if hpa % PAGE:
            return with_operand(Status.OPERAND_INVALID, Operand.RCX)
        if hpa >= self.size:
            return with_operand(Status.OPERAND_ADDR_RANGE_ERROR, Operand.RCX)
        return self._pamt_busy(leaf, hpa - hpa % (size.pages * PAGE), size)

    def _not_reclaimable(self, hpa: int, size: Level, entry: PamtEntry) -> int:
        if hpa % (size.pages * PAGE):
            return with_operand(Status.OPERAND_INVALID, Operand.RCX)
        root = entry.type == PageType.TDR
        td = self.tds[hpa if root else entry.owner * PAGE]
        locked = 0 if root else self._busy(Leaf.PAGE_RECLAIM, Lock.TDR, td)
        ready = not root or not td.children
        status = tdx_td.TEARDOWN(leaf=Leaf.PAGE_RECLAIM, lifecycle=td.lifecycle, ready=ready)
        return locked or int(status)

    def tdh_phymem_page_wbinvd(self, hpa: int) -> Result:
        """TDH.PHYMEM.PAGE.WBINVD of a free page; the HKID in the address's upper bits is left to tdx_lines."""
        return Result(self._page_error(Leaf.PAGE_WBINVD, hpa))

    def tdh_phymem_page_rdmd(self, hpa: int) -> Result:
        """TDH.PHYMEM.PAGE.RDMD: RCX type, RDX owner, R8 size of the page's PAMT entry."""
        size = self._covering(hpa, Level.PT) or Level.PT
        code = self._not_readable(Leaf.PAGE_RDMD, hpa, size)
        if code:
            return Result(code)
        entry = self.pamt_of(hpa - hpa % (size.pages * PAGE), size)
        return Result(0, entry.type, entry.owner * PAGE, size)

"""A TDX module to play with: one method a leaf, registers bit for bit.

Whether a leaf is refused, and with which code, is decided by checks.py alone; here is what a leaf does that is not.
Addresses are bytes.  The page contents are not here (lines.py).  Source: TDX module 1.5.01, one file a leaf.
"""

from __future__ import annotations

from ..memory import PAGE, Gpa, Hpa, gpa_to_gfn
from . import pamt, sept, tlb
from .call import EntryCall, on_page, on_reclaim, on_td, on_vcpu
from .checks import Check, answer, came_to, told
from .entry import NO_PAGE, accept_chunk, accept_info
from .pamt import OF_CHILDREN, OF_PAGE, OF_TABLE
from .platform import Platform
from .structures import Entry, Result, Td, Vcpu
from .td import Lifecycle, OpState
from .words import CHILDREN, EXIT_REASON_EPT_VIOLATION, Guest, Leaf, Level, Status, is_shared

_WRITE = 2  # exit qualification: data write


class Module(Platform):
    """A TDX module and its machine: TDs, PAMT, secure EPTs, locks (hold them by hand to see busy codes), epochs."""

    def _mem(
        self, leaf: Leaf, td: Td, gpa: Gpa, level: Level, page: Hpa = NO_PAGE
    ) -> tuple[Result, EntryCall]:
        """One TDH.MEM leaf up to the point where it cannot fail any more; the entry has its new state then."""
        call = EntryCall(self, leaf, td, gpa, level, page)
        found = answer(leaf, call.situation)
        call.leave_locks(found)
        if found.by is None:
            call.entry.state = found.state or call.entry.state
            return Result(), call
        if found.by == Check.INTERRUPT:
            return Result(found.rax, gpa | level, td.tdr), call
        return Result(found.rax, *(call.entry.details(call.found[0]) if found.by.reports else ())), call

    def _note(self, leaf: Leaf, of: str, td: Td, size: Level, hpa: Hpa) -> None:
        """Write into the PAMT what the leaf leaves there."""
        owner, before = td.tdr // PAGE, self.pamt_of(hpa, size)
        self.pamt[size, hpa] = pamt.after(leaf, of, before, owner=owner, td_epoch=td.epochs.td_epoch)

    def _put(self, leaf: Leaf, td: Td, gpa: Gpa, level: Level, hpa: Hpa) -> Result:
        result, call = self._mem(leaf, td, gpa, level, hpa)
        if result.ok:
            table = leaf == Leaf.SEPT_ADD
            size, of = (Level.PT, OF_TABLE) if table else (level, OF_PAGE)
            call.entry.hpa = hpa
            self._note(leaf, of, td, size, hpa)
            td.children += size.pages
        return result

    def tdh_mem_page_add(self, td: Td, gpa: Gpa, hpa: Hpa) -> Result:
        """TDH.MEM.PAGE.ADD: map a copied page before finalize."""
        return self._put(Leaf.PAGE_ADD, td, gpa, Level.PT, hpa)

    def tdh_mem_page_aug(self, td: Td, gpa: Gpa, hpa: Hpa, level: Level = Level.PT) -> Result:
        """TDH.MEM.PAGE.AUG: a page for the TD to accept."""
        return self._put(Leaf.PAGE_AUG, td, gpa, level, hpa)

    def tdh_mem_sept_add(self, td: Td, gpa: Gpa, hpa: Hpa, level: Level = Level.PD) -> Result:
        """TDH.MEM.SEPT.ADD: hang a table under the entry at `level`."""
        return self._put(Leaf.SEPT_ADD, td, gpa, level, hpa)

    def tdh_mem_range_block(self, td: Td, gpa: Gpa, level: Level = Level.PT) -> Result:
        """TDH.MEM.RANGE.BLOCK: no new translations; the epoch is noted."""
        result, call = self._mem(Leaf.RANGE_BLOCK, td, gpa, level)
        if result.ok:
            call.entry.accept_counter = 0
            self._note(Leaf.RANGE_BLOCK, OF_PAGE if call.entry.state.leaf else OF_TABLE, td, *call.own)
        return result

    def tdh_mem_range_unblock(self, td: Td, gpa: Gpa, level: Level = Level.PT) -> Result:
        """TDH.MEM.RANGE.UNBLOCK: undo BLOCK, once tracked."""
        return self._mem(Leaf.RANGE_UNBLOCK, td, gpa, level)[0]

    def tdh_mem_track(self, td: Td) -> Result:
        """TDH.MEM.TRACK: start the next epoch."""
        found = answer(Leaf.TRACK, on_td(self, td))
        if found.ok:
            _, td.epochs = tlb.track(td.epochs)
        return Result(found.rax)

    def tdh_mem_page_remove(self, td: Td, gpa: Gpa, level: Level = Level.PT) -> Result:
        """TDH.MEM.PAGE.REMOVE: give the page back; RCX is its HPA."""
        result, call = self._mem(Leaf.PAGE_REMOVE, td, gpa, level)
        if not result.ok:
            return result
        entry = call.entry
        self._note(Leaf.PAGE_REMOVE, OF_PAGE, td, level, entry.hpa)
        td.children -= level.pages
        del td.sept[td.key(gpa, level)]
        return Result(rcx=entry.hpa)

    def tdh_mem_page_demote(self, td: Td, gpa: Gpa, hpa: Hpa, level: Level = Level.PD) -> Result:
        """TDH.MEM.PAGE.DEMOTE: split a large page with a new table `hpa`; the 512 children are not blocked."""
        before = td.walk("SEAMCALL", gpa, level)[1].state
        result, call = self._mem(Leaf.PAGE_DEMOTE, td, gpa, level, hpa)
        if not result.ok:
            return result
        entry = call.entry
        large, small = entry.hpa, Level(level - 1)
        entry.hpa, entry.accept_counter = hpa, 0
        for i, child in enumerate(td.below(gpa, level)):
            child.state, child.hpa = sept.demoted(before), Hpa(large + i * small.pages * PAGE)
            self._note(Leaf.PAGE_DEMOTE, OF_CHILDREN, td, small, child.hpa)
        self._note(Leaf.PAGE_DEMOTE, OF_PAGE, td, level, large)
        self._note(Leaf.PAGE_DEMOTE, OF_TABLE, td, Level.PT, hpa)
        td.children += 1
        return result

    def tdh_mem_page_promote(self, td: Td, gpa: Gpa, level: Level = Level.PD) -> Result:
        """TDH.MEM.PAGE.PROMOTE: merge 512 pages; RCX is the table that is free again."""
        result, call = self._mem(Leaf.PAGE_PROMOTE, td, gpa, level)
        if not result.ok:
            return result
        entry = call.entry
        table, large, small = entry.hpa, td.below(gpa, level)[0].hpa, Level(level - 1)
        entry.hpa = large
        self._note(Leaf.PAGE_PROMOTE, OF_PAGE, td, level, large)
        self._note(Leaf.PAGE_PROMOTE, OF_TABLE, td, Level.PT, table)
        for i in range(CHILDREN):
            offset = i * small.pages * PAGE
            self._note(Leaf.PAGE_PROMOTE, OF_CHILDREN, td, small, Hpa(large + offset))
            del td.sept[td.key(Gpa(gpa + offset), small)]
        td.children -= 1
        return Result(rcx=table)

    def tdh_mem_sept_remove(self, td: Td, gpa: Gpa, level: Level = Level.PD) -> Result:
        """TDH.MEM.SEPT.REMOVE: take an empty table away; RCX is its HPA."""
        result, call = self._mem(Leaf.SEPT_REMOVE, td, gpa, level)
        if not result.ok:
            return result
        entry = call.entry
        self._note(Leaf.SEPT_REMOVE, OF_TABLE, td, Level.PT, entry.hpa)
        td.children -= 1
        del td.sept[td.key(gpa, level)]
        return Result(rcx=entry.hpa)

    def vp_enter(self, td: Td, vcpu: Vcpu) -> Result:
        """TDH.VP.ENTER up to the entry: if the result is ok the vCPU is inside, and td_exit() ends the leaf."""
        if vcpu.inside:
            raise ValueError("the vCPU is inside already; end that with td_exit()")
        gpas = [Gpa(gpa) for gpa in vcpu.stepping.gpas if isinstance(gpa, int)]
        faulting = [gpa for gpa in gpas if self._access(td, gpa)[0] != Guest.DATA]
        found = answer(Leaf.VP_ENTER, on_vcpu(self, td, vcpu, faulting))
        if not came_to(Leaf.VP_ENTER, Check.EPOCH, found):
            return Result(found.rax)
        new, vcpu.associated = not vcpu.associated, True
        if found.by == Check.EPOCH:
            return Result(found.rax)
        td.epochs, vcpu.epoch, flush = tlb.enter(td.epochs, vcpu.epoch, newly_associated=new)
        if flush:
            vcpu.tlb.clear()
        vcpu.inside = found.ok
        if not found.ok:
            td.epochs = tlb.leave(td.epochs, vcpu.epoch)
        if found.by == Check.STEPPING:
            return Result(found.rax, _WRITE, 0, faulting[0], Guest.EXIT)
        return Result(found.rax)

    def td_exit(self, td: Td, vcpu: Vcpu, *, progress: bool = True) -> Result:
        """Any other TD exit: what VP.ENTER returns; after a #MC anywhere in the TD, that the TD is lost."""
        vcpu.inside, td.epochs = False, tlb.leave(td.epochs, vcpu.epoch)
        vcpu.stepping = tlb.td_exit(vcpu.stepping, progress=progress)
        return Result(int(Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE) if td.fatal else 0)

    def machine_check(self, td: Td, vcpu: Vcpu) -> Result:
        """A vCPU consumes poison: the TD is marked fatal and the vCPU exits."""
        td.fatal = True
        return self.td_exit(td, vcpu)

    def _access(self, td: Td, gpa: Gpa) -> tuple[Guest, Level, Entry]:
        at, entry = td.walk("SEAMCALL", gpa)
        return sept.access(entry.state, ve_disable=td.ve_disable), at, entry

    def access(self, td: Td, vcpu: Vcpu, gpa: Gpa, *, write: bool = True, progress: bool = True) -> Result:
        """A private access by a vCPU that is inside: through its TLB, else by a walk; RAX to R8 are of a TD exit.

        `progress`: RIP is not what it was at VP.ENTER.  ValueError for a shared GPA or a vCPU that is outside.
        """
        if not vcpu.inside or is_shared(gpa, gpaw=td.gpaw):
            raise ValueError(
                "only a vCPU that is inside accesses memory, and only private GPAs are walked here"
            )
        if gpa_to_gfn(gpa) in vcpu.tlb:
            return Result(exit=Guest.DATA)
        found, at, entry = self._access(td, gpa)
        if found == Guest.DATA:
            vcpu.tlb[gpa_to_gfn(gpa)] = Hpa(entry.hpa + gpa % (at.pages * PAGE) // PAGE * PAGE)
        if found in (Guest.DATA, Guest.VE):
            return Result(exit=found)
        lost = self.td_exit(td, vcpu, progress=progress)
        if lost.rax:
            return lost
        page = gpa // PAGE * PAGE
        vcpu.stepping = tlb.ept_violation(vcpu.stepping, page, progress=progress)
        return Result(
            EXIT_REASON_EPT_VIOLATION, _WRITE if write else 1, found.extended_qualification, page, found
        )

    def tdg_mem_page_accept(
        self, td: Td, vcpu: Vcpu, gpa: Gpa, level: Level = Level.PT, *, interrupt_after: int = CHILDREN
    ) -> Result:
        """TDG.MEM.PAGE.ACCEPT: RAX for the guest, or a TD exit; a 2M one stops after that many 4K pages."""
        if not vcpu.inside:
            raise ValueError("only a vCPU that is inside executes TDCALL; vp_enter() first")
        call = EntryCall(self, Leaf.ACCEPT, td, gpa, level)
        found = answer(Leaf.ACCEPT, call.situation)
        if found.status == Guest.EXIT_ACCEPT:
            lost = self.td_exit(td, vcpu, progress=False)
            if lost.rax:
                return lost
            info = accept_info(call.entry.state, level, call.found[0])
            return Result(found.rax, _WRITE, info, gpa, Guest.EXIT_ACCEPT)
        if found.ok and not self._zero(call.entry, level, interrupt_after):
            return Result(exit=Guest.INTERRUPTED)
        if found.state:
            call.entry.state = found.state
        return Result(found.rax)

    def _zero(self, entry: Entry, level: Level, chunks: int) -> bool:
        """Zero the page, of a 2M one at most `chunks` 4K pages; whether all is done."""
        done = level == Level.PT
        while not done and chunks > 0:
            entry.accept_counter, done = accept_chunk(entry.accept_counter)
            chunks -= 1
        return done

    # The life of a TD, and pages of physical memory.

    def tdh_mr_finalize(self, td: Td) -> Result:
        """TDH.MR.FINALIZE: the TD may run, and TLB tracking counts from now on."""
        found = answer(Leaf.MR_FINALIZE, on_td(self, td)._replace(ready=lambda: bool(td.vcpus)))
        if found.ok:
            td.op_state = OpState.RUNNABLE
        return Result(found.rax)

    def tdh_vp_flush(self, td: Td, vcpu: Vcpu) -> Result:
        """TDH.VP.FLUSH: take the vCPU off its processor."""
        found = answer(Leaf.VP_FLUSH, on_td(self, td)._replace(ready=lambda: vcpu.associated))
        if found.ok:
            vcpu.associated = False
            vcpu.tlb.clear()
        return Result(found.rax)

    def tdh_mng_vpflushdone(self, td: Td) -> Result:
        """TDH.MNG.VPFLUSHDONE: no vCPU is on a processor any more; the HKID may be flushed."""
        ready = not any(vcpu.associated for vcpu in td.vcpus)
        return self._end(Leaf.MNG_VPFLUSHDONE, td, ready, Lifecycle.BLOCKED)

    def tdh_phymem_cache_wb(self) -> Result:
        """TDH.PHYMEM.CACHE.WB on every package: write back the lines of all HKIDs that are flushed."""
        waiting = [td for td in self.tds.values() if td.lifecycle == Lifecycle.BLOCKED]
        for td in waiting:
            td.cache_written_back = True
        return Result(answer(Leaf.CACHE_WB, told(ready=bool(waiting))).rax)

    def tdh_mng_key_freeid(self, td: Td) -> Result:
        """TDH.MNG.KEY.FREEID: the HKID is free, the TD's pages may be reclaimed."""
        return self._end(Leaf.MNG_KEY_FREEID, td, td.cache_written_back, Lifecycle.TEARDOWN)

    def _end(self, leaf: Leaf, td: Td, ready: bool, then: Lifecycle) -> Result:
        found = answer(leaf, on_td(self, td)._replace(ready=lambda: ready))
        if found.ok:
            td.lifecycle = then
        return Result(found.rax)

    def tdh_phymem_page_reclaim(self, hpa: Hpa) -> Result:
        """TDH.PHYMEM.PAGE.RECLAIM of a page of a TD in teardown, the TDR's last; RCX type, RDX owner, R8 size."""
        found, (size, first) = answer(Leaf.PAGE_RECLAIM, on_reclaim(self, hpa)), self.walk_pamt(hpa, Level.PT)
        entry = self.pamt_of(first, size)
        if (
            not came_to(Leaf.PAGE_RECLAIM, Check.PAGE, found)
            or found.status == Status.PAGE_METADATA_INCORRECT
        ):
            return Result(found.rax)
        if found.ok:
            self.pamt[size, hpa] = pamt.after(
                Leaf.PAGE_RECLAIM, OF_PAGE, entry, owner=entry.owner, td_epoch=0
            )
            if entry.type != pamt.PageType.TDR:
                self.tds[Hpa(entry.owner * PAGE)].children -= size.pages
        return Result(found.rax, entry.type, entry.owner * PAGE, size)

    def tdh_phymem_page_wbinvd(self, hpa: Hpa) -> Result:
        """TDH.PHYMEM.PAGE.WBINVD of a free page; the HKID in the address's upper bits is left to lines.py."""
        return Result(answer(Leaf.PAGE_WBINVD, on_page(self, hpa)).rax)

    def tdh_phymem_page_rdmd(self, hpa: Hpa) -> Result:
        """TDH.PHYMEM.PAGE.RDMD: RCX type, RDX owner, R8 size of the page's PAMT entry."""
        found = answer(Leaf.PAGE_RDMD, on_page(self, hpa))
        if not found.ok:
            return Result(found.rax)
        size, first = self.walk_pamt(hpa, Level.PT)
        entry = self.pamt_of(first, size)
        return Result(0, entry.type, entry.owner * PAGE, size)

"""A TDX module to play with: one method a leaf, registers bit for bit, every decision by the tables of tdx_*.py.

Addresses are bytes.  The page contents are not here (tdx_lines.py).  Source: TDX module 1.5.01, one file a leaf.
"""

from __future__ import annotations

from . import locks as tdx_locks
from . import pamt as tdx_pamt
from . import sept as tdx_sept
from . import tlb as tdx_tlb
from .entry import REPORTS, accept_chunk, accept_info
from .locks import Lock
from .parts import PAGE, Entry, Result, Td, Vcpu
from .platform import Platform
from .sept import LEVELS, Answer, Children
from .td import running
from .words import (
    CHILDREN,
    EXIT_REASON_EPT_VIOLATION,
    Guest,
    Leaf,
    Level,
    Operand,
    Status,
    busy,
    is_shared,
    with_operand,
)

_INVALID = with_operand(Status.OPERAND_INVALID, Operand.RCX)
_WRITE = 2  # exit qualification: data write


class Module(Platform):
    """A TDX module and its machine: TDs, PAMT, secure EPTs, locks (hold them by hand to see busy codes), epochs."""

    def _find(self, leaf: Leaf, td: Td, gpa: int, level: Level) -> Entry | Result:
        """Do all that comes before the entry's state: the entry, its lock taken and given back, or the refusal."""
        code = self._admit(leaf, td)
        if code:
            return Result(code)
        if not LEVELS(leaf=leaf, level=level, top=td.top) or not td.has_entry(gpa, level):
            return Result(_INVALID)
        code = self._busy(leaf, Lock.TREE, td)
        if code:
            return Result(code)
        at, entry = td.walk("SEAMCALL", gpa, level)
        if at != level:
            return Result(with_operand(Status.EPT_WALK_FAILED, Operand.RCX), *entry.details(at))
        if tdx_locks.wanted(leaf, Lock.ENTRY):
            status, entry.lock = tdx_locks.acquire_entry("host", entry.lock)
            if status:
                return Result(with_operand(status, Operand.RCX), *entry.details(level))
            entry.lock = tdx_locks.release_entry(entry.lock)
        return entry

    def _mem(
        self, leaf: Leaf, td: Td, gpa: int, level: Level, page: int | None = None
    ) -> tuple[Result, Entry]:
        """One TDH.MEM leaf up to the point where it cannot fail any more; the entry has its new state then."""
        entry = self._find(leaf, td, gpa, level)
        if isinstance(entry, Result):
            return entry, Entry()
        size = Level.PT if leaf in (Leaf.SEPT_ADD, Leaf.PAGE_DEMOTE) else level
        page_error = 0 if page is None else self._page_error(leaf, page, size)
        table = leaf in (Leaf.PAGE_PROMOTE, Leaf.SEPT_REMOVE) and entry.state in tdx_sept.TABLES
        answer = tdx_sept.seamcall(
            leaf,
            entry.state,
            running=running(td.op_state),
            tracked=tdx_tlb.tracked(td.epochs, self._own(entry, level).bepoch),
            page_free=not page_error,
            children=td.below_kind(gpa, level) if table else Children.MIXED,
        )
        child = td.busy_child(gpa, level) if leaf == Leaf.PAGE_PROMOTE and table else None
        refused = self._refused(leaf, answer, entry, level, page_error, child)
        if refused is None:
            refused = self._resize_refused(leaf, td, gpa, level, entry)
        if refused is None:
            entry.state = answer.state
        return refused or Result(), entry

    def _refused(
        self, leaf: Leaf, answer: Answer, entry: Entry, level: Level, page_error: int, child: Entry | None
    ) -> Result | None:
        """The refusal that the tables and locks decide, in the module's order; None to go on."""
        reported = Result(answer.rax, *(entry.details(level) if answer.status in REPORTS else ()))
        if answer.status == Status.EPT_ENTRY_STATE_INCORRECT:
            return reported
        code = self._own_busy(leaf, entry, level)
        if code:
            return Result(code)
        if child and answer.status in (Status.SUCCESS, Status.EPT_INVALID_PROMOTE_CONDITIONS):
            _, child.lock = tdx_locks.acquire_entry("host", child.lock)
            return Result(busy(Operand.RCX), *entry.details(level))
        if answer.status == Status.PAGE_METADATA_INCORRECT:
            return Result(page_error)  # which may be a busy lock, or no TDMR
        return None if answer.ok else reported

    def _resize_refused(self, leaf: Leaf, td: Td, gpa: int, level: Level, entry: Entry) -> Result | None:
        """The last refusals of DEMOTE and PROMOTE: a pending interrupt, then the large page's PAMT entry."""
        if not tdx_locks.wanted(leaf, Lock.LARGE):
            return None
        if self.interrupt_pending:
            return Result(int(Status.INTERRUPTED_RESTARTABLE), gpa | level, td.tdr)
        large = entry.hpa if leaf == Leaf.PAGE_DEMOTE else td.below(gpa, level)[0].hpa
        code = tdx_locks.contended(leaf, Lock.LARGE, self._pamt_held(level, large))
        return None if code is None else Result(code)

    def _own_key(self, entry: Entry, level: Level) -> tuple[Level, int]:
        return (level if entry.state.leaf else Level.PT), entry.hpa

    def _own(self, entry: Entry, level: Level) -> tdx_pamt.PamtEntry:
        """Return the PAMT entry of the page or table that an entry points to."""
        return self.pamt.get(self._own_key(entry, level), tdx_pamt.NDA)

    def _own_busy(self, leaf: Leaf, entry: Entry, level: Level) -> int:
        if leaf not in (Leaf.PAGE_REMOVE, Leaf.PAGE_PROMOTE, Leaf.SEPT_REMOVE):
            return 0
        return tdx_locks.contended(leaf, Lock.PAMT, self._pamt_held(*self._own_key(entry, level))) or 0

    def _note(self, leaf: Leaf, of: str, td: Td, size: Level, hpa: int) -> None:
        """Write into the PAMT what the leaf leaves there."""
        entry = tdx_pamt.after(
            leaf, of, self.pamt_of(hpa, size), owner=td.tdr // PAGE, td_epoch=td.epochs.td_epoch
        )
        self.pamt[size, hpa] = entry

    def _put(self, leaf: Leaf, td: Td, gpa: int, level: Level, hpa: int) -> Result:
        result, entry = self._mem(leaf, td, gpa, level, hpa)
        if result.ok:
            table = leaf == Leaf.SEPT_ADD
            size, of = (Level.PT, tdx_pamt.OF_TABLE) if table else (level, tdx_pamt.OF_PAGE)
            entry.hpa = hpa
            self._note(leaf, of, td, size, hpa)
            td.children += size.pages
        return result

    def tdh_mem_page_add(self, td: Td, gpa: int, hpa: int) -> Result:
        """TDH.MEM.PAGE.ADD: map a copied page before finalize."""
        return self._put(Leaf.PAGE_ADD, td, gpa, Level.PT, hpa)

    def tdh_mem_page_aug(self, td: Td, gpa: int, hpa: int, level: Level = Level.PT) -> Result:
        """TDH.MEM.PAGE.AUG: a page for the TD to accept."""
        return self._put(Leaf.PAGE_AUG, td, gpa, level, hpa)

    def tdh_mem_sept_add(self, td: Td, gpa: int, hpa: int, level: Level = Level.PD) -> Result:
        """TDH.MEM.SEPT.ADD: hang a table under the entry at `level`."""
        return self._put(Leaf.SEPT_ADD, td, gpa, level, hpa)

    def tdh_mem_range_block(self, td: Td, gpa: int, level: Level = Level.PT) -> Result:
        """TDH.MEM.RANGE.BLOCK: no new translations; the epoch is noted."""
        result, entry = self._mem(Leaf.RANGE_BLOCK, td, gpa, level)
        if result.ok:
            entry.accept_counter = 0
            of = tdx_pamt.OF_PAGE if entry.state.leaf else tdx_pamt.OF_TABLE
            self._note(Leaf.RANGE_BLOCK, of, td, *self._own_key(entry, level))
        return result

    def tdh_mem_range_unblock(self, td: Td, gpa: int, level: Level = Level.PT) -> Result:
        """TDH.MEM.RANGE.UNBLOCK: undo BLOCK, once tracked."""
        return self._mem(Leaf.RANGE_UNBLOCK, td, gpa, level)[0]

    def tdh_mem_track(self, td: Td) -> Result:
        """TDH.MEM.TRACK: start the next epoch."""
        code = self._admit(Leaf.TRACK, td) or self._busy(Leaf.TRACK, Lock.EPOCH, td)
        if not code:
            code, td.epochs = tdx_tlb.track(td.epochs)
        return Result(int(code))

    def tdh_mem_page_remove(self, td: Td, gpa: int, level: Level = Level.PT) -> Result:
        """TDH.MEM.PAGE.REMOVE: give the page back; RCX is its HPA."""
        result, entry = self._mem(Leaf.PAGE_REMOVE, td, gpa, level)
        if not result.ok:
            return result
        self._note(Leaf.PAGE_REMOVE, tdx_pamt.OF_PAGE, td, level, entry.hpa)
        td.children -= level.pages
        del td.sept[td.key(gpa, level)]
        return Result(rcx=entry.hpa)

    def tdh_mem_page_demote(self, td: Td, gpa: int, hpa: int, level: Level = Level.PD) -> Result:
        """TDH.MEM.PAGE.DEMOTE: split a large page with a new table `hpa`; the 512 children are not blocked."""
        before = td.walk("SEAMCALL", gpa, level)[1].state
        result, entry = self._mem(Leaf.PAGE_DEMOTE, td, gpa, level, hpa)
        if not result.ok:
            return result
        large, small = entry.hpa, Level(level - 1)
        entry.hpa, entry.accept_counter = hpa, 0
        for i, child in enumerate(td.below(gpa, level)):
            child.state, child.hpa = tdx_sept.demoted(before), large + i * small.pages * PAGE
            self._note(Leaf.PAGE_DEMOTE, tdx_pamt.OF_CHILDREN, td, small, child.hpa)
        self._note(Leaf.PAGE_DEMOTE, tdx_pamt.OF_PAGE, td, level, large)
        self._note(Leaf.PAGE_DEMOTE, tdx_pamt.OF_TABLE, td, Level.PT, hpa)
        td.children += 1
        return result

    def tdh_mem_page_promote(self, td: Td, gpa: int, level: Level = Level.PD) -> Result:
        """TDH.MEM.PAGE.PROMOTE: merge 512 pages; RCX is the table that is free again."""
        result, entry = self._mem(Leaf.PAGE_PROMOTE, td, gpa, level)
        if not result.ok:
            return result
        table, large, small = entry.hpa, td.below(gpa, level)[0].hpa, Level(level - 1)
        entry.hpa = large
        self._note(Leaf.PAGE_PROMOTE, tdx_pamt.OF_PAGE, td, level, large)
        self._note(Leaf.PAGE_PROMOTE, tdx_pamt.OF_TABLE, td, Level.PT, table)
        for i in range(CHILDREN):
            offset = i * small.pages * PAGE
            self._note(Leaf.PAGE_PROMOTE, tdx_pamt.OF_CHILDREN, td, small, large + offset)
            del td.sept[td.key(gpa + offset, small)]
        td.children -= 1
        return Result(rcx=table)

    def tdh_mem_sept_remove(self, td: Td, gpa: int, level: Level = Level.PD) -> Result:
        """TDH.MEM.SEPT.REMOVE: take an empty table away; RCX is its HPA."""
        result, entry = self._mem(Leaf.SEPT_REMOVE, td, gpa, level)
        if not result.ok:
            return result
        self._note(Leaf.SEPT_REMOVE, tdx_pamt.OF_TABLE, td, Level.PT, entry.hpa)
        td.children -= 1
        del td.sept[td.key(gpa, level)]
        return Result(rcx=entry.hpa)

    def vp_enter(self, td: Td, vcpu: Vcpu) -> Result:
        """TDH.VP.ENTER up to the entry: if the result is ok the vCPU is inside, and td_exit() ends the leaf."""
        if vcpu.inside:
            raise ValueError("the vCPU is inside already; end that with td_exit()")
        code = self._admit(Leaf.VP_ENTER, td)
        if code:
            return Result(code)
        new, vcpu.associated = not vcpu.associated, True
        code = self._busy(Leaf.VP_ENTER, Lock.EPOCH, td)
        if code:
            return Result(code)
        td.epochs, vcpu.epoch, flush = tdx_tlb.enter(td.epochs, vcpu.epoch, newly_associated=new)
        if flush:
            vcpu.tlb.clear()
        gpas = [gpa for gpa in vcpu.stepping.gpas if isinstance(gpa, int)]
        faulting = [gpa for gpa in gpas if self._access(td, gpa)[0] != Guest.DATA]
        tree = self._busy(Leaf.VP_ENTER, Lock.TREE, td, armed=vcpu.stepping.armed)
        verdict = tdx_tlb.entry_filter(vcpu.stepping, tree_free=not tree, faulting=faulting)
        vcpu.inside = verdict == tdx_tlb.ENTER
        if vcpu.inside:
            return Result()
        td.epochs = tdx_tlb.leave(td.epochs, vcpu.epoch)
        if verdict == tdx_tlb.TREE_BUSY:
            return Result(tree)
        return Result(EXIT_REASON_EPT_VIOLATION, _WRITE, 0, faulting[0], Guest.EXIT)

    def td_exit(self, td: Td, vcpu: Vcpu, *, progress: bool = True) -> Result:
        """Any other TD exit: what VP.ENTER returns; after a #MC anywhere in the TD, that the TD is lost."""
        vcpu.inside, td.epochs = False, tdx_tlb.leave(td.epochs, vcpu.epoch)
        vcpu.stepping = tdx_tlb.td_exit(vcpu.stepping, progress=progress)
        return Result(int(Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE) if td.fatal else 0)

    def machine_check(self, td: Td, vcpu: Vcpu) -> Result:
        """A vCPU consumes poison: the TD is marked fatal and the vCPU exits."""
        td.fatal = True
        return self.td_exit(td, vcpu)

    def _access(self, td: Td, gpa: int) -> tuple[Guest, Level, Entry]:
        at, entry = td.walk("SEAMCALL", gpa)
        return tdx_sept.access(entry.state, ve_disable=td.ve_disable), at, entry

    def access(self, td: Td, vcpu: Vcpu, gpa: int, *, write: bool = True, progress: bool = True) -> Result:
        """A private access by a vCPU that is inside: through its TLB, else by a walk; RAX to R8 are of a TD exit.

        `progress`: RIP is not what it was at VP.ENTER.  ValueError for a shared GPA or a vCPU that is outside.
        """
        if not vcpu.inside or is_shared(gpa, gpaw=td.gpaw):
            raise ValueError(
                "only a vCPU that is inside accesses memory, and only private GPAs are walked here"
            )
        if gpa // PAGE in vcpu.tlb:
            return Result(exit=Guest.DATA)
        found, at, entry = self._access(td, gpa)
        if found == Guest.DATA:
            vcpu.tlb[gpa // PAGE] = entry.hpa + gpa % (at.pages * PAGE) // PAGE * PAGE
        if found in (Guest.DATA, Guest.VE):
            return Result(exit=found)
        lost = self.td_exit(td, vcpu, progress=progress)
        if lost.rax:
            return lost
        page = gpa // PAGE * PAGE
        vcpu.stepping = tdx_tlb.ept_violation(vcpu.stepping, page, progress=progress)
        return Result(
            EXIT_REASON_EPT_VIOLATION, _WRITE if write else 1, found.extended_qualification, page, found
        )

    def tdg_mem_page_accept(
        self, td: Td, vcpu: Vcpu, gpa: int, level: Level = Level.PT, *, interrupt_after: int = CHILDREN
    ) -> Result:
        """TDG.MEM.PAGE.ACCEPT: RAX for the guest, or a TD exit; a 2M one stops after that many 4K pages."""
        if not vcpu.inside:
            raise ValueError("only a vCPU that is inside executes TDCALL; vp_enter() first")
        if not LEVELS(leaf=Leaf.ACCEPT, level=level, top=td.top) or not td.has_entry(gpa, level):
            return Result(_INVALID)
        at, entry = td.walk("ACCEPT", gpa, level)
        stopped = tdx_sept.walk("ACCEPT", entry.state, at) if at != level else None
        if stopped is None:
            status, entry.lock = tdx_locks.acquire_entry("guest", entry.lock)
            if status:
                return Result(tdx_locks.told_to_guest(status))
            entry.lock = tdx_locks.release_entry(entry.lock)
            stopped = tdx_sept.seamcall(Leaf.ACCEPT, entry.state, level=level)
        if stopped.status == Guest.EXIT_ACCEPT:
            lost = self.td_exit(td, vcpu, progress=False)
            if lost.rax:
                return lost
            info = accept_info(entry.state, level, at)
            return Result(EXIT_REASON_EPT_VIOLATION, _WRITE, info, gpa, Guest.EXIT_ACCEPT)
        if stopped.ok and not self._zero(entry, level, interrupt_after):
            return Result(exit=Guest.INTERRUPTED)
        entry.state = stopped.state
        return Result(stopped.rax)

    def _zero(self, entry: Entry, level: Level, chunks: int) -> bool:
        """Zero the page, of a 2M one at most `chunks` 4K pages; whether all is done."""
        done = level == Level.PT
        while not done and chunks > 0:
            entry.accept_counter, done = accept_chunk(entry.accept_counter)
            chunks -= 1
        return done

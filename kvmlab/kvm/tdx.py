"""KVM's TDX side: mirror page table, SEAMCALLs of the zap and of the fault (arch/x86/kvm/vmx/tdx.c, mmu/tdp_mmu.c).

The module's answers come from hw/tdx/checks.py.  A host SEAMCALL is one step; ACCEPT and VP.ENTER are
two, their lock held in between (guest/td.py), so busy answers arise by themselves.  In scenario seamcall-busy one
more may come from nowhere, as when zero-step mitigation holds the tree.
"""

from __future__ import annotations

from ..hw import tdx
from ..hw.memory import Gfn, Pfn
from ..hw.tdx import Leaf, Level, Status, pamt, tlb
from ..hw.tdx.checks import Answer, Situation, answer
from ..hw.tdx.locks import EXCLUSIVE, NONE, SHARED, EntryLock, Lock
from ..hw.tdx.pamt import PageType, PamtEntry
from ..hw.tdx.td import TdState
from ..hw.tdx.tlb import Age
from ..kernel import keyids
from ..kernel.failures import SEAMCALL, fails
from ..kernel.locks import assert_held
from ..model.state import View
from . import versions
from .gmem import put_page

ABSENT, FROZEN, PRESENT = "absent", "frozen", "present"  # a mirror SPTE for a table
INSIDE = ("td", "entering", "accepting")  # modes in which the module counts a vCPU


# Leaving the TD.


def kick(s: View, me: str) -> bool:
    """KVM_REQ_OUTSIDE_GUEST_MODE: every vCPU leaves once; whether all have by now, else call it again.

    A vCPU inside VP.ENTER or ACCEPT ends that first, and leaves at once.  It may come back while others are
    still awaited.
    """
    if s.kicker == me:
        s.wait(not any(s.kicked[cpu] for cpu in s.conf.vcpus))
        s.kicker = None
        return True
    s.wait(s.kicker is None)
    for cpu in s.conf.vcpus:
        if s.mode[cpu] == "td":
            s.mode[cpu] = "host"
        elif s.mode[cpu] in ("entering", "accepting"):
            s.kicked[cpu], s.kicker = True, me
    if s.kicker == me:
        s.say("[waits for a vCPU inside a module call]")
        return False
    return True


def answers_kick(s: View, me: str) -> None:
    """A vCPU that has ended its module call: in the TD, or out again at once if it was kicked meanwhile."""
    s.mode[me] = "td"
    if s.kicked[me]:
        s.kicked[me], s.mode[me] = False, "host"
        s.say("[kicked out]")


def kvm_make_all_cpus_request(s: View, me: str) -> str | None:
    """The kick that waits: no step of it sleeps, so it may stand under mmu_lock."""
    if not kick(s, me):
        return "again"
    s.count("kicks")
    s.note("kick")
    return None


def kvm_flush_remote_tlbs(s: View, me: str) -> str | None:
    """Every vCPU leaves and drops its shared translations before it enters again; it is no TRACK."""
    for where in s.tlb:
        s.tlb[where] = None
    if not kick(s, me):
        return "again"
    s.count("kicks")
    return None


# The module's answers.


def ages_inside(s: View) -> list[Age]:
    """The epochs of the vCPUs that the module counts as inside."""
    return [s.vcpu_epoch[cpu] for cpu in s.conf.vcpus if s.mode[cpu] in INSIDE]


def _injected(s: View) -> bool:
    """A busy answer out of nowhere, as when zero-step mitigation holds the tree; never with all vCPUs kept out."""
    return bool(s.failures_left[SEAMCALL]) and not s.wait_for_sept_zap and fails(s, SEAMCALL)


def on_cells(s: View) -> Situation:
    """What TRACK finds in the cells, and SEPT.ADD of the one table, whose page is none of the guest's."""

    def held(lock: Lock) -> str:
        """VP.ENTER holds the epoch's lock; the tree's and the epoch's may be held for no reason known."""
        if lock not in (Lock.TREE, Lock.EPOCH):
            return NONE
        if _injected(s):
            return EXCLUSIVE
        entering = lock == Lock.EPOCH and any(s.mode[cpu] == "entering" for cpu in s.conf.vcpus)
        return SHARED if entering else NONE

    return Situation(
        td=lambda: TdState(fatal=s.td_fatal),
        held=held,
        state=lambda: s.sept_table,
        previous_inside=lambda: tlb.track_busy(ages_inside(s)),
    )


def on_entry(s: View, gfn: Gfn) -> Situation:
    """What a leaf finds that names a gfn, whose entry is below the one table; a vCPU in ACCEPT holds its lock."""
    pfn = s.conf.backing["private", gfn]
    return on_cells(s)._replace(
        above=lambda: (Level.PD, s.sept_table),
        entry_lock=lambda: EntryLock(taken=s.entry_lock[gfn] is not None),
        state=lambda: s.sept[gfn],
        tracked=lambda: tlb.tracked_age(s.bepoch[pfn], ages_inside(s)),
        page=lambda: pamt.is_free(Level.PT, PamtEntry(PageType[s.pamt[pfn]])),
    )


def seamcall(s: View, leaf: Leaf, gfn: Gfn) -> Answer:
    """One host leaf on the entry of one gfn, or SEPT.ADD of the table above; done if it succeeds."""
    table = leaf == Leaf.SEPT_ADD
    found = answer(leaf, on_cells(s) if table else on_entry(s, gfn))
    if found.ok and table:
        s.sept_table = found.state
    elif found.ok:
        s.sept[gfn] = found.state
        _owns(s, pamt.EFFECTS(leaf=leaf, of=pamt.OF_PAGE), s.conf.backing["private", gfn])
    return found


def _tell(s: View, leaf: Leaf, found: Answer, gfn: Gfn) -> None:
    s.note(leaf, "" if found.ok else tdx.name(found.rax), found.rax, gfn)


def _owns(s: View, change: pamt.Change, pfn: Pfn) -> None:
    """Write into the PAMT what a leaf leaves there; the BEPOCH of a page that is free again means nothing."""
    if isinstance(change.type, PageType):
        s.pamt[pfn] = change.type.name
    if change.bepoch == "TD_EPOCH":
        s.bepoch[pfn] = Age.NOW
    elif change.type == PageType.NDA:
        s.bepoch[pfn] = Age.OLDER


def track(s: View) -> Answer:
    """TDH.MEM.TRACK: every epoch becomes one older, of vCPUs and of blocked pages."""
    found = answer(Leaf.TRACK, on_cells(s))
    if found.ok:
        for cpu in s.conf.vcpus:
            s.vcpu_epoch[cpu] = tlb.track_age(s.vcpu_epoch[cpu])
        for pfn in s.bepoch:
            s.bepoch[pfn] = tlb.track_age(s.bepoch[pfn])
    return found


LEAVES = {leaf.lower().replace(".", "_"): leaf for leaf in Leaf}  # tdh_mem_track() is TDH.MEM.TRACK


def is_busy(found: Answer) -> bool:
    """tdx_operand_busy(): the status is TDX_OPERAND_BUSY exactly; PREVIOUS_TLB_EPOCH_BUSY is another one."""
    return found.status == Status.OPERAND_BUSY


def _bug(s: View, call: str, found: Answer) -> None:
    s.violate("platform-error", f"KVM_BUG_ON: {call} = {tdx.name(found.rax)}")


# Zapping one private leaf, under mmu_lock held for write.


def kvm_unmap_gfn_range(s: View, me: str, gfn: Gfn) -> str | None:
    """Zap the mirror leaf: a plain write, then the SEAMCALLs; a leaf that is not present costs none.

    FROZEN_SPTE is not present either, so tdp_mmu_zap_leafs() passes by it.
    """
    assert_held(s, me, "kvm_unmap_gfn_range()")
    if s.mirror[gfn] in (None, FROZEN):
        return "skip"
    s.flush[me] = True
    s.mirror[gfn] = None
    s.note("zap", "private", gfn=gfn)
    return None


def zap_seamcall(s: View, me: str, gfn: Gfn, call: str, word: str | None) -> str | None:
    """One SEAMCALL of the zap.  Busy: "retry" is again, without end; "kick" (tdh_do_no_vcpus()) is a way out."""
    leaf = LEAVES[call]
    found = track(s) if leaf == Leaf.TRACK else seamcall(s, leaf, gfn)
    s.count("seamcalls")
    _tell(s, leaf, found, gfn)
    if found.ok:
        s.say(f"[{'TD_EPOCH moves' if leaf == Leaf.TRACK else f'gfn {gfn}: {found.state}'}]")
        return None
    if is_busy(found) and word:
        s.count("seamcall-busy")
        s.note("seamcall-busy", call, gfn=gfn)
        s.say(tdx.name(found.rax))
        return "again" if word == "retry" else "busy"
    _bug(s, call, found)
    return None


def stop_vcpus(s: View, me: str) -> str | None:
    """tdh_do_no_vcpus() after a busy answer: wait_for_sept_zap, and a kick; nobody enters until it is done."""
    s.wait_for_sept_zap = True
    return kvm_make_all_cpus_request(s, me)


def let_vcpus(s: View, me: str) -> None:
    """Clear wait_for_sept_zap."""
    s.wait_for_sept_zap = False


def tdh_phymem_page_wbinvd(s: View, me: str, gfn: Gfn) -> None:
    """Write back and invalidate the TD's lines of the page: legal only once the page is no longer TDX's."""
    s.count("seamcalls")
    found = answer(Leaf.PAGE_WBINVD, on_entry(s, gfn))
    _tell(s, Leaf.PAGE_WBINVD, found, gfn)
    if found.ok:
        keyids.wbinvd(s, s.conf.backing["private", gfn])
    else:
        _bug(s, "tdh_phymem_page_wbinvd", found)


def tdx_clear_page(s: View, me: str, gfn: Gfn) -> None:
    """MOVDIR64B of zeros over the page; from some version on only on parts with X86_BUG_TDX_PW_MCE."""
    if s.conf.linux >= versions.QUIRK_RESET_SINCE and not s.conf.partial_write_erratum:
        s.say("[nothing: no X86_BUG_TDX_PW_MCE]")
        return
    if keyids.clear_by_movdir64b(s, s.conf.backing["private", gfn]):
        s.note("tdx-clear-page", gfn=gfn)


# Mapping one private page, under mmu_lock held for read.


def freeze_spte(s: View, me: str, word: str) -> str | None:
    """Make the mirror SPTE FROZEN_SPTE by cmpxchg; whoever meets it retries.  Present already: nothing to do."""
    gfn = s.acc[me].gfn
    now = s.mirror_table if word == "table" else s.mirror[gfn]
    if now == FROZEN:
        put_page(s, me)
        _forget(s, me)
        s.count("npf")
        s.note("retry", "FROZEN_SPTE")
        s.say("meets FROZEN_SPTE: RET_PF_RETRY")
        return "retry"
    if now not in (None, ABSENT):
        return _present(s, me, word)
    if word == "table":
        s.mirror_table = FROZEN
    else:
        s.mirror[gfn] = FROZEN
    return None


def _present(s: View, me: str, what: str) -> str:
    if what == "leaf":
        mapped(s, me)
        s.count("spurious-npf")
        s.note("spurious-npf")
        s.say("[already mapped]")
    return "skip"


def write_spte(s: View, me: str, word: str) -> None:
    """Write the value itself over FROZEN_SPTE."""
    gfn = s.acc[me].gfn
    if word == "table":
        s.mirror_table = PRESENT
        return
    s.mirror[gfn] = s.conf.backing["private", gfn]
    mapped(s, me)


def mapped(s: View, me: str) -> None:
    """The fault has its leaf: snapshot and page are let go."""
    put_page(s, me)
    _forget(s, me)


def _forget(s: View, me: str) -> None:
    if s.snapshot[me] != "none":
        s.snapshot[me] = "none"


def clflush(s: View, me: str) -> None:
    """tdx_clflush_page(): before the page becomes the TD's, its KeyID-0 lines go to memory."""
    gfn = s.acc[me].gfn
    if keyids.clflush(s, s.conf.backing["private", gfn]):
        s.note("clflush", gfn=gfn)


def aug_seamcall(s: View, me: str, call: str, word: str | None) -> str | None:
    """SEPT.ADD or PAGE.AUG: busy writes the old SPTE back and retries the fault, anything else is a bug.

    Word "bit_and": busy is tested as err & TDX_OPERAND_BUSY, which is true of other errors as well (January 2025).
    """
    gfn, leaf = s.acc[me].gfn, LEAVES[call]
    found = seamcall(s, leaf, gfn)
    s.count("seamcalls")
    _tell(s, leaf, found, gfn)
    if found.ok:
        s.say(f"[gfn {gfn}: {found.state}]" if leaf == Leaf.PAGE_AUG else "[S-EPT table added]")
        return None
    if is_busy(found) or (word == "bit_and" and found.rax & Status.OPERAND_BUSY):
        s.count("seamcall-busy")
        s.note("seamcall-busy", call, gfn=gfn)
        s.say(f"{tdx.name(found.rax)}: RET_PF_RETRY")
        if leaf == Leaf.SEPT_ADD:
            s.mirror_table = ABSENT
        else:
            s.mirror[gfn] = None
        mapped(s, me)
        s.count("npf")
        return "retry"
    _bug(s, call, found)
    return None

"""KVM's TDX side: mirror page table, SEAMCALLs of the zap and of the fault (arch/x86/kvm/vmx/tdx.c, mmu/tdp_mmu.c).

The module's answers come from hw/tdx/sept.py and hw/tdx/tlb.py.  A host SEAMCALL is one step; ACCEPT and VP.ENTER are
two, their lock held in between (guest/td.py), so busy answers arise by themselves.  In scenario seamcall-busy one
more may come from nowhere, as when zero-step mitigation holds the tree.
"""

from __future__ import annotations

from ..hw import tdx
from ..hw.tdx import Leaf, Operand, Status
from ..hw.tdx import sept as tdx_sept
from ..hw.tdx import tlb as tdx_tlb
from ..hw.tdx.sept import Answer, State
from ..hw.tdx.tlb import Age
from ..kernel import keyids
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
    return None


def kvm_flush_remote_tlbs(s: View, me: str) -> str | None:
    """Every vCPU leaves and drops its shared translations before it enters again; it is no TRACK."""
    for where in s.tlb:
        s.tlb[where] = None
    return kvm_make_all_cpus_request(s, me)


# The module's answers.


def ages_inside(s: View) -> list[Age]:
    """The epochs of the vCPUs that the module counts as inside."""
    return [s.vcpu_epoch[cpu] for cpu in s.conf.vcpus if s.mode[cpu] in INSIDE]


def _injected(s: View) -> bool:
    if not (s.conf.busy and s.failures_left and not s.wait_for_sept_zap):
        return False
    if not s.choose((False, True)):
        return False
    s.failures_left = 0
    return True


def seamcall(s: View, leaf: Leaf, gfn: int) -> Answer:
    """One host leaf on the entry of one gfn: locks, walk, state, PAMT; done if it succeeds."""
    state: State = s.sept[gfn] if leaf != Leaf.SEPT_ADD else s.sept_table
    pfn = s.conf.backing["private", gfn]
    if _injected(s):
        return Answer(Status.OPERAND_BUSY, Operand.SEPT_TREE, state)
    if leaf != Leaf.SEPT_ADD:
        if stopped := tdx_sept.walk("SEAMCALL", s.sept_table, tdx.Level.PD):
            return stopped
        if s.entry_lock[gfn] is not None:  # a vCPU is in ACCEPT there
            return Answer(Status.OPERAND_BUSY, Operand.RCX, state)
    takes_page = leaf == Leaf.PAGE_AUG
    needs_tracking = state in tdx_sept.ANY_BLOCKED and leaf != Leaf.RANGE_BLOCK
    answer = tdx_sept.seamcall(
        leaf,
        state,
        tracked=not needs_tracking or tdx_tlb.tracked_age(s.bepoch[pfn], ages_inside(s)),
        page_free=not takes_page or s.pamt[pfn] == "NDA",
    )
    if answer.ok:
        _take_effect(s, leaf, gfn, pfn, answer.state)
    return answer


def _take_effect(s: View, leaf: Leaf, gfn: int, pfn: str, state: State) -> None:
    if leaf == Leaf.SEPT_ADD:
        s.sept_table = state
        return
    s.sept[gfn] = state
    if leaf == Leaf.PAGE_AUG:
        s.pamt[pfn] = "REG"
    elif leaf == Leaf.PAGE_REMOVE:
        s.pamt[pfn] = "NDA"
        s.bepoch[pfn] = Age.OLDER
    elif leaf == Leaf.RANGE_BLOCK:
        s.bepoch[pfn] = Age.NOW


def track(s: View) -> Answer:
    """TDH.MEM.TRACK: busy while a vCPU is in VP.ENTER's count, or inside with the epoch before this one."""
    if _injected(s) or any(s.mode[cpu] == "entering" for cpu in s.conf.vcpus):
        return Answer(Status.OPERAND_BUSY, Operand.TD_EPOCH, State.FREE)
    if tdx_tlb.track_busy(ages_inside(s)):
        return Answer(Status.PREVIOUS_TLB_EPOCH_BUSY, 0, State.FREE)
    for cpu in s.conf.vcpus:
        s.vcpu_epoch[cpu] = tdx_tlb.track_age(s.vcpu_epoch[cpu])
    for pfn in s.bepoch:
        s.bepoch[pfn] = tdx_tlb.track_age(s.bepoch[pfn])
    return Answer(Status.SUCCESS, 0, State.FREE)


LEAVES = {
    "tdh_mem_range_block": Leaf.RANGE_BLOCK,
    "tdh_mem_track": Leaf.TRACK,
    "tdh_mem_page_remove": Leaf.PAGE_REMOVE,
    "tdh_mem_sept_add": Leaf.SEPT_ADD,
    "tdh_mem_page_aug": Leaf.PAGE_AUG,
}


def is_busy(answer: Answer) -> bool:
    """tdx_operand_busy(): the status is TDX_OPERAND_BUSY exactly; PREVIOUS_TLB_EPOCH_BUSY is another one."""
    return answer.status == Status.OPERAND_BUSY


def _bug(s: View, call: str, answer: Answer) -> None:
    s.violate("platform-error", f"KVM_BUG_ON: {call} = {tdx.name(answer.rax)}")


# Zapping one private leaf, under mmu_lock held for write.


def kvm_unmap_gfn_range(s: View, me: str, gfn: int) -> str | None:
    """Zap the mirror leaf: a plain write, then the SEAMCALLs; a leaf that is not present costs none.

    FROZEN_SPTE is not present either, so tdp_mmu_zap_leafs() passes by it.
    """
    assert_held(s, me, "kvm_unmap_gfn_range()")
    if s.mirror[gfn] in (None, FROZEN):
        return "skip"
    if s.conf.asks_flush:
        s.flush = True
    s.mirror[gfn] = None
    return None


def zap_seamcall(s: View, me: str, gfn: int, call: str, word: str | None) -> str | None:
    """One SEAMCALL of the zap.  Busy: "retry" is again, without end; "kick" (tdh_do_no_vcpus()) is a way out."""
    leaf = LEAVES[call]
    answer = track(s) if leaf == Leaf.TRACK else seamcall(s, leaf, gfn)
    s.count("seamcalls")
    if answer.ok:
        s.say(f"[{'TD_EPOCH moves' if leaf == Leaf.TRACK else f'gfn {gfn}: {answer.state}'}]")
        return None
    if is_busy(answer) and word:
        s.count("seamcall-busy")
        s.say(tdx.name(answer.rax))
        return "again" if word == "retry" else "busy"
    _bug(s, call, answer)
    return None


def stop_vcpus(s: View, me: str) -> str | None:
    """tdh_do_no_vcpus() after a busy answer: wait_for_sept_zap, and a kick; nobody enters until it is done."""
    s.wait_for_sept_zap = True
    return kvm_make_all_cpus_request(s, me)


def let_vcpus(s: View, me: str) -> None:
    """Clear wait_for_sept_zap."""
    s.wait_for_sept_zap = False


def tdh_phymem_page_wbinvd(s: View, me: str, gfn: int) -> None:
    """Write back and invalidate the TD's lines of the page: legal only once the page is no longer TDX's."""
    pfn = s.conf.backing["private", gfn]
    s.count("seamcalls")
    if s.pamt[pfn] != "NDA":
        _bug(s, "tdh_phymem_page_wbinvd", Answer(Status.PAGE_METADATA_INCORRECT, Operand.RCX, s.sept[gfn]))
        return
    keyids.wbinvd(s, pfn)


def tdx_clear_page(s: View, me: str, gfn: int) -> None:
    """MOVDIR64B of zeros over the page; from some version on only on parts with X86_BUG_TDX_PW_MCE."""
    if s.conf.linux >= versions.QUIRK_RESET_SINCE and not s.conf.partial_write_erratum:
        s.say("[nothing: no X86_BUG_TDX_PW_MCE]")
        return
    keyids.clear_by_movdir64b(s, s.conf.backing["private", gfn])


# Mapping one private page, under mmu_lock held for read.


def freeze_spte(s: View, me: str, word: str) -> str | None:
    """Make the mirror SPTE FROZEN_SPTE by cmpxchg; whoever meets it retries.  Present already: nothing to do."""
    gfn = s.acc[me].gfn
    now = s.mirror_table if word == "table" else s.mirror[gfn]
    if now == FROZEN:
        put_page(s, me)
        _forget(s, me)
        s.count("npf")
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
    keyids.clflush(s, s.conf.backing["private", s.acc[me].gfn])


def aug_seamcall(s: View, me: str, call: str, word: str | None) -> str | None:
    """SEPT.ADD or PAGE.AUG: busy writes the old SPTE back and retries the fault, anything else is a bug.

    Word "bit_and": busy is tested as err & TDX_OPERAND_BUSY, which is true of other errors as well (January 2025).
    """
    gfn, leaf = s.acc[me].gfn, LEAVES[call]
    answer = seamcall(s, leaf, gfn)
    s.count("seamcalls")
    if answer.ok:
        s.say(f"[gfn {gfn}: {answer.state}]" if leaf == Leaf.PAGE_AUG else "[S-EPT table added]")
        return None
    if is_busy(answer) or (word == "bit_and" and answer.rax & Status.OPERAND_BUSY):
        s.count("seamcall-busy")
        s.say(f"{tdx.name(answer.rax)}: RET_PF_RETRY")
        if leaf == Leaf.SEPT_ADD:
            s.mirror_table = ABSENT
        else:
            s.mirror[gfn] = None
        mapped(s, me)
        s.count("npf")
        return "retry"
    _bug(s, call, answer)
    return None

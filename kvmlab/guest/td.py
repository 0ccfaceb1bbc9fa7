"""A TD's vCPU: VP.ENTER, ACCEPT, and accesses through two GPAs with two roots (tdx).

With the SHARED bit the ordinary EPT and KeyID 0, without it the secure EPT and the TD's HKID.  VP.ENTER and ACCEPT
are two steps each, the module's lock held in between.  Sources: TDX module 1.5.01, tdh_vp_enter.c,
tdg_mem_page_accept.c, td_ept_violation.c; arch/x86/kvm/vmx/tdx.c.
"""

from __future__ import annotations

from ..hw import tdx
from ..hw.memory import GUEST_KEY, PLAIN, Content, Pfn
from ..hw.tdx import Guest, Leaf, checks
from ..hw.tdx import lines as tdx_lines
from ..hw.tdx import sept as tdx_sept
from ..hw.tdx import tlb as tdx_tlb
from ..hw.tdx.checks import Check
from ..kernel import keyids
from ..kernel.keyids import HKID
from ..kvm import memslots
from ..kvm.tdx import answers_kick, on_entry
from ..model.state import View
from .access import Access

BEFORE_LOCK, WITH_LOCK = checks.around(Leaf.ACCEPT, Check.ENTRY)


def guest_runs(s: View, me: str) -> str:
    """With an access pending: enter the TD, translate, or do the access; one call is one of them."""
    acc: Access = s.acc[me]
    if s.mode[me] == "accepting":
        return _accept_ends(s, me, acc)
    if s.mode[me] != "td":
        return _vp_enter(s, me)
    if s.conf.correct_guest and acc.gfn in s.conf.converted and _dropped(s, acc):
        s.acc[me] = None
        s.say("drops the access: the page is being converted")
        return _rest(s, me)
    if acc.kind == "shared":
        return _shared(s, me, acc)
    return _accept_begins(s, me, acc) if acc.op == "accept" else _private(s, me, acc)


def _dropped(s: View, acc: Access) -> bool:
    """Whether the guest has no more business there: another era, or a stray read once the PTE is private."""
    return acc.era != s.era or (acc.op == "zeropad" and s.guest[acc.gfn] in ("accepted", "ready"))


def _vp_enter(s: View, me: str) -> str:
    """TDH.VP.ENTER: count oneself in under the epoch lock, flush if the epoch is new; then run.

    No check refuses it here: the TD runs, a TRACK is over in one step, and zero-step mitigation is never armed.
    """
    if s.mode[me] == "entering":
        s.say("VP.ENTER: in the TD")
        answers_kick(s, me)
        return "again"
    s.wait(not s.wait_for_sept_zap)  # tdx_vcpu_run() turns back until the zap is done
    memslots.srcu_read_unlock(s, me)
    epoch, flushes = tdx_tlb.enter_age(s.vcpu_epoch[me])
    s.mode[me], s.vcpu_epoch[me] = "entering", epoch
    for cpu, gfn in s.ptlb if flushes else ():
        if cpu == me:
            s.ptlb[cpu, gfn] = None
    s.say(f"VP.ENTER{': new epoch, INVEPT' if flushes else ''}")
    return "again"


def td_exit(s: View, me: str) -> None:
    """Out of the TD; the count of the vCPU's epoch goes down."""
    s.mode[me] = "host"


def _ept_violation(s: View, me: str, acc: Access, why: str) -> str:
    td_exit(s, me)
    memslots.srcu_read_lock(s, me)
    s.count("npf")
    s.say(f"EPT violation ({why}) gfn {acc.gfn} {acc.kind}")
    return f"fault-{acc.kind}"


def _shared(s: View, me: str, acc: Access) -> str:
    pfn = s.tlb[me, acc.gfn]
    if pfn is None:
        pfn = s.npt[acc.gfn]
        if pfn is None:
            return _ept_violation(s, me, acc, "shared EPT")
        s.tlb[me, acc.gfn] = pfn
        s.say(f"[TLB: gfn {acc.gfn} shared -> {pfn}]")
        return "again"
    return _complete(s, me, acc, pfn, tdx_lines.HOST)


def _private(s: View, me: str, acc: Access) -> str:
    pfn = s.ptlb[me, acc.gfn]
    if pfn is not None:
        return _complete(s, me, acc, pfn, HKID)
    found = (
        Guest.EXIT
        if s.sept_table != tdx_sept.NL_MAPPED
        else tdx_sept.access(s.sept[acc.gfn], ve_disable=True)
    )
    if found == Guest.EXIT:
        return _ept_violation(s, me, acc, f"S-EPT {s.sept[acc.gfn]}")
    if found != Guest.DATA:
        return _pending(s, me, acc)
    s.ptlb[me, acc.gfn] = s.conf.backing["private", acc.gfn]
    s.say(f"[TLB: gfn {acc.gfn} private -> {s.ptlb[me, acc.gfn]}]")
    return "again"


def _pending(s: View, me: str, acc: Access) -> str:
    """Touching a PENDING page ends the VM (tdx_handle_ept_violation()): SEPT_VE_DISABLE is what KVM insists on."""
    s.say("PENDING_EPT_VIOLATION: the VM is dead")
    if s.conf.correct_guest:
        s.violate("guest-killed", "the page that the guest had accepted is PENDING")
    s.acc[me] = None
    return _rest(s, me)


def _complete(s: View, me: str, acc: Access, pfn: Pfn, keyid: int) -> str:
    """The access completes: judge the mapping, then read or write with the KeyID of its GPA."""
    _judge_mapping(s, acc, pfn)
    s.acc[me] = None
    if acc.op == "write":
        content = Content("guest", PLAIN if keyid == tdx_lines.HOST else GUEST_KEY, acc.era)
        keyids.store(s, pfn, keyid, content, "TD")
        meant = s.conf.correct_guest and acc.kind == s.conf.eras[acc.era]
        if meant and s.guest[acc.gfn] != "ready":
            s.guest[acc.gfn] = "ready"
    else:
        _judge_read(s, acc, pfn, keyids.load(s, pfn, keyid, "TD"))
    s.say(f"[{acc.op} done in {pfn}]")
    return _rest(s, me)


def _judge_mapping(s: View, acc: Access, pfn: Pfn) -> None:
    """stale-mapping: a mapping of what the attribute does not name, or of a page that the TD no longer has."""
    if acc.kind == "private" and s.gmem[acc.gfn] == "free":
        s.violate("stale-mapping", f"private access completes in {pfn}, which guest_memfd has freed")
    elif acc.kind == "private" and s.pamt[pfn] == "NDA":
        s.violate("stale-mapping", f"private access completes in {pfn}, which the TD has no longer")
    elif s.era and not s.running and acc.kind != s.attr[acc.gfn]:
        s.violate(
            "stale-mapping", f"{acc.kind} access completes in {pfn}, though the attribute is not {acc.kind}"
        )


def _judge_read(s: View, acc: Access, pfn: Pfn, seen: tuple[str, object]) -> None:
    """integrity: a page written in this era shows what the guest or, if shared, the host wrote there."""
    got, content = seen
    if acc.kind == s.attr[acc.gfn] == "shared" and got == tdx_lines.ZEROS:
        s.count("silent-read")
        s.say(f"[{pfn} was last written by the TD: zeros, no fault]")
    if (
        got == tdx_lines.POISON
        or not s.conf.correct_guest
        or acc.op == "zeropad"
        or s.guest[acc.gfn] != "ready"
    ):
        return
    if got == tdx_lines.DATA and isinstance(content, Content):
        from_guest = content.writer == "guest" and content.era == acc.era
        if from_guest or (content.writer == "host" and acc.kind == "shared"):
            return
    s.violate(
        "integrity",
        f"{acc.kind} read of {pfn} returns {got if got != tdx_lines.DATA else content or 'zeros'}",
    )


def _accept_begins(s: View, me: str, acc: Access) -> str:
    """TDG.MEM.PAGE.ACCEPT up to the entry's lock, which it takes whatever the entry's state is."""
    found = checks.answer(Leaf.ACCEPT, on_entry(s, acc.gfn), BEFORE_LOCK)
    if found.status == Guest.EXIT_ACCEPT:
        return _ept_violation(s, me, acc, "ACCEPT: no table")
    if not found.ok:
        return _accept_fails(s, me, acc, found.rax)
    s.entry_lock[acc.gfn] = me
    s.mode[me] = "accepting"
    s.say("ACCEPT takes the entry lock")
    return "again"


def _accept_ends(s: View, me: str, acc: Access) -> str:
    """The state decides: PENDING is zeroed and mapped; FREE and blocked leave the TD, and ACCEPT runs again."""
    s.entry_lock[acc.gfn] = None
    answers_kick(s, me)
    found = checks.answer(Leaf.ACCEPT, on_entry(s, acc.gfn), WITH_LOCK)
    if found.status == Guest.EXIT_ACCEPT:
        return _ept_violation(s, me, acc, f"ACCEPT: {s.sept[acc.gfn]}")
    if not found.ok:
        return _accept_fails(s, me, acc, found.rax)
    s.sept[acc.gfn] = found.state
    keyids.module_zero(s, s.conf.backing["private", acc.gfn])
    s.acc[me] = None
    if s.conf.correct_guest:
        s.guest[acc.gfn] = "accepted"
    s.say(f"[gfn {acc.gfn} accepted, zeroed]")
    return _rest(s, me)


def _accept_fails(s: View, me: str, acc: Access, rax: int) -> str:
    """Any status but success is a failure to a Linux guest (tdx_accept_memory())."""
    s.acc[me] = None
    s.say(f"ACCEPT({acc.gfn}) = {tdx.name(rax)}")
    if s.conf.correct_guest:
        s.violate("conversion-refused", f"ACCEPT({acc.gfn}) = {tdx.name(rax)}")
    return _rest(s, me)


def _rest(s: View, me: str) -> str:
    return "between" if me == s.conf.asker and s.era + 1 < len(s.conf.eras) else "idle"

"""KVM's SNP side: RMPUPDATE and what wraps it (arch/x86/kvm/svm/sev.c, arch/x86/virt/svm/sev.c)."""

from __future__ import annotations

from ..hw import snp
from ..state import View

ASID = 1


def rmpupdate(s: View, me: str, gfn: int, to: str) -> str | None:
    """RMPUPDATE of the private PFN of one gfn towards `to`; any status but OK is one that KVM treats as a bug.

    Whether it flushes the page's TLB entries on all CPUs is the switch `rmpupdate_flushes`: the thread says
    yes, the APM does not.  An injected failure (scenario hook-fails) returns "failed" and changes nothing.
    """
    pfn = s.conf.backing["private", gfn]
    if s.conf.injects and s.failures_left and s.choose((False, True)):
        s.failures_left = 0
        s.say(f"RMPUPDATE({pfn}) fails (injected)")
        return "failed"
    new = snp.assigned_to(ASID, gfn) if to == "private" else snp.HYPERVISOR
    code, entry = snp.rmpupdate(s.rmp[pfn], new, identical_keeps_validated=s.conf.identical_keeps_validated)
    if code != snp.Rmpupdate.OK:
        s.violate("platform-error", f"RMPUPDATE({pfn}) = {code.name}")
        return None
    s.rmp[pfn] = entry
    if s.conf.rmpupdate_flushes:
        for cpu, g in s.tlb:
            if g == gfn:
                s.tlb[cpu, g] = None
    return None


def rmp_fits(s: View, me: str, kind: str) -> str | None:
    """Whether the private PFN's entry already fits the fault; if so, skip the work under the folio lock."""
    assigned = s.rmp[s.conf.backing["private", s.acc[me].gfn]].assigned
    return "skip" if assigned == (kind == "private") else None


def psmash(s: View, me: str, kind: str) -> None:
    """PSMASH of the 2M entry over the faulting page."""
    pfn = s.conf.backing["private", s.acc[me].gfn]
    code, entry = snp.psmash(s.rmp[pfn])
    if code != snp.Rmpupdate.OK:
        s.violate("platform-error", f"PSMASH({pfn}) = {code.name}")
        return
    s.rmp[pfn] = entry

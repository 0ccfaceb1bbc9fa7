"""KVM's SNP side: RMPUPDATE and what wraps it (arch/x86/kvm/svm/sev.c, arch/x86/virt/svm/sev.c)."""

from __future__ import annotations

from ..hw import snp
from ..hw.memory import Gfn, Pfn
from ..hw.snp import pages as snp_pages
from ..kernel.failures import RMPUPDATE, fails
from ..model.state import View
from .mmu import drop_translation

ASID = 1


def rmpupdate(s: View, me: str, gfn: Gfn, to: str, section: str, request: tuple[Gfn, ...] = ()) -> str | None:
    """RMPUPDATE of the private PFN of one gfn towards `to`; any status but OK is one that KVM treats as a bug.

    Whether it flushes the page's TLB entries on all CPUs is the switch `rmpupdate_flushes`: the thread says
    yes, the APM does not.  An injected failure (scenario hook-fails) returns "failed" and changes nothing.
    Towards shared an entry that is not assigned is let be (snp_make_page_shared(), RFC v8 48/56;
    sev_gmem_invalidate()).  `request`: all gfns of the ioctl or the punch; at a fault there is none.
    """
    pfn = s.conf.backing["private", gfn]
    if to == "shared" and not s.rmp[pfn].assigned:
        if s.conf.folio_2m:
            return None  # the 2M RMPUPDATE of the folio's first page may have taken it back already
        s.say(f"[{pfn} is not assigned]")
        return "unassigned"
    if fails(s, RMPUPDATE):
        s.say(f"RMPUPDATE({pfn}) fails (injected)")
        return "failed"
    new = snp.assigned_to(ASID, gfn) if to == "private" else snp.HYPERVISOR
    if s.conf.folio_2m:
        _rmpupdate_sized(s, pfn, gfn, to, section, request)
        return None
    code, entry = snp.rmpupdate(s.rmp[pfn], new, identical_keeps_validated=s.conf.identical_keeps_validated)
    _updated(s, pfn, gfn, code, entry, to)
    return None


def _updated(
    s: View, pfn: Pfn, gfn: Gfn, code: snp.Rmpupdate, entry: snp.RmpEntry, to: str, size: str = snp.PG_4K
) -> None:
    s.note("rmpupdate", f"{to} {size}" + f" = {code.name}" * bool(code), int(code), gfn)
    if code != snp.Rmpupdate.OK:
        again = ", and rmpupdate() repeats for ever" if code == snp.Rmpupdate.FAIL_OVERLAP else ""
        s.violate("platform-error", f"RMPUPDATE({pfn}) = {code.name}{again}")
        return
    store_entry(s, pfn, entry)
    for cpu, g in s.tlb if s.conf.rmpupdate_flushes else ():
        if g == gfn or entry.size == snp.PG_2M:
            drop_translation(s, cpu, g)


def store_entry(s: View, pfn: Pfn, entry: snp.RmpEntry) -> None:
    """Write one RMP entry; a 2M one stands for every page of the region, each with its own gfn."""
    if entry.size == snp.PG_4K:
        s.rmp[pfn] = entry
        return
    for g in s.conf.gfns:
        s.rmp[s.conf.backing["private", g]] = entry._replace(gpa=g)


def _rmpupdate_sized(s: View, pfn: Pfn, gfn: Gfn, to: str, section: str, request: tuple[Gfn, ...]) -> None:
    """RMPUPDATE where guest_memfd has a 2M page.

    To private in the ioctl: 2M if the request has all of it (sev_update_mem_attr(), RFC v8 48/56); at the fault: if
    nothing of it is assigned (sev_gmem_prepare()).  To shared in the ioctl: 4K always; on discard: 2M if the entry
    is and all of it goes.  4K against a 2M entry is FAIL_OVERLAP, which rmpupdate() repeats without end.
    """
    conf, old, head = s.conf, s.rmp[pfn], s.conf.gfns[0]
    pages = [conf.backing["private", g] for g in conf.gfns]
    all_of_it = set(request) == set(conf.gfns)
    if to == "private":
        if old.assigned and old.size == snp.PG_2M and section != "ioctl":
            return  # this page went with the head
        whole = all_of_it if section == "ioctl" else not any(s.rmp[p].assigned for p in pages)
        new = snp.assigned_to(ASID, head if whole else gfn, snp.PG_2M if whole else snp.PG_4K)
    else:
        whole = section == "punch" and old.size == snp.PG_2M and all_of_it
        new = snp.HYPERVISOR
    part = not whole and gfn != head
    code, entry = snp_pages.rmpupdate_at(
        s.rmp[pages[0]] if whole else old,
        new._replace(size=snp.PG_2M) if whole else new,
        part=part,
        resizes=conf.head_4k_over_2m,
        identical_keeps_validated=conf.identical_keeps_validated,
    )
    if whole and code == snp.Rmpupdate.OK and to == "shared":
        for p in pages:
            s.rmp[p] = snp.HYPERVISOR
    _updated(s, pfn, gfn, code, entry, to, snp.PG_2M if whole else snp.PG_4K)


def rmp_fits(s: View, me: str, kind: str, of: str) -> str | None:
    """Whether the RMP entry already fits the fault; if so, skip the work under the folio lock.

    It is that of the PFN that the fault is about to map (Roth, 2023-03-22: "check if a particular PFN needs an
    RMPUPDATE before mapping it"); of the gfn's private PFN, where `of` says so.  With split backing the shared PFN
    is never assigned, so there a shared fault finds nothing to do.
    """
    entry = s.rmp.get(s.conf.backing[of, s.acc[me].gfn], snp.HYPERVISOR)
    return "skip" if entry.assigned == (kind == "private") else None


def snp_lookup_rmpentry(s: View, me: str, word: str | None) -> str | None:
    """The handler goes on only for an assigned 2M entry; 4K means that somebody else has just split it.

    Unassigned: a punch came between fault and handler.  sev_handle_rmp_fault() warns of it (the word "warn":
    "Unexpected RMP fault, no assigned RMP entry"), but holds the page until v7.3, so that it cannot happen; where it
    lets the page go early, as queued in September 2026, it is a benign race (acafcf32c83e).
    """
    gfn = s.acc[me].gfn
    entry = s.rmp[s.conf.backing["private", gfn]]
    if s.attr[gfn] != "private":
        return "leave"
    if word == "warn" and not entry.assigned:
        s.violate("warning", f"Unexpected RMP fault, no assigned RMP entry for gfn {gfn}")
    return None if entry.assigned and entry.size == snp.PG_2M else "leave"


def psmash(s: View, me: str, word: str | None) -> str | None:
    """PSMASH of the 2M entry over the faulting page.

    A failure is warned of ("Unable to split RMP entry"), and the handler goes on; unless it looks the entry up again:
    4K now is a lost race ("recheck", sev_handle_rmp_fault() since v6.11), unassigned is one as well with fix
    211606532680, queued in September 2026 ("recheck_unassigned").
    """
    pfn = s.conf.backing["private", s.acc[me].gfn]
    code, entry = snp.psmash(s.rmp[pfn])
    if code == snp.Rmpupdate.OK:
        smash(s, entry)
        return None
    s.note("psmash", code.name, int(code))
    now = s.rmp[pfn]
    benign = {"recheck": now.assigned, "recheck_unassigned": True}.get(word or "", False)
    if not benign:
        s.violate("warning", f"Unable to split RMP entry: PSMASH({pfn}) = {code.name}")
        return None
    s.say(f"PSMASH({pfn}) = {code.name}: lost a race")
    return "leave"


def smash(s: View, entry: snp.RmpEntry) -> None:
    """The 2M entry becomes 4K ones that inherit everything."""
    for g in s.conf.gfns:
        s.rmp[s.conf.backing["private", g]] = entry._replace(gpa=g)
    s.count("psmash")
    s.note("psmash", snp.Rmpupdate.OK.name, int(snp.Rmpupdate.OK))
    s.say("[2M RMP entry splits]")


def psmash_if_2m(s: View, me: str, gfn: Gfn) -> None:
    """Making 4K of a 2M entry shared splits it first (snp_make_page_shared(), RFC v8 48/56)."""
    entry = s.rmp[s.conf.backing["private", gfn]]
    if entry.assigned and entry.size == snp.PG_2M:
        smash(s, snp.psmash(entry)[1])


def psmash_if_partial(s: View, me: str, request: tuple[Gfn, ...]) -> None:
    """Freeing part of a 2M entry, `request`, splits it first (sev_gmem_invalidate())."""
    entry = s.rmp[s.conf.private_pfns[0]]
    if entry.assigned and entry.size == snp.PG_2M and set(request) != set(s.conf.gfns):
        smash(s, snp.psmash(entry)[1])

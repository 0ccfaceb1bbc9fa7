"""The MMU: zap and flush, and the steps of the fault path (arch/x86/kvm/mmu/mmu.c, tdp_mmu.c).

A fault's `kind` is "private" or "shared": on snp the C-bit of the access, on sev and sw the attribute read
when the fault is entered.  A stale fault returns "retry" (RET_PF_RETRY), a mismatch "exit".
"""

from __future__ import annotations

from ..hw.memory import Gfn, Pfn
from ..kernel.locks import assert_held
from ..model.state import View
from . import tdx, versions
from .attributes import mmu_invalidate_retry_gfn
from .gmem import put_page
from .lpage import LargePage
from .memslots import SMM, in_smm


def large_leaf(s: View, gfn: Gfn) -> LargePage | None:
    """The large page that is mapped as such over `gfn`."""
    return next((p for p in reversed(s.conf.large) if gfn in p.gfns and s.npt_large[p.key]), None)


def leaf(s: View, gfn: Gfn, smm: bool = False) -> Pfn | None:
    """The PFN that the nested page table gives for `gfn`: its own leaf, or its part of a large one.

    A vCPU in SMM runs on a page table of its own (kvm_mmu_page_role.smm).
    """
    if page := large_leaf(s, gfn):
        part: Pfn = s.conf.backing[s.npt_large[page.key], gfn]
        return part
    found: Pfn | None = s.npt_smm[gfn] if smm else s.npt[gfn]
    return found


def kvm_unmap_gfn_range(s: View, me: str, gfn: Gfn, as_id: int = 0) -> None:
    """Zap the leaf of one gfn; `s.flush` remembers whether there was one, for an `if (flush)` of the same thread."""
    if leaf(s, gfn, as_id == SMM) is not None:
        s.flush[me] = True
    zap_leaf(s, me, gfn, as_id)


def zap_leaf(s: View, me: str, gfn: Gfn, as_id: int = 0) -> None:
    """Zap the leaf of one gfn, by whoever flushes by himself.

    Only in the page tables of the memslot's address space (for_each_valid_tdp_mmu_root()).
    """
    assert_held(s, me, "kvm_unmap_gfn_range()")
    s.note("zap", gfn=gfn)
    if as_id == SMM:
        s.npt_smm[gfn] = None
        return
    s.npt[gfn] = None
    if page := large_leaf(s, gfn):
        s.npt_large[page.key] = None  # a large leaf that overlaps is removed whole


def fill_translation(s: View, me: str, gfn: Gfn, pfn: Pfn) -> None:
    """Fill a vCPU's TLB from the leaf; a large entry serves every gfn of the page."""
    s.tlb[me, gfn] = pfn
    if page := large_leaf(s, gfn):
        for other in page.gfns:
            s.tlb[me, other] = leaf(s, other)
        s.tlb_2m[me] = True


def mapped_size(s: View, me: str) -> str:
    """The size of the vCPU's translations: 2M or 4K (kept only where guest_memfd has 2M pages)."""
    return "2M" if s.tlb_2m[me] else "4K"


def drop_translation(s: View, cpu: str, gfn: Gfn) -> None:
    """Drop one vCPU's translation of `gfn`; a 2M one goes whole."""
    if s.tlb_2m[cpu]:
        s.tlb_2m[cpu] = False
        for other in s.conf.gfns:
            s.tlb[cpu, other] = None
    s.tlb[cpu, gfn] = None


def tlb_entry_vanishes(s: View, me: str) -> str | None:
    """A TLB may lose an entry at any time, without being told to; no run can count on one that stays."""
    there = [("tlb", where) for where in s.tlb if s.tlb[where] is not None]
    if s.conf.tdx:
        there += [("ptlb", where) for where in s.ptlb if s.ptlb[where] is not None]
    family, (cpu, gfn) = s.choose(there)
    if family == "ptlb":
        s.ptlb[cpu, gfn] = None
    else:
        drop_translation(s, cpu, gfn)
    s.say(f"[{cpu} loses its {'private ' * (family == 'ptlb')}translation of gfn {gfn}]")
    return None


def kvm_flush_remote_tlbs(s: View, me: str) -> str | None:
    """Drop every vCPU's translations (tdx: the shared ones; see kvm/tdx.py)."""
    s.note("flush")
    if s.conf.tdx:
        return tdx.kvm_flush_remote_tlbs(s, me)
    for where in s.tlb:
        s.tlb[where] = None
    for cpu in s.conf.vcpus:
        s.tlb_2m[cpu] = False
    return None


def tdp_mmu_yields(s: View, me: str) -> str | None:
    """Between two gfns the zap may yield (tdp_mmu_iter_cond_resched()): flush, drop the lock, take it again."""
    if not s.choose((False, True)):
        return "skip"
    s.say("yields mmu_lock")
    return None


def flush_if_zapped(s: View, me: str) -> str | None:
    """`if (flush)`: skip what follows unless a zap of this thread has found a leaf; its own variable in KVM."""
    if not s.flush[me]:
        return "skip"
    s.flush[me] = False
    return None


def fault_kind(s: View, me: str) -> str:
    """On sev and sw the kind of a fault is the gfn's attribute at entry (kvm_mmu_page_fault())."""
    return f"fault-{s.attr[s.acc[me].gfn]}"


def had_rmp_bit(s: View, me: str, keeps: bool) -> str | None:
    """The RMP fault handler runs only after a fault with the RMP bit (npf_interception())."""
    if not s.rmp_bit[me]:
        return "skip"
    if not keeps:
        s.rmp_bit[me] = None
    return None


def npf_sizem(s: View, me: str) -> str | None:
    """v8's handler goes on only if the error code has SIZEM (handle_rmp_page_fault(), RFC v8 44/56)."""
    sizem = s.rmp_bit[me] == "SIZEM"
    s.rmp_bit[me] = None
    return None if sizem else "leave"


def mmu_seq_snapshot(s: View, me: str) -> None:
    """fault->mmu_seq = mmu_invalidate_seq, before anything else is read."""
    s.snapshot[me] = "same"


def kvm_mem_is_private(s: View, me: str, kind: str) -> str | None:
    """Compare the fault's kind with the xarray, without a lock; a mismatch is KVM_EXIT_MEMORY_FAULT."""
    gfn = s.acc[me].gfn
    if s.attr[gfn] == kind:
        return None
    s.count("exits")
    s.note("exit-memory-fault")
    s.say(f"KVM_EXIT_MEMORY_FAULT ({kind})")
    judged = s.conf.correct_guest and not s.conf.auto_convert and kind == s.conf.eras[s.era]
    judged = judged and gfn in s.conf.converted
    if judged and s.era > 0 and not s.running and s.acc[me].era == s.era:
        s.violate("guest-killed", f"{kind} access exits though the conversion to {kind} has returned")
    if s.snapshot[me] != "none":
        s.snapshot[me] = "none"
    s.fault_slot[me] = None
    put_page(s, me)
    return "exit"


def is_page_fault_stale(s: View, me: str) -> str | None:
    """Under mmu_lock: has the gfn been invalidated since the snapshot?"""
    assert_held(s, me, "is_page_fault_stale()", write=False)
    if mmu_invalidate_retry_gfn(s, me, s.acc[me].gfn):
        s.snapshot[me] = "none"  # the fault is over; one that is fresh keeps its snapshot until it maps
        put_page(s, me)
        s.count("retry")
        s.note("retry")
        if s.conf.tdx:
            s.count("npf")  # retried without leaving KVM: the loop is one of faults all the same
        s.say("stale: RET_PF_RETRY")
        return "retry"
    return None


def kvm_tdp_mmu_map(s: View, me: str, kind: str) -> None:
    """Install the leaf; what happens over a present one with another PFN depends on the version."""
    assert_held(s, me, "kvm_tdp_mmu_map()", write=False)
    gfn = s.acc[me].gfn
    if s.snapshot[me] != "none":
        s.snapshot[me] = "none"
    put_page(s, me)
    wanted = _large_target(s, kind, gfn)
    while (page := large_leaf(s, gfn)) and (wanted is None or len(page.gfns) > len(wanted.gfns)):
        _split(s, page)
    if wanted:
        _map_large(s, wanted, kind)
        return
    npt = s.npt_smm if in_smm(s, me) else s.npt
    pfn, present = s.conf.backing[kind, gfn], npt[gfn]
    if present == pfn:
        s.count("spurious-npf")
        s.note("spurious-npf")
        s.say(f"[{pfn} already mapped]")
    elif present is not None:
        _finds_another(s, f"leaf {present}", pfn)
    else:
        npt[gfn] = pfn
        s.say(f"[gfn {gfn} -> {pfn}]")


def _finds_another(s: View, present: str, wanted: str) -> None:
    """A fault finds a present leaf with another PFN, as only happens where a zap is missing (tdp_mmu.c).

    It used to be written over, which is "Invalid SPTE change" and BUG().  Today the leaf allows the access (every
    leaf here does), so the fault is taken for spurious and the leaf stays: the vCPU enters the guest with it again.
    """
    if s.conf.linux < versions.SPURIOUS_SINCE:
        s.violate("kernel-bug", f"BUG(): TDP MMU replaces present {present} by {wanted}")
        return
    s.count("spurious-npf")
    s.note("spurious-npf")
    s.say(f"[{present} stays: RET_PF_SPURIOUS]")
    if s.conf.linux >= versions.WARNS_SINCE:
        s.violate("warning", f"WARN_ON_ONCE(): a spurious fault wants {wanted}, but {present} is present")


def _large_target(s: View, kind: str, gfn: Gfn) -> LargePage | None:
    """The largest page around `gfn` that may be mapped as one: not mixed, and its backing is as large."""
    pages = (p for p in reversed(s.conf.large) if gfn in p.gfns)
    return next((p for p in pages if not s.mixed[p.key] and _is_backed(s, kind, gfn)), None)


def _is_backed(s: View, kind: str, gfn: Gfn) -> bool:
    """Whether memory is large: private if its folio and its RMP entry are (sev_private_max_mapping_level())."""
    folio = s.conf.folio_2m
    if kind == "shared":
        return bool(s.conf.large_shared)
    entry = s.rmp[s.conf.backing["private", gfn]] if folio and s.conf.has_rmp else None
    return bool(entry.assigned and entry.size == "2M") if entry else folio and not s.conf.has_rmp


def _map_large(s: View, page: LargePage, kind: str) -> None:
    """Map a page large; a table of smaller leaves that was there goes, with a flush (tdp_mmu.c)."""
    present, level = s.npt_large[page.key], page.level
    if present not in (None, kind):
        _finds_another(s, f"{level} leaf ({present})", f"a {kind} one")
        return
    if present:
        s.count("spurious-npf")
        s.note("spurious-npf", gfn=page.gfns[0])
        s.say(f"[{level} already mapped]")
        return
    if any(leaf(s, gfn) is not None for gfn in page.gfns):
        for gfn in page.gfns:
            s.npt[gfn] = None
            s.note("zap", gfn=gfn)
            if smaller := large_leaf(s, gfn):
                s.npt_large[smaller.key] = None
        kvm_flush_remote_tlbs(s, "")
    s.npt_large[page.key] = kind
    s.say(f"[gfns {page.gfns[0]}-{page.gfns[-1]} -> {level} leaf]")


def _split(s: View, page: LargePage) -> None:
    """tdp_mmu_split_huge_page(): the leaf becomes a table of leaves of the next level, to the same pages."""
    was, s.npt_large[page.key] = s.npt_large[page.key], None
    if page.level == "1G":
        for child in s.conf.large:
            if child.level == "2M":
                s.npt_large[child.key] = was
    else:
        for gfn in page.gfns:
            s.npt[gfn] = s.conf.backing[was, gfn]
    s.note("npt-split")
    s.say(f"[{page.level} leaf splits]")

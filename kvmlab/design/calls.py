"""The words of the language, in one table: what each call means, where it may stand, what it is in the model.

Kernel spelling throughout; an alias is another name that the same thing has or had in some tree.  The parser, the
compiler, `kvmlab designs --calls`, hover texts and documents read this table; nothing else asks for a call by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from inspect import signature

from ..kernel import directmap, locks
from ..kvm import attributes, gmem, lpage, memslots, mmu, sev, tdx
from ..model.step import Step

SECTIONS = ("ioctl", "fault", "rmp_fault", "punch", "zap", "aug")
DEFAULTED = ("punch", "zap", "aug")  # what no base gives of these is that of DEFAULTS_FROM
DEFAULTS_FROM = "upstream"
ONE_WAY = {"punch": "shared", "aug": "private"}  # sections that run for one attribute only
PLATFORMS = {
    "snp": "AMD SEV-SNP: encrypted, ownership checked by the RMP",
    "tdx": "Intel TDX: secure EPT and PAMT kept by the module, memory owned by KeyID",
    "sev": "AMD SEV: encrypted, no RMP",
    "sw": "software-protected VM, as the KVM selftests use it: neither encryption nor RMP",
}
ATTRIBUTES = ("private", "shared")
VISITS = ("gfn_to_memslot", "kvm_memslots")  # what a hook visits if not every memslot: kvm/memslots.py
INCLUSIVE = "inclusive"  # a loop up to and with the end of a range, one page too far
CONDITIONS = ("attr == private", "attr == shared", *(f"platform == {p}" for p in PLATFORMS), "flush")
STATEMENTS = ("one call a line", "if (...)", "else", "return", *(f"{s}:" for s in SECTIONS), "// comment")
EXPECTATIONS = ("SCENARIO: property Verdict, property Verdict", "SCENARIO: all Never")
BACKINGS = ("split", "in-place")
IOCTL_TITLE = "kvm_vm_ioctl_set_mem_attributes"  # the function that the ioctl section is

IOCTL, FAULT, RMP_FAULT = (("ioctl",), ("fault",), ("rmp_fault",))
PUNCH, ZAP, AUG = (("punch",), ("zap",), ("aug",))
PATHS = (*IOCTL, *FAULT, *RMP_FAULT)
INVALIDATES = (*IOCTL, *PUNCH)
FLUSHES = (*IOCTL, *RMP_FAULT, *PUNCH)  # where mappings are zapped by gfn: `if (flush)` may follow

# What a call goes over in the ioctl: each gfn of the request; the pages behind them; what memslots have of it,
# memslot by memslot; the same in one walk with its neighbours (kvm_handle_gfn_range()).
ONCE, GFNS, PAGES, MEMSLOT, WALK = "once", "gfns", "pages", "memslot", "walk"
HAS_RMP, HAS_DIRECTMAP = (
    ("snp",),
    ("snp", "tdx"),
)  # the platforms with an RMP; those whose directmap is looked at
HAS_OP = ("snp", "sev", "sw")  # TDX never had the series' op, nor what comes after it
DIRECTMAP = ("kvm_unmap_directmap", "kvm_map_directmap")
# The parts that not every machine has, as far as a call needs them (machine/parts.py).
DISCARDS, MEMSLOTS, LARGE, FOLIO_2M = "discards", "memslots", "large pages", "2M folio"
MIRROR = ("leaf", "table")  # which SPTE of the mirror
SEAMCALLS = ("tdh_mem_range_block", "tdh_mem_track", "tdh_mem_page_remove")
# The words that say over what a call goes, and where they mean something.
SECTIONS_OF_WORD = {INCLUSIVE: PUNCH, **dict.fromkeys(VISITS, IOCTL)}


@dataclass(frozen=True, slots=True)
class Call:
    """One meaning of a call: where it may stand, what it is there, one sentence, and the source of its rule.

    A call with several has several of these; that which fits section, word, platform and machine is meant.
    `step` is told what its parameters name: gfn (page by page), gfns (all at once), to, word, ...
    (compile/section.py).  `over` is what it goes over.  `ends` are its ways out of the section, by what the step
    returns.  `on` are the platforms that have it; elsewhere it does nothing.  `part` is the part of the machine that
    it needs, if any.  `words` are the arguments that carry meaning, at most one a call; `usual` is meant where none
    is said, `needs` says what is missing then.  `parts` are the calls for which it stands, by direction.  `opens` is
    the section that takes over for a private page of a TD.  `lays` is how the compiler lays it out, if not as its
    step.  `role` is a tag by which code finds a call without its name.  `spte` is the SPTE that it is for.
    """

    name: str
    sections: tuple[str, ...]
    meaning: str
    source: str
    step: Step | None = None
    aliases: tuple[str, ...] = ()
    over: str = ONCE
    ends: Mapping[str, str] = field(default_factory=dict, hash=False)
    on: tuple[str, ...] = tuple(PLATFORMS)
    part: str = ""
    lock: str | None = None
    words: tuple[str, ...] = ()
    usual: str | None = None
    needs: str = ""
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    opens: str | None = None
    lays: str = "step"
    role: str = ""
    spte: str = "leaf"
    shows: str = ""  # what stands between its parentheses in a run: "gfn", "pfn" or "word"
    sleeps: bool = False
    under_mmu_lock: bool = False  # belongs to the walk that takes mmu_lock only where a memslot overlaps
    on_page: bool = False  # works on the private page itself, which has to be there
    in_folio_lock: bool = False  # may stand in the body of a call that holds the folio lock

    @property
    def wants(self) -> tuple[str, ...]:
        """What its step is told, besides the state and who runs it."""
        return _wants(self.step) if self.step else ()

    @property
    def holds_calls(self) -> bool:
        """Whether it is a kernel function that only holds other calls: it may stand over them, and means nothing."""
        return self.step is None and not self.parts


@cache
def _wants(step: Step) -> tuple[str, ...]:
    return tuple(signature(step).parameters)[2:]


def _both(*parts: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(ATTRIBUTES, parts)


OP = {"private": ("kvm_unmap_directmap", "rmpupdate"), "shared": ("rmpupdate", "kvm_map_directmap")}
WAYS = {
    way: way for way in ("retry", "exit", "leave", "userspace")
}  # RET_PF_RETRY; exits; back into the guest
MUTEX_C, QRWLOCK_C, KVM_MAIN_C = "kernel/locking/mutex.c", "kernel/locking/qrwlock.c", "virt/kvm/kvm_main.c"
GMEM_C, MMU_C, TDP_MMU_C = "virt/kvm/guest_memfd.c", "arch/x86/kvm/mmu/mmu.c", "arch/x86/kvm/mmu/tdp_mmu.c"
SEV_C, VIRT_SEV_C, TDX_C = "arch/x86/kvm/svm/sev.c", "arch/x86/virt/svm/sev.c", "arch/x86/kvm/vmx/tdx.c"
SET_MEMORY_C = "arch/x86/mm/pat/set_memory.c"
PSMASH = (
    "PSMASH; fails on a 4K entry; (recheck): if 4K is found then, it is a lost race; (recheck_unassigned): if "
    "unassigned is found, too; in punch: PSMASH if a 2M entry is only partly freed"
)
# Kernel functions that only hold other calls, by where they are.
HOLDERS = {
    KVM_MAIN_C: (
        IOCTL_TITLE, "kvm_vm_set_mem_attributes", "kvm_pre_mem_attrs_changed", "kvm_post_mem_attrs_changed",
        "kvm_pre_set_memory_attributes",
    ),
    MMU_C: (
        "kvm_arch_pre_set_memory_attributes", "kvm_arch_set_memory_attributes", "kvm_arch_post_set_memory_attributes",
        "kvm_tdp_page_fault", "kvm_tdp_mmu_page_fault", "kvm_mmu_faultin_pfn",
    ),
    SEV_C: (
        "handle_rmp_page_fault", "sev_handle_rmp_fault", "sev_gmem_invalidate", "sev_invalidate_private_range",
        "snp_make_page_shared",
    ),
    GMEM_C: (
        "kvm_gmem_set_attributes", "kvm_gmem_punch_hole", "kvm_gmem_invalidate_begin", "kvm_gmem_invalidate_end",
        "kvm_gmem_free_folio", "kvm_arch_gmem_invalidate", "restrictedmem_invalidate",
        "kvm_restrictedmem_invalidate_begin", "kvm_restrictedmem_invalidate_end",
    ),
    TDX_C: (
        "tdx_sept_remove_private_spte", "tdx_sept_zap_private_spte", "tdx_sept_drop_private_spte",
        "tdx_sept_remove_leaf_spte", "tdx_track", "tdx_reclaim_page", "tdx_sept_set_private_spte",
        "tdx_sept_link_private_spt", "tdx_mem_page_aug",
    ),
}  # fmt: skip

CALLS = (
    Call("mutex_lock", PATHS, "take slots_lock; may sleep", MUTEX_C, locks.mutex_lock, lock="slots_lock",
         lays="lock", sleeps=True),
    Call("mutex_unlock", PATHS, "drop slots_lock", MUTEX_C, locks.mutex_unlock, lock="slots_lock", lays="lock"),
    Call("write_lock", (*PATHS, *PUNCH), "take mmu_lock for write; preemption off", QRWLOCK_C, locks.write_lock,
         ("KVM_MMU_LOCK",), lock="mmu_lock", lays="lock", under_mmu_lock=True),
    Call("write_unlock", (*PATHS, *PUNCH), "drop mmu_lock", QRWLOCK_C, locks.write_unlock, ("KVM_MMU_UNLOCK",),
         lock="mmu_lock", lays="lock", under_mmu_lock=True),
    Call("read_lock", PATHS, "take mmu_lock for read; preemption off", QRWLOCK_C, locks.read_lock, lock="mmu_lock",
         lays="lock", under_mmu_lock=True),
    Call("read_unlock", PATHS, "drop mmu_lock", QRWLOCK_C, locks.read_unlock, lock="mmu_lock", lays="lock",
         under_mmu_lock=True),
    Call("filemap_invalidate_lock", INVALIDATES, "take guest_memfd's invalidate_lock alone; may sleep", GMEM_C,
         locks.write_lock, lock="invalidate_lock", lays="lock", sleeps=True),
    Call("filemap_invalidate_unlock", INVALIDATES, "drop invalidate_lock", GMEM_C, locks.write_unlock,
         lock="invalidate_lock", lays="lock"),
    Call("filemap_invalidate_lock_shared", FAULT, "take invalidate_lock with other readers; may sleep", GMEM_C,
         locks.read_lock, lock="invalidate_lock", lays="lock", sleeps=True),
    Call("filemap_invalidate_unlock_shared", FAULT, "drop invalidate_lock", GMEM_C, locks.read_unlock,
         lock="invalidate_lock", lays="lock"),
    Call("kvm_range_has_memory_attributes", IOCTL, "the range is uniform already: return 0", KVM_MAIN_C,
         attributes.kvm_range_has_memory_attributes, ends={"done": "done"}, words=("reserved",)),
    Call("xa_reserve", IOCTL, "reserve an entry a gfn; may sleep, may fail: ENOMEM", "lib/xarray.c",
         attributes.xa_reserve, over=GFNS, ends={"failed": "ENOMEM"}, role="reserves", shows="gfn", sleeps=True),
    Call("kvm_mmu_invalidate_begin", INVALIDATES,
         "open the window; without range_add it covers the whole request", KVM_MAIN_C,
         attributes.kvm_mmu_invalidate_begin, ("kvm_mmu_invalidate_start",), role="opens", under_mmu_lock=True),
    Call("kvm_mmu_invalidate_range_add", INVALIDATES, "add the request to the window's range", KVM_MAIN_C,
         attributes.kvm_mmu_invalidate_range_add, over=WALK, role="widens", under_mmu_lock=True),
    Call("kvm_mmu_invalidate_range_add", INVALIDATES, "add the request to the window's range", MMU_C,
         lpage.widen_hull, over=WALK, part=LARGE, words=tuple(lpage.LEVELS), role="widens", shows="word",
         under_mmu_lock=True),
    Call("kvm_mmu_invalidate_end", INVALIDATES, "close the window: the sequence count moves", KVM_MAIN_C,
         attributes.kvm_mmu_invalidate_end, role="closes", under_mmu_lock=True),
    Call("kvm_vm_set_region_attr", IOCTL, "store the attribute, gfn by gfn", KVM_MAIN_C,
         attributes.kvm_vm_set_region_attr, ("xa_store",), over=GFNS, lays="store", role="stores", shows="gfn"),
    Call("kvm_unmap_gfn_range", FLUSHES, "zap the mappings of the range, gfn by gfn", MMU_C,
         mmu.kvm_unmap_gfn_range, over=WALK, words=VISITS, opens="zap", lays="zap", shows="gfn",
         under_mmu_lock=True),
    Call("kvm_flush_remote_tlbs", FLUSHES, "flush the TLBs of all vCPUs", KVM_MAIN_C, mmu.kvm_flush_remote_tlbs,
         under_mmu_lock=True),
    Call("kvm_mem_attrs_changed", IOCTL, "zap and flush", "RFC v8 02/56", words=VISITS, role="zaps and flushes",
         parts=_both("kvm_unmap_gfn_range", "kvm_flush_remote_tlbs")),
    Call("kvm_update_lpage_mixed_flag", IOCTL, "large-page bookkeeping", MMU_C, lpage.kvm_update_lpage_mixed_flag,
         over=MEMSLOT, words=("reserved",)),
    Call("kvm_unmap_directmap", FAULT, "remove from the directmap, page by page; may sleep", SET_MEMORY_C,
         directmap.unmap_folio, over=PAGES, on=HAS_RMP, part=FOLIO_2M, sleeps=True, on_page=True,
         in_folio_lock=True),
    Call("kvm_unmap_directmap", (*PATHS, *PUNCH, *ZAP), "remove from the directmap, page by page; may sleep",
         SET_MEMORY_C, directmap.kvm_unmap_directmap, over=PAGES, on=HAS_DIRECTMAP, shows="gfn", sleeps=True,
         on_page=True, in_folio_lock=True),
    Call("kvm_map_directmap", (*PATHS, *PUNCH, *ZAP), "restore to the directmap, page by page; may sleep",
         SET_MEMORY_C, directmap.kvm_map_directmap, over=PAGES, on=HAS_DIRECTMAP, shows="gfn", sleeps=True,
         on_page=True, in_folio_lock=True),
    Call("adjust_direct_map", (*PATHS, *PUNCH), "split the directmap to 4K where needed; may sleep", VIRT_SEV_C,
         directmap.adjust_direct_map, over=PAGES, on=HAS_RMP, shows="gfn", sleeps=True, on_page=True,
         in_folio_lock=True),
    Call("rmpupdate", (*PATHS, *PUNCH), "RMPUPDATE, page by page, towards the requested state",
         "APM vol. 3, RMPUPDATE", sev.rmpupdate, over=PAGES, on=HAS_RMP, words=ATTRIBUTES, lays="rmpupdate",
         shows="pfn", on_page=True, in_folio_lock=True),
    Call("kvm_x86_update_mem_attr", (*PATHS, *PUNCH),
         "the series' helper: private: unmap the directmap, RMPUPDATE; shared: RMPUPDATE, map", "RFC v8 48/56",
         aliases=("kvm_x86_set_mem_attr",), on=HAS_OP, words=(*ATTRIBUTES, *VISITS, INCLUSIVE), parts=OP,
         sleeps=True, in_folio_lock=True),
    Call("kvm_vcpu_gfn_to_memslot", FAULT,
         "look up the memslot; where no row says so, it comes before the first", KVM_MAIN_C,
         memslots.kvm_vcpu_gfn_to_memslot, ends=WAYS, part=MEMSLOTS, role="looks up"),
    Call("mmu_seq_snapshot", FAULT, "note mmu_invalidate_seq", MMU_C, mmu.mmu_seq_snapshot, ends=WAYS),
    Call("kvm_mem_is_private", FAULT, "compare with the attribute; a mismatch exits to userspace", MMU_C,
         mmu.kvm_mem_is_private, ends=WAYS),
    Call("kvm_gmem_get_pfn", FAULT, "get the PFN; may sleep", GMEM_C, gmem.kvm_gmem_get_pfn,
         ("kvm_restrictedmem_get_pfn",), ends=WAYS, sleeps=True),
    Call("kvm_gmem_get_pfn", IOCTL, "get the PFN; may sleep", GMEM_C, gmem.hold_page,
         ("kvm_restrictedmem_get_pfn",), over=PAGES, part=DISCARDS, lays="hold", sleeps=True),
    Call("kvm_gmem_get_pfn", IOCTL, "get the PFN; may sleep", GMEM_C, gmem.look_up_in_ioctl,
         ("kvm_restrictedmem_get_pfn",), over=PAGES, sleeps=True),
    Call("memslot_invalid", FAULT,
         "the memslot is being deleted: retry; (leave): and leave the loop in which tdx repeats a private fault, "
         "since v6.18; elsewhere there is no such loop, and the word changes nothing", MMU_C,
         memslots.memslot_invalid, ends=WAYS, part=MEMSLOTS, words=("leave",), role="asks the slot"),
    Call("kvm_gmem_is_private", FAULT, "the same comparison again, under invalidate_lock", GMEM_C,
         mmu.kvm_mem_is_private, ends=WAYS),
    Call("is_page_fault_stale", FAULT, "a fault that raced with an invalidation retries", MMU_C,
         mmu.is_page_fault_stale, ends=WAYS),
    Call("kvm_tdp_mmu_map", FAULT, "install the leaf", TDP_MMU_C, mmu.kvm_tdp_mmu_map, ends=WAYS, opens="aug",
         lays="map"),
    Call("rmp_prepare", FAULT, "private fault on an unassigned page: its body, under the folio lock", SEV_C,
         sev.rmp_fits, ("sev_gmem_prepare",), on=HAS_RMP, parts={"private": ("adjust_direct_map", "rmpupdate")},
         lays="in_folio_lock", sleeps=True),
    Call("rmp_match", FAULT,
         "the RMP entry of the PFN to be mapped is not as the fault needs it: its body, under the folio lock; "
         "(private_pfn): the entry of the private PFN, for shared faults, too", "Roth, 2023-03-22", sev.rmp_fits,
         on=HAS_RMP, words=("private_pfn",), parts=OP, lays="in_folio_lock", sleeps=True),
    Call("npf_sizem", RMP_FAULT, "leave unless the error code has SIZEM", "RFC v8 44/56", mmu.npf_sizem, ends=WAYS,
         on=HAS_RMP, role="asks SIZEM"),
    Call("snp_lookup_rmpentry", RMP_FAULT,
         "leave unless the entry is an assigned 2M one; (warn): unassigned is a warning", SEV_C,
         sev.snp_lookup_rmpentry, ends=WAYS, on=HAS_RMP, words=("warn",)),
    Call("psmash", RMP_FAULT, PSMASH, "APM vol. 3, PSMASH", sev.psmash, ends=WAYS, on=HAS_RMP,
         words=("recheck", "recheck_unassigned"), on_page=True),
    Call("psmash", PUNCH, PSMASH, SEV_C, sev.psmash_if_partial, on=HAS_RMP, part=FOLIO_2M, on_page=True),
    Call("kvm_zap_gfn_range", RMP_FAULT, "zap and flush; takes mmu_lock itself", MMU_C, mmu.zap_leaf, lays="whole",
         parts=_both("write_lock", "kvm_unmap_gfn_range", "kvm_flush_remote_tlbs", "write_unlock")),
    Call("truncate_inode_pages_range", PUNCH,
         "take the page out of guest_memfd, once nobody holds it; may sleep", "mm/truncate.c",
         gmem.truncate_inode_pages_range, over=PAGES, part=DISCARDS, shows="gfn", sleeps=True),
    Call("folio_put", PUNCH, "give the page back to the host: from here on it is anybody's", "mm/swap.c",
         gmem.folio_put, over=PAGES, part=DISCARDS, shows="gfn"),
    Call("tdh_mem_range_block", ZAP,
         "TDH.MEM.RANGE.BLOCK; a status other than 0 is KVM_BUG_ON; (retry): while busy, again without end", TDX_C,
         tdx.zap_seamcall, over=GFNS, words=("retry",), shows="gfn"),
    Call("tdh_mem_track", ZAP, "TDH.MEM.TRACK: the TD epoch moves; status and (retry) as for block", TDX_C,
         tdx.zap_seamcall, words=("retry",)),
    Call("kvm_make_all_cpus_request", ZAP,
         "KVM_REQ_OUTSIDE_GUEST_MODE: wait until every vCPU has left the guest", KVM_MAIN_C,
         tdx.kvm_make_all_cpus_request),
    Call("tdh_mem_page_remove", ZAP,
         "TDH.MEM.PAGE.REMOVE: needs block, track and all vCPUs out since; status and (retry) as for block", TDX_C,
         tdx.zap_seamcall, over=GFNS, words=("retry",), shows="gfn"),
    Call("tdh_do_no_vcpus", ZAP,
         "(tdh_mem_range_block), (tdh_mem_track) or (tdh_mem_page_remove): that SEAMCALL; if busy: set "
         "wait_for_sept_zap, kick all vCPUs out, once more", TDX_C, tdx.stop_vcpus, words=SEAMCALLS,
         needs="has to name its SEAMCALL", lays="no_vcpus"),
    Call("tdh_phymem_page_wbinvd", ZAP, "write back and drop the page's cache lines of the TD's key", TDX_C,
         tdx.tdh_phymem_page_wbinvd, ("tdh_phymem_page_wbinvd_hkid",), over=GFNS, shows="gfn"),
    Call("tdx_clear_page", ZAP,
         "zero the page with full-line writes, as the host; since v6.18 only with X86_BUG_TDX_PW_MCE", TDX_C,
         tdx.tdx_clear_page, ("tdx_quirk_reset_paddr", "tdx_quirk_reset_page"), over=GFNS, shows="gfn"),
    Call("freeze_spte", AUG, "FROZEN_SPTE in the mirror: others retry; (leaf), the default, or (table)", TDP_MMU_C,
         tdx.freeze_spte, ("try_cmpxchg64",), ends={"retry": "retry"}, words=MIRROR, usual="leaf", role="freezes",
         shows="word"),
    Call("tdh_mem_sept_add", AUG,
         "TDH.MEM.SEPT.ADD: give the secure EPT the table, if missing; busy: retry the fault; "
         "(bit_and): busy is err & TDX_OPERAND_BUSY", TDX_C, tdx.aug_seamcall, ends={"retry": "retry"},
         words=("bit_and",), spte="table", role="adds the table"),
    Call("clflush", AUG, "flush the page's cache lines through the directmap", TDX_C, tdx.clflush,
         ("tdx_clflush_page", "clflush_cache_range")),
    Call("tdh_mem_page_aug", AUG,
         "TDH.MEM.PAGE.AUG: the leaf is PENDING; status and (bit_and) as for sept_add", TDX_C, tdx.aug_seamcall,
         ends={"retry": "retry"}, words=("bit_and",)),
    Call("write_spte", AUG, "write the mirror's SPTE, no longer frozen; (leaf), the default, or (table)", TDP_MMU_C,
         tdx.write_spte, ("__kvm_tdp_mmu_write_spte",), words=MIRROR, usual="leaf", role="writes", shows="word"),
    *(Call(name, SECTIONS, "only holds other calls", where) for where, names in HOLDERS.items() for name in names),
)  # fmt: skip

# Calls that readers of the kernel will try first, and what this language has for them.
HINTS = {
    "spin_lock": ("write_lock(mmu_lock)", "read_lock(mmu_lock)"),
    "spin_unlock": ("write_unlock(mmu_lock)", "read_unlock(mmu_lock)"),
    "set_memory_4k": ("adjust_direct_map()",),
    "rmp_make_private": ("rmpupdate(private)",),
    "rmp_make_shared": ("rmpupdate(shared)",),
    "kvm_mmu_unmap_gfn_range": ("kvm_unmap_gfn_range()",),
    "set_direct_map_invalid_noflush": ("kvm_unmap_directmap()",),
    "set_direct_map_default_noflush": ("kvm_map_directmap()",),
    "tdx_no_vcpus_enter_start": tuple(f"tdh_do_no_vcpus({name})" for name in SEAMCALLS),
    "tdx_no_vcpus_enter_stop": tuple(f"tdh_do_no_vcpus({name})" for name in SEAMCALLS),
}


@cache
def _meanings(name: str) -> tuple[Call, ...]:
    return tuple(call for call in CALLS if name in (call.name, *call.aliases))


def meanings(name: str, section: str | None = None) -> tuple[Call, ...]:
    """All that a name or alias means, in a section or in any; nothing for a word that the language does not have."""
    return tuple(call for call in _meanings(name) if section is None or section in call.sections)


def known(name: str) -> Call | None:
    """The first meaning of a name or alias; None for a function that only holds other calls, or is none."""
    found = next(iter(_meanings(name)), None)
    return None if found is None or found.holds_calls else found


def holds_calls(name: str) -> bool:
    """Whether a name is that of a kernel function that only holds other calls."""
    return any(call.holds_calls for call in _meanings(name))


def keeps_body(name: str) -> bool:
    """Whether a call's body is work on a condition, done under the folio lock, and so stays a body."""
    return any(call.lays == "in_folio_lock" for call in _meanings(name))


def does(name: str, role: str) -> bool:
    """Whether a call has a role, such as "stores" (the attributes)."""
    return any(call.role == role for call in _meanings(name))


def with_role(role: str) -> str:
    """The name of the call that has a role."""
    return next(call.name for call in CALLS if call.role == role)


def words(name: str, section: str | None = None) -> tuple[str, ...]:
    """The words that a call may be given, in a section or in any."""
    found = dict.fromkeys(word for call in meanings(name, section) for word in call.words)
    return tuple(w for w in found if section is None or section in SECTIONS_OF_WORD.get(w, SECTIONS))


def sections(name: str) -> tuple[str, ...]:
    """The sections in which a call may stand."""
    return tuple(s for s in SECTIONS if meanings(name, s))


def listed() -> list[tuple[str, tuple[str, ...], str]]:
    """Each call once: its name, the sections in which it may stand, one sentence."""
    names = dict.fromkeys(call.name for call in CALLS if not call.holds_calls)
    return [(name, sections(name), _meanings(name)[0].meaning) for name in names]


def names_its_lock(name: str) -> bool:
    """Whether the argument of that lock call says which lock; a macro or a filemap call says it itself."""
    return name.startswith(("mutex_", "read_", "write_"))


def nearest(name: str, among: Iterable[str] | None = None) -> tuple[str, ...]:
    """Up to three names spelled most like `name`, among the calls if nothing else is given."""
    pool = list(_SPELLINGS if among is None else among)
    close = difflib.get_close_matches(name[:80], pool, n=3, cutoff=0.55)
    return tuple(close or difflib.get_close_matches(name[:80], pool, n=3, cutoff=0.0))


_SPELLINGS = dict.fromkeys(n for call in CALLS if not call.holds_calls for n in (call.name, *call.aliases))

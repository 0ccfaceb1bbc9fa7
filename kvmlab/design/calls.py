"""The calls that a design may make: their names, the sections in which they may stand, what they mean.

Kernel spelling throughout; an alias is another name that the same thing has or had in some tree.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

SECTIONS = ("ioctl", "fault", "rmp_fault", "punch", "zap", "aug")
DEFAULTED = ("punch", "zap", "aug")  # what no base gives of these is that of DEFAULTS_FROM
DEFAULTS_FROM = "upstream"
ONE_WAY = {"punch": "shared", "aug": "private"}  # sections that run for one attribute only
PLATFORMS = ("snp", "tdx", "sev", "sw")
ATTRIBUTES = ("private", "shared")
DIRECTMAP = ("kvm_unmap_directmap", "kvm_map_directmap")  # generic code, on tdx too
MEMSLOTS = ("gfn_to_memslot", "kvm_memslots")  # what a hook visits if not every memslot: kvm/memslots.py
INCLUSIVE = "inclusive"  # a loop up to and with the end of a range, one page too far
CONDITIONS = ("attr == private", "attr == shared", *(f"platform == {p}" for p in PLATFORMS), "flush")
STATEMENTS = ("one call a line", "if (...)", "else", "return", *(f"{s}:" for s in SECTIONS), "// comment")
EXPECTATIONS = ("SCENARIO: property Verdict, property Verdict", "SCENARIO: all Never")
BACKINGS = ("split", "in-place")
IOCTL_TITLE = "kvm_vm_ioctl_set_mem_attributes"  # the function that the ioctl section is


@dataclass(frozen=True, slots=True)
class KnownCall:
    """One call of the language; `lock` is what a lock call takes or drops, `parts` what it stands for."""

    name: str
    sections: tuple[str, ...]
    meaning: str
    aliases: tuple[str, ...] = ()
    lock: str | None = None
    parts: tuple[str, ...] = ()


IOCTL, FAULT, RMP_FAULT = (("ioctl",), ("fault",), ("rmp_fault",))
PUNCH, ZAP, AUG = (("punch",), ("zap",), ("aug",))
PATHS = (*IOCTL, *FAULT, *RMP_FAULT)
INVALIDATES = (*IOCTL, *PUNCH)
FLUSHES = (*IOCTL, *RMP_FAULT, *PUNCH)  # where mappings are zapped by gfn: `if (flush)` may follow

CALLS = (
    KnownCall("mutex_lock", PATHS, "take slots_lock; may sleep", lock="slots_lock"),
    KnownCall("mutex_unlock", PATHS, "drop slots_lock", lock="slots_lock"),
    KnownCall(
        "write_lock", (*PATHS, *PUNCH), "take mmu_lock for write; preemption off", ("KVM_MMU_LOCK",),
        lock="mmu_lock",
    ),
    KnownCall("write_unlock", (*PATHS, *PUNCH), "drop mmu_lock", ("KVM_MMU_UNLOCK",), lock="mmu_lock"),
    KnownCall("read_lock", PATHS, "take mmu_lock for read; preemption off", lock="mmu_lock"),
    KnownCall("read_unlock", PATHS, "drop mmu_lock", lock="mmu_lock"),
    KnownCall(
        "filemap_invalidate_lock", INVALIDATES, "take guest_memfd's invalidate_lock alone; may sleep",
        lock="invalidate_lock",
    ),
    KnownCall("filemap_invalidate_unlock", INVALIDATES, "drop invalidate_lock", lock="invalidate_lock"),
    KnownCall(
        "filemap_invalidate_lock_shared", FAULT, "take invalidate_lock with other readers; may sleep",
        lock="invalidate_lock",
    ),
    KnownCall("filemap_invalidate_unlock_shared", FAULT, "drop invalidate_lock", lock="invalidate_lock"),
    KnownCall("kvm_range_has_memory_attributes", IOCTL, "the range is uniform already: return 0"),
    KnownCall("xa_reserve", IOCTL, "reserve an entry a gfn; may sleep, may fail: ENOMEM"),
    KnownCall(
        "kvm_mmu_invalidate_begin", INVALIDATES,
        "open the window; without range_add it covers the whole request", ("kvm_mmu_invalidate_start",),
    ),
    KnownCall("kvm_mmu_invalidate_range_add", INVALIDATES, "add the request to the window's range"),
    KnownCall("kvm_mmu_invalidate_end", INVALIDATES, "close the window: the sequence count moves"),
    KnownCall("kvm_vm_set_region_attr", IOCTL, "store the attribute, gfn by gfn", ("xa_store",)),
    KnownCall("kvm_unmap_gfn_range", FLUSHES, "zap the mappings of the range, gfn by gfn"),
    KnownCall("kvm_flush_remote_tlbs", FLUSHES, "flush the TLBs of all vCPUs"),
    KnownCall(
        "kvm_mem_attrs_changed", IOCTL, "zap and flush",
        parts=("kvm_unmap_gfn_range", "kvm_flush_remote_tlbs"),
    ),
    KnownCall("kvm_update_lpage_mixed_flag", IOCTL, "large-page bookkeeping"),
    KnownCall(
        "kvm_unmap_directmap", (*PATHS, *PUNCH, *ZAP), "remove from the directmap, page by page; may sleep"
    ),
    KnownCall(
        "kvm_map_directmap", (*PATHS, *PUNCH, *ZAP), "restore to the directmap, page by page; may sleep"
    ),
    KnownCall("adjust_direct_map", (*PATHS, *PUNCH), "split the directmap to 4K where needed; may sleep"),
    KnownCall("rmpupdate", (*PATHS, *PUNCH), "RMPUPDATE, page by page, towards the requested state"),
    KnownCall(
        "kvm_x86_update_mem_attr", (*PATHS, *PUNCH),
        "the series' helper: private: unmap the directmap, RMPUPDATE; shared: RMPUPDATE, map",
        ("kvm_x86_set_mem_attr",), parts=("kvm_unmap_directmap", "rmpupdate", "kvm_map_directmap"),
    ),
    KnownCall(
        "kvm_vcpu_gfn_to_memslot", FAULT, "look up the memslot; where no row says so, it comes before the first"
    ),
    KnownCall("mmu_seq_snapshot", FAULT, "note mmu_invalidate_seq"),
    KnownCall("kvm_mem_is_private", FAULT, "compare with the attribute; a mismatch exits to userspace"),
    KnownCall(
        "kvm_gmem_get_pfn", ("fault", "ioctl"), "get the PFN; may sleep", ("kvm_restrictedmem_get_pfn",)
    ),
    KnownCall(
        "memslot_invalid", FAULT,
        "the memslot is being deleted: retry; (leave): and leave the loop in which tdx repeats a private fault, "
        "since v6.18; elsewhere there is no such loop, and the word changes nothing",
    ),
    KnownCall("kvm_gmem_is_private", FAULT, "the same comparison again, under invalidate_lock"),
    KnownCall("is_page_fault_stale", FAULT, "a fault that raced with an invalidation retries"),
    KnownCall("kvm_tdp_mmu_map", FAULT, "install the leaf"),
    KnownCall(
        "rmp_prepare", FAULT, "private fault on an unassigned page: its body, under the folio lock",
        ("sev_gmem_prepare",), parts=("adjust_direct_map", "rmpupdate"),
    ),
    KnownCall(
        "rmp_match", FAULT,
        "the RMP entry of the PFN to be mapped is not as the fault needs it: its body, under the folio lock; "
        "(private_pfn): the entry of the private PFN, for shared faults, too",
        parts=("kvm_unmap_directmap", "rmpupdate", "kvm_map_directmap"),
    ),
    KnownCall("npf_sizem", RMP_FAULT, "leave unless the error code has SIZEM"),
    KnownCall(
        "snp_lookup_rmpentry", RMP_FAULT,
        "leave unless the entry is an assigned 2M one; (warn): unassigned is a warning",
    ),
    KnownCall(
        "psmash", (*RMP_FAULT, *PUNCH),
        "PSMASH; fails on a 4K entry; (recheck): if 4K is found then, it is a lost race; (recheck_unassigned): "
        "if unassigned is found, too; in punch: PSMASH if a 2M entry is only partly freed",
    ),
    KnownCall("kvm_zap_gfn_range", RMP_FAULT, "zap and flush; takes mmu_lock itself"),
    KnownCall(
        "truncate_inode_pages_range", PUNCH, "take the page out of guest_memfd, once nobody holds it; may sleep"
    ),
    KnownCall("folio_put", PUNCH, "give the page back to the host: from here on it is anybody's"),
    KnownCall(
        "tdh_mem_range_block", ZAP,
        "TDH.MEM.RANGE.BLOCK; a status other than 0 is KVM_BUG_ON; (retry): while busy, again without end",
    ),
    KnownCall("tdh_mem_track", ZAP, "TDH.MEM.TRACK: the TD epoch moves; status and (retry) as for block"),
    KnownCall(
        "kvm_make_all_cpus_request", ZAP, "KVM_REQ_OUTSIDE_GUEST_MODE: wait until every vCPU has left the guest"
    ),
    KnownCall(
        "tdh_mem_page_remove", ZAP,
        "TDH.MEM.PAGE.REMOVE: needs block, track and all vCPUs out since; status and (retry) as for block",
    ),
    KnownCall(
        "tdh_do_no_vcpus", ZAP,
        "(tdh_mem_range_block), (tdh_mem_track) or (tdh_mem_page_remove): that SEAMCALL; if busy: set "
        "wait_for_sept_zap, kick all vCPUs out, once more",
    ),
    KnownCall(
        "tdh_phymem_page_wbinvd", ZAP, "write back and drop the page's cache lines of the TD's key",
        ("tdh_phymem_page_wbinvd_hkid",),
    ),
    KnownCall(
        "tdx_clear_page", ZAP,
        "zero the page with full-line writes, as the host; since v6.18 only with X86_BUG_TDX_PW_MCE",
        ("tdx_quirk_reset_paddr", "tdx_quirk_reset_page"),
    ),
    KnownCall(
        "freeze_spte", AUG, "FROZEN_SPTE in the mirror: others retry; (leaf), the default, or (table)",
        ("try_cmpxchg64",),
    ),
    KnownCall(
        "tdh_mem_sept_add", AUG,
        "TDH.MEM.SEPT.ADD: give the secure EPT the table, if missing; busy: retry the fault; "
        "(bit_and): busy is err & TDX_OPERAND_BUSY",
    ),
    KnownCall(
        "clflush", AUG, "flush the page's cache lines through the directmap",
        ("tdx_clflush_page", "clflush_cache_range"),
    ),
    KnownCall(
        "tdh_mem_page_aug", AUG, "TDH.MEM.PAGE.AUG: the leaf is PENDING; status and (bit_and) as for sept_add"
    ),
    KnownCall(
        "write_spte", AUG, "write the mirror's SPTE, no longer frozen; (leaf), the default, or (table)",
        ("__kvm_tdp_mmu_write_spte",),
    ),
)  # fmt: skip

KEEPS_BODY = ("rmp_prepare", "rmp_match")  # whose body is work on a condition, so it stays a body
UNDER_FOLIO_LOCK = (
    "adjust_direct_map", "kvm_unmap_directmap", "kvm_map_directmap", "rmpupdate", "kvm_x86_update_mem_attr",
)  # fmt: skip
ZAP_SEAMCALLS = ("tdh_mem_range_block", "tdh_mem_track", "tdh_mem_page_remove")
WORDS = {  # the arguments that carry meaning, at most one a call
    "rmpupdate": ATTRIBUTES,
    "kvm_x86_update_mem_attr": (*ATTRIBUTES, *MEMSLOTS, INCLUSIVE),
    "kvm_unmap_gfn_range": MEMSLOTS,
    "kvm_mem_attrs_changed": MEMSLOTS,
    "kvm_mmu_invalidate_range_add": ("hugepage", "PG_LEVEL_2M"),  # the 2M and 1G pages that it only touches; 2M alone
    "kvm_range_has_memory_attributes": ("reserved",),  # takes reserved, empty entries for attributes
    "kvm_update_lpage_mixed_flag": ("reserved",),
    "memslot_invalid": ("leave",),
    "snp_lookup_rmpentry": ("warn",),
    "rmp_match": ("private_pfn",),
    "psmash": ("recheck", "recheck_unassigned"),
    "tdh_do_no_vcpus": ZAP_SEAMCALLS,
    **dict.fromkeys(ZAP_SEAMCALLS, ("retry",)),
    "freeze_spte": ("leaf", "table"),
    "tdh_mem_sept_add": ("bit_and",),
    "tdh_mem_page_aug": ("bit_and",),
    "write_spte": ("leaf", "table"),
}
USUAL_WORD = {"freeze_spte": "leaf", "write_spte": "leaf"}  # meant where none is said
NEEDS_WORD = ("tdh_do_no_vcpus",)
WORD_ONLY_IN = {"psmash": RMP_FAULT}  # elsewhere the call takes no word
SECTIONS_OF_WORD = {INCLUSIVE: PUNCH, **dict.fromkeys(MEMSLOTS, IOCTL)}  # where such a word means something

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
    "tdx_no_vcpus_enter_start": tuple(f"tdh_do_no_vcpus({name})" for name in ZAP_SEAMCALLS),
    "tdx_no_vcpus_enter_stop": tuple(f"tdh_do_no_vcpus({name})" for name in ZAP_SEAMCALLS),
}

# Kernel functions that only hold other calls: they may stand as `name():` over their body, and mean nothing.
TITLES = (
    IOCTL_TITLE,
    "kvm_vm_set_mem_attributes",
    "kvm_pre_mem_attrs_changed",
    "kvm_post_mem_attrs_changed",
    "kvm_pre_set_memory_attributes",
    "kvm_arch_pre_set_memory_attributes",
    "kvm_arch_set_memory_attributes",
    "kvm_arch_post_set_memory_attributes",
    "kvm_gmem_set_attributes",
    "kvm_tdp_page_fault",
    "kvm_tdp_mmu_page_fault",
    "kvm_mmu_faultin_pfn",
    "handle_rmp_page_fault",
    "sev_handle_rmp_fault",
    "kvm_gmem_punch_hole",
    "kvm_gmem_invalidate_begin",
    "kvm_gmem_invalidate_end",
    "kvm_gmem_free_folio",
    "kvm_arch_gmem_invalidate",
    "sev_gmem_invalidate",
    "restrictedmem_invalidate",
    "kvm_restrictedmem_invalidate_begin",
    "kvm_restrictedmem_invalidate_end",
    "sev_invalidate_private_range",
    "snp_make_page_shared",
    "tdx_sept_remove_private_spte",
    "tdx_sept_zap_private_spte",
    "tdx_sept_drop_private_spte",
    "tdx_sept_remove_leaf_spte",
    "tdx_track",
    "tdx_reclaim_page",
    "tdx_sept_set_private_spte",
    "tdx_sept_link_private_spt",
    "tdx_mem_page_aug",
)

_BY_NAME = {name: call for call in CALLS for name in (call.name, *call.aliases)}


def known(name: str) -> KnownCall | None:
    """The call of that name or alias, or None."""
    return _BY_NAME.get(name)


def names_its_lock(name: str) -> bool:
    """Whether the argument of that lock call says which lock; a macro or a filemap call says it itself."""
    return name.startswith(("mutex_", "read_", "write_"))


def nearest(name: str, among: Iterable[str] | None = None) -> tuple[str, ...]:
    """Up to three names spelled most like `name`, among the calls if nothing else is given."""
    pool = list(_BY_NAME if among is None else among)
    close = difflib.get_close_matches(name[:80], pool, n=3, cutoff=0.55)
    return tuple(close or difflib.get_close_matches(name[:80], pool, n=3, cutoff=0.0))

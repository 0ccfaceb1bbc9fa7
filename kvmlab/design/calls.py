"""The calls that a design may make: their names, the sections in which they may stand, what they mean.

Kernel spelling throughout; an alias is another name that the same thing has or had in some tree.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

SECTIONS = ("ioctl", "fault", "rmp_fault")
PLATFORMS = ("snp", "tdx", "sev", "sw")
ATTRIBUTES = ("private", "shared")
CONDITIONS = ("attr == private", "attr == shared", *(f"platform == {p}" for p in PLATFORMS), "flush")
STATEMENTS = ("one call a line", "if (...)", "else", "return", *(f"{s}:" for s in SECTIONS), "// comment")
EXPECTATIONS = ("SCENARIO: property Verdict, property Verdict", "SCENARIO: all Never")
BACKINGS = ("split", "in-place")
LATER = ("zap", "aug")  # sections for TDX, not modelled yet
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
ZAPS = ("ioctl", "rmp_fault")

CALLS = (
    KnownCall("mutex_lock", SECTIONS, "take slots_lock; may sleep", lock="slots_lock"),
    KnownCall("mutex_unlock", SECTIONS, "drop slots_lock", lock="slots_lock"),
    KnownCall(
        "write_lock", SECTIONS, "take mmu_lock for write; preemption off", ("KVM_MMU_LOCK",), lock="mmu_lock"
    ),
    KnownCall("write_unlock", SECTIONS, "drop mmu_lock", ("KVM_MMU_UNLOCK",), lock="mmu_lock"),
    KnownCall("read_lock", SECTIONS, "take mmu_lock for read; preemption off", lock="mmu_lock"),
    KnownCall("read_unlock", SECTIONS, "drop mmu_lock", lock="mmu_lock"),
    KnownCall(
        "filemap_invalidate_lock", IOCTL, "take guest_memfd's invalidate_lock alone; may sleep",
        lock="invalidate_lock",
    ),
    KnownCall("filemap_invalidate_unlock", IOCTL, "drop invalidate_lock", lock="invalidate_lock"),
    KnownCall(
        "filemap_invalidate_lock_shared", FAULT, "take invalidate_lock with other readers; may sleep",
        lock="invalidate_lock",
    ),
    KnownCall("filemap_invalidate_unlock_shared", FAULT, "drop invalidate_lock", lock="invalidate_lock"),
    KnownCall(
        "kvm_mmu_invalidate_begin", IOCTL,
        "open the window; without range_add it covers the whole request", ("kvm_mmu_invalidate_start",),
    ),
    KnownCall("kvm_mmu_invalidate_range_add", IOCTL, "add the request to the window's range"),
    KnownCall("kvm_mmu_invalidate_end", IOCTL, "close the window: the sequence count moves"),
    KnownCall("kvm_vm_set_region_attr", IOCTL, "store the attribute, gfn by gfn", ("xa_store",)),
    KnownCall("kvm_unmap_gfn_range", ZAPS, "zap the mappings of the range, gfn by gfn"),
    KnownCall("kvm_flush_remote_tlbs", ZAPS, "flush the TLBs of all vCPUs"),
    KnownCall(
        "kvm_mem_attrs_changed", IOCTL, "zap and flush",
        parts=("kvm_unmap_gfn_range", "kvm_flush_remote_tlbs"),
    ),
    KnownCall("kvm_update_lpage_mixed_flag", IOCTL, "large-page bookkeeping"),
    KnownCall("kvm_unmap_directmap", SECTIONS, "remove from the directmap, page by page; may sleep"),
    KnownCall("kvm_map_directmap", SECTIONS, "restore to the directmap, page by page; may sleep"),
    KnownCall("adjust_direct_map", SECTIONS, "split the directmap to 4K where needed; may sleep"),
    KnownCall("rmpupdate", SECTIONS, "RMPUPDATE, page by page, towards the requested state"),
    KnownCall(
        "kvm_x86_update_mem_attr", SECTIONS,
        "the series' helper: private: unmap the directmap, RMPUPDATE; shared: RMPUPDATE, map",
        ("kvm_x86_set_mem_attr",), parts=("kvm_unmap_directmap", "rmpupdate", "kvm_map_directmap"),
    ),
    KnownCall("mmu_seq_snapshot", FAULT, "note mmu_invalidate_seq"),
    KnownCall("kvm_mem_is_private", FAULT, "compare with the attribute; a mismatch exits to userspace"),
    KnownCall(
        "kvm_gmem_get_pfn", ("fault", "ioctl"), "get the PFN; may sleep", ("kvm_restrictedmem_get_pfn",)
    ),
    KnownCall("kvm_gmem_is_private", FAULT, "the same comparison again, under invalidate_lock"),
    KnownCall("is_page_fault_stale", FAULT, "a fault that raced with an invalidation retries"),
    KnownCall("kvm_tdp_mmu_map", FAULT, "install the leaf"),
    KnownCall(
        "rmp_prepare", FAULT, "private fault on an unassigned page: its body, under the folio lock",
        ("sev_gmem_prepare",), parts=("adjust_direct_map", "rmpupdate"),
    ),
    KnownCall(
        "rmp_match", FAULT, "the RMP is not as the fault needs it: its body, under the folio lock",
        parts=("kvm_unmap_directmap", "rmpupdate", "kvm_map_directmap"),
    ),
    KnownCall("psmash", RMP_FAULT, "PSMASH of the entry of the faulting page; fails if it is 4K already"),
    KnownCall("kvm_zap_gfn_range", RMP_FAULT, "zap and flush; takes mmu_lock itself"),
)  # fmt: skip

KEEPS_BODY = ("rmp_prepare", "rmp_match")  # whose body is work on a condition, so it stays a body
UNDER_FOLIO_LOCK = (
    "adjust_direct_map", "kvm_unmap_directmap", "kvm_map_directmap", "rmpupdate", "kvm_x86_update_mem_attr",
)  # fmt: skip
WORDS = {  # the arguments that carry meaning
    "rmpupdate": ("private", "shared"),
    "kvm_x86_update_mem_attr": ("private", "shared"),
    "kvm_mmu_invalidate_range_add": ("hugepage",),  # the huge pages that the request only touches
}

# Calls that readers of the kernel will try first, and what this language has for them.
HINTS = {
    "spin_lock": ("write_lock(mmu_lock)", "read_lock(mmu_lock)"),
    "spin_unlock": ("write_unlock(mmu_lock)", "read_unlock(mmu_lock)"),
    "set_memory_4k": ("adjust_direct_map()",),
    "rmp_make_private": ("rmpupdate(private)",),
    "rmp_make_shared": ("rmpupdate(shared)",),
    "kvm_mmu_unmap_gfn_range": ("kvm_unmap_gfn_range()",),
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

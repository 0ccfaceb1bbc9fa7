"""What changed between kernel versions: a design's header `linux: VERSION` decides (`Conf.linux`)."""

from __future__ import annotations

# tdp_mmu_map_handle_target_level(): a fault that finds a present last-level leaf which allows the access is
# RET_PF_SPURIOUS (386d69f9f29b, "KVM: x86/mmu: Treat TDP MMU faults as spurious if access is already allowed").
# Before, the leaf was written anew, and a change of PFN is "Invalid SPTE change" and BUG() (__handle_changed_spte()).
SPURIOUS_SINCE = (6, 13)
# The same place, "KVM: x86/tdp_mmu: WARN if PFN changes for spurious faults" (988da7820206).
WARNS_SINCE = (6, 15)
# "x86/tdx: Skip clearing reclaimed pages unless X86_BUG_TDX_PW_MCE is present": tdx_clear_page() became
# tdx_quirk_reset_paddr(), which does nothing on other parts.
QUIRK_RESET_SINCE = (6, 18)

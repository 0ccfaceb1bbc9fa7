"""sev_handle_rmp_fault(): what KVM does on an #NPF with the RMP bit, once the fault path has run.

The guards are the handler's own; what it does then is the design's `rmp_fault:` section, or, where that is written
for 4K entries only, PSMASH and zap.  `vm.on_point` is told of "snp_lookup_rmpentry" and "snp_rmptable_psmash"
before they run, so that a script can punch the page away in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..hw.snp import Npf, Rmpupdate
from ..hw.snp_pages import PAGES_2M
from .locks import Thread

if TYPE_CHECKING:
    from .vm import Vm

LOOKUP, PSMASH = "snp_lookup_rmpentry", "snp_rmptable_psmash"


def handle(vm: Vm, thread: Thread, gfn: int, code: Npf) -> None:
    """PSMASH a 2M entry and zap; everything else is a warning and a retry.  v8's handler acts only on SIZEM."""
    slot, seq = vm.slots.find(gfn), vm.mmu.seq
    if not vm.merged and not code & Npf.SIZEM:
        vm.log.add("warn", "RMP fault without SIZEM", gfn)
        return
    if not vm.attributes.is_private(gfn) or slot is None or slot.gmem is None:
        vm.log.add("warn", "RMP fault on a gfn that is not private", gfn)
        return
    pfn = slot.private_pfn(gfn)
    vm.at_point(LOOKUP)
    if not vm.rmp.assigned(pfn)[0]:
        # acafcf32c83e: whoever unassigned it has invalidated the gfn since; without that it is worth a warning.
        if not (vm.switches.unassigned_is_benign and vm.mmu.retry(gfn, seq)):
            vm.log.add("warn", "RMP fault on an unassigned entry", gfn)
        return
    if not vm.rmp.big(pfn)[0]:
        return  # somebody else has just split it: spurious
    calls = [row.call for row in vm.rows("rmp_fault", True)] or ["psmash", "kvm_zap_gfn_range"]
    if "psmash" in calls and not _psmash(vm, gfn, pfn):
        return
    if "kvm_zap_gfn_range" in calls or "kvm_unmap_gfn_range" in calls:
        thread.take("mmu_lock")
        if vm.mmu.zap(gfn, gfn + PAGES_2M):
            vm.mmu.flush()
        thread.drop("mmu_lock")


def _psmash(vm: Vm, gfn: int, pfn: int) -> bool:
    """PSMASH; whether to go on to the zap.  A failure is looked into once more: it may be a race that was lost."""
    vm.at_point(PSMASH)
    if vm.sev.psmash(pfn) == Rmpupdate.OK:
        return True
    if not vm.rmp.assigned(pfn)[0]:
        if vm.switches.unassigned_is_benign:  # 211606532680; that it skips the zap is a choice here
            return False
    elif not vm.rmp.big(pfn)[0]:
        return False
    vm.log.add("warn", "PSMASH failed: unable to split the RMP entry", gfn)
    return True

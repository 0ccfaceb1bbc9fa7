"""The design's `rmp_fault:` section: what KVM does on an #NPF with the RMP bit, once the fault path has run.

`vm.on_point` is told of "snp_lookup_rmpentry" and "snp_rmptable_psmash" before they run, so that a script can punch
the page away in between.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from ..design import Row
from ..hw.snp import PG_2M, PG_4K, Npf, Rmpupdate
from ..hw.snp.pages import PAGES_2M
from .events import VmErrno

if TYPE_CHECKING:
    from .faults import Fault

LOOKUP, PSMASH = "snp_lookup_rmpentry", "snp_rmptable_psmash"


class Handler:
    """One run of the section for a fault with error code `code`."""

    def __init__(self, fault: Fault, code: Npf) -> None:
        self.fault, self.vm, self.thread, self.gfn, self.code = fault, fault.vm, fault.thread, fault.gfn, code
        self.seq, self.flush = self.vm.mmu.seq, False
        slot = self.vm.slots.find(self.gfn)
        self.pfn = slot.private_pfn(self.gfn) if slot and slot.gmem else None

    def run(self) -> None:
        """Execute the rows, up to the one that finds nothing left to do."""
        for row in self.vm.rows("rmp_fault", self.fault.private):
            self.vm.reached(row)
            if not self._row(row):
                self.thread.unwind()
                return
        self.thread.leave("enters the guest")

    def _row(self, row: Row) -> bool:
        """One row; whether to go on."""
        if row.under_flush and not self.flush:
            return True
        if row.lock:
            self.thread.row(row)
        elif row.call == "npf_sizem":
            return bool(self.code & Npf.SIZEM) or self._warns("RMP fault without SIZEM")
        elif row.call == "snp_lookup_rmpentry":
            return self._lookup(warns=row.target == "warn")
        elif row.call == "psmash":
            return self._psmash(row.target)
        elif row.call == "kvm_flush_remote_tlbs":
            self.vm.mmu.flush()
            self.flush = False
        elif row.call == "kvm_zap_gfn_range":
            self._zap_range()
        elif row.call == "kvm_unmap_gfn_range":
            self.thread.assert_mmu_lock("kvm_unmap_gfn_range()")
            self.flush |= self.vm.mmu.zap(self.gfn, self.gfn + 1)
        elif self.pfn is not None:
            rmp_work(self.fault, row, self.pfn, 1, PG_4K)
        return True

    def _warns(self, text: str) -> bool:
        self.vm.log.add("warn", text, self.gfn)
        return False

    def _lookup(self, warns: bool) -> bool:
        """Only an assigned 2M entry goes on; a 4K one has just been split by somebody else."""
        if self.pfn is None or not self.vm.attributes.is_private(self.gfn):
            return self._warns("RMP fault on a gfn that is not private")
        self.vm.at_point(LOOKUP)
        if self.vm.rmp.assigned(self.pfn)[0]:
            return bool(self.vm.rmp.big(self.pfn)[0])
        # acafcf32c83e: whoever unassigned it has invalidated the gfn since; without that it is worth a warning.
        if warns or not self.vm.mmu.retry(self.gfn, self.seq):
            self._warns("RMP fault on an unassigned entry")
        return False

    def _psmash(self, recheck: str | None) -> bool:
        """PSMASH; a failure is a warning, unless the text looks once more and finds that it has lost a race."""
        if self.pfn is None:
            return False
        self.vm.at_point(PSMASH)
        if self.vm.sev.psmash(self.pfn) == Rmpupdate.OK:
            return True
        if self.vm.rmp.assigned(self.pfn)[0]:
            lost = recheck is not None and not self.vm.rmp.big(self.pfn)[0]
        else:
            lost = recheck == "recheck_unassigned"  # 211606532680; that it skips the zap is a choice here
        if not lost:
            self._warns("PSMASH failed: unable to split the RMP entry")
        return not lost

    def _zap_range(self) -> None:
        """kvm_zap_gfn_range() of 2M from the faulting gfn on."""
        self.thread.take("mmu_lock")
        if self.vm.mmu.zap(self.gfn, self.gfn + PAGES_2M):
            self.vm.mmu.flush()
        self.thread.drop("mmu_lock")


def rmp_work(fault: Fault, row: Row, pfn: int, n: int, size: str) -> None:
    """Directmap calls and RMPUPDATE on private PFNs of a fault, here and in `fault:`; EINVAL if RMPUPDATE fails."""
    sev, thread = fault.vm.sev, fault.thread
    if row.call == "rmpupdate":
        gfn = fault.gfn - fault.gfn % PAGES_2M if size == PG_2M else fault.gfn
        private = (row.target or "private") == "private"
        done, code = sev.make_private(pfn, n, gfn, size) if private else sev.make_shared(pfn, n, gfn)
        if code != Rmpupdate.OK:
            if not done:
                thread.unwind()
                raise VmErrno(errno.EINVAL, f"KVM_RUN: RMPUPDATE of PFN {pfn:#x} = {code.name}")
            fault.n = done  # the page that fails is the next one to fault
    elif row.call == "adjust_direct_map":
        sev.adjust_direct_map(thread, pfn, n)
    elif row.call == "kvm_unmap_directmap":
        sev.unmap_directmap(thread, pfn, n)
    elif row.call == "kvm_map_directmap":
        sev.map_directmap(thread, pfn, n)

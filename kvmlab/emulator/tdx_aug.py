"""Mapping private pages: kvm_tdp_mmu_map() on the mirror root is the section `aug:` of a design.

On a run of faults alike: missing tables first, then the leaves; a run is cut where the next page is in another
situation, so that only the first page of a run is ever refused.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..design import Row
from ..hw import tdx
from ..hw.tdx import Leaf, Status
from ..hw.tdx.pamt import PageType
from .memory import U8, U32, grown, prefix
from .tdx_kvm import FROZEN, TdxKvm
from .tdx_module import FREE, TABLE_LEVELS, Done
from .tdx_zap import is_busy
from .vm_state import VmState


class Faults(Protocol):
    """What is to be mapped: `n` gfns from `gfn` on, to PFNs from `pfn` on."""

    vm: VmState
    gfn: int
    n: int
    pfn: int


ABSENT, PRESENT, FROZEN_TABLE = 0, 1, 2
CALLS = {"tdh_mem_sept_add": Leaf.SEPT_ADD, "tdh_mem_page_aug": Leaf.PAGE_AUG}


class Aug:
    """One run of the section for a fault; `run` cuts the fault to the pages that it dealt with."""

    def __init__(self, fault: Faults, td: TdxKvm) -> None:
        self.fault, self.vm, self.td = fault, fault.vm, td
        self.rows = self.vm.rows("aug", True)
        self.skipping = False

    def run(self) -> bool:
        """Map the pages; False for RET_PF_RETRY."""
        self.fault.n = self._alike(self.fault.gfn, self.fault.n, self.fault.pfn)
        for row in self.rows:
            self.vm.reached(row)
            if not self._row(row):
                return False
        return True

    def _alike(self, gfn: int, n: int, pfn: int) -> int:
        """How many pages are in the situation of the first; one, if that is to be refused something."""
        vm, module = self.vm, self.td.module
        mirror, states = self.td.mirror_of(gfn, gfn + n), module.states(gfn, gfn + n)
        pamt, absent = module.pamt[pfn : pfn + n], vm.directmap.absent[pfn : pfn + n]
        adds = any(row.call == "tdh_mem_sept_add" for row in self.rows)
        plain = states[0] == FREE and pamt[0] == PageType.NDA and not absent[0] and not module.fatal
        if mirror[0] == 0 and (not plain or vm.failures or not (adds or module.reachable(gfn, 1))):
            return 1
        if mirror[0] == FROZEN:
            return 1
        same = (states == states[0]) & (pamt == pamt[0]) & (absent == absent[0])
        same &= (mirror == 0) == (mirror[0] == 0)
        same &= mirror != FROZEN
        n = prefix(same)
        return n if adds else min(n, max(1, module.reachable(gfn, n)))

    def _row(self, row: Row) -> bool:
        leaf = row.target != "table"
        if row.call == "freeze_spte":
            self.skipping = False
            return self._freeze_leaf() if leaf else self._freeze_table()
        if row.call == "write_spte":
            if not self.skipping:
                self._write_leaf() if leaf else self._tables(FROZEN_TABLE, PRESENT)
            self.skipping = False
        elif self.skipping:
            pass
        elif row.call == "clflush":
            self._clflush()
        else:
            return self._seamcall(row)
        return True

    def _freeze_table(self) -> bool:
        """FROZEN_SPTE where a table is missing; whoever meets it retries.  None missing: on to the leaf."""
        found = [self._mirror_tables(level) for level in TABLE_LEVELS]
        if any((view == FROZEN_TABLE).any() for view in found):
            return self._meets_frozen()
        self.skipping = all(view.all() for view in found)
        self._tables(ABSENT, FROZEN_TABLE)
        return True

    def _mirror_tables(self, level: tdx.Level) -> U8:
        first = self.fault.gfn // level.pages
        end = (self.fault.gfn + self.fault.n - 1) // level.pages + 1
        tables = self.td.mirror_tables
        if end > len(tables[level]):
            tables[level] = grown(tables[level], end)
        return tables[level][first:end]

    def _tables(self, before: int, after: int) -> None:
        for level in TABLE_LEVELS:
            view = self._mirror_tables(level)
            view[view == before] = after

    def _freeze_leaf(self) -> bool:
        fault, view = self.fault, self._mirror()
        if view[0] == FROZEN:
            return self._meets_frozen()
        if view[0]:
            self.skipping = True
            self.vm.log.add("spurious-npf", page=fault.gfn, times=fault.n)
        else:
            view[:] = FROZEN
        return True

    def _mirror(self) -> U32:
        return self.td.mirror_of(self.fault.gfn, self.fault.gfn + self.fault.n)

    def _meets_frozen(self) -> bool:
        self.vm.log.add("retry", "FROZEN_SPTE", self.fault.gfn)
        return False

    def _write_leaf(self) -> None:
        fault = self.fault
        self._mirror()[:] = np.arange(fault.pfn + 1, fault.pfn + fault.n + 1, dtype=np.uint32)

    def _clflush(self) -> None:
        """tdx_clflush_page(): the KeyID-0 lines go to memory before the page becomes the TD's."""
        fault = self.fault
        pfns = np.arange(fault.pfn, fault.pfn + fault.n, dtype=np.uint32)
        self.vm.directmap.oops_if_absent(pfns, "tdx_clflush_page()")
        self.vm.log.add("clflush", page=fault.pfn, times=fault.n)
        self.td.memory.flush(fault.pfn, fault.n)

    def _seamcall(self, row: Row) -> bool:
        """SEPT.ADD of what is missing, or PAGE.AUG: busy retries the fault, anything else is a bug."""
        fault, leaf = self.fault, CALLS[row.call]
        if leaf == Leaf.SEPT_ADD and self._has_tables():
            return True
        done = self.td.seamcall(leaf, fault.gfn, fault.n, fault.pfn)
        if not done.rax:
            return True
        if is_busy(done.rax) or (row.target == "bit_and" and done.rax & Status.OPERAND_BUSY):
            self.vm.log.add("seamcall-busy", row.call, fault.gfn)
            self._undo(leaf, done)
            return False
        self.td.bug(row.call, done.rax)

    def _has_tables(self) -> bool:
        fault, module = self.fault, self.td.module
        return all(module.has_table(level, fault.gfn, fault.gfn + fault.n).all() for level in TABLE_LEVELS)

    def _undo(self, leaf: Leaf, done: Done) -> None:
        """Write the old SPTE back over FROZEN_SPTE."""
        if leaf == Leaf.SEPT_ADD:
            self._tables(FROZEN_TABLE, ABSENT)
        else:
            self._mirror()[done.n :] = 0

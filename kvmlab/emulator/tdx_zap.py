"""Zapping private leaves: the mirror SPTE goes, then the rows of the section `zap:`, leaf by leaf or in batches.

Since v6.16 every leaf has its own BLOCK, TRACK, kick and REMOVE.  With `Vm(zap_batch=N)` a row is run for up to N
leaves before the next row is, TRACK and the kick once for all of them: the module asks for no more (one TRACK and
one kick serve every BLOCK before them).  Once a batch has left the vCPUs as it found them, those behind it that are
alike are done as one, counted as often.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..design import Row
from ..hw import tdx
from ..hw.tdx import Leaf, Status
from ..hw.tdx import tlb as tdx_tlb
from ..kvm import versions
from .events import Deadlock
from .memory import U32, prefix, runs
from .tdx_kvm import FROZEN, TdxKvm
from .tdx_module import U64, spans
from .vm_state import VmState

LEAVES = {
    "tdh_mem_range_block": Leaf.RANGE_BLOCK, "tdh_mem_track": Leaf.TRACK, "tdh_mem_page_remove": Leaf.PAGE_REMOVE,
}  # fmt: skip
PLAIN = frozenset(
    {*LEAVES, "tdh_do_no_vcpus", "kvm_make_all_cpus_request", "tdh_phymem_page_wbinvd", "tdx_clear_page"}
)  # whose effect on a batch does not hang on the batches before it
RETRIES = 1000  # of a busy SEAMCALL: in one run nobody will ever make way


class Thread(Protocol):
    """The call of KVM that zaps."""

    name: str

    def might_sleep(self, what: str) -> None:
        """See `calls.Call`."""

    def assert_mmu_lock(self, what: str) -> None:
        """See `calls.Call`."""


class Zap:
    """The zap of private leaves under mmu_lock held for write."""

    def __init__(self, vm: VmState, td: TdxKvm, thread: Thread) -> None:
        self.vm, self.td, self.thread = vm, td, thread
        self.rows = vm.rows("zap", False)
        erratum = vm.switches.partial_write_erratum
        self._clears = erratum or vm.design.version < versions.QUIRK_RESET_SINCE
        self.pfns: U32 = np.zeros(0, np.uint32)

    def range(self, lo: int, hi: int) -> bool:
        """Zap what is present of gfns [lo, hi); what is not costs no SEAMCALL (FROZEN_SPTE is none).  If any was."""
        self.thread.assert_mmu_lock("kvm_unmap_gfn_range()")
        mirror = self.td.mirror_of(lo, hi)
        found = runs((mirror != 0) & (mirror != FROZEN), 0, hi - lo)  # is_shadow_present_pte()
        for a, b in found:
            self._leaves(lo + a, lo + b)
        return bool(found)

    def _leaves(self, gfn: int, end: int) -> None:
        """Batch after batch; as one, once a batch finds and leaves the same."""
        step, log = self.vm.zap_batch, self.vm.log
        while gfn < end:
            many = self._alike(gfn, end) // step
            before, mark, counters = self._vcpus(), log.mark(), dict(log.counters)
            epoch = self.td.module.epochs.td_epoch
            self._batch(gfn, min(step, end - gfn))
            if many > 1 and self._vcpus() == before:
                self._as_one(gfn, step, many - 1, self.td.module.epochs.td_epoch - epoch)
                log.repeat(mark, None, many)
                for kind, count in list(log.counters.items()):
                    log.counters[kind] += (count - counters.get(kind, 0)) * (many - 1)
                gfn += (many - 1) * step
            gfn += step

    def _vcpus(self) -> tuple[object, ...]:
        """What of the vCPUs matters to a TRACK and a REMOVE: who is where, and how old its epoch is."""
        now = self.td.module.epochs.td_epoch
        ages = [(vcpu.mode, tdx_tlb.age(vcpu.epoch, now)) for vcpu in self.td.vcpus]
        return ages, self.td.module.epochs.refcount[now & 1], self.td.module.epochs.refcount[1 - (now & 1)]

    def _alike(self, gfn: int, end: int) -> int:
        """How many leaves from `gfn` on are in the same situation; 0 where each has to be run by itself."""
        vm, module = self.vm, self.td.module
        watched = vm.on_row or vm.on_point or vm.failures or self.td.memory.suspect
        if watched or any(row.call not in PLAIN for row in self.rows):
            return 0
        mirror, states = self.td.mirror_of(gfn, end), module.states(gfn, end)
        n = prefix(mirror == np.arange(mirror[0], int(mirror[0]) + len(mirror), dtype=np.uint32))
        n = prefix((states[:n] == states[0]) & (module.hpa[gfn : gfn + n] + 1 == mirror[:n]))
        if not n:
            return 0
        pfn = int(mirror[0]) - 1
        same = (module.pamt[pfn : pfn + n] == module.pamt[pfn]) & (vm.directmap.absent[pfn : pfn + n] == 0)
        return prefix(same)

    def _batch(self, gfn: int, n: int) -> None:
        """The rows on `n` leaves, each row on all of them before the next row."""
        mirror = self.td.mirror_of(gfn, gfn + n)
        self.pfns = mirror - np.uint32(1)
        mirror[:] = 0
        self.vm.log.add("zap", "private", gfn, n)
        for row in self.rows:
            self.vm.reached(row)
            self._row(row, gfn, n)

    def _row(self, row: Row, gfn: int, n: int) -> None:
        if row.call == "tdh_do_no_vcpus":
            self._no_vcpus(row.target or "", gfn, n)
        elif row.call in LEAVES:
            self._seamcall(row.call, gfn, n, row.target == "retry")
        elif row.call == "kvm_make_all_cpus_request":
            self.td.kick()
        elif row.call == "tdh_phymem_page_wbinvd":
            self.td.wbinvd(self.pfns)
        elif row.call == "tdx_clear_page":
            self._clear(self.pfns)
        else:
            self._directmap(row.call == "kvm_unmap_directmap")

    def _directmap(self, absent: bool) -> None:
        """set_direct_map_invalid_noflush() or set_direct_map_default_noflush(); may sleep."""
        self.thread.might_sleep("directmap update takes a mutex")
        self.vm.directmap.absent[self.pfns] = absent
        kind = "directmap-unmap" if absent else "directmap-map"
        self.vm.log.add(kind, page=int(self.pfns[0]), times=len(self.pfns))

    def _clear(self, pfns: U32) -> None:
        """MOVDIR64B of zeros through the directmap, where the kernel still does that (kvm/versions.py)."""
        if not self._clears:
            return
        self.vm.directmap.oops_if_absent(pfns, "tdx_clear_page()")
        self.vm.log.add("tdx-clear-page", page=int(pfns[0]), times=len(pfns))
        for lo, hi in spans(pfns):
            self.td.memory.clear(lo, hi - lo)

    def _seamcall(self, call: str, gfn: int, n: int, retries: bool) -> None:
        """One leaf on each page (TRACK once): what is not 0 is a bug, but for busy while the text says retry."""
        leaf, at = LEAVES[call], gfn
        for _ in range(RETRIES):
            done = self.td.seamcall(leaf, at, gfn + n - at)
            if not done.rax:
                return
            at += done.n if leaf != Leaf.TRACK else 0
            if not (retries and is_busy(done.rax)):
                self.td.bug(call, done.rax)
            self.vm.log.add("seamcall-busy", call, at)
        raise Deadlock(f"{self.thread.name} repeats {call} for ever under mmu_lock")

    def _no_vcpus(self, call: str, gfn: int, n: int) -> None:
        """tdh_do_no_vcpus(): once more if busy, with every vCPU kicked out and kept out."""
        leaf, at = LEAVES[call], gfn
        while True:
            done = self.td.seamcall(leaf, at, gfn + n - at)
            if not done.rax:
                return
            at += done.n if leaf != Leaf.TRACK else 0
            if not is_busy(done.rax):
                self.td.bug(call, done.rax)
            self.vm.log.add("seamcall-busy", call, at)
            self.td.wait_for_sept_zap = True
            self.td.kick()
            again = self.td.seamcall(leaf, at)
            if again.rax:
                self.td.bug(call, again.rax)
            self.td.wait_for_sept_zap = False
            at += 1
            if leaf == Leaf.TRACK or at >= gfn + n:
                return

    def _as_one(self, gfn: int, step: int, times: int, epochs: int) -> None:
        """What the batch at `gfn` has done, done to `times` more of them; each moved TD_EPOCH by `epochs`."""
        module, n, lo = self.td.module, step * times, gfn + step
        pfns = self.td.mirror_of(lo, lo + n) - np.uint32(1)
        first, done = int(pfns[0]), int(self.pfns[0])
        had = module.bepoch[first : first + n]
        module.states(lo, lo + n)[:] = np.tile(module.states(gfn, lo), times)
        module.pamt[first : first + n] = np.tile(module.pamt[done : done + step], times)
        blocked = any("tdh_mem_range_block" in (row.call, row.target) for row in self.rows)
        if blocked:
            later: U64 = np.repeat(np.arange(1, times + 1, dtype=np.uint64) * np.uint64(epochs), step)
            had[:] = np.tile(module.bepoch[done : done + step], times) + later
        self.td.mirror_of(lo, lo + n)[:] = 0
        module.epochs = module.epochs._replace(td_epoch=module.epochs.td_epoch + epochs * times)
        # What is left of the refcounts goes by the parity of the epoch, and nobody is inside or nothing moved.
        for row in self.rows:
            if row.call == "tdh_phymem_page_wbinvd":
                self.td.memory.wbinvd(first, n)
            elif row.call == "tdx_clear_page" and self._clears:
                self.td.memory.clear(first, n)


def is_busy(rax: int) -> bool:
    """tdx_operand_busy(): TDX_OPERAND_BUSY exactly; PREVIOUS_TLB_EPOCH_BUSY is another status."""
    return tdx.status_part(rax) == Status.OPERAND_BUSY

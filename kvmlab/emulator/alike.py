"""Requests in a row that meet the same situation: the first is run as it stands, the others as one.

A guest accepts its memory in tens of thousands of requests that differ in their address only.  Two of them are
alike if what they meet is: one memslot, one attribute, the same leaves, RMP entries in one state, and nobody else
about.  If the first then takes its plain course, so do the others; one request over all of them does the same,
but for what comes once a request, which is counted as often.  The last one is run by itself, so that the
TLBs hold what they would.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..hw.tdx import Level
from .memory import U8, U32, prefix
from .slots import MemSlot
from .tdx_kvm import TdxKvm
from .vm_state import VmState
from .vmm import Vmm

MOST = 1 << 18  # pages that are looked at and run as one
ONCE_A_REQUEST = ("psc-buffer", "exit-map-gpa-range", "set-attributes", "flush")
NOT_PLAIN = (
    "warn", "violation", "retry", "npf-rmp", "spurious-npf", "exit-memory-fault", "exit-mmio", "seamcall-busy",
)  # fmt: skip

Request = Callable[[int, int], None]  # first gfn, pages


def run(vmm: Vmm, gfn: int, end: int, step: int, request: Request) -> None:
    """`request` for each `step` pages of [gfn, end) in turn, runs of alike ones as one."""
    vm = vmm.vm
    while gfn < end:
        many = _alike(vmm, gfn, end) // step if end - gfn > 2 * step else 1
        before = _seen(vm)
        request(gfn, min(step, end - gfn))
        gfn += step
        if many > 2 and _seen(vm) == before:
            _as_one(vm, gfn, step, many - 2, request)
            gfn += (many - 2) * step
            request(gfn, step)
            gfn += step


def _seen(vm: VmState) -> list[int]:
    return [vm.log.counters[kind] for kind in NOT_PLAIN]


def _as_one(vm: VmState, gfn: int, step: int, times: int, request: Request) -> None:
    """One request over `times` of them; what comes once a request is counted `times` times."""
    log, mmu, mark = vm.log, vm.mmu, vm.log.mark()
    before = {kind: log.counters[kind] for kind in (*ONCE_A_REQUEST, "ipi")}
    seq = mmu.seq
    request(gfn, step * times)
    log.repeat(mark, ONCE_A_REQUEST, times)
    for kind, old in before.items():
        if new := log.counters[kind] - old:
            log.counters[kind] = old + new * times
    mmu.seq = seq + (mmu.seq - seq) * times


def _alike(vmm: Vmm, gfn: int, end: int) -> int:
    """How many pages from `gfn` on are in the same situation; 0 if it is no plain one."""
    vm = vmm.vm
    slot = vm.slots.find(gfn)
    if slot is None or slot.gmem is None or not _quiet(vmm, slot):
        return 0
    n = min(end, slot.end, gfn + MOST) - gfn
    attributes = vm.attributes.get(gfn, gfn + n)
    n = prefix(attributes == attributes[0])
    n = _leaves_alike(vm, gfn, vm.mmu.leaves(gfn, gfn + n))
    n = _until_a_tlb(vm, gfn, n)
    return _entries_alike(vm, slot, gfn, n) if n else 0


def _quiet(vmm: Vmm, slot: MemSlot) -> bool:
    """Nobody looks on or acts as somebody else, no failure waits, and no request depends on its neighbours."""
    vm = vmm.vm
    alone = vm.on_row is None and vm.on_point is None and not vm.threads and not vm.mmu.in_progress
    failing = vm.failures or vm.rmp.failures or vm.attributes.reserved.any()
    pinned = slot.gmem is not None and slot.gmem.pinned
    plain = vmm.discard == "none" and not vm.huge(True) and 512 % vm.zap_batch == 0
    return bool(alone and not failing and not pinned and plain)


def _leaves_alike(vm: VmState, gfn: int, leaves: U32) -> int:
    """How many gfns have no leaf, or 4K leaves of consecutive PFNs."""
    first = int(leaves[0])
    if first & 1:
        return 0
    if first:
        return prefix(leaves == np.arange(first, first + 2 * len(leaves), 2, dtype=np.uint32))
    return prefix(leaves == 0)


def _until_a_tlb(vm: VmState, gfn: int, n: int) -> int:
    """How many of `n` gfns no TLB knows: what it knows may be old, and keeps its place in the queue."""
    private = [vcpu.tlb for vcpu in vm.tdx.vcpus] if vm.tdx else []
    for tlb in (*vm.mmu.tlbs, *private):
        for key in tlb.leaves:
            lo, pages = (key, 1) if key >= 0 else (~key, 512)
            if lo < gfn + n and gfn < lo + pages:
                n = max(0, lo - gfn)
    return n


def _entries_alike(vm: VmState, slot: MemSlot, gfn: int, n: int) -> int:
    """How many pages have RMP entries in one state, for this gfn or for none; the shared side's are nobody's."""
    if vm.tdx:
        return _septs_alike(vm.tdx, gfn, n, slot.private_pfn(gfn))
    if not vm.has_rmp:
        return n
    pfn, other = slot.private_pfn(gfn), slot.shared_pfn(gfn)
    states: U8 = vm.rmp.state[pfn : pfn + n]
    n = prefix(states == states[0])
    if states[0]:
        n = prefix(vm.rmp.gfn[pfn : pfn + n] == np.arange(gfn, gfn + n, dtype=np.uint32))
    return prefix(vm.rmp.state[other : other + n] == 0) if n and other != pfn else n


def _septs_alike(td: TdxKvm, gfn: int, n: int, pfn: int) -> int:
    """How many pages have S-EPT entries, mirror leaves, tables and owners alike, each for its own PFN."""
    module, consecutive = td.module, np.arange(n, dtype=np.uint32)
    states, mirror = module.states(gfn, gfn + n), td.mirror_of(gfn, gfn + n)
    pamt, absent = module.pamt[pfn : pfn + n], td.vm.directmap.absent[pfn : pfn + n]
    same = (states == states[0]) & (pamt == pamt[0]) & (absent == 0)
    if mirror[0]:
        same &= mirror == consecutive + mirror[0]
        same &= module.hpa[gfn : gfn + n] == consecutive + (mirror[0] - np.uint32(1))
    else:
        same &= mirror == 0
    n = prefix(same)
    if not n or td.memory.suspect:
        return 0
    there = module.has_table(Level.PD, gfn, gfn + n)
    return min(n, (gfn // 512 + prefix(there == there[0])) * 512 - gfn)

"""Requests in a row that meet the same situation: the first is run as it stands, the others as one.

A guest accepts its memory in tens of thousands of requests that differ in their address only.  Two of them are
alike if what they meet is: one memslot, one attribute, the same leaves, RMP entries in one state, and nobody else
about.  If the first then takes its plain course, so do the others; one request over all of them does the same,
but for what comes once a request, which is counted as often.  The last one is run by itself, so that the
TLBs hold what they would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .memory import U8, U32, prefix

if TYPE_CHECKING:
    from .slots import MemSlot
    from .vm import Vm

MOST = 1 << 18  # pages that are looked at and run as one
ONCE_A_REQUEST = ("psc-buffer", "exit-map-gpa-range", "set-attributes", "flush")
NOT_PLAIN = ("warn", "violation", "retry", "npf-rmp", "spurious-npf", "exit-memory-fault", "exit-mmio")

Request = Callable[[int, int], None]  # first gfn, pages


def run(vm: Vm, gfn: int, end: int, step: int, request: Request) -> None:
    """`request` for each `step` pages of [gfn, end) in turn, runs of alike ones as one."""
    while gfn < end:
        many = _alike(vm, gfn, end) // step if end - gfn > 2 * step else 1
        before = _seen(vm)
        request(gfn, min(step, end - gfn))
        gfn += step
        if many > 2 and _seen(vm) == before:
            _as_one(vm, gfn, step, many - 2, request)
            gfn += (many - 2) * step
            request(gfn, step)
            gfn += step


def _seen(vm: Vm) -> list[int]:
    return [vm.log.counters[kind] for kind in NOT_PLAIN]


def _as_one(vm: Vm, gfn: int, step: int, times: int, request: Request) -> None:
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


def _alike(vm: Vm, gfn: int, end: int) -> int:
    """How many pages from `gfn` on are in the same situation; 0 if it is no plain one."""
    slot = vm.slots.find(gfn)
    if slot is None or slot.gmem is None or not _quiet(vm, slot):
        return 0
    n = min(end, slot.end, gfn + MOST) - gfn
    attributes = vm.attributes.get(gfn, gfn + n)
    n = prefix(attributes == attributes[0])
    n = _leaves_alike(vm, gfn, vm.mmu.leaves(gfn, gfn + n))
    n = _until_a_tlb(vm, gfn, n)
    return _entries_alike(vm, slot, gfn, n) if n else 0


def _quiet(vm: Vm, slot: MemSlot) -> bool:
    """Nobody looks on or acts as somebody else, no failure waits, and no request depends on its neighbours."""
    alone = vm.on_row is None and vm.on_point is None and not vm.threads and not vm.mmu.in_progress
    failing = vm.failures or vm.rmp.failures or vm.attributes.reserved.any()
    pinned = slot.gmem is not None and slot.gmem.pinned
    return bool(alone and not failing and not pinned and vm.vmm.discard == "none" and not vm.huge(True))


def _leaves_alike(vm: Vm, gfn: int, leaves: U32) -> int:
    """How many gfns have no leaf, or 4K leaves of consecutive PFNs."""
    first = int(leaves[0])
    if first & 1:
        return 0
    if first:
        return prefix(leaves == np.arange(first, first + 2 * len(leaves), 2, dtype=np.uint32))
    return prefix(leaves == 0)


def _until_a_tlb(vm: Vm, gfn: int, n: int) -> int:
    """How many of `n` gfns no TLB knows: what it knows may be old, and keeps its place in the queue."""
    for tlb in vm.mmu.tlbs:
        for key in tlb.leaves:
            lo, pages = (key, 1) if key >= 0 else (~key, 512)
            if lo < gfn + n and gfn < lo + pages:
                n = max(0, lo - gfn)
    return n


def _entries_alike(vm: Vm, slot: MemSlot, gfn: int, n: int) -> int:
    """How many pages have RMP entries in one state, for this gfn or for none; the shared side's are nobody's."""
    if not vm.has_rmp:
        return n
    pfn, other = slot.private_pfn(gfn), slot.shared_pfn(gfn)
    states: U8 = vm.rmp.state[pfn : pfn + n]
    n = prefix(states == states[0])
    if states[0]:
        n = prefix(vm.rmp.gfn[pfn : pfn + n] == np.arange(gfn, gfn + n, dtype=np.uint32))
    return prefix(vm.rmp.state[other : other + n] == 0) if n and other != pfn else n

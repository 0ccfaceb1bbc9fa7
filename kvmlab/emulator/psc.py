"""Page state change requests, by MSR and by buffer (GHCB specification; snp_begin_psc*() in KVM's sev.c).

A buffer is an array of uint64 entries as the GHCB has them: cur_page in bits 0-11, gfn in 12-51, operation in
52-55, page size in bit 56.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .vmm import Vmm

U64 = NDArray[np.uint64]
MSR_REQUEST, MSR_RESPONSE = 0x014, 0x015
PRIVATE, SHARED, SMASH, UNSMASH = 1, 2, 3, 4
MAX_ENTRIES = 253
BAD_HEADER, BAD_ENTRY, GENERIC = 1 << 32 | 1, 1 << 32 | 2, 0x100 << 32
MSR_ERROR = 1  # KVM's own value is not in the facts read; any non-zero one is an error to the guest


def entries(gfn: int, count: int, private: bool, large: bool) -> U64:
    """`count` entries for consecutive pages of one size."""
    op = PRIVATE if private else SHARED
    gfns = np.arange(count, dtype=np.uint64) * np.uint64(512 if large else 1) + np.uint64(gfn)
    return (gfns << np.uint64(12)) | np.uint64(op << 52 | int(large) << 56)


def plan(gfn: int, end: int, large: bool) -> Iterator[tuple[int, int, bool]]:
    """How a Linux guest cuts [gfn, end): 2M entries where aligned (if `large`), else 4K: (gfn, count, large)."""
    head = min(end, gfn + -gfn % 512) if large else end
    tail = max(head, end - end % 512) if large else end
    for lo, hi, big in ((gfn, head, False), (head, tail, True), (tail, end, False)):
        if lo < hi:
            yield lo, (hi - lo) // (512 if big else 1), big


def msr_protocol(vmm: Vmm, request: int) -> int:
    """The MSR form: one 4K page; the response, with an error in bits 63:32."""
    vmm.vm.log.add("psc-msr", page=request >> 12 & (1 << 40) - 1)
    op = request >> 52 & 0xF
    failed = request & 0xFFF != MSR_REQUEST or op not in (PRIVATE, SHARED) or not vmm.vm.hypercall_exits
    if not failed:
        failed = vmm.map_gpa_range((request >> 12 & (1 << 40) - 1) << 12, 1, op == PRIVATE) != 0
    return MSR_RESPONSE | (MSR_ERROR << 32 if failed else 0)


def request(vmm: Vmm, gfn: int, npages: int, private: bool) -> int:
    """What a buffer of fresh entries for consecutive pages of one size comes to: one exit; SW_EXITINFO2."""
    vmm.vm.log.add("psc-buffer")
    if not vmm.vm.hypercall_exits or vmm.map_gpa_range(gfn << 12, npages, private):
        return GENERIC
    return 0


def buffer_protocol(vmm: Vmm, cur_entry: int, end_entry: int, buffer: U64) -> int:
    """The buffer form: SW_EXITINFO2, 0 for success; cur_page of done entries is moved on in `buffer`.

    Adjacent entries of the same operation and size make one exit to userspace; a partly done 2M entry goes on
    as 4K; other operations count as done.
    """
    if cur_entry <= end_entry < MAX_ENTRIES and end_entry >= len(buffer):
        raise InputError(f"Guest.psc_buffer(end_entry={end_entry}): the buffer has {len(buffer)} entries")
    vmm.vm.log.add("psc-buffer", times=1)
    if not vmm.vm.hypercall_exits:
        return GENERIC
    if end_entry >= MAX_ENTRIES:
        return BAD_HEADER
    if cur_entry > end_entry:
        return 0
    part = buffer[cur_entry : end_entry + 1]
    cur = (part & np.uint64(0xFFF)).astype(np.int64)
    gfns = ((part >> np.uint64(12)) & np.uint64((1 << 40) - 1)).astype(np.int64)
    ops = ((part >> np.uint64(52)) & np.uint64(0xF)).astype(np.int64)
    large = ((part >> np.uint64(56)) & np.uint64(1)).astype(np.int64)
    pages = np.where(large, 512, 1)
    bad = (cur > pages) | ((large == 1) & (gfns % 512 != 0))
    stop = int(bad.argmax()) if bad.any() else len(part)
    for lo, hi in _merged(cur[:stop], gfns[:stop], ops[:stop], pages[:stop]):
        start = int(gfns[lo] + cur[lo])
        npages = int(gfns[hi - 1] + pages[hi - 1]) - start
        if vmm.map_gpa_range(start << 12, npages, int(ops[lo]) == PRIVATE):
            return GENERIC
        part[lo:hi] = (part[lo:hi] & ~np.uint64(0xFFF)) | pages[lo:hi].astype(np.uint64)
    return BAD_ENTRY if stop < len(part) else 0


def _merged(
    cur: NDArray[np.int64], gfns: NDArray[np.int64], ops: NDArray[np.int64], pages: NDArray[np.int64]
) -> Iterator[tuple[int, int]]:
    """Ranges of entries that make one exit each; entries done already, or with nothing to do, make none."""
    todo = (cur < pages) & ((ops == PRIVATE) | (ops == SHARED))
    size = np.where(cur > 0, 1, pages)  # what is left of a partly done 2M entry is 4K
    joins = np.zeros(len(cur), bool)
    joins[1:] = (
        todo[1:] & todo[:-1] & (ops[1:] == ops[:-1]) & (size[1:] == size[:-1])
        & (cur[1:] == 0) & (gfns[1:] == gfns[:-1] + pages[:-1])
    )  # fmt: skip
    starts = np.flatnonzero(todo & ~joins)
    for start in starts.tolist():
        end = start + 1
        rest = np.flatnonzero(~joins[end:])
        end = end + int(rest[0]) if len(rest) else len(cur)
        yield start, end

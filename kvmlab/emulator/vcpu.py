"""One vCPU: its loads, stores, instructions and requests, through the guest's own page table.

The table has one bit a gfn: 1 for private, which is the C-bit, and the SHARED bit turned round.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from ..errors import InputError, shown
from ..hw import snp
from ..hw.snp import PG_2M, PG_4K, Pvalidate, Rmpupdate
from ..hw.snp import pages as snp_pages
from . import psc, tdx_guest
from .arguments import (
    ADDRESS,
    BUFFER,
    BYTE,
    BYTES,
    DATA,
    FLAG,
    PAGE_ADDRESS,
    PAGES,
    REGISTER,
    one_of,
    takes,
    whole,
)  # fmt: skip
from .events import GpFault, InstructionError, MmioExit, VmError
from .memory import LIMIT, PAGE, pagewise
from .psc import U64
from .tdx_kvm import TdxKvm
from .tdx_walk import TdWalker
from .vm_state import VmState
from .vmm import Vmm
from .walk import Walker

SIZES = {4096: PG_4K, 1 << 21: PG_2M}
SIZE = one_of(*SIZES)
ENTRY = whole(0, 0xFFFF, "what 16 bits of a buffer's header hold")
OPS = one_of("read", "write")


class Vcpu:
    """vCPU `index` of the VM that `vmm` runs.  All vCPUs see the same C-bits."""

    def __init__(self, vmm: Vmm, index: int, vmpl: int = 0) -> None:
        self.vmm, self.vm, self.index, self.vmpl = vmm, vmm.vm, index, vmpl

    @takes(gpa=ADDRESS, n=BYTES)
    def read(self, gpa: int, n: int) -> bytes:
        """Load `n` bytes.  VcFault, GuestSpins, and the exits that the VMM does not resolve."""
        out = bytearray(n)
        try:
            for gfn, pfn, enc in self._pages(gpa, n, "read"):
                for at, step in _overlap(gfn, gpa, n):
                    out[at - gpa : at - gpa + step] = load(self.vm, pfn, at % PAGE, step, enc)
        except MmioExit:
            if self.vm.mmio is None:
                raise
            return (self.vm.mmio & (1 << 8 * n) - 1).to_bytes(n, "little")
        return bytes(out)

    @takes(gpa=ADDRESS, data=DATA)
    def write(self, gpa: int, data: bytes) -> None:
        """Store bytes; errors as for `read`."""
        for gfn, pfn, enc in self._pages(gpa, len(data), "write"):
            for at, step in _overlap(gfn, gpa, len(data)):
                store(self.vm, pfn, at % PAGE, data[at - gpa : at - gpa + step], enc)

    @takes(gpa=ADDRESS, n=BYTES, byte=BYTE)
    def fill(self, gpa: int, n: int, byte: int) -> None:
        """memset()."""
        self.write(gpa, bytes([byte]) * n)

    @takes(gpa=ADDRESS, n=whole(0, LIMIT * PAGE, "bytes, from 0 to 4 TiB"), op=OPS)
    def touch(self, gpa: int, n: int, op: str = "write") -> None:
        """Access each page without moving bytes: what faults, faults.  For sizes where contents do not matter."""
        for _ in self._runs(gpa // PAGE, (gpa + n + PAGE - 1) // PAGE, op):
            pass

    def _runs(self, gfn: int, end: int, op: str) -> Iterator[tuple[int, list[int], bool]]:
        for lo, hi, enc in self._by_c_bit(gfn, end):
            walker, at = self._walker(op, enc), lo
            while at < hi:
                pfns, _ = walker.run(at, hi)
                yield at, pfns.tolist(), enc
                at += len(pfns)

    def _walker(self, op: str, enc: bool) -> Walker | TdWalker:
        if self.vm.tdx:
            return TdWalker(self.vmm, self.vm.tdx, self.index, op, enc)
        return Walker(self.vmm, self.index, op, enc, self.vmpl)

    def _pages(self, gpa: int, n: int, op: str) -> Iterator[tuple[int, int, bool]]:
        for gfn, pfns, enc in self._runs(gpa // PAGE, (gpa + n + PAGE - 1) // PAGE, op):
            for i, pfn in enumerate(pfns):
                yield gfn + i, pfn, enc

    def _by_c_bit(self, lo: int, hi: int) -> Iterator[tuple[int, int, bool]]:
        bits = self.vm.page_table.c_bits(lo, hi)
        if lo >= hi:
            return
        if (bits == bits[0]).all():
            yield lo, hi, bool(bits[0])
            return
        edges = [0, *(int(i) + 1 for i in np.flatnonzero(np.diff(bits.astype(np.int8)))), len(bits)]
        for a, b in pairwise(edges):
            yield lo + a, lo + b, bool(bits[a])

    @takes(gpa=PAGE_ADDRESS, private=FLAG, size=PAGES)
    def set_private(self, gpa: int, private: bool, size: int = PAGE) -> None:
        """Set or clear the C-bit in the guest's page table, and nothing else."""
        self.vm.page_table.set(gpa // PAGE, (gpa + size) // PAGE, private)

    @takes(cur_entry=ENTRY, end_entry=ENTRY, buffer=BUFFER)
    def psc_buffer(self, cur_entry: int, end_entry: int, buffer: U64) -> int:
        """One PSC buffer as it is; returns SW_EXITINFO2."""
        self._snp("a page state change")
        return psc.buffer_protocol(self.vmm, cur_entry, end_entry, buffer)

    @takes(request=REGISTER)
    def psc_msr(self, request: int) -> int:
        """One request by the GHCB MSR; returns the response."""
        self._snp("a page state change")
        return psc.msr_protocol(self.vmm, request)

    @takes(gpa=REGISTER, size=whole(0, 1 << 64, "pages, in bytes: a multiple of 4096", PAGE), private=FLAG)
    def map_gpa_range(self, gpa: int, size: int, private: bool) -> int:
        """KVM_HC_MAP_GPA_RANGE itself, as a guest of a software-protected VM asks; hypercall.ret, 0 or an errno."""
        return self.vmm.map_gpa_range(gpa, size // PAGE, private)

    @takes(gpa=PAGE_ADDRESS, validate=FLAG, size=SIZE)
    def pvalidate(self, gpa: int, validate: bool, size: int = PAGE) -> None:
        """PVALIDATE of one page (4096 or 2 MiB); InstructionError with rAX, or 255 for the carry flag."""
        self.pvalidate_range(gpa, size, validate, size)

    @takes(gpa=PAGE_ADDRESS, length=PAGES, validate=FLAG, size=SIZE)
    def pvalidate_range(self, gpa: int, length: int, validate: bool, size: int = PAGE) -> None:
        """PVALIDATE page after page of one size, of which `length` is a multiple; stops at the first that fails."""
        self._snp("PVALIDATE")
        if length % size:
            raise InputError(f"Guest.pvalidate_range(length={shown(length)}): a multiple of the size, {size}")
        if self.vmpl:
            raise GpFault("#GP: PVALIDATE at another VMPL than 0")
        asked, gfn, end = SIZES[size], gpa // PAGE, (gpa + length) // PAGE
        if asked == PG_2M and gfn % 512:
            self._answer("PVALIDATE", gfn, Pvalidate.FAIL_INPUT)
        walker = Walker(self.vmm, self.index, "pvalidate", True, validate=validate)
        while gfn < end:
            gfn = self._pvalidate(walker, gfn, end, validate, asked)

    def _pvalidate(self, walker: Walker, gfn: int, end: int, validate: bool, asked: str) -> int:
        """One run of PVALIDATE: pages alike, mapped to consecutive PFNs; the gfn to go on from."""
        step = 512 if asked == PG_2M else 1
        pfns, big = walker.run(gfn, end if step == 1 else gfn + 1)
        n = step
        if step == 1:
            alike = np.ones(len(pfns), bool)
            alike[1:] = (np.diff(pfns.astype(np.int64)) == 1) & (big[1:] == big[:-1])
            n = int(np.argmin(alike)) or len(pfns) if not alike.all() else len(pfns)
        done, answer = self.vm.rmp.pvalidate(int(pfns[0]), n, gfn, validate, asked, bool(big[0]))
        if done:
            self.vm.log.add("pvalidate", f"{int(validate)} {asked}", gfn, done // step, 0)
        if answer in (snp.NPF_RMP, snp_pages.SIZEM):
            walker.fault(gfn + done, 1, present=True, rmp=True, sizem=answer == snp_pages.SIZEM)
        elif isinstance(answer, Pvalidate) and answer != Pvalidate.OK:
            self._answer("PVALIDATE", gfn + done, answer)
        return gfn + done

    @takes(gpa=PAGE_ADDRESS, target_vmpl=BYTE, mask=BYTE, vmsa=FLAG)
    def rmpadjust(self, gpa: int, target_vmpl: int, mask: int, *, vmsa: bool = False) -> None:
        """RMPADJUST of one 4K page; InstructionError for a failure code, VcFault if it is not validated."""
        self._snp("RMPADJUST")
        walker, gfn = Walker(self.vmm, self.index, "read", True, self.vmpl), gpa // PAGE
        while True:
            pfn = int(walker.run(gfn, gfn + 1)[0][0])
            held = self.vm.rmp.permissions.get(pfn, snp_pages.AFTER_RMPUPDATE)
            code, entry, after = snp_pages.rmpadjust(
                self.vm.rmp.entry(pfn), held, own=self.vmpl, target=target_vmpl, mask=mask, vmsa=vmsa
            )
            if not isinstance(code, str):
                break
            walker.fault(gfn, 1, present=True, rmp=True, sizem=code == snp_pages.SIZEM)
        self.vm.log.add("rmpadjust", page=gpa // PAGE, code=int(code))
        if code != Rmpupdate.OK:
            raise InstructionError("RMPADJUST", gpa, int(code), code.name)
        self.vm.rmp.put(pfn, entry)
        self.vm.rmp.permissions[pfn] = after

    @takes(gpa=REGISTER, size=one_of(*tdx_guest.SIZES))
    def accept(self, gpa: int, size: int = PAGE) -> None:
        """TDG.MEM.PAGE.ACCEPT of one page (4096, 2 MiB or 1 GiB); TdxError with RAX unless that is 0."""
        tdx_guest.accept(self.vmm, self._tdx("ACCEPT"), self.index, gpa, size)

    @takes(gpa=PAGE_ADDRESS, length=PAGES)
    def accept_range(self, gpa: int, length: int) -> None:
        """ACCEPT 4K page after page; stops at the first that fails."""
        td = self._tdx("ACCEPT")
        tdx_guest.accept_4k(self.vmm, td, self.index, gpa // PAGE, (gpa + length) // PAGE)

    @takes(r12=REGISTER, r13=REGISTER)
    def map_gpa(self, r12: int, r13: int) -> tdx_guest.MapGpa:
        """TDG.VP.VMCALL<MapGPA> itself: start (with the SHARED bit, 47, to go shared) and size; R10 and R11."""
        return tdx_guest.map_gpa(self.vmm, self._tdx("MapGPA"), self.index, r12, r13)

    def _answer(self, name: str, gfn: int, code: Pvalidate) -> None:
        self.vm.log.add("pvalidate", code.name, gfn, 1, int(code))
        raise InstructionError(name, gfn * PAGE, int(code), code.name)

    def _tdx(self, what: str) -> TdxKvm:
        if self.vm.tdx is None:
            raise VmError(f"{what} needs platform tdx, not {self.vm.platform}")
        return self.vm.tdx

    def _snp(self, what: str) -> None:
        if not self.vm.has_rmp:
            raise VmError(f"{what} needs platform snp, not {self.vm.platform}")


def _overlap(gfn: int, gpa: int, n: int) -> Iterator[tuple[int, int]]:
    """The part of [gpa, gpa + n) that lies in one page."""
    start, end = max(gpa, gfn * PAGE), min(gpa + n, (gfn + 1) * PAGE)
    return pagewise(start, end - start)


def load(vm: VmState, pfn: int, offset: int, n: int, enc: bool) -> bytes:
    """Bytes of one page as the guest reads them, with its key or without."""
    if vm.tdx:
        return vm.tdx.memory.read(pfn, offset, n, vm.tdx.memory.hkid if enc else 0, "TD")
    return vm.memory.read(pfn, offset, n, vm.key if enc and vm.encrypts else 0)


def store(vm: VmState, pfn: int, offset: int, data: bytes, enc: bool) -> None:
    """Bytes of one page as the guest writes them."""
    if vm.tdx:
        vm.tdx.memory.write(pfn, offset, data, vm.tdx.memory.hkid if enc else 0, "TD")
    else:
        vm.memory.write(pfn, offset, data, vm.key if enc and vm.encrypts else 0)

"""KVM's and the host kernel's SNP side: RMPUPDATE in ranges, the directmap, PSMASH, zeroing new pages.

From arch/x86/kvm/svm/sev.c and arch/x86/virt/svm/sev.c.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..design import Row
from ..hw.snp import PG_2M, PG_4K, Rmpupdate
from ..hw.snp.pages import PAGES_2M
from .events import KernelBug, PlatformError
from .memory import U8, U32, grown, runs, without

if TYPE_CHECKING:
    from .calls import Call
    from .locks import Thread
    from .vm import Vm


class DirectMap:
    """The kernel's directmap: which 2M regions are split (for good), which PFNs are absent."""

    def __init__(self) -> None:
        self.split: U8 = np.zeros(0, np.uint8)
        self.absent: U8 = np.zeros(0, np.uint8)

    def grow(self, pfns: int) -> None:
        """Map PFNs below `pfns`, in 2M entries."""
        self.split = grown(self.split, pfns // PAGES_2M + 1)
        self.absent = grown(self.absent, pfns)

    def split_to_4k(self, pfn: int, n: int) -> int:
        """Split what maps these pages large; how many 2M entries that were."""
        view = self.split[pfn // PAGES_2M : (pfn + n - 1) // PAGES_2M + 1]
        count = len(view) - int(np.count_nonzero(view))
        view[:] = 1
        return count

    def oops_if_absent(self, pfns: U32, what: str) -> None:
        """The kernel works on pages through its directmap; KernelBug where one is not there."""
        absent = self.absent[pfns]
        if absent.any():
            pfn = int(pfns[int(absent.argmax())])
            raise KernelBug(f"oops: {what} of PFN {pfn:#x}, which is not in the directmap")


def of_one_op(row: Row, other: Row) -> bool:
    """Whether two rows are parts of one call of the series' op, which does all its work on a page, then the next."""
    return (row.line, row.origin, row.text) == (other.line, other.origin, other.text)


@dataclass
class Shared:
    """The PFN ranges that an RMPUPDATE row has made shared: in the same op no others are mapped again."""

    row: Row
    pages: list[tuple[int, int]] = field(default_factory=list)

    def or_all(self, row: Row, pfn: int, end: int) -> list[tuple[int, int]]:
        """What a row that maps works on: these if it is of the same op, else [pfn, end)."""
        return self.pages if of_one_op(row, self.row) else [(pfn, end)]


class Sev:
    """What touches the RMP and the directmap, for one VM."""

    def __init__(self, vm: Vm) -> None:
        self.vm, self.rmp, self.directmap, self.log = vm, vm.rmp, vm.directmap, vm.log

    def adjust_direct_map(self, thread: Thread | Call, pfn: int, n: int) -> None:
        """Split the directmap under these pages to 4K, as v6.11 does; may sleep."""
        thread.might_sleep("set_memory_4k() takes a mutex")
        self._split(pfn, n)

    def unmap_directmap(self, thread: Thread | Call, pfn: int, n: int) -> None:
        """set_direct_map_invalid_noflush() page by page, as in the series; may sleep."""
        thread.might_sleep("directmap update takes a mutex")
        self._split(pfn, n)
        self.directmap.absent[pfn : pfn + n] = 1
        self.log.add("directmap-unmap", page=pfn, times=n)

    def map_directmap(self, thread: Thread | Call, pfn: int, n: int) -> None:
        """set_direct_map_default_noflush() page by page; never merges; may sleep.

        Nor does it split: what is present in a large entry keeps its attributes (__should_split_large_page()).
        """
        thread.might_sleep("directmap update takes a mutex")
        if n:
            self.directmap.absent[pfn : pfn + n] = 0
            self.log.add("directmap-map", page=pfn, times=n)

    def _split(self, pfn: int, n: int) -> None:
        if n and (count := self.directmap.split_to_4k(pfn, n)):
            self.log.add("directmap-split", page=pfn, times=count)

    def make_private(self, pfn: int, n: int, gfn: int, size: str = PG_4K) -> tuple[int, Rmpupdate]:
        """rmp_make_private(): how many pages were done, and the last code."""
        return self._update(pfn, n, gfn, gfn, size)

    def make_shared(
        self, pfn: int, n: int, gfn: int | None, *, splits: bool = True, large: bool = True
    ) -> tuple[int, Rmpupdate]:
        """rmp_make_shared(): how many pages were done, and the last code; `gfn` None: unmapped.

        A 2M entry that is not covered whole, or not to go by 2M (`large`), is PSMASHed first, if it `splits`; else a
        4K RMPUPDATE meets it.
        """
        done = 0
        for lo, hi in self.by_size(pfn, n):
            size = PG_2M if bool(self.rmp.big(lo)[0]) else PG_4K
            if size == PG_2M and (lo % PAGES_2M or hi - lo < PAGES_2M or not large):
                if splits:
                    self.psmash(lo)
                size = PG_4K
            count, code = self._update(lo, hi - lo, None, None if gfn is None else gfn + lo - pfn, size)
            done += count
            if code != Rmpupdate.OK:
                return done, code
        return done, Rmpupdate.OK

    def by_size(self, pfn: int, n: int) -> list[tuple[int, int]]:
        """Cut a range where 2M entries begin and end, each 2M entry apart."""
        big = self.rmp.big(pfn, n)
        if not big.any():
            return [(pfn, pfn + n)]
        cuts = {pfn, pfn + n, *(int(at) + pfn for at in np.flatnonzero(np.diff(big.astype(np.int8))) + 1)}
        for lo, hi in runs(big, 0, n):
            cuts |= set(range(pfn + lo + -(pfn + lo) % PAGES_2M, pfn + hi, PAGES_2M))
        edges = sorted(cuts)
        return list(pairwise(edges))

    def _update(
        self, pfn: int, n: int, gfn: int | None, where: int | None, size: str
    ) -> tuple[int, Rmpupdate]:
        done, code = self.rmp.update(pfn, n, gfn, size)
        step = PAGES_2M if size == PG_2M else 1
        towards = "shared" if gfn is None else "private"
        if done:
            self.log.add("rmpupdate", f"{towards} {size}", pfn, done // step, int(Rmpupdate.OK))
            if self.vm.switches.rmpupdate_flushes and where is not None:
                self.vm.mmu.drop_pages(where, where + done)
        if code == Rmpupdate.FAIL_OVERLAP and self.vm.merged:
            raise PlatformError(
                f"rmpupdate() repeats for ever: PFN {pfn + done:#x} = FAIL_OVERLAP", int(code)
            )
        if code != Rmpupdate.OK:
            self.log.add("rmpupdate", f"{towards} {size} = {code.name}", pfn + done, 1, int(code))
        return done, code

    def psmash(self, pfn: int) -> Rmpupdate:
        """snp_rmptable_psmash() of the 2M entry that covers a PFN."""
        head = pfn - pfn % PAGES_2M
        code = self.rmp.psmash(head)
        self.log.add("psmash", code.name, head, 1, int(code))
        return code

    def clear_highpage(self, pfn: int, n: int) -> None:
        """Zero new pages through the directmap: KernelBug where it has none, RmpFault where the RMP forbids it.

        Pages that were leaked are let be: the kernel would take others.
        """
        for lo, hi in without(pfn, pfn + n, self.vm.leaked):
            if self.directmap.absent[lo:hi].any():
                self.directmap.oops_if_absent(np.arange(lo, hi, dtype=np.uint32), "clear_highpage()")
            if self.vm.has_rmp and (wrong := self._not_writable(lo, hi - lo)) is not None:
                self.vm.host.may_write(wrong)
            self.vm.memory.zero(lo, hi - lo)

    def _not_writable(self, pfn: int, n: int) -> int | None:
        """The first PFN of `n` at which the RMP may stop a kernel store: assigned, or mapped with such a page."""
        head = pfn - pfn % PAGES_2M
        assigned = self.rmp.assigned(head, pfn + n + -(pfn + n) % PAGES_2M - head)
        if not assigned.any():
            return None
        regions: NDArray[np.bool_] = np.any(assigned.reshape(-1, PAGES_2M), axis=1)
        whole = self.directmap.split[head // PAGES_2M :][: len(regions)] == 0
        suspect = (assigned | np.repeat(regions & whole, PAGES_2M))[pfn - head :][:n]
        return pfn + int(suspect.argmax()) if suspect.any() else None

"""The host under one VM: its physical pages, what is known of each, and the script that looks on.

Whoever in the host stores to a page does it here, for here is what may forbid it: the directmap and the RMP.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..design import Row
from ..hw import snp
from ..hw.snp import PG_2M, PG_4K
from ..hw.snp.pages import PAGES_2M
from .caches import CachedMemory
from .events import KernelBug, Log, RmpFault, VmErrno
from .memory import HOST_PAGES, U8, U32, PhysicalMemory, grown, without
from .rmp import Rmp
from .switches import VmSwitches


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


class HostPages:
    """Bytes, RMP entries and directmap by PFN; the log, injected failures, and the hooks of a script."""

    def __init__(self, platform: str, switches: VmSwitches, keep_events: int, caches: bool) -> None:
        self.platform, self.switches, self.log = platform, switches, Log(keep_events)
        self.has_rmp, self.encrypts = platform == "snp", platform in ("snp", "sev", "tdx")
        self.memory: PhysicalMemory = CachedMemory() if caches else PhysicalMemory()
        self.rmp = Rmp(switches.identical_keeps_validated, switches.head_4k_over_2m)
        self.directmap = DirectMap()
        self.by_pfn: list[Callable[[int], None]] = [self.rmp.grow, self.directmap.grow]
        self.next_pfn = 512  # the first 2M are the kernel's
        self.leaked: set[int] = set()
        self.failures: dict[str, int] = {}
        self.on_row: Callable[[Row], None] | None = None
        self.on_point: Callable[[str], None] | None = None

    def new_pfns(self, n: int) -> int:
        """The first of `n` new consecutive PFNs, 2M aligned; what is left of the last 2M is the kernel's."""
        base = self.next_pfn
        if base + n > HOST_PAGES:
            raise VmErrno(errno.ENOMEM, f"{n:#x} pages more: the emulated host has 512 GiB")
        self.next_pfn += n + -n % 512
        for grow in self.by_pfn:
            grow(self.next_pfn)
        return base

    # The script.

    def reached(self, row: Row) -> None:
        """Let a script look, or act as somebody else, before a row runs (`vm.on_row`); not while it acts."""
        if self.on_row is not None:
            call, self.on_row = self.on_row, None
            try:
                call(row)
            finally:
                self.on_row = call

    def at_point(self, name: str) -> None:
        """As `reached`, before a call of KVM's that no row spells (`vm.on_point`): its name is all that is told."""
        if self.on_point is not None:
            call, self.on_point = self.on_point, None
            try:
                call(name)
            finally:
                self.on_point = call

    def take_failure(self, what: str) -> int | None:
        """The injected failure of that name, once."""
        return self.failures.pop(what, None)

    # Stores of the host.

    def user_write(self, pfn: int, offset: int, data: bytes, *, large: bool) -> None:
        """A store of the VMM to a page that it has mapped, by a 2M entry if `large`."""
        if self.has_rmp and self._check(pfn, large) != snp.OK:
            self.log.add("host-rmp-fault", "user", pfn)
            raise RmpFault(pfn, "from user mode (SIGBUS in older patches)", 1 << 31 | 7)
        self.memory.write(pfn, offset, data)

    def may_write(self, pfn: int) -> None:
        """The check of a kernel store through the directmap; RmpFault or KernelBug."""
        if self.directmap.absent[pfn]:
            raise KernelBug(f"oops: PFN {pfn:#x} is not present in the directmap")
        large = not self.directmap.split[pfn // PAGES_2M]
        if self.has_rmp and self._check(pfn, large) != snp.OK:
            self.log.add("host-rmp-fault", "kernel", pfn)
            where = "its 2M entry covers an assigned page" if large else "the page is assigned"
            raise RmpFault(pfn, f"{where}; snp_dump_hva_rmpentry(), then the oops")

    def clear_highpage(self, pfn: int, n: int) -> None:
        """Zero new pages through the directmap: KernelBug where it has none, RmpFault where the RMP forbids it.

        Pages that were leaked are let be: the kernel would take others.
        """
        for lo, hi in without(pfn, pfn + n, self.leaked):
            if self.directmap.absent[lo:hi].any():
                self.directmap.oops_if_absent(np.arange(lo, hi, dtype=np.uint32), "clear_highpage()")
            if self.has_rmp and (wrong := self._not_writable(lo, hi - lo)) is not None:
                self.may_write(wrong)
            self.memory.zero(lo, hi - lo)

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

    def _check(self, pfn: int, large: bool) -> str:
        return snp.host_access(
            "write",
            mapping=PG_2M if large else PG_4K,
            page=self.rmp.entry(pfn),
            region_assigned=large and self.rmp.region_assigned(pfn),
        )

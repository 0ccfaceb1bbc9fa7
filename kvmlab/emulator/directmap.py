"""The kernel's directmap at real size."""

from __future__ import annotations

import numpy as np

from ..hw.snp.pages import PAGES_2M
from .events import KernelBug
from .memory import U8, U32, grown


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

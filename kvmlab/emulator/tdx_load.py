"""Zapping private leaves one by one, as v6.19 does, or in batches, as the module would allow: counts side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ..design import Design
from .costs import TdxCost, estimate_tdx
from .memory import PAGE
from .vm import Vm

SHOWN = (
    "TDH.MEM.RANGE.BLOCK", "TDH.MEM.TRACK", "kick", "kick-ipi", "TDH.MEM.PAGE.REMOVE", "TDH.PHYMEM.PAGE.WBINVD",
)  # fmt: skip


class Batching(NamedTuple):
    """The events of one conversion by batch size, and their cost (`TdxCost` says what is known of it)."""

    pages: int
    counts: dict[int, dict[str, int]]
    cost: dict[int, TdxCost]

    def text(self) -> str:
        """One line a batch size; seconds between teardown's and leaf by leaf, which alone is published."""
        heads = ["batch", *(name.removeprefix("TDH.") for name in SHOWN), "seconds"]
        rows = [heads]
        for batch, counts in self.counts.items():
            cost = self.cost[batch]
            most = f"{cost.removal_seconds:.3g}"
            seconds = most if batch == 1 else f"{cost.teardown_seconds:.3g} .. {most}"
            rows.append([str(batch), *(f"{counts.get(name, 0):,}" for name in SHOWN), seconds])
        widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([f"{self.pages:,} pages from private to shared", *lines])


def batching(
    pages: int = (64 << 20) // PAGE, batches: Sequence[int] = (1, 8, 64, 512), *,
    design: Design | str = "upstream", vcpus: int = 4,
) -> Batching:  # fmt: skip
    """Share a buffer that a TD has accepted (64 MiB unless said otherwise), once for each batch size."""
    counts: dict[int, dict[str, int]] = {}
    cost: dict[int, TdxCost] = {}
    for batch in batches:
        vm = Vm("tdx", pages, design, private=True, vcpus=vcpus, zap_batch=batch)
        vm.guest().accept_range(0, pages * PAGE)
        before = Counter(vm.counters)
        vm.guest().set_memory_decrypted(0, pages * PAGE)
        counts[batch] = dict(Counter(vm.counters) - before)
        cost[batch] = estimate_tdx(counts[batch], vcpus)
    return Batching(pages, counts, cost)

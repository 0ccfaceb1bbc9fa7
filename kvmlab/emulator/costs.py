"""What the counted operations cost, from published figures only; what nobody has published is "unknown"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# Michael Roth, in the thread of RFC v8 02/56: about 1 us an RMPUPDATE on average, about 5 s for 16 GB in 4K steps.
RMPUPDATE_SECONDS = 1e-6
# Kernel list, December 2020, AMD without SNP: a VMRUN/exit loop, and a whole KVM_RUN ioctl.
VMEXIT_CYCLES, KVM_RUN_CYCLES = 1344, 2528
EXITS = ("npf", "npf-rmp", "psc-msr", "psc-buffer")
TO_USERSPACE = ("exit-memory-fault", "exit-mmio", "exit-map-gpa-range")
UNKNOWN = ("psmash", "pvalidate", "rmpadjust", "ipi", "directmap-split", "directmap-unmap", "directmap-map",
           "zap", "clflush", "gmem-alloc", "gmem-free", "user-alloc", "user-free")  # fmt: skip


class Cost(NamedTuple):
    """Lower bounds: seconds of RMPUPDATE, cycles of exits, and the counts whose cost nobody has published."""

    rmpupdate_seconds: float
    exit_cycles: int
    unknown: dict[str, int]


def estimate(counters: Mapping[str, int]) -> Cost:
    """The cost of a run, from its counters."""
    to_user = sum(counters.get(name, 0) for name in TO_USERSPACE)
    exits = sum(counters.get(name, 0) for name in EXITS)
    return Cost(
        counters.get("rmpupdate", 0) * RMPUPDATE_SECONDS,
        exits * VMEXIT_CYCLES + to_user * KVM_RUN_CYCLES,
        {name: counters[name] for name in UNKNOWN if counters.get(name)},
    )

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

    def text(self) -> str:
        """One line, with the figures it rests on."""
        unknown = ", ".join(f"{n} {name}" for name, n in self.unknown.items())
        return (
            f"RMPUPDATE about {self.rmpupdate_seconds:.3g} s (1 us each); exits at least {self.exit_cycles:,} "
            f"cycles; cost not published: {unknown}"
        )


def estimate(counters: Mapping[str, int]) -> Cost:
    """The cost of a run, from its counters."""
    to_user = sum(counters.get(name, 0) for name in TO_USERSPACE)
    exits = sum(counters.get(name, 0) for name in EXITS)
    return Cost(
        counters.get("rmpupdate", 0) * RMPUPDATE_SECONDS,
        exits * VMEXIT_CYCLES + to_user * KVM_RUN_CYCLES,
        {name: counters[name] for name in UNKNOWN if counters.get(name)},
    )


# Commit text of KVM_TDX_TERMINATE_VM (2025), vCPUs not running: seconds a 4K page, by vCPUs.  Dynamic removal is
# BLOCK, TRACK, kick, REMOVE, WBINVD and clearing, leaf by leaf; teardown is RECLAIM and clearing.
REMOVAL_SECONDS = {4: 15e-6, 32: 18e-6, 64: 53e-6}
TEARDOWN_SECONDS = {4: 5.1e-6, 32: 4.8e-6, 64: 4.5e-6}
# Jun Miao's patch and Kirill Shutemov's reply, January 2024: fresh memory touched in a TD, 64 GiB in 128 s or more
# (fault, AUG, ACCEPT and what the guest does itself; page size not said).
ACCEPT_SECONDS = 7.8e-6
TDX_UNKNOWN = ("TDH.VP.ENTER", "TDH.MEM.SEPT.ADD", "TDG.VP.VMCALL<MapGPA>", "exit-map-gpa-range", "ept-violation",
               "flush", "ipi", "kick-ipi", "zap", "clflush")  # fmt: skip


class TdxCost(NamedTuple):
    """Seconds of removal if done leaf by leaf, of the same pages' teardown, of acceptance; the rest is counted.

    What a batch of N costs nobody has published.  It does the per-page work of a removal without most of its
    TRACKs and kicks: less than leaf by leaf, and hardly less than teardown, which has no BLOCK and WBINVD either.
    """

    vcpus: int
    removal_seconds: float
    teardown_seconds: float
    accept_seconds: float
    unknown: dict[str, int]

    def text(self) -> str:
        """One line, with its sources' conditions."""
        rate = 1e6 * REMOVAL_SECONDS[self.vcpus]
        unknown = ", ".join(f"{n} {name}" for name, n in self.unknown.items())
        return (
            f"removal {self.removal_seconds:.3g} s leaf by leaf ({rate:.3g} us a page, {self.vcpus} idle vCPUs), "
            f"teardown of as many {self.teardown_seconds:.3g} s; acceptance about {self.accept_seconds:.3g} s; "
            f"cost not published: {unknown}"
        )


def estimate_tdx(counters: Mapping[str, int], vcpus: int) -> TdxCost:
    """The cost of a TD's run; rates of the published number of vCPUs that is nearest."""
    nearest = min(REMOVAL_SECONDS, key=lambda n: abs(n - vcpus))
    removed, accepted = counters.get("TDH.MEM.PAGE.REMOVE", 0), counters.get("TDH.MEM.PAGE.AUG", 0)
    return TdxCost(
        nearest,
        removed * REMOVAL_SECONDS[nearest],
        removed * TEARDOWN_SECONDS[nearest],
        accepted * ACCEPT_SECONDS,
        {name: counters[name] for name in TDX_UNKNOWN if counters.get(name)},
    )

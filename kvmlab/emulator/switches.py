"""What can be switched in a Vm: where sources disagree or are silent, and what later kernels fixed."""

from __future__ import annotations

from dataclasses import dataclass

from ..design import Design
from ..machine import Switches

PLATFORMS = ("snp", "sev", "sw")  # those of the explorer that are emulated
BACKINGS = ("split", "in-place")


@dataclass(frozen=True)
class VmSwitches(Switches):
    """The explorer's switches, and those that only real sizes need.

    `head_4k_over_2m`: a 4K RMPUPDATE may resize the 2M entry whose first page it names (sources silent).
    `bound_range_is_eexist`: binding a bound guest_memfd range gives EEXIST (2026), not EINVAL.
    `reserved_reads_as_set`: the bug that 277d3623d99a fixed, an xarray entry that was reserved and never stored
    reads as one that has attributes.  `unassigned_is_benign`: the RMP fault handler takes an unassigned entry for
    a punch that got in between (acafcf32c83e, 211606532680: 2026), else it warns.
    `guest_flushes_caches`, `free_flushes_caches`: the guest's flush at a conversion, and sev_gmem_invalidate()'s;
    both matter only with `Vm(caches=True)`.
    """

    head_4k_over_2m: bool = False
    bound_range_is_eexist: bool = False
    reserved_reads_as_set: bool = False
    unassigned_is_benign: bool = False
    guest_flushes_caches: bool = True
    free_flushes_caches: bool = True


def check(platform: str, backing: str, design: Design) -> None:
    """ValueError for a word that does not exist, or a design that does not exist with that backing."""
    if platform not in PLATFORMS:
        raise ValueError(f"unknown platform {platform!r}; there are: {', '.join(PLATFORMS)}")
    if backing not in BACKINGS:
        raise ValueError(f"unknown backing {backing!r}; there are: {', '.join(BACKINGS)}")
    if design.backing not in (None, backing):
        raise ValueError(f"{design.name} exists with {design.backing} backing only")

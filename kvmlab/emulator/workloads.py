"""A boot-like load: accept all memory, convert a bounce buffer, share scattered pages and take them back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from . import linux
from .costs import Cost, TdxCost
from .memory import PAGE
from .vm import Vm

COLUMNS = (
    "rmpupdate", "psmash", "pvalidate", "npf", "npf-rmp", "exit-map-gpa-range", "exit-memory-fault", "zap",
    "flush", "directmap-split", "directmap-unmap",
)  # fmt: skip
TDX_COLUMNS = (
    "TDG.MEM.PAGE.ACCEPT", "ept-violation", "TDH.MEM.SEPT.ADD", "TDH.MEM.PAGE.AUG", "TDG.VP.VMCALL<MapGPA>",
    "exit-map-gpa-range", "TDH.MEM.RANGE.BLOCK", "TDH.MEM.TRACK", "kick", "TDH.MEM.PAGE.REMOVE",
    "TDH.PHYMEM.PAGE.WBINVD", "flush", "TDH.VP.ENTER",
)  # fmt: skip


class Load(NamedTuple):
    """What one load did: the events of each phase, and the estimated cost of all of them."""

    design: str
    phases: dict[str, dict[str, int]]
    cost: Cost | TdxCost
    columns: tuple[str, ...] = COLUMNS

    @property
    def total(self) -> dict[str, int]:
        """The events of all phases."""
        return dict(sum((Counter(phase) for phase in self.phases.values()), Counter[str]()))

    def text(self) -> str:
        """One line a phase, the counts of `columns`, then the cost."""
        rows = [["", *(column.removeprefix("TDH.").removeprefix("TDG.") for column in self.columns)]] + [
            [name, *(str(counts.get(column, 0)) for column in self.columns)]
            for name, counts in {**self.phases, "total": self.total}.items()
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([self.design, *lines, self.cost.text()])


def boot(
    vm: Vm, *, in_4k: int = 1 << 30, bounce: int = 64 << 20, scattered: int = 2048, seed: int = 1
) -> Load:
    """Boot a Linux-like guest on a VM whose memory is one memslot from gpa 0, still all shared.

    tdx: the VMM has set all of it private, and the guest accepts it without asking.
    Memory is accepted in 2M but for the last `in_4k` bytes (at most half); the bounce buffer (bytes, at most a
    quarter) is shared and used; `scattered` single pages are shared, used and taken back.
    """
    guest, size = vm.guest(0), sum(slot.npages for slot in vm.slots) * PAGE
    in_4k, bounce = min(in_4k, size // 2), min(bounce, size // 4)
    phases: dict[str, dict[str, int]] = {}

    def phase(name: str) -> None:
        before = sum((Counter(p) for p in phases.values()), Counter[str]())
        phases[name] = dict(Counter(vm.counters) - before)

    guest.set_private(0, True, size)
    if vm.tdx:
        vm.set_memory_attributes(0, size, True)
        linux.accept(guest, 0, size)
        phase("accept")
    else:
        linux.accept(guest, 0, size - in_4k)
        phase("accept 2M")
        linux.accept(guest, size - in_4k, in_4k, large=False)
        phase("accept 4K")
    linux.set_memory_decrypted(guest, 0, bounce)
    guest.touch(0, bounce)
    phase("bounce buffer")
    for page in _scattered(bounce // PAGE, size // PAGE, scattered, seed):
        linux.set_memory_decrypted(guest, page * PAGE, PAGE)
        guest.write(page * PAGE, b"shared")
        linux.set_memory_encrypted(guest, page * PAGE, PAGE)
    phase("scattered 4K")
    return Load(vm.design.name, phases, vm.cost(), TDX_COLUMNS if vm.tdx else COLUMNS)


def _scattered(lo: int, hi: int, count: int, seed: int) -> Iterable[int]:
    """Pages spread over [lo, hi), the same ones for the same seed."""
    state, seen = seed, dict[int, None]()
    while len(seen) < min(count, (hi - lo) // 2):
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        seen[lo + (state >> 33) % (hi - lo)] = None
    return seen

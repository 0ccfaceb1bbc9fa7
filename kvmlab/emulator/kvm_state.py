"""KVM as the range engine runs it, and the state of it that is not per page: locks, snapshots, threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from ..compile.pages import ONE_PAGE, THREADS, Shape, page_model
from ..design import Design
from ..explore.ranges import Ranges
from ..machine.conf import Switches
from .events import Deadlock

Step = Callable[..., Any]


@lru_cache(256)
def ranges(
    design: Design,
    platform: str,
    backing: str,
    switches: Switches,
    stops: frozenset[Step],
    shape: Shape = ONE_PAGE,
) -> Ranges:
    """The range engine of a design; machines alike share what it knows."""
    return Ranges(page_model(design, platform, backing, switches, shape), stops)


class Held:
    """A thread that holds locks."""

    def __init__(self, name: str, held: list[str]) -> None:
        self.name, self.held = name, held


class Kernel:
    """What of KVM is not per page: who holds which lock, snapshots of faults, who is where in its program."""

    def __init__(
        self, design: Design, platform: str, backing: str, switches: Switches, stops: frozenset[Step]
    ) -> None:
        known = Switches(**{name: getattr(switches, name) for name in Switches.__dataclass_fields__})
        self.shaped = partial(ranges, design, platform, backing, known, stops)
        self.ranges = self.shaped(ONE_PAGE)
        self.x = self.ranges.model.initial & ~self.ranges.page_mask
        self.depth = 0
        self.pages: list[list[tuple[int, int]]] = []  # the PFNs that each call under way is about
        self.names = ["nobody"] * len(THREADS)
        self._vcpus: dict[frozenset[tuple[str, Any]], int] = {}
        cells = self.ranges.model.layout.cells
        self._vcpu_mask = sum(c.mask for c in cells if c.name in ("mode", "vcpu_epoch"))

    def with_vcpus(self, x: int, inside: frozenset[tuple[str, Any]]) -> int:
        """The state with a TD's vCPUs: one of the model's for each situation in which some are inside.

        What is asked of them is whether any are inside in some way, so those alike need only one.
        """
        if inside not in self._vcpus:
            found = 0
            them = [*sorted(inside), *[("host", "older")] * (len(THREADS) - len(inside))]
            for slot, (mode, age) in zip(THREADS, them, strict=True):
                found |= self.ranges.cell("mode", slot).code(mode)
                found |= self.ranges.cell("vcpu_epoch", slot).code(age)
            self._vcpus[inside] = found
        return x & ~self._vcpu_mask | self._vcpus[inside]

    def threads(self) -> list[Held]:
        """Who holds locks now."""
        return [Held(self.names[a], held) for a, held in sorted(self.ranges.held(self.x).items())]

    def wait_for(self, name: str, lock: str) -> None:
        """Deadlock if somebody has a lock that another thread asks for, for a moment."""
        for thread in self.threads():
            if lock in thread.held:
                raise Deadlock(f"{name} waits for {lock}, held by {thread.name}")

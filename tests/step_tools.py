"""One step of the kernel alone, on a machine in a state of one's choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from kvmlab.compile.build import build
from kvmlab.design import Design
from kvmlab.machine.conf import Switches
from kvmlab.machine.scenarios import SCENARIOS
from kvmlab.model.state import Blocked, View

BLOCKED = "blocked"  # the step cannot be taken


class Ran(NamedTuple):
    """What a step returned, the cells that it changed, the properties that it violated, what it counted."""

    result: Any
    wrote: dict[str, Any]
    broke: list[str]
    counts: list[str]


class Machine:
    """A machine as some design and scenario need it.  Cells go by names as "tlb[CPU0, 0]", which `repr` gives."""

    def __init__(
        self,
        scenario: str = "tiny",
        platform: str = "snp",
        design: str = "upstream",
        backing: str = "split",
        conf: Any = (),
        **switches: bool,
    ) -> None:
        model = build(Design.load(design), SCENARIOS[scenario], platform, backing, Switches(**switches))
        self.layout, self.conf = model.layout, replace(model.conf, **dict(conf))
        self.cells = {repr(cell): cell for cell in model.layout.cells}

    def view(self, cells: Any = (), choose: tuple[int, ...] = ()) -> View:
        """A view of a state in which all other cells have the first value of their domain."""
        x = 0
        for name, value in dict(cells).items():
            x |= self.cells[name].code(value)
        return View(self.layout, x, self.conf, tuple(choose))

    def run(self, step: Callable[..., Any], *args: Any, at: Any = (), choose: tuple[int, ...] = ()) -> Ran:
        """Take one step; `at` names the cells before it, `choose` picks among what it may choose from."""
        s = self.view(at, choose)
        try:
            result = step(s, *args)
        except Blocked:
            return Ran(BLOCKED, {}, [], [])
        was = self.view(at)
        wrote = {repr(cell): s.read(cell) for cell in s.writes if s.read(cell) != was.read(cell)}
        return Ran(result, wrote, list(s.violations), list(s.counts))

"""Pictures of what the emulator counted: bars drawn as a table, on whatever ground the page has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .style import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, Html, block, el, plural, table, td, th, tr

if TYPE_CHECKING:
    from ..emulator.workloads import Load

# What is drawn, and the counters that make it up.
COUNTS = {
    "RMPUPDATE": ("rmpupdate",),
    "#NPF": ("npf", "npf-rmp"),
    "zaps": ("zap",),
    "flushes": ("flush",),
    "PSC exits": ("psc-buffer", "psc-msr"),
}
HUES = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)
LONGEST = 320  # pixels


def load_counts(load: Load) -> dict[str, int]:
    """What is drawn of one load: event counts over all its phases, by the names of COUNTS."""
    total = load.total
    return {name: sum(total.get(part, 0) for part in parts) for name, parts in COUNTS.items()}


@dataclass(frozen=True)
class LoadFigure:
    """A bar for each count of each design, all on one scale, so that what is small beside the rest looks so."""

    loads: tuple[Load, ...]

    def text(self) -> str:
        """The picture in words: all that it shows, a line a design."""
        many = plural(len(self.loads), "design")
        lines = [f"Bars on one scale, {', '.join(COUNTS)} of {many} in one load:"]
        for load in self.loads:
            counts = ", ".join(f"{name} {count:,}" for name, count in load_counts(load).items())
            lines.append(f"  {load.design}: {counts}")
        return "\n".join(lines)

    __str__ = text

    def html(self) -> Html:
        """The picture: a group of rows a count, a row a design, its number, its bar."""
        counts = [load_counts(load) for load in self.loads]
        longest = max(max(each.values()) for each in counts) or 1
        rows: list[Html] = []
        for name in COUNTS:
            for n, (load, each) in enumerate(zip(self.loads, counts, strict=True)):
                bar = f"width:{round(LONGEST * each[name] / longest)}px;background:{HUES[n % len(HUES)]}"
                top = f"white-space:nowrap;{'padding-top:9px' if n == 0 else ''}"
                head, design = th(name if n == 0 else "", style=top), td(load.design, style=top)
                shape = el("span", style=f"display:inline-block;height:10px;{bar}")
                rows.append(tr(head, design, td(f"{each[name]:,}", number=True, style=top), td(shape, style=top)))
        return block(table(rows))

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        return {"text/plain": self.text(), "text/html": self.html()}


def load_figure(loads: Sequence[Load]) -> LoadFigure:
    """The picture of some loads, which a notebook shows; ValueError if there is none."""
    if not loads:
        raise ValueError("nothing to draw: load_figure takes at least one Load")
    return LoadFigure(tuple(loads))

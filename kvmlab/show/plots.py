"""Pictures of what the emulator counted.  matplotlib is imported when the first one is drawn, not before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..emulator.workloads import Load

# What is drawn, and the counters that make it up.
COUNTS = {
    "RMPUPDATE": ("rmpupdate",),
    "#NPF": ("npf", "npf-rmp"),
    "zaps": ("zap",),
    "flushes": ("flush",),
    "PSC exits": ("psc-buffer", "psc-msr"),
}
HUES = (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE, style.SKY, style.VERMILLION)
# The same picture is shown on light and dark pages: its background is transparent, and its grey can be read on white
# and on JupyterLab's dark pages alike (contrast 4.5 and 4.2).
GROUND, INK = "none", "#767676"
BAR, GAP = 0.8, 0.9  # a bar's thickness and the gap between two groups, in units of the pitch of bars


def load_counts(load: Load) -> dict[str, int]:
    """What is drawn of one load: event counts over all its phases, by the names of COUNTS."""
    total = load.total
    return {name: sum(total.get(part, 0) for part in parts) for name, parts in COUNTS.items()}


def load_text(loads: Sequence[Load]) -> str:
    """The picture in words: all that it shows, a line a design."""
    lines = [f"Bars on one scale, {', '.join(COUNTS)} of {style.plural(len(loads), 'design')} in one load:"]
    for load in loads:
        counts = ", ".join(f"{name} {count:,}" for name, count in load_counts(load).items())
        lines.append(f"  {load.design}: {counts}")
    return "\n".join(lines)


def load_figure(loads: Sequence[Load]) -> Figure:
    """A bar for each count of each design, all on one scale, so that a small count looks small.

    In a notebook it shows itself as a PNG whose text/plain is `load_text`.  ValueError if there is no load.
    """
    if not loads:
        raise ValueError("nothing to draw: load_figure takes at least one Load")
    figure = _figure(load_text(loads), 0.4 + 0.19 * len(COUNTS) * (len(loads) + GAP))
    axes = figure.add_subplot()
    pitch = len(loads) + GAP
    for n, load in enumerate(loads):
        places = [group * pitch + n for group in range(len(COUNTS))]
        counts = list(load_counts(load).values())
        bars = axes.barh(places, counts, BAR, color=HUES[n % len(HUES)], label=load.design)
        axes.bar_label(bars, [f"{count:,}" for count in counts], padding=4, fontsize=9, color=INK)
    _name(axes, [load.design for load in loads], pitch)
    return figure


def _name(axes: Any, designs: Sequence[str], pitch: float) -> None:
    """Write each design beside each of its bars, and each count beside its group; no axis says it again."""
    places = [group * pitch + n for group in range(len(COUNTS)) for n in range(len(designs))]
    axes.set_yticks(places, list(designs) * len(COUNTS), fontsize=9, color=INK)
    beside = -14 - 5.4 * max(map(len, designs))  # points: left of the designs' names
    for group, name in enumerate(COUNTS):
        middle = group * pitch + (len(designs) - 1) / 2
        axes.annotate(
            name, (0, middle), (beside, 0), axes.get_yaxis_transform(), "offset points", ha="right",
            va="center", fontsize=10, fontweight="bold", color=INK,
        )  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.13, y=0.01)
    axes.set_xlim(left=0)
    axes.xaxis.set_visible(False)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(INK)
    axes.set_facecolor(GROUND)


def _figure(alt: str, height: float) -> Figure:
    """An empty figure (`height` in inches) that a notebook shows without pyplot, with words for it."""
    from base64 import b64encode
    from io import BytesIO

    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    class Picture(Figure):
        def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
            png = BytesIO()
            self.savefig(png, format="png", dpi=100, metadata={"Software": None})  # the same bytes every day
            return {"image/png": b64encode(png.getvalue()).decode(), "text/plain": alt}

    layout = ConstrainedLayoutEngine(w_pad=0.17, h_pad=0.14)
    return Picture(figsize=(7.4, height), layout=layout, facecolor=GROUND)

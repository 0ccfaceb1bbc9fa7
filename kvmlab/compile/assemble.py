"""Programs before their jumps are resolved: drafts with labels, and the assembler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..design import Row
from ..model.state import ModelError, View
from ..model.step import Instr, Step


@dataclass
class Draft:
    """An instruction before its jumps are resolved: `label` names it, `after` where it goes on."""

    step: Step
    args: tuple[Any, ...] = ()
    text: str = ""
    row: Row | None = None
    section: str = ""
    label: str | None = None
    after: str | None = None
    jumps: dict[str, str] = field(default_factory=dict)
    idle: bool = False
    loop: int = 0


def assemble(drafts: Sequence[Draft]) -> tuple[Instr, ...]:
    """Resolve labels into program counters; ModelError for a label that nobody carries."""
    where = {d.label: pc for pc, d in enumerate(drafts) if d.label}
    for d in drafts:
        for target in (*d.jumps.values(), *([d.after] if d.after else [])):
            if target not in where:
                raise ModelError(f"no instruction is labelled {target!r}")

    def instr(pc: int, d: Draft) -> Instr:
        jumps = {
            "again": pc,
            "stuck": where["stuck"],
            **{name: where[label] for name, label in d.jumps.items()},
        }
        after = where[d.after] if d.after else pc + 1
        return Instr(d.step, d.args, after, jumps, d.idle, d.text, d.row, d.section, d.loop)

    return tuple(instr(pc, d) for pc, d in enumerate(drafts))


def nothing(s: View, me: str) -> None:
    """A place with a name; the assembler takes it away again."""
    return None


def without_markers(drafts: list[Draft]) -> list[Draft]:
    """Remove the do-nothing places: what jumped to one jumps to the instruction after it, or to its `after`."""
    real: list[Draft] = []
    moved: dict[str, str] = {}
    waiting: list[str] = []
    for d in drafts:
        if d.step is nothing and d.label:
            waiting.append(d.label)
            if d.after:
                moved.update({label: d.after for label in waiting})
                waiting = []
                if real and not real[-1].after:
                    real[-1].after = d.after
            continue
        if waiting:
            d.label = d.label or waiting[0]
            moved.update({label: d.label for label in waiting})
            waiting = []
        real.append(d)

    def end(label: str) -> str:
        while moved.get(label, label) != label:
            label = moved[label]
        return label

    for d in real:
        d.jumps = {name: end(label) for name, label in d.jumps.items()}
        d.after = end(d.after) if d.after else None
    return real

"""Checks that are done once for models that only read differently: several designs often make the same one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from kvmlab.model.step import Instr, Model
from kvmlab.verdict.report import check_case
from kvmlab.verdict.run import Case

ONLY_READ = (
    "text",
    "row",
    "section",
)  # what a trace prints of an instruction; the search does not look at it
_known: dict[object, tuple[dict[str, str], bool]] = {}


def identity(model: Model) -> object:
    """All of a model that a search depends on: equal for two models only if they have the same graph and verdicts."""
    kept = [field.name for field in fields(Instr) if field.name not in ONLY_READ]
    programs = tuple(
        (actor.key, tuple(_instr(instr, kept) for instr in actor.program)) for actor in model.actors
    )
    cells = [(repr(cell), cell.domain, cell.shift) for cell in model.layout.cells]
    return programs, repr((cells, model.initial, model.conf, sorted(model.fatal))), model.quiet


def _instr(instr: Instr, kept: list[str]) -> tuple[Any, ...]:
    """The step itself, since two functions may have one name; the rest as text, since not all can be hashed."""
    return instr.step, *(repr(getattr(instr, name)) for name in kept if name != "step")


def verdicts(case: Case) -> dict[str, str]:
    """The violated properties of a case with their verdicts, from a complete search of its model or of its like."""
    known = identity(case.model)
    if known not in _known:
        report = check_case(case)
        found = {v.name: v.verdict for v in report.verdicts.values() if v.depth is not None}
        _known[known] = found, report.complete
    found, complete = _known[known]
    assert complete
    return found

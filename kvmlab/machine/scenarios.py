"""The scenarios that ship, as files in kvmlab/scenarios, and how one is found: by name, joined, or as a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from ..design.files import decode, from_file
from ..errors import InputError
from .scenario import Scenario
from .scenario_text import parse_scenario, spelled

# In the order in which they are listed.
NAMES = (
    "tiny", "to-private", "to-shared", "round-trip", "round-trip-shared", "host-io",
    "host-stray", "host-writes-private", "range", "hole", "slot-added", "smm",
    "two-vmms", "two-ranges", "auto-convert", "stray-write", "huge", "huge-1g",
    "hook-fails", "discard", "discard-first", "discard-races", "huge-accept", "huge-split",
    "vmm-punches", "punch-4k", "zap-yields", "xarray-full", "seamcall-busy", "slot-deleted",
    "reserve-fails", "hostile", "careless",
)  # fmt: skip
_FOLDER = Path(__file__).parent.parent / "scenarios"


def scenario_text(name: str) -> str:
    """The text of a scenario that ships; InputError names those that do."""
    if name not in NAMES:
        raise InputError(f"unknown scenario {name[:40]!r}; there are: {', '.join(NAMES)}, and files")
    return (_FOLDER / f"{name}.kvm").read_text(encoding="utf-8")


@cache
def _shipped(name: str) -> Scenario:
    return parse_scenario(scenario_text(name), name)


@cache
def find_scenario(given: str) -> Scenario:
    """Return a scenario by name, several joined by "+", or the one that a text says; InputError, DesignError."""
    if "\n" in given:
        return parse_scenario(given)
    first, *others = map(_shipped, given.split("+"))
    for other in others:
        first = first.joined(other)
    return first


def read_scenario(given: str, vcpus: int | None = None, gfns: int | None = None) -> str:
    """A scenario as `Case` keeps it: names as they are, a file or another size as the text that it comes to.

    InputError or DesignError if there is no such scenario, file or size.
    """
    path = Path(given) if "\n" not in given and len(given) < 4096 else None
    if path and any(name not in NAMES for name in given.split("+")) and path.is_file():
        given = spelled(parse_scenario(decode(from_file(path), path.name), path.stem))
    found = find_scenario(given)
    return given if vcpus is None and gfns is None else spelled(found.resized(vcpus, gfns))


class _Scenarios(Mapping[str, Scenario]):
    """Those that ship, read when they are asked for."""

    def __getitem__(self, name: str) -> Scenario:
        if name not in NAMES:
            raise KeyError(name)
        return _shipped(name)

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


SCENARIOS: Mapping[str, Scenario] = _Scenarios()

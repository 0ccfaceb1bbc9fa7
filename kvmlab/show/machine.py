"""The machine's table: what a reader should see of one state, part by part; every view draws from it."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..step import Model


class Part(NamedTuple):
    """One line of the table: its name, a hint for newcomers, and (key, value) cells; values are short text."""

    name: str
    hint: str
    cells: tuple[tuple[str, str], ...]


def machine(model: Model, x: int) -> list[Part]:
    """The parts of state `x` in the order in which reviewers ask for them; absent parts are left out."""
    values = model.layout.unpack(x)
    fields = model.layout.fields

    def family(name: str) -> dict[Any, str]:
        cells = fields.get(name)
        return {key: _text(values[name, key]) for key in cells} if isinstance(cells, dict) else {}

    conf = model.conf
    moment = "running" if values["running"] else ("returned" if values["era"] else "not asked")
    parts = [
        Part(
            "conversion",
            "what the guest asked for, and whether the ioctl has returned",
            (("to", conf.eras[values["era"]]), ("", moment)),
        ),
        Part("xarray", "the memory attribute that KVM keeps", _pairs(family("attr"), "gfn ")),
        Part("NPT", "the leaf that the nested page table holds", _npt(values, family("npt"))),
        Part(
            "TLB",
            "the translation each vCPU could still use",
            tuple((k[0], v) for k, v in family("tlb").items()),
        ),
        Part("RMP", "who owns the page, in hardware", _pairs(family("rmp"))),
        Part("directmap", "the kernel's own mapping of the page", _directmap(values, family("directmap"))),
        Part("contents", "who wrote the page last; * under the guest's key", _pairs(family("memory"))),
        Part(
            "window",
            "invalidation: how many in progress, and each fault's snapshot",
            _window(values, family("snapshot")),
        ),
        Part("locks", "who holds what", _locks(values, fields.keys())),
        Part(
            "access", "what each vCPU is trying to do", tuple((str(k), v) for k, v in family("acc").items())
        ),
    ]
    return [part for part in parts if part.cells]


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _pairs(family: dict[object, str], prefix: str = "") -> tuple[tuple[str, str], ...]:
    return tuple((f"{prefix}{key}", value) for key, value in family.items())


def _npt(values: dict[object, object], family: dict[object, str]) -> tuple[tuple[str, str], ...]:
    if values["npt_2m"]:
        return (("2M", "shared"),)
    return (*_pairs(family, "gfn "), *((("2M", "mixed"),) if values["mixed"] else ()))


def _directmap(values: dict[object, object], family: dict[object, str]) -> tuple[tuple[str, str], ...]:
    if not family:
        return ()
    return (*_pairs(family), ("region", "2M" if values["directmap_2m"] else "4K"))


def _window(values: dict[object, object], snapshots: dict[object, str]) -> tuple[tuple[str, str], ...]:
    opened = f"open ({values['in_progress']})" if values["in_progress"] else "closed"
    taken = tuple((f"{key} seq", value) for key, value in snapshots.items() if value != "none")
    return (("", opened), *taken)


def _locks(values: dict[object, object], names: object) -> tuple[tuple[str, str], ...]:
    held: list[tuple[str, str]] = []
    for where, value in values.items():
        name, key = where if isinstance(where, tuple) else (where, None)
        if name in ("slots_lock", "folio_lock") and value:
            held.append((str(name), str(value)))
        elif str(name).endswith("_writer") and value:
            held.append((str(name).removesuffix("_writer"), f"{value} (write)"))
        elif str(name).endswith("_reader") and value:
            held.append((str(name).removesuffix("_reader"), f"{key} (read)"))
        elif str(name).endswith("_queue") and isinstance(value, tuple):
            held += [(str(name).removesuffix("_queue"), f"{waiting} waits") for waiting in value]
    return tuple(held) or (("", "none held"),)

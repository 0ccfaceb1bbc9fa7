"""The machine's table: what a reader should see of one state, a row a part; text, HTML and codes are made from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..hw.tdx.lines import ZERO, Line
from ..model.step import Model


class TableRow(NamedTuple):
    """One row of the table: its name, a hint for newcomers, and (key, value) cells; values are short text."""

    name: str
    hint: str
    cells: tuple[tuple[str, str], ...]


def machine_text(model: Model, x: int) -> str:
    """The table of state `x` as plain text, a line a row."""
    return "\n".join(
        f"{row.name:<12} {'  '.join(f'{k}={v}' if k else v for k, v in row.cells)}"
        for row in machine_rows(model, x)
    )


def machine_rows(model: Model, x: int) -> list[TableRow]:
    """The table of state `x`, in the order in which reviewers ask; what the model does not have is left out."""
    cells = [cell for cell in model.layout.cells if not cell.fixed]
    values: dict[Any, Any] = {
        cell.name if cell.key is None else (cell.name, cell.key): cell.get(x) for cell in cells
    }

    def family(name: str) -> dict[Any, str]:
        return {cell.key: _text(values[name, cell.key]) for cell in cells if cell.name == name}

    conf = model.conf
    moment = "running" if values["running"] else ("returned" if values["era"] else "not asked")
    rows = [
        TableRow(
            "conversion",
            "what the guest asked for, and whether the ioctl has returned",
            (("to", conf.eras[values["era"]]), ("", moment)),
        ),
        TableRow("xarray", "the memory attribute that KVM keeps", _xarray(values, family("attr"))),
        TableRow(
            "memslot",
            "the memslot, and as what each fault has found it",
            _memslot(values, family("fault_slot")),
        ),
        TableRow("EPT", "the leaf of the ordinary EPT (SHARED bit set)", _pairs(family("npt"), "gfn "))
        if conf.tdx
        else TableRow(
            "NPT",
            "the leaf that the nested page table holds",
            (*_npt(values, family("npt"), family("npt_large")), *_pairs(family("npt_smm"), "SMM gfn ")),
        ),
        *(_secure_ept(values, family) if conf.tdx else ()),
        TableRow("TLB", "the translation each vCPU could still use", _tlb(values, family("tlb"))),
        TableRow("RMP", "who owns the page, in hardware", _pairs(family("rmp"))),
        *(_module(family) if conf.tdx else ()),
        TableRow(
            "guest_memfd",
            "the private page: in the file, on its way out, or given back; who holds it",
            _gmem(family("gmem"), family("folio_ref")),
        ),
        TableRow(
            "directmap", "the kernel's own mapping of the page", _directmap(values, family("directmap"))
        ),
        TableRow(
            "contents",
            "who wrote the page last; * under the guest's key",
            _contents(values, family("memory")),
        ),
        TableRow(
            "window",
            "invalidation: how many in progress, and each fault's snapshot",
            _window(values, family("snapshot")),
        ),
        TableRow("locks", "who holds what", _locks(values)),
        TableRow(
            "access", "what each vCPU is trying to do", tuple((str(k), v) for k, v in family("acc").items())
        ),
    ]
    return [row for row in rows if row.cells]


Family = Callable[[str], dict[Any, str]]


def _secure_ept(values: dict[Any, Any], family: Family) -> list[TableRow]:
    """TDX: the secure EPT, and KVM's copy of it."""
    locked = tuple((f"gfn {gfn} lock", who) for gfn, who in family("entry_lock").items() if who != "-")
    return [
        TableRow(
            "S-EPT",
            "the secure EPT that the TDX module keeps, and the table above",
            (*_pairs(family("sept"), "gfn "), ("table", str(values["sept_table"])), *locked),
        ),
        TableRow(
            "mirror",
            "KVM's own copy of the secure EPT",
            (*_pairs(family("mirror"), "gfn "), ("table", str(values["mirror_table"]))),
        ),
    ]


def _module(family: Family) -> list[TableRow]:
    """TDX: who owns the page, and where each vCPU stands to TD_EPOCH."""
    epochs, private = family("vcpu_epoch"), family("ptlb")
    blocked = tuple((f"{pfn} blocked", epoch) for pfn, epoch in family("bepoch").items() if epoch != "older")
    return [
        TableRow(
            "PAMT", "whose page it is: REG is the TD's, NDA nobody's", (*_pairs(family("pamt")), *blocked)
        ),
        TableRow(
            "vCPUs",
            "in the TD or not, and how its epoch stands to TD_EPOCH",
            tuple((cpu, f"{mode}, {epochs[cpu]}") for cpu, mode in family("mode").items()),
        ),
        TableRow(
            "private TLB",
            "the private translation each vCPU could still use",
            tuple((k[0], v) for k, v in private.items()),
        ),
    ]


def _contents(values: dict[Any, Any], family: dict[Any, str]) -> tuple[tuple[str, str], ...]:
    """On tdx a page is a line: content and KeyID in memory, poison, and what is dirty in caches."""
    shown = []
    for pfn, plain in family.items():
        line = values["memory", pfn]
        if isinstance(line, Line):
            dirty = "".join(f" | dirty {_content(value)} KeyID {key}" for key, value in line.dirty)
            plain = (
                f"{_content(line.content)}{' KeyID 1' if line.keyid else ''}{' POISON' * line.poison}{dirty}"
            )
        shown.append((str(pfn), plain))
    return tuple(shown)


def _content(value: object) -> str:
    return "zeros" if value == ZERO else str(value)


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _pairs(family: dict[object, str], prefix: str = "") -> tuple[tuple[str, str], ...]:
    return tuple((f"{prefix}{key}", value) for key, value in family.items())


def _xarray(values: dict[object, object], family: dict[object, str]) -> tuple[tuple[str, str], ...]:
    """Each gfn's attribute; an entry that is reserved and empty reads as shared."""
    left = {gfn: " (reserved)" if values.get(("reserved", gfn)) else "" for gfn in family}
    return tuple((f"gfn {gfn}", value + left[gfn]) for gfn, value in family.items())


def _tlb(values: dict[object, object], family: dict[Any, str]) -> tuple[tuple[str, str], ...]:
    """Each vCPU's entries; the gfns of a 2M page may share one."""
    large = {cpu: " (2M)" if values.get(("tlb_2m", cpu)) else "" for cpu, _ in family}
    return tuple((cpu, value + large[cpu]) for (cpu, _), value in family.items())


def _memslot(values: dict[object, object], found: dict[object, str]) -> tuple[tuple[str, str], ...]:
    """Where one comes or goes: what it is; who is in SMM has other memslots."""
    if "slot" not in values:
        return ()
    faults = tuple((f"{cpu} found", slot) for cpu, slot in found.items() if slot != "-")
    smm = tuple((str(cpu), "in SMM") for cpu in found if values.get(("smm", cpu)))
    return (("", str(values["slot"])), *faults, *smm)


def _gmem(family: dict[object, str], refs: dict[Any, str]) -> tuple[tuple[str, str], ...]:
    """Each private page, and who holds it."""
    holders = {
        gfn: [str(who) for (who, g), held in refs.items() if g == gfn and held == "True"] for gfn in family
    }
    return tuple((f"gfn {gfn}", ", held by ".join([state, *holders[gfn]])) for gfn, state in family.items())


def _npt(
    values: dict[object, object], family: dict[object, str], large: dict[Any, str]
) -> tuple[tuple[str, str], ...]:
    """Each leaf, and which large pages are marked mixed; what a large leaf covers has none of its own."""
    one = len(large) == 1
    label = {key: key[0] if one else f"{key[0]} gfn {key[1]}" for key in large}
    leaves = tuple((label[key], kind) for key, kind in large.items() if kind != "-")
    mixed = tuple((label[key], "mixed") for key in large if values["mixed", key])
    if one and leaves:
        return leaves
    return (*_pairs(family, "gfn "), *leaves, *mixed)


def _directmap(values: dict[object, object], family: dict[object, str]) -> tuple[tuple[str, str], ...]:
    if not family:
        return ()
    return (*_pairs(family), ("region", "2M" if values["directmap_2m"] else "4K"))


def _window(values: dict[object, object], snapshots: dict[object, str]) -> tuple[tuple[str, str], ...]:
    opened = f"open ({values['in_progress']})" if values["in_progress"] else "closed"
    taken = tuple((f"{key} seq", value) for key, value in snapshots.items() if value != "none")
    return (("", opened), *taken)


def _locks(values: dict[object, object]) -> tuple[tuple[str, str], ...]:
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

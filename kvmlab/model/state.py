"""The machine's state: named cells with finite domains, packed without loss into 64-bit words.

A state is one Python int.  Each cell owns a few bits of it and never straddles a 64-bit word, so the
array engine can keep the same state as a column of uint64 words.  Steps see the state through a `View`,
which remembers what was read and written: that footprint is what the explorer learns from.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

WORD = 64


class ModelError(Exception):
    """A step or a model is wrong (never the user's design): names the cell, the value and the domain."""


class Field(NamedTuple):
    """One family of cells: a name, the finite domain of its values, and the keys of its members.

    `keys` is None for a single cell.  A domain of one value costs no bits.  Fields of one name join into one
    family, so members may have domains of their own.  A `fixed` field keeps its one value: what is written is lost.
    """

    name: str
    domain: tuple[Hashable, ...]
    keys: tuple[Hashable, ...] | None = None
    fixed: bool = False


class Cell:
    """One cell: where its bits lie in the packed state, and which value each code stands for."""

    __slots__ = ("bits", "codes", "domain", "fixed", "key", "mask", "name", "shift")

    def __init__(self, field: Field, key: Hashable, shift: int, bits: int) -> None:
        self.name, self.key, self.domain, self.fixed = field.name, key, field.domain, field.fixed
        self.shift, self.bits, self.mask = shift, bits, ((1 << bits) - 1) << shift
        self.codes = {value: code for code, value in enumerate(field.domain)}

    def __repr__(self) -> str:
        return self.name if self.key is None else f"{self.name}[{_show_key(self.key)}]"

    def get(self, x: int) -> Any:
        """Return the value of this cell in the packed state `x`."""
        return self.domain[(x & self.mask) >> self.shift]

    def code(self, value: Hashable) -> int:
        """Return the bits, in place, that stand for `value`; ModelError if it is not in the domain."""
        try:
            return self.codes[value] << self.shift
        except KeyError:
            raise ModelError(f"{self!r} cannot hold {value!r}; allowed: {self.domain}") from None


def _show_key(key: Hashable) -> str:
    return ", ".join(map(str, key)) if isinstance(key, tuple) else str(key)


class Layout:
    """Where every cell lies: built once per model from its fields, in the order given.

    Fields are placed first-fit, so small cells fill the gap that a larger one leaves at a word's end.
    """

    def __init__(self, fields: Iterable[Field]) -> None:
        self.fields: dict[str, Cell | dict[Hashable, Cell]] = {}
        self.cells: list[Cell] = []
        used: list[int] = [0]
        for field in fields:
            family = self.fields.setdefault(field.name, {})
            if (
                not isinstance(family, dict)
                or (field.keys is None and family)
                or family.keys() & set(field.keys or ())
            ):
                raise ModelError(f"field {field.name!r} is declared twice")
            if field.keys is None:
                self.fields[field.name] = self._place(field, None, used)
            else:
                family.update({key: self._place(field, key, used) for key in field.keys})
        self.words = len(used)

    def _place(self, field: Field, key: Hashable, used: list[int]) -> Cell:
        if not field.domain or len(set(field.domain)) != len(field.domain):
            raise ModelError(f"field {field.name!r} needs a domain of distinct values, not {field.domain}")
        bits = (len(field.domain) - 1).bit_length()
        word = next((w for w, n in enumerate(used) if n + bits <= WORD), len(used))
        if word == len(used):
            used.append(0)
        cell = Cell(field, key, word * WORD + used[word], bits)
        used[word] += bits
        self.cells.append(cell)
        return cell

    @property
    def bits(self) -> int:
        """Number of bits that carry information."""
        return sum(cell.bits for cell in self.cells)

    def cell(self, name: str, key: Hashable = None) -> Cell:
        """Return one cell by field name and key; KeyError when there is none."""
        found = self.fields[name]
        return found if isinstance(found, Cell) else found[key]

    @property
    def places(self) -> list[tuple[Any, ...]]:
        """What each cell is called, where its bits lie and what they mean; of a `pc`, not how many there are."""
        return [(c.name, c.key, c.shift, c.bits, c.fixed, c.name == "pc" or c.domain) for c in self.cells]

    def pack(self, values: Mapping[Any, Hashable]) -> int:
        """Pack `{name: value}` and `{(name, key): value}`; cells not named take their domain's first value."""
        x = 0
        for where, value in values.items():
            name, key = where if isinstance(where, tuple) else (where, None)
            x |= self.cell(name, key).code(value)
        return x

    def unpack(self, x: int) -> dict[Any, Any]:
        """Return every cell's value in `x`, keyed as in `pack`."""
        return {(c.name if c.key is None else (c.name, c.key)): c.get(x) for c in self.cells}


class Blocked(Exception):
    """Raised by `View.wait`: the step cannot be taken in this state."""


class _Members:
    """The cells of one keyed field, seen through a view: `s.npt[gfn]`, `s.tlb[cpu, gfn]`."""

    __slots__ = ("_cells", "_view")

    def __init__(self, view: View, cells: dict[Hashable, Cell]) -> None:
        self._view, self._cells = view, cells

    def __getitem__(self, key: Hashable) -> Any:
        return self._view.read(self._cells[key])

    def __setitem__(self, key: Hashable, value: Hashable) -> None:
        self._view.write(self._cells[key], value)

    def get(self, key: Hashable, default: Any) -> Any:
        """The value at `key`, or `default` where the machine has no such cell."""
        return self[key] if key in self._cells else default

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._cells)

    def __contains__(self, key: object) -> bool:
        return key in self._cells


class View:
    """A state as a step sees it: attributes are cells, reads and writes are remembered.

    `s.conf` holds what never changes within a model (platform, backing, switches) and is not tracked.
    A step may also `choose` among values (each becomes an edge of its own), `wait` for a condition,
    `violate` a property, `count` an event for the measures, `say` what a reader should be told, and `note` an event
    with its code for the emulator's log.
    """

    __slots__ = (
        "_choices",
        "_layout",
        "_prefix",
        "_x",
        "conf",
        "counts",
        "notes",
        "reads",
        "said",
        "violations",
        "writes",
    )

    def __init__(self, layout: Layout, x: int, conf: Any = None, prefix: tuple[int, ...] = ()) -> None:
        put = object.__setattr__
        put(self, "_layout", layout)
        put(self, "_x", x)
        put(self, "conf", conf)
        put(self, "_prefix", prefix)
        put(self, "_choices", [])
        put(self, "reads", 0)
        put(self, "writes", {})
        put(self, "violations", [])
        put(self, "counts", [])
        put(self, "said", [])
        put(self, "notes", [])

    def read(self, cell: Cell) -> Any:
        """Value of `cell`: what this step wrote, else the state's (and then it joins the footprint)."""
        code = self.writes.get(cell)
        if code is None:
            object.__setattr__(self, "reads", self.reads | cell.mask)
            code = self._x & cell.mask
        return cell.domain[code >> cell.shift]

    def write(self, cell: Cell, value: Hashable) -> None:
        """Set `cell`, unless it is fixed; ModelError when `value` is outside its domain."""
        if not cell.fixed:
            self.writes[cell] = cell.code(value)

    def __getattr__(self, name: str) -> Any:
        try:
            found = self._layout.fields[name]
        except KeyError:
            raise AttributeError(f"this machine has no cell {name!r}") from None
        return self.read(found) if isinstance(found, Cell) else _Members(self, found)

    def __setattr__(self, name: str, value: Hashable) -> None:
        found = self._layout.fields.get(name)
        if not isinstance(found, Cell):
            raise AttributeError(f"this machine has no single cell {name!r} to set")
        self.write(found, value)

    def choose(self, options: Iterable[Any]) -> Any:
        """Return one of `options`; the explorer takes every one in turn.  No options: the step waits."""
        options = tuple(options)
        if not options:
            raise Blocked
        n = len(self._choices)
        picked = self._prefix[n] if n < len(self._prefix) else 0
        self._choices.append((picked, len(options)))
        return options[picked]

    def wait(self, condition: bool) -> None:
        """Go on only if `condition` holds; otherwise this actor is blocked here."""
        if not condition:
            raise Blocked

    def violate(self, prop: str, why: str) -> None:
        """This step breaks property `prop`."""
        self.violations.append(prop)
        self.said.append(f"{prop}: {why}")

    def count(self, measure: str) -> None:
        """One more of `measure` in this run."""
        self.counts.append(measure)

    def say(self, text: str) -> None:
        """Tell the reader of a trace what happened."""
        self.said.append(text)

    def note(self, kind: str, text: str = "", code: int | None = None, gfn: int | None = None) -> None:
        """Tell whoever keeps a log of events what happened, with its status code, and to which gfn; no measure."""
        self.notes.append((kind, text, code, gfn))

    @property
    def after(self) -> int:
        """The packed state after this step."""
        x: int = self._x
        for cell, code in self.writes.items():
            x = (x & ~cell.mask) | code
        return x

    @property
    def choices(self) -> tuple[int, ...]:
        """The choices taken, in order."""
        return tuple(picked for picked, _ in self._choices)

    def next_prefix(self) -> tuple[int, ...] | None:
        """The next combination of choices to try, or None after the last."""
        path = list(self._choices)
        while path:
            picked, n = path.pop()
            if picked + 1 < n:
                return (*(p for p, _ in path), picked + 1)
        return None

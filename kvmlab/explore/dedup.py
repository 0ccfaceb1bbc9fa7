"""Open-addressing tables on numpy arrays: the set of states already seen, and look-up by footprint.

Membership is decided by comparing whole states, never by a hash alone: the hash says only where to look.
An array of states has one row a state and one column a 64-bit word: shape (n, W), uint64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.state import WORD

Words = NDArray[np.uint64]
Numbers = NDArray[np.int64]
Multipliers = tuple[int, ...]

# Odd, and without structure of their own; one a word of state.
MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F)


def hash_words(states: Words, multipliers: Multipliers = MULTIPLIERS) -> Words:
    """A 64-bit hash a state, best in its top bits; `states` may have more axes before the last."""
    h: Words = states[..., 0] * np.uint64(multipliers[0])
    for w in range(1, states.shape[-1]):
        h += states[..., w] * np.uint64(multipliers[w % len(multipliers)] + 2 * (w // len(multipliers)))
    return h


def differ(a: Words, b: Words) -> NDArray[np.bool_]:
    """Which states of `a` are not those of `b`, row by row."""
    out: NDArray[np.bool_] = a[..., 0] != b[..., 0]
    for w in range(1, a.shape[-1]):
        out |= a[..., w] != b[..., w]
    return out


def where(mask: NDArray[Any]) -> Numbers:
    """Indices of what is not zero, flat: np.flatnonzero without its detours, which cost more than small levels do."""
    return mask.reshape(-1).nonzero()[0]


class StateSet:
    """States numbered in the order in which they were first met.

    New candidates are written behind the known states (`tail`), then `intern` numbers them; so a candidate
    is compared with an earlier one of its own batch in the same way as with a known state.
    """

    def __init__(self, words: int, multipliers: Multipliers = MULTIPLIERS, slots_log2: int = 12) -> None:
        self.words, self.multipliers, self.n = words, multipliers, 0
        self._rows = np.empty((1 << slots_log2, words), np.uint64)
        self._set_slots(slots_log2)

    def _set_slots(self, log2: int) -> None:
        self._log2, self._shift = log2, np.uint64(WORD - log2)
        self._slots = np.full(1 << log2, -1, np.int32)

    @property
    def states(self) -> Words:
        """The known states: a view, good until the next `tail`."""
        return self._rows[: self.n]

    def close(self) -> Words:
        """Give up the table, and return the known states in memory of their own size."""
        self._slots = np.empty(0, np.int32)
        return self.states.copy()

    def tail(self, m: int) -> Words:
        """Room for `m` candidates, to be filled before `intern(m)`."""
        need = self.n + m
        if need > len(self._rows):
            more = np.empty((max(need, len(self._rows) * 3 // 2), self.words), np.uint64)
            more[: self.n] = self._rows[: self.n]
            self._rows = more
        return self._rows[self.n : need]

    def intern(self, m: int) -> Numbers:
        """Numbers of the `m` candidates in `tail(m)`; the new ones among them join the set in their order."""
        self._make_room(m)
        known = self.n
        found, home = self._resolve(known, m)
        new = where(found >= known)
        equal_to = found.take(new) - known
        first = new[equal_to == new]
        self.n = known + len(first)
        self._rows[known : self.n] = self._rows[known : known + m].take(first, axis=0)
        final = np.arange(known, self.n)
        self._slots[home.take(first)] = final
        number = np.empty(m, np.int64)
        number[first] = final
        found[new] = number.take(equal_to)
        return found

    def _make_room(self, m: int) -> None:
        """At most a third of the slots are taken, or half if all `m` candidates are new."""
        log2 = self._log2
        while (1 << log2) < 3 * self.n + 2 * m:
            log2 += 2 if log2 < 22 else 1
        if log2 == self._log2:
            return
        self._set_slots(log2)
        step = 1 << 16
        for low in range(0, self.n, step):
            self._resolve(low, min(step, self.n - low))

    def _resolve(self, base: int, m: int) -> tuple[Numbers, Numbers]:
        """For the rows `base : base + m`, the first equal row that the table knows, and the slot it is in.

        A row that the table does not know goes into an empty slot; of several that want one slot the first
        gets it, as numbers are stored last to first.
        """
        rows, slots = self._rows, self._slots
        mine = rows[base : base + m]
        at = (hash_words(mine, self.multipliers) >> self._shift).view(np.int64)
        found, home = np.empty(0, np.int64), at
        todo: Numbers | None = None
        while True:
            there = slots.take(at).astype(np.int64)
            empty = where(there < 0)
            if len(empty):
                wanted = at.take(empty)
                claim = base + (empty if todo is None else todo.take(empty))
                slots[wanted[::-1]] = claim[::-1]
                there[empty] = slots.take(wanted)
            wrong = where(differ(rows.take(there, axis=0), mine))
            if todo is None:
                found = there
            else:
                found[todo], home[todo] = there, at
            if not len(wrong):
                return found, home
            at = (at.take(wrong) + 1) & (len(slots) - 1)
            mine = mine.take(wrong, axis=0)
            todo = wrong if todo is None else todo.take(wrong)


class Column:
    """A numpy array that grows by appending elements of a `shape`; `first` starts it with a zero."""

    __slots__ = ("_full", "n")

    def __init__(self, dtype: Any, *shape: int, first: bool = False) -> None:
        self._full = np.zeros((256, *shape), dtype)
        self.n = int(first)

    def extend(self, values: Any) -> None:
        """Add elements."""
        end = self.n + len(values)
        if end > len(self._full):
            more = np.zeros((2 * end, *self._full.shape[1:]), self._full.dtype)
            more[: self.n] = self.a
            self._full = more
        self._full[self.n : end] = values
        self.n = end

    @property
    def a(self) -> Any:
        """The elements so far: a view."""
        return self._full[: self.n]


class Lookup:
    """Keys, each in a place (a number), in one open-addressing table of row numbers; 0 is no row.

    There are at least `2 ** spare` slots a key, so that nearly all are found where they are first looked for.
    """

    def __init__(self, words: int, spare: int = 4) -> None:
        self.keys, self.places = Column(np.uint64, words, first=True), Column(np.int64, first=True)
        self.spare = spare
        self._set_size(spare + 8)

    def _set_size(self, log2: int) -> None:
        self._log2, self._shift = log2, np.uint64(WORD - log2)
        self._slots, self._settled = np.zeros(1 << log2, np.int32), 1

    def _hash(self, keys: Words, places: Numbers) -> Words:
        h = hash_words(keys)
        h += places.view(np.uint64) * np.uint64(MULTIPLIERS[-1])
        return h

    def _spots(self, keys: Words, places: Numbers) -> Numbers:
        h = self._hash(keys, places)
        h >>= self._shift
        return h.view(np.int64)

    def find(self, keys: Words, places: Numbers) -> NDArray[np.int32]:
        """The row of each key in its place, 0 for none; `keys` has one axis more than `places`: the words."""
        spots = self._spots(keys, places)
        row = self._slots.take(spots)
        bad = where(self._other(row, keys, places))
        if len(bad):  # follow collisions
            flat, keys, places = row.reshape(-1), keys.reshape(-1, keys.shape[-1]), places.reshape(-1)
            keys, places, spots = keys.take(bad, axis=0), places.take(bad), spots.reshape(-1).take(bad)
            while len(bad):
                spots = (spots + 1) & (len(self._slots) - 1)
                here = flat[bad] = self._slots.take(spots)
                go = where(self._other(here, keys, places))
                bad, keys, places, spots = (
                    bad.take(go),
                    keys.take(go, axis=0),
                    places.take(go),
                    spots.take(go),
                )
        return row

    def apart(self, keys: Words, places: Numbers) -> Numbers:
        """Indices of some of the keys, no two of them the same in one place; nearly one of each kind."""
        first: Numbers = np.unique(self._hash(keys, places), return_index=True)[1]
        return first

    def _other(self, row: Any, keys: Words, places: Numbers) -> NDArray[np.bool_]:
        """Where there is a row, but of another key or place."""
        other = differ(self.keys.a.take(row, axis=0), keys)
        other |= self.places.a.take(row) != places
        other &= row != 0
        return other

    def extend(self, keys: Any, places: Any) -> None:
        """Give the next row numbers to new keys in their places."""
        self.keys.extend(keys)
        self.places.extend(places)
        log2 = self._log2
        while self.keys.n << self.spare > 1 << log2:
            log2 += 2
        if log2 != self._log2:
            self._set_size(log2)
        rows = np.arange(self._settled, self.keys.n)
        self._settled = self.keys.n
        spots = self._spots(self.keys.a.take(rows, axis=0), self.places.a.take(rows))
        while len(rows):
            free = where(self._slots.take(spots) == 0)
            self._slots[spots.take(free)] = rows.take(free)
            left = where(self._slots.take(spots) != rows)
            rows, spots = rows.take(left), (spots.take(left) + 1) & (len(self._slots) - 1)

"""Learned rows as arrays: for a whole frontier at once, which row applies to each (actor, state).

The rows are those of `step.Learner`; this is the same knowledge, laid out for gathering.  Each footprint of a table
is a place; a row's key is the state masked to its footprint, looked up in the table's places one after the other,
and remembered for all states that agree in every footprint of the table.  Keys are compared whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..model.state import WORD
from ..model.step import Learner, Row, Table
from .dedup import Column, Lookup, Numbers, Words, where
from .graph import Label, joined

INSIDE, MOVES = 1, 2  # row flags, to be or-ed over the actors: inside an operation; inside and able to move
ASKED = 64  # states for which the learner is asked before the others are looked up again


def split(states: Iterable[int], words: int) -> Words:
    """Packed states (or masks, which may be negative) as rows of 64-bit words, low to high."""
    size, all_bits = WORD // 8 * words, (1 << WORD * words) - 1
    data = b"".join((x & all_bits).to_bytes(size, "little") for x in states)
    return np.frombuffer(data, np.dtype("<u8")).astype(np.uint64, copy=False).reshape(-1, words)


class Edges(NamedTuple):
    """Edges out of some states, ordered by (source, actor, choice); `source` counts within those states."""

    source: Numbers
    actor: Numbers
    outcome: Numbers


class Places:
    """The rows of several tables, numbered from 1 as they are taken over; 0 is no row."""

    def __init__(self, words: int, tables: int) -> None:
        self.words = words
        self.first = np.zeros(tables, np.int64)  # by table: its first place; 0 for none
        self.masks, self.next = Column(np.uint64, words, first=True), Column(np.int64, first=True)
        self.lookup = Lookup(words)
        self.union = np.zeros((tables, words), np.uint64)  # by table: of all its footprints
        self.short, self.row = Lookup(words), Column(np.int32, first=True)  # rows by what the union selects
        self._taken: dict[int, list[tuple[int, int]]] = {}  # by table: its places, and the rows had of each

    def take_over(self, tables: Iterable[tuple[int, Table]]) -> list[tuple[int, Row]]:
        """Number the rows that these tables have learned since last time; returns them, with their tables."""
        keys: list[int] = []
        places: list[int] = []
        new: list[tuple[int, Row]] = []
        for t, table in tables:
            taken = self._taken.setdefault(t, [])
            for k, (mask, rows) in enumerate(table.footprints):
                if k == len(taken):
                    taken.append((self._append(t, mask, taken), 0))
                place, had = taken[k]
                more = list(rows.items())[had:]
                taken[k] = place, had + len(more)
                keys += [key for key, _ in more]
                places += [place] * len(more)
                new += [(t, row) for _, row in more]
        self.lookup.extend(split(keys, self.words), places)
        return new

    def _append(self, t: int, mask: int, taken: list[tuple[int, int]]) -> int:
        place = self.masks.n
        self.masks.extend(split([mask], self.words))
        self.next.extend([0])
        if taken:
            self.next.a[taken[-1][0]] = place
        else:
            self.first[t] = place
        self.union[t] |= self.masks.a[place]
        return place

    def find(self, tables: Numbers, states: Words) -> NDArray[np.int32]:
        """Numbers of the rows that fit `states`, 0 for none, in `tables` of shape (some, len(states)).

        Where a new footprint widens the union, what is remembered stays true of whatever it matches.
        """
        keys = self.union.take(tables, axis=0)
        keys &= states
        row: NDArray[np.int32] = self.row.a.take(self.short.find(keys, tables))
        new = where(row == 0)
        if len(new):
            tables, keys = tables.reshape(-1).take(new), keys.reshape(-1, self.words).take(new, axis=0)
            one = self.short.apart(keys, tables)
            found = self._one_by_one(tables.take(one), states.take(new.take(one) % len(states), axis=0))
            known = where(found)
            one = one.take(known)
            self.short.extend(keys.take(one, axis=0), tables.take(one))
            self.row.extend(found.take(known))
            row.reshape(-1)[new] = self.row.a.take(self.short.find(keys, tables))
        return row

    def _one_by_one(self, tables: Numbers, states: Words) -> NDArray[np.int32]:
        """Rows of a table each for some states, looked for in one footprint after the other."""
        row, at = np.zeros(len(states), np.int32), self.first.take(tables)
        left = where(at)
        at = at.take(left)
        while len(left):
            keys = self.masks.a.take(at, axis=0)
            keys &= states.take(left, axis=0)
            row[left] = found = self.lookup.find(keys, at)
            at = np.where(found == 0, self.next.a.take(at), 0)
            go = where(at)
            left, at = left.take(go), at.take(go)
        return row


class Rows:
    """All rows learned so far, of all actors.

    `count`, `first` and `flags` are by row number; `keep`, `put`, `label` and `over` (nothing follows) are by
    outcome: those of row r are `first[r] : first[r] + count[r]`.  Nothing follows a violation of `shun`.
    """

    def __init__(self, learner: Learner, shun: str | None = None) -> None:
        self.learner, self.shun, self.words = learner, shun, learner.model.layout.words
        self.actors = len(learner.pc)
        self.tables = [table for tables in learner.tables for table in tables]
        self.base = [sum(map(len, learner.tables[:a])) for a in range(self.actors)]
        self.places = Places(self.words, len(self.tables))
        self.count, self.first = Column(np.int32, first=True), Column(np.int64, first=True)
        self.flags = Column(np.uint8, first=True)
        self.keep, self.put = Column(np.uint64, self.words), Column(np.uint64, self.words)
        self.label, self.over = Column(np.int16), Column(np.bool_)
        self.labels: dict[Label, int] = {}
        self.most, self.any_over = 1, False
        self._take_over(range(len(self.tables)))

    def find(self, states: Words) -> NDArray[np.int32]:
        """Row numbers, shape (actors, n), for `states`; runs steps for those that nobody has met yet."""
        n = len(states)
        tables = np.empty((self.actors, n), np.int64)
        for a, cell in enumerate(self.learner.pc):
            if not cell.mask:  # a program of one instruction needs no bits
                tables[a] = self.base[a]
                continue
            pc = states[:, cell.shift // WORD] >> np.uint64(cell.shift % WORD)
            pc &= np.uint64(cell.mask >> cell.shift)
            np.add(pc.view(np.int64), self.base[a], out=tables[a])
        row = self.places.find(tables, states)
        flat = row.reshape(-1)
        unknown = where(flat == 0)
        while len(unknown):
            for k in unknown[:: len(unknown) // ASKED + 1].tolist():
                self.learner.outcomes(k // n, joined(states[k % n]))
            wanted = tables.take(unknown)
            self._take_over(np.unique(wanted).tolist())
            found = flat[unknown] = self.places.find(wanted[None], states.take(unknown % n, axis=0))[0]
            unknown = unknown.take(where(found == 0))
        return row

    def _take_over(self, tables: Iterable[int]) -> None:
        new = self.places.take_over((t, self.tables[t]) for t in tables)
        outcomes = [out for _, row in new for out in row]
        counts = [len(row) for _, row in new]
        self.first.extend(self.keep.n + np.cumsum([0, *counts[:-1]])[: len(new)])
        self.count.extend(counts)
        self.flags.extend([0 if self.tables[t].idle else INSIDE | MOVES * bool(row) for t, row in new])
        self.keep.extend(split((out.keep for out in outcomes), self.words))
        self.put.extend(split((out.put for out in outcomes), self.words))
        self.label.extend([self.labels.setdefault(Label(*out[2:]), len(self.labels)) for out in outcomes])
        over = [out.fatal or self.shun in out.violations for out in outcomes]
        self.over.extend(over)
        self.most = max(self.most, *counts, 0)
        self.any_over = self.any_over or any(over)

    def edges(self, row: NDArray[np.int32]) -> Edges:
        """The edges that the rows (actors, n) stand for."""
        flat = row.T.ravel()
        count = self.count.a.take(flat)
        at = where(count != 0)
        outcome = self.first.a.take(flat.take(at))
        if self.most > 1 and len(at):
            at, outcome = _fan_out(at, outcome, count.take(at), self.most)
        source = at // self.actors
        return Edges(source, at - source * self.actors, outcome)

    def successors(self, states: Words, source: Numbers, outcome: Numbers, out: Words) -> None:
        """Write into `out` the states that `outcome` makes of `states[source]`."""
        np.take(states, source, axis=0, out=out, mode="clip")  # "clip" only because "raise" would buffer
        out &= self.keep.a.take(outcome, axis=0)
        out |= self.put.a.take(outcome, axis=0)


def _fan_out(at: Numbers, outcome: Numbers, count: NDArray[np.int32], most: int) -> tuple[Numbers, Numbers]:
    """Repeat each place `count` times, its outcomes counting up; several times faster than np.repeat."""
    end = np.cumsum(count)
    begin = end - count
    wide_at, wide_outcome = np.empty(end[-1], np.int64), np.empty(end[-1], np.int64)
    wide_at[begin], wide_outcome[begin] = at, outcome
    more = np.arange(len(at))
    for choice in range(1, most):
        more = more[count.take(more) > choice]
        to = begin.take(more) + choice
        wide_at[to], wide_outcome[to] = at.take(more), outcome.take(more) + choice
    return wide_at, wide_outcome


class QuietRows:
    """What the model's quiet watch finds, by state: the numbers are indices into `found`; 0 is nothing."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.places = Places(learner.model.layout.words, 1)
        self.number = Column(np.int64, first=True)
        self.found: list[tuple[tuple[str, ...], tuple[str, ...]]] = [((), ())]
        self._take_over()

    def find(self, states: Words) -> Numbers:
        """Number of what is found in each of the quiet `states`; runs the watch where nobody has yet."""
        table = np.zeros((1, len(states)), np.int64)
        while True:
            row = self.places.find(table, states)[0]
            unknown = where(row == 0)
            if not len(unknown):
                numbers: Numbers = self.number.a.take(row)
                return numbers
            for k in unknown[:: len(unknown) // ASKED + 1].tolist():
                self.learner.quiet(joined(states[k]))
            self._take_over()

    def _take_over(self) -> None:
        for _, (out,) in self.places.take_over([(0, self.learner.quiet_table)]):
            if out[2:4] not in self.found:
                self.found.append(out[2:4])
            self.number.extend([self.found.index(out[2:4])])

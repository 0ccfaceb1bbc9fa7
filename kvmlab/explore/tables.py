"""Learned rows as arrays: for a whole frontier at once, which row applies to each (actor, state).

The rows are those of `step.Learner`; this is the same knowledge, laid out for gathering.  A row's key is the
state masked to the footprint of its (actor, pc), the bits of the pc included, so that keys of one actor never
mean two things.  Each actor has a region of one open-addressing table; keys are compared whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..model.state import WORD
from ..model.step import Learner, Outcome
from .dedup import Column, Lookup, Numbers, Words
from .graph import Label, joined

INSIDE, MOVES = 1, 2  # row flags, to be or-ed over the actors: inside an operation; inside and able to move
LOW = (1 << WORD) - 1


def split(x: int, words: int) -> list[int]:
    """The 64-bit words of a packed state, low to high."""
    return [x >> (WORD * w) & LOW for w in range(words)]


class Edges(NamedTuple):
    """Edges out of some states, ordered by (source, actor, choice); `source` counts within those states."""

    source: Numbers
    actor: Numbers
    outcome: Numbers


class Rows:
    """All rows learned so far, of all actors.

    `count`, `first` and `flags` are by row number; `keep`, `put`, `label` and `fatal` are by outcome:
    those of row r are `first[r] : first[r] + count[r]`.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner, self.words = learner, learner.model.layout.words
        self.actors = len(learner.pc)
        sizes = [(cell.mask >> cell.shift) + 1 for cell in learner.pc]
        self.base = [sum(sizes[:a]) for a in range(self.actors)]
        self.masks = np.zeros((sum(sizes), self.words), np.uint64)
        for cell, base, size in zip(learner.pc, self.base, sizes, strict=True):
            self.masks[base : base + size] = split(cell.mask, self.words)
        self.lookup = Lookup(self.actors, self.words)
        self.count, self.first = Column(np.int32, first=True), Column(np.int64, first=True)
        self.flags = Column(np.uint8, first=True)
        self.keep, self.put = Column(np.uint64, self.words), Column(np.uint64, self.words)
        self.label, self.fatal = Column(np.int16), Column(np.bool_)
        self.labels: dict[Label, int] = {}
        self.most, self.any_fatal = 1, False
        self._take_over()

    def _take_over(self) -> None:
        """Start from what the learner knows already."""
        for a, (cell, tables) in enumerate(zip(self.learner.pc, self.learner.tables, strict=True)):
            for pc, table in enumerate(tables):
                place = self.base[a] + pc
                self.masks[place] = split(table.mask | cell.mask, self.words)
                for key, outcomes in table.rows.items():
                    self._append(a, split(key | pc << cell.shift, self.words), table.idle, outcomes)
        self.lookup.settle()

    def find(self, states: Words) -> NDArray[np.int32]:
        """Row numbers, shape (actors, n), for `states`; runs steps for those that nobody has met yet."""
        at = np.empty((self.actors, len(states)), np.int64)
        for a, cell in enumerate(self.learner.pc):
            if not cell.mask:  # a program of one instruction needs no bits
                at[a] = self.base[a]
                continue
            pc = states[:, cell.shift // WORD] >> np.uint64(cell.shift % WORD)
            pc &= np.uint64(cell.mask >> cell.shift)
            np.add(pc.view(np.int64), self.base[a], out=at[a])
        while True:
            keys = self.masks.take(at, axis=0)
            keys &= states
            row, missing = self.lookup.find(keys)
            if not len(missing):
                return row
            self._learn(missing, states)

    def _learn(self, places: Numbers, states: Words) -> None:
        """Learn a row for each flat (actor, state) place.

        Where this widens a footprint, rows with the narrower key stay: whatever they match, they are true of.
        """
        for k in places.tolist():
            a, i = divmod(k, len(states))
            x = joined(states[i])
            outcomes = self.learner.outcomes(a, x)
            cell = self.learner.pc[a]
            pc = (x & cell.mask) >> cell.shift
            table, place = self.learner.tables[a][pc], self.base[a] + pc
            self.masks[place] = split(table.mask | cell.mask, self.words)
            self._append(a, states[i] & self.masks[place], table.idle, outcomes)
        self.lookup.settle()

    def _append(self, a: int, key: Any, idle: bool, outcomes: Sequence[Outcome]) -> None:
        self.lookup.append(key, a)
        self.count.append(len(outcomes))
        self.first.append(self.keep.n)
        self.flags.append(0 if idle else INSIDE | MOVES * bool(outcomes))
        self.most = max(self.most, len(outcomes))
        for out in outcomes:
            self.keep.append(split(out.keep, self.words))
            self.put.append(split(out.put, self.words))
            self.label.append(self.labels.setdefault(Label(*out[2:]), len(self.labels)))
            self.fatal.append(out.fatal)
            self.any_fatal = self.any_fatal or out.fatal

    def edges(self, row: NDArray[np.int32]) -> Edges:
        """The edges that the rows (actors, n) stand for."""
        flat = row.T.ravel()
        count = self.count.a.take(flat)
        at = np.flatnonzero(count != 0)
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
        self.learner, self.words = learner, learner.model.layout.words
        self.mask = np.zeros(self.words, np.uint64)
        self.lookup = Lookup(1, self.words)
        self.number = Column(np.int64, first=True)
        self.found: list[tuple[tuple[str, ...], tuple[str, ...]]] = [((), ())]

    def find(self, states: Words) -> Numbers:
        """Number of what is found in each of the quiet `states`; runs the watch where nobody has yet."""
        while True:
            row, missing = self.lookup.find((states & self.mask)[None])
            if not len(missing):
                numbers: Numbers = self.number.a.take(row[0])
                return numbers
            self._learn(states.take(missing, axis=0))

    def _learn(self, states: Words) -> None:
        for state in states:
            found = self.learner.quiet(joined(state))
            self.mask[:] = split(self.learner.quiet_table.mask, self.words)
            self.lookup.append(state & self.mask, 0)
            if found not in self.found:
                self.found.append(found)
            self.number.append(self.found.index(found))
        self.lookup.settle()

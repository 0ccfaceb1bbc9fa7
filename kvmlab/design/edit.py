"""Designs side by side, and a statement moved up or down: what the editor and `kvmlab diff` need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from difflib import SequenceMatcher
from typing import TypeAlias

from . import calls
from .rows import spelled
from .tree import INDENT, Body, Node, Where, as_written, branch_of, shown, with_branch

Nodes: TypeAlias = tuple[Node, ...]
Aligned: TypeAlias = tuple[str, str | None, str | None]  # mark, left line, right line


def shown_lines(nodes: Nodes) -> tuple[str, ...]:
    """The lines of a section as written, indented afresh."""
    return tuple(INDENT * line.depth + line.text for line in shown(nodes, as_written))


def align(left: Nodes, right: Nodes) -> Iterator[Aligned]:
    """The lines of two sections side by side: " " in both, "-" only left, "+" only right.

    Lines are the same when their canonical spelling and depth are: comments, aliases and arguments that carry
    no meaning make no difference.
    """
    a, b = shown_lines(left), shown_lines(right)
    keys = [[(line.depth, line.text) for line in shown(nodes, spelled)] for nodes in (left, right)]
    for tag, i, j, k, m in SequenceMatcher(a=keys[0], b=keys[1], autojunk=False).get_opcodes():
        if tag == "equal":
            yield from ((" ", x, y) for x, y in zip(a[i:j], b[k:m], strict=True))
        else:
            yield from (("-", x, None) for x in a[i:j])
            yield from (("+", None, y) for y in b[k:m])


def hunks(lines: list[Aligned], context: int = 2) -> Iterator[str]:
    """The lines that differ with some around them; "..." stands for what is left out between."""
    near = {
        k for i, (mark, _, _) in enumerate(lines) if mark != " " for k in range(i - context, i + context + 1)
    }
    previous = -1
    for i, (mark, left, right) in enumerate(lines):
        if i not in near:
            continue
        if i > previous + 1 and previous >= 0:
            yield "  ..."
        previous = i
        yield f"{mark} {left if left is not None else right}"


def move(nodes: Nodes, line_index: int, step: int) -> tuple[Nodes, int]:
    """Move the statement shown at a line past its neighbour; the new statements and its new line.

    `step` is 1 or -1.  An `if` moves with what it governs and is stepped over whole.  The body of a `call():`
    that only spells out the call is open: a statement leaves it at its end, and enters it from outside; the
    only one in it takes it along.
    """
    line = list(shown(nodes, as_written))[line_index]
    moved, where, index = _step(nodes, line.where, line.index, step)
    return moved, line_index if moved is nodes else _line_of(moved, where, index)


def stuck(nodes: Nodes, line_index: int, step: int) -> str:
    """Why the statement shown at a line cannot move up (`step` -1) or down (1); empty if it can."""
    moved = move(nodes, line_index, step)[0]
    if moved != nodes:
        return ""
    lines = list(shown(nodes, as_written))
    line, way = lines[line_index], "up" if step < 0 else "down"
    if moved is not nodes:
        return f"{line.text} moved {way} changes nothing: the line there is the same."
    where = line.where
    while where and _is_open(_at(nodes, where[:-1])[where[-1][0]]):
        where = where[:-1]
    if not where:
        return f"{line.text} cannot move {way}: it is the {'first' if step < 0 else 'last'} of its section."
    holder = next(other for other in reversed(lines[:line_index]) if len(other.where) < len(line.where))
    name = holder.text.removesuffix(":")
    mover = f"{name}, and" if not name.startswith("else") else "the if, and"
    return f"{line.text} cannot move {way}: it stays inside {name}. Move {mover} it goes along."


def _step(nodes: Nodes, where: Where, index: int, step: int) -> tuple[Nodes, Where, int]:
    """One step of the statement at `index` of the list at `where`; the same `nodes` if it cannot move."""
    siblings = _at(nodes, where)
    if 0 <= index + step < len(siblings):
        return _pass(nodes, where, index, step)
    if not where or not _is_open(_at(nodes, where[:-1])[where[-1][0]]):
        return nodes, where, index
    if len(siblings) == 1:
        nodes, outer, at = _step(nodes, where[:-1], where[-1][0], step)
        return nodes, (*outer, (at, "body")), 0
    return _leave(nodes, where, index, step)


def _pass(nodes: Nodes, where: Where, index: int, step: int) -> tuple[Nodes, Where, int]:
    """Past (or, if it is open, into) the next statement of the same list."""
    siblings, first = _at(nodes, where), min(index, index + step)
    mine, other = siblings[index], siblings[index + step]
    pair: Nodes = (other, mine) if step > 0 else (mine, other)
    to, now = where, index + step
    if isinstance(other, Body) and _is_open(other):
        body = (mine, *other.body) if step > 0 else (*other.body, mine)
        pair, to = (replace(other, body=body),), (*where, (first, "body"))
        now = 0 if step > 0 else len(body) - 1
    return _edit(nodes, where, lambda old: (*old[:first], *pair, *old[first + 2 :])), to, now


def _leave(nodes: Nodes, where: Where, index: int, step: int) -> tuple[Nodes, Where, int]:
    """Out of an open body, in which others stay."""
    outer, (at, _) = where[:-1], where[-1]
    holder, body = _at(nodes, outer)[at], _at(nodes, where)
    left = with_branch(holder, "body", (*body[:index], *body[index + 1 :]))
    pair = (left, body[index]) if step > 0 else (body[index], left)
    now = at + 1 if step > 0 else at
    return _edit(nodes, outer, lambda old: (*old[:at], *pair, *old[at + 1 :])), outer, now


def _is_open(node: Node) -> bool:
    if not isinstance(node, Body):
        return False
    return not calls.keeps_body(node.head.name)


def _at(nodes: Nodes, where: Where) -> Nodes:
    for index, branch in where:
        nodes = branch_of(nodes[index], branch)
    return nodes


def _edit(nodes: Nodes, where: Where, change: Callable[[Nodes], Nodes]) -> Nodes:
    if not where:
        return change(nodes)
    (index, branch), rest = where[0], where[1:]
    inner = _edit(branch_of(nodes[index], branch), rest, change)
    return (*nodes[:index], with_branch(nodes[index], branch, inner), *nodes[index + 1 :])


def _line_of(nodes: Nodes, where: Where, index: int) -> int:
    lines = shown(nodes, as_written)
    return next(n for n, line in enumerate(lines) if (line.where, line.index) == (where, index))

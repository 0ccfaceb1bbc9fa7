"""A run as a race diagram, as kernel developers draw them in mails: ASCII, a column a CPU, an event a line."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

from ..design.calls import CALLS, with_role
from ..kernel.locks import SPINNING, UNDO
from ..machine.properties import BY_NAME, MEASURES
from .run import Event, Run

WIDTH = 75  # columns of a diagram: it is pasted into mails
_OF_MMU_LOCK = [call for call in CALLS if call.lock in SPINNING]
TAKES = tuple(f"{call.name}({call.lock}" for call in _OF_MMU_LOCK if call.step in UNDO)
DROPS = tuple(f"{call.name}({call.lock}" for call in _OF_MMU_LOCK if call.step in UNDO.values())
OPENS, CLOSES = with_role("opens"), with_role("closes")


def diagram(run: Run, code: str, width: int = WIDTH) -> str:
    """Draw a run: a column a CPU, one event a line, calls under mmu_lock indented, the verdict and its code last."""
    return "\n".join([*_drawn(run, width), *_folded(code, width)])


def _drawn(run: Run, width: int) -> list[str]:
    """The lines of a diagram above its code."""
    events = [frame.event for frame in run.frames if frame.event is not None]
    acting = [a for a in run.case.model.actors if any(e.actor == a.key for e in events)]
    at = _columns(len(acting), width)
    title = f"{run.case} (a model, not hardware)".encode("ascii", "backslashreplace").decode()
    lines = [*textwrap.wrap(title, width), ""]
    heads = [f"{a.key} ({a.role})" for a in acting]
    room = [(at[n + 1] if n + 1 < len(at) else width + 1) - at[n] - 1 for n in range(len(at))]
    heads = [h if len(h) <= r else h.split(" (")[0] for h, r in zip(heads, room, strict=True)]
    lines.append(_row(list(zip(at, heads, strict=True))))
    lines.append(_row([(a, "-" * len(h)) for a, h in zip(at, heads, strict=True)]))
    depth = dict.fromkeys((a.key for a in acting), 0)
    column = {a.key: c for a, c in zip(acting, at, strict=True)}
    for n, event in enumerate(events):
        if n == run.cycle:
            lines.append(_rule("repeats for ever", width))
        lines += _event(event, column[event.actor], depth, width)
        for reason in run.violations(n + 1)[len(event.text.violations) :]:  # those of the state itself
            lines += textwrap.wrap(f"!! {reason}", width, subsequent_indent="   ")
    lines += ["", *_closing(run, width)]
    return [line.rstrip() for line in lines]


class _Word(NamedTuple):
    text: str
    column: int
    first: bool  # of its line


_DRAWN = re.compile(
    r"^\s*=> |\(a\s+model,\s+not\s+hardware\)|\d+\s+steps?,\s+\d+\s+switch", re.M
)  # what only a diagram has: its title, its verdict, its size


def difference(run: Run, pasted: Sequence[str]) -> str:
    """How a pasted diagram differs from the run, in words; empty if it does not, or if there is no diagram.

    `pasted` are the lines of the mail above the code.  The mail may have indented the diagram or broken its lines;
    otherwise every word has to stand in its column.
    """
    if not _DRAWN.search("\n".join(pasted)):
        return ""
    found, drawn = list(_words(pasted)), _drawn(run, WIDTH)
    if _same(list(_words(drawn)), found):
        return ""
    as_said = _spoken(_words(drawn))
    if as_said == _spoken(found[-len(as_said) :]):  # then it may have been drawn at another width
        for width in range(40, 121):
            if _same(list(_words(_drawn(run, width))), found):
                return ""
    plain = [[" ".join(line.split()) for line in lines if line.strip()] for lines in (drawn, pasted)]
    told = ["the pasted diagram is not what its code replays"]
    for tag, i, j, k, m in SequenceMatcher(a=plain[0], b=plain[1], autojunk=False).get_opcodes():
        if tag != "equal" and (j > i or i):  # what stands before the diagram is no part of it
            told += [f"  pasted:  {ascii(line)[1:-1]}" for line in plain[1][k:m][:1]]
            told += [f"  the run: {line}" for line in plain[0][i:j][:1]]
            break
    return "\n".join(told)


def _spoken(words: Iterable[_Word]) -> list[str]:
    """The words without their columns, and without the dashes of a rule, whose number depends on the width."""
    return [word.text.rstrip("-") for word in words]


def _words(lines: Sequence[str]) -> Iterator[_Word]:
    for line in lines:
        for n, match in enumerate(re.finditer(r"\S+", line.expandtabs())):
            yield _Word(match[0], match.start(), n == 0)


def _same(drawn: Sequence[_Word], pasted: Sequence[_Word]) -> bool:
    """Whether the pasted words end with the drawn ones, each in its column, unless a mail broke its line."""
    pasted = pasted[-len(drawn) :]
    if len(pasted) < len(drawn):
        return False
    broken = False
    for mine, theirs in zip(drawn, pasted, strict=True):
        if theirs.first:
            broken = not mine.first and theirs.column <= pasted[0].column
        moved = theirs.column - pasted[0].column != mine.column
        if theirs.text != mine.text or (mine.first and not theirs.first) or (moved and not broken):
            return False
    return True


def _columns(n: int, width: int) -> list[int]:
    """Where each column starts; lines may run on to the right, since each holds one event."""
    step = {0: 0, 1: 0, 2: 37, 3: 27, 4: 19}.get(n, max(8, width // max(n, 1)))
    return [i * step for i in range(n)]


def _row(placed: Sequence[tuple[int, str]]) -> str:
    line = ""
    for at, text in placed:
        line = line.ljust(at) + text
    return line


def _rule(text: str, width: int) -> str:
    return f"---- {text} ".ljust(width, "-")


def _event(event: Event, at: int, depth: dict[str, int], width: int) -> list[str]:
    """The lines of one event, wrapped into the room right of its column."""
    if event.call.startswith(DROPS):
        depth[event.actor] = max(0, depth[event.actor] - 2)
    indent = depth[event.actor]
    if event.call.startswith(TAKES) and "[waits]" not in event.notes:
        depth[event.actor] += 2
    parts = describe(event)
    out: list[str] = []
    for n, part in enumerate(parts):
        hang = 2 if n else 0
        first, rest = " " * (at + indent + hang), " " * (at + indent + hang + 2)
        out += textwrap.wrap(
            part, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
        )
    return out


def describe(event: Event) -> list[str]:
    """An event in words: the call, then what came of it; violations stand out with `!!`."""
    call = event.call
    if call.startswith(OPENS):
        call += "  [window opens]"
    elif call.startswith(CLOSES):
        call += "  [window closes]"
    told = [f"!! {note}" if note.split(":")[0] in BY_NAME else note for note in event.notes]
    plain = [note for note in told if not note.startswith("!!")]
    loud = [note for note in told if note.startswith("!!")]
    if not call:
        return [*plain, *loud] or ["(nothing)"]
    if len(plain) == 1 and len(call) + len(plain[0]) < 34:
        return [f"{call}  {plain[0]}", *loud]
    return [call, *plain, *loud]


def _closing(run: Run, width: int) -> list[str]:
    plural = "" if run.switches == 1 else "es"
    size = f"{run.steps} steps, {run.switches} switch{plural}"
    if run.cycle is not None:
        size += f", the last {run.steps - run.cycle} repeat for ever"
    if run.why in BY_NAME:
        what = f"{run.why}: {BY_NAME[run.why].sentence}"
    elif run.why in MEASURES:
        what = f"{run.why}: {MEASURES[run.why]}"
    else:
        what = ", ".join(run.violated) or "a run in which nothing is violated"
    return textwrap.wrap(f"=> {what} ({size})", width, subsequent_indent="   ")


def _folded(code: str, width: int) -> list[str]:
    """The code in lines; none begins with a slash, so that none looks like a path."""
    lines = []
    while code:
        at = width - 1 if code[width : width + 1] == "/" else width
        lines.append(code[:at])
        code = code[at:]
    return lines

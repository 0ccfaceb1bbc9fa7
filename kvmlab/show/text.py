"""Plain text: race diagrams as kernel developers draw them, verdicts, matrices.  ASCII, for terminals and mails."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, NamedTuple

from ..machine.properties import BY_NAME, MEASURES
from .machine import machine
from .told import broken, said

if TYPE_CHECKING:
    from ..model.step import Model
    from ..verdict.matrix import Matrix
    from ..verdict.report import Report
    from ..verdict.trace import Event, Trace

WIDTH = 75  # columns of a diagram: it is pasted into mails
TAKES, DROPS = ("write_lock(mmu", "read_lock(mmu"), ("write_unlock(mmu", "read_unlock(mmu")
OPENS, CLOSES = "kvm_mmu_invalidate_begin", "kvm_mmu_invalidate_end"


def diagram(trace: Trace, width: int = WIDTH) -> str:
    """Draw a run: a column a CPU, one event a line, calls under mmu_lock indented, the verdict and the code last."""
    return "\n".join([*_drawn(trace, width), *_folded(trace.code, width)])


def _drawn(trace: Trace, width: int) -> list[str]:
    """The lines of a diagram above its code."""
    events = [frame.event for frame in trace.frames if frame.event is not None]
    acting = [a for a in trace.case.model.actors if any(e.actor == a.key for e in events)]
    at = _columns(len(acting), width)
    title = f"{trace.case} (a model, not hardware)".encode("ascii", "backslashreplace").decode()
    lines = [*textwrap.wrap(title, width), ""]
    heads = [f"{a.key} ({a.role})" for a in acting]
    room = [(at[n + 1] if n + 1 < len(at) else width + 1) - at[n] - 1 for n in range(len(at))]
    heads = [h if len(h) <= r else h.split(" (")[0] for h, r in zip(heads, room, strict=True)]
    lines.append(_row(list(zip(at, heads, strict=True))))
    lines.append(_row([(a, "-" * len(h)) for a, h in zip(at, heads, strict=True)]))
    depth = dict.fromkeys((a.key for a in acting), 0)
    column = {a.key: c for a, c in zip(acting, at, strict=True)}
    for n, event in enumerate(events):
        if n == trace.cycle:
            lines.append(_rule("repeats for ever", width))
        lines += _event(event, column[event.actor], depth, width)
        for reason in broken(trace, n + 1)[len(said(event).broken) :]:  # what the state itself breaks
            lines += textwrap.wrap(f"!! {reason}", width, subsequent_indent="   ")
    lines += ["", *_closing(trace, width)]
    return [line.rstrip() for line in lines]


class _Word(NamedTuple):
    text: str
    column: int
    first: bool  # of its line


_DRAWN = re.compile(
    r"^\s*=> |\(a\s+model,\s+not\s+hardware\)|\d+\s+steps?,\s+\d+\s+switch", re.M
)  # what only a diagram has: its title, its verdict, its size


def misdrawn(trace: Trace, pasted: Sequence[str]) -> str:
    """How a pasted diagram, whose last lines these are, differs from the run; empty if it does not, or is none.

    A mail may have indented it and broken its lines; but for that every word has to stand in its column.
    """
    if not _DRAWN.search("\n".join(pasted)):
        return ""
    found, drawn = list(_words(pasted)), _drawn(trace, WIDTH)
    if _same(list(_words(drawn)), found):
        return ""
    as_said = _spoken(_words(drawn))
    if as_said == _spoken(found[-len(as_said) :]):  # then it may have been drawn at another width
        for width in range(40, 121):
            if _same(list(_words(_drawn(trace, width))), found):
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
    """The words alone; a rule is as long as a line."""
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


def _closing(trace: Trace, width: int) -> list[str]:
    plural = "" if trace.switches == 1 else "es"
    size = f"{trace.steps} steps, {trace.switches} switch{plural}"
    if trace.cycle is not None:
        size += f", the last {trace.steps - trace.cycle} repeat for ever"
    if trace.why in BY_NAME:
        what = f"{trace.why}: {BY_NAME[trace.why].sentence}"
    elif trace.why in MEASURES:
        what = f"{trace.why}: {MEASURES[trace.why]}"
    else:
        ended = dict.fromkeys(r.split(":")[0] for n in range(len(trace.frames)) for r in broken(trace, n))
        what = ", ".join(ended) or "a run in which nothing is violated"
    return textwrap.wrap(f"=> {what} ({size})", width, subsequent_indent="   ")


def _folded(code: str, width: int) -> list[str]:
    """The code in lines; none begins with a slash, so that none looks like a path."""
    lines = []
    while code:
        at = width - 1 if code[width : width + 1] == "/" else width
        lines.append(code[:at])
        code = code[at:]
    return lines


def report_text(report: Report) -> str:
    """Verdicts of one check: what can go wrong first, then what never does."""
    case = report.case
    done = "complete" if report.complete else "NOT complete"
    lines = [str(case), *(f"  ({note})" for note in case.design.notes)]
    lines.append(
        f"  {report.states:,} states, {report.transitions:,} transitions, depth {report.depth}, {done}"
    )
    for verdict in report.verdicts.values():
        if verdict.depth is not None:
            lines.append(f"  {verdict.verdict:<9} {verdict.name:<18} {_sentence(verdict.name)}")
    never = [v.name for v in report.verdicts.values() if v.verdict == "Never"]
    if never:
        lines += textwrap.wrap(
            "Never     " + ", ".join(never),
            75,
            initial_indent="  ",
            subsequent_indent=" " * 12,
            break_on_hyphens=False,
        )
    lines += [f"  Not seen  {name}" for name, seen in report.witnesses.items() if not seen]
    lines += [f"  Not checked: {what}" for what in report.not_checked]
    return "\n".join(lines)


def _sentence(name: str) -> str:
    text = BY_NAME[name].sentence
    return text if len(text) <= 46 else text[:44] + ".."


def comparison_text(reports: Sequence[Report]) -> str:
    """Designs down, violated properties across: S for Sometimes, A for Always, . for Never."""
    names = [p for p in BY_NAME if any(p in r.violated for r in reports)]
    left = max((len(r.case.design.name) for r in reports), default=6)
    lines = []
    for n, name in enumerate(names):
        lines.append(" " * (left + 2) + "  |" * n + "  " + name)
    lines.append("".ljust(left) + "  " + "  |" * len(names) + f"{'states':>11}")
    for r in reports:
        marks = "".join(
            "  " + {"Never": ".", "Sometimes": "S", "Always": "A"}.get(r.verdicts[name].verdict, "?")
            for name in names
        )
        lines.append(f"{r.case.design.name:<{left}}  {marks}{r.states:>11,}{'' if r.complete else ' +'}")
    lines.append("S some runs, A every run that finishes, . never")
    return "\n".join(lines)


def matrix_text(matrix: Matrix) -> str:
    """Scenarios down, designs across, and the states explored for each.  A screen a platform and backing."""
    lines: list[str] = []
    for platform, backing in dict.fromkeys((s.platform, s.backing) for s in matrix.squares):
        here = {
            (s.design, s.scenario): s
            for s in matrix.squares
            if (s.platform, s.backing) == (platform, backing)
        }
        designs = list(dict.fromkeys(design for design, _ in here))
        scenarios = list(dict.fromkeys(scenario for _, scenario in here))
        left = max(len(name) for name in [*scenarios, f"{platform}, {backing}"]) + 1
        lines.append("")
        for n, design in enumerate(designs):
            title = f"{platform}, {backing}" if n == 0 else ""
            lines.append(title.ljust(left) + "       |" * n + "       " + design)
        lines.append(" " * left + "       |" * len(designs) + "       states")
        for scenario in scenarios:
            row = [here[design, scenario] for design in designs]
            verdicts = "".join(f"{s.short}{'' if s.complete else '+'}".rjust(8) for s in row)
            lines.append(f"{scenario.ljust(left)}{verdicts}{sum(s.states for s in row):>13,}")
    total = sum(s.states for s in matrix.squares)
    done = all(s.complete for s in matrix.squares)
    checks = sum(not s.reason for s in matrix.squares)
    all_or_not = "all complete" if done else "NOT all complete (+)"
    lines.append("")
    lines += textwrap.wrap(matrix.legend, max(WIDTH, *map(len, lines)), break_on_hyphens=False)
    lines.append(f"{checks} checks, {total:,} states, {all_or_not}; ! in every run that finishes")
    return "\n".join(line.rstrip() for line in lines[1:])


def machine_text(model: Model, x: int) -> str:
    """The machine's table in one state: what each part holds, one line a part."""
    return "\n".join(
        f"{row.name:<12} {'  '.join(f'{k}={v}' if k else v for k, v in row.cells)}"
        for row in machine(model, x)
    )

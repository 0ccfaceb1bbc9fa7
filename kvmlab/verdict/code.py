"""A run as one short code, and the way back: a code replays the run that it was made of, or is refused.

    kvmlab:2:PLATFORM/SCENARIO[,KNOB...]/STEPS[/CLAIM]/DESIGN[~EDIT]@CHECK

KNOB is `in-place`, or a switch and its value, `preempt_count.no`.  STEPS: a letter an actor (a is the asking
CPU) and a count of its steps, or a letter, - and a choice; a dot where a cycle begins.  CLAIM is what the run
shows: the initials of a property, the name of a measure, `by-hand`; nothing where it is a sample.  A shipped
design stands as its name; any other as the shipped one nearest to it, the first digits of that one's digest,
and what was edited in it (`design/patch.py`).  CHECK is a digest of the design and of all that a replay shows of
the run, then one of the code's own characters.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from ..compile.scenario import InputError, NotApplicable
from ..design import Design, DesignError, shipped
from ..design.patch import DIGITS, patch_of, patched
from ..explore.liveness import EXIT, FAULT
from ..explore.paths import Schedule
from ..machine.properties import BY_NAME, MEASURES
from .trace import Case, ReplayError, Trace, changed, letter, options, parse_switches

PREFIX = "kvmlab:2:"
LONGEST_RUN = 10_000  # steps; a code that asks for more is refused
LONGEST_CODE = 100_000  # characters
RUN_DIGITS, TEXT_DIGITS = 8, 2  # of the check, 5 bits each
NO_CLAIM = ("sample", "by-hand")  # these say nothing that the run would have to show
INITIALS = {"".join(word[0] for word in name.split("-")): name for name in BY_NAME}
assert len(INITIALS) == len(BY_NAME) and not INITIALS.keys() & MEASURES.keys()

_SIGNS = r"[A-Za-z0-9_:/@,.~='()-]"  # those of version 1, too
_CODE = re.compile(
    r"kvmlab:2:(?P<platform>\w+)/(?P<scenario>[\w-]+)(?P<knobs>(?:,[\w.-]+)*)/(?P<steps>[a-z0-9.-]*)"
    r"(?:/(?P<claim>[\w-]+))?/(?P<design>[\w-]+)(?:~(?P<digest>[0-9a-f]{4})(?P<edit>\w+))?@(?P<check>\w+)"
)
_OLD = re.compile(
    r"kvmlab:1:(?P<platform>\w+)/(?P<scenario>[\w-]+)/(?P<backing>[\w-]+)(?P<switches>(?:,[\w=-]+)*)"
    r"/(?P<design>[\w.-]+(?=@)|~)[^/]*/[^/]*(?:/(?P<why>[\w-]+))?"
)
_TOKEN = re.compile(r"(?P<cycle>\.)|(?P<actor>[a-z])(?:-(?P<choice>\d{1,3})|(?P<count>[1-9]\d{0,5}))")


def encode(trace: Trace) -> str:
    """Write a trace as one code of letters, digits and `:/@,.~_-`: safe in a mail, a shell and a link."""
    case = trace.case
    knobs = ["in-place"] if case.backing == "in-place" else []
    knobs += [f"{name}.{value}" for name, value in changed(case.switches).items()]
    parts = [case.platform, ",".join([case.scenario, *knobs]), _steps(trace)]
    short = {name: initials for initials, name in INITIALS.items()}
    parts += [] if trace.why == "sample" else [short.get(trace.why, trace.why)]
    code = f"{PREFIX}{'/'.join([*parts, _design_text(case.design)])}@{_run_check(trace)}"
    return code + _digits(code, TEXT_DIGITS)


def _digits(text: str, count: int) -> str:
    number = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), "big")
    return "".join(DIGITS[number >> 5 * n & 31] for n in range(count))


def _run_check(trace: Trace) -> str:
    """A digest of everything that a replay shows: the case, each call with its effects, the machine, the claim."""
    from ..show.machine import machine

    case = trace.case
    told = [repr((str(case), case.design.digest, case.design.backing, trace.why, trace.cycle))]
    told += [f"{actor.key} {actor.role}" for actor in case.model.actors]
    for frame in trace.frames:
        event = frame.event
        did = event and (event.actor, event.call, event.notes, event.violations, event.counts, event.fatal)
        table = [(part.name, part.cells) for part in machine(case.model, frame.state)]
        told.append(repr((did and tuple(map(str, did)), table)))
    return _digits("\n".join(told), RUN_DIGITS)


def _design_text(design: Design) -> str:
    if design.name in shipped("all"):
        ours = Design.load(design.name)
        if (ours.digest, ours.backing) == (design.digest, design.backing):
            return design.name
    base, edit = patch_of(design)
    return f"{base.name}~{base.digest[:4]}{edit}"


def _steps(trace: Trace) -> str:
    out: list[str] = []
    last, count = "", 0

    def flush() -> None:
        nonlocal last, count
        if count:
            out.append(f"{last}{count}")
        last, count = "", 0

    for n, (a, choice) in enumerate(trace.schedule):
        if n == trace.cycle:
            flush()
            out.append(".")
        if choice or last != letter(a):
            flush()
        if choice:
            out.append(f"{letter(a)}-{choice}")
        else:
            last, count = letter(a), count + 1
    flush()
    return "".join(out)


class _Parts(NamedTuple):
    platform: str
    scenario: str
    backing: str
    switches: list[str]
    design: str
    why: str

    def search(self, design: str = "") -> str:
        """The command that looks for such a run anew."""
        words = ["kvmlab", "trace", design or self.design]
        words += ["--platform", self.platform, "--scenario", self.scenario]
        words += ["--backing", self.backing] if self.backing != "split" else []
        for switch in self.switches:
            words += ["--switch", switch]
        if self.why in BY_NAME:
            words += ["--property", self.why]
        elif self.why in MEASURES:
            words += ["--measure", self.why]
        return shlex.join(words)


def decode(code: str) -> Trace:
    """Read a code back; ReplayError says that it is damaged, or why its run cannot be vouched for."""
    code = "".join(code.split())
    if len(code) > LONGEST_CODE:
        raise ReplayError(f"a code of more than {LONGEST_CODE} characters")
    if code.startswith("kvmlab:1:"):
        raise ReplayError(_old(code))
    if not code.startswith(PREFIX):
        raise ReplayError(f"not a kvmlab code: {code[:40]!a}; one begins with {PREFIX!r}")
    if not _is_whole(code):
        raise ReplayError(f"damaged code {code[:40]!a}: a character of it is wrong, missing or too many")
    match = _CODE.fullmatch(code)
    if match is None:
        raise ReplayError(f"cannot read code {code[:40]!a}: another version of kvmlab may have made it")
    knobs = match["knobs"].split(",")[1:]
    switches = [knob.replace(".", "=", 1) for knob in knobs if knob != "in-place"]
    backing = "in-place" if "in-place" in knobs else "split"
    claim = match["claim"] or "sample"
    why = INITIALS.get(claim, claim)
    parts = _Parts(match["platform"], match["scenario"], backing, switches, match["design"], why)
    search = parts.search()
    try:
        design, search = _read_design(match, parts)
        case = Case(design, parts.platform, parts.scenario, backing, parse_switches(switches))
        schedule, cycle = _read_steps(match["steps"])
        trace = Trace(case, schedule, why, cycle)
        problem = unshown(trace)
        if not problem and _run_check(trace) != match["check"][:-TEXT_DIGITS]:
            problem = "its run is another one today: the design, the scenario or a rule has changed since"
    except (InputError, NotApplicable, DesignError, ReplayError) as wrong:
        problem = str(wrong)
    if problem:
        raise ReplayError(f"this code cannot be vouched for: {problem}\nto search anew: {search}")
    return trace


def _is_whole(code: str) -> bool:
    return _digits(code[:-TEXT_DIGITS], TEXT_DIGITS) == code[-TEXT_DIGITS:]


def _old(code: str) -> str:
    told = "a code of version 1 has no check, so its run cannot be vouched for"
    match = _OLD.match(code)
    if match is None:
        return told
    switches = match["switches"].split(",")[1:]
    design = "FILE" if match["design"] == "~" else match["design"]
    old = _Parts(
        match["platform"], match["scenario"], match["backing"], switches, design, match["why"] or ""
    )
    file = ", where FILE holds the text of its design" if design == "FILE" else ""
    return f"{told}\nto search anew: {old.search()}{file}"


def _read_design(match: re.Match[str], parts: _Parts) -> tuple[Design, str]:
    """The design of a code, and the command that searches its run anew."""
    if match["design"] not in shipped("all"):
        raise ReplayError(f"there is no design {match['design']} here")
    base = Design.load(match["design"])
    if match["edit"] is None:
        return base, parts.search()
    if base.digest[:4] != match["digest"]:
        raise ReplayError(f"it holds what was edited in {base.name}, which has changed since")
    design = patched(base, match["edit"])
    return design, f"{parts.search('-')} <<'END'\n{design.text}END"


def _read_steps(text: str) -> tuple[Schedule, int | None]:
    schedule: list[tuple[int, int]] = []
    cycle: int | None = None
    at = 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None or (token["cycle"] and cycle is not None):
            form = "a step is a letter and a count, or a letter, - and a choice"
            raise ReplayError(f"cannot read the steps at {text[at : at + 12]!r}; {form}")
        at = token.end()
        if token["cycle"]:
            cycle = len(schedule)
        else:
            actor = ord(token["actor"]) - ord("a")
            schedule += [(actor, int(token["choice"] or 0))] * int(token["count"] or 1)
        if len(schedule) > LONGEST_RUN:
            raise ReplayError(f"the code asks for more than {LONGEST_RUN} steps")
    return tuple(schedule), cycle


def unshown(trace: Trace) -> str:
    """Why a run does not show what it claims; empty if it does."""
    from ..show.told import broken

    why, frames = trace.why, trace.frames
    if trace.cycle is not None and why != "livelock":
        return "only a livelock has a cycle"
    if why in NO_CLAIM:
        return ""
    if why in MEASURES:
        counted = any(why in (frame.event.counts if frame.event else ()) for frame in frames)
        return "" if counted or _counted_at_the_end(trace) else f"the run does not count {why}"
    if why not in BY_NAME:
        return f"{why[:40]!r} is neither a property nor a measure"
    if BY_NAME[why].guest and not trace.case.model.conf.correct_guest:
        return f"{why} is not judged in {trace.case.scenario}: the guest is careless"
    if why == "livelock":
        return "" if _cycles(trace) else "what it repeats is no fair cycle of faults"
    seen = {reason.split(":")[0] for n in range(len(frames)) for reason in broken(trace, n)}
    return "" if why in seen else f"the run does not violate {why}"


def shows_harm(trace: Trace) -> bool:
    """Whether a run violates anything."""
    from ..show.told import broken

    return trace.why == "livelock" or any(broken(trace, n) for n in range(len(trace.frames)))


def _counted_at_the_end(trace: Trace) -> bool:
    """Whether the watch of quiet states counts the claimed measure in the last state."""
    model = trace.case.model
    if model.quiet is None:
        return False
    view = model.view(trace.frames[-1].state)
    model.quiet(view)
    return trace.why in view.counts


def _cycles(trace: Trace) -> bool:
    """Whether the run ends in a cycle in which one access of a vCPU faults again and again.

    Nobody may be left waiting in it who could go on all the time: see explore/liveness.py.
    """
    frames, begin, model = trace.frames, trace.cycle, trace.case.model
    if begin is None or begin >= trace.steps or frames[begin].state != frames[-1].state:
        return False
    events = [frame.event for frame in frames[begin + 1 :] if frame.event]
    states = {frame.state for frame in frames[begin:]}
    if not any(_keeps_faulting(trace, vcpu, states) for vcpu in dict.fromkeys(e.actor for e in events)):
        return False
    moved = {event.actor for event in events}
    for number, actor in enumerate(model.actors):
        cell = model.layout.cell("pc", actor.key)
        idle = any(actor.program[cell.get(x)].idle for x in states)
        if actor.key not in moved and not idle and all(options(model, x, number) for x in states):
            return False
    return True


def _keeps_faulting(trace: Trace, vcpu: str, states: set[int]) -> bool:
    """Whether in the cycle the vCPU faults on one pending access, and does not leave to the VMM."""
    family = trace.case.model.layout.fields.get("acc")
    if not isinstance(family, dict) or vcpu not in family:
        return False
    pending = {x & family[vcpu].mask for x in states}
    mine = [f.event for f in trace.frames[(trace.cycle or 0) + 1 :] if f.event and f.event.actor == vcpu]
    counted = [measure for event in mine for measure in event.counts]
    return len(pending) == 1 and 0 not in pending and FAULT in counted and EXIT not in counted


def replay(text: str) -> Trace:
    """Replay a code, or the race diagram around one as pasted from a mail, quoted or not.

    ReplayError when there is no code, when the code cannot be vouched for, or when the diagram says anything else
    than the run of its code.
    """
    from ..show.text import misdrawn

    lines = [unquoted(line) for line in text.splitlines()]
    found = next(((n, m.start()) for n, line in enumerate(lines) if (m := re.search(r"kvmlab:\d+:", line))), None)
    if found is None:
        raise ReplayError(f"there is no kvmlab code in this text; a diagram carries one, beginning with {PREFIX!r}")
    number, at = found
    candidates = list(_candidates(lines[number][at:], lines[number + 1 :]))
    trace = decode(next(filter(_is_whole, candidates), candidates[0]))
    if problem := misdrawn(trace, [*lines[:number], lines[number][:at]]):
        raise ReplayError(f"{problem}\nthe run itself: kvmlab replay {trace.code}")
    return trace


def unquoted(line: str) -> str:
    """A line of a mail without its quote marks and without blanks at its end."""
    return re.sub(r"^(?:[ \t]*>)+ ?", "", line).rstrip()


def _candidates(first: str, rest: list[str]) -> Iterator[str]:
    """What the code may be, which has no mark at its end: its first line, with one more line, and so on.

    The longest that could be one comes first.
    """
    found: list[str] = []
    code = ""
    for line in [first, *(line.strip() for line in rest)]:
        match = re.match(rf"{_SIGNS}+", line)
        if match is None:
            break
        code += match[0]
        found.append(re.sub(r"\W+$", "", code))  # a sentence may end with it
        if match.end() < len(line) or len(code) > LONGEST_CODE:
            break
    return reversed(found)

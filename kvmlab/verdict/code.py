"""A run as one short code, which `replay` turns back into the run that it was made of, or refuses.

    kvmlab:2:PLATFORM/SCENARIO[~EDIT][,KNOB...]/STEPS[/CLAIM]/DESIGN[~EDIT]@CHECK

KNOB is `in-place`, or a switch and its value, `preempt_count.no`.  STEPS: a letter an actor (a is the asking
CPU) and a count of its steps, or a letter, - and a choice; a dot where a cycle begins.  CLAIM is what the run
shows: the initials of a property, the name of a measure, `by-hand`; nothing where it is a sample.  A shipped
design stands as its name; any other as the shipped one nearest to it, the first digits of that one's digest,
and what was edited in it (`design/patch.py`).  CHECK is a digest of the design and of all that a replay shows of
the run, then one of the code's own characters.
"""

from __future__ import annotations

import hashlib

from ..design import Design, shipped
from ..design.patch import DIGITS, pack, patch_of
from ..explore.liveness import EXIT, FAULT
from ..machine.properties import BY_NAME, MEASURES
from ..machine.scenarios import NAMES, scenario_text
from ..machine.table import machine_rows
from .run import Run, changed, letter, options

PREFIX = "kvmlab:2:"
RUN_DIGITS, TEXT_DIGITS = 8, 2  # of the check, 5 bits each
BASE_DIGITS = 4  # of the text in which a scenario was edited
NO_CLAIM = ("sample", "by-hand")  # these say nothing that the run would have to show
INITIALS = {"".join(word[0] for word in name.split("-")): name for name in BY_NAME}
assert len(INITIALS) == len(BY_NAME) and not INITIALS.keys() & MEASURES.keys()


def encode(run: Run) -> str:
    """Write a run as one code of letters, digits and `:/@,.~_-`: safe in a mail, a shell and a link."""
    case = run.case
    knobs = ["in-place"] if case.backing == "in-place" else []
    knobs += [f"{name}.{value}" for name, value in changed(case.switches).items()]
    parts = [case.platform, ",".join([_scenario_text(case.scenario), *knobs]), _steps(run)]
    short = {name: initials for initials, name in INITIALS.items()}
    parts += [] if run.why == "sample" else [short.get(run.why, run.why)]
    code = f"{PREFIX}{'/'.join([*parts, _design_text(case.design)])}@{run_check(run)}"
    return code + digits(code, TEXT_DIGITS)


def digits(text: str, count: int) -> str:
    """The first digits of a text's SHA-256, 5 bits each."""
    number = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), "big")
    return "".join(DIGITS[number >> 5 * n & 31] for n in range(count))


def run_check(run: Run) -> str:
    """A digest of everything that a replay shows: the case, each call with its effects, the machine, the claim."""
    case = run.case
    told = [repr((str(case), case.design.digest, case.design.backing, run.why, run.cycle))]
    told += [case.scenario] if "\n" in case.scenario else []
    told += [f"{actor.key} {actor.role}" for actor in case.model.actors]
    for frame in run.frames:
        event = frame.event
        did = event and (event.actor, event.call, event.notes, event.violations, event.counts, event.fatal)
        table = [(row.name, row.cells) for row in machine_rows(case.model, frame.state)]
        told.append(repr((did and tuple(map(str, did)), table)))
    return digits("\n".join(told), RUN_DIGITS)


def _design_text(design: Design) -> str:
    if design.name in shipped("all"):
        ours = Design.load(design.name)
        if (ours.digest, ours.backing) == (design.digest, design.backing):
            return design.name
    base, edit = patch_of(design)
    return f"{base.name}~{base.digest[:4]}{edit}"


def _scenario_text(scenario: str) -> str:
    """Names as they are, and a text as what was edited in the shipped one that makes it shortest."""
    if "\n" not in scenario:
        return scenario.replace("+", ".")
    edits = [(pack(scenario, scenario_text(name)), name) for name in NAMES]
    edit, base = min(edits, key=lambda found: len(found[0]))
    return f"{base}~{digits(scenario_text(base), BASE_DIGITS)}{edit}"


def _steps(run: Run) -> str:
    out: list[str] = []
    last, count = "", 0

    def flush() -> None:
        nonlocal last, count
        if count:
            out.append(f"{last}{count}")
        last, count = "", 0

    for n, (a, choice) in enumerate(run.schedule):
        if n == run.cycle:
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


def claim_problem(run: Run) -> str:
    """Why a run does not show what it claims; empty if it does."""
    why, frames = run.why, run.frames
    if run.cycle is not None and why != "livelock":
        return "only a livelock has a cycle"
    if why in NO_CLAIM:
        return ""
    if why in MEASURES:
        counted = any(why in (frame.event.counts if frame.event else ()) for frame in frames)
        return "" if counted or _counted_at_the_end(run) else f"the run does not count {why}"
    if why not in BY_NAME:
        return f"{why[:40]!r} is neither a property nor a measure"
    if BY_NAME[why].guest and not run.case.model.conf.correct_guest:
        return f"{why} is not judged in {run.case.scene.name}: the guest is careless"
    if why == "livelock":
        return "" if _cycles(run) else "what it repeats is no fair cycle of faults"
    return "" if why in run.violated else f"the run does not violate {why}"


def _counted_at_the_end(run: Run) -> bool:
    """Whether the watch of quiet states counts the claimed measure in the last state."""
    model = run.case.model
    if model.quiet is None:
        return False
    view = model.view(run.frames[-1].state)
    model.quiet(view)
    return run.why in view.counts


def _cycles(run: Run) -> bool:
    """Whether the run ends in a cycle in which one access of a vCPU faults again and again.

    A cycle is fair if nobody who could move in each of its states is left waiting: see explore/liveness.py.
    """
    frames, begin, model = run.frames, run.cycle, run.case.model
    if begin is None or begin >= run.steps or frames[begin].state != frames[-1].state:
        return False
    events = [frame.event for frame in frames[begin + 1 :] if frame.event]
    states = {frame.state for frame in frames[begin:]}
    if not any(_keeps_faulting(run, vcpu, states) for vcpu in dict.fromkeys(e.actor for e in events)):
        return False
    moved = {event.actor for event in events}
    for number, actor in enumerate(model.actors):
        cell = model.layout.cell("pc", actor.key)
        idle = any(actor.program[cell.get(x)].idle for x in states)
        if actor.key not in moved and not idle and all(options(model, x, number) for x in states):
            return False
    return True


def _keeps_faulting(run: Run, vcpu: str, states: set[int]) -> bool:
    """Whether in the cycle the vCPU faults on one pending access, and does not leave to the VMM."""
    family = run.case.model.layout.fields.get("acc")
    if not isinstance(family, dict) or vcpu not in family:
        return False
    pending = {x & family[vcpu].mask for x in states}
    mine = [f.event for f in run.frames[(run.cycle or 0) + 1 :] if f.event and f.event.actor == vcpu]
    counted = [measure for event in mine for measure in event.counts]
    return len(pending) == 1 and 0 not in pending and FAULT in counted and EXIT not in counted

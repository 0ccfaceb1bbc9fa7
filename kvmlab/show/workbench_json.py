"""A session as one JSON value: all that the workbench's browser half needs to draw and to step without asking.

Every step of the run is rendered here, once, as fragments; the browser shows them and adds nothing of its own.
What a user has typed (designs, names, problems) goes as text, never as markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..design import Design, Row, shipped
from ..design.calls import BACKINGS, DEFAULTS_FROM, SECTIONS
from ..machine.conf import PLATFORMS
from ..machine.properties import BY_NAME
from ..machine.scenarios import SCENARIOS
from ..verdict.diagram import describe
from ..verdict.report import NEVER, UNJUDGED, Report
from ..verdict.run import Case, Event, options, waits
from ..verdict.session import Session
from ..verdict.trace import Trace
from .fragments import Fragments
from .html import trace_title
from .lanes import foot, head, step_bodies
from .machine_table import changes, machine_trs
from .style import MONO, Html, hues, plural, table

Json = dict[str, Any]
SCOPE = ".kvmlab-player"  # the element in which the browser shows a run's fragments
BACKING_TITLES = {"split": "two PFNs, as in the thread", "in-place": "one PFN, converted where it is"}


def session_json(session: Session, drawn: Json | None = None) -> Json:
    """Everything but what only the widget knows (messages, the ordering to compare with).

    `drawn` is what `trace_json` gives for the session's run, if that is known already.
    """
    return {
        **report_json(session.report, session.trace, drawn),
        "choices": choices(session.design),
        "took": f"{session.report.seconds * 1000:,.0f} ms",
        "position": session.position,
        "by_hand": session.by_hand,
        "problem": session.problem or "",
        "draft": session.draft,
    }


def case_json(case: Case) -> Json:
    """Which case it is, and its ordering: what can be shown before anything is explored."""
    names = {"platform": case.platform, "scenario": case.scene.name, "backing": case.backing}
    return {"case": {**names, "design": case.design.name}, "design": design_json(case)}


def report_json(report: Report, trace: Trace, drawn: Json | None = None) -> Json:
    """What was checked, what came out, and one run of it; `drawn` as for `session_json`."""
    return {
        **case_json(report.case),
        "status": status(report),
        "verdicts": verdicts(report),
        "complete": report.complete,
        "unjudged": unjudged(report),
        "unseen": [name for name, seen in report.witnesses.items() if not seen],
        "shown": trace.why,
        "trace": drawn or trace_json(trace),
    }


def choices(design: Design) -> Json:
    """What each select offers: (value, title) pairs; an edited design is offered beside those that ship."""
    designs = [(name, Design.load(name).title) for name in shipped()]
    if design.name not in shipped():
        designs.insert(0, (design.name, design.title))
    return {
        "platform": list(PLATFORMS.items()),
        "scenario": [(s.name, s.title) for s in SCENARIOS.values()],
        "backing": [(name, BACKING_TITLES.get(name, "")) for name in BACKINGS],
        "design": designs,
    }


def design_json(case: Case) -> Json:
    """The ordering as its text, and as lines that can be moved: those of the sections that run in this case.

    A section says from which design it is inherited, if it is; `idle` names the sections that do not run.
    """
    design = case.design
    run = {instr.section for actor in case.model.actors for instr in actor.program}
    return {
        "name": design.name,
        "title": design.title,
        "source": design.source,
        "notes": list(design.notes),
        "text": design.text,
        "sections": [
            {"name": name, "from": inherited_from(design, name), "lines": list(design.lines(name))}
            for name in SECTIONS
            if name in run
        ],
        "idle": [name for name in SECTIONS if name not in run],
    }


def inherited_from(design: Design, section: str) -> str:
    """The design whose text gives this section; empty if it is the design's own."""
    if section in design.own:
        return ""
    base = design.base
    while base in shipped("all"):
        above = Design.load(base)
        if section in above.own:
            return base
        base = above.base
    return base or DEFAULTS_FROM


def status(report: Report) -> str:
    """How much was explored."""
    done = "every interleaving explored" if report.complete else "NOT complete"
    size = f"{plural(report.states, 'state')} · {plural(report.transitions, 'transition')}"
    return f"{size} · depth {report.depth} · {done}"


def verdicts(report: Report) -> list[Json]:
    """One entry a property; those that some run violates come first."""
    found = [
        {
            "name": name,
            "verdict": verdict.verdict,
            "bad": verdict.verdict not in (NEVER, UNJUDGED),
            "sentence": BY_NAME[name].sentence,
            "steps": verdict.depth,
        }
        for name, verdict in report.verdicts.items()
    ]
    return sorted(found, key=lambda entry: not entry["bad"])


def unjudged(report: Report) -> list[Json]:
    """Which properties are not judged, and why: one entry a reason."""
    careless = not report.case.model.conf.correct_guest
    reasons: dict[str, list[str]] = {}
    for name, verdict in report.verdicts.items():
        if verdict.verdict == UNJUDGED:
            why = "the guest is careless" if careless and BY_NAME[name].guest else "not all is explored"
            reasons.setdefault(why, []).append(name)
    return [{"why": why, "names": names} for why, names in reasons.items()]


def first_position(run: Trace) -> int:
    """Where a reader of this run begins: at its end if it shows a property violated, else at its start."""
    return run.steps if run.why in BY_NAME else 0


def trace_json(trace: Trace) -> Json:
    """A run: its lanes as fragments, one a step, and for each position the machine, a sentence, what can be done."""
    fragments = Fragments(SCOPE)
    where = shown_lines(trace.case.design)
    steps = [_step(trace, n, body, fragments, where) for n, body in enumerate([Html(), *step_bodies(trace)])]
    return {
        "title": fragments.classed(trace_title(trace)),
        "head": fragments.classed(head(trace)),
        "foot": fragments.classed(foot(trace)),
        "steps": steps,
        "first": first_position(trace),
        "pool": list(fragments.pool),
        "table": fragments.classed(table((), MONO)),
        "styles": fragments.css(),
        "hues": hues([actor.key for actor in trace.case.model.actors]),
        "text": trace.text(),
        "code": trace.code,
    }


def _step(trace: Trace, n: int, body: Html, fragments: Fragments, where: ShownLines) -> Json:
    """Everything about position `n`: `row` is its part of the lanes, `machine` the numbers of its table's rows."""
    model, frame = trace.case.model, trace.frames[n]
    before = trace.frames[max(n - 1, 0)].state
    reasons = trace.violations(n)
    return {
        "row": fragments.classed(body),
        "machine": [fragments.shared(line) for line in machine_trs(model, frame.state, before)],
        "say": _sentence(n, frame.event, reasons, changes(model, before, frame.state)),
        "actor": frame.event.actor if frame.event else None,
        "broken": [reason.split(":")[0] for reason in reasons],
        "loud": bool(reasons or (frame.event and _faults(frame.event))),
        "line": _shown_line(frame.event, where),
        **_next(trace, n),
    }


def _faults(event: Event) -> bool:
    return any(note.startswith(("#NPF", "#VC", "#PF")) for note in event.notes)


def _sentence(
    n: int, event: Event | None, reasons: Iterable[str], changed: Iterable[tuple[str, str, str, str]]
) -> str:
    """What a screen reader says of a step: who did what, and what that changed."""
    if event is None:
        return "Before the first step. The arrow keys walk through the run."
    call, notes, _ = event.text
    told = [f"Step {n}, {event.actor}: {', '.join((call, *notes))}.", *(f"Violated: {r}." for r in reasons)]
    told += [f"{part} {key}: {was} becomes {now}." for part, key, was, now in changed]
    return " ".join(" ".join(told).split())


def _next(trace: Trace, n: int) -> Json:
    """What could be done at a position: each actor's possible steps, and who has to wait."""
    model, frame = trace.case.model, trace.frames[n]
    if frame.event is not None and frame.event.fatal:
        return {"options": [], "waits": []}
    found = [
        {
            "actor": actor.key,
            "choice": choice,
            "text": "  ".join(describe(event)),
            "bad": bool(event.violations),
        }
        for a, actor in enumerate(model.actors)
        for choice, (event, _) in enumerate(options(model, frame.state, a))
    ]
    return {
        "options": found,
        "waits": [x.key for a, x in enumerate(model.actors) if waits(model, frame.state, a)],
    }


ShownLines = dict[tuple[str, int], list[tuple[int, str]]]


def shown_lines(design: Design) -> ShownLines:
    """Where each line of the source stands among a section's shown lines: (section, line) to [(index, call)].

    Inherited sections have line numbers of their own; a fragment mixes two sources, hence a list.
    """
    found: ShownLines = {}
    for section in SECTIONS:
        shown = [line.strip().removesuffix(":") for line in design.lines(section)]
        at = 0
        for row in _flat(design.sections[section]):
            index = next((i for i in range(at, len(shown)) if shown[i] == row.text), None)
            if index is not None:
                found.setdefault((section, row.line), []).append((index, row.call))
                at = index + 1
    return found


def _flat(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        yield row
        yield from _flat(row.body or ())


def _shown_line(event: Event | None, where: ShownLines) -> tuple[str, int] | None:
    """The shown line that a step belongs to, if it is of the design and there is no doubt."""
    if event is None:
        return None
    found = where.get((event.section, event.line), [])
    exact = [index for index, call in found if event.call.startswith(call)]
    indexes = {index for index, _ in found}
    if len(indexes) > 1 and exact:
        indexes = {exact[0]}
    return (event.section, indexes.pop()) if len(indexes) == 1 else None

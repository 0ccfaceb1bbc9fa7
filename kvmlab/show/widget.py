"""The workbench in a notebook: edit an ordering, watch the verdicts, step through a run, schedule by hand.

All logic is the session's.  The widget turns messages from the browser into calls of it, and the session back
into one JSON value, which `workbench.js` draws.  What takes long, the checks, runs in a thread, one at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import anywidget
import traitlets

from ..design import Design, shipped
from ..design.calls import SECTIONS
from ..errors import InputError, Refusal
from ..explore.graph import Watch
from ..machine.properties import BY_NAME
from ..verdict.replay import replay
from ..verdict.report import Report, as_design, check_case
from ..verdict.run import Case
from ..verdict.session import Session, changed_case
from ..verdict.trace import Trace
from .html import report_html, run_html, side_by_side_html, trace_title
from .messages import Message, a_number, a_text, has_code, in_words, one_of
from .page import script, stylesheet
from .search_thread import Search
from .style import block, el, quiet
from .workbench_json import case_json, choices, first_position, session_json, trace_json

INVITATION = "Run this cell to make it live: move a line, and every interleaving is explored again."
FARTHEST = 200  # lines that one message may move a statement
LONGEST_HISTORY = 100


@dataclass(frozen=True)
class Request:
    """What is being explored, and why: a "change", an "undo", or a design to "compare" with.

    `run` is the run to walk then, if it is not to be that of the gravest property violated; `draft` is the
    text that the case came from, kept in case it fails; `focus` is the line that was moved.
    """

    why: str
    case: Case
    versus: Design | None = None
    run: Trace | None = None
    draft: str | None = None
    focus: tuple[str, int] | None = None


class Checked(NamedTuple):
    """The outcome of a request: the report, a run to walk, and the report to compare with, or why there is none."""

    report: Report
    run: Trace
    against: Report | str


class Workbench(anywidget.AnyWidget):
    """A session on the screen; `session` and `report` are there for the next cell to use."""

    _esm = script()
    _css = stylesheet()
    view = traitlets.Dict().tag(sync=True)
    pending = traitlets.Dict().tag(sync=True)  # the case being explored, while the view is still the old one
    explored = traitlets.Int().tag(sync=True)  # how many of its states are known

    def __init__(self, session: Session, versus: Design | None = None) -> None:
        self._lock = threading.RLock()
        self._search: Search[Checked] | None = None
        self._request: Request | None = None
        self._drawn: tuple[Trace, dict[str, Any]] | None = None  # the run that was drawn last
        self.session = session
        self.versus = versus
        self.against = _against(session.report, versus)
        self.history: list[Case] = []
        self.focus: tuple[str, int] | None = None
        self.said = ""
        self.turn = 0
        super().__init__(view=self._view())
        self.on_msg(lambda _widget, content, _buffers: self._handle(content))

    @property
    def report(self) -> Report:
        """The verdicts of what is shown; waits for a check that is under way."""
        self.wait()
        return self.session.report

    def wait(self) -> None:
        """Return when no check is under way."""
        waited = None
        while (search := self._search) is not None and search is not waited:
            search.wait()
            waited = search

    def __repr__(self) -> str:
        case = self.session.case
        return f"Workbench({case.design.name!r}, {case.platform!r}, {case.scene.name!r}, {case.backing!r})"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The live view, with a picture and a text beside it for readers who have no kernel."""
        bundle = super()._repr_mimebundle_(**kwargs)
        live, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        return {**live, "text/plain": self.text(), "text/html": self.html()}, metadata

    def text(self) -> str:
        """The verdicts and the run shown now, as plain text."""
        return f"{self.report.text()}\n\n{self.session.trace.text()}"

    def html(self) -> str:
        """The verdicts and the run shown now, as a picture that needs no kernel."""
        report, trace = self.report, self.session.trace
        beside = [side_by_side_html(report, self.against)] if isinstance(self.against, Report) else []
        other = [el("div", each, style="margin-top:12px") for each in beside]
        title = el("div", trace_title(trace), style="margin-top:10px")
        invitation = el("div", quiet(INVITATION), style="margin-top:8px")
        return block(report_html(report), title, run_html(trace), *other, invitation)

    # -- messages

    def _handle(self, message: object) -> None:
        """Do what the browser asks; whatever is wrong with the request becomes `problem`, and nothing is lost."""
        with self._lock, self.hold_sync():
            before = self._search
            self.session.problem, self.focus, self.said = None, None, ""
            try:
                if not isinstance(message, Mapping):
                    raise InputError("a message is an object with a 'do'")
                if _VERBS[one_of(message, "do", tuple(_VERBS))](self, message) is False:
                    return
            except Exception as failure:  # in a callback nobody would see it otherwise
                self.session.problem = in_words(failure)
            if self._search is None or self._search is before:  # else `pending` says all that is new
                self.view = self._view()

    @property
    def _now(self) -> Case:
        """The case that the browser shows: the one being explored, if there is one."""
        return self._request.case if self._request else self.session.case

    def _edit(self, message: Message) -> None:
        text = a_text(message, "text")
        self.session.draft = text
        if has_code(text):
            self._open(text)
        else:
            self._explore(changed_case(self._now, design=self._now.design.replace_text(text)), draft=text)

    def _paste(self, message: Message) -> None:
        text = a_text(message, "text")
        if has_code(text):
            self._open(text)
        elif not text.strip():
            raise InputError("what was pasted is empty; paste an ordering, or the code or diagram of a run")
        else:
            self.session.draft = text
            self.said = "Pasted as text: Check explores it."

    def _open(self, text: str) -> None:
        run = replay(text)
        self._explore(run.case, run=run, draft=self.session.draft)

    def _move(self, message: Message) -> None:
        section, line, by = one_of(message, "section", SECTIONS), a_number(message, "line"), _by(message)
        design = self._now.design
        if "to" in message:
            by = _steps(design, section, line, a_number(message, "to"))
        moved, at = design.moved(section, line, by)
        if moved is design:
            raise InputError((by and design.why_stuck(section, line, by)) or "the line is there already")
        self._explore(changed_case(self._now, design=moved), focus=(section, at))

    def _choose(self, message: Message) -> None:
        names = [name for name in ("platform", "scenario", "backing") if name in message]
        if not names:
            raise InputError("choose needs a platform, a scenario or a backing")
        self._explore(changed_case(self._now, **{name: a_text(message, name) for name in names}))

    def _load(self, message: Message) -> None:
        design = Design.load(one_of(message, "design", shipped("all")))
        backing = design.backing or self._now.backing  # a design for one backing only brings it along
        self._explore(changed_case(self._now, design=design, backing=backing))

    def _show(self, message: Message) -> None:
        report = self.session.report
        never = [name for name, verdict in report.verdicts.items() if verdict.depth is None]
        name = one_of(message, "property", (*BY_NAME, *(["sample"] if never else [])))
        run = self.session.show(never[0] if name == "sample" else name)
        self.session.jump(first_position(run))

    def _take(self, message: Message) -> None:
        at = _position(message, "at", self.session)
        actor, choice = a_text(message, "actor"), a_number(message, "choice")
        dropped = self.session.trace.steps - at
        self.session.take(actor, choice, at)
        self.said = f"Scheduled by hand from step {at + 1}."
        if dropped:
            self.said += f" The {dropped} steps that followed are dropped."

    def _position(self, message: Message) -> bool:
        self.session.jump(_position(message, "position", self.session))
        return False  # the browser is there already

    def _compare(self, message: Message) -> None:
        name = message.get("design")
        versus = None if name is None else Design.load(one_of(message, "design", shipped("all")))
        if self._request:
            self._begin(replace(self._request, versus=versus))
        else:
            self._begin(Request("compare", self.session.case, versus, self.session.trace, self.session.draft))

    def _undo(self, message: Message) -> None:
        if self._request:
            self._cancel(message)
            return
        if not self.history:
            raise InputError("there is nothing to undo")
        self._begin(Request("undo", self.history[-1], self.versus))

    def _cancel(self, message: Message) -> None:
        if self._search is None:
            raise InputError("nothing is being explored")
        self._settle()
        self.said = "Given up: what is shown is what was checked before."

    # -- exploring

    def _explore(
        self,
        case: Case,
        run: Trace | None = None,
        draft: str | None = None,
        focus: tuple[str, int] | None = None,
    ) -> None:
        """Explore a case, unless it is the one that is shown already; an earlier search is given up."""
        versus = self._request.versus if self._request else self.versus
        if case == self.session.case and run is None:
            self._settle()
            self.session.draft, self.focus = None, focus
        else:
            self._begin(Request("change", case, versus, run, draft, focus))

    def _begin(self, request: Request) -> None:
        case = {**case_json(request.case), "choices": choices(request.case.design)}
        self._settle()
        search = Search(lambda watch: self._checked(request, watch), self._tell, self._done)
        self._request, self._search = request, search
        self.explored = 0
        self.pending = {**case, "focus": request.focus, "problem": "", "said": ""}
        search.start()

    def _settle(self) -> None:
        """Nothing is being explored any more."""
        if self._search:
            self._search.cancel()
        self._search, self._request, self.pending = None, None, {}

    def _checked(self, request: Request, watch: Watch) -> Checked:
        same = request.case is self.session.case
        earlier = self.session.report
        report = earlier if same else check_case(request.case, watch=watch, earlier=earlier)
        run = request.run or report.trace()
        run.frames  # noqa: B018 - replays it now, in this thread
        return Checked(report, run, _against(report, request.versus, self.against, watch))

    def _tell(self, search: Search[Checked], states: int) -> None:
        with self._lock:
            if search is self._search:
                self.explored = states

    def _done(self, search: Search[Checked]) -> None:
        """Take what a search has found, unless something else is wanted by now."""
        with self._lock, self.hold_sync():
            if search is not self._search or self._request is None:
                return
            request = self._request
            self._settle()
            self.focus = request.focus
            try:
                if search.found is None:
                    raise search.failure or RuntimeError("a search ended with nothing")
                self._take_over(request, search.found)
            except Exception as failure:
                self.session.problem, self.session.draft = in_words(failure), request.draft
            self.view = self._view()

    def _take_over(self, request: Request, checked: Checked) -> None:
        before, at = self.session.case, self.session.position
        self.session.adopt(checked.report, checked.run)
        self.session.jump(at if request.why == "compare" else first_position(checked.run))
        self.versus, self.against = request.versus, checked.against
        if request.why == "compare":
            self.session.draft = request.draft
            return
        if request.why == "undo":
            self.history.pop()
        else:
            self.history = [*self.history, before][-LONGEST_HISTORY:]
        bad = [f"{name} {checked.report.verdicts[name].verdict}" for name in checked.report.violated]
        done = "Undone. Checked" if request.why == "undo" else "Checked"
        self.said = f"{done}: {', '.join(bad) or 'nothing is violated'}."

    # -- what the browser sees

    def _view(self) -> dict[str, Any]:
        self.turn += 1
        side = {"design": self.versus.name if self.versus else "", "html": "", "problem": ""}
        if isinstance(self.against, Report):
            side["html"] = str(side_by_side_html(self.session.report, self.against))
        else:
            side["problem"] = self.against
        mine = {
            "turn": self.turn,
            "versus": side,
            "focus": self.focus,
            "said": self.said,
            "undo": bool(self.history),
        }
        if self._drawn is None or self._drawn[0] is not self.session.trace:
            self._drawn = self.session.trace, trace_json(self.session.trace)
        return {**session_json(self.session, self._drawn[1]), **mine}


def _against(
    report: Report, versus: Design | None, known: Report | str = "", watch: Watch | None = None
) -> Report | str:
    """The report of the design to compare with in the same case, `known` if that is it, or why there is none."""
    if versus is None:
        return ""
    try:
        other = changed_case(report.case, design=versus)
        if isinstance(known, Report) and known.case == other:
            return known
        return check_case(other, watch=watch, earlier=report)
    except (Refusal, MemoryError) as problem:
        return str(problem) or "out of memory"


def _position(message: Message, name: str, session: Session) -> int:
    value, last = a_number(message, name), len(session.frames) - 1
    if not 0 <= value <= last:
        raise InputError(f"position {value} is not in this run, which goes from 0 to {last}")
    return value


def _by(message: Message) -> int:
    by = 0 if "to" in message else a_number(message, "by")
    if abs(by) > FARTHEST:
        raise InputError(f"a line moves by at most {FARTHEST}")
    return by


def _steps(design: Design, section: str, line: int, to: int) -> int:
    """How many statements a line has to pass to stand where line `to` stands now, or as near as it can.

    One step if it cannot move that way at all, so that it can be said why.
    """
    sign = 1 if to > line else -1
    by, at = 0, line
    while abs(by) < FARTHEST and (at - to) * sign < 0:
        after = design.moved(section, line, by + sign)[1]
        if after == at or (by and (after - to) * sign > 0):
            return by or sign
        by, at = by + sign, after
    return by


_VERBS: dict[str, Callable[[Workbench, Message], Any]] = {
    "edit": Workbench._edit,
    "paste": Workbench._paste,
    "move": Workbench._move,
    "choose": Workbench._choose,
    "load": Workbench._load,
    "show": Workbench._show,
    "take": Workbench._take,
    "position": Workbench._position,
    "versus": Workbench._compare,
    "undo": Workbench._undo,
    "cancel": Workbench._cancel,
}


def workbench(
    design: Design | str | Trace = "v8-post-hook",
    platform: str | None = None,
    scenario: str | None = None,
    backing: str | None = None,
    versus: Design | str | None = None,
    show: str | None = None,
) -> Workbench:
    """The workbench on one case: change it with the mouse, or work on its `session` from the next cell.

    `design` is a design as for `check`, or a run: a `Trace`, its code, or a diagram that carries one; a run
    brings its own case.  Defaults: snp, tiny, and split backing unless the design is for another.  `versus` is
    a design to stand beside it, `show` the property whose counterexample comes first.  Errors as for `check`
    and `replay`; InputError for a property that does not exist.
    """
    case = {"platform": platform, "scenario": scenario, "backing": backing}
    given: dict[str, Any] = {name: value for name, value in case.items() if value is not None}
    run = replay(design) if isinstance(design, str) and has_code(design) else design
    if isinstance(run, Trace):
        if given:
            raise InputError(f"a run has a case of its own; leave out: {', '.join(given)}")
        session = Session.of(run)
    else:
        run = as_design(run)
        session = Session(run, **{"backing": run.backing or "split", **given})
    if show is not None:
        session.show(one_of({"show": show, "do": "workbench"}, "show", tuple(BY_NAME)))
    session.jump(first_position(session.trace))
    return Workbench(session, None if versus is None else as_design(versus))

"""The workbench in a notebook: edit an ordering, watch the verdicts, step through a run, schedule by hand.

All logic is the session's.  The widget turns messages from the browser into calls of it, and the session back
into one JSON value, which `workbench.js` draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import anywidget
import traitlets

from ..design import Design, DesignError, shipped
from ..design.calls import SECTIONS
from ..properties import BY_NAME
from ..report import Report, as_design, check
from ..scenario import InputError, NotApplicable
from ..session import Session
from ..trace import Case
from .html import report_html, run_html, side_by_side_html, trace_title
from .page import script, stylesheet
from .style import block, el, quiet
from .view import view

INVITATION = "Run this cell to make it live: move a line, and every interleaving is explored again."
FARTHEST = 200  # lines that one message may move a statement
LONGEST_HISTORY = 100

Message = Mapping[str, Any]


class Workbench(anywidget.AnyWidget):
    """A session on the screen; `session` and `report` are there for the next cell to use."""

    _esm = script()
    _css = stylesheet()
    view = traitlets.Dict().tag(sync=True)

    def __init__(self, session: Session, versus: Design | None = None) -> None:
        self.session = session
        self.versus = versus
        self.other: tuple[Case, Report | str] | None = None
        self.history: list[Case] = []
        self.focus: tuple[str, int] | None = None
        self.said = ""
        self.turn = 0
        super().__init__(view=self._view())
        self.on_msg(lambda _widget, content, _buffers: self._handle(content))

    @property
    def report(self) -> Report:
        """The verdicts shown now."""
        return self.session.report

    def __repr__(self) -> str:
        case = self.session.case
        return f"Workbench({case.design.name!r}, {case.platform!r}, {case.scenario!r}, {case.backing!r})"

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
        trace, against = self.session.trace, self._against()
        beside = [side_by_side_html(self.report, against)] if isinstance(against, Report) else []
        other = [el("div", each, style="margin-top:12px") for each in beside]
        title = el("div", trace_title(trace), style="margin-top:10px")
        invitation = el("div", quiet(INVITATION), style="margin-top:8px")
        return block(report_html(self.report), title, run_html(trace), *other, invitation)

    # -- messages

    def _handle(self, message: object) -> None:
        """Do what the browser asks; whatever is wrong with the request becomes `problem`, and nothing is lost."""
        self.session.problem, self.focus, self.said = None, None, ""
        try:
            if not isinstance(message, Mapping):
                raise InputError("a message is an object with a 'do'")
            do = _VERBS.get(str(message.get("do")))
            if do is None:
                raise InputError(
                    f"unknown message {str(message.get('do'))[:40]!r}; there are: {', '.join(_VERBS)}"
                )
            if do(self, message) is False:
                return
        except (DesignError, InputError, NotApplicable, MemoryError) as problem:
            self.session.problem = str(problem) or "out of memory"
        except Exception as bug:  # in a callback nobody would see it otherwise
            self.session.problem = f"kvmlab has a bug here: {type(bug).__name__}: {bug}"
        self.view = self._view()

    def _edit(self, message: Message) -> None:
        self._changes(lambda: self.session.edit(_text(message, "text")))

    def _move(self, message: Message) -> None:
        section, line, by = _one_of(message, "section", SECTIONS), _number(message, "line"), _by(message)
        before = self.session.design
        if "to" in message:
            by = _steps(before, section, line, _number(message, "to"))
        self._changes(lambda: self.session.move(section, line, by))
        if self.session.problem is None:
            self.focus = (section, before.moved(section, line, by)[1])

    def _choose(self, message: Message) -> None:
        names = [name for name in ("platform", "scenario", "backing") if name in message]
        if not names:
            raise InputError("choose needs a platform, a scenario or a backing")
        chosen = {name: _text(message, name) for name in names}
        self._changes(lambda: self.session.choose(**chosen))

    def _load(self, message: Message) -> None:
        design = Design.load(_one_of(message, "design", shipped("all")))
        case = self.session.case
        if design.backing in (None, case.backing):
            self._changes(lambda: self.session.load(design))
        else:  # a design for one backing only brings it along
            self._restore(Case(design, case.platform, case.scenario, str(design.backing), case.switches))
            self._remember(case)

    def _show(self, message: Message) -> None:
        never = [name for name, verdict in self.report.verdicts.items() if verdict.depth is None]
        name = _one_of(message, "property", (*BY_NAME, *(["sample"] if never else [])))
        self.session.show(never[0] if name == "sample" else name)

    def _take(self, message: Message) -> None:
        at = _position(message, "at", self.session)
        actor, choice = _text(message, "actor"), _number(message, "choice")
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
        self.versus = None if name is None else Design.load(_one_of(message, "design", shipped("all")))

    def _undo(self, message: Message) -> None:
        if not self.history:
            raise InputError("there is nothing to undo")
        self._restore(self.history.pop())
        self.said = f"Undone. {self._outcome()}"

    def _changes(self, change: Callable[[], Report]) -> None:
        """Make a change; if it was taken, remember what there was before, and say what the verdict is now."""
        before = self.session.case
        change()
        if self.session.problem is None and self.session.case != before:
            self._remember(before)

    def _remember(self, before: Case) -> None:
        self.history = [*self.history, before][-LONGEST_HISTORY:]
        self.said = self._outcome()

    def _restore(self, case: Case) -> None:
        self.session = Session(case.design, case.platform, case.scenario, case.backing, case.switches)

    def _outcome(self) -> str:
        bad = [f"{name} {self.report.verdicts[name].verdict}" for name in self.report.violated]
        return f"Checked: {', '.join(bad) if bad else 'nothing is violated'}."

    # -- what the browser sees

    def _view(self) -> dict[str, Any]:
        self.turn += 1
        against = self._against()
        side = {"design": self.versus.name if self.versus else "", "html": "", "problem": ""}
        if isinstance(against, Report):
            side["html"] = str(side_by_side_html(self.report, against))
        elif against:
            side["problem"] = against
        mine = {
            "turn": self.turn,
            "versus": side,
            "focus": self.focus,
            "said": self.said,
            "undo": bool(self.history),
        }
        return {**view(self.session), **mine}

    def _against(self) -> Report | str:
        """The report of the design to compare with in the same case, or why there is none."""
        if self.versus is None:
            return ""
        case = replace(self.session.case, design=self.versus)
        if self.other is None or self.other[0] != case:
            self.other = case, _report(case)
        return self.other[1]


def _report(case: Case) -> Report | str:
    try:
        return check(case.design, case.platform, case.scenario, case.backing, case.switches)
    except (DesignError, InputError, NotApplicable, MemoryError) as problem:
        return str(problem)


def _text(message: Message, name: str) -> str:
    value = message.get(name)
    if not isinstance(value, str):
        raise InputError(f"{message.get('do')} needs a text {name!r}")
    return value


def _number(message: Message, name: str) -> int:
    value = message.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{message.get('do')} needs a whole number {name!r}")
    if abs(value) > 10**9:  # Python would not even print one of thousands of digits
        raise InputError(f"{message.get('do')} needs a smaller number {name!r}")
    return value


def _one_of(message: Message, name: str, allowed: tuple[str, ...]) -> str:
    value = _text(message, name)
    if value not in allowed:
        raise InputError(f"unknown {name} {value[:40]!r}; there are: {', '.join(allowed)}")
    return value


def _position(message: Message, name: str, session: Session) -> int:
    value, last = _number(message, name), len(session.frames) - 1
    if not 0 <= value <= last:
        raise InputError(f"position {value} is not in this run, which goes from 0 to {last}")
    return value


def _by(message: Message) -> int:
    by = 0 if "to" in message else _number(message, "by")
    if abs(by) > FARTHEST:
        raise InputError(f"a line moves by at most {FARTHEST}")
    return by


def _steps(design: Design, section: str, line: int, to: int) -> int:
    """How many statements a line has to pass to stand where line `to` stands now, or as near as it can."""
    sign = 1 if to > line else -1
    by, at = 0, line
    while abs(by) < FARTHEST and (at - to) * sign < 0:
        after = design.moved(section, line, by + sign)[1]
        if after == at or (by and (after - to) * sign > 0):
            break
        by, at = by + sign, after
    return by


_VERBS: dict[str, Callable[[Workbench, Message], Any]] = {
    "edit": Workbench._edit,
    "move": Workbench._move,
    "choose": Workbench._choose,
    "load": Workbench._load,
    "show": Workbench._show,
    "take": Workbench._take,
    "position": Workbench._position,
    "versus": Workbench._compare,
    "undo": Workbench._undo,
}


def workbench(
    design: Design | str = "v8-post-hook",
    platform: str = "snp",
    scenario: str = "tiny",
    backing: str = "split",
    versus: Design | str | None = None,
    show: str | None = None,
) -> Workbench:
    """The workbench on one case: change it with the mouse, or work on its `session` from the next cell.

    `versus` is a design to stand beside it, `show` the property whose counterexample comes first.  Errors as
    for `check`; InputError for a property that does not exist.
    """
    session = Session(design, platform, scenario, backing)
    if show is not None:
        session.show(_one_of({"show": show, "do": "workbench"}, "show", tuple(BY_NAME)))
    return Workbench(session, None if versus is None else as_design(versus))

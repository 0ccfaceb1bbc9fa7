"""The way back from a code, or from the race diagram around one, to the run that it was made of: see `code`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from ..design import Design, DesignError, shipped
from ..design.patch import patched, unpack
from ..errors import InputError, NotApplicable
from ..explore.paths import Schedule
from ..machine.properties import BY_NAME, MEASURES
from ..machine.scenarios import scenario_text
from .code import BASE_DIGITS, INITIALS, PREFIX, TEXT_DIGITS, claim_problem, digits, run_check
from .diagram import difference
from .run import Case, ReplayError, parse_switches
from .trace import Trace

LONGEST_RUN = 10_000  # steps; a code that asks for more is refused
LONGEST_CODE = 100_000  # characters

_SIGNS = r"[A-Za-z0-9_:/@,.~='()-]"  # those of version 1, too
_CODE = re.compile(
    r"kvmlab:2:(?P<platform>\w+)/(?P<scenario>[\w.-]+)(?:~(?P<scene>\w+))?(?P<knobs>(?:,[\w.-]+)*)"
    r"/(?P<steps>[a-z0-9.-]*)"
    r"(?:/(?P<claim>[\w-]+))?/(?P<design>[\w-]+)(?:~(?P<digest>[0-9a-f]{4})(?P<edit>\w+))?@(?P<check>\w+)"
)
_OLD = re.compile(
    r"kvmlab:1:(?P<platform>\w+)/(?P<scenario>[\w-]+)/(?P<backing>[\w-]+)(?P<switches>(?:,[\w=-]+)*)"
    r"/(?P<design>[\w.-]+(?=@)|~)[^/]*/[^/]*(?:/(?P<why>[\w-]+))?"
)
_TOKEN = re.compile(r"(?P<cycle>\.)|(?P<actor>[a-z])(?:-(?P<choice>\d{1,3})|(?P<count>[1-9]\d{0,5}))")


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
        parts = parts._replace(scenario=_read_scene(match))
        design, search = _read_design(match, parts)
        case = Case(design, parts.platform, parts.scenario, backing, parse_switches(switches))
        schedule, cycle = _read_steps(match["steps"])
        trace = Trace(case, schedule, why, cycle)
        problem = claim_problem(trace)
        if not problem and run_check(trace) != match["check"][:-TEXT_DIGITS]:
            problem = "its run is another one today: the design, the scenario or a rule has changed since"
    except (InputError, NotApplicable, DesignError, ReplayError) as wrong:
        problem = str(wrong)
    if problem:
        raise ReplayError(f"this code cannot be vouched for: {problem}\nto search anew: {search}")
    return trace


def _is_whole(code: str) -> bool:
    return digits(code[:-TEXT_DIGITS], TEXT_DIGITS) == code[-TEXT_DIGITS:]


def _old(code: str) -> str:
    told = "a code of version 1 has no check, so its run cannot be vouched for"
    match = _OLD.match(code)
    if match is None:
        return told
    switches = match["switches"].split(",")[1:]
    design = "FILE" if match["design"] == "~" else match["design"]
    old = _Parts(match["platform"], match["scenario"], match["backing"], switches, design, match["why"] or "")
    file = ", where FILE holds the text of its design" if design == "FILE" else ""
    return f"{told}\nto search anew: {old.search()}{file}"


def _read_scene(match: re.Match[str]) -> str:
    """The scenario of a code: names, or the text that was made of one."""
    if match["scene"] is None:
        return match["scenario"].replace(".", "+")
    base = scenario_text(match["scenario"])
    if digits(base, BASE_DIGITS) != match["scene"][:BASE_DIGITS]:
        raise ReplayError(f"it holds what was edited in {match['scenario']}, which has changed since")
    return unpack(match["scene"][BASE_DIGITS:], base)


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


def replay(text: str) -> Trace:
    """Replay a code, or the race diagram around one as pasted from a mail, quoted or not.

    ReplayError when there is no code, when the code cannot be vouched for, or when the diagram says anything else
    than the run of its code.
    """
    lines = [unquoted(line) for line in text.splitlines()]
    found = next(
        ((n, m.start()) for n, line in enumerate(lines) if (m := re.search(r"kvmlab:\d+:", line))), None
    )
    if found is None:
        raise ReplayError(
            f"there is no kvmlab code in this text; a diagram carries one, beginning with {PREFIX!r}"
        )
    number, at = found
    candidates = list(_candidates(lines[number][at:], lines[number + 1 :]))
    trace = decode(next(filter(_is_whole, candidates), candidates[0]))
    if problem := difference(trace, [*lines[:number], lines[number][:at]]):
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

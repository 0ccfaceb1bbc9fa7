"""One secure EPT entry and one vCPU as a finite machine: every click, with the module's answer to it.

Every answer comes from the checks of hw/tdx/checks.py; nothing is decided here.  The page is 4K, the tables over it
are there, and nobody else holds a lock of the module.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from enum import StrEnum
from typing import NamedTuple

from ..errors import InputError
from ..hw import tdx
from ..hw.tdx import EXIT_REASON_EPT_VIOLATION, Guest, Leaf, Level, Situation, Status, checks, told
from ..hw.tdx import pamt as tdx_pamt
from ..hw.tdx import sept as tdx_sept
from ..hw.tdx import tlb as tdx_tlb
from ..hw.tdx.entry import State
from ..hw.tdx.td import OpState, TdState
from ..hw.tdx.tlb import Age

ENTRY_STATES = (State.FREE, State.PENDING, State.MAPPED, State.BLOCKED, State.PENDING_BLOCKED)


class Click(StrEnum):
    """Something that KVM, the processor or the TD may do; `leaf` is the module's, `side` who does it."""

    leaf: Leaf | None
    side: str

    def __new__(cls, text: str, leaf: Leaf | None, side: str) -> Click:
        """Make the member `text`."""
        click = str.__new__(cls, text)
        click._value_, click.leaf, click.side = text, leaf, side
        return click

    FINALIZE = "MR.FINALIZE", Leaf.MR_FINALIZE, "KVM"
    ADD = "PAGE.ADD", Leaf.PAGE_ADD, "KVM"
    AUG = "PAGE.AUG", Leaf.PAGE_AUG, "KVM"
    BLOCK = "RANGE.BLOCK", Leaf.RANGE_BLOCK, "KVM"
    TRACK = "TRACK", Leaf.TRACK, "KVM"
    REMOVE = "PAGE.REMOVE", Leaf.PAGE_REMOVE, "KVM"
    UNBLOCK = "RANGE.UNBLOCK", Leaf.RANGE_UNBLOCK, "KVM"
    WBINVD = "PAGE.WBINVD", Leaf.PAGE_WBINVD, "KVM"
    ENTER = "VP.ENTER", Leaf.VP_ENTER, "vCPU"
    KICK = "kick", None, "vCPU"
    ACCESS = "access", None, "vCPU"
    ACCEPT = "ACCEPT", Leaf.ACCEPT, "vCPU"


class BoardState(NamedTuple):
    """Where the machine is.  `bepoch` is None while the entry is not blocked: nobody looks at it then."""

    op_state: OpState = OpState.RUNNABLE
    entry: State = State.FREE
    bepoch: Age | None = None
    inside: bool = False
    vcpu: Age = Age.PREVIOUS  # the epoch in which the vCPU last entered
    cached: bool = False  # it holds a translation of the page

    @property
    def pamt(self) -> tdx_pamt.PageType:
        """PAMT.PT of the page that the entry maps, or may map."""
        return tdx_pamt.PageType.NDA if self.entry == State.FREE else tdx_pamt.PageType.REG

    @property
    def ages_inside(self) -> tuple[Age, ...]:
        """The epochs of the vCPUs that the module counts as inside."""
        return (self.vcpu,) if self.inside else ()

    @property
    def tracked(self) -> bool:
        """Whether the module regards a blocked entry as tracked."""
        return self.bepoch is None or tdx_tlb.tracked_age(self.bepoch, self.ages_inside)


class Answer(NamedTuple):
    """What came of one click: RAX (None where none is returned), in words, and where the machine is then."""

    click: Click
    rax: int | None
    said: str
    after: BoardState

    @property
    def name(self) -> str:
        """The completion's name, or what became of the guest's instruction."""
        return self.said if self.rax is None else tdx.name(self.rax)

    @property
    def kind(self) -> str:
        """The completion's class; "" where there is none."""
        return "" if self.rax is None else tdx.kind(self.rax)


MEANINGS = {
    Status.SUCCESS: "done",
    Status.OP_STATE_INCORRECT: "not in this op state of the TD",
    Status.EPT_ENTRY_STATE_INCORRECT: "this leaf does not take an entry in this state",
    Status.PAGE_METADATA_INCORRECT: "the PAMT says that the page is still the TD's",
    Status.GPA_RANGE_NOT_BLOCKED: "BLOCK is missing",
    Status.GPA_RANGE_ALREADY_BLOCKED: "blocked before; not zero, so an error to KVM",
    Status.PREVIOUS_TLB_EPOCH_BUSY: "the vCPU is still inside with the epoch before this one",
    Status.PAGE_ALREADY_ACCEPTED: "mapped already; not zero, so a failure to Linux in the TD",
}
EXITS = {
    Guest.EXIT: "TD exit by an EPT violation; KVM's fault path is next",
    Guest.EXIT_PENDING: "TD exit: the page is not accepted; KVM ends such a VM",
    Guest.EXIT_ACCEPT: "TD exit by an EPT violation; ACCEPT runs again at the next entry",
}
_UNTRACKED = {
    Age.NOW: "no TRACK since the BLOCK",
    Age.PREVIOUS: "the vCPU is inside since before the TRACK",
}


def possible(at: BoardState, click: Click) -> bool:
    """Whether a click makes sense: only a vCPU that is inside acts, only one that is outside enters."""
    if click.side == "KVM":
        return True
    return at.inside != (click == Click.ENTER)


def answer(at: BoardState, click: Click) -> Answer:
    """What comes of a click; InputError for one that is not possible."""
    if not possible(at, click):
        raise InputError(
            f"{click}: the vCPU is {'inside already' if at.inside else 'outside: VP.ENTER first'}"
        )
    if click == Click.KICK:
        return Answer(click, None, "the vCPU leaves the TD", at._replace(inside=False))
    if click == Click.ACCESS:
        return _access(at)
    assert click.leaf is not None
    found = checks.answer(click.leaf, _told(at))
    if isinstance(found.status, Guest):
        return Answer(click, found.rax, EXITS[found.status], at._replace(inside=False))
    if not found.ok:
        meaning = MEANINGS.get(found.status) or _UNTRACKED[at.bepoch or Age.NOW]
        return Answer(click, found.rax, meaning, at)
    return _DONE[click](at) if click in _DONE else _on_entry(at, click, found.state or at.entry)


def _told(at: BoardState) -> Situation:
    """The place as the checks ask for it."""
    return told(
        td=TdState(op_state=at.op_state),
        state=at.entry,
        tracked=at.tracked,
        page=tdx_pamt.is_free(Level.PT, tdx_pamt.PamtEntry(at.pamt)),
        previous_inside=tdx_tlb.track_busy(at.ages_inside),
    )


def _finalize(at: BoardState) -> Answer:
    return Answer(
        Click.FINALIZE, 0, "the TD may run: tracking counts now", at._replace(op_state=OpState.RUNNABLE)
    )


def _track(at: BoardState) -> Answer:
    older = None if at.bepoch is None else tdx_tlb.track_age(at.bepoch)
    after = at._replace(vcpu=tdx_tlb.track_age(at.vcpu), bepoch=older)
    return Answer(Click.TRACK, 0, "a new epoch; nobody is flushed or kicked", after)


def _enter(at: BoardState) -> Answer:
    epoch, flushes = tdx_tlb.enter_age(at.vcpu)
    said = "inside; a new epoch, so its translations are dropped first" if flushes else "inside"
    return Answer(
        Click.ENTER, None, said, at._replace(inside=True, vcpu=epoch, cached=at.cached and not flushes)
    )


def _wbinvd(at: BoardState) -> Answer:
    return Answer(Click.WBINVD, 0, "the TD's lines go to memory", at)


_DONE = {Click.FINALIZE: _finalize, Click.TRACK: _track, Click.ENTER: _enter, Click.WBINVD: _wbinvd}


def _access(at: BoardState) -> Answer:
    if at.cached:
        return Answer(Click.ACCESS, None, f"ok, through the vCPU's cached translation ({at.entry})", at)
    found = tdx_sept.access(at.entry)
    if found == Guest.DATA:
        return Answer(Click.ACCESS, None, "ok, and the vCPU keeps the translation", at._replace(cached=True))
    return Answer(Click.ACCESS, EXIT_REASON_EPT_VIOLATION, EXITS[found], at._replace(inside=False))


def _on_entry(at: BoardState, click: Click, state: State) -> Answer:
    """A leaf that has changed the entry; BLOCK notes the epoch, for which nobody asks once it is not blocked."""
    bepoch = Age.NOW if click == Click.BLOCK else at.bepoch if state in tdx_sept.ANY_BLOCKED else None
    return Answer(click, 0, f"{at.entry} -> {state}", at._replace(entry=state, bepoch=bepoch))


def reachable(start: BoardState) -> list[BoardState]:
    """Every place that some sequence of clicks leads to, nearest first."""
    found = {start: None}
    for at in (queue := [start]):
        for click in Click:
            if possible(at, click) and (after := answer(at, click).after) not in found:
                found[after] = None
                queue.append(after)
    return list(found)


def find_click(name: str) -> Click:
    """Take a click by its name, with or without TDH.MEM. and the like; InputError names those that there are."""
    known = {str(click).lower(): click for click in Click}
    known |= {str(click.leaf).lower(): click for click in Click if click.leaf}
    known |= {short.rpartition(".")[2]: click for short, click in list(known.items())}
    if name.lower() in known:
        return known[name.lower()]
    near = get_close_matches(name.lower(), known, 1)
    hint = f" (did you mean {known[near[0]]}?)" if near else ""
    raise InputError(f"unknown click {name!r}{hint}; there are: {', '.join(Click)}")


def walked(start: BoardState, names: Sequence[str]) -> list[Answer]:
    """The answers to a sequence of clicks; InputError says which of them cannot be, and why."""
    found: list[Answer] = []
    for n, name in enumerate(names, 1):
        try:
            found.append(answer(found[-1].after if found else start, find_click(name)))
        except InputError as problem:
            raise InputError(f"click {n}: {problem}") from None
    return found

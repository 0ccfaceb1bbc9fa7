"""What each leaf of the module asks before it acts, in the order in which it asks: `CHECKS`, one tuple a leaf.

`answer` goes through the tuple and stops at the first check that refuses.  A check asks a `Situation`, and no more of
it than it needs: whoever has the machine (an object, cells of a state, arrays) says how each question is answered
there.  Source: TDX module 1.5.01, one file a leaf; helpers.c (check_state_map_tdcs_and_lock(),
lock_sept_check_and_walk_private_gpa(), check_and_lock_free_range_hpa()), pamt_walk().
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

from . import pamt, sept
from .locks import (
    BUSY_OPERAND,
    COMPATIBLE,
    NONE,
    EntryLock,
    Lock,
    acquire_entry,
    side,
    told_to_guest,
    wanted,
)
from .sept import ANY_BLOCKED, BY_LEVEL, DESCEND, FREE, Children, Outcome, State
from .td import BUILD, OP_STATE, TEARDOWN, OpState, TdState, running
from .words import EXIT_REASON_EPT_VIOLATION, Guest, Leaf, Level, Operand, Status, with_operand


class Situation(NamedTuple):
    """All that a leaf may ask about the machine that it meets; where nothing is said, nothing is in its way.

    Each question is a function that answers it.  It is called when a check asks, so that what it reads is read only
    if it matters.  Answering may have an effect: the first attempt to take a lock may use up an injected failure.
    """

    td: Callable[[], TdState] = TdState  # how far the TD is in its life
    held: Callable[[Lock], str] = lambda lock: (
        NONE
    )  # how others hold any lock but an S-EPT entry's: see entry_lock
    armed: Callable[[], bool] = lambda: False  # the vCPU's zero-step mitigation has GPAs to look at
    steps: Callable[[], bool] = lambda: False  # one of them would raise an EPT violation again
    named: Callable[[], bool] = lambda: True  # level and GPA name an entry that the leaf takes
    level: Callable[[], Level] = lambda: Level.PT  # the level that the call names
    above: Callable[[], Above | None] = lambda: (
        None
    )  # the last entry that the walk comes to above the named one
    entry_lock: Callable[[], EntryLock] = EntryLock  # of the named entry
    state: Callable[[], State] = lambda: FREE  # of the named entry
    tracked: Callable[[], bool] = lambda: True  # TLB tracking is done for the epoch in which it was blocked
    form: Callable[[], Status] = lambda: (
        Status.SUCCESS
    )  # the address given is a page's: aligned, and in a TDMR
    page: Callable[[], Status] = lambda: Status.SUCCESS  # what the PAMT says of that page (see pamt.is_free)
    child_locked: Callable[[], bool] = lambda: False  # PROMOTE meets a locked entry below before an unfit one
    children: Callable[[], Children] = lambda: Children.MIXED  # the 512 entries below
    interrupted: Callable[[], bool] = lambda: False  # an interrupt is pending on the processor
    previous_inside: Callable[[], bool] = lambda: (
        False
    )  # a vCPU is inside that entered in the epoch before this one
    ready: Callable[[], bool] = lambda: (
        True
    )  # what a leaf of the TD's life waits for is done (TEARDOWN, NOT_READY)


Above = tuple[Level, State]


def told(held: Mapping[Lock, str] | None = None, **answers: Any) -> Situation:
    """A situation whose answers are known beforehand, each by the name of its question, locks by `held`."""
    functions = {question: partial(_same, said) for question, said in answers.items()}
    return Situation(held=lambda lock: (held or {}).get(lock, NONE), **functions)


def _same(said: Any) -> Any:
    return said


_PASS = Outcome(Status.SUCCESS)


def _refuse_if(wrong: bool, status: Status | Guest, operand: int = 0) -> Outcome:
    return Outcome(status, operand) if wrong else _PASS


def _lock(lock: Lock, leaf: Leaf, at: Situation) -> Outcome:
    if leaf == Leaf.VP_ENTER and lock == Lock.TREE and not at.armed():
        return _PASS
    held = at.held(lock)
    if held == NONE or COMPATIBLE(held=held, wanted=wanted(leaf, lock, armed=True)):
        return _PASS
    return Outcome(Status.OPERAND_BUSY, BUSY_OPERAND(leaf=leaf, lock=lock))


def _build(leaf: Leaf, at: Situation) -> Outcome:
    td = at.td()
    return Outcome(BUILD(fatal=td.fatal, lifecycle=td.lifecycle))


def _op_state(leaf: Leaf, at: Situation) -> Outcome:
    return Outcome(OP_STATE(leaf=leaf, op_state=at.td().op_state))


def _named(leaf: Leaf, at: Situation) -> Outcome:
    return _refuse_if(not at.named(), Status.OPERAND_INVALID, Operand.RCX)


def _walk(leaf: Leaf, at: Situation) -> Outcome:
    above = at.above()
    if above is None:
        return _PASS
    found = sept.WALK(asker=sept.asker(leaf), state=above[1])
    return _PASS if found == DESCEND else _with_level(found, above[0])


def _with_level(found: Outcome, level: Level) -> Outcome:
    return found._replace(operand=level) if found.operand == BY_LEVEL else found


def _entry(leaf: Leaf, at: Situation) -> Outcome:
    status, _ = acquire_entry(side(leaf), at.entry_lock())
    if status == Status.SUCCESS:
        return _PASS
    return Outcome(told_to_guest(status), BUSY_OPERAND(leaf=leaf, lock=Lock.ENTRY))


def _state(leaf: Leaf, at: Situation) -> Outcome:
    return _with_level(sept.SEPT(leaf=leaf, state=at.state()), at.level())


def _blocked(leaf: Leaf, at: Situation) -> Outcome:
    # op_state_lookup.c: BLOCK and tracking are asked for only of a TD that may have vCPUs inside.
    needed = running(at.td().op_state)
    return _refuse_if(needed and at.state() not in ANY_BLOCKED, Status.GPA_RANGE_NOT_BLOCKED, Operand.RCX)


def _tracked(leaf: Leaf, at: Situation) -> Outcome:
    # tdh_mem_range_unblock.c: its tracking error names OPERAND_ID_SEPT_TREE, the others' name RCX.
    operand = Operand.SEPT_TREE if leaf == Leaf.RANGE_UNBLOCK else Operand.RCX
    needed = running(at.td().op_state)
    return _refuse_if(needed and not at.tracked(), Status.TLB_TRACKING_NOT_DONE, operand)


def _form(leaf: Leaf, at: Situation) -> Outcome:
    return Outcome(at.form(), pamt.PAGE_OPERAND[leaf])


def _page(leaf: Leaf, at: Situation) -> Outcome:
    return Outcome(at.page(), pamt.PAGE_OPERAND[leaf])


def _child_lock(leaf: Leaf, at: Situation) -> Outcome:
    return _refuse_if(at.child_locked(), Status.OPERAND_BUSY, Operand.RCX)


def _children(leaf: Leaf, at: Situation) -> Outcome:
    found: Outcome = sept.BELOW(leaf=leaf, children=at.children())
    return found


def _interrupt(leaf: Leaf, at: Situation) -> Outcome:
    return _refuse_if(at.interrupted(), Status.INTERRUPTED_RESTARTABLE)


def _previous_epoch(leaf: Leaf, at: Situation) -> Outcome:
    return _refuse_if(at.previous_inside(), Status.PREVIOUS_TLB_EPOCH_BUSY)


def _stepping(leaf: Leaf, at: Situation) -> Outcome:
    return _refuse_if(at.armed() and at.steps(), Guest.EXIT)


NOT_READY = {
    Leaf.MR_FINALIZE: Status.NO_VCPUS,
    Leaf.VP_FLUSH: Status.VCPU_NOT_ASSOCIATED,
    Leaf.CACHE_WB: Status.NO_HKID_READY_TO_WBCACHE,
}


def _ready(leaf: Leaf, at: Situation) -> Outcome:
    return _refuse_if(not at.ready(), NOT_READY[leaf])


def _keys(leaf: Leaf, at: Situation) -> Outcome:
    return Outcome(BUILD(fatal=False, lifecycle=at.td().lifecycle))


def _teardown(leaf: Leaf, at: Situation) -> Outcome:
    return Outcome(TEARDOWN(leaf=leaf, lifecycle=at.td().lifecycle, ready=at.ready()))


class Check(StrEnum):
    """One question of a leaf: SUCCESS lets it go on, and may say what becomes of the entry; all else refuses.

    `reports`: a SEAMCALL that is refused here shows the entry in RCX and its level in RDX; else both are 0.
    """

    ask: Callable[[Leaf, Situation], Outcome]
    reports: bool

    def __new__(cls, text: str, ask: Callable[[Leaf, Situation], Outcome], reports: bool = False) -> Check:
        """Make the member `text`."""
        check = str.__new__(cls, text)
        check._value_, check.ask, check.reports = text, ask, reports
        return check

    TDR = "TDR lock", partial(_lock, Lock.TDR)
    BUILT = "fatal, lifecycle", _build
    KEYS = "lifecycle", _keys
    OP_STATE_LOCK = "op state lock", partial(_lock, Lock.OP_STATE)
    OP_STATE = "op state", _op_state
    NAMED = "level and GPA", _named
    TREE = "S-EPT tree lock", partial(_lock, Lock.TREE)
    WALK = "walk", _walk, True
    ENTRY = "S-EPT entry lock", _entry, True
    STATE = "entry state", _state, True
    BLOCKED = "blocked", _blocked, True
    TRACKED = "TLB tracking", _tracked
    FORM = "address of the page", _form
    PARENTS = "PAMT locks above the page", partial(_lock, Lock.PARENTS)
    PAMT = "PAMT lock of the page", partial(_lock, Lock.PAMT)
    PAGE = "PAMT type of the page", _page
    CHILD = "lock of an entry below", _child_lock, True
    CHILDREN = "entries below", _children, True
    INTERRUPT = "interrupt", _interrupt
    LARGE = "PAMT lock of the large page", partial(_lock, Lock.LARGE)
    EPOCH = "epoch lock", partial(_lock, Lock.EPOCH)
    PREVIOUS = "vCPUs of the previous epoch", _previous_epoch
    STEPPING = "zero-step mitigation", _stepping
    READY = "what the leaf waits for", _ready
    ENDING = "lifecycle, then what the leaf waits for", _teardown


class Answer(NamedTuple):
    """What a leaf answers: completion (or TD exit), its low word, the entry's state then, and the check that refused.

    `state` is None where the leaf leaves the entry alone.
    """

    status: Status | Guest
    operand: int = 0
    state: State | None = None
    by: Check | None = None

    @property
    def ok(self) -> bool:
        """Whether the leaf did what it is for."""
        return self.status == Status.SUCCESS

    @property
    def rax(self) -> int:
        """RAX bit for bit: the leaf's own, or VP.ENTER's after the TD exit in which a guest's instruction ends."""
        if isinstance(self.status, Guest):
            return EXIT_REASON_EPT_VIOLATION
        return with_operand(self.status, self.operand)


_TD = (Check.TDR, Check.BUILT, Check.OP_STATE_LOCK, Check.OP_STATE)
_ON_ENTRY = (*_TD, Check.NAMED, Check.TREE, Check.WALK, Check.ENTRY, Check.STATE)
_FIND_PAGE = (Check.FORM, Check.PARENTS, Check.PAMT)
_GIVEN = (*_FIND_PAGE, Check.PAGE)  # a page comes with the call
_UNUSED = (Check.BLOCKED, Check.TRACKED)  # no vCPU can use the entry any more
_RESIZED = (Check.INTERRUPT, Check.LARGE)
_OWN = Check.PAMT  # pamt_implicit_get_and_lock(): the page of the entry, whose parents are not locked

CHECKS: dict[Leaf, tuple[Check, ...]] = {
    # tdh_mem_page_add.c has the TDR exclusive, and so needs no lock below it.
    Leaf.PAGE_ADD: (Check.TDR, Check.BUILT, Check.OP_STATE, Check.NAMED, Check.WALK, Check.STATE, *_GIVEN),
    Leaf.SEPT_ADD: (*_ON_ENTRY, *_GIVEN),
    Leaf.PAGE_AUG: (*_ON_ENTRY, *_GIVEN),
    Leaf.RANGE_BLOCK: _ON_ENTRY,
    Leaf.RANGE_UNBLOCK: (*_ON_ENTRY, Check.TRACKED),
    Leaf.PAGE_REMOVE: (*_ON_ENTRY, _OWN, *_UNUSED),
    Leaf.PAGE_DEMOTE: (*_ON_ENTRY, *_UNUSED, *_GIVEN, *_RESIZED),
    Leaf.PAGE_PROMOTE: (*_ON_ENTRY, _OWN, *_UNUSED, Check.CHILD, Check.CHILDREN, *_RESIZED),
    Leaf.SEPT_REMOVE: (*_ON_ENTRY, _OWN, *_UNUSED, Check.CHILDREN),
    # check_tdaccept_failure(): a walk that ends above its level is answered before any lock is tried.
    Leaf.ACCEPT: (Check.NAMED, Check.WALK, Check.ENTRY, Check.STATE),
    Leaf.TRACK: (*_TD, Check.EPOCH, Check.PREVIOUS),
    Leaf.VP_ENTER: (*_TD, Check.EPOCH, Check.TREE, Check.STEPPING),
    Leaf.MR_FINALIZE: (Check.TDR, Check.BUILT, Check.OP_STATE, Check.READY),
    Leaf.VP_FLUSH: (Check.TDR, Check.KEYS, Check.READY),
    Leaf.MNG_VPFLUSHDONE: (Check.TDR, Check.ENDING),
    Leaf.CACHE_WB: (Check.READY,),
    Leaf.MNG_KEY_FREEID: (Check.TDR, Check.ENDING),
    Leaf.PAGE_RECLAIM: (*_FIND_PAGE, Check.PAGE, Check.TDR, Check.ENDING),
    Leaf.PAGE_WBINVD: _GIVEN,
    Leaf.PAGE_RDMD: _FIND_PAGE,
}


def answer(leaf: Leaf, at: Situation, checks: Sequence[Check] | None = None) -> Answer:
    """Ask the checks of a leaf in their order, and answer as the first that refuses says; else as a success.

    `checks`: a part of CHECKS[leaf], for a leaf that is followed in two steps (see `around`).
    """
    state = None
    for check in CHECKS[leaf] if checks is None else checks:
        found = check.ask(leaf, at)
        if found.status != Status.SUCCESS:
            return Answer(found.status, int(found.operand or 0), None, check)
        state = found.state or state
    return Answer(Status.SUCCESS, 0, state)


def around(leaf: Leaf, check: Check) -> tuple[tuple[Check, ...], tuple[Check, ...]]:
    """The checks of a leaf up to one, and those after it: what it asks before it has a lock, and what then."""
    n = CHECKS[leaf].index(check) + 1
    return CHECKS[leaf][:n], CHECKS[leaf][n:]


def came_to(leaf: Leaf, check: Check, found: Answer) -> bool:
    """Whether a leaf that answered `found` came as far as asking a check of its own."""
    order = CHECKS[leaf]
    return check in order and (found.by is None or order.index(check) <= order.index(found.by))


def seamcall(
    leaf: Leaf,
    state: State,
    *,
    running: bool = True,
    tracked: bool = True,
    page_free: bool = True,
    children: Children = Children.MIXED,
    level: Level | None = None,
) -> Answer:
    """One leaf on one entry, nobody else being about: the answer, with the entry's state afterwards.

    `running`: the TD is finalized, so TLB tracking counts; `tracked`: the entry's BEPOCH is (tlb.tracked);
    `page_free`: the page given is free in the PAMT; `level`: of the entry (PT if not given, and not checked).
    ValueError for a leaf that works on no entry.
    """
    if leaf not in sept.LEAVES:
        raise ValueError(f"{leaf} works on no S-EPT entry; these do: {', '.join(sept.LEAVES)}")
    found = answer(
        leaf,
        told(
            td=TdState(op_state=OpState.RUNNABLE if running else OpState.INITIALIZED),
            named=level is None or bool(sept.LEVELS(leaf=leaf, level=level, top=Level.PML5)),
            level=level or Level.PT,
            state=state,
            tracked=tracked,
            page=Status.SUCCESS if page_free else Status.PAGE_METADATA_INCORRECT,
            children=children,
        ),
    )
    return found._replace(state=found.state or state)

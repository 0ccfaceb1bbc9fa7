"""The secure EPT: what each leaf does to an entry, and what a TD finds there.

Pure functions and tables of one entry; locks are in tdx_locks.py, the PAMT in tdx_pamt.py, epochs in tdx_tlb.py.
The order of the module's checks: TD (lifecycle, then op state), level and GPA, tree lock, walk, entry lock, entry
state, blocked, tracked, then the page given or the children.
Source: TDX module 1.5.01, sept_state_lookup.c, sept_manager.[ch], one file a leaf.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from ..rules import ANY, Rules
from .entry import State as State
from .words import EXIT_REASON_EPT_VIOLATION, Guest, Leaf, Level, Operand, Status, with_operand

FREE, NL_MAPPED, NL_BLOCKED, MAPPED, BLOCKED, PENDING, PENDING_BLOCKED = STATES = tuple(State)
PRESENT, TABLES = frozenset({MAPPED, PENDING}), frozenset({NL_MAPPED, NL_BLOCKED})
BLOCKED_PAGES = frozenset({BLOCKED, PENDING_BLOCKED})
ANY_BLOCKED = BLOCKED_PAGES | {NL_BLOCKED}
UNBLOCKED = {NL_BLOCKED: NL_MAPPED, BLOCKED: MAPPED, PENDING_BLOCKED: PENDING}


class Tracking(StrEnum):
    """Whether TLB tracking stands in the way: not before finalize; later it is done or not (tdx_tlb.tracked)."""

    NOT_NEEDED = "not needed"
    DONE = "done"
    MISSING = "missing"


class Children(StrEnum):
    """The 512 entries of a table: all free, all mapped or all pending with contiguous aligned HPAs, or else."""

    FREE = "free"
    MAPPED = "mapped"
    PENDING = "pending"
    MIXED = "mixed"


class Outcome(NamedTuple):
    """A row's outcome; `operand` may be BY_LEVEL, `state` None leaves the entry as it is."""

    status: Status | Guest
    operand: Operand | str | None = None
    state: State | None = None

    def __str__(self) -> str:
        operand = "" if self.operand is None else f" {getattr(self.operand, 'name', self.operand)}"
        return f"{self.status}{operand}" if self.state is None else f"-> {self.state}"


class Answer(NamedTuple):
    """What one leaf answers about one entry: completion (or TD exit), its low word, the entry's state afterwards."""

    status: Status | Guest
    operand: int
    state: State

    @property
    def ok(self) -> bool:
        """Whether the leaf did what it is for."""
        return self.status == Status.SUCCESS

    @property
    def rax(self) -> int:
        """RAX bit for bit: the leaf's own, or VP.ENTER's after the TD exit that ACCEPT ends in."""
        if isinstance(self.status, Guest):
            return EXIT_REASON_EPT_VIOLATION
        return with_operand(self.status, self.operand)


BY_LEVEL = "level"  # the low word is the level of the entry, not an operand
DESCEND = "descend"


def _to(state: State) -> Outcome:
    return Outcome(Status.SUCCESS, None, state)


_STATE = Outcome(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
_NOT_BLOCKED = Outcome(Status.GPA_RANGE_NOT_BLOCKED, Operand.RCX)
_ALREADY_BLOCKED = Outcome(Status.GPA_RANGE_ALREADY_BLOCKED, Operand.RCX)
_UNTRACKED = Outcome(Status.TLB_TRACKING_NOT_DONE, Operand.RCX)
_UNTRACKED_TREE = Outcome(Status.TLB_TRACKING_NOT_DONE, Operand.SEPT_TREE)
_PAGE = Outcome(Status.PAGE_METADATA_INCORRECT, Operand.R8)
_CHILDREN = Outcome(Status.EPT_INVALID_PROMOTE_CONDITIONS, Operand.RCX)
_NOT_EMPTY = Outcome(Status.EPT_PAGE_NOT_FREE, Operand.RCX)
_ADD, _SEPT_ADD, _AUG, _ACCEPT = Leaf.PAGE_ADD, Leaf.SEPT_ADD, Leaf.PAGE_AUG, Leaf.ACCEPT
_BLOCK, _UNBLOCK, _REMOVE = Leaf.RANGE_BLOCK, Leaf.RANGE_UNBLOCK, Leaf.PAGE_REMOVE
_DEMOTE, _PROMOTE, _SEPT_REMOVE = Leaf.PAGE_DEMOTE, Leaf.PAGE_PROMOTE, Leaf.SEPT_REMOVE
LEAVES = (
    _ADD, _SEPT_ADD, _AUG, _BLOCK, _UNBLOCK, _REMOVE, _DEMOTE, _PROMOTE, _SEPT_REMOVE, _ACCEPT
)  # fmt: skip
_NO, _DONE, _MISSING = Tracking
_READY, _RUNNING = frozenset({_NO, _DONE}), frozenset({_DONE, _MISSING})
_NOT_FREE = frozenset(STATES) - {FREE}
_ALL_FREE, _ALL_MAPPED, _ALL_PENDING, _MIXED = Children

SEPT = Rules(
    "TDX module 1.5.01, sept_state_lookup.c and one file a leaf: the state machine of a secure EPT entry",
    {
        "leaf": LEAVES,
        "state": STATES,  # of the entry at the level that the call names
        "tracking": tuple(Tracking),
        "page_free": (True, False),  # PAMT of the page given in R8 (tdx_pamt.is_free)
        "children": tuple(Children),  # of the table that the entry points to
    },
    [
        # op_state_lookup.c: INITIALIZED alone lets PAGE.ADD in; tdh_mem_page_add.c asks that before all else here.
        (_ADD, ANY, _RUNNING, ANY, ANY, Outcome(Status.OP_STATE_INCORRECT)),
        (_ADD, FREE, _NO, True, ANY, _to(MAPPED)),
        (_ADD, FREE, _NO, False, ANY, _PAGE),
        (_ADD, _NOT_FREE, _NO, ANY, ANY, _STATE),
        (frozenset({_AUG, _SEPT_ADD}), _NOT_FREE, ANY, ANY, ANY, _STATE),
        (frozenset({_AUG, _SEPT_ADD}), FREE, ANY, False, ANY, _PAGE),
        (_AUG, FREE, ANY, True, ANY, _to(PENDING)),
        (_SEPT_ADD, FREE, ANY, True, ANY, _to(NL_MAPPED)),
        (_BLOCK, FREE, ANY, ANY, ANY, _STATE),
        (_BLOCK, NL_MAPPED, ANY, ANY, ANY, _to(NL_BLOCKED)),
        (_BLOCK, MAPPED, ANY, ANY, ANY, _to(BLOCKED)),
        (_BLOCK, PENDING, ANY, ANY, ANY, _to(PENDING_BLOCKED)),
        (_BLOCK, ANY_BLOCKED, ANY, ANY, ANY, _ALREADY_BLOCKED),
        (_UNBLOCK, frozenset(STATES) - ANY_BLOCKED, ANY, ANY, ANY, _STATE),
        # tdh_mem_range_unblock.c: its tracking error names OPERAND_ID_SEPT_TREE, the others' name RCX.
        (_UNBLOCK, ANY_BLOCKED, _MISSING, ANY, ANY, _UNTRACKED_TREE),
        (_UNBLOCK, NL_BLOCKED, _READY, ANY, ANY, _to(NL_MAPPED)),
        (_UNBLOCK, BLOCKED, _READY, ANY, ANY, _to(MAPPED)),
        (_UNBLOCK, PENDING_BLOCKED, _READY, ANY, ANY, _to(PENDING)),
        (frozenset({_REMOVE, _DEMOTE}), TABLES | {FREE}, ANY, ANY, ANY, _STATE),
        (frozenset({_REMOVE, _DEMOTE}), PRESENT, _RUNNING, ANY, ANY, _NOT_BLOCKED),
        (frozenset({_REMOVE, _DEMOTE}), BLOCKED_PAGES, _MISSING, ANY, ANY, _UNTRACKED),
        # op_state_lookup.c: tracking, and with it BLOCK, is asked for only of a TD that may have vCPUs inside.
        (_REMOVE, PRESENT, _NO, ANY, ANY, _to(FREE)),
        (_REMOVE, BLOCKED_PAGES, _READY, ANY, ANY, _to(FREE)),
        (_DEMOTE, PRESENT, _NO, False, ANY, _PAGE),
        (_DEMOTE, BLOCKED_PAGES, _READY, False, ANY, _PAGE),
        (_DEMOTE, PRESENT, _NO, True, ANY, _to(NL_MAPPED)),  # children: see demoted()
        (_DEMOTE, BLOCKED_PAGES, _READY, True, ANY, _to(NL_MAPPED)),
        (frozenset({_PROMOTE, _SEPT_REMOVE}), PRESENT | BLOCKED_PAGES | {FREE}, ANY, ANY, ANY, _STATE),
        (frozenset({_PROMOTE, _SEPT_REMOVE}), NL_MAPPED, _RUNNING, ANY, ANY, _NOT_BLOCKED),
        (frozenset({_PROMOTE, _SEPT_REMOVE}), NL_BLOCKED, _MISSING, ANY, ANY, _UNTRACKED),
        (_PROMOTE, NL_MAPPED, _NO, ANY, frozenset({_ALL_FREE, _MIXED}), _CHILDREN),
        (_PROMOTE, NL_MAPPED, _NO, ANY, _ALL_MAPPED, _to(MAPPED)),
        (_PROMOTE, NL_MAPPED, _NO, ANY, _ALL_PENDING, _to(PENDING)),
        (_PROMOTE, NL_BLOCKED, _READY, ANY, frozenset({_ALL_FREE, _MIXED}), _CHILDREN),
        # tdh_mem_page_promote.c: the large entry is a copy of the first small one, so it is not blocked.
        (_PROMOTE, NL_BLOCKED, _READY, ANY, _ALL_MAPPED, _to(MAPPED)),
        (_PROMOTE, NL_BLOCKED, _READY, ANY, _ALL_PENDING, _to(PENDING)),
        (_SEPT_REMOVE, NL_MAPPED, _NO, ANY, _ALL_FREE, _to(FREE)),
        (_SEPT_REMOVE, NL_BLOCKED, _READY, ANY, _ALL_FREE, _to(FREE)),
        (_SEPT_REMOVE, NL_MAPPED, _NO, ANY, frozenset(Children) - {_ALL_FREE}, _NOT_EMPTY),
        (_SEPT_REMOVE, NL_BLOCKED, _READY, ANY, frozenset(Children) - {_ALL_FREE}, _NOT_EMPTY),
        (_ACCEPT, PENDING, ANY, ANY, ANY, _to(MAPPED)),
        (_ACCEPT, MAPPED, ANY, ANY, ANY, Outcome(Status.PAGE_ALREADY_ACCEPTED, BY_LEVEL)),
        # check_tdaccept_failure(), case 3: a table where a page is asked for is a size mismatch, blocked or not.
        (_ACCEPT, TABLES, ANY, ANY, ANY, Outcome(Status.PAGE_SIZE_MISMATCH, BY_LEVEL)),
        (_ACCEPT, BLOCKED_PAGES | {FREE}, ANY, ANY, ANY, Outcome(Guest.EXIT_ACCEPT)),
    ],
)  # fmt: skip

WALK = Rules(
    "TDX module 1.5.01, secure_ept_walk() and check_tdaccept_failure(): an entry above the level asked for",
    {"asker": ("SEAMCALL", "ACCEPT"), "state": STATES},
    [
        (ANY, NL_MAPPED, DESCEND),
        ("SEAMCALL", frozenset(STATES) - {NL_MAPPED}, Status.EPT_WALK_FAILED),  # operand RCX
        ("ACCEPT", MAPPED, Status.PAGE_ALREADY_ACCEPTED),  # a larger page; the low word is its level
        ("ACCEPT", frozenset(STATES) - {NL_MAPPED, MAPPED}, Guest.EXIT_ACCEPT),
    ],
)

ACCESS = Rules(
    "TDX module 1.5.01, td_ept_violation_exit(): where the walk of a TD's private access ends",
    {"state": STATES, "ve_disable": (False, True)},  # TDCS.TD_CTLS.PENDING_VE_DISABLE
    [
        (NL_MAPPED, ANY, DESCEND),
        (MAPPED, ANY, Guest.DATA),
        (PENDING, False, Guest.VE),
        (PENDING, True, Guest.EXIT_PENDING),
        # sept_manager.c: every L1 entry has suppress-#VE set, so only a TD exit is left.
        (ANY_BLOCKED | {FREE}, ANY, Guest.EXIT),
    ],
)

LEVELS = Rules(
    "TDX module 1.5.01, verify_page_info_input(): levels that a leaf takes in RCX (else OPERAND_INVALID, RCX)",
    {"leaf": LEAVES, "level": tuple(Level), "top": (Level.PML4, Level.PML5)},
    [
        (_ADD, Level.PT, ANY, True),
        (_ADD, frozenset(Level) - {Level.PT}, ANY, False),
        (frozenset({_AUG, _ACCEPT}), frozenset({Level.PT, Level.PD}), ANY, True),
        (frozenset({_AUG, _ACCEPT}), frozenset({Level.PDPT, Level.PML4, Level.PML5}), ANY, False),
        (_REMOVE, frozenset({Level.PT, Level.PD, Level.PDPT}), ANY, True),
        (frozenset({_REMOVE, _DEMOTE, _PROMOTE}), frozenset({Level.PML4, Level.PML5}), ANY, False),
        (frozenset({_DEMOTE, _PROMOTE}), frozenset({Level.PD, Level.PDPT}), ANY, True),
        (frozenset({_DEMOTE, _PROMOTE, _SEPT_ADD, _SEPT_REMOVE}), Level.PT, ANY, False),
        (frozenset({_SEPT_ADD, _SEPT_REMOVE}), frozenset({Level.PD, Level.PDPT, Level.PML4}), ANY, True),
        (frozenset({_BLOCK, _UNBLOCK}), frozenset(Level) - {Level.PML5}, ANY, True),
        (frozenset({_SEPT_ADD, _SEPT_REMOVE, _BLOCK, _UNBLOCK}), Level.PML5, Level.PML5, True),
        (frozenset({_SEPT_ADD, _SEPT_REMOVE, _BLOCK, _UNBLOCK}), Level.PML5, Level.PML4, False),
    ],
    outcome="taken",
)  # fmt: skip


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
    """One leaf on one entry, no lock being taken: the answer, with the entry's state afterwards.

    `running`: the TD is finalized, so TLB tracking counts; `tracked`: the entry's BEPOCH is (tdx_tlb.tracked);
    `page_free`: the page given is free in the PAMT; `level`: of the entry (PT if not given, and not checked).
    ValueError for a leaf that works on no entry.
    """
    tracking = _NO if not running else _DONE if tracked else _MISSING
    row: Outcome = SEPT(leaf=leaf, state=state, tracking=tracking, page_free=page_free, children=children)
    # tdh_mem_page_add.c and its neighbours call check_state_map_tdcs_and_lock(), where the op state is asked, before
    # verify_page_info_input(), where the level is.
    wrong_level = level is not None and not LEVELS(leaf=leaf, level=level, top=Level.PML5)
    if wrong_level and row.status != Status.OP_STATE_INCORRECT:
        return Answer(Status.OPERAND_INVALID, Operand.RCX, state)
    operand = level or Level.PT if row.operand == BY_LEVEL else row.operand or 0
    return Answer(row.status, int(operand), row.state or state)


def walk(asker: str, state: State, level: Level) -> Answer | None:
    """Meet an entry above the level asked for, as a "SEAMCALL" or "ACCEPT": None to walk on, else the answer."""
    outcome: Status | Guest | str = WALK(asker=asker, state=state)
    if outcome == DESCEND:
        return None
    assert isinstance(outcome, (Status, Guest))
    return Answer(outcome, level if outcome == Status.PAGE_ALREADY_ACCEPTED else Operand.RCX, state)


def access(state: State, *, ve_disable: bool = True) -> Guest:
    """A TD's access through a private GPA whose walk ends at an entry in this state; ValueError for NL_MAPPED."""
    return Guest(ACCESS(state=state, ve_disable=ve_disable))


def demoted(state: State) -> State:
    """Return the state of the 512 children that DEMOTE makes of an entry: as it was, but not blocked."""
    return UNBLOCKED.get(state, state)

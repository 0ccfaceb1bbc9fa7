"""The secure EPT: what each leaf does to an entry, and what a TD finds there.

Pure functions and tables of one entry; when a leaf looks at it, and what it asks before and after, is in checks.py.
Source: TDX module 1.5.01, sept_state_lookup.c, sept_manager.[ch], one file a leaf.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from ..rules import ANY, Rules
from .entry import State as State
from .words import Guest, Leaf, Level, Operand, Status

FREE, NL_MAPPED, NL_BLOCKED, MAPPED, BLOCKED, PENDING, PENDING_BLOCKED = STATES = tuple(State)
TABLES, BLOCKED_PAGES = frozenset({NL_MAPPED, NL_BLOCKED}), frozenset({BLOCKED, PENDING_BLOCKED})
PAGES = frozenset(state for state in STATES if state.leaf)
ANY_BLOCKED = BLOCKED_PAGES | {NL_BLOCKED}
UNBLOCKED = {NL_BLOCKED: NL_MAPPED, BLOCKED: MAPPED, PENDING_BLOCKED: PENDING}


class Children(StrEnum):
    """The 512 entries of a table: all free, all mapped or all pending with contiguous aligned HPAs, or else."""

    FREE = "free"
    MAPPED = "mapped"
    PENDING = "pending"
    MIXED = "mixed"


class Outcome(NamedTuple):
    """A row's outcome; `operand` may be BY_LEVEL, `state` None leaves the entry as it is."""

    status: Status | Guest
    operand: int | str | None = None
    state: State | None = None

    def __str__(self) -> str:
        operand = "" if self.operand is None else f" {getattr(self.operand, 'name', self.operand)}"
        return f"{self.status}{operand}" if self.state is None else f"-> {self.state}"


BY_LEVEL = "level"  # the low word is the level of the entry, not an operand
DESCEND = "descend"


def _to(state: State) -> Outcome:
    return Outcome(Status.SUCCESS, None, state)


_STATE = Outcome(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
_ALREADY_BLOCKED = Outcome(Status.GPA_RANGE_ALREADY_BLOCKED, Operand.RCX)
_CHILDREN = Outcome(Status.EPT_INVALID_PROMOTE_CONDITIONS, Operand.RCX)
_NOT_EMPTY = Outcome(Status.EPT_PAGE_NOT_FREE, Operand.RCX)
_ADD, _SEPT_ADD, _AUG, _ACCEPT = Leaf.PAGE_ADD, Leaf.SEPT_ADD, Leaf.PAGE_AUG, Leaf.ACCEPT
_BLOCK, _UNBLOCK, _REMOVE = Leaf.RANGE_BLOCK, Leaf.RANGE_UNBLOCK, Leaf.PAGE_REMOVE
_DEMOTE, _PROMOTE, _SEPT_REMOVE = Leaf.PAGE_DEMOTE, Leaf.PAGE_PROMOTE, Leaf.SEPT_REMOVE
LEAVES = (
    _ADD, _SEPT_ADD, _AUG, _BLOCK, _UNBLOCK, _REMOVE, _DEMOTE, _PROMOTE, _SEPT_REMOVE, _ACCEPT
)  # fmt: skip
_NOT_FREE = frozenset(STATES) - {FREE}
_ALL_FREE, _ALL_MAPPED, _ALL_PENDING, _MIXED = Children

SEPT = Rules(
    "TDX module 1.5.01, sept_state_lookup.c and one file a leaf: the state machine of a secure EPT entry",
    {"leaf": LEAVES, "state": STATES},  # of the entry at the level that the call names
    [
        (_ADD, FREE, _to(MAPPED)),
        (frozenset({_ADD, _AUG, _SEPT_ADD}), _NOT_FREE, _STATE),
        (_AUG, FREE, _to(PENDING)),
        (_SEPT_ADD, FREE, _to(NL_MAPPED)),
        (_BLOCK, FREE, _STATE),
        (_BLOCK, NL_MAPPED, _to(NL_BLOCKED)),
        (_BLOCK, MAPPED, _to(BLOCKED)),
        (_BLOCK, PENDING, _to(PENDING_BLOCKED)),
        (_BLOCK, ANY_BLOCKED, _ALREADY_BLOCKED),
        (_UNBLOCK, frozenset(STATES) - ANY_BLOCKED, _STATE),
        (_UNBLOCK, NL_BLOCKED, _to(NL_MAPPED)),
        (_UNBLOCK, BLOCKED, _to(MAPPED)),
        (_UNBLOCK, PENDING_BLOCKED, _to(PENDING)),
        (frozenset({_REMOVE, _DEMOTE}), TABLES | {FREE}, _STATE),
        (_REMOVE, PAGES, _to(FREE)),
        (_DEMOTE, PAGES, _to(NL_MAPPED)),  # children: see demoted()
        (frozenset({_PROMOTE, _SEPT_REMOVE}), PAGES | {FREE}, _STATE),
        (frozenset({_PROMOTE, _SEPT_REMOVE}), TABLES, Outcome(Status.SUCCESS)),  # to what is below: see BELOW
        (_ACCEPT, PENDING, _to(MAPPED)),
        (_ACCEPT, MAPPED, Outcome(Status.PAGE_ALREADY_ACCEPTED, BY_LEVEL)),
        # check_tdaccept_failure(), case 3: a table where a page is asked for is a size mismatch, blocked or not.
        (_ACCEPT, TABLES, Outcome(Status.PAGE_SIZE_MISMATCH, BY_LEVEL)),
        (_ACCEPT, BLOCKED_PAGES | {FREE}, Outcome(Guest.EXIT_ACCEPT)),
    ],
)

BELOW = Rules(
    "TDX module 1.5.01, is_sept_page_valid_for_merge() and tdh_mem_sept_remove.c: the table that an entry points to",
    {"leaf": (_PROMOTE, _SEPT_REMOVE), "children": tuple(Children)},
    [
        (_PROMOTE, frozenset({_ALL_FREE, _MIXED}), _CHILDREN),
        # tdh_mem_page_promote.c: the large entry is a copy of the first small one, so it is not blocked.
        (_PROMOTE, _ALL_MAPPED, _to(MAPPED)),
        (_PROMOTE, _ALL_PENDING, _to(PENDING)),
        (_SEPT_REMOVE, _ALL_FREE, _to(FREE)),
        (_SEPT_REMOVE, frozenset(Children) - {_ALL_FREE}, _NOT_EMPTY),
    ],
)

WALK = Rules(
    "TDX module 1.5.01, secure_ept_walk() and check_tdaccept_failure(): an entry above the level asked for",
    {"asker": ("SEAMCALL", "ACCEPT"), "state": STATES},
    [
        (ANY, NL_MAPPED, DESCEND),
        ("SEAMCALL", frozenset(STATES) - {NL_MAPPED}, Outcome(Status.EPT_WALK_FAILED, Operand.RCX)),
        ("ACCEPT", MAPPED, Outcome(Status.PAGE_ALREADY_ACCEPTED, BY_LEVEL)),  # a larger page
        ("ACCEPT", frozenset(STATES) - {NL_MAPPED, MAPPED}, Outcome(Guest.EXIT_ACCEPT)),
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


def asker(leaf: Leaf) -> str:
    """Who walks the tree for a leaf, as WALK has it."""
    return "ACCEPT" if leaf == Leaf.ACCEPT else "SEAMCALL"


def access(state: State, *, ve_disable: bool = True) -> Guest:
    """A TD's access through a private GPA whose walk ends at an entry in this state; ValueError for NL_MAPPED."""
    return Guest(ACCESS(state=state, ve_disable=ve_disable))


def demoted(state: State) -> State:
    """Return the state of the 512 children that DEMOTE makes of an entry: as it was, but not blocked."""
    return UNBLOCKED.get(state, state)

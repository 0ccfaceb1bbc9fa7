"""The module's locks: who takes which, how, and which busy code the loser gets.

All are try-locks: nobody waits, the loser's leaf returns.  Source: TDX module 1.5.01, tdx_locks.h, one file a leaf;
the same tables in Yan Zhao's mails of January and February 2025.  Left out: TDVPR pages, KOT, WBT.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from ..rules import ANY, Rules
from .words import Leaf, Operand, Status


class Lock(StrEnum):
    """A lock of the module; when a leaf takes it is in checks.py."""

    TDR = "TDR"  # PAMT entry of the TD's root page
    OP_STATE = "op_state"
    EPOCH = "epoch"
    TREE = "S-EPT tree"
    ENTRY = "S-EPT entry"  # TDEL, bit 11 of the entry
    PARENTS = "PAMT parents"  # 2M and 1G entries over the page
    PAMT = "PAMT entry"
    LARGE = "PAMT entry of the large page"


NONE, SHARED, EXCLUSIVE = "", "shared", "exclusive"
_ADD, _SEPT_ADD, _AUG, _ACCEPT = Leaf.PAGE_ADD, Leaf.SEPT_ADD, Leaf.PAGE_AUG, Leaf.ACCEPT
_BLOCK, _UNBLOCK, _REMOVE = Leaf.RANGE_BLOCK, Leaf.RANGE_UNBLOCK, Leaf.PAGE_REMOVE
_DEMOTE, _PROMOTE, _SEPT_REMOVE = Leaf.PAGE_DEMOTE, Leaf.PAGE_PROMOTE, Leaf.SEPT_REMOVE
_TRACK, _ENTER, _RECLAIM, _WBINVD = Leaf.TRACK, Leaf.VP_ENTER, Leaf.PAGE_RECLAIM, Leaf.PAGE_WBINVD
_TREE_SHARED = frozenset({_SEPT_ADD, _AUG, _REMOVE, _DEMOTE, _PROMOTE})
_TREE_EXCLUSIVE = frozenset({_BLOCK, _UNBLOCK, _SEPT_REMOVE})
_TREE = _TREE_SHARED | _TREE_EXCLUSIVE
_LIFECYCLE = frozenset({_ADD, Leaf.MR_FINALIZE, Leaf.MNG_VPFLUSHDONE, Leaf.MNG_KEY_FREEID})
_LEAVES = frozenset(Leaf)
_RESIZES = frozenset({_DEMOTE, _PROMOTE})
_GIVEN = frozenset({_ADD, _SEPT_ADD, _AUG, _DEMOTE})  # a free page comes with the call
_TAKES_PAMT = _GIVEN | {_REMOVE, _PROMOTE, _SEPT_REMOVE, _RECLAIM}
_PAMT_WALK = _GIVEN | {_WBINVD, _RECLAIM, Leaf.PAGE_RDMD}
_TDR_SHARED = _TREE | {_TRACK, _ENTER, Leaf.VP_FLUSH, _RECLAIM}
_OP_STATE = _TREE | {_TRACK, _ENTER}

LOCKS = Rules(
    "TDX module 1.5.01, tdx_locks.h and one file a leaf: how a leaf takes a lock",
    {"leaf": tuple(Leaf), "lock": tuple(Lock), "armed": (False, True)},  # the vCPU's zero-step mitigation
    [
        # tdh_vp_enter.c: a vCPU that is inside holds the TDR shared until it exits; op_state is dropped on entry.
        (_TDR_SHARED, Lock.TDR, ANY, SHARED),
        (_LIFECYCLE, Lock.TDR, ANY, EXCLUSIVE),
        (_LEAVES - _TDR_SHARED - _LIFECYCLE, Lock.TDR, ANY, NONE),
        (_OP_STATE, Lock.OP_STATE, ANY, SHARED),
        (_LEAVES - _OP_STATE, Lock.OP_STATE, ANY, NONE),
        (_ENTER, Lock.EPOCH, ANY, SHARED),  # for the count only
        (_TRACK, Lock.EPOCH, ANY, EXCLUSIVE),
        (_LEAVES - {_ENTER, _TRACK}, Lock.EPOCH, ANY, NONE),
        (_TREE_SHARED, Lock.TREE, ANY, SHARED),
        (_TREE_EXCLUSIVE, Lock.TREE, ANY, EXCLUSIVE),
        (_ENTER, Lock.TREE, True, EXCLUSIVE),
        (_ENTER, Lock.TREE, False, NONE),
        # tdg_mem_page_accept.c: ACCEPT walks the tree without its lock.
        (_LEAVES - _TREE - {_ENTER}, Lock.TREE, ANY, NONE),
        (_TREE | {_ACCEPT}, Lock.ENTRY, ANY, EXCLUSIVE),
        (_LEAVES - _TREE - {_ACCEPT}, Lock.ENTRY, ANY, NONE),
        # pamt_implicit_get_and_lock(): REMOVE, SEPT.REMOVE and PROMOTE know the page from the S-EPT, go straight to
        # its entry and take none above it.
        (_PAMT_WALK, Lock.PARENTS, ANY, SHARED),
        (_LEAVES - _PAMT_WALK, Lock.PARENTS, ANY, NONE),
        (_TAKES_PAMT, Lock.PAMT, ANY, EXCLUSIVE),
        (frozenset({_WBINVD, Leaf.PAGE_RDMD}), Lock.PAMT, ANY, SHARED),
        (_LEAVES - _TAKES_PAMT - {_WBINVD, Leaf.PAGE_RDMD}, Lock.PAMT, ANY, NONE),
        # pamt_demote(), pamt_promote(): the large page's own entry comes last, after the look for an interrupt.
        (_RESIZES, Lock.LARGE, ANY, EXCLUSIVE),
        (_LEAVES - _RESIZES, Lock.LARGE, ANY, NONE),
    ],
    outcome="taken",
)

_PAMT_LOCKS = frozenset({Lock.PARENTS, Lock.PAMT})
_IMPLICIT_TDR = frozenset({_ENTER, Leaf.VP_FLUSH, _RECLAIM})
_TDR_IN_RCX = frozenset({_TRACK, Leaf.MR_FINALIZE, Leaf.MNG_VPFLUSHDONE, Leaf.MNG_KEY_FREEID})

BUSY_OPERAND = Rules(
    "TDX module 1.5.01, one file a leaf: what the low word of TDX_OPERAND_BUSY names",
    {"lock": tuple(Lock), "leaf": tuple(Leaf)},
    [
        (Lock.TDR, _IMPLICIT_TDR, Operand.TDR),
        (Lock.TDR, _TDR_IN_RCX, Operand.RCX),
        (Lock.TDR, _LEAVES - _IMPLICIT_TDR - _TDR_IN_RCX, Operand.RDX),
        (Lock.OP_STATE, ANY, Operand.OP_STATE),
        (Lock.EPOCH, ANY, Operand.TD_EPOCH),
        (Lock.TREE, ANY, Operand.SEPT_TREE),
        (Lock.ENTRY, ANY, Operand.RCX),
        (_PAMT_LOCKS, _GIVEN, Operand.R8),
        (_PAMT_LOCKS, _LEAVES - _GIVEN, Operand.RCX),
        (Lock.LARGE, ANY, Operand.RCX),  # the page of the entry, not the one given
    ],
    outcome="operand",
)

COMPATIBLE = Rules(
    "TDX module 1.5.01, tdx_locks.h: may a try-lock succeed",
    {"held": (NONE, SHARED, EXCLUSIVE), "wanted": (NONE, SHARED, EXCLUSIVE)},
    [
        (NONE, ANY, True),
        (frozenset({SHARED, EXCLUSIVE}), NONE, True),
        (SHARED, SHARED, True),
        (SHARED, EXCLUSIVE, False),
        (EXCLUSIVE, frozenset({SHARED, EXCLUSIVE}), False),
    ],
    outcome="succeeds",
)


def wanted(leaf: Leaf, lock: Lock, *, armed: bool = False) -> str:
    """How a leaf takes a lock: NONE, SHARED or EXCLUSIVE; `armed` matters to VP.ENTER only."""
    mode: str = LOCKS(leaf=leaf, lock=lock, armed=armed)
    return mode


class EntryLock(NamedTuple):
    """The lock bits of an S-EPT entry: TDEL (taken) and TDHP (a host leaf wants it)."""

    taken: bool = False
    host_priority: bool = False


UNLOCKED = EntryLock()

ENTRY_LOCK = Rules(
    "TDX module 1.5.01, sept_lock_acquire_host() and sept_lock_acquire_guest()",
    {"side": ("host", "guest"), "taken": (False, True), "host_priority": (False, True)},
    [
        ("host", True, ANY, (Status.OPERAND_BUSY, EntryLock(True, True))),
        ("host", False, ANY, (Status.SUCCESS, EntryLock(True, False))),
        ("guest", True, True, (Status.OPERAND_BUSY, EntryLock(True, True))),
        ("guest", True, False, (Status.OPERAND_BUSY, EntryLock(True, False))),
        # sept_lock_acquire_guest(): a free entry whose TDHP a host leaf has set is refused to the guest.
        ("guest", False, True, (Status.OPERAND_BUSY_HOST_PRIORITY, EntryLock(False, True))),
        ("guest", False, False, (Status.SUCCESS, EntryLock(True, False))),
    ],
    outcome="status, bits after",
)


def acquire_entry(side: str, lock: EntryLock) -> tuple[Status, EntryLock]:
    """Try an S-EPT entry's lock from the "host" or the "guest" side: the status, and the bits after.

    What the guest is told of OPERAND_BUSY_HOST_PRIORITY says told_to_guest().
    """
    status, after = ENTRY_LOCK(side=side, taken=lock.taken, host_priority=lock.host_priority)
    return status, after


def side(leaf: Leaf) -> str:
    """From which side a leaf takes an S-EPT entry's lock."""
    return "guest" if leaf == Leaf.ACCEPT else "host"


def release_entry(lock: EntryLock) -> EntryLock:
    """Release an S-EPT entry's lock; TDHP stays until a host leaf gets it."""
    return lock._replace(taken=False)


def told_to_guest(status: Status, *, timed_out: bool = False) -> Status:
    """The status that a TDCALL returns for one of acquire_entry(); `timed_out`: RAX of the TD exit instead.

    td_call() turns OPERAND_BUSY_HOST_PRIORITY into OPERAND_BUSY, for older TDs; when that has gone on for
    HP_LOCK_TIMEOUT the TD exits with HOST_PRIORITY_BUSY_TIMEOUT.
    """
    if status == Status.OPERAND_BUSY_HOST_PRIORITY:
        return Status.HOST_PRIORITY_BUSY_TIMEOUT if timed_out else Status.OPERAND_BUSY
    return status

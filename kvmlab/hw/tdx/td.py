"""A TD's life: lifecycle, op state, and which leaf is let in when.

Source: TDX module 1.5.01, td_control_structures.h, op_state_lookup.c, check_td_in_correct_build_state(), and the
lifecycle leaves' own files.  Left out: the op states of live migration.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from ..rules import ANY, Rules
from .words import Leaf, Status


class Lifecycle(StrEnum):
    """TDR.LIFECYCLE_STATE."""

    HKID_ASSIGNED = "HKID_ASSIGNED"
    KEYS_CONFIGURED = "KEYS_CONFIGURED"
    BLOCKED = "BLOCKED"
    TEARDOWN = "TEARDOWN"


class OpState(StrEnum):
    """TDCS.OP_STATE of a TD that is not migrated; INITIALIZED is before finalize."""

    UNINITIALIZED = "UNINITIALIZED"
    INITIALIZED = "INITIALIZED"
    RUNNABLE = "RUNNABLE"


class TdState(NamedTuple):
    """How far a TD is in its life; as it is given here, it runs."""

    lifecycle: Lifecycle = Lifecycle.KEYS_CONFIGURED
    op_state: OpState = OpState.RUNNABLE
    fatal: bool = False  # TDR.FATAL, after a machine check


BUILD = Rules(
    "TDX module 1.5.01, check_td_in_correct_build_state(): a leaf that needs the TD's key and TDCS",
    {"fatal": (False, True), "lifecycle": tuple(Lifecycle)},
    [
        (True, ANY, Status.TD_FATAL),
        (False, Lifecycle.KEYS_CONFIGURED, Status.SUCCESS),
        (False, frozenset(Lifecycle) - {Lifecycle.KEYS_CONFIGURED}, Status.TD_KEYS_NOT_CONFIGURED),
    ],
)

_ANY_INITIALIZED = frozenset(
    {
        Leaf.SEPT_ADD, Leaf.PAGE_AUG, Leaf.RANGE_BLOCK, Leaf.RANGE_UNBLOCK, Leaf.PAGE_REMOVE, Leaf.PAGE_DEMOTE,
        Leaf.PAGE_PROMOTE, Leaf.SEPT_REMOVE, Leaf.TRACK,
    }
)  # fmt: skip
_BEFORE = frozenset({Leaf.PAGE_ADD, Leaf.MR_FINALIZE})

OP_STATE = Rules(
    "TDX module 1.5.01, op_state_lookup.c: which leaf an op state lets in",
    {"leaf": (*sorted(_ANY_INITIALIZED), *sorted(_BEFORE), Leaf.VP_ENTER), "op_state": tuple(OpState)},
    [
        (ANY, OpState.UNINITIALIZED, Status.OP_STATE_INCORRECT),
        # op_state_lookup.c: AUG and TRACK, too, are let in before finalize.
        (_ANY_INITIALIZED, frozenset({OpState.INITIALIZED, OpState.RUNNABLE}), Status.SUCCESS),
        (_BEFORE, OpState.INITIALIZED, Status.SUCCESS),
        (_BEFORE, OpState.RUNNABLE, Status.OP_STATE_INCORRECT),
        (Leaf.VP_ENTER, OpState.INITIALIZED, Status.OP_STATE_INCORRECT),
        (Leaf.VP_ENTER, OpState.RUNNABLE, Status.SUCCESS),
    ],
)

_STARTED = frozenset({Lifecycle.HKID_ASSIGNED, Lifecycle.KEYS_CONFIGURED})

TEARDOWN = Rules(
    "TDX module 1.5.01, the leaves that end a TD: status, in the order of their checks",
    {
        "leaf": (Leaf.MNG_VPFLUSHDONE, Leaf.MNG_KEY_FREEID, Leaf.PAGE_RECLAIM),
        "lifecycle": tuple(Lifecycle),
        "ready": (True, False),  # all vCPUs flushed; cache written back; (TDR only) no child page left
    },
    [
        (Leaf.MNG_VPFLUSHDONE, _STARTED, True, Status.SUCCESS),
        (Leaf.MNG_VPFLUSHDONE, _STARTED, False, Status.FLUSHVP_NOT_DONE),
        (Leaf.MNG_VPFLUSHDONE, frozenset(Lifecycle) - _STARTED, ANY, Status.LIFECYCLE_STATE_INCORRECT),
        (Leaf.MNG_KEY_FREEID, Lifecycle.BLOCKED, True, Status.SUCCESS),
        (Leaf.MNG_KEY_FREEID, Lifecycle.BLOCKED, False, Status.WBCACHE_NOT_COMPLETE),
        (
            Leaf.MNG_KEY_FREEID,
            frozenset(Lifecycle) - {Lifecycle.BLOCKED},
            ANY,
            Status.LIFECYCLE_STATE_INCORRECT,
        ),
        # tdh_phymem_page_reclaim.c: only a TD in teardown; a page of a living one goes by REMOVE.
        (
            Leaf.PAGE_RECLAIM,
            frozenset(Lifecycle) - {Lifecycle.TEARDOWN},
            ANY,
            Status.LIFECYCLE_STATE_INCORRECT,
        ),
        (Leaf.PAGE_RECLAIM, Lifecycle.TEARDOWN, True, Status.SUCCESS),
        (Leaf.PAGE_RECLAIM, Lifecycle.TEARDOWN, False, Status.TD_ASSOCIATED_PAGES_EXIST),
    ],
)


def running(op_state: OpState) -> bool:
    """Whether TLB tracking is demanded: the TD may have vCPUs inside (state_flags_lookup, tlb_tracking_required)."""
    return op_state == OpState.RUNNABLE

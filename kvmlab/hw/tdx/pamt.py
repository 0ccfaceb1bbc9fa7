"""The PAMT: what the module knows of each physical page, and what each leaf writes there.

Source: TDX module 1.5.01, pamt_manager.[ch], check_and_lock_free_range_hpa(), one file a leaf.  The PAMT says
nothing about the shared EPT or the host's page tables: the host may map any page there.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from ..rules import ANY, Rules
from .words import Leaf, Level, Operand, Status


class PageType(IntEnum):
    """PAMT.PT."""

    NDA = 0  # free: not TDX's
    RSVD = 1
    REG = 3  # a TD's private page
    TDR = 4
    TDCX = 5
    TDVPR = 6
    EPT = 8  # a page of a secure EPT


class PamtEntry(NamedTuple):
    """One PAMT entry: type, owner (the TDR's page number), epoch in which it was blocked."""

    type: PageType = PageType.NDA
    owner: int = 0
    bepoch: int = 0


NDA = PamtEntry()
KEEP = "kept"
OF_PAGE, OF_TABLE, OF_CHILDREN = "page", "table", "children"

IS_FREE = Rules(
    "TDX module 1.5.01, pamt_walk() and pamt_is_2mb_range_free(): may a leaf take this free page",
    {
        "size": (Level.PT, Level.PD),
        "larger": (False, True),  # a larger entry over it is PT_REG
        "entry": (PageType.NDA, "other"),  # of the size asked for
        "children": (True, False),  # 2M: all 512 4K entries are PT_NDA
    },
    [
        (ANY, True, ANY, ANY, Status.PAGE_METADATA_INCORRECT),
        (ANY, False, "other", ANY, Status.PAGE_METADATA_INCORRECT),
        (Level.PT, False, PageType.NDA, ANY, Status.SUCCESS),
        (Level.PD, False, PageType.NDA, True, Status.SUCCESS),
        (Level.PD, False, PageType.NDA, False, Status.PAGE_METADATA_INCORRECT),
    ],
)

# The register that named the page, which the error names in turn.
PAGE_OPERAND = {
    Leaf.PAGE_ADD: Operand.R8,
    Leaf.PAGE_AUG: Operand.R8,
    Leaf.SEPT_ADD: Operand.R8,
    Leaf.PAGE_DEMOTE: Operand.R8,
    Leaf.PAGE_WBINVD: Operand.RCX,
    Leaf.PAGE_RECLAIM: Operand.RCX,
    Leaf.PAGE_RDMD: Operand.RCX,
}


class Change(NamedTuple):
    """What a leaf writes into one PAMT entry; KEEP for a field that it leaves alone."""

    type: PageType | str = KEEP
    owner: str = KEEP  # "TD" or KEEP
    bepoch: str = KEEP  # "0", "TD_EPOCH" or KEEP

    def __str__(self) -> str:
        if self == Change():
            return KEEP
        kind = self.type.name if isinstance(self.type, PageType) else self.type
        return f"PT {kind}, OWNER {self.owner}, BEPOCH {self.bepoch}"


_NOTHING, _FREED = Change(), Change(PageType.NDA)
_TAKEN, _NEW_TABLE = Change(PageType.REG, "TD", "0"), Change(PageType.EPT, "TD", "0")
EFFECTS_LEAVES = (
    Leaf.PAGE_ADD,
    Leaf.SEPT_ADD,
    Leaf.PAGE_AUG,
    Leaf.RANGE_BLOCK,
    Leaf.PAGE_REMOVE,
    Leaf.PAGE_DEMOTE,
    Leaf.PAGE_PROMOTE,
    Leaf.SEPT_REMOVE,
    Leaf.PAGE_RECLAIM,
)

EFFECTS = Rules(
    "TDX module 1.5.01, one file a leaf: what a leaf that succeeds writes into the PAMT (others: nothing)",
    {
        "leaf": EFFECTS_LEAVES,
        "of": (
            OF_PAGE,
            OF_TABLE,
            OF_CHILDREN,
        ),  # entry of the leaf's size; of the S-EPT page; of the 512 smaller pages
    },
    [
        (frozenset({Leaf.PAGE_ADD, Leaf.PAGE_AUG}), OF_PAGE, _TAKEN),
        (frozenset({Leaf.PAGE_ADD, Leaf.PAGE_AUG}), frozenset({OF_TABLE, OF_CHILDREN}), _NOTHING),
        (Leaf.SEPT_ADD, OF_TABLE, _NEW_TABLE),
        (Leaf.SEPT_ADD, frozenset({OF_PAGE, OF_CHILDREN}), _NOTHING),
        # tdh_mem_range_block.c: of a table it is the S-EPT page's own entry that gets the epoch.
        (Leaf.RANGE_BLOCK, frozenset({OF_PAGE, OF_TABLE}), Change(bepoch="TD_EPOCH")),
        (Leaf.RANGE_BLOCK, OF_CHILDREN, _NOTHING),
        # tdh_mem_page_remove.c: only the type is written, so OWNER and BEPOCH stay, and mean nothing.
        (frozenset({Leaf.PAGE_REMOVE, Leaf.PAGE_RECLAIM}), OF_PAGE, _FREED),
        (Leaf.PAGE_REMOVE, frozenset({OF_TABLE, OF_CHILDREN}), _NOTHING),
        (Leaf.PAGE_RECLAIM, OF_TABLE, _FREED),
        (Leaf.PAGE_RECLAIM, OF_CHILDREN, _NOTHING),
        (Leaf.PAGE_DEMOTE, OF_PAGE, _FREED),
        (Leaf.PAGE_DEMOTE, OF_TABLE, Change(PageType.EPT, "TD")),
        (Leaf.PAGE_DEMOTE, OF_CHILDREN, _TAKEN),
        # pamt_promote(): type and owner of the first child, whatever BEPOCH was there.
        (Leaf.PAGE_PROMOTE, OF_PAGE, Change(PageType.REG, "TD")),
        (Leaf.PAGE_PROMOTE, frozenset({OF_TABLE, OF_CHILDREN}), _FREED),
        (Leaf.SEPT_REMOVE, OF_TABLE, _FREED),
        (Leaf.SEPT_REMOVE, frozenset({OF_PAGE, OF_CHILDREN}), _NOTHING),
    ],
)


def is_free(size: Level, entry: PamtEntry, *, larger: bool = False, children: bool = True) -> Status:
    """May a leaf take a page of this size whose entry is `entry`: SUCCESS, or the error; see IS_FREE."""
    kind = PageType.NDA if entry.type == PageType.NDA else "other"
    return Status(IS_FREE(size=size, larger=larger, entry=kind, children=children))


def after(leaf: Leaf, of: str, entry: PamtEntry, *, owner: int, td_epoch: int) -> PamtEntry:
    """Return the PAMT entry of the OF_PAGE, OF_TABLE or OF_CHILDREN of a leaf that succeeded for the TD `owner`."""
    change: Change = EFFECTS(leaf=leaf, of=of)
    return PamtEntry(
        change.type if isinstance(change.type, PageType) else entry.type,
        owner if change.owner == "TD" else entry.owner,
        {"0": 0, "TD_EPOCH": td_epoch}.get(change.bepoch, entry.bepoch),
    )

"""SNP rules that need more than one RMP entry or page size: overlap, PVALIDATE's sizes, RMPADJUST and VMPLs.

As in entry.py, which names the sources: pure functions and tables, with what was not read by us said above each
row.  What the sources leave open is an argument here.
"""

from __future__ import annotations

from ..memory import Gfn
from ..rules import ANY, Rules
from . import entry as snp
from .entry import LARGE, PG_1G, PG_2M, PG_4K, Npf, Pvalidate, RmpEntry, Rmpupdate

PAGES_2M = 512
FREE, SMALL, HEAD, PART = "free", "4K", "head of 2M", "part of 2M"
SIZEM, MISMATCH = "#NPF RMP SIZEM", "FAIL_SIZEMISMATCH"
GP = "#GP"

OVERLAP = Rules(
    "APM vol. 2, RMPUPDATE: FAIL_OVERLAP (a 4K and a 2M entry may not cover the same page)",
    {
        "asked": (PG_4K, PG_2M),
        "under": (FREE, SMALL, HEAD, PART),  # the entry that covers the page
        "others": (False, True),  # a 4K entry is assigned elsewhere in the 2M region
        "resizes": (False, True),  # open: may a 4K entry take the place of the head of a 2M one?
    },
    [
        (PG_4K, frozenset({FREE, SMALL}), ANY, ANY, Rmpupdate.OK),
        # The head of a 2M entry: not read by us, hence the argument.
        (PG_4K, HEAD, ANY, True, Rmpupdate.OK),
        (PG_4K, HEAD, ANY, False, Rmpupdate.FAIL_OVERLAP),
        (PG_4K, PART, ANY, ANY, Rmpupdate.FAIL_OVERLAP),
        (PG_2M, frozenset({FREE, SMALL, HEAD}), False, ANY, Rmpupdate.OK),
        (PG_2M, frozenset({FREE, SMALL, HEAD}), True, ANY, Rmpupdate.FAIL_OVERLAP),
        (PG_2M, PART, ANY, ANY, Rmpupdate.FAIL_INPUT),  # the address is not 2M aligned
    ],
)

PVALIDATE_SIZES = Rules(
    "APM vol. 2, PVALIDATE: page sizes asked for, mapped by the nested page table, and of the RMP entry",
    {"asked": (PG_4K, PG_2M), "mapping": (PG_4K, PG_2M, PG_1G), "rmp": (PG_4K, PG_2M)},
    [
        (PG_4K, PG_4K, PG_4K, snp.OK),
        # Table 15-40: 4K inside a 2M entry is a nested fault with SIZEM; the host has to PSMASH, and the guest
        # executes it again (verismo, fault_rmp_update(), has it as a nested fault, too).
        (PG_4K, ANY, PG_2M, SIZEM),
        (PG_4K, LARGE, PG_4K, snp.NPF_RMP),  # a large mapping needs a large entry, as for any access
        (PG_2M, LARGE, PG_2M, snp.OK),
        # Table 15-40: 2M where the entry is 4K, or the nested page table maps 4K, is no fault but a code.
        (PG_2M, PG_4K, PG_2M, MISMATCH),
        (PG_2M, ANY, PG_4K, MISMATCH),
    ],
)


def rmpupdate_at(
    old: RmpEntry,
    new: RmpEntry,
    *,
    covered: bool = True,
    aligned: bool = True,
    part: bool = False,
    others: bool = False,
    locked: bool = False,
    resizes: bool = False,
    identical_keeps_validated: bool = True,
) -> tuple[Rmpupdate, RmpEntry]:
    """RMPUPDATE of a page whose covering entry is `old`: address and input, lock, overlap, then `snp.rmpupdate`.

    `covered`: the RMP has an entry for the address (without one it cannot be assigned); `aligned`: to 4K;
    `part`: the page is not the first of its 2M region; `others`: see OVERLAP; `locked`: another CPU holds the
    entry, or the page is a VMSA in use.
    """
    changed, entry = snp.rmpupdate(old, new, identical_keeps_validated=identical_keeps_validated)
    if address_fails(new.size, covered=covered, aligned=aligned, part=part):
        return Rmpupdate.FAIL_INPUT, old
    if changed == Rmpupdate.FAIL_INPUT:
        return changed, old
    if locked:
        return Rmpupdate.FAIL_INUSE, old
    under = FREE if not old.assigned else SMALL if old.size == PG_4K else PART if part else HEAD
    code: Rmpupdate = OVERLAP(asked=new.size, under=under, others=others, resizes=resizes)
    return (changed, entry) if code == Rmpupdate.OK else (code, old)


def address_fails(size: str, *, covered: bool, aligned: bool, part: bool) -> bool:
    """Whether RMPUPDATE or PSMASH refuses an address as FAIL_INPUT: off the RMP's end, or not aligned to `size`.

    The order of this and the other refusals is a choice; Microsoft's __rmpupdate says "invalid input" for both.
    """
    return not covered or not aligned or (size == PG_2M and part)


def psmash_at(
    entry: RmpEntry,
    *,
    covered: bool = True,
    aligned: bool = True,
    part: bool = False,
    locked: bool = False,
) -> tuple[Rmpupdate, RmpEntry]:
    """PSMASH at an address: 2M aligned or FAIL_INPUT; FAIL_INUSE, which KVM repeats, if the entry is locked."""
    if address_fails(PG_2M, covered=covered, aligned=aligned, part=part):
        return Rmpupdate.FAIL_INPUT, entry
    return (Rmpupdate.FAIL_INUSE, entry) if locked else snp.psmash(entry)


def pvalidate_at(
    entry: RmpEntry,
    validate: bool,
    *,
    asid: int,
    gpa: Gfn,
    asked: str = PG_4K,
    mapping: str = PG_4K,
    part: bool = False,
    enc: bool = True,
    vmpl: int = 0,
) -> tuple[Pvalidate | str, RmpEntry]:
    """PVALIDATE whole: a result code, or the fault (snp.NPF_RMP, SIZEM, GP) that it takes, and the entry after.

    VMPL0 only (verismo); that another VMPL gets #GP, and that ownership is checked before sizes, is not read by us
    but a choice.
    """
    if vmpl:
        return GP, entry
    if asked == PG_2M and part:
        return Pvalidate.FAIL_INPUT, entry
    # The sizes have rules of their own, so ownership is asked with a size that fits.
    if snp.guest_access(entry, enc=enc, op="pvalidate", asid=asid, gpa=gpa, size=entry.size) != snp.OK:
        return snp.NPF_RMP, entry
    answer: str = PVALIDATE_SIZES(asked=asked, mapping=mapping, rmp=entry.size)
    if answer == MISMATCH:
        return Pvalidate.FAIL_SIZEMISMATCH, entry
    return (answer, entry) if answer != snp.OK else snp.pvalidate(entry, validate)


def implied_c1_access(entry: RmpEntry, *, write: bool, asid: int, gpa: Gfn, size: str = PG_4K) -> str:
    """An SNP guest's instruction fetch or page-table access: checked as C=1, always (table 15-39)."""
    return snp.guest_access(entry, enc=True, op="write" if write else "read", asid=asid, gpa=gpa, size=size)


def other_guest_write(page: RmpEntry, *, mapping: str = PG_4K, region_assigned: bool = False) -> str:
    """A write or page-table access of a guest that is not SNP: hypervisor owned, or a nested page fault."""
    answer = snp.host_access("write", mapping=mapping, page=page, region_assigned=region_assigned)
    return snp.OK if answer == snp.OK else snp.NPF_RMP


# VMPL permission masks of an RMP entry (APM, "RMP Entry"; the bits as in verismo, perm_s.rs): VMPL0 first.
READ, WRITE, EXEC_USER, EXEC_SUPERVISOR = 1, 2, 4, 8
ALL = READ | WRITE | EXEC_USER | EXEC_SUPERVISOR
Permissions = tuple[int, int, int, int]
AFTER_RMPUPDATE: Permissions = (ALL, 0, 0, 0)
NEEDS = {"read": READ, "write": WRITE, "execute": EXEC_SUPERVISOR, "execute as user": EXEC_USER}


def vmpl_allows(permissions: Permissions, vmpl: int, op: str) -> bool:
    """Whether the entry lets this VMPL do `op`; asked after ownership and Validated."""
    return bool(permissions[vmpl] & NEEDS[op])


def rmpadjust(
    entry: RmpEntry,
    permissions: Permissions,
    *,
    own: int,
    target: int,
    mask: int,
    vmsa: bool = False,
    asked: str = PG_4K,
    part: bool = False,
) -> tuple[Rmpupdate | Pvalidate | str, RmpEntry, Permissions]:
    """RMPADJUST of one page after its access checks: permissions of a numerically higher VMPL.

    FAIL_INPUT for a VMPL, a mask or (2M) an address that cannot be; FAIL_PERMISSION for an equal or lower VMPL, or a
    permission that `own` lacks; SIZEM or FAIL_SIZEMISMATCH as for PVALIDATE, but for the mapping.
    """
    if not 0 <= target <= 3 or mask & ~ALL or (asked == PG_2M and part):
        return Rmpupdate.FAIL_INPUT, entry, permissions
    # verismo, RmpEntry::rmpadjust: the target's level comes first, then the fault, the sizes, and the mask last.
    if target <= own:
        return Rmpupdate.FAIL_PERMISSION, entry, permissions
    # verismo, fault_rmp_update(): 4K inside a 2M entry is a nested fault.  Its SIZEM: the error code's bit 35 says
    # that PVALIDATE or RMPADJUST does not fit the size of the entry (15.36, error codes).
    if asked == PG_4K and entry.size == PG_2M:
        return SIZEM, entry, permissions
    if asked == PG_2M and entry.size == PG_4K:
        return Pvalidate.FAIL_SIZEMISMATCH, entry, permissions
    if mask & ~permissions[own]:
        return Rmpupdate.FAIL_PERMISSION, entry, permissions
    one, two, three = (mask if level == target else permissions[level] for level in (1, 2, 3))
    # __rmpadjust (Microsoft): VMSA is ignored when the current VMPL is not 0.
    entry = entry if own else entry._replace(vmsa=vmsa)
    return Rmpupdate.OK, entry, (permissions[0], one, two, three)


def npf_code(
    *, present: bool, write: bool, enc: bool, rmp: bool, sizem: bool = False, vmpl: bool = False
) -> Npf:
    """The error code of `snp.npf_error_code` with the two bits that only SNP's own instructions and VMPLs set."""
    code = snp.npf_error_code(present=present, write=write, enc=enc, rmp=rmp)
    return code | (Npf.SIZEM if sizem else Npf(0)) | (Npf.VMPL if vmpl else Npf(0))

"""AMD SEV-SNP: the RMP, the instructions that change it, the checks on each access, and the error codes.

Pure functions of RMP entries; they know neither gfns of a scenario nor the kernel.  Sources: AMD64
Architecture Programmer's Manual, volume 2, section "Secure Nested Paging (SEV-SNP)" (RMP entry, RMPUPDATE,
PSMASH, PVALIDATE, "RMP and VMPL Access Checks", nested page fault error codes); result codes as used by
arch/x86/virt/svm/sev.c and arch/x86/kvm/svm/sev.c.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import NamedTuple

from .rules import ANY, Rules

PG_4K, PG_2M = "4K", "2M"
VC_NOT_VALIDATED_CODE = 0x404  # #VC error code: page not validated


class RmpEntry(NamedTuple):
    """One RMP entry, as the APM's "RMP Entry" table lists its fields.  The default is hypervisor-owned."""

    assigned: bool = False
    asid: int = 0
    gpa: int | None = None
    size: str = PG_4K
    immutable: bool = False
    vmsa: bool = False
    validated: bool = False

    def __str__(self) -> str:
        if not self.assigned:
            return "hypervisor"
        owner = f"guest gpa={self.gpa}" if self.asid else "firmware"
        return f"{owner}{'' if self.size == PG_4K else ' 2M'}{' validated' if self.validated else ''}"


HYPERVISOR = RmpEntry()


class Rmpupdate(IntEnum):
    """What RMPUPDATE and PSMASH return in rAX (APM, RMPUPDATE; the kernel's RMPUPDATE_* names)."""

    OK = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_INUSE = 3
    FAIL_OVERLAP = 4


class Pvalidate(IntEnum):
    """What PVALIDATE returns in rAX; NOUPDATE is Linux's name for success with the carry flag set."""

    OK = 0
    FAIL_INPUT = 1
    FAIL_SIZEMISMATCH = 6
    NOUPDATE = 255


class Npf(IntFlag):
    """Bits of the nested page fault error code in EXITINFO1 (APM, "Nested Page Faults"; PFERR_* in kvm_host.h)."""

    PRESENT = 1 << 0
    WRITE = 1 << 1
    USER = 1 << 2
    RMP = 1 << 31
    GUEST_FINAL = 1 << 32
    GUEST_PAGE = 1 << 33
    ENC = 1 << 34
    SIZEM = 1 << 35
    VMPL = 1 << 36


def assigned_to(asid: int, gpa: int, size: str = PG_4K) -> RmpEntry:
    """Return the new state that KVM asks RMPUPDATE for when it makes a page private (rmp_make_private())."""
    return RmpEntry(assigned=True, asid=asid, gpa=gpa, size=size)


def rmpupdate(
    old: RmpEntry, new: RmpEntry, *, identical_keeps_validated: bool = True
) -> tuple[Rmpupdate, RmpEntry]:
    """RMPUPDATE on one entry: the result code and the entry after it.

    Assigning, deassigning, reassigning and changing GPA or size clear Validated.  Writing the state that is
    there already leaves it alone in the verismo model; the APM is silent, hence the switch.  An immutable
    entry answers FAIL_PERMISSION; an assigned one without GPA, or the reverse, FAIL_INPUT.
    """
    if old.immutable:
        return Rmpupdate.FAIL_PERMISSION, old
    if new.assigned != (new.gpa is not None) or new.validated or (new.asid and not new.assigned):
        return Rmpupdate.FAIL_INPUT, old
    same = old[:5] == new[:5]
    if same and identical_keeps_validated:
        return Rmpupdate.OK, old
    return Rmpupdate.OK, new


def psmash(entry: RmpEntry) -> tuple[Rmpupdate, RmpEntry]:
    """PSMASH on a 2M entry: what each of its 4K children inherits.  Anything but a 2M entry is FAIL_INPUT."""
    if not entry.assigned or entry.size != PG_2M:
        return Rmpupdate.FAIL_INPUT, entry
    return Rmpupdate.OK, entry._replace(size=PG_4K)


def pvalidate(entry: RmpEntry, validate: bool) -> tuple[Pvalidate, RmpEntry]:
    """PVALIDATE once its access has passed the ownership checks: rAX (or NOUPDATE for carry) and the entry."""
    if entry.validated == validate:
        return Pvalidate.NOUPDATE, entry
    return Pvalidate.OK, entry._replace(validated=validate)


# Outcomes of an access check.
OK, NPF_RMP, VC, HOST_PF = "ok", "#NPF RMP", "#VC 0x404", "#PF RMP"

GUEST_ACCESS = Rules(
    'APM vol. 2, 15.36.10 "RMP and VMPL Access Checks": SNP guest, data access',
    {
        "enc": (False, True),  # effective C-bit
        "op": ("read", "write", "pvalidate"),
        "assigned": (False, True),
        "asid": ("ours", "other"),
        "gpa": ("same", "other"),
        "immutable": (False, True),
        "size": ("fits", "differs"),
        "validated": (False, True),
    },
    [
        # A C=0 read is not checked at all: it silently returns the raw bytes.
        # enc   op           assigned asid     gpa      immut  size       validated
        (False, "read", ANY, ANY, ANY, ANY, ANY, ANY, OK),
        (False, "write", False, ANY, ANY, ANY, ANY, ANY, OK),
        (False, "write", True, ANY, ANY, ANY, ANY, ANY, NPF_RMP),
        # PVALIDATE always works on a C=1 address; a C=0 one is the table's unused corner.
        (False, "pvalidate", ANY, ANY, ANY, ANY, ANY, ANY, NPF_RMP),
        (True, ANY, False, ANY, ANY, ANY, ANY, ANY, NPF_RMP),
        (True, ANY, True, "other", ANY, ANY, ANY, ANY, NPF_RMP),
        (True, ANY, True, "ours", "other", ANY, ANY, ANY, NPF_RMP),
        (True, ANY, True, "ours", "same", True, ANY, ANY, NPF_RMP),
        (True, ANY, True, "ours", "same", False, "differs", ANY, NPF_RMP),
        # Ownership comes first, then Validated (then VMPL).
        (True, frozenset({"read", "write"}), True, "ours", "same", False, "fits", False, VC),
        (True, frozenset({"read", "write"}), True, "ours", "same", False, "fits", True, OK),
        (True, "pvalidate", True, "ours", "same", False, "fits", ANY, OK),
    ],
)  # fmt: skip

HOST_ACCESS = Rules(
    'APM vol. 2, 15.36.10 "RMP and VMPL Access Checks": host access',
    {
        "op": ("read", "write", "page-table"),
        "mapping": (PG_4K, PG_2M),
        "page_assigned": (False, True),
        "region_assigned": (False, True),  # any 4K page of the same 2M region
    },
    [
        ("read", ANY, ANY, ANY, OK),
        (frozenset({"write", "page-table"}), PG_4K, False, ANY, OK),
        (frozenset({"write", "page-table"}), PG_4K, True, ANY, HOST_PF),
        # Through a large mapping all 512 entries must be hypervisor-owned.
        (frozenset({"write", "page-table"}), PG_2M, ANY, False, OK),
        (frozenset({"write", "page-table"}), PG_2M, ANY, True, HOST_PF),
    ],
)


def guest_access(entry: RmpEntry, *, enc: bool, op: str, asid: int, gpa: int, size: str = PG_4K) -> str:
    """Check one guest access against the RMP entry of the page it reaches: OK, NPF_RMP or VC."""
    answer: str = GUEST_ACCESS(
        enc=enc,
        op=op,
        assigned=entry.assigned,
        asid="ours" if entry.asid == asid else "other",
        gpa="same" if entry.gpa == gpa else "other",
        immutable=entry.immutable,
        size="fits" if entry.size == size else "differs",
        validated=entry.validated,
    )
    return answer


def fails_for_size(entry: RmpEntry, *, enc: bool, op: str, asid: int, gpa: int, size: str) -> bool:
    """Whether a guest access takes an RMP fault for its size and nothing else."""
    fits, differs = (
        guest_access(entry, enc=enc, op=op, asid=asid, gpa=gpa, size=s) for s in (entry.size, size)
    )
    return differs == NPF_RMP and fits != NPF_RMP


def host_access(op: str, *, mapping: str, page: RmpEntry, region_assigned: bool) -> str:
    """Check one host access through a mapping of size `mapping`: OK or HOST_PF."""
    answer: str = HOST_ACCESS(
        op=op, mapping=mapping, page_assigned=page.assigned, region_assigned=region_assigned or page.assigned
    )
    return answer


def npf_error_code(*, present: bool, write: bool, enc: bool, rmp: bool) -> Npf:
    """Return the error code of a nested fault on a guest's data access to its final address."""
    code = Npf.GUEST_FINAL | Npf.USER
    for bit, on in ((Npf.PRESENT, present), (Npf.WRITE, write), (Npf.ENC, enc), (Npf.RMP, rmp)):
        if on:
            code |= bit
    return code

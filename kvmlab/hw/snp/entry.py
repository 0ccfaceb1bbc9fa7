"""AMD SEV-SNP: one RMP entry, the instructions that change it, the checks on each access, and the error codes.

Pure functions of RMP entries; they know neither gfns of a scenario nor the kernel.  The manual is the AMD64
Architecture Programmer's Manual, volume 2, section 15.36 "Secure Nested Paging (SEV-SNP)" (tables 15-34 to 15-41)
with the instruction pages in volume 3.  Not read by us: its own text (whose revision we therefore cannot name); we
have read a public translation with notes, Microsoft's pages on the intrinsics __rmpupdate, __pvalidate and
__rmpadjust, the RMP model of github microsoft/verismo (arch/rmp/*_s.rs, 7 August 2026), and Linux
(arch/x86/virt/svm/sev.c, arch/x86/kvm/svm/sev.c).  A comment names the one that a surprising row rests on.

Left out: the spurious fault on an entry that another CPU has locked.  An address that the RMP does not cover counts
as HYPERVISOR, and cannot be assigned (`covered` in pages.py).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import NamedTuple

from ..memory import Gfn
from ..rules import ANY, Rules

PG_4K, PG_2M, PG_1G = "4K", "2M", "1G"  # no RMP entry is 1G: that is the size of a mapping
LARGE = frozenset({PG_2M, PG_1G})
VC_NOT_VALIDATED_CODE = 0x404  # #VC error code: page not validated


class RmpEntry(NamedTuple):
    """One RMP entry, as the APM's "RMP Entry" table lists its fields.  The default is hypervisor-owned.

    `gpa` is the guest's page as a gfn, here and in every rule: the field holds an address of 4K pages.
    """

    assigned: bool = False
    asid: int = 0
    gpa: Gfn | None = None
    size: str = PG_4K
    immutable: bool = False
    vmsa: bool = False
    validated: bool = False

    def __str__(self) -> str:
        if not self.assigned:
            return "hypervisor"
        flags = (self.size == PG_2M, " 2M"), (self.immutable, " immutable"), (self.vmsa, " VMSA")
        text = f"guest gpa={self.gpa}" if self.asid else "firmware"
        return text + "".join(word for on, word in (*flags, (self.validated, " validated")) if on)


HYPERVISOR = RmpEntry()


class Rmpupdate(IntEnum):
    """What RMPUPDATE and PSMASH return in rAX (APM, RMPUPDATE; the kernel's RMPUPDATE_* names)."""

    OK = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_INUSE = 3
    FAIL_OVERLAP = 4  # 7 in the series of 2023


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


def assigned_to(asid: int, gpa: Gfn, size: str = PG_4K) -> RmpEntry:
    """Return the new state that KVM asks RMPUPDATE for when it makes a page private (rmp_make_private())."""
    return RmpEntry(assigned=True, asid=asid, gpa=gpa, size=size)


def rmpupdate(
    old: RmpEntry, new: RmpEntry, *, identical_keeps_validated: bool = True
) -> tuple[Rmpupdate, RmpEntry]:
    """RMPUPDATE on one entry: the result code and the entry after it; pages around it are left to rmpupdate_at().

    FAIL_INPUT for a state that cannot be asked for, then FAIL_PERMISSION if the entry is immutable.  Deassigning
    leaves HYPERVISOR; all else clears Validated and VMSA, unless what is assigned stays what it was.
    """
    # __rmpupdate (Microsoft): the new state has gpa, assigned, size, immutable and ASID, and no VMSA or Validated.
    if new.validated or new.vmsa or (new.assigned and new.gpa is None):
        return Rmpupdate.FAIL_INPUT, old
    # verismo, RmpEntry::_rmpupdate: a page given to nobody can have no ASID and cannot be immutable.  Which code
    # hardware has for that is not read by us.
    if not new.assigned and (new.asid or new.immutable):
        return Rmpupdate.FAIL_INPUT, old
    if old.immutable:
        return Rmpupdate.FAIL_PERMISSION, old
    if not new.assigned:
        return Rmpupdate.OK, HYPERVISOR  # whatever gpa and size were asked for: hardware writes gpa 0
    # verismo, RmpEntry::_rmpupdate: Validated and VMSA stay if asid, gpa, size and assigned do, Immutable or not.
    # The manual's word on it is not read by us, hence the switch.
    if identical_keeps_validated and old[:4] == new[:4]:
        return Rmpupdate.OK, new._replace(vmsa=old.vmsa, validated=old.validated)
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
        "mapping": (PG_4K, PG_2M, PG_1G),  # by the nested page table
        "size": ("fits", "differs"),  # the entry's, against the mapping's
        "validated": (False, True),
        "region_assigned": (False, True),  # any 4K page of the same 2M region
    },
    [
        # 15.36.10, table 15-39: a C=0 read is not checked at all, so it silently returns the raw bytes.
        # enc   op           assigned asid     gpa      immut  mapping size     validated region
        (False, "read", ANY, ANY, ANY, ANY, ANY, ANY, ANY, ANY, OK),
        (False, "write", False, ANY, ANY, ANY, PG_4K, ANY, ANY, ANY, OK),
        (False, "write", True, ANY, ANY, ANY, PG_4K, ANY, ANY, ANY, NPF_RMP),
        # 15.36.10: through a large mapping a page is hypervisor-owned if all 512 entries of its 2M region are.
        (False, "write", ANY, ANY, ANY, ANY, LARGE, ANY, ANY, False, OK),
        (False, "write", ANY, ANY, ANY, ANY, LARGE, ANY, ANY, True, NPF_RMP),
        # PVALIDATE through a C=0 mapping: not read by us; a nested fault is a choice.
        (False, "pvalidate", ANY, ANY, ANY, ANY, ANY, ANY, ANY, ANY, NPF_RMP),
        (True, ANY, False, ANY, ANY, ANY, ANY, ANY, ANY, ANY, NPF_RMP),
        (True, ANY, True, "other", ANY, ANY, ANY, ANY, ANY, ANY, NPF_RMP),
        (True, ANY, True, "ours", "other", ANY, ANY, ANY, ANY, ANY, NPF_RMP),
        (True, ANY, True, "ours", "same", True, ANY, ANY, ANY, ANY, NPF_RMP),
        # 15.36.10: a 2M mapping needs a 2M entry and a 4K mapping a 4K entry: it is checked both ways.
        (True, ANY, True, "ours", "same", False, ANY, "differs", ANY, ANY, NPF_RMP),
        # 15.36.10: ownership comes first, then Validated, then VMPL (vmpl_allows() in snp_pages).
        (True, frozenset({"read", "write"}), True, "ours", "same", False, ANY, "fits", False, ANY, VC),
        (True, frozenset({"read", "write"}), True, "ours", "same", False, ANY, "fits", True, ANY, OK),
        # PVALIDATE needs a page that is the guest's, and not that it is validated (verismo, RmpEntry::pvalidate).
        (True, "pvalidate", True, "ours", "same", False, ANY, "fits", ANY, ANY, OK),
    ],
)  # fmt: skip

_WRITES = frozenset({"write", "page-table"})

HOST_ACCESS = Rules(
    'APM vol. 2, 15.36.10 "RMP and VMPL Access Checks": host access',
    {
        "op": ("read", "write", "page-table"),
        "mapping": (PG_4K, PG_2M, PG_1G),
        "page_assigned": (False, True),
        "region_assigned": (False, True),  # any 4K page of the same 2M region
    },
    [
        # 15.36.10, table 15-39: a host read is not checked, and returns ciphertext.
        ("read", ANY, ANY, ANY, OK),
        (_WRITES, PG_4K, False, ANY, OK),
        (_WRITES, PG_4K, True, ANY, HOST_PF),
        # Linux, adjust_direct_map(): the write faults if any page of the 2M region is assigned, and a 1G mapping is
        # taken as a 2M one.
        (_WRITES, LARGE, ANY, False, OK),
        (_WRITES, LARGE, ANY, True, HOST_PF),
    ],
)


def entry_size(mapping: str) -> str:
    """Return the size of RMP entry that a mapping of this size asks for: 1G is taken as 2M (15.36.10)."""
    return PG_2M if mapping in LARGE else PG_4K


def guest_access(
    entry: RmpEntry,
    *,
    enc: bool,
    op: str,
    asid: int,
    gpa: Gfn,
    size: str = PG_4K,
    region_assigned: bool = False,
) -> str:
    """Check one guest access through a mapping of `size` against the RMP entry that it reaches: OK, NPF_RMP or VC.

    `region_assigned`: another page of the entry's 2M region is assigned; it counts for C=0 writes only.
    """
    answer: str = GUEST_ACCESS(
        enc=enc,
        op=op,
        assigned=entry.assigned,
        asid="ours" if entry.asid == asid else "other",
        gpa="same" if entry.gpa == gpa else "other",
        immutable=entry.immutable,
        mapping=size,
        size="fits" if entry.size == entry_size(size) else "differs",
        validated=entry.validated,
        region_assigned=region_assigned or entry.assigned,
    )
    return answer


def fails_for_size(
    entry: RmpEntry, *, enc: bool, op: str, asid: int, gpa: Gfn, size: str, region_assigned: bool = False
) -> bool:
    """Whether a guest access takes an RMP fault for the size of its mapping and nothing else."""
    fits, differs = (
        guest_access(entry, enc=enc, op=op, asid=asid, gpa=gpa, size=s, region_assigned=region_assigned)
        for s in (entry.size, size)
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

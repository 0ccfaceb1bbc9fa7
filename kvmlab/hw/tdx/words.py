"""Intel TDX: the words of the TDX module's interface, bit for bit (leaves, completion codes, operands, levels).

Source: the TDX module itself (github intel/tdx-module, tag TDX_1.5.01), tdx_error_codes_defs.h, tdx_api_defs.h,
pamt_manager.h.  Left out: live migration, L2 VMs, service TDs.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum

from ..memory import Gpa
from ..rules import ANY, Rules


class Leaf(StrEnum):
    """A host-side leaf (SEAMCALL), or ACCEPT, the guest-side one (TDCALL) of a conversion; `number` goes in RAX."""

    number: int

    def __new__(cls, text: str, number: int) -> Leaf:
        """Make the member `text`; ACCEPT's number is that of a TDCALL, which is a space of its own."""
        leaf = str.__new__(cls, text)
        leaf._value_, leaf.number = text, number
        return leaf

    VP_ENTER = "TDH.VP.ENTER", 0
    PAGE_ADD = "TDH.MEM.PAGE.ADD", 2
    SEPT_ADD = "TDH.MEM.SEPT.ADD", 3
    PAGE_AUG = "TDH.MEM.PAGE.AUG", 6
    RANGE_BLOCK = "TDH.MEM.RANGE.BLOCK", 7
    PAGE_DEMOTE = "TDH.MEM.PAGE.DEMOTE", 15
    MR_FINALIZE = "TDH.MR.FINALIZE", 17
    VP_FLUSH = "TDH.VP.FLUSH", 18
    MNG_VPFLUSHDONE = "TDH.MNG.VPFLUSHDONE", 19
    MNG_KEY_FREEID = "TDH.MNG.KEY.FREEID", 20
    PAGE_PROMOTE = "TDH.MEM.PAGE.PROMOTE", 23
    PAGE_RDMD = "TDH.PHYMEM.PAGE.RDMD", 24
    PAGE_RECLAIM = "TDH.PHYMEM.PAGE.RECLAIM", 28
    PAGE_REMOVE = "TDH.MEM.PAGE.REMOVE", 29
    SEPT_REMOVE = "TDH.MEM.SEPT.REMOVE", 30
    TRACK = "TDH.MEM.TRACK", 38
    RANGE_UNBLOCK = "TDH.MEM.RANGE.UNBLOCK", 39
    CACHE_WB = "TDH.PHYMEM.CACHE.WB", 40
    PAGE_WBINVD = "TDH.PHYMEM.PAGE.WBINVD", 41
    ACCEPT = "TDG.MEM.PAGE.ACCEPT", 6


class Status(IntEnum):
    """A completion status: bits 63:32 of RAX (tdx_error_codes_defs.h); bits 31:0 are an operand or details."""

    SUCCESS = 0
    NON_RECOVERABLE_TD = 0x6000000200000000
    INTERRUPTED_RESUMABLE = 0x8000000300000000
    INTERRUPTED_RESTARTABLE = 0x8000000400000000
    NON_RECOVERABLE_TD_NON_ACCESSIBLE = 0x6000000500000000
    OPERAND_INVALID = 0xC000010000000000
    OPERAND_ADDR_RANGE_ERROR = 0xC000010100000000
    OPERAND_BUSY = 0x8000020000000000
    PREVIOUS_TLB_EPOCH_BUSY = 0x8000020100000000
    OPERAND_BUSY_HOST_PRIORITY = 0x8000020400000000
    HOST_PRIORITY_BUSY_TIMEOUT = 0x9000020500000000
    PAGE_METADATA_INCORRECT = 0xC000030000000000
    TD_ASSOCIATED_PAGES_EXIST = 0xC000040000000000
    TD_FATAL = 0xE000060400000000
    LIFECYCLE_STATE_INCORRECT = 0xC000060700000000
    OP_STATE_INCORRECT = 0xC000060800000000
    NO_VCPUS = 0xC000060900000000
    VCPU_NOT_ASSOCIATED = 0x8000070200000000
    TD_KEYS_NOT_CONFIGURED = 0x8000081000000000
    WBCACHE_NOT_COMPLETE = 0x8000081700000000
    NO_HKID_READY_TO_WBCACHE = 0x0000082100000000
    FLUSHVP_NOT_DONE = 0x8000082400000000
    EPT_WALK_FAILED = 0xC0000B0000000000
    GPA_RANGE_NOT_BLOCKED = 0xC0000B0600000000
    GPA_RANGE_ALREADY_BLOCKED = 0x00000B0700000000
    TLB_TRACKING_NOT_DONE = 0xC0000B0800000000
    EPT_INVALID_PROMOTE_CONDITIONS = 0xC0000B0900000000
    PAGE_ALREADY_ACCEPTED = 0x00000B0A00000000
    PAGE_SIZE_MISMATCH = 0xC0000B0B00000000
    EPT_ENTRY_STATE_INCORRECT = 0xC0000B0D00000000
    EPT_PAGE_NOT_FREE = 0xC0000B0E00000000

    def __str__(self) -> str:
        return f"TDX_{self.name}"


# Linux's tdx_errno.h has NON_RECOVERABLE_TD without bit 61 (fatal), the module with it.
LINUX_NON_RECOVERABLE_TD = 0x4000000200000000


class Operand(IntEnum):
    """The low word of a status that names an operand (OPERAND_ID_* of tdx_error_codes_defs.h)."""

    RAX = 0
    RCX = 1
    RDX = 2
    R8 = 8
    R9 = 9
    TDR = 128
    SEPT_TREE = 146
    SEPT_ENTRY = 147
    TD_EPOCH = 169
    OP_STATE = 172


class Level(IntEnum):
    """A level of the secure EPT; the first three are also the page sizes of the PAMT (ept_level_t, page_size_t)."""

    PT = 0
    PD = 1
    PDPT = 2
    PML4 = 3
    PML5 = 4

    @property
    def pages(self) -> int:
        """How many 4K pages one entry of this level covers."""
        return 1 << 9 * self

    def __str__(self) -> str:
        return ("4K", "2M", "1G", "512G", "256T")[self]


CHILDREN = 512
EXIT_REASON_EPT_VIOLATION = 48
SEPT_VE_DISABLE = 1 << 28  # the TD attribute
_LEVEL_STATUS = (Status.PAGE_ALREADY_ACCEPTED, Status.PAGE_SIZE_MISMATCH)


class Guest(StrEnum):
    """What befalls a TD's instruction instead of a status: its access, or its ACCEPT, leaves the TD or faults."""

    DATA = "ok"
    VE = "#VE"
    EXIT = "EPT violation"
    EXIT_ACCEPT = "EPT violation, ACCEPT"
    EXIT_PENDING = "EPT violation, PENDING"
    INTERRUPTED = "interrupted"

    @property
    def extended_qualification(self) -> int:
        """The type in bits 3:0 of the extended exit qualification, RDX of VP.ENTER (vmx_eeq_type_t)."""
        return {Guest.EXIT_ACCEPT: 1, Guest.EXIT_PENDING: 6}.get(self, 0)


OK, WARNING, RETRY, ERROR, LOST = "success", "warning", "recoverable error", "error", "TD or vCPU lost"

CLASSES = Rules(
    "TDX module 1.5.01, tdx_error_codes_defs.h: bits of a completion status",
    {"zero": (False, True), "error": (False, True), "not_recoverable": (False, True)},  # bits 63:32, 63, 62
    [
        (True, ANY, ANY, OK),
        (False, False, False, WARNING),  # non-zero, so a test for zero takes it for a failure
        (False, True, False, RETRY),  # every BUSY code
        (False, True, True, ERROR),  # calling again cannot help
        (False, False, True, LOST),
    ],
    outcome="class",
)

SHARED_BIT = Rules(
    "TDX module 1.5.01, get_gpa_shared_bit(): which bit of a GPA says shared",
    {"gpaw": (False, True)},  # TDCS.EXEC_CONTROLS.GPAW, 5-level EPT
    [(False, 47), (True, 51)],
    outcome="bit",
)


def with_operand(status: Status, operand: int) -> int:
    """Return RAX for a status and its operand id (or level, or exit reason) in the low word."""
    return int(status) | int(operand)


def busy(operand: Operand) -> int:
    """Return RAX of a leaf that found the lock of `operand` taken, e.g. 0x8000020000000092 for the S-EPT tree."""
    return with_operand(Status.OPERAND_BUSY, operand)


def status_part(rax: int) -> int:
    """Return bits 63:32 of RAX in place, as KVM compares them; `Status(...)` of it names it."""
    return rax & 0xFFFFFFFF00000000


def operand_part(rax: int) -> int:
    """Return bits 31:0 of RAX."""
    return rax & 0xFFFFFFFF


def kind(rax: int) -> str:
    """Return the class of a completion: OK, WARNING, RETRY, ERROR or LOST."""
    status = status_part(rax)
    answer: str = CLASSES(zero=status == 0, error=bool(status >> 63), not_recoverable=bool(status >> 62 & 1))
    return answer


def name(rax: int) -> str:
    """Return the name of a completion, e.g. "TDX_OPERAND_BUSY | SEPT_TREE"; unknown parts stay hexadecimal."""
    status, low = status_part(rax), operand_part(rax)
    if status == LINUX_NON_RECOVERABLE_TD:
        status = int(Status.NON_RECOVERABLE_TD)
    known = status in Status._value2member_map_
    head = str(Status(status)) if known else f"{status:#018x}"
    if status == Status.SUCCESS and low == EXIT_REASON_EPT_VIOLATION:
        return f"{head} | EXIT_REASON_EPT_VIOLATION"
    if status in _LEVEL_STATUS and low <= Level.PML5:
        return f"{head} | {Level(low)}"
    if not low:
        return head
    return f"{head} | {Operand(low).name if low in Operand._value2member_map_ else f'{low:#x}'}"


def is_shared(gpa: Gpa, *, gpaw: bool = False) -> bool:
    """Whether the SHARED bit of a GPA (bytes, not a gfn) is set."""
    bit: int = SHARED_BIT(gpaw=gpaw)
    return bool(gpa >> bit & 1)

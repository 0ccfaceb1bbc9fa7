"""What must never happen: each property's name, sentence and source.

The checks themselves stand where the thing happens (a step that violates one says so) or, for `out-of-sync`,
in machine/out_of_sync.py; `deadlock` and `livelock` are properties of the state graph: explore/liveness.py.
"""

from __future__ import annotations

from typing import NamedTuple


class Property(NamedTuple):
    """A property: its name, what must never happen, where the rule comes from, and whether it ends the run."""

    name: str
    sentence: str
    source: str
    fatal: bool
    guest: bool = False  # about the guest's fate: not judged when the guest is careless


# Gravest first: what takes the host down, then the guest, then what is wrong but goes on.
PROPERTIES = (
    Property(
        "host-rmp-fault",
        "a host access takes an RMP fault",
        "APM vol. 2, RMP and VMPL Access Checks; Roth, 2023-03-22",
        True,
    ),
    Property(
        "host-machine-check",
        "memory that the host has poisoned is consumed (tdx)",
        "TDX Module Base Architecture Specification, Memory Integrity Protection and Machine Check Handling",
        True,
    ),
    Property(
        "kernel-bug",
        "the host kernel reaches a BUG()",
        "tdp_mmu.c before v6.13, Invalid SPTE change; oops on an address that the directmap lacks",
        True,
    ),
    Property(
        "platform-error",
        "RMPUPDATE, PSMASH or a SEAMCALL returns a status that KVM treats as a bug",
        "arch/x86/virt/svm/sev.c; KVM_BUG_ON() in arch/x86/kvm/vmx/tdx.c",
        True,
    ),
    Property(
        "deadlock",
        "those who have work left all wait for each other",
        "Documentation/locking/lockdep-design.rst",
        False,
    ),
    Property(
        "sleep-in-atomic",
        "a sleeping call runs with preemption off",
        "BUG: scheduling while atomic; Dohrmann, 2023-01-22",
        False,
    ),
    Property(
        "lock-misuse", "a lock is dropped unheld, taken twice, nested both ways, or kept", "lockdep", False
    ),
    Property(
        "confidentiality",
        "data written as private is readable in clear by the host",
        "Documentation/security/snp-tdx-threat-model.rst",
        False,
    ),
    Property(
        "integrity",
        "the guest reads what neither it nor, if shared, the host wrote",
        "Documentation/security/snp-tdx-threat-model.rst",
        False,
        True,
    ),
    Property(
        "guest-killed",
        "a well-behaved guest dies of a fault that it did not cause",
        "#VC 0x404; KVM_EXIT_MEMORY_FAULT",
        True,
        True,
    ),
    Property(
        "conversion-refused",
        "the guest's own PVALIDATE or ACCEPT fails through no fault of its own",
        "PVALIDATE; GHCB_TERM_PVALIDATE; tdx_accept_memory()",
        True,
        True,
    ),
    Property(
        "livelock", "under a fair scheduler one access faults for ever", "Roth, 2023-03-22", False, True
    ),
    Property(
        "stale-mapping",
        "after the return an access completes through the wrong mapping",
        "Roth, 2023-03-22",
        False,
    ),
    Property(
        "out-of-sync",
        "when all is quiet, xarray, RMP, mappings and directmap disagree",
        "Roth, 2023-03-22",
        False,
    ),
    Property(
        "warning",
        "the kernel warns of a state held to be impossible",
        'tdp_mmu.c since v6.15, WARN_ON_ONCE(); sev_handle_rmp_fault(), "Unexpected RMP fault"',
        False,
    ),
)
BY_NAME = {p.name: p for p in PROPERTIES}
FATAL = frozenset(p.name for p in PROPERTIES if p.fatal)
MEASURES = {
    "spurious-npf": "the fault path found the wanted leaf already there",
    "seamcalls": "host SEAMCALLs of the zap and the fault (tdx)",
    "seamcall-busy": "SEAMCALLs that found a lock of the module taken (tdx)",
    "kicks": "waits for every vCPU to leave the TD (tdx)",
    "retry": "the stale test sent the fault back",
    "exits": "KVM_EXIT_MEMORY_FAULT",
    "mmio": "KVM_EXIT_MMIO: a shared access to a gfn without a memslot",
    "silent-read": "a C=0 read of a page that KVM calls shared and the RMP still the guest's",
    "enomem": "allocations of the xarray that failed",
    "psmash": "2M RMP entries that were split",
    "double": "a shared gfn whose private page is allocated as well (where the VMM discards)",
    "residue": "a private PFN still assigned after going shared (split backing)",
}

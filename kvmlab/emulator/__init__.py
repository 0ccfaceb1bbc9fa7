"""The emulator: one concrete VM of any size, one run, by the same rules and designs as the explorer.

events locks costs         errors, log and counters; who holds what; published figures
memory                     bytes in DRAM and the stand-in cipher
rmp sev                    RMP arrays under the rules of hw/; RMPUPDATE in ranges, the direct map
gmem slots                 guest_memfd; memslots and large-page bookkeeping
mmu faults ioctl           attributes, NPT, TLBs; the `fault:` and `ioctl:` rows of a design
access guest psc linux     a vCPU; page state changes; what a Linux guest does
host vmm                   the host kernel and userspace
vm workloads               the public Vm; a boot-like load
"""

from __future__ import annotations

from .events import (
    Event,
    GpFault,
    GuestSpins,
    GuestTerminated,
    InstructionError,
    InternalError,
    KernelBug,
    MemoryFaultExit,
    MmioExit,
    PlatformError,
    PscError,
    RmpFault,
    SigBus,
    VcFault,
    VmErrno,
    VmError,
    VmplFault,
)
from .locks import Deadlock
from .vm import Vm, VmSwitches

__all__ = [
    "Deadlock", "Event", "GpFault", "GuestSpins", "GuestTerminated", "InstructionError", "InternalError", "KernelBug",
    "MemoryFaultExit", "MmioExit", "PlatformError", "PscError", "RmpFault", "SigBus", "VcFault", "Vm", "VmErrno",
    "VmError", "VmSwitches", "VmplFault",
]  # fmt: skip

"""The emulator: one concrete VM of any size, one run, by the same rules and designs as the explorer.

switches                   what sources leave open, and what later kernels fixed
arguments                  what each public call takes, looked at in one place
events costs               errors, log and counters; published figures
memory                     bytes in DRAM and the stand-in cipher
caches rmp                 dirty lines by C-bit; RMP arrays under the rules of hw/
directmap                  which pages the kernel's directmap has
gmem slots regions lpage   guest_memfd; memslots, their ioctl, their large pages
mmu                        attributes, NPT, TLBs
columns large              arrays as cells of the page model, and back; 2M pages
calls kvm_calls            the programs of a design run on columns: ioctl, fault, punch, zap
ioctl                      the ioctl's input
access guest psc alike     a vCPU; page state changes; runs of requests that are alike
linux                      what a Linux guest does
host vmm                   the host kernel and userspace
tdx_memory tdx_module      tdx: lines by KeyID; S-EPT, PAMT and epochs as arrays
tdx_kvm tdx_zap tdx_aug    its vCPUs and SEAMCALLs; the `zap:` and `aug:` rows of a design
tdx_walk tdx_guest         accesses through two roots; ACCEPT and MapGPA
tdx_linux tdx_load         a Linux guest; conversions in batches, side by side
place                      a page in a named state
vm workloads               the public Vm; a boot-like load
"""

from __future__ import annotations

from .events import (
    Deadlock,
    Event,
    GpFault,
    GuestSpins,
    GuestTerminated,
    InstructionError,
    InternalError,
    KernelBug,
    MachineCheck,
    MapGpaError,
    MemoryFaultExit,
    MmioExit,
    PlatformError,
    PscError,
    RmpFault,
    SetMemoryFailed,
    ShutdownExit,
    SigBus,
    TdxError,
    VcFault,
    VeFault,
    VmDead,
    VmErrno,
    VmError,
    VmplFault,
)
from .switches import VmSwitches
from .vm import Vm

__all__ = [
    "Deadlock", "Event", "GpFault", "GuestSpins", "GuestTerminated", "InstructionError", "InternalError", "KernelBug",
    "MachineCheck", "MapGpaError", "MemoryFaultExit", "MmioExit", "PlatformError", "PscError", "RmpFault",
    "SetMemoryFailed", "ShutdownExit", "SigBus", "TdxError", "VcFault", "VeFault", "Vm", "VmDead", "VmErrno",
    "VmError", "VmSwitches", "VmplFault",
]  # fmt: skip

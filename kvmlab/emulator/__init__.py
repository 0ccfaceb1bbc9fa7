"""The emulator: one concrete VM of any size, one run, by the same rules and designs as the explorer.

In order: a module imports nothing from below its line.

switches events costs      what sources leave open; errors, log and counters; published figures
memory caches              bytes in DRAM and the stand-in cipher; dirty lines by C-bit
arguments                  what each public call takes, looked at in one place
rmp gfn_arrays             RMP entries by PFN; attributes, NPT, C-bits by gfn, and TLBs
tdx_memory tdx_module      tdx: lines by KeyID; S-EPT, PAMT and epochs
slots mixed_pages          memslots, the pages of a guest_memfd; which 2M and 1G pages are mixed
host_pages                 the host: pages, directmap, stores to them; the hooks of a script
tdx_kvm                    tdx: the vCPUs of one TD, and what waits for them
kvm_state vm_state         the range engine's state; what all parts of a VM share
columns large              arrays as cells of the page model, and back; 2M pages
calls kvm_calls            the programs of a design run on columns: ioctl, fault, punch, zap
ioctl guest_memfd regions  KVM's system calls: attributes, files, memslots
host vmm                   the host kernel and userspace; what the latter does with exits
walk tdx_walk              a vCPU's accesses, each with its faults; tdx: through two roots
alike psc tdx_guest        runs of requests that are alike; page state changes; ACCEPT and MapGPA
vcpu                       one vCPU: accesses, instructions, requests
tdx_linux linux guest      the order of a Linux guest's conversions
place                      a page in a named state
vm workloads tdx_load      the public Vm; a boot-like load; conversions in batches, side by side
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

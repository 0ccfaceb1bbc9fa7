"""What happens in a Vm: the errors that end a call, the log of events, and the counters."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from ..hw import tdx

MEMORY_EXIT_FLAG_PRIVATE = 1 << 3  # KVM_MEMORY_EXIT_FLAG_PRIVATE


class VmError(Exception):
    """What a Vm raises; the subclasses carry the errno, fault or status code that they stand for."""


class Deadlock(VmError):
    """A thread waits for a lock whose holder will not let go in this run."""


class VmErrno(OSError, VmError):
    """A system call failed, with the errno that KVM gives."""

    def __init__(self, errno: int, text: str) -> None:
        super().__init__(errno, f"{text}: {os.strerror(errno)}")


class MemoryFaultExit(VmErrno):
    """KVM_EXIT_MEMORY_FAULT: KVM_RUN gave -1 with EFAULT; `flags` has bit 3 for a private access."""

    def __init__(self, gpa: int, flags: int, size: int = 4096) -> None:
        import errno

        super().__init__(errno.EFAULT, f"KVM_EXIT_MEMORY_FAULT gpa={gpa:#x} size={size} flags={flags:#x}")
        self.gpa, self.flags, self.size = gpa, flags, size


class MmioExit(VmError):
    """KVM_EXIT_MMIO: an access to a guest address that no memslot backs."""

    def __init__(self, gpa: int, write: bool) -> None:
        super().__init__(f"KVM_EXIT_MMIO {'write' if write else 'read'} gpa={gpa:#x}")
        self.gpa, self.write = gpa, write


class InternalError(VmError):
    """KVM_EXIT_INTERNAL_ERROR: the guest cannot run at all."""


class SigBus(VmError):
    """The host process gets SIGBUS from its own mapping."""


class RmpFault(VmError):
    """A host write took a #PF with the RMP bit; from kernel mode that is an oops, the host is gone."""

    def __init__(self, pfn: int, why: str, error_code: int = 1 << 31 | 3) -> None:
        super().__init__(f"#PF RMP ({error_code:#x}) on a host write to PFN {pfn:#x}: {why}")
        self.pfn, self.error_code = pfn, error_code


class KernelBug(VmError):
    """The host kernel reached a BUG() or an oops."""


class PlatformError(VmError):
    """An RMPUPDATE or PSMASH status, or a KVM_BUG_ON, that KVM treats as a bug."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class VcFault(VmError):
    """#VC in the guest; 0x404: the page is not validated.  A Linux guest terminates itself."""

    def __init__(self, gpa: int, error_code: int) -> None:
        super().__init__(f"#VC {error_code:#x} at gpa {gpa:#x}: page not validated")
        self.gpa, self.error_code = gpa, error_code


class GpFault(VmError):
    """#GP in the guest."""


class VmplFault(VmError):
    """A nested fault with the VMPL bit, which KVM cannot resolve: the guest's own permissions forbid it."""

    def __init__(self, gpa: int, error_code: int) -> None:
        super().__init__(f"#NPF {error_code:#x} at gpa {gpa:#x}: VMPL permission")
        self.gpa, self.error_code = gpa, error_code


class InstructionError(VmError):
    """PVALIDATE or RMPADJUST answered a failure in rAX, or (status 255) PVALIDATE's carry flag was set."""

    def __init__(self, name: str, gpa: int, status: int, word: str) -> None:
        super().__init__(f"{name}({gpa:#x}) = {status} ({word})")
        self.name, self.gpa, self.status, self.word = name, gpa, status, word


class PscError(VmError):
    """The hypervisor refused a page state change; `code` is the MSR error or SW_EXITINFO2."""

    def __init__(self, code: int) -> None:
        super().__init__(f"page state change refused: {code:#x}")
        self.code = code


class GuestTerminated(VmError):
    """A Linux guest ended itself (GHCB_TERM_*): `reason` 1 is PSC, 2 is PVALIDATE."""

    def __init__(self, reason: int, why: VmError) -> None:
        super().__init__(f"guest terminates, GHCB_TERM reason {reason}: {why}")
        self.reason, self.why = reason, why


class GuestSpins(VmError):
    """One access faults again and again: in this run nobody will ever change what it waits for."""

    def __init__(self, gpa: int, why: str) -> None:
        super().__init__(f"the access at gpa {gpa:#x} repeats for ever: {why}")
        self.gpa, self.why = gpa, why


class TdxError(VmError):
    """A TDCALL or SEAMCALL answered a status other than 0: RAX bit for bit, and its class in the module's words."""

    def __init__(self, leaf: str, gpa: int, rax: int) -> None:
        super().__init__(f"{leaf}({gpa:#x}) = {rax:#x} ({tdx.name(rax)})")
        self.leaf, self.gpa, self.rax, self.kind = leaf, gpa, rax, tdx.kind(rax)

    @property
    def status(self) -> tdx.Status:
        """The status without its operand."""
        return tdx.Status(tdx.status_part(self.rax))


class MapGpaError(VmError):
    """TDG.VP.VMCALL<MapGPA> failed, or a Linux guest gave it up: `status` is R10, `r11` where it stopped."""

    def __init__(self, status: int, r11: int, why: str) -> None:
        super().__init__(f"MapGPA = {status:#x} ({why}), R11 = {r11:#x}")
        self.status, self.r11, self.why = status, r11, why


class SetMemoryFailed(VmErrno):
    """A Linux guest's set_memory_encrypted() or set_memory_decrypted() gives -EIO; its caller leaks the memory."""

    def __init__(self, errno: int, call: str, why: VmError) -> None:
        super().__init__(errno, f"{call}(): {why}")
        self.call, self.why = call, why


class VmDead(VmErrno):
    """KVM has given up the VM (kvm_vm_dead(), KVM_BUG_ON()): every ioctl gives EIO."""


class ShutdownExit(VmError):
    """KVM_EXIT_SHUTDOWN: the guest is at its end."""


class VeFault(VmError):
    """#VE in a TD's kernel for a private GPA, at which a Linux guest panics."""

    def __init__(self, gpa: int) -> None:
        super().__init__(f"#VE at private gpa {gpa:#x}: PENDING, not accepted")
        self.gpa = gpa


class MachineCheck(VmError):
    """Poison was consumed: `who` is "TD", "module" or "host", `end` who goes down, `status` what VP.ENTER returns."""

    def __init__(self, who: str, pfn: int, end: str) -> None:
        super().__init__(f"#MC: {who} consumes poison in PFN {pfn:#x}: {end}")
        self.who, self.pfn, self.end = who, pfn, end
        self.status = tdx.Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE if who == "TD" else None


class Event(NamedTuple):
    """One thing that happened, `times` times in a row on consecutive pages from `page` (gfn or PFN) on."""

    kind: str
    text: str
    page: int | None = None
    times: int = 1
    code: int | None = None

    def __str__(self) -> str:
        where = "" if self.page is None else f" @{self.page:#x}"
        times = f" x{self.times}" if self.times != 1 else ""
        code = "" if self.code is None else f" [{self.code:#x}]"
        return f"{self.kind}{where}{times}{code} {self.text}".rstrip()


class Log:
    """The newest events, exact counters over all of them, and the violations that do not end a run."""

    def __init__(self, keep: int) -> None:
        self.events: list[Event] = []
        self.keep, self.dropped = keep, 0
        self.counters: Counter[str] = Counter()
        self.violations: list[tuple[str, str]] = []

    def add(
        self, kind: str, text: str = "", page: int | None = None, times: int = 1, code: int | None = None
    ) -> int:
        """Note an event that happened `times` times; the number returned is for `amend`."""
        kind = str(kind)  # a leaf's name, too
        self.counters[kind] += times
        self.events.append(Event(kind, text, page, times, code))
        if len(self.events) > 2 * self.keep:
            gone = len(self.events) - self.keep
            del self.events[:gone]
            self.dropped += gone
        return self.dropped + len(self.events) - 1

    def amend(self, number: int, times: int) -> None:
        """Say how often an event happened in the end: what it brought about is noted after it."""
        at = number - self.dropped
        if at >= 0:
            old = self.events[at]
            self.counters[old.kind] += times - old.times
            self.events[at] = old._replace(times=times)

    def mark(self) -> int:
        """The number that the next event will have."""
        return self.dropped + len(self.events)

    def repeat(self, since: int, kinds: Collection[str] | None, times: int) -> None:
        """Say that events from number `since` on (of these kinds) stand for `times` as many; counters stay."""
        for at in range(max(0, since - self.dropped), len(self.events)):
            if kinds is None or self.events[at].kind in kinds:
                event = self.events[at]
                self.events[at] = event._replace(times=event.times * times)

    def violate(self, name: str, text: str) -> None:
        """Note a violation of a property after which the run goes on; each distinct one once."""
        if (name, text) not in self.violations:
            self.violations.append((name, text))
            self.add("violation", f"{name}: {text}")

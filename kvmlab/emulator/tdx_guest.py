"""What a TD asks for: ACCEPT, page by page or in runs, and MapGPA as KVM serves it (tdx_map_gpa())."""

from __future__ import annotations

import errno
from typing import NamedTuple, NoReturn

from ..errors import InputError
from ..hw import tdx
from ..hw.tdx import EXIT_REASON_EPT_VIOLATION, Leaf, Level, State
from ..hw.tdx.checks import Check, answer, told
from ..hw.tdx.locks import EntryLock
from ..hw.tdx.sept import LEVELS
from . import alike
from .events import TdxError, VmErrno
from .memory import LIMIT, PAGE, prefix
from .tdx_kvm import TdxKvm
from .tdx_module import FREE, answers
from .tdx_walk import TdWalker
from .vm_state import VmState
from .vmm import Vmm

SHARED = 1 << tdx.SHARED_BIT(gpaw=False)
MAX_GPA = 1 << 48
SIZES = {level.pages * PAGE: level for level in (Level.PT, Level.PD, Level.PDPT)}
MAP_GPA = "TDG.VP.VMCALL<MapGPA>"
TDX_MAP_GPA_MAX_LEN = 2 << 20
# TDG.VP.VMCALL status in R10, as arch/x86/include/asm/shared/tdx.h has it.
SUCCESS, RETRY = 0, 1
INVALID_OPERAND, ALIGN_ERROR, SUBFUNC_UNSUPPORTED = 1 << 63, 1 << 63 | 2, 1 << 63 | 3
STATUS_NAMES = {
    SUCCESS: "SUCCESS", RETRY: "RETRY", INVALID_OPERAND: "INVALID_OPERAND", ALIGN_ERROR: "ALIGN_ERROR",
    SUBFUNC_UNSUPPORTED: "SUBFUNC_UNSUPPORTED",
}  # fmt: skip


class MapGpa(NamedTuple):
    """What MapGPA returns: the status in R10, and where it stopped in R11 (with the SHARED bit, as asked)."""

    status: int
    r11: int = 0

    def __str__(self) -> str:
        return f"TDVMCALL_STATUS_{STATUS_NAMES[self.status]}, R11 = {self.r11:#x}"


def accept(vmm: Vmm, td: TdxKvm, index: int, gpa: int, size: int) -> None:
    """TDG.MEM.PAGE.ACCEPT of one page; TdxError unless the status is 0."""
    level = SIZES[size]
    taken = LEVELS(leaf=Leaf.ACCEPT, level=level, top=Level.PML4)
    named = taken and not gpa % size and not gpa & SHARED and gpa < MAX_GPA
    if named and gpa + size > LIMIT * PAGE:
        raise InputError(f"Guest.accept(gpa={gpa:#x}): the emulator holds 4 TiB of guest addresses")
    td.enter(index)
    found = answer(Leaf.ACCEPT, told(named=named), (Check.NAMED,))
    if not found.ok:
        refuse(td, gpa, found.rax)
    if level == Level.PD:
        _accept_2m(vmm, td, index, gpa // PAGE)
    accept_4k(vmm, td, index, gpa // PAGE, gpa // PAGE + 1)


def _accept_2m(vmm: Vmm, td: TdxKvm, index: int, gfn: int) -> None:
    """A 2M ACCEPT: without a table it leaves the TD; KVM maps 4K and so hangs a table, which is a size mismatch."""
    walker = TdWalker(vmm, td, index, "write", True)
    while not td.module.has_table(Level.PD, gfn, gfn + 1)[0]:
        td.enter(index)
        walker.fault(gfn, 1, accept=True)
    td.enter(index)
    refuse(td, gfn * PAGE, mismatch_2m(locked=td.take_failure(Leaf.ACCEPT)))


def mismatch_2m(*, locked: bool = False) -> int:
    """RAX of a 2M ACCEPT where a table of 4K entries hangs, or where somebody holds the entry."""
    return answer(Leaf.ACCEPT, told(level=Level.PD, state=State.NL_MAPPED, entry_lock=EntryLock(locked))).rax


def refuse(td: TdxKvm, gpa: int, rax: int) -> NoReturn:
    """Note a failing ACCEPT, and raise it."""
    td.log.add(Leaf.ACCEPT, tdx.name(rax), gpa // PAGE, 1, rax)
    raise TdxError(Leaf.ACCEPT, gpa, rax)


def accept_4k(vmm: Vmm, td: TdxKvm, index: int, gfn: int, end: int) -> None:
    """ACCEPT 4K page after page; FREE and blocked ones take the fault path, and the instruction is run again."""
    walker = TdWalker(vmm, td, index, "write", True)
    while gfn < end:
        td.enter(index)
        n = min(end, gfn + walker.chunk) - gfn
        done = td.accept(index, gfn, n)
        if done.n:
            td.log.add(Leaf.ACCEPT, "", gfn, done.n, 0)
            walker.grew(done.n)
            gfn += done.n
        elif done.rax == EXIT_REASON_EPT_VIOLATION:
            walker.fault(gfn, _leaving(td, gfn, n), accept=True)
        else:
            refuse(td, gfn * PAGE, done.rax)


def _leaving(td: TdxKvm, gfn: int, n: int) -> int:
    """How many pages from `gfn` on are FREE as it is; each will be PENDING once it is mapped, so ACCEPT goes on."""
    states = td.module.states(gfn, gfn + n)
    ends = answers().rax[states] == EXIT_REASON_EPT_VIOLATION
    return prefix(ends & (states == states[0])) if states[0] == FREE else 1


def map_gpa(vmm: Vmm, td: TdxKvm, index: int, r12: int, r13: int) -> MapGpa:
    """TDG.VP.VMCALL<MapGPA>: KVM asks userspace in chunks of 2 MiB, and stops in between if events are pending."""
    vm = vmm.vm
    td.enter(index)
    td.log.add(MAP_GPA, "shared" if r12 & SHARED else "private", (r12 & ~SHARED) // PAGE)
    td.leave(index)
    if refused := _refused(vm, r12, r13):
        return MapGpa(refused, r12)
    end, kind = r12 + r13, r12 & SHARED

    def ask(gfn: int, pages: int) -> None:
        if answer := vmm.map_gpa_range(gfn * PAGE, pages, not kind):
            raise _Stopped(answer, gfn)

    step, at = TDX_MAP_GPA_MAX_LEN, r12
    try:
        if vm.pending is None:
            alike.run(vmm, (at & ~SHARED) // PAGE, (end & ~SHARED) // PAGE, step // PAGE, ask)
            return MapGpa(SUCCESS)
        while at < end:
            ask((at & ~SHARED) // PAGE, min(step, end - at) // PAGE)
            at += step
            if at < end and vm.pending():
                return MapGpa(RETRY, at)
    except _Stopped as stopped:
        return MapGpa(_status(vm, stopped.answer), stopped.gfn * PAGE | kind)
    return MapGpa(SUCCESS)


class _Stopped(Exception):
    """Userspace answered an error for the chunk at `gfn`."""

    def __init__(self, answer: int, gfn: int) -> None:
        super().__init__(answer)
        self.answer, self.gfn = answer, gfn


def _refused(vm: VmState, r12: int, r13: int) -> int:
    """The status with which KVM refuses before it asks anybody, in the order of its checks; 0 if it does not."""
    if not vm.hypercall_exits:
        return SUBFUNC_UNSUPPORTED
    last = r12 + r13 - 1
    if r13 <= 0 or last >= MAX_GPA or (r12 ^ last) & SHARED:
        return INVALID_OPERAND
    return ALIGN_ERROR if r12 % PAGE or r13 % PAGE else SUCCESS


def _status(vm: VmState, answer: int) -> int:
    """What the guest is told of hypercall.ret: INVALID_OPERAND; with `eagain_is_retry` EAGAIN is RETRY."""
    if not vm.switches.eagain_is_retry:
        return INVALID_OPERAND
    if answer not in (errno.EAGAIN, errno.EINVAL):
        raise VmErrno(errno.EINVAL, f"KVM_RUN: hypercall.ret = {answer}")
    return RETRY if answer == errno.EAGAIN else INVALID_OPERAND

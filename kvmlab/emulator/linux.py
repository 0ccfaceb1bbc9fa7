"""The order of a Linux guest's conversions: set_memory_encrypted() and set_memory_decrypted() under SNP.

From arch/x86/mm/mem_encrypt_amd.c, arch/x86/mm/pat/set_memory.c and the guest's __set_pages_state().  Any
failure other than a size mismatch ends the guest.  TDX has its own order, in tdx_linux.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..hw.snp import Pvalidate
from ..hw.snp.pages import PAGES_2M
from . import alike, psc, tdx_linux
from .caches import CachedMemory
from .events import GuestTerminated, InstructionError, PscError
from .memory import PAGE
from .vcpu import Vcpu

BATCH = 64  # VMGEXIT_PSC entries that Linux puts into one buffer
TERM_PSC, TERM_PVALIDATE = 1, 2


def set_memory_decrypted(guest: Vcpu, gpa: int, size: int) -> None:
    """Private to shared: rescind validation, ask for the change, clear the C-bit, flush."""
    if guest.vm.tdx:
        tdx_linux.set_memory_decrypted(guest, guest.vm.tdx, gpa, size)
        return
    flush_caches(guest, gpa, size)

    def rescind_and_ask(gfn: int, pages: int, large: bool) -> None:
        pvalidate(guest, gfn, pages, large, False)
        _ask(guest, gfn, pages, False)

    if guest.vm.has_rmp:
        batches(guest, gpa, size, True, rescind_and_ask)
    else:
        guest.map_gpa_range(gpa, size, False)
    guest.set_private(gpa, False, size)
    guest.vm.log.add("guest-flush")


def set_memory_encrypted(guest: Vcpu, gpa: int, size: int) -> None:
    """Shared to private: set the C-bit, flush, ask for the change, validate."""
    if guest.vm.tdx:
        tdx_linux.set_memory_encrypted(guest, guest.vm.tdx, gpa, size)
        return
    flush_caches(guest, gpa, size)
    guest.set_private(gpa, True, size)
    guest.vm.log.add("guest-flush")
    accept(guest, gpa, size)


def accept(guest: Vcpu, gpa: int, size: int, *, large: bool = True) -> None:
    """Ask for private and validate, batch by batch: also what accepting memory at boot is.

    tdx: ACCEPT without asking, for there memory is private when the guest starts.
    """
    if guest.vm.tdx:
        tdx_linux.accept(guest, guest.vm.tdx, gpa, size)
        return

    def ask_and_validate(gfn: int, pages: int, large: bool) -> None:
        _ask(guest, gfn, pages, True)
        pvalidate(guest, gfn, pages, large, True)

    if guest.vm.has_rmp:
        batches(guest, gpa, size, large, ask_and_validate)
    else:
        guest.map_gpa_range(gpa, size, True)


def flush_caches(guest: Vcpu, gpa: int, size: int) -> None:
    """CLFLUSH through the mapping of the old kind, which a part that keeps the C-bits coherent does not need."""
    vm = guest.vm
    if isinstance(vm.memory, CachedMemory) and vm.switches.guest_flushes_caches:
        leaves = vm.mmu.leaves(gpa // PAGE, (gpa + size) // PAGE)
        mapped = {(leaf >> 1) - 1 for leaf in leaves[leaves != 0].tolist()}
        for pfn in mapped & {pfn for pfn, _ in vm.memory.dirty}:
            vm.log.add("guest-clflush", page=pfn)
            vm.memory.flush(pfn, 1)


def batches(guest: Vcpu, gpa: int, size: int, large: bool, call: Callable[[int, int, bool], None]) -> None:
    """The PSC buffers of a range in turn: `call` with first gfn, pages, and whether the entries are 2M ones."""
    for gfn, count, big in psc.plan(gpa // PAGE, (gpa + size) // PAGE, large):
        unit = PAGES_2M if big else 1
        alike.run(guest.vmm, gfn, gfn + count * unit, BATCH * unit, partial(_batch, call, big))


def _batch(call: Callable[[int, int, bool], None], large: bool, gfn: int, pages: int) -> None:
    call(gfn, pages, large)


def _ask(guest: Vcpu, gfn: int, pages: int, private: bool) -> None:
    try:
        if code := psc.request(guest.vmm, gfn, pages, private):
            raise PscError(code)
    except PscError as refused:
        raise GuestTerminated(TERM_PSC, refused) from refused


def pvalidate(guest: Vcpu, gfn: int, pages: int, large: bool, validate: bool) -> None:
    """PVALIDATE the entries of one batch; a size mismatch goes on with 512 of 4K."""

    def large_pages(head: int, n: int) -> None:
        try:
            guest.pvalidate_range(head * PAGE, n * PAGE, validate, PAGES_2M * PAGE)
        except InstructionError as wrong:
            if wrong.status != Pvalidate.FAIL_SIZEMISMATCH:
                raise
            if others := n // PAGES_2M - 1:  # alike, so each of them fails as this one did
                guest.vm.log.add("pvalidate", wrong.word, head + PAGES_2M, others, wrong.status)
            guest.pvalidate_range(head * PAGE, n * PAGE, validate)

    try:
        if large:
            alike.run(guest.vmm, gfn, gfn + pages, PAGES_2M, large_pages)
        else:
            guest.pvalidate_range(gfn * PAGE, pages * PAGE, validate)
    except InstructionError as wrong:
        raise GuestTerminated(TERM_PVALIDATE, wrong) from wrong

"""The order of a Linux guest's conversions: set_memory_encrypted() and set_memory_decrypted() under SNP.

From arch/x86/mm/mem_encrypt_amd.c, arch/x86/mm/pat/set_memory.c and the guest's __set_pages_state().  Any
failure other than a size mismatch ends the guest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from . import psc
from .events import GuestTerminated, InstructionError, PscError
from .memory import PAGE

if TYPE_CHECKING:
    from .guest import Guest

BATCH = 64  # VMGEXIT_PSC entries that Linux puts into one buffer
TERM_PSC, TERM_PVALIDATE = 1, 2
FAIL_SIZEMISMATCH = 6


def set_memory_decrypted(guest: Guest, gpa: int, size: int) -> None:
    """Private to shared: rescind validation, ask for the change, clear the C-bit, flush."""
    if guest.vm.has_rmp:
        for lo, n, large in batches(gpa, size):
            pvalidate(guest, lo, n, large, False)
            _ask(guest, lo, n, large, False)
    else:
        guest.map_gpa_range(gpa, size, False)
    guest.set_private(gpa, False, size)
    guest.vm.log.add("guest-flush")


def set_memory_encrypted(guest: Guest, gpa: int, size: int) -> None:
    """Shared to private: set the C-bit, flush, ask for the change, validate."""
    guest.set_private(gpa, True, size)
    guest.vm.log.add("guest-flush")
    accept(guest, gpa, size)


def accept(guest: Guest, gpa: int, size: int, *, large: bool = True) -> None:
    """Ask for private and validate, batch by batch: also what accepting memory at boot is."""
    if not guest.vm.has_rmp:
        guest.map_gpa_range(gpa, size, True)
        return
    for lo, n, big in batches(gpa, size, large):
        _ask(guest, lo, n, big, True)
        pvalidate(guest, lo, n, big, True)


def batches(gpa: int, size: int, large: bool = True) -> Iterator[tuple[int, int, bool]]:
    """The PSC buffers of a range: first gfn, number of entries, whether they are 2M ones."""
    for gfn, count, big in psc.plan(gpa // PAGE, (gpa + size) // PAGE, large):
        for first in range(0, count, BATCH):
            yield gfn + first * (512 if big else 1), min(BATCH, count - first), big


def _ask(guest: Guest, gfn: int, n: int, large: bool, private: bool) -> None:
    try:
        if code := guest.psc_buffer(0, n - 1, psc.entries(gfn, n, private, large)):
            raise PscError(code)
    except PscError as refused:
        raise GuestTerminated(TERM_PSC, refused) from refused


def pvalidate(guest: Guest, gfn: int, n: int, large: bool, validate: bool) -> None:
    """PVALIDATE the entries of one batch; a size mismatch goes on with 512 of 4K."""
    try:
        if not large:
            guest.pvalidate_range(gfn * PAGE, n * PAGE, validate)
            return
        for head in range(gfn, gfn + n * 512, 512):
            try:
                guest.pvalidate(head * PAGE, validate, 512 * PAGE)
            except InstructionError as wrong:
                if wrong.status != FAIL_SIZEMISMATCH:
                    raise
                guest.pvalidate_range(head * PAGE, 512 * PAGE, validate)
    except InstructionError as wrong:
        raise GuestTerminated(TERM_PVALIDATE, wrong) from wrong

"""A Linux guest's conversions under TDX (arch/x86/coco/tdx/tdx.c, tdx-shared.c, mm/pat/set_memory.c).

To shared: flush, shared PTEs, MapGPA last; nothing is un-accepted.  To private: MapGPA and ACCEPT first, then
private PTEs.  A stray access (load_unaligned_zeropad()) so only ever meets a shared mapping of a private page.
"""

from __future__ import annotations

import errno

from ..hw import tdx
from ..hw.tdx import Leaf, Level, State
from . import alike
from .events import MapGpaError, SetMemoryFailed, TdxError
from .memory import PAGE
from .tdx_guest import RETRY, SHARED, mismatch_2m
from .tdx_kvm import TdxKvm
from .vcpu import Vcpu

MAX_RETRIES_PER_PAGE = 3
M2, G1 = Level.PD.pages, Level.PDPT.pages


def map_gpa(guest: Vcpu, gpa: int, size: int, private: bool) -> None:
    """tdx_map_gpa(): goes on from R11 while it moves, and gives up after three answers in a row that it did not."""
    start = gpa | (0 if private else SHARED)
    end, retries = start + size, 0
    while retries < MAX_RETRIES_PER_PAGE:
        answer = guest.map_gpa(start, end - start)
        if answer.status != RETRY:
            break
        if not start <= answer.r11 < end:
            raise MapGpaError(*answer, "R11 is outside of the range: the VMM is not to be trusted")
        retries = retries + 1 if answer.r11 == start else 0
        start = answer.r11
    else:
        raise MapGpaError(*answer, f"no progress in {MAX_RETRIES_PER_PAGE} tries")
    if answer.status:
        raise MapGpaError(*answer, str(answer))


def accept(guest: Vcpu, td: TdxKvm, gpa: int, size: int) -> None:
    """tdx_accept_memory(): each piece tries 1G, 2M and 4K; TdxError of the 4K one."""
    gfn, end = gpa // PAGE, (gpa + size) // PAGE

    def head(to: int) -> None:
        nonlocal gfn
        if gfn < to:
            guest.accept_range(gfn * PAGE, (to - gfn) * PAGE)
            gfn = to

    head(min(end, gfn + -gfn % M2))
    while end - gfn >= M2:
        if gfn % G1 == 0 and end - gfn >= G1:
            td.enter(guest.index)
            rax = tdx.seamcall(Leaf.ACCEPT, State.FREE, level=Level.PDPT).rax  # it knows 4K and 2M
            td.log.add(Leaf.ACCEPT, f"1G: {tdx.name(rax)}", gfn, 1, rax)
        block = min(end - end % M2, gfn + G1 - gfn % G1)
        alike.run(guest.vmm, gfn, block, M2, lambda at, pages: _accept_2m(guest, td, at, pages))
        gfn = block
    head(end)


def _accept_2m(guest: Vcpu, td: TdxKvm, gfn: int, pages: int) -> None:
    """Regions of 2M: the large ACCEPT fails, for KVM maps 4K only, and 512 small ones follow.

    Of regions alike the large one's fault maps a page that the small ones would have faulted in, so it is left out.
    """
    if pages == M2:
        try:
            guest.accept(gfn * PAGE, M2 * PAGE)
        except TdxError as wrong:
            if wrong.leaf != Leaf.ACCEPT:
                raise
    else:
        td.enter(guest.index)
        rax = mismatch_2m()
        td.log.add(Leaf.ACCEPT, tdx.name(rax), gfn, pages // M2, rax)
    guest.accept_range(gfn * PAGE, pages * PAGE)


def set_memory_encrypted(guest: Vcpu, td: TdxKvm, gpa: int, size: int) -> None:
    """Shared to private: MapGPA, ACCEPT, then the PTEs and the flush."""
    try:
        map_gpa(guest, gpa, size, True)
        accept(guest, td, gpa, size)
    except (MapGpaError, TdxError) as why:
        if isinstance(why, TdxError) and why.leaf != Leaf.ACCEPT:
            raise
        raise SetMemoryFailed(errno.EIO, "set_memory_encrypted", why) from why
    guest.set_private(gpa, True, size)
    guest.vm.log.add("guest-flush")


def set_memory_decrypted(guest: Vcpu, td: TdxKvm, gpa: int, size: int) -> None:
    """Private to shared: flush, the PTEs and the flush, then MapGPA."""
    guest.vm.log.add("guest-flush")
    guest.set_private(gpa, False, size)
    guest.vm.log.add("guest-flush")
    try:
        map_gpa(guest, gpa, size, False)
    except MapGpaError as why:
        raise SetMemoryFailed(errno.EIO, "set_memory_decrypted", why) from why

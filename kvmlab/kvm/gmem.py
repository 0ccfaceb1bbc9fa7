"""guest_memfd: the private pages, their allocation, and how they are freed (virt/kvm/guest_memfd.c).

Where nobody discards, every page stays allocated.  A page is "cached" (in
the file), "dying" (out of the page cache, not yet given back) or "free" (the host may use it for anything).  The
model has one PFN a gfn, so a fault that finds the old page dying waits for it instead of taking another.
"""

from __future__ import annotations

from ..hw import snp
from ..hw.memory import EMPTY, Gfn, Pfn
from ..kernel import keyids
from ..kernel.directmap import ABSENT, host_write
from ..kernel.locks import might_sleep
from ..model.state import View
from . import memslots


def kvm_gmem_get_pfn(s: View, me: str, kind: str) -> str | None:
    """Look up the backing page and hold it; may allocate, and so sleep.  A new page is zeroed first."""
    might_sleep(s, me, "kvm_gmem_get_pfn() may allocate")
    if ends := memslots.faultin(s, me, kind):
        return ends
    if kind == "private":
        _hold(s, me, s.acc[me].gfn)
        if s.conf.tdx:
            _make_uptodate(s, s.acc[me].gfn)
    return None


def look_up_in_ioctl(s: View, me: str, gfns: tuple[Gfn, ...]) -> None:
    """kvm_gmem_get_pfn() of each gfn of a request, where pages are not freed."""
    might_sleep(s, me, "kvm_gmem_get_pfn() may allocate")
    for gfn in gfns if s.conf.tdx else ():
        _make_uptodate(s, gfn)


def hold_page(s: View, me: str, gfn: Gfn) -> None:
    """The page of one gfn with a reference, allocated if need be (kvm_gmem_get_folio())."""
    might_sleep(s, me, "kvm_gmem_get_pfn() may allocate")
    _hold(s, me, gfn)


def _hold(s: View, me: str, gfn: Gfn) -> None:
    s.wait(s.gmem[gfn] != "dying")
    s.folio_ref[me, gfn] = True
    if s.gmem[gfn] == "free":
        for g in _folio(s, gfn):
            s.gmem[g] = "cached"
            if not s.conf.tdx:
                _clear_page(s, s.conf.backing["private", g])


def _make_uptodate(s: View, gfn: Gfn) -> None:
    """A page is zeroed once, before its first use (tdx: there what is in the cache matters)."""
    if not s.uptodate[gfn]:
        s.uptodate[gfn] = True
        keyids.clear_highpage(s, s.conf.backing["private", gfn])


def _folio(s: View, gfn: Gfn) -> tuple[Gfn, ...]:
    """The gfns that share one folio with `gfn`: all of a 2M page as long as they have one fate, else it alone."""
    gfns: tuple[Gfn, ...] = s.conf.gfns
    return gfns if s.conf.folio_2m and len({s.gmem[g] for g in gfns}) == 1 else (gfn,)


def _clear_page(s: View, pfn: Pfn) -> None:
    """clear_highpage() goes through the directmap, as any write of the kernel does."""
    answer = host_write(s, pfn) if s.conf.has_rmp else snp.OK
    if answer == ABSENT:
        s.violate("kernel-bug", f"oops: clear_highpage({pfn}), which is not in the directmap")
    elif answer == snp.HOST_PF:
        s.violate("host-rmp-fault", f"#PF RMP: clear_highpage({pfn})")
    s.memory[pfn] = EMPTY
    s.say(f"[{pfn} allocated, zeroed]")


def put_page(s: View, me: str) -> None:
    """The fault, or the ioctl, is done with its pages."""
    for gfn in s.conf.gfns:
        if s.folio_ref[me, gfn]:
            s.folio_ref[me, gfn] = False


def truncate_inode_pages_range(s: View, me: str, gfn: Gfn, request: tuple[Gfn, ...]) -> None:
    """Take the page out of the page cache, a 2M one whole if the punch (`request`) has all of it.

    What follows in the text happens when the last reference is gone.  The kernel frees it in the context of whoever
    drops that; here the punch waits for it, which differs only in who does it.
    """
    might_sleep(s, me, "truncate_inode_pages_range()")
    if s.gmem[gfn] != "cached":
        return
    pages = _folio(s, gfn)
    s.wait(not any(s.folio_ref[who, g] for who, g in s.folio_ref if who != me and g in pages))
    for g in pages if set(pages) <= set(request) else (gfn,):
        s.gmem[g] = "dying"


def folio_put(s: View, me: str, gfn: Gfn) -> None:
    """The last reference goes: from here on the page is anybody's."""
    if s.gmem[gfn] == "dying":
        for g in _folio(s, gfn):
            s.gmem[g] = "free"
            if s.conf.tdx:
                s.uptodate[g] = False

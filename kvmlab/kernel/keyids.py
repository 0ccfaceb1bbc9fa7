"""Memory through KeyIDs: what the kernel and a TD do to a page that caches and TDX's owner bit watch over (tdx).

Each page is one line (hw/tdx/lines.py).  A dirty line may be written back at any time; since that matters only to
who touches the page next, the moment is chosen there: every order of write-backs that could have happened is tried.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

from ..hw.memory import Pfn
from ..hw.tdx import lines as tdx_lines
from ..hw.tdx.lines import HOST, POISON, Line, write_back
from ..model.state import View
from .directmap import ABSENT

HKID = 1  # the TD's private KeyID


def settled(s: View, pfn: Pfn) -> Line:
    """The page's line after whatever write-backs have come before now."""
    line: Line = s.memory[pfn]
    keys = [key for key, _ in line.dirty]
    now: dict[Line, tuple[int, ...]] = {line: ()}
    for n in range(1, len(keys) + 1):
        for order in permutations(keys, n):
            after = line
            for key in order:
                after = write_back(after, key)
            now.setdefault(after, order)
    chosen: Line = s.choose(now)
    for key in now[chosen]:
        s.say(f"[{pfn}: the dirty line of KeyID {key} was written back]")
    return chosen


def load(s: View, pfn: Pfn, keyid: int, who: str) -> tuple[str, Any]:
    """A load through the cache: what the reader gets (tdx_lines.READS) and the content."""
    read = tdx_lines.read(settled(s, pfn), keyid, integrity=s.conf.integrity)
    s.memory[pfn] = read.line
    _consumed(s, pfn, read.got, who)
    return read.got, read.content


def store(s: View, pfn: Pfn, keyid: int, content: Any, who: str) -> str:
    """An ordinary store: it fills its line first, so it consumes poison as a load does."""
    done = tdx_lines.store(settled(s, pfn), keyid, content, integrity=s.conf.integrity)
    s.memory[pfn] = done.line
    _consumed(s, pfn, done.got, who)
    return done.got


def partial_store(s: View, pfn: Pfn, content: Any) -> None:
    """Less than a line at the memory controller (MOVNTI, UC or WC mapping, device): the erratum's case."""
    line = tdx_lines.partial_write(settled(s, pfn), HOST, content, erratum=s.conf.partial_write_erratum)
    s.memory[pfn] = line
    if line.poison:
        s.say(f"[{pfn} is poisoned at once]")


def module_zero(s: View, pfn: Pfn) -> None:
    """The module zeroes the page with the TD's HKID, full lines, for ACCEPT."""
    s.memory[pfn] = tdx_lines.zero(settled(s, pfn), HKID)


def wbinvd(s: View, pfn: Pfn) -> None:
    """TDH.PHYMEM.PAGE.WBINVD: write back and invalidate the TD's lines."""
    s.memory[pfn] = tdx_lines.wbinvd(settled(s, pfn), HKID)


def clflush(s: View, pfn: Pfn) -> bool:
    """CLFLUSH through the directmap: KeyID 0 only; whether it is there."""
    there = mapped(s, pfn, "tdx_clflush_page()")
    if there:
        s.memory[pfn] = tdx_lines.clflush(settled(s, pfn))
    return there


def clear_by_movdir64b(s: View, pfn: Pfn) -> bool:
    """MOVDIR64B of zeros through the directmap heals poison and takes the owner bit away; whether it is there."""
    there = mapped(s, pfn, "tdx_clear_page()")
    if there:
        s.memory[pfn] = tdx_lines.zero(settled(s, pfn), HOST)
    return there


def clear_highpage(s: View, pfn: Pfn) -> None:
    """The kernel zeroes a page that it has just allocated: ordinary stores with KeyID 0."""
    if mapped(s, pfn, "clear_highpage()"):
        store(s, pfn, HOST, tdx_lines.ZERO, "host")


def mapped(s: View, pfn: Pfn, what: str) -> bool:
    """Whether the directmap has the page; the kernel oopses if not."""
    if s.directmap[pfn] == ABSENT:
        s.violate("kernel-bug", f"oops: {what} of {pfn}, which is not in the directmap")
        return False
    return True


def _consumed(s: View, pfn: Pfn, got: str, who: str) -> None:
    if got == POISON:
        end = tdx_lines.consumed(who)
        s.violate("host-machine-check", f"{who} consumes poison in {pfn}: {end}")

"""Physical memory under a TD: bytes by 64-byte lines, each with KeyID, poison and what caches hold of it.

Every rule is a function of hw/tdx/lines.py.  A page whose lines were all written with one KeyID, with nothing dirty
over them and no poison, is plain: one byte (`owner`), and its content unless that is zeros.  So gigabytes can be
accepted and removed.  Others are kept line by line.  Unless `caches`, a store is written back at once, and
no order of flushes matters.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import numpy as np

from ..hw.tdx import lines as tdx_lines
from ..hw.tdx.lines import DATA, HOST, NOISE, POISON, ZERO, ZEROS, Line
from .memory import PAGE, U8, PhysicalMemory, grown, not_aes_keystream

LINE = 64
LINES = PAGE // LINE
PROBE = "content"  # stands for whatever a plain page holds when a rule is asked
CIPHER = 0x5EED00  # the stand-in cipher's key for a KeyID is this plus the KeyID


def keystream(keyid: int, pfn: int) -> bytes:
    """What the stand-in cipher XORs into a page under a KeyID; zeros for KeyID 0."""
    return not_aes_keystream(CIPHER + keyid, pfn).tobytes() if keyid else bytes(PAGE)


class TdMemory(PhysicalMemory):
    """Memory as its readers get it: by KeyID, and who reads (`who`: "TD", "host" or "module").

    `consumed(who, pfn)` is called when somebody gets poison, and has to raise.  `watched` are PFNs (tables of the
    secure EPT) of which `suspect` remembers those that somebody wrote to.
    """

    def __init__(self, hkid: int, *, caches: bool, integrity: bool, erratum: bool) -> None:
        super().__init__()
        self.hkid, self.caches, self.integrity, self.erratum = hkid, caches, integrity, erratum
        self.owner: U8 = np.zeros(0, np.uint8)
        self.plain: dict[int, bytearray] = {}
        self.lines: dict[int, list[Line]] = {}
        self.watched, self.suspect = set[int](), set[int]()
        self.consumed: Callable[[str, int], None] = lambda who, pfn: None

    def grow(self, pfns: int) -> None:
        """Make room for PFNs below `pfns`: zeros of KeyID 0."""
        self.owner = grown(self.owner, pfns)

    def page(self, pfn: int) -> list[Line]:
        """The 64 lines of a page, from now on kept line by line; a list that may be changed."""
        if pfn not in self.lines:
            whole, key = self.plain.pop(pfn, bytearray(PAGE)), int(self.owner[pfn])
            self.lines[pfn] = [Line(_content(whole[i * LINE :][:LINE]), key) for i in range(LINES)]
        return self.lines[pfn]

    def read(self, pfn: int, offset: int = 0, n: int = PAGE, key: int = HOST, who: str = "host") -> bytes:
        """Load through the cache with a KeyID; poison is for `consumed` to answer."""
        if n <= 0:
            return b""
        if pfn not in self.lines:
            got = tdx_lines.read(Line(PROBE, int(self.owner[pfn])), key, integrity=self.integrity).got
            if got == ZEROS or (got == DATA and pfn not in self.plain):
                return bytes(n)
            if got == DATA:
                return bytes(self.plain[pfn][offset : offset + n])
        first = offset // LINE
        found = b"".join(self._load(pfn, i, key, who) for i in range(first, (offset + n - 1) // LINE + 1))
        return found[offset - first * LINE :][:n]

    def _load(self, pfn: int, i: int, key: int, who: str) -> bytes:
        line = self.page(pfn)[i]
        read = tdx_lines.read(line, key, integrity=self.integrity)
        if read.got == POISON:
            self.lines[pfn][i] = read.line
            self.consumed(who, pfn)
        if read.got == NOISE:
            at = slice(i * LINE, (i + 1) * LINE)
            return _xor(_bytes(line.content), _xor(keystream(line.keyid, pfn)[at], keystream(key, pfn)[at]))
        return _bytes(read.content)

    def write(self, pfn: int, offset: int, data: bytes, key: int = HOST, who: str = "host") -> None:
        """Ordinary stores: each line is filled, which may consume poison, then dirty or written back."""
        end = offset + len(data)
        if pfn in self.watched:
            self.suspect.add(pfn)
        if self._stays_plain(pfn, key, len(data) == PAGE):
            self.plain.setdefault(pfn, bytearray(PAGE))[offset:end] = data
            self.owner[pfn] = key
            return
        for i in range(offset // LINE, (end - 1) // LINE + 1 if data else 0):
            whole = bytearray(self._load(pfn, i, key, who))
            lo, hi = max(offset, i * LINE), min(end, (i + 1) * LINE)
            whole[lo - i * LINE : hi - i * LINE] = data[lo - offset : hi - offset]
            self.lines[pfn][i] = self._stored(self.page(pfn)[i], key, _content(whole), pfn, who)

    def _stays_plain(self, pfn: int, key: int, whole: bool) -> bool:
        """Whether a store leaves a plain page plain: with its own KeyID, or over all of it."""
        if pfn in self.lines or self.caches:
            return False
        before = Line(PROBE, int(self.owner[pfn]))
        done = tdx_lines.store(before, key, ZERO, integrity=self.integrity)
        after = tdx_lines.write_back(done.line, key)
        return done.got in (DATA, ZEROS) and (whole or before.keyid == key) and after == Line(ZERO, key)

    def _stored(self, line: Line, key: int, content: Hashable, pfn: int, who: str) -> Line:
        done = tdx_lines.store(line, key, content, integrity=self.integrity)
        if done.got == POISON:
            self.consumed(who, pfn)
        return done.line if self.caches else tdx_lines.write_back(done.line, key)

    def partial_write(self, pfn: int, offset: int, data: bytes) -> None:
        """The host writes less than a line at the memory controller (MOVNTI, UC or WC mapping, a device)."""
        if pfn in self.watched:
            self.suspect.add(pfn)
        i, at = divmod(offset, LINE)
        line = self.page(pfn)[i]
        whole = bytearray(_bytes(tdx_lines.read(line, HOST, integrity=self.integrity).content))
        whole[at : at + len(data)] = data
        self.lines[pfn][i] = tdx_lines.partial_write(line, HOST, _content(whole), erratum=self.erratum)

    def zero(self, pfn: int, n: int) -> None:
        """clear_highpage(): ordinary stores of zeros with KeyID 0."""
        self._each(pfn, n, lambda line, at: self._stored(line, HOST, ZERO, at, "host"))

    def clear(self, pfn: int, n: int) -> None:
        """tdx_clear_page(): MOVDIR64B of zeros with KeyID 0."""
        self._each(pfn, n, lambda line, at: tdx_lines.zero(line, HOST))

    def accept(self, pfn: int, n: int) -> None:
        """The module zeroes pages (for ACCEPT, or a new table) with the TD's HKID."""
        self._each(pfn, n, lambda line, at: tdx_lines.zero(line, self.hkid))

    def flush(self, pfn: int, n: int) -> None:
        """CLFLUSH: write back and drop the lines of KeyID 0."""
        if self.caches:
            self._each(pfn, n, lambda line, at: tdx_lines.clflush(line))

    def wbinvd(self, pfn: int, n: int) -> None:
        """TDH.PHYMEM.PAGE.WBINVD: the same for the TD's lines."""
        if self.caches:
            self._each(pfn, n, lambda line, at: tdx_lines.wbinvd(line, self.hkid))

    def evict(self, pfn: int, key: int) -> int:
        """Write back the dirty lines of one KeyID, as caches may at any time; how many there were."""
        dirty = sum(line.cached(key) for line in self.lines.get(pfn, ()))
        if dirty:
            self._each(pfn, 1, lambda line, at: tdx_lines.write_back(line, key))
        return dirty

    def dram(self, pfn: int) -> bytes:
        """What a probe on the memory bus sees: ciphertext wherever a TD wrote last."""
        keys = {line.keyid: keystream(line.keyid, pfn) for line in self.page(pfn)}
        return b"".join(
            _xor(_bytes(line.content), keys[line.keyid][i * LINE : (i + 1) * LINE])
            for i, line in enumerate(self.page(pfn))
        )

    def _each(self, pfn: int, n: int, change: Callable[[Line, int], Line]) -> None:
        """Change every line of `n` pages: once for each distinct one of the pages that are kept as a byte."""
        part, old = self.owner[pfn : pfn + n], self.owner[pfn : pfn + n].copy()
        lined = _within(self.lines, pfn, n)
        for key in np.flatnonzero(np.bincount(old)).tolist():
            after = change(Line(ZERO, key), pfn)
            if after == Line(ZERO, after.keyid):
                part[old == key] = after.keyid
            else:
                for at in (np.flatnonzero(old == key) + pfn).tolist():
                    if at not in self.plain:
                        self.lines.setdefault(at, [after] * LINES)
        for page in _within(self.plain, pfn, n):
            self._plain_changes(page, int(old[page - pfn]), change)
        for page in lined:
            lines = self.lines[page] = [change(line, page) for line in self.lines[page]]
            if lines[0] == Line(ZERO, lines[0].keyid) and lines.count(lines[0]) == LINES:
                del self.lines[page]
                self.owner[page] = lines[0].keyid

    def _plain_changes(self, page: int, key: int, change: Callable[[Line, int], Line]) -> None:
        """The same for a page with a content of its own: it is lost, kept, or goes line by line from now on."""
        after = change(Line(PROBE, key), page)
        self.owner[page] = after.keyid
        if after == Line(ZERO, after.keyid):
            del self.plain[page]
        elif after != Line(PROBE, key):
            self.owner[page] = key
            self.lines[page] = [change(line, page) for line in self.page(page)]


def _within(pages: Mapping[int, object], pfn: int, n: int) -> list[int]:
    """Those of the pages that lie in [pfn, pfn + n)."""
    where: Mapping[int, object] | range = pages if n > len(pages) else range(pfn, pfn + n)
    return [page for page in where if pfn <= page < pfn + n and page in pages]


def _bytes(content: Hashable) -> bytes:
    return content if isinstance(content, bytes) else bytes(LINE)


def _content(line: bytearray) -> Hashable:
    return bytes(line) if any(line) else ZERO


def _xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))

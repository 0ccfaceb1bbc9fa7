"""Dirty cache lines, for parts that do not keep the two encryption domains coherent.

The C-bit is part of a line's tag (openvmm issue 3806): one physical line can be cached twice, in clear and through
the guest's key, and each copy is written back when the cache likes.  Only lines that somebody wrote are kept,
and only until `evict` or `flush`: what a clean copy still shows is not modelled.
"""

from __future__ import annotations

from .memory import PAGE, PhysicalMemory

LINE = 64


class CachedMemory(PhysicalMemory):
    """DRAM behind a write-back cache; `dirty` holds the offsets of the lines of each (PFN, key), with their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.dirty: dict[tuple[int, int], dict[int, bytes]] = {}

    def read(self, pfn: int, offset: int = 0, n: int = PAGE, key: int = 0) -> bytes:
        """As `PhysicalMemory.read`, with the dirty lines of that key before what is in DRAM."""
        seen = bytearray(super().read(pfn, 0, PAGE, key))
        for at, line in self.dirty.get((pfn, key), {}).items():
            seen[at : at + LINE] = line
        return bytes(seen[offset : offset + n])

    def write(self, pfn: int, offset: int, data: bytes, key: int = 0) -> None:
        """Write to the cache: each line that is touched is dirty from now on."""
        whole = bytearray(self.read(pfn, 0, PAGE, key))
        whole[offset : offset + len(data)] = data
        lines = self.dirty.setdefault((pfn, key), {})
        for at in range(offset - offset % LINE, offset + len(data), LINE):
            lines[at] = bytes(whole[at : at + LINE])

    def evict(self, pfn: int, key: int) -> int:
        """Write back the dirty lines of a page that carry this key's tag; how many there were."""
        lines = self.dirty.pop((pfn, key), {})
        for at, line in lines.items():
            super().write(pfn, at, line, key)
        return len(lines)

    def flush(self, pfn: int, n: int) -> None:
        """CLFLUSH of `n` pages: write back what is dirty, with either tag; the lines in clear go last."""
        for page, key in sorted((tag for tag in self.dirty if pfn <= tag[0] < pfn + n), reverse=True):
            self.evict(page, key)

    def zero(self, pfn: int, n: int) -> None:
        """clear_page() in clear: lines of that tag go with it, those of another stay dirty."""
        for tag in [tag for tag in self.dirty if pfn <= tag[0] < pfn + n and tag[1] == 0]:
            del self.dirty[tag]
        super().zero(pfn, n)

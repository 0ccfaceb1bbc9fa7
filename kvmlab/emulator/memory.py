"""Physical memory as bytes, and the stand-in for memory encryption.

The cipher is XOR with splitmix64 of (key, PFN, 8-byte block).  It is NOT AES and hides nothing from anybody; it
is there so that a wrong key, or the same key at another address, gives bytes that one sees are not the data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..hw.memory import PAGE as PAGE

LIMIT = 1 << 30  # gfns (4 TiB): as much of a guest's addresses as the emulator holds
HOST_PAGES = 1 << 27  # PFNs (512 GiB) that the emulated host has
U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
U32 = NDArray[np.uint32]
T = TypeVar("T", bound=np.generic)

CHUNK = 1 << 20
_ZEROS = np.zeros(PAGE, np.uint8)
_BLOCKS = np.arange(PAGE // 8, dtype=np.uint64)


def not_aes_keystream(key: int, pfn: int) -> U8:
    """The 4096 bytes that the stand-in cipher XORs into page `pfn` under `key`."""
    seed = (key * 0x9E3779B97F4A7C15 + pfn * 512) & (1 << 64) - 1
    x = (np.uint64(seed) + _BLOCKS) * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x9E3779B97F4A7C15)
    return (x ^ (x >> np.uint64(31))).view(np.uint8)


class PhysicalMemory:
    """Bytes as they are in DRAM, page by page; a page that nobody wrote is zeros and takes no room."""

    def __init__(self) -> None:
        self.pages: dict[int, U8] = {}

    def read(self, pfn: int, offset: int = 0, n: int = PAGE, key: int = 0) -> bytes:
        """`n` bytes of one page as one sees them with `key` (0: raw)."""
        raw = self.pages.get(pfn, _ZEROS)[offset : offset + n]
        return (raw ^ not_aes_keystream(key, pfn)[offset : offset + n] if key else raw).tobytes()

    def write(self, pfn: int, offset: int, data: bytes, key: int = 0) -> None:
        """Write within one page, encrypting with `key` (0: in clear)."""
        page = self.pages.get(pfn)
        if page is None:
            page = self.pages[pfn] = np.zeros(PAGE, np.uint8)
        new = np.frombuffer(data, np.uint8)
        end = offset + len(data)
        page[offset:end] = new ^ not_aes_keystream(key, pfn)[offset:end] if key else new

    def flush(self, pfn: int, n: int) -> None:
        """CLFLUSH of `n` pages: nothing here, where every write goes to DRAM at once."""

    def zero(self, pfn: int, n: int) -> None:
        """Clear `n` pages, as the host kernel does with clear_page()."""
        if n > len(self.pages):
            for page in [p for p in self.pages if pfn <= p < pfn + n]:
                del self.pages[page]
        else:
            for page in range(pfn, pfn + n):
                self.pages.pop(page, None)


def grown(array: NDArray[T], size: int) -> NDArray[T]:
    """The array with room for `size` pages; new ones are zero and cost nothing until they are touched."""
    if size <= len(array):
        return array
    bigger = np.zeros(max(size, 2 * len(array)), array.dtype)
    for at in range(0, len(array), CHUNK):
        if (part := array[at : at + CHUNK]).any():  # what is zero would cost its room by being copied
            bigger[at : at + len(part)] = part
    return bigger


def prefix(flags: NDArray[np.bool_]) -> int:
    """How many of the first flags are set."""
    n = int(flags.argmin()) if len(flags) else 0
    return len(flags) if n == 0 and len(flags) and bool(flags[0]) else n


def runs(flags: U8 | NDArray[np.bool_], start: int, end: int) -> list[tuple[int, int]]:
    """The maximal ranges of set flags within [start, end)."""
    if bool((flags[start:end] != 0).all()):
        return [(start, end)] if start < end else []
    on = np.concatenate(([0], (flags[start:end] != 0).astype(np.int8), [0]))
    edges = np.flatnonzero(np.diff(on)) + start
    return [(int(lo), int(hi)) for lo, hi in zip(edges[::2], edges[1::2], strict=True)]


def without(start: int, end: int, holes: Collection[int]) -> list[tuple[int, int]]:
    """The ranges that are left of [start, end) when some pages are not to be touched."""
    out = sorted(page for page in holes if start <= page < end)
    pieces = zip([start, *(page + 1 for page in out)], [*out, end], strict=True)
    return [(lo, hi) for lo, hi in pieces if lo < hi]


def pagewise(start: int, n: int) -> Iterator[tuple[int, int]]:
    """The pieces of [start, start + n) that lie in one page each: where it starts, how long it is."""
    end = start + n
    while start < end:
        step = min(end - start, PAGE - start % PAGE)
        yield start, step
        start += step

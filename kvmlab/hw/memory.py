"""Addresses by what they count, so that mypy keeps them apart; and page contents as one needs them to judge reads.

Contents are who wrote the page, in which era, under which key.

No bytes: two writes by the same writer with the same key in the same era are one value.  That is exact for
every property here, since they ask only whose data a reader gets and whether it is in clear.
"""

from __future__ import annotations

from typing import NamedTuple, NewType

PAGE = 4096
Gpa = NewType("Gpa", int)  # guest physical address, in bytes
Gfn = NewType("Gfn", int)  # number of a 4K page of guest physical memory
Hpa = NewType("Hpa", int)  # host physical address, in bytes
Pfn = NewType("Pfn", str)  # a 4K page of host memory, which the explorer's machines call by a name, as "P0"


def gpa_to_gfn(gpa: Gpa) -> Gfn:
    """Return the number of the page that an address is in."""
    return Gfn(gpa // PAGE)


PLAIN, GUEST_KEY = "plain", "guest key"


class Content(NamedTuple):
    """What a page holds: the writer ("nobody" for a page as allocated), the key, the guest's era of the write."""

    writer: str = "nobody"
    key: str = PLAIN
    era: int = 0

    def __str__(self) -> str:
        if self.writer == "nobody":
            return "-"
        return f"{self.writer}{'' if self.key == PLAIN else '*'}{self.era if self.writer == 'guest' else ''}"


EMPTY = Content()


def seen_by_guest(content: Content, enc: bool, encrypts: bool) -> str:
    """What a guest read with C-bit `enc` returns: "data" as written, or "noise" when the keys differ.

    `encrypts` is false on a platform without memory encryption, where everything is in clear.
    """
    if not encrypts or content.writer == "nobody":
        return "data"
    return "data" if (content.key == GUEST_KEY) == enc else "noise"


def readable_by_host(content: Content) -> bool:
    """Whether a host read returns the writer's data in clear (the host has no guest key)."""
    return content.key == PLAIN

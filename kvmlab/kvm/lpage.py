"""Large pages: their mixed flags (lpage_info), and the hull that is widened to them (arch/x86/kvm/mmu/mmu.c).

A 2M page has two children in a scenario, and a 1G page three 2M pages; the emulator has 512 of each.
"""

from __future__ import annotations

from typing import NamedTuple

from ..hw.memory import Gfn
from ..kernel.locks import assert_held
from ..model.state import View
from .attributes import kvm_mmu_invalidate_range_add, left_reserved

LEVELS = {"hugepage": ("2M", "1G"), "PG_LEVEL_2M": ("2M",)}  # what a design may say of range_add


class LargePage(NamedTuple):
    """A 2M or 1G page of guest addresses; `key` names its cells."""

    level: str
    gfns: tuple[Gfn, ...]

    @property
    def key(self) -> tuple[str, int]:
        """Level and first gfn."""
        return self.level, self.gfns[0]


def large_pages(gfns: tuple[Gfn, ...], children: int = 2) -> tuple[LargePage, ...]:
    """The large pages that consecutive gfns make up, 2M before 1G; so many gfns are the children of a 2M page."""
    small = tuple(LargePage("2M", gfns[n : n + children]) for n in range(0, len(gfns), children))
    return small if len(small) == 1 else (*small, LargePage("1G", gfns))


def _touched(s: View, gfns: tuple[Gfn, ...]) -> list[tuple[LargePage, bool]]:
    """The large pages that a request touches, each with whether it covers the page whole."""
    return [(page, set(page.gfns) <= set(gfns)) for page in s.conf.large if set(page.gfns) & set(gfns)]


def widen_hull(s: View, me: str, gfns: tuple[Gfn, ...], word: str) -> None:
    """kvm_arch_pre_set_memory_attributes(): add head and tail, the large pages covered in part and not yet mixed.

    So nobody maps one of them large while its attributes change (9129633d568e, May 2025).
    """
    for page, covered in _touched(s, gfns):
        if page.level in LEVELS[word] and not covered and not s.mixed[page.key]:
            kvm_mmu_invalidate_range_add(s, me, page.gfns[0], page.gfns[-1] + 1)


def hugepage_has_attrs(s: View, page: LargePage, to: str, counts_reserved: bool) -> bool:
    """2M asks its gfns; 1G the flags of its children and the first gfn of each.

    `counts_reserved`: an entry that is reserved and empty is taken for one with attributes (277d3623d99a).
    """
    if page.level == "2M":
        misread = counts_reserved and to == "shared" and left_reserved(s)
        return not misread and all(s.attr[gfn] == to for gfn in page.gfns)
    children = [p for p in s.conf.large if p.level == "2M"]
    return not any(s.mixed[p.key] for p in children) and all(s.attr[p.gfns[0]] == to for p in children)


def kvm_update_lpage_mixed_flag(s: View, me: str, gfns: tuple[Gfn, ...], to: str, word: str | None) -> None:
    """kvm_arch_post_set_memory_attributes(): a page with mixed attributes must not be mapped large.

    2M before 1G, which reads what has just become of its children; a page that is covered whole is not mixed.
    """
    assert_held(s, me, "kvm_update_lpage_mixed_flag()")
    for page, covered in _touched(s, gfns):
        s.mixed[page.key] = not covered and not hugepage_has_attrs(s, page, to, word == "reserved")

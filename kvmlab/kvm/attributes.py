"""Memory attributes (the xarray) and the invalidation counters: virt/kvm/kvm_main.c.

`mmu_invalidate_seq` is unbounded but only ever compared with a fault's snapshot, so each vCPU keeps what the
comparison would say: "same" until an invalidation ends, then "moved"; "none" when it holds no snapshot.
"""

from __future__ import annotations

from ..hw.memory import Gfn
from ..kernel.failures import XARRAY, fails
from ..kernel.locks import assert_held, might_sleep
from ..model.state import View

NO_RANGE = None


def kvm_mmu_invalidate_begin(s: View, me: str, covered: tuple[int, int] | None) -> None:
    """Open the window; the first one resets the range.  v8-era: the whole request at once (`covered`).

    The count saturates at `conf.many`, one more than all programs together can have open, and then never goes down.
    """
    assert_held(s, me, "kvm_mmu_invalidate_begin()")
    s.note("invalidate-begin")
    if s.in_progress == 0:
        s.invalidate_range = covered
    elif covered is not None:
        s.invalidate_range = hull(s.invalidate_range, covered)
    if s.in_progress < s.conf.many:
        s.in_progress += 1


def kvm_mmu_invalidate_range_add(s: View, me: str, lo: int, hi: int) -> None:
    """Widen the one shared range to the hull with gfns [lo, hi)."""
    assert_held(s, me, "kvm_mmu_invalidate_range_add()")
    s.note("invalidate-range-add")
    s.invalidate_range = hull(s.invalidate_range, (lo, hi))


def hull(old: tuple[int, int] | None, new: tuple[int, int]) -> tuple[int, int]:
    """The one range that all invalidations in progress share; gfns between them look invalidated, too."""
    return new if old is NO_RANGE else (min(old[0], new[0]), max(old[1], new[1]))


def kvm_mmu_invalidate_end(s: View, me: str) -> None:
    """Move the sequence count, then close the window: every older snapshot is stale from now on."""
    assert_held(s, me, "kvm_mmu_invalidate_end()")
    s.note("invalidate-end")
    if s.in_progress == 0:
        s.violate("kernel-bug", "BUG_ON(mmu_invalidate_in_progress < 0)")
        return
    for cpu in s.snapshot:
        if s.snapshot[cpu] == "same":
            s.snapshot[cpu] = "moved"
    if s.in_progress < s.conf.many:
        s.in_progress -= 1
    if s.in_progress == 0:
        s.invalidate_range = NO_RANGE


def mmu_invalidate_retry_gfn(s: View, me: str, gfn: Gfn) -> bool:
    """Whether the fault must be retried: the gfn is being invalidated, or the sequence count moved."""
    return must_retry(s.invalidate_range if s.in_progress else NO_RANGE, gfn, s.snapshot[me] == "moved")


def must_retry(window: tuple[int, int] | None, gfn: Gfn, moved: bool) -> bool:
    """Inside the open window, or after the end of any, whatever its gfns were."""
    return moved or (window is not None and window[0] <= gfn < window[1])


def kvm_vm_set_region_attr(s: View, me: str, gfn: Gfn, to: str, reserved: bool) -> str | None:
    """xa_store() of one gfn's attribute; an entry that was only reserved is one no more.

    Where a scenario lets one allocation fail, this may be it, unless the entry was `reserved` before (v8-era).
    """
    if not reserved and fails(s, XARRAY):
        s.count("enomem")
        s.say(f"xa_store({gfn}) = -ENOMEM (injected)")
        return "failed"
    s.attr[gfn] = to
    if s.reserved[gfn]:
        s.reserved[gfn] = False
    return None


def kvm_range_has_memory_attributes(
    s: View, me: str, gfns: tuple[Gfn, ...], to: str, word: str | None
) -> str | None:
    """The ioctl returns at once if every gfn has the attribute already.

    Word "reserved": an entry that is reserved and empty is taken for one with attributes (277d3623d99a).
    """
    if all(s.attr[gfn] == to for gfn in gfns) and not (
        word == "reserved" and to == "shared" and left_reserved(s)
    ):
        s.say("[uniform already]")
        return "done"
    return None


def left_reserved(s: View) -> bool:
    """Whether a failed reservation has left entries behind."""
    return any(s.reserved[gfn] for gfn in s.conf.gfns)


def xa_reserve(s: View, me: str, gfn: Gfn, refused: bool) -> str | None:
    """Reserve the entry of one gfn (GFP_KERNEL_ACCOUNT, may sleep); on failure what was reserved stays.

    `refused`: for this one there is no memory, for certain.
    """
    might_sleep(s, me, "xa_reserve() may allocate")
    if fails(s, XARRAY):
        s.count("enomem")
        s.say(f"xa_reserve({gfn}) = -ENOMEM (injected)")
        return "failed"
    if refused:
        s.say(f"xa_reserve({gfn}) = -ENOMEM")
        return "failed"
    s.reserved[gfn] = s.attr[gfn] == "shared"  # a private gfn has an entry that is more than reserved
    return None

"""Memslots: where they lie, the walk over those that a request overlaps, and how one comes and goes (kvm_main.c).

A request is served memslot by memslot (kvm_handle_gfn_range()): each address space, each slot that overlaps, the
range clipped to it.  A fault looks its slot up once, before all else.  Whoever deletes a slot marks it invalid,
waits for every reader of kvm->srcu that may still see it valid, zaps, and drops it; a vCPU thread is such a reader
while it is in KVM, and entering the guest lets go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..hw.memory import Gfn
from ..model.state import View

SMM = 1  # the second address space (x86: system management mode)


class MemSlot(NamedTuple):
    """One memslot: gfns [base, base + npages) of address space `as_id`, with or without a guest_memfd."""

    base: int
    npages: int = 1
    as_id: int = 0
    gmem: bool = True


class Piece(NamedTuple):
    """What a walk does at once: the gfns of a request that lie in one memslot."""

    as_id: int
    gfns: tuple[Gfn, ...]


def clip(base: int, end: int, lo: int, hi: int) -> tuple[int, int] | None:
    """The part of gfns [lo, hi) that lies in a memslot over [base, end); None if they do not overlap."""
    lo, hi = max(base, lo), min(end, hi)
    return (lo, hi) if lo < hi else None


def pieces(slots: Iterable[MemSlot], gfns: Sequence[Gfn]) -> list[Piece]:
    """The pieces of a request for consecutive gfns, address space by address space, in the order of gfns."""
    found = []
    for slot in sorted(slots, key=lambda slot: (slot.as_id, slot.base)):
        if gfns and (part := clip(slot.base, slot.base + slot.npages, gfns[0], gfns[-1] + 1)):
            found.append(Piece(slot.as_id, tuple(map(Gfn, range(*part)))))
    return found


def visits(walk: str | None, as_id: int, first: int, start: int) -> bool:
    """Whether a hook visits the piece of address space `as_id` that begins at gfn `first`, of a request from `start`.

    It does, unless it takes one memslot for all: `gfn_to_memslot`, the one in which the request begins, or
    `kvm_memslots`, those of address space 0.
    """
    if walk == "gfn_to_memslot":
        return as_id == 0 and first == start
    return walk != "kvm_memslots" or as_id == 0


def in_smm(s: View, me: str) -> bool:
    """Whether the vCPU runs in address space 1."""
    return bool(s.smm[me])


def kvm_vcpu_gfn_to_memslot(s: View, me: str) -> None:
    """fault->slot: what the fault will believe of its memslot until it is over."""
    s.fault_slot[me] = _published(s)


def _its_slot(s: View, me: str) -> str:
    """The slot as the fault found it, or as it is if the design never looked."""
    return str(s.fault_slot[me] or _published(s))


def _published(s: View) -> str:
    return "none" if s.slot == "bound" else str(s.slot)


def memslot_invalid(s: View, me: str, kind: str, word: str | None) -> str | None:
    """The fault has found no slot, or one that is being deleted: retry.

    A private fault on tdx retries without entering the TD; since v6.18 (2bc2694fe20b) not for this reason (the word
    "leave").
    """
    found = _its_slot(s, me)
    if found == "none":
        return kvm_handle_noslot_fault(s, me, kind)
    if found == "valid":
        return None
    _over(s, me)
    s.count("npf")
    s.say("KVM_MEMSLOT_INVALID: RET_PF_RETRY")
    s.note(word or "retry", "KVM_MEMSLOT_INVALID")
    return word or "retry"


def faultin(s: View, me: str, kind: str) -> str | None:
    """What kvm_mmu_faultin_pfn() asks of the slot before it gets the page."""
    if _its_slot(s, me) == "none":
        return kvm_handle_noslot_fault(s, me, kind)
    if kind == "private" and in_smm(s, me):  # the slots of address space 1 have no guest_memfd
        return _exits(s, me, "no guest_memfd in this address space", "userspace")
    if s.fault_slot[me]:
        s.fault_slot[me] = None
    return None


def kvm_handle_noslot_fault(s: View, me: str, kind: str) -> str:
    """Without a memslot a private fault exits, and is run again; a shared one is MMIO, which userspace completes."""
    if kind == "private":
        return _exits(s, me, "no memslot", "exit")
    _over(s, me)
    s.count("mmio")
    s.note("exit-mmio")
    s.say("no memslot: KVM_EXIT_MMIO")
    return "userspace"


def _exits(s: View, me: str, why: str, to: str) -> str:
    _over(s, me)
    s.count("exits")
    s.note("exit-memory-fault")
    s.say(f"{why}: KVM_EXIT_MEMORY_FAULT (private)")
    return to


def _over(s: View, me: str) -> None:
    """The fault is over: nothing that it noted is needed any more."""
    s.snapshot[me] = "none"
    s.fault_slot[me] = None


def overlaps(s: View, me: str, gmem: bool) -> str | None:
    """kvm_for_each_memslot_in_gfn_range(): without a memslot the whole walk is skipped, mmu_lock included.

    The ioctl of a guest_memfd (`gmem`) goes by what is bound to it, published or not.
    """
    if s.slot == "valid" or (gmem and s.slot == "bound"):
        return None
    s.say("[no memslot overlaps]")
    return "skip"


def srcu_read_lock(s: View, me: str) -> None:
    """The vCPU thread is in KVM."""
    s.srcu[me] = True


def srcu_read_unlock(s: View, me: str) -> None:
    """The vCPU thread is about to enter the guest."""
    if s.srcu[me]:
        s.srcu[me] = False
        s.grace[me] = False


def set_memory_region(s: View, me: str, what: str) -> None:
    """A VMM thread calls KVM_SET_USER_MEMORY_REGION2, whenever it likes."""
    s.say(what)


def delete_memslot(s: View, me: str) -> None:
    """Mark the slot invalid; from here on readers find it so."""
    s.slot = "invalid"
    for cpu in s.conf.vcpus:
        s.grace[cpu] = s.srcu[cpu]
    s.say("[KVM_MEMSLOT_INVALID]")


def synchronize_srcu(s: View, me: str) -> None:
    """Wait for the readers that were there when it began."""
    s.wait(not any(s.grace[cpu] for cpu in s.conf.vcpus))


def slot_is_gone(s: View, me: str) -> None:
    """The slot leaves the set of memslots."""
    s.slot = "none"


def kvm_gmem_bind(s: View, me: str) -> None:
    """The slot's part of the guest_memfd is bound, under invalidate_lock; nobody can find the slot yet."""
    s.slot = "bound"


def create_memslot(s: View, me: str) -> None:
    """The slot is published: from here on faults find it.  Attributes that were set before it hold for it."""
    s.slot = "valid"

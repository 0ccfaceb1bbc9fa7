"""A memslot that is being deleted, and the SRCU read side that its deleter waits for (virt/kvm/kvm_main.c).

kvm_set_memslot() marks the slot invalid, waits for every reader of kvm->srcu that may still see it valid, zaps, and
drops it.  A vCPU thread is such a reader while it is in KVM; entering the guest lets go.
"""

from __future__ import annotations

from ..state import View


def memslot_invalid(s: View, me: str, kind: str, leaves: bool) -> str | None:
    """The fault meets a slot that is being deleted (retry) or is gone (exit).

    A private fault on tdx retries without entering the TD; since May 2025 not for this reason (`leaves`).
    """
    if s.slot == "valid":
        return None
    if s.snapshot[me] != "none":
        s.snapshot[me] = "none"
    if s.slot == "gone":
        s.count("exits")
        s.say(f"no memslot: KVM_EXIT_MEMORY_FAULT ({kind})")
        return "exit"
    s.count("npf")
    s.say("KVM_MEMSLOT_INVALID: RET_PF_RETRY")
    return "leave" if leaves else "retry"


def srcu_read_lock(s: View, me: str) -> None:
    """The vCPU thread is in KVM."""
    s.srcu[me] = True


def srcu_read_unlock(s: View, me: str) -> None:
    """The vCPU thread is about to enter the guest."""
    if s.srcu[me]:
        s.srcu[me] = False
        s.grace[me] = False


def delete_memslot(s: View, me: str) -> None:
    """Mark the slot invalid; from here on readers find it so."""
    s.slot = "invalid"
    for cpu in s.conf.vcpus:
        s.grace[cpu] = s.srcu[cpu]
    s.say("deletes the memslot: KVM_MEMSLOT_INVALID")


def synchronize_srcu(s: View, me: str) -> None:
    """Wait for the readers that were there when it began."""
    s.wait(not any(s.grace[cpu] for cpu in s.conf.vcpus))


def slot_is_gone(s: View, me: str) -> None:
    """The slot leaves the set of memslots."""
    s.slot = "gone"

"""Locks and context: who holds what, who may sleep.

`mmu_lock` is a queued rwlock (kernel/locking/qrwlock.c): a waiting writer stops new readers; holding it
disables preemption.  `slots_lock` and the folio lock sleep, and so does guest_memfd's `invalidate_lock`
(a rwsem).  `s.conf` says which actors' programs take a lock; only for those bits are reserved.
"""

from __future__ import annotations

from ..model.state import View

SPINNING = frozenset({"mmu_lock"})
MUTEXES = ("slots_lock", "folio_lock")
RWLOCKS = ("mmu_lock", "invalidate_lock")


def holds_write(s: View, me: str, lock: str) -> bool:
    """Whether `me` holds the rwlock for write."""
    return me in s.conf.writers.get(lock, ()) and getattr(s, f"{lock}_writer") == me


def holds_read(s: View, me: str, lock: str) -> bool:
    """Whether `me` holds the rwlock for read."""
    return me in s.conf.readers.get(lock, ()) and bool(getattr(s, f"{lock}_reader")[me])


def holds(s: View, me: str, lock: str) -> bool:
    """Whether `me` holds `lock` in any way."""
    if lock in MUTEXES:
        return me in s.conf.owners.get(lock, ()) and getattr(s, lock) == me
    return holds_write(s, me, lock) or holds_read(s, me, lock)


def held(s: View, me: str) -> list[str]:
    """The locks that `me` holds."""
    return [lock for lock in (*MUTEXES, *RWLOCKS) if holds(s, me, lock)]


def might_sleep(s: View, me: str, what: str) -> None:
    """Sleeping with preemption off, whether or not this run would have slept (might_sleep()).

    Without CONFIG_PREEMPT_COUNT the kernel cannot tell and reports nothing; `conf.preempt_count` says which.
    """
    if s.conf.preempt_count and any(holds(s, me, lock) for lock in sorted(SPINNING)):
        s.violate("sleep-in-atomic", f"BUG: scheduling while atomic: {what} under mmu_lock")


def assert_held(s: View, me: str, what: str, *, write: bool = True) -> None:
    """lockdep_assert_held(&kvm->mmu_lock), for write unless a reader is enough."""
    if not (holds_write(s, me, "mmu_lock") or (not write and holds_read(s, me, "mmu_lock"))):
        s.violate("lock-misuse", f"{what} without mmu_lock{' for write' if write else ''}")


def _may_take(s: View, me: str, lock: str) -> str | None:
    """Check the order against every other place that nests these locks (lockdep); a second take hangs."""
    mine = held(s, me)
    if lock in mine:
        s.violate("lock-misuse", f"takes {lock} twice")
        return "stuck"
    for other in mine:
        if (other, lock) in s.conf.inverted:
            s.violate("lock-misuse", f"takes {lock} inside {other}; elsewhere it is the other way round")
    return None


def mutex_lock(s: View, me: str, lock: str) -> str | None:
    """mutex_lock(): waits for the owner; may sleep."""
    might_sleep(s, me, f"mutex_lock({lock})")
    if stuck := _may_take(s, me, lock):
        return stuck
    s.wait(getattr(s, lock) is None)
    setattr(s, lock, me)
    return None


def mutex_unlock(s: View, me: str, lock: str) -> None:
    """mutex_unlock(): only the owner may."""
    if getattr(s, lock) == me:
        setattr(s, lock, None)
    else:
        s.violate("lock-misuse", f"unlocks {lock}, which it does not hold")


def write_lock(s: View, me: str, lock: str) -> str | None:
    """write_lock() or down_write(): takes the lock if it is free, else queues (FIFO), which stops new readers."""
    if lock not in SPINNING:
        might_sleep(s, me, f"down_write({lock})")
    queue, readers = getattr(s, f"{lock}_queue"), getattr(s, f"{lock}_reader", ())
    if me not in queue and (stuck := _may_take(s, me, lock)):
        return stuck
    first = queue[0] == me if queue else True
    if first and getattr(s, f"{lock}_writer") is None and not any(readers[r] for r in readers):
        setattr(s, f"{lock}_writer", me)
        if queue:
            setattr(s, f"{lock}_queue", queue[1:])
        return None
    s.wait(me not in queue)
    setattr(s, f"{lock}_queue", (*queue, me))
    s.say("[waits]")
    return "again"


def write_unlock(s: View, me: str, lock: str) -> None:
    """write_unlock() or up_write()."""
    if holds_write(s, me, lock):
        setattr(s, f"{lock}_writer", None)
    else:
        s.violate("lock-misuse", f"write-unlocks {lock}, which it does not hold for write")


def read_lock(s: View, me: str, lock: str) -> str | None:
    """read_lock() or down_read(): behind the writer and behind any writer that waits."""
    if lock not in SPINNING:
        might_sleep(s, me, f"down_read({lock})")
    if stuck := _may_take(s, me, lock):
        return stuck
    s.wait(getattr(s, f"{lock}_writer", None) is None and not getattr(s, f"{lock}_queue", ()))
    getattr(s, f"{lock}_reader")[me] = True
    return None


def read_unlock(s: View, me: str, lock: str) -> None:
    """read_unlock() or up_read()."""
    if holds_read(s, me, lock):
        getattr(s, f"{lock}_reader")[me] = False
    else:
        s.violate("lock-misuse", f"read-unlocks {lock}, which it does not hold for read")


def leave(s: View, me: str, where: str) -> None:
    """Going back to user space or into the guest: nothing may be held (lockdep_sys_exit())."""
    for lock in held(s, me):
        s.violate("lock-misuse", f"{where} with {lock} held")


def stuck(s: View, me: str) -> None:
    """A thread that waits for itself."""
    s.wait(False)


UNDO = {
    mutex_lock: mutex_unlock,
    write_lock: write_unlock,
    read_lock: read_unlock,
}  # what drops what was taken so

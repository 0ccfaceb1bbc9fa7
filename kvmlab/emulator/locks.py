"""Who holds what, on one run: enough for "scheduling while atomic" and for a thread that waits for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..design import Row
from .events import VmError

if TYPE_CHECKING:
    from .vm import Vm


class Deadlock(VmError):
    """A thread waits for a lock whose holder will not let go in this run."""


class Thread:
    """One thread of control inside the kernel, with the locks that it holds."""

    def __init__(self, vm: Vm, name: str) -> None:
        self.vm, self.name, self.held = vm, name, list[str]()

    def row(self, row: Row) -> None:
        """Take or drop what a lock row of a design names."""
        if "unlock" in row.call:
            self.drop(row.lock or "")
        else:
            self.take(row.lock or "", shared=row.call == "read_lock" or row.call.endswith("_shared"))

    def take(self, lock: str, *, shared: bool = False) -> None:
        """Take a lock; Deadlock if somebody else holds it and is waiting for this thread to finish."""
        if lock != "mmu_lock":
            self.might_sleep(f"taking {lock}")
        for other in self.vm.lock_threads:
            if lock in other.held and not (shared and f"{lock} shared" in other.held):
                if other is self:
                    self.vm.log.violate("lock-misuse", f"{self.name} takes {lock} twice")
                raise Deadlock(f"{self.name} waits for {lock}, held by {other.name}")
        self.held += [lock, f"{lock} shared"] if shared else [lock]
        if self not in self.vm.lock_threads:
            self.vm.lock_threads.append(self)

    def drop(self, lock: str) -> None:
        """Release a lock."""
        if lock not in self.held:
            self.vm.log.violate("lock-misuse", f"{self.name} unlocks {lock}, which it does not hold")
        self.held = [name for name in self.held if name not in (lock, f"{lock} shared")]
        if not self.held and self in self.vm.lock_threads:
            self.vm.lock_threads.remove(self)

    def might_sleep(self, what: str) -> None:
        """A sleeping call with preemption off is a violation, if the kernel counts preemption."""
        if self.vm.switches.preempt_count and "mmu_lock" in self.held:
            self.vm.log.violate("sleep-in-atomic", f"BUG: scheduling while atomic: {what} under mmu_lock")

    def assert_mmu_lock(self, what: str) -> None:
        """lockdep_assert_held(&kvm->mmu_lock)."""
        if "mmu_lock" not in self.held:
            self.vm.log.violate("lock-misuse", f"{what} without mmu_lock")

    def unwind(self) -> None:
        """Drop everything (an early way out of the fault path)."""
        self.held.clear()
        if self in self.vm.lock_threads:
            self.vm.lock_threads.remove(self)

    def leave(self, where: str) -> None:
        """Back to user space or the guest: nothing may be held; what is stays held."""
        for lock in self.held:
            self.vm.log.violate("lock-misuse", f"{where} with {lock} held")

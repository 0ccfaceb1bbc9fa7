"""TLB tracking: how the module knows that no vCPU can still use a blocked entry; and its zero-step mitigation.

Twice the same rule.  `Epochs` counts as the module does, without end.  `Age` keeps of an epoch only how it stands
to TD_EPOCH, which is all that is ever asked, so that an explorer has finitely many states.  Source: TDX module
1.5.01, tdh_mem_track.c, adjust_tlb_tracking_state(), is_tlb_tracked(), td_exit.c, td_exit_stepping.c.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from enum import StrEnum
from typing import NamedTuple

from ..rules import ANY, Rules
from .words import Status


class Epochs(NamedTuple):
    """TDCS.EPOCH_TRACKING: TD_EPOCH, and how many vCPUs are inside with an epoch of each parity."""

    td_epoch: int = 1
    refcount: tuple[int, int] = (0, 0)


START = Epochs()


def _counted(epochs: Epochs, epoch: int, by: int) -> Epochs:
    even, odd = epochs.refcount
    return epochs._replace(refcount=(even, odd + by) if epoch & 1 else (even + by, odd))


def enter(epochs: Epochs, vcpu_epoch: int, *, newly_associated: bool = False) -> tuple[Epochs, int, bool]:
    """VP.ENTER: the counts, the vCPU's new VCPU_EPOCH, and whether its TLB and EPT caches were flushed (INVEPT).

    adjust_tlb_tracking_state(): a vCPU that has just been associated with this processor drops none, having none.
    """
    now = epochs.td_epoch
    return _counted(epochs, now, 1), now, vcpu_epoch != now and not newly_associated


def leave(epochs: Epochs, vcpu_epoch: int) -> Epochs:
    """TD exit, or a VP.ENTER that fails after the count: the vCPU is no longer counted."""
    return _counted(epochs, vcpu_epoch, -1)


def track(epochs: Epochs) -> tuple[Status, Epochs]:
    """MEM.TRACK: start the next epoch, unless a vCPU is still inside with the previous one.  It flushes nothing."""
    if epochs.refcount[1 - (epochs.td_epoch & 1)]:
        return Status.PREVIOUS_TLB_EPOCH_BUSY, epochs
    return Status.SUCCESS, epochs._replace(td_epoch=epochs.td_epoch + 1)


def tracked(epochs: Epochs, bepoch: int) -> bool:
    """Whether tracking is done for an entry blocked in epoch `bepoch` (PAMT.BEPOCH)."""
    if bepoch == epochs.td_epoch - 1:
        return epochs.refcount[bepoch & 1] == 0
    return bepoch < epochs.td_epoch - 1


class Age(StrEnum):
    """An epoch (a vCPU's, or a BEPOCH) as it stands to TD_EPOCH: equal, one less, or less than that."""

    NOW = "now"
    PREVIOUS = "previous"
    OLDER = "older"


TRACKED = Rules(
    "TDX module 1.5.01, is_tlb_tracked(): is tracking done for an entry blocked in that epoch",
    {"bepoch": tuple(Age), "previous_inside": (False, True)},  # a vCPU is inside since the previous epoch
    [
        (Age.NOW, ANY, False),  # no TRACK since the BLOCK
        (Age.PREVIOUS, True, False),  # a vCPU may hold a translation from before
        (Age.PREVIOUS, False, True),
        (Age.OLDER, ANY, True),  # the second TRACK could not have passed such a vCPU
    ],
    outcome="tracked",
)

OLDER_BY_ONE = {Age.NOW: Age.PREVIOUS, Age.PREVIOUS: Age.OLDER, Age.OLDER: Age.OLDER}


def age(epoch: int, td_epoch: int) -> Age:
    """Return the age of an absolute epoch."""
    return Age.NOW if epoch == td_epoch else Age.PREVIOUS if epoch == td_epoch - 1 else Age.OLDER


def enter_age(vcpu: Age, *, newly_associated: bool = False) -> tuple[Age, bool]:
    """VP.ENTER by ages: the vCPU's age, which is NOW, and whether it was flushed.  A TD exit changes no age."""
    return Age.NOW, vcpu != Age.NOW and not newly_associated


def track_busy(inside: Iterable[Age]) -> bool:
    """Whether MEM.TRACK is PREVIOUS_TLB_EPOCH_BUSY, given the ages of the vCPUs that are inside."""
    return Age.PREVIOUS in inside


def track_age(any_age: Age) -> Age:
    """What a MEM.TRACK that succeeds does to every age: of each vCPU, inside or not, and of each BEPOCH."""
    return OLDER_BY_ONE[any_age]


def tracked_age(bepoch: Age, inside: Iterable[Age]) -> bool:
    """`tracked`, given the ages of the vCPUs that are inside."""
    return bool(TRACKED(bepoch=bepoch, previous_inside=Age.PREVIOUS in inside))


THRESHOLD, GPA_LIST = 6, 32  # STEPPING_EPF_THRESHOLD, EPF_GPA_LIST_SIZE


class ZeroStep(NamedTuple):
    """A vCPU's suspicion that the host holds it on one instruction: EPT violations without progress, their GPAs."""

    violations: int = 0
    gpas: tuple[Hashable, ...] = ()

    @property
    def armed(self) -> bool:
        """Whether the next VP.ENTER takes the S-EPT tree lock exclusive to walk the GPAs."""
        return bool(self.gpas)


CALM = ZeroStep()


def td_exit(state: ZeroStep, *, progress: bool) -> ZeroStep:
    """Any TD exit; `progress`: RIP is not what it was at VP.ENTER."""
    return CALM if progress else state


def ept_violation(state: ZeroStep, gpa: Hashable, *, progress: bool) -> ZeroStep:
    """A TD exit by an EPT violation on a private GPA: six are let pass, from the seventh on the GPA is listed.

    Violations that ACCEPT raises itself do not come here: only the handler of the hardware's does.
    """
    state = td_exit(state, progress=progress)
    if state.violations < THRESHOLD:
        return state._replace(violations=state.violations + 1)
    if gpa in state.gpas or len(state.gpas) == GPA_LIST:
        return state
    return state._replace(gpas=(*state.gpas, gpa))


def steps(state: ZeroStep, faulting: Iterable[Hashable]) -> bool:
    """td_entry_stepping_filter(): whether VP.ENTER answers an EPT violation without entering.

    `faulting`: GPAs that would raise one now.  The list stays, so the next VP.ENTER looks again.
    """
    return not set(state.gpas).isdisjoint(faulting)

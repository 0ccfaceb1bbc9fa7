"""What can be switched in a Vm: where sources disagree or are silent, and what later kernels fixed."""

from __future__ import annotations

from dataclasses import dataclass

from ..machine.conf import Switches


@dataclass(frozen=True)
class VmSwitches(Switches):
    """The explorer's switches, and those that only real sizes need.

    `bound_range_is_eexist`: binding a bound guest_memfd range gives EEXIST (2026), not EINVAL.
    `guest_flushes_caches`, `free_flushes_caches`: the guest's flush at a conversion, and sev_gmem_invalidate()'s;
    both matter only with `Vm(caches=True)`.
    tdx: `sept_ve_disable`: the TD attribute; without it an unaccepted page is a #VE in the guest.
    `pending_is_shutdown`: such a touch is KVM_EXIT_SHUTDOWN (2026), not kvm_vm_dead().  `eagain_is_retry`: EAGAIN
    from userspace is a RETRY of MapGPA (2026), and what is neither EAGAIN nor EINVAL ends KVM_RUN.
    `seam_machine_check`: the CPU reports a machine check in SEAM mode so that the host survives it.
    """

    bound_range_is_eexist: bool = False
    guest_flushes_caches: bool = True
    free_flushes_caches: bool = True
    sept_ve_disable: bool = True
    pending_is_shutdown: bool = False
    eagain_is_retry: bool = False
    seam_machine_check: bool = True

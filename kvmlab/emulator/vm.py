"""`Vm`: one concrete virtual machine of any size, run by the rules of hw/ and the text of a design."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from os import PathLike

import numpy as np

from ..design import Design
from ..design.calls import BACKINGS, PLATFORMS
from ..errors import InputError, shown
from ..hw.snp import RmpEntry, Rmpupdate
from . import ioctl, kvm_calls, regions
from .arguments import (
    ADDRESS,
    FLAG,
    FUNCTION,
    GUEST_MEMORY,
    NUMBER,
    PAGE_ADDRESS,
    PAGES,
    PFN,
    SLOTS,
    VCPU,
    VMPL,
    either,
    instance,
    one_of,
    optional,
    settable,
    takes,
    whole,
)  # fmt: skip
from .costs import Cost, TdxCost, estimate, estimate_tdx
from .events import Event, VmErrno
from .gfn_arrays import PRIVATE
from .guest import Guest
from .guest_memfd import GuestMemfd
from .host import Host
from .memory import HOST_PAGES, LIMIT, PAGE
from .place import ATTRIBUTES, place, placed
from .slots import GUEST_MEMFD, UserMemory
from .switches import VmSwitches
from .tdx_kvm import CAN_BE_BUSY
from .vm_state import VmState
from .vmm import DISCARDS, POLICIES, Policy, Vmm

MEMORY = instance(UserMemory, "the `user` of another memslot")
HOOKS = {
    **dict.fromkeys(("on_row", "on_point", "pending"), optional(FUNCTION)),
    "mmio": optional(whole(0, (1 << 64) - 1, "what a read gives, up to 64 bits")),
    "hypercall_exits": FLAG,
    "supported_attributes": one_of(0, PRIVATE),
}


class Vm(VmState):
    """One VM: `pages` of guest memory from gpa 0, or the memslots `slots` given as (gpa, size in bytes).

    `platform`: snp, tdx, sev or sw.  `design`: a Design, the name of one that ships, or a file.  `backing`: split or
    in-place (default: the design's).  `vmm`: convert, rerun, kill, or a function of the MemoryFaultExit;
    `discard`: none, before, after.  `shared_2m`, `private_2m`: whether either backing comes in 2M pages.
    `caches`: writes stay in cache lines tagged with the C-bit until they are flushed or evicted (default: coherent).
    `zap_batch`: tdx: how many private leaves one TRACK and one kick serve (merged: 1).
    InputError (a ValueError) for what does not exist; what goes wrong later is in `kvmlab.emulator.events`.
    """

    @takes(
        platform=one_of(*PLATFORMS),
        pages=whole(0, HOST_PAGES // 2, f"pages, from 1 to {HOST_PAGES // 2:#x}: {GUEST_MEMORY}"),
        design=instance((Design, str, PathLike), "a Design, the name of one that ships, or a file"),
        backing=optional(one_of(*BACKINGS)), slots=optional(SLOTS), vmm=either(one_of(*POLICIES), FUNCTION),
        discard=one_of(*DISCARDS), vcpus=whole(1, 4096, "vCPUs, from 1 to 4096"),
        private=FLAG, shared_2m=FLAG, private_2m=FLAG,
        switches=optional(instance(VmSwitches, "VmSwitches(...), or None")),
        tlb_entries=whole(0, 1 << 20, "entries, from 0 to 0x100000"),
        keep_events=whole(1, 1 << 30, "events, from 1 to 0x40000000"), caches=FLAG,
        zap_batch=whole(1, LIMIT, "leaves, from 1 to 0x40000000"),
    )  # fmt: skip
    def __init__(
        self, platform: str = "snp", pages: int = 0, design: Design | str = "upstream",
        backing: str | None = None, slots: Sequence[tuple[int, int]] | None = None, vmm: Policy = "convert", *,
        discard: str = "none", vcpus: int = 1, private: bool = False, shared_2m: bool = False,
        private_2m: bool = False, switches: VmSwitches | None = None, tlb_entries: int = 128,
        keep_events: int = 100_000, caches: bool = False, zap_batch: int = 1,
    ) -> None:  # fmt: skip
        design = design if isinstance(design, Design) else Design.load(design)
        backing = backing or design.backing or "split"
        if design.backing not in (None, backing):
            raise InputError(f"{design.name} exists with {design.backing} backing only")
        if zap_batch != 1 and platform != "tdx":
            raise InputError(f"zap_batch={zap_batch} is for tdx: {platform} has no TRACK to save")
        super().__init__(
            platform, design, backing, switches or VmSwitches(), private=private, shared_2m=shared_2m,
            private_2m=private_2m, vcpus=vcpus, tlb_entries=tlb_entries, keep_events=keep_events, caches=caches,
            zap_batch=zap_batch, stops=kvm_calls.STOPS,
        )  # fmt: skip
        self.host = Host(self)
        self.vmm = Vmm(self, self.host, vmm, discard)
        self.new_pfns(0)  # room for the first 2M, which are the kernel's
        self._populate(pages, slots, private)

    def __setattr__(self, name: str, value: object) -> None:
        """InputError for a hook that cannot be called, or a setting that does not exist."""
        super().__setattr__(name, settable(self, name, value, HOOKS[name]) if name in HOOKS else value)

    def _populate(self, pages: int, slots: Sequence[tuple[int, int]] | None, private: bool) -> None:
        if bool(pages) == (slots is not None):
            raise InputError("a Vm has `pages` (at least one) or `slots`; without memory: slots=[]")
        wanted = [(0, pages * PAGE)] if slots is None else list(slots)
        total = sum(size for _, size in wanted)
        self._gmem, offset = self.create_guest_memfd(total) if total else None, 0
        for number, (gpa, size) in enumerate(wanted):
            self.set_user_memory_region2(number, gpa, size, self.gmem, offset)
            offset += size
            if private:
                self.attributes.store(gpa // PAGE, (gpa + size) // PAGE, True)

    # What a script reads.

    @property
    def events(self) -> list[Event]:
        """The newest events: faults, exits, instructions, each with its code."""
        return self.log.events[-self.log.keep :]

    @property
    def gmem(self) -> GuestMemfd:
        """The guest_memfd behind the memslots that the Vm was made with; InputError if there were none."""
        if self._gmem is None:
            raise InputError("this Vm was made without memory: create_guest_memfd() gives a file")
        return self._gmem

    @property
    def counters(self) -> dict[str, int]:
        """How often each kind of event happened, over the whole run."""
        return dict(self.log.counters)

    @property
    def violations(self) -> list[tuple[str, str]]:
        """Violations after which the run went on: (property, what)."""
        return list(self.log.violations)

    def cost(self) -> Cost | TdxCost:
        """The counters as an estimated cost, from sourced figures only."""
        return estimate_tdx(self.counters, len(self.mmu.tlbs)) if self.tdx else estimate(self.counters)

    @takes(index=VCPU, vmpl=VMPL)
    def guest(self, index: int = 0, vmpl: int = 0) -> Guest:
        """vCPU `index`, running at a VMPL (snp)."""
        return Guest(self.vmm, index, vmpl)

    @takes(pfn=PFN)
    def rmp_entry(self, pfn: int) -> RmpEntry:
        """The RMP entry that covers a PFN (its GPA as a gfn); elsewhere than on snp all are the hypervisor's."""
        return self.rmp.entry(pfn)

    @takes(gpa=ADDRESS, private=FLAG)
    def pfn(self, gpa: int, private: bool) -> int:
        """The PFN of either backing of a guest address; InputError where there is none."""
        slot = self.slots.find(gpa // PAGE)
        if slot is None or (private and slot.gmem is None):
            what = "guest_memfd behind the memslot" if slot else "memslot"
            raise InputError(f"no {what} at gpa {gpa:#x}")
        return self.backing_pfn(slot, gpa // PAGE, private)

    def resident(self) -> dict[str, int]:
        """How many pages each backing takes now: conversion alone frees neither."""
        slots = [slot for space in self.address_spaces for slot in space]
        users = {id(slot.user): slot.user for slot in slots}.values()
        files = {id(slot.gmem): slot.gmem for slot in slots if slot.gmem}.values()
        shared = 0 if self.in_place else sum(int(np.count_nonzero(u.present)) for u in users)
        return {"shared": shared, "private": sum(int(np.count_nonzero(f.present)) for f in files)}

    # System calls.

    @takes(gpa=optional(NUMBER), size=NUMBER, private=FLAG, flags=NUMBER, attributes=optional(NUMBER))
    def set_memory_attributes(
        self, gpa: int | None, size: int, private: bool, *, flags: int = 0, attributes: int | None = None
    ) -> ioctl.Remainder:
        """KVM_SET_MEMORY_ATTRIBUTES, or its guest_memfd form if the design locks that; VmErrno as KVM gives."""
        return ioctl.set_memory_attributes(self, gpa, size, private, flags=flags, attributes=attributes)

    @takes(size=NUMBER, flags=NUMBER)
    def create_guest_memfd(self, size: int, flags: int = 0) -> GuestMemfd:
        """KVM_CREATE_GUEST_MEMFD."""
        return GuestMemfd(self, size, flags)

    @takes(slot=NUMBER, gpa=NUMBER, size=NUMBER, offset=NUMBER, flags=optional(NUMBER), user=optional(MEMORY))
    def set_user_memory_region2(
        self, slot: int, gpa: int, size: int, gmem: object = None, offset: int = 0, *, flags: int | None = None,
        user: UserMemory | None = None,
    ) -> None:  # fmt: skip
        """KVM_SET_USER_MEMORY_REGION2: create a memslot, move it (same size), or delete it (size 0).

        The upper 16 bits of `slot` are the address space.  EINVAL, EBADF and EEXIST as KVM gives; `user` is the
        memory of another slot, to map it again.
        """
        regions.set_region(self, slot, gpa, size, gmem, offset, flags, user)

    @takes(slot=NUMBER, gpa=NUMBER, size=NUMBER, flags=NUMBER, user=optional(MEMORY))
    def set_user_memory_region(
        self, slot: int, gpa: int, size: int, *, flags: int = 0, user: UserMemory | None = None
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION, which knows no guest_memfd: EINVAL for that flag."""
        if flags & GUEST_MEMFD:
            raise VmErrno(errno.EINVAL, "KVM_SET_USER_MEMORY_REGION with KVM_MEM_GUEST_MEMFD")
        regions.set_region(self, slot, gpa, size, None, 0, flags, user)

    def close(self) -> None:
        """Close the VM: its memslots go; a guest_memfd that somebody holds lives on."""
        for as_id, space in enumerate(self.address_spaces):
            for number in list(space.by_id):
                regions.delete(self, as_id, number)

    @takes(
        what=instance(str, "a word"),
        at=whole(0, LIMIT, "an index or a PFN, from 0 on"),
        code=instance(Rmpupdate, f"there are: {', '.join(str(code.name) for code in Rmpupdate if code)}"),
    )
    def fail(self, what: str, at: int = 0, code: Rmpupdate = Rmpupdate.FAIL_PERMISSION) -> None:
        """Inject one failure: "xa_store", "xa_reserve" (at index `at`), "gmem_alloc", or "rmpupdate" (at PFN `at`).

        A failing RMPUPDATE goes on failing at that PFN until `repair()`.  tdx: the name of a leaf, as
        "TDH.MEM.TRACK": when it next comes to its lock it answers TDX_OPERAND_BUSY.
        """
        known = ["xa_store", "xa_reserve", "gmem_alloc"]
        known += ["rmpupdate"] if self.has_rmp else CAN_BE_BUSY if self.tdx else ()
        if what not in known:
            raise InputError(f"cannot inject {shown(what)} on {self.platform}; there are: {', '.join(known)}")
        if what == "rmpupdate" and (at >= self.next_pfn or code == Rmpupdate.OK):
            raise InputError(
                f"cannot inject {code.name} at PFN {at:#x}: a failure, and a PFN that the host has"
            )
        if what == "rmpupdate":
            self.rmp.failures[at] = code
        else:
            self.failures[what] = at

    @takes(
        gpa=PAGE_ADDRESS, state=instance(str, "the name of a state"), size=PAGES,
        attribute=optional(one_of(*ATTRIBUTES)),
    )  # fmt: skip
    def place(self, gpa: int, state: str, size: int = PAGE, *, attribute: str | None = None) -> None:
        """Bring pages into a named state (docs/emulator.md, "A page in a named state") by the calls that lead there.

        `attribute`: what a wrong host's xarray says instead.  InputError for a state that the platform does not have,
        VmError if the design ends elsewhere, and what the calls raise.
        """
        place(self.guest(), gpa, state, size, attribute)

    @takes(gpa=ADDRESS)
    def placed(self, gpa: int) -> tuple[str, str]:
        """The state of the page at an address, in the words of `place`, and what its attribute says."""
        return placed(self, gpa // PAGE)

    def repair(self) -> None:
        """Take back every injected failure."""
        self.failures.clear()
        self.rmp.failures.clear()

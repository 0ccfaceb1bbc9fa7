"""KVM's side of one TD: its vCPUs inside and outside, what waits for them, the mirror page table.

A vCPU that has run stays in the TD until something makes it leave, as one that goes on running would; so whether a
design kicks matters.  A kick that meets a vCPU in the middle of VP.ENTER or ACCEPT (`vm.on_point` runs there, the
module's lock held) ends that first.  From arch/x86/kvm/vmx/tdx.c and virt/vmx/tdx/tdx.c.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from ..hw import tdx
from ..hw.snp.pages import PAGES_2M
from ..hw.tdx import Leaf, Level, State
from ..hw.tdx import lines as tdx_lines
from ..hw.tdx import tlb as tdx_tlb
from ..hw.tdx.checks import Check, Situation, answer, around
from ..hw.tdx.locks import EntryLock
from ..hw.tdx.tlb import Age
from ..kvm import tdx as mirror
from .events import GuestSpins, MachineCheck, PlatformError, ShutdownExit, TdxError, VmDead
from .gfn_arrays import Tlb
from .host_pages import HostPages
from .memory import U8, U32, grown
from .tdx_memory import TdMemory
from .tdx_module import Done, TdModule

HKID = 17  # a private KeyID; documented example: 16 is the first, and global
VMFAILINVALID = 0x8000FF00FFFF0000  # Linux's TDX_SEAMCALL_VMFAILINVALID: no module answers
FROZEN = np.uint32(0xFFFFFFFF)  # FROZEN_SPTE
TABLES = (mirror.ABSENT, mirror.PRESENT, mirror.FROZEN)
OUTSIDE, ENTERING, INSIDE, ACCEPTING = "host", "entering", "td", "accepting"
CAN_BE_BUSY = (  # can be made to find a lock held: ACCEPT the entry's, TRACK the epoch's, the others the tree's
    Leaf.SEPT_ADD, Leaf.PAGE_AUG, Leaf.RANGE_BLOCK, Leaf.TRACK, Leaf.PAGE_REMOVE, Leaf.ACCEPT,
)  # fmt: skip
BEFORE_LOCK, _ = around(Leaf.ACCEPT, Check.ENTRY)
SPIN_LIMIT = 8


@dataclass
class TdVcpu:
    """One vCPU: where it is, its VCPU_EPOCH, its private translations, and an ACCEPT under way."""

    tlb: Tlb
    mode: str = OUTSIDE
    epoch: int = 0
    accepting: int = -1
    answer: Done | None = None


class TdxKvm:
    """The TD of one Vm: `module`, `memory`, `vcpus`, the mirror page table.

    `mirror` holds PFN + 1 by gfn, 0 for none; `mirror_tables` by 2M how the table's SPTE is, as in TABLES.
    """

    def __init__(self, vm: HostPages, vcpus: int, tlb_entries: int, caches: bool) -> None:
        self.vm, self.log = vm, vm.log
        switches = vm.switches
        self.memory = TdMemory(
            HKID, caches=caches, integrity=switches.integrity, erratum=switches.partial_write_erratum
        )
        self.memory.consumed = self._machine_check
        self.module = TdModule(self.memory, vm.new_pfns)
        self.vcpus = [TdVcpu(Tlb(tlb_entries)) for _ in range(vcpus)]
        self.mirror: U32 = np.zeros(0, np.uint32)
        self.mirror_tables: U8 = np.zeros(0, np.uint8)
        self.dead = ""

    def mirror_of(self, lo: int, hi: int) -> U32:
        """The mirror leaves of gfns [lo, hi), as a view."""
        if hi > len(self.mirror):
            self.mirror = grown(self.mirror, hi)
        return self.mirror[lo:hi]

    def mirror_tables_of(self, lo: int, hi: int) -> U8:
        """The SPTEs of the tables above gfns [lo, hi), one a 2M, as a view."""
        first, end = lo // PAGES_2M, (hi - 1) // PAGES_2M + 1
        if end > len(self.mirror_tables):
            self.mirror_tables = grown(self.mirror_tables, end)
        return self.mirror_tables[first:end]

    # vCPUs.

    def enter(self, index: int) -> None:
        """TDH.VP.ENTER, unless the vCPU is inside; VmDead once the VM is."""
        vcpu = self.vcpus[index]
        if vcpu.mode == INSIDE:
            return
        for _ in range(SPIN_LIMIT):
            self._enter(vcpu, index)
            if vcpu.mode == INSIDE:
                return
        raise GuestSpins(0, f"vCPU {index} never gets into the TD")

    def _enter(self, vcpu: TdVcpu, index: int) -> None:
        self.check_alive()
        found = answer(Leaf.VP_ENTER, self.situation(Leaf.VP_ENTER))
        if not found.ok:
            raise TdxError(Leaf.VP_ENTER, 0, found.rax)
        self.log.add(Leaf.VP_ENTER, f"vCPU {index}")
        self.module.epochs, vcpu.epoch, flushes = tdx_tlb.enter(self.module.epochs, vcpu.epoch)
        if flushes:
            vcpu.tlb.leaves.clear()
        vcpu.mode = ENTERING
        self.vm.at_point(Leaf.VP_ENTER)
        if vcpu.mode == ENTERING:
            vcpu.mode = INSIDE

    def leave(self, index: int) -> None:
        """A TD exit; one in the middle of VP.ENTER or ACCEPT ends that first."""
        vcpu = self.vcpus[index]
        if vcpu.mode == ACCEPTING:
            vcpu.answer = self._accept_ends(vcpu)
        if vcpu.mode != OUTSIDE:
            vcpu.mode = OUTSIDE
            self.module.epochs = tdx_tlb.leave(self.module.epochs, vcpu.epoch)

    def everybody_out(self) -> None:
        """Every vCPU leaves the guest, as it does for a kick or a flush."""
        for index in range(len(self.vcpus)):
            self.leave(index)

    def kick(self, times: int = 1) -> None:
        """kvm_make_all_cpus_request(KVM_REQ_OUTSIDE_GUEST_MODE) has made every vCPU leave; one IPI each."""
        self.log.add("kick", times=times)
        self.log.counters["kick-ipi"] += len(self.vcpus) * times
        self.everybody_out()

    def inside(self) -> frozenset[tuple[str, Age]]:
        """How the vCPUs that the module counts as inside are there: the mode, and how old its epoch is."""
        now = self.module.epochs.td_epoch
        return frozenset((v.mode, tdx_tlb.age(v.epoch, now)) for v in self.vcpus if v.mode != OUTSIDE)

    def end_module_calls(self) -> bool:
        """Let vCPUs end the VP.ENTER or ACCEPT that somebody waits for; whether there were any."""
        waited_for = [vcpu for vcpu in self.vcpus if vcpu.mode in (ENTERING, ACCEPTING)]
        for vcpu in waited_for:
            if vcpu.mode == ACCEPTING:
                vcpu.answer = self._accept_ends(vcpu)
            vcpu.mode = INSIDE
        return bool(waited_for)

    def accept(self, index: int, gfn: int, n: int) -> Done:
        """TDG.MEM.PAGE.ACCEPT of up to `n` 4K pages by a vCPU that is inside; `vm.on_point` with the lock held."""
        found = answer(Leaf.ACCEPT, self.situation(Leaf.ACCEPT, gfn), BEFORE_LOCK)
        if not found.ok:
            return Done(0, found.rax)
        vcpu = self.vcpus[index]
        if self.vm.on_point is None:
            return self.module.accept(gfn, n, self.accepting)
        vcpu.mode, vcpu.accepting, vcpu.answer = ACCEPTING, gfn, None
        self.vm.at_point(Leaf.ACCEPT)
        if vcpu.mode == ACCEPTING:
            vcpu.mode, vcpu.answer = INSIDE, self._accept_ends(vcpu)
        assert vcpu.answer is not None
        return vcpu.answer

    def _accept_ends(self, vcpu: TdVcpu) -> Done:
        gfn, vcpu.accepting = vcpu.accepting, -1
        return self.module.accept(gfn, 1)

    @property
    def accepting(self) -> list[int]:
        """The gfns whose entries are held by vCPUs in ACCEPT."""
        return [vcpu.accepting for vcpu in self.vcpus if vcpu.accepting >= 0]

    # The module's checks.

    def situation(self, leaf: Leaf, gfn: int = 0) -> Situation:
        """What VP.ENTER finds, or ACCEPT about its first page; a failure that was injected strikes ACCEPT's lock."""
        module = self.module

        def above() -> tuple[Level, State]:
            module.walk(gfn, 1)
            there = module.has_table(Level.PD, gfn, gfn + 1)[0]
            return Level.PD, State.NL_MAPPED if there else State.FREE

        return Situation(
            td=lambda: module.life,
            above=above,
            entry_lock=lambda: EntryLock(taken=gfn in self.accepting or self.take_failure(leaf)),
        )

    def take_failure(self, leaf: Leaf) -> bool:
        """Whether a busy answer was injected for this leaf."""
        return self.vm.take_failure(leaf) is not None

    @property
    def at_odds(self) -> bool:
        """Whether the next SEAMCALL may meet what no cell of the model holds: a poisoned table, a dead module."""
        return bool(self.memory.suspect) or self.module.off

    # Ends.

    def check_alive(self) -> None:
        """VmDead (EIO) if KVM has given up the VM."""
        if self.dead:
            raise VmDead(errno.EIO, f"the VM is dead: {self.dead}")

    def bug(self, text: str, rax: int) -> NoReturn:
        """KVM_BUG_ON: the VM is dead.  A page that could not be removed stays the TD's (one not added goes back)."""
        self.dead = text
        self.everybody_out()
        raise PlatformError(text, rax)

    def pending(self, index: int, gfn: int) -> NoReturn:
        """A vCPU touched a PENDING page with SEPT_VE_DISABLE (extended qualification 6)."""
        self.leave(index)
        code = tdx.Guest.EXIT_PENDING.extended_qualification
        self.log.add("ept-violation", "PENDING", gfn, 1, code)
        if self.vm.switches.pending_is_shutdown:
            raise ShutdownExit(f"KVM_EXIT_SHUTDOWN: guest touched gfn {gfn:#x} without ACCEPT")
        self.dead = f"guest touched gfn {gfn:#x} without ACCEPT"
        raise VmDead(errno.EIO, f"KVM_RUN: {self.dead}")

    def _machine_check(self, who: str, pfn: int) -> None:
        end = tdx_lines.consumed(who, seam_nr=self.vm.switches.seam_machine_check)
        self.log.add("machine-check", f"{who}: {end}", pfn)
        if who == "TD":
            self.module.fatal = True
            self.everybody_out()
        elif who == "module":
            self.module.off = True
        raise MachineCheck(who, pfn, end)

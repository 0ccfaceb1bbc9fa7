"""From a design's sections to the programs that the actors run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..design import Design, Row
from ..design.calls import does
from ..guest import access as accesses
from ..guest import td as accesses_tdx
from ..guest import threads as actors
from ..hw.memory import Gfn
from ..kernel import locks
from ..kernel.failures import RMPUPDATE, XARRAY
from ..kvm import gmem, memslots, mmu
from ..machine.conf import MEMSLOTS, RESERVED, Conf
from ..machine.scenario import Discards
from ..model.state import View
from ..model.step import Instr, Step
from .assemble import Draft, assemble, nothing, without_markers
from .section import KINDS, Section


def fault_paths(design: Design, conf: Conf) -> tuple[list[Draft], set[tuple[str, str]]]:
    """The fault and rmp_fault sections for both kinds of fault; and how locks nest there."""
    drafts: list[Draft] = []
    nests: set[tuple[str, str]] = set()
    rows = (row for kind in KINDS for row in design.rows("rmp_fault", to=kind, platform=conf.platform))
    handler = conf.has_rmp and any(rows)
    for kind in KINDS:
        done = f"handler-{kind}" if handler else "guest"
        section = Section(conf, "fault", kind, f"fault-{kind}", None, design)
        section.mark(f"fault-{kind}")
        section.compile(design.rows("fault", to=kind, platform=conf.platform))
        drafts += _leave(section, done)
        nests |= section.nests
        if handler:
            handled = design.rows("rmp_fault", to=kind, platform=conf.platform)
            keeps = any(does(row.call, "asks SIZEM") for row in handled)
            for draft in drafts:
                if draft.after == done:
                    draft.step = _Ends(draft.step, keeps)
                    draft.jumps |= {"plain": "guest", "handled": f"handler-{kind}-body"}
            rmp = Section(conf, "rmp_fault", kind, f"handler-{kind}", None)
            drafts.append(
                Draft(
                    mmu.had_rmp_bit,
                    (keeps,),
                    "if (error_code & PFERR_GUEST_RMP)",
                    None,
                    "rmp_fault",
                    label=f"handler-{kind}",
                    jumps={"skip": "guest"},
                )
            )
            rmp.mark(f"handler-{kind}-body")
            rmp.compile(handled)
            drafts += _leave(rmp, "guest")
            nests |= rmp.nests
    return drafts, nests


@dataclass(frozen=True)
class _Ends:
    """The last step of a fault, with the look at the RMP bit that follows: without it the guest goes on."""

    step: Step
    keeps: bool

    @property
    def __name__(self) -> str:
        return str(getattr(self.step, "__name__", "step"))

    def __call__(self, s: View, me: str, *args: Any) -> str | None:
        if (jump := self.step(s, me, *args)) is not None:
            return jump
        return "handled" if mmu.had_rmp_bit(s, me, self.keeps) is None else "plain"


def _leave(section: Section, done: str) -> list[Draft]:
    """The end of a section in the vCPU's loop, with the ways out that drop locks first."""
    drafts = section.drafts
    if section.holding:
        drafts.append(Draft(locks.leave, ("enters the guest",), "enters the guest", None, section.section))
    if (drafts and drafts[-1].step is nothing) or not drafts:
        drafts.append(Draft(nothing, (), "re-enters the guest", None, section.section))
    drafts[-1].after = done
    leaves = f"auto-{section.kind}" if section.conf.auto_convert else "guest"
    # tdx_handle_ept_violation() retries a private fault without entering the TD in between.
    again = section.prefix if section.conf.tdx and section.kind == "private" else done
    ways = {"retry": again, "leave": done, "exit": leaves, "killed": "killed", "userspace": "userspace"}
    return _unwound(section, drafts, ways)


def _unwound(section: Section, drafts: list[Draft], targets: Mapping[str, str]) -> list[Draft]:
    """The drafts with the code behind them that drops what is held on each way out, and then goes on."""
    for label, (holding, why) in section.unwinds.items():
        undo = [
            Draft(locks.UNDO[take], (name,), f"{locks.UNDO[take].__name__}({name})", None, section.section)
            for take, name in reversed(holding)
        ]
        if not undo:
            _redirect(drafts, label, targets[why])
            continue
        undo[0].label, undo[-1].after = label, targets[why]
        drafts = drafts + undo
    return drafts


def _redirect(drafts: Iterable[Draft], label: str, target: str) -> None:
    for d in drafts:
        d.jumps = {name: target if to == label else to for name, to in d.jumps.items()}


class Program(NamedTuple):
    """The program of a thread, and how locks nest in it: (held, taken)."""

    instrs: tuple[Instr, ...]
    nests: frozenset[tuple[str, str]] = frozenset()


class Ioctl:
    """The drafts of one KVM_SET_MEMORY_ATTRIBUTES and, where the VMM does so, of the discard before or after it.

    `refused`: its last reservation fails for certain.
    """

    def __init__(
        self, design: Design, conf: Conf, to: str, label: str, gfns: tuple[Gfn, ...],
        discards: tuple[Discards, ...] = (), refused: bool = False,
    ) -> None:  # fmt: skip
        self.design, self.conf, self.to, self.label, self.refused = design, conf, to, label, refused
        when = {thread.when for thread in discards} if to == "shared" else set()
        self.nests: set[tuple[str, str]] = set()
        self.drafts: list[Draft] = []
        start = f"{label}-whole"
        if "before" in when:
            self.drafts += self._punch(label, gfns)
            self.drafts += self._whole(start, gfns)
        else:
            self.drafts += [Draft(nothing, (), "", None, "ioctl", label=label), *self._whole(start, gfns)]
        holds = any(draft.step is gmem.hold_page for draft in self.drafts)
        self.drafts.append(Draft(nothing, (), "", None, "ioctl", label=f"{label}-done"))
        if holds:
            self.drafts.append(Draft(_puts_pages, (), "put_page()", None, "ioctl"))
        if "after" in when:
            self.drafts += self._punch(f"{label}-punch", gfns)

    def returns(self, after: str | None) -> list[Draft]:
        """All of it, and the return to user space."""
        return [*self.drafts, Draft(actors.ioctl_return, (), "return 0", None, "ioctl", after=after)]

    def _whole(self, label: str, gfns: tuple[Gfn, ...]) -> list[Draft]:
        """One ioctl on `gfns`; what it could not store it is called for again."""
        section = Section(self.conf, "ioctl", self.to, label, gfns, self.design)
        section.refused = self.refused
        section.mark(label)
        section.compile(self.design.rows("ioctl", to=self.to, platform=self.conf.platform))
        done = f"{self.label}-done"
        refused = done if RESERVED in self.conf.parts else label  # the VMM gives up, or asks again
        ways = {"done": done, "ENOMEM": refused}
        drafts = _unwound(section, self._to(done, section.drafts), ways)
        self.nests |= section.nests
        for partly in section.partly:
            # The one failure that is allowed is used up.
            stored, spent = partly.stored, replace(self.conf, parts=self.conf.parts - {XARRAY})
            part = Section(spent, "ioctl", self.to, partly.label, gfns[:stored], self.design)
            part.holding = list(partly.holding)
            part.mark(partly.label)
            part.compile(partly.rows)
            rest = f"{partly.label}-rest" if stored else label
            drafts += _unwound(part, self._to(rest, part.drafts), ways)
            if stored:
                drafts += self._whole(rest, gfns[stored:])
        return drafts

    def _to(self, target: str, drafts: list[Draft]) -> list[Draft]:
        return [*drafts, Draft(nothing, (), "", None, "ioctl", label=f"before {target}", after=target)]

    def _punch(self, label: str, gfns: tuple[Gfn, ...]) -> list[Draft]:
        drafts, nests = punch_drafts(self.design, self.conf, label, gfns)
        self.nests |= nests
        return drafts


def _puts_pages(s: View, me: str) -> None:
    """The ioctl lets go of the pages that it worked on."""
    gmem.put_page(s, me)


def punch_drafts(
    design: Design, conf: Conf, label: str, gfns: tuple[Gfn, ...]
) -> tuple[list[Draft], set[tuple[str, str]]]:
    """fallocate(PUNCH_HOLE) on the private pages of `gfns`: the section punch of the design."""
    section = Section(conf, "punch", "shared", label, gfns, design)
    section.mark(label)
    section.compile(design.rows("punch", to="shared", platform=conf.platform))
    return section.drafts, section.nests


def vmm_program(
    design: Design, conf: Conf, gfns: tuple[Gfn, ...], discards: tuple[Discards, ...], refused: bool
) -> Program:
    """A VMM thread beside the asking one: its own ioctl on `gfns`, once the guest has asked."""
    ioctl = Ioctl(design, conf, conf.eras[1], "ioctl", gfns, discards, refused)
    waits = Draft(actors.vmm_waits, (), "", None, "ioctl", label="waits", idle=True)
    return _vmm_thread([waits, *ioctl.returns(None)], ioctl.nests)


def vmm_punch_program(design: Design, conf: Conf, gfns: tuple[Gfn, ...]) -> Program:
    """A VMM thread that discards the private pages of `gfns` whenever it likes, once."""
    drafts, nests = punch_drafts(design, conf, "punch", gfns)
    begins = Draft(actors.vmm_punches, (), "", None, "punch", label="any", idle=True)
    return _vmm_thread([begins, *drafts], nests)


def vmm_delete_program(design: Design, conf: Conf) -> Program:
    """A VMM thread that deletes the memslot whenever it likes (kvm_set_memslot()): all that is mapped goes."""
    section = Section(conf, "ioctl", "shared", "delete", conf.gfns, design)
    flush, unlock = Row("kvm_flush_remote_tlbs"), Row("write_unlock", lock="mmu_lock")

    def drops_it() -> None:
        section.emit(memslots.delete_memslot, (), Row("kvm_set_memslot"))
        section.emit(memslots.synchronize_srcu, (), Row("synchronize_srcu"))
        section.row(Row("write_lock", lock="mmu_lock"))
        for section.kind in reversed(KINDS) if conf.tdx else ("shared",):  # tdx has a root for each kind
            section.row(Row("kvm_unmap_gfn_range"))
        section.row(flush)
        section.row(unlock)
        section.emit(memslots.slot_is_gone, (), Row("kvm_free_memslot"))

    return _region_thread(section, "deletes the memslot", drops_it)


def vmm_create_program(design: Design, conf: Conf) -> Program:
    """A VMM thread that creates the memslot whenever it likes: binds the guest_memfd, then publishes the slot."""
    section = Section(conf, "ioctl", "shared", "create", conf.gfns, design)

    def makes_it() -> None:
        section.row(Row("filemap_invalidate_lock", lock="invalidate_lock"))
        section.emit(memslots.kvm_gmem_bind, (), Row("kvm_gmem_bind"))
        section.row(Row("filemap_invalidate_unlock", lock="invalidate_lock"))
        section.emit(memslots.create_memslot, (), Row("kvm_set_memslot"))

    return _region_thread(section, "creates the memslot", makes_it)


def _region_thread(section: Section, what: str, work: Callable[[], None]) -> Program:
    """KVM_SET_USER_MEMORY_REGION2: like the attribute ioctl it holds slots_lock throughout."""
    section.row(Row("mutex_lock", lock="slots_lock"))
    work()
    section.row(Row("mutex_unlock", lock="slots_lock"))
    begins = Draft(memslots.set_memory_region, (what,), "", None, "ioctl", label="any", idle=True)
    return _vmm_thread([begins, *section.drafts], section.nests)


def _vmm_thread(drafts: list[Draft], nests: set[tuple[str, str]]) -> Program:
    done = Draft(actors.vmm_done, (), "", None, "ioctl", label="done", idle=True)
    stuck = Draft(locks.stuck, (), "hangs", None, "ioctl", label="stuck")
    return Program(assemble(without_markers([*drafts, done, stuck])), frozenset(nests))


def vcpu_program(design: Design, conf: Conf, asks: bool, discards: tuple[Discards, ...]) -> Program:
    """The program of one vCPU thread: the guest, the fault path and, if it `asks`, the ioctl for each era."""
    eras = list(enumerate(conf.eras))[1:]
    head: list[Draft] = []
    nests: set[tuple[str, str]] = set()
    entries = [f"fault-{kind}" for kind in KINDS]
    ways = {label: label for label in ("idle", *(entries if conf.kind_from_c_bit else ["fault"]))}
    for era, to in eras if asks else ():
        label = f"ioctl{era}"
        asking = Draft(
            actors.ask, (), "", None, "guest", label=f"ask{era}", after=label, jumps={"rescind": "guest"}
        )
        ways[f"rescinded{era}"] = label
        ioctl = Ioctl(design, conf, to, label, conf.converted, discards)
        head += [asking, *ioctl.returns("idle" if era == len(eras) else "between")]
        nests |= ioctl.nests
    if asks and len(eras) > 1:
        again = {f"ask{era}": f"ask{era}" for era, _ in eras}
        head.append(
            Draft(actors.guest_between, (), "", None, "guest", label="between", after="guest", jumps=again)
        )
        ways["between"] = "between"
    body = [
        Draft(
            actors.guest_idle,
            (),
            "",
            None,
            "guest",
            label="idle",
            after="guest",
            jumps={"idle": "idle"},
            idle=True,
        ),
        Draft(
            accesses_tdx.guest_runs if conf.tdx else accesses.guest_runs,
            (),
            "",
            None,
            "guest",
            label="guest",
            jumps=ways,
        ),
        Draft(locks.stuck, (), "hangs", None, "guest", label="stuck"),
    ]
    for kind in KINDS if conf.auto_convert else ():
        ioctl = Ioctl(design, conf, kind, f"auto-ioctl-{kind}", conf.converted, discards)
        body.append(Draft(actors.auto_convert, (kind,), "", None, "ioctl", label=f"auto-{kind}"))
        body += ioctl.returns("guest")
        nests |= ioctl.nests
    if MEMSLOTS in conf.parts:
        emulated = accesses.completed_by_userspace
        body.append(Draft(emulated, (), "re-enters behind it", None, "guest", label="userspace", jumps=ways))
    if RMPUPDATE in conf.parts:
        body.append(Draft(actors.kvm_run_fails, (), "", None, "fault", label="killed", after="idle"))
    if not conf.kind_from_c_bit:
        body.append(
            Draft(
                mmu.fault_kind,
                (),
                "reads the attribute",
                None,
                "fault",
                label="fault",
                jumps={label: label for label in entries},
            )
        )
    paths, more = fault_paths(design, conf)
    return Program(assemble(without_markers(head + body + paths)), frozenset(nests | more))


def host_program(targets: tuple[tuple[str, str], ...]) -> Program:
    """The host thread: one write after another, owing nothing."""
    writes = Draft(actors.host_thread, (targets,), "", None, "host", label="host", after="host", idle=True)
    return Program(assemble([writes, Draft(locks.stuck, (), "hangs", None, "host", label="stuck")]))


def inverted(nests: frozenset[tuple[str, str]]) -> frozenset[tuple[str, str]]:
    """The (held, taken) pairs that lie on a cycle of the lock order (lockdep)."""
    reach = set(nests)
    while more := {(a, d) for a, b in reach for c, d in reach if b == c} - reach:
        reach |= more
    return frozenset((a, b) for a, b in nests if (b, a) in reach)

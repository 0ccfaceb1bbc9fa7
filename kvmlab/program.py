"""From a design's sections to the programs that the actors run."""

from __future__ import annotations

from collections.abc import Iterable

from . import actors
from .assembly import Draft, assemble, nothing, without_markers
from .design import Design
from .kernel import locks
from .kvm import mmu
from .machine import Conf
from .section import KINDS, UNDO, Section
from .step import Instr


def fault_paths(design: Design, conf: Conf) -> tuple[list[Draft], set[tuple[str, str]]]:
    """The fault and rmp_fault sections for both kinds of fault; and how locks nest there."""
    drafts: list[Draft] = []
    nests: set[tuple[str, str]] = set()
    rows = (row for kind in KINDS for row in design.rows("rmp_fault", to=kind, platform=conf.platform))
    handler = conf.has_rmp and any(rows)
    for kind in KINDS:
        done = f"handler-{kind}" if handler else "guest"
        section = Section(conf, "fault", kind, f"fault-{kind}", None)
        section.mark(f"fault-{kind}")
        section.compile(design.rows("fault", to=kind, platform=conf.platform))
        drafts += _leave(section, done)
        nests |= section.nests
        if handler:
            rmp = Section(conf, "rmp_fault", kind, f"handler-{kind}", None)
            drafts.append(
                Draft(
                    mmu.had_rmp_bit, (), "", 0, "rmp_fault", label=f"handler-{kind}", jumps={"skip": "guest"}
                )
            )
            rmp.compile(design.rows("rmp_fault", to=kind, platform=conf.platform))
            drafts += _leave(rmp, "guest")
            nests |= rmp.nests
    return drafts, nests


def _leave(section: Section, done: str) -> list[Draft]:
    """The end of a section in the vCPU's loop, with the ways out that drop locks first."""
    drafts = section.drafts
    if section.holding:
        drafts.append(Draft(locks.leave, ("enters the guest",), "enters the guest", 0, section.section))
    if (drafts and drafts[-1].step is nothing) or not drafts:
        drafts.append(Draft(nothing, (), "re-enters the guest", 0, section.section))
    drafts[-1].after = done
    for label, (holding, why) in section.unwinds.items():
        leaves = f"auto-{section.kind}" if section.conf.auto_convert else "guest"
        target = {"retry": done, "exit": leaves, "killed": "killed"}[why]
        undo = [
            Draft(UNDO[take], (name,), f"{UNDO[take].__name__}({name})", 0, section.section)
            for take, name in reversed(holding)
        ]
        if not undo:
            _redirect(drafts, label, target)
            continue
        undo[0].label, undo[-1].after = label, target
        drafts = drafts + undo
    return drafts


def _redirect(drafts: Iterable[Draft], label: str, target: str) -> None:
    for d in drafts:
        d.jumps = {name: target if to == label else to for name, to in d.jumps.items()}


def vmm_program(
    design: Design, conf: Conf, gfns: tuple[int, ...]
) -> tuple[tuple[Instr, ...], set[tuple[str, str]]]:
    """A VMM thread beside the asking one: its own ioctl on `gfns`, once the guest has asked."""
    section = Section(conf, "ioctl", conf.eras[1], "ioctl", gfns)
    section.compile(design.rows("ioctl", to=conf.eras[1], platform=conf.platform))
    waits = Draft(actors.vmm_waits, (), "", 0, "ioctl", label="waits", idle=True)
    returns = Draft(actors.ioctl_return, (), "return 0", 0, "ioctl")
    done = Draft(actors.vmm_done, (), "", 0, "ioctl", label="done", idle=True)
    stuck = Draft(locks.stuck, (), "hangs", 0, "ioctl", label="stuck")
    return assemble(without_markers([waits, *section.drafts, returns, done, stuck])), section.nests


def vcpu_program(design: Design, conf: Conf, asks: bool) -> tuple[tuple[Instr, ...], set[tuple[str, str]]]:
    """The program of one vCPU thread: the guest, the fault path and, if it `asks`, the ioctl for each era."""
    eras = list(enumerate(conf.eras))[1:]
    head: list[Draft] = []
    nests: set[tuple[str, str]] = set()
    entries = [f"fault-{kind}" for kind in KINDS]
    ways = {label: label for label in ("idle", *(entries if conf.kind_from_c_bit else ["fault"]))}
    for era, to in eras if asks else ():
        head.append(
            Draft(
                actors.ask,
                (),
                "",
                0,
                "guest",
                label=f"ask{era}",
                after=f"ioctl{era}",
                jumps={"rescind": "guest"},
            )
        )
        ways[f"rescinded{era}"] = f"ioctl{era}"
        section = Section(conf, "ioctl", to, f"ioctl{era}", conf.converted)
        section.mark(f"ioctl{era}")
        section.compile(design.rows("ioctl", to=to, platform=conf.platform))
        last = era == len(eras)
        section.drafts.append(
            Draft(actors.ioctl_return, (), "return 0", 0, "ioctl", after="idle" if last else "between")
        )
        head += section.drafts
        nests |= section.nests
    if asks and len(eras) > 1:
        again = {f"ask{era}": f"ask{era}" for era, _ in eras}
        head.append(
            Draft(actors.guest_between, (), "", 0, "guest", label="between", after="guest", jumps=again)
        )
        ways["between"] = "between"
    body = [
        Draft(actors.guest_idle, (), "", 0, "guest", label="idle", after="guest", idle=True),
        Draft(actors.guest_runs, (), "", 0, "guest", label="guest", jumps=ways),
        Draft(locks.stuck, (), "hangs", 0, "guest", label="stuck"),
    ]
    for kind in KINDS if conf.auto_convert else ():
        section = Section(conf, "ioctl", kind, f"auto-{kind}", conf.converted)
        body.append(Draft(actors.auto_convert, (kind,), "", 0, "ioctl", label=f"auto-{kind}"))
        section.compile(design.rows("ioctl", to=kind, platform=conf.platform))
        body += [*section.drafts, Draft(actors.ioctl_return, (), "return 0", 0, "ioctl", after="guest")]
        nests |= section.nests
    if conf.injects:
        body.append(Draft(actors.kvm_run_fails, (), "", 0, "fault", label="killed", after="idle"))
    if not conf.kind_from_c_bit:
        body.append(
            Draft(
                mmu.fault_kind,
                (),
                "reads the attribute",
                0,
                "fault",
                label="fault",
                jumps={label: label for label in entries},
            )
        )
    paths, more = fault_paths(design, conf)
    return assemble(without_markers(head + body + paths)), nests | more


def host_program(targets: tuple[tuple[str, str], ...]) -> tuple[Instr, ...]:
    """The host thread: one write after another, owing nothing."""
    return assemble(
        [
            Draft(actors.host_thread, (targets,), "", 0, "host", label="host", after="host", idle=True),
            Draft(locks.stuck, (), "hangs", 0, "host", label="stuck"),
        ]
    )


def inverted(nests: set[tuple[str, str]]) -> frozenset[tuple[str, str]]:
    """The (held, taken) pairs that lie on a cycle of the lock order (lockdep)."""
    reach = set(nests)
    while more := {(a, d) for a, b in reach for c, d in reach if b == c} - reach:
        reach |= more
    return frozenset((a, b) for a, b in nests if (b, a) in reach)

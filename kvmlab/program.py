"""From a design's rows to the programs that the actors run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import actors
from .design import Design, Row
from .kernel import directmap, locks
from .kvm import attributes, mmu, sev
from .machine import Conf
from .state import ModelError, View
from .step import Instr, Step

KINDS = ("private", "shared")
LOCK_CALLS: dict[str, tuple[Step, str]] = {
    "mutex_lock": (locks.mutex_lock, "take"),
    "mutex_unlock": (locks.mutex_unlock, "drop"),
    "write_lock": (locks.write_lock, "take"),
    "write_unlock": (locks.write_unlock, "drop"),
    "read_lock": (locks.read_lock, "take"),
    "read_unlock": (locks.read_unlock, "drop"),
    "filemap_invalidate_lock": (locks.write_lock, "take"),
    "filemap_invalidate_unlock": (locks.write_unlock, "drop"),
    "filemap_invalidate_lock_shared": (locks.read_lock, "take"),
    "filemap_invalidate_unlock_shared": (locks.read_unlock, "drop"),
}
UNDO: dict[Step, Step] = {
    locks.mutex_lock: locks.mutex_unlock,
    locks.write_lock: locks.write_unlock,
    locks.read_lock: locks.read_unlock,
}
# Calls page by page: in the ioctl once a gfn of the request, elsewhere on the gfn of the fault.
PER_GFN: dict[str, Step] = {
    "kvm_unmap_directmap": directmap.kvm_unmap_directmap,
    "kvm_map_directmap": directmap.kvm_map_directmap,
    "adjust_direct_map": directmap.adjust_direct_map,
    "kvm_unmap_gfn_range": mmu.kvm_unmap_gfn_range,
}
FAULT_CALLS: dict[str, Step] = {
    "mmu_seq_snapshot": mmu.mmu_seq_snapshot,
    "kvm_mem_is_private": mmu.kvm_mem_is_private,
    "kvm_gmem_is_private": mmu.kvm_mem_is_private,
    "kvm_gmem_get_pfn": mmu.kvm_gmem_get_pfn,
    "is_page_fault_stale": mmu.is_page_fault_stale,
    "kvm_tdp_mmu_map": mmu.kvm_tdp_mmu_map,
    "psmash": sev.psmash,
}
HELPER = frozenset(
    {"kvm_unmap_directmap", "rmpupdate", "kvm_map_directmap"}
)  # parts of kvm_x86_update_mem_attr()
# The direct map and RMP ops are absent on platforms without an RMP: they do nothing there.
RMP_ONLY = frozenset(
    {
        "kvm_unmap_directmap",
        "kvm_map_directmap",
        "adjust_direct_map",
        "rmpupdate",
        "rmp_prepare",
        "rmp_match",
        "psmash",
    }
)


@dataclass
class Draft:
    """An instruction before its jumps are resolved: `label` names it, `after` where it goes on."""

    step: Step
    args: tuple[Any, ...] = ()
    text: str = ""
    line: int = 0
    section: str = ""
    label: str | None = None
    after: str | None = None
    jumps: dict[str, str] = field(default_factory=dict)
    idle: bool = False


def assemble(drafts: Sequence[Draft]) -> tuple[Instr, ...]:
    """Resolve labels into program counters; ModelError for a label that nobody carries."""
    where = {d.label: pc for pc, d in enumerate(drafts) if d.label}
    for d in drafts:
        for target in (*d.jumps.values(), *([d.after] if d.after else [])):
            if target not in where:
                raise ModelError(f"no instruction is labelled {target!r}")

    def instr(pc: int, d: Draft) -> Instr:
        jumps = {
            "again": pc,
            "stuck": where["stuck"],
            **{name: where[label] for name, label in d.jumps.items()},
        }
        return Instr(
            d.step, d.args, where[d.after] if d.after else pc + 1, jumps, d.idle, d.text, d.line, d.section
        )

    return tuple(instr(pc, d) for pc, d in enumerate(drafts))


def at_fault(step: Step) -> Step:
    """The same step, on the gfn of the vCPU's pending access."""
    return _AtFault(step)


@dataclass(frozen=True)
class _AtFault:
    step: Step

    def __call__(self, s: View, me: str, *args: Any) -> str | None:
        return self.step(s, me, s.acc[me].gfn, *args)


class Section:
    """Compiles one section of a design: rows in, drafts out; keeps track of the locks that it holds."""

    def __init__(
        self, conf: Conf, section: str, kind: str, prefix: str, gfns: tuple[int, ...] | None
    ) -> None:
        self.conf, self.section, self.kind, self.prefix, self.gfns = conf, section, kind, prefix, gfns
        self.drafts: list[Draft] = []
        self.failed: str | None = None
        self.holding: list[tuple[Step, str]] = []
        self.nests: set[tuple[str, str]] = set()
        self.unwinds: dict[str, tuple[tuple[tuple[Step, str], ...], str]] = {}
        self.covered: tuple[int, int] | None = None
        self._labels = 0

    def compile(self, rows: Sequence[Row]) -> None:
        """Add the drafts of `rows`, keeping `if (flush)` groups together."""
        if self.gfns and not any(row.call == "kvm_mmu_invalidate_range_add" for row in rows):
            self.covered = (min(self.gfns), max(self.gfns) + 1)
        i = 0
        while i < len(rows):
            helper = _helper(rows, i)
            if self.gfns and len(helper) > 1:
                self.page_by_page(helper)
                i += len(helper)
                continue
            if not _under_flush(rows[i]):
                self.row(rows[i])
                i += 1
                continue
            skip = self.new_label()
            self.emit(mmu.flush_if_zapped, (), rows[i], text="if (flush)", jumps={"skip": skip})
            while i < len(rows) and _under_flush(rows[i]):
                self.row(rows[i])
                i += 1
            self.mark(skip)

    def page_by_page(self, rows: Sequence[Row]) -> None:
        """The op of the series: all its work on one page, then the next; it gives up where RMPUPDATE fails."""
        gfns, self.failed = self.gfns or (), self.new_label()
        for self.gfns in ((gfn,) for gfn in gfns):
            for row in rows:
                self.row(row)
        self.gfns = gfns
        self.mark(self.failed)
        self.failed = None

    def row(self, row: Row) -> None:
        """Add the drafts of one call."""
        call = row.call
        if call in RMP_ONLY and not self.conf.has_rmp:
            return
        if call in LOCK_CALLS:
            self.lock(row)
        elif call in PER_GFN:
            self.per_gfn(PER_GFN[call], row)
        elif call == "rmpupdate":
            self.rmpupdate(row)
        elif call == "kvm_vm_set_region_attr":
            self.per_gfn(attributes.kvm_vm_set_region_attr, row, self.kind)
        elif call in FAULT_CALLS:
            self.fault_call(row)
        elif call in ("rmp_prepare", "rmp_match"):
            self.under_folio_lock(row)
        elif call == "kvm_zap_gfn_range":
            self.zap_in_handler(row)
        elif call == "kvm_mmu_invalidate_begin":
            self.emit(attributes.kvm_mmu_invalidate_begin, (self.covered,), row)
        elif call == "kvm_mmu_invalidate_range_add":
            assert self.gfns is not None
            self.emit(attributes.kvm_mmu_invalidate_range_add, (min(self.gfns), max(self.gfns) + 1), row)
        else:
            self.emit(_PLAIN[call], (), row)

    def emit(
        self, step: Step, args: tuple[Any, ...], row: Row, text: str = "", jumps: Mapping[str, str] = {}
    ) -> None:
        """Add one draft."""
        self.drafts.append(
            Draft(step, args, text or f"{row.call}()", row.line, self.section, jumps=dict(jumps))
        )

    def per_gfn(self, step: Step, row: Row, *args: Any) -> None:
        """Add one draft a gfn of the request, or one for the gfn of the fault."""
        shown = ", ".join(str(a) for a in args)
        if self.gfns is None:
            self.emit(at_fault(step), args, row, f"{row.call}({shown})")
            return
        for gfn in self.gfns:
            where = f"gfn {gfn}" if step is not sev.rmpupdate else self.conf.backing["private", gfn]
            self.emit(step, (gfn, *args), row, f"{row.call}({', '.join(filter(None, (where, shown)))})")

    def rmpupdate(self, row: Row) -> None:
        """RMPUPDATE: where it fails the op gives up (ioctl), or KVM_RUN does (fault path)."""
        first = len(self.drafts)
        self.per_gfn(sev.rmpupdate, row, row.target or self.kind)
        if not self.conf.injects or not self.conf.has_rmp:
            return
        if self.section == "ioctl":
            after = self.failed or self.new_label()
            if not self.failed:
                self.mark(after)
        else:
            after = self.unwind("killed")
        for draft in self.drafts[first:]:
            if draft.step is not _nothing:
                draft.jumps["failed"] = after

    def lock(self, row: Row) -> None:
        """Add a lock call, and follow what is held."""
        step, what = LOCK_CALLS[row.call]
        name = row.lock or "invalidate_lock"
        self.take(step, name) if what == "take" else self.drop(step, name)
        shown = row.call if row.call.startswith("filemap") else f"{row.call}({name})"
        self.emit(step, (name,), row, shown if "(" in shown else f"{shown}()")

    def take(self, step: Step, name: str) -> None:
        """Remember that the lock is held from here on."""
        self.nests |= {(other, name) for _, other in self.holding if other != name}
        self.holding.append((step, name))

    def drop(self, step: Step, name: str) -> None:
        """Forget the lock, if it was held that way."""
        for held in reversed(self.holding):
            if held[1] == name and UNDO[held[0]] is step:
                self.holding.remove(held)
                return

    def fault_call(self, row: Row) -> None:
        """Add a step of the fault path; retry and exit drop what is held and leave."""
        jumps = {"retry": self.unwind("retry"), "exit": self.unwind("exit")}
        self.emit(FAULT_CALLS[row.call], (self.kind,), row, jumps=jumps)

    def unwind(self, why: str) -> str:
        """Label of the code that drops the locks held here and then leaves for `why`."""
        label = f"{self.prefix}-{why}-{'+'.join(name for _, name in self.holding)}"
        self.unwinds[label] = (tuple(self.holding), why)
        return label

    def under_folio_lock(self, row: Row) -> None:
        """rmp_prepare() and rmp_match(): the folio lock, and the row's body if the RMP entry does not fit."""
        if row.call == "rmp_prepare" and self.kind == "shared":
            return
        self.take(locks.mutex_lock, "folio_lock")
        self.emit(locks.mutex_lock, ("folio_lock",), row, f"{row.call}(): folio_lock()")
        fits = self.new_label()
        self.emit(sev.rmp_fits, (self.kind,), row, f"{row.call}(): RMP lookup", {"skip": fits})
        for inner in row.body or ():
            self.row(inner)
        self.mark(fits)
        self.emit(locks.mutex_unlock, ("folio_lock",), row, f"{row.call}(): folio_unlock()")
        self.drop(locks.mutex_unlock, "folio_lock")

    def zap_in_handler(self, row: Row) -> None:
        """kvm_zap_gfn_range(): takes mmu_lock itself, zaps and flushes."""
        self.take(locks.write_lock, "mmu_lock")
        for step, args in (
            (locks.write_lock, ("mmu_lock",)),
            (at_fault(mmu.kvm_unmap_gfn_range), ()),
            (mmu.kvm_flush_remote_tlbs, ()),
            (locks.write_unlock, ("mmu_lock",)),
        ):
            self.emit(
                step, args, row, f"kvm_zap_gfn_range(): {getattr(step, '__name__', 'kvm_unmap_gfn_range')}()"
            )
        self.drop(locks.write_unlock, "mmu_lock")

    def new_label(self) -> str:
        """Return a label that no other place has."""
        self._labels += 1
        return f"{self.prefix}-{self._labels}"

    def mark(self, label: str) -> None:
        """Give the place reached now a name; a step that does nothing stands there only if it must."""
        self.pending = label
        self.drafts.append(Draft(_nothing, (), "", 0, self.section, label=label))


def _nothing(s: View, me: str) -> None:
    return None


def _helper(rows: Sequence[Row], i: int) -> Sequence[Row]:
    """The rows from `i` on that one call of the series' op was spelled out to."""
    same = (rows[i].line, rows[i].origin, rows[i].text)
    n = i
    while n < len(rows) and rows[n].call in HELPER and (rows[n].line, rows[n].origin, rows[n].text) == same:
        n += 1
    return rows[i:n]


def _under_flush(row: Row) -> bool:
    return any(c.var == "flush" for c in row.when)


_PLAIN: dict[str, Callable[..., str | None]] = {
    "kvm_flush_remote_tlbs": mmu.kvm_flush_remote_tlbs,
    "kvm_mmu_invalidate_end": attributes.kvm_mmu_invalidate_end,
    "kvm_update_lpage_mixed_flag": attributes.kvm_update_lpage_mixed_flag,
}


def _without_markers(drafts: list[Draft]) -> list[Draft]:
    """Remove the do-nothing places: what jumped to one jumps to the instruction after it."""
    real: list[Draft] = []
    moved: dict[str, str] = {}
    waiting: list[str] = []
    for d in drafts:
        if d.step is _nothing and d.label:
            waiting.append(d.label)
            continue
        if waiting:
            d.label = d.label or waiting[0]
            moved.update({label: d.label for label in waiting})
            waiting = []
        real.append(d)
    for d in real:
        d.jumps = {name: moved.get(label, label) for name, label in d.jumps.items()}
        d.after = moved.get(d.after, d.after) if d.after else None
    return real


def fault_paths(design: Design, conf: Conf) -> tuple[list[Draft], set[tuple[str, str]], bool]:
    """The fault and rmp_fault sections for both kinds of fault; how locks nest there; whether the RMP bit matters."""
    drafts: list[Draft] = []
    nests: set[tuple[str, str]] = set()
    handler = any(
        row.call not in RMP_ONLY or conf.has_rmp
        for k in KINDS
        for row in design.rows("rmp_fault", to=k, platform=conf.platform)
    )
    handler = handler and conf.has_rmp
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
    return drafts, nests, handler


def _leave(section: Section, done: str) -> list[Draft]:
    """The end of a section in the vCPU's loop, with the ways out that drop locks first."""
    drafts = section.drafts
    if section.holding:
        drafts.append(Draft(locks.leave, ("enters the guest",), "enters the guest", 0, section.section))
    if (drafts and drafts[-1].step is _nothing) or not drafts:
        drafts.append(Draft(_nothing, (), "re-enters the guest", 0, section.section))
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
    return assemble(_without_markers([waits, *section.drafts, returns, done, stuck])), section.nests


def vcpu_program(design: Design, conf: Conf, asks: bool) -> tuple[tuple[Instr, ...], set[tuple[str, str]]]:
    """The program of one vCPU thread: the guest, the fault path and, if it `asks`, the ioctl for each era."""
    eras = list(enumerate(conf.eras))[1:]
    head: list[Draft] = []
    nests: set[tuple[str, str]] = set()
    ways: dict[str, str] = {"idle": "idle", "fault": "fault"}
    ways |= {f"fault-{kind}": f"fault-{kind}" for kind in KINDS} if conf.kind_from_c_bit else {}
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
        section = Section(conf, "ioctl", to, f"ioctl{era}", conf.gfns)
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
        section = Section(conf, "ioctl", kind, f"auto-{kind}", conf.gfns)
        body.append(Draft(actors.auto_convert, (kind,), "", 0, "ioctl", label=f"auto-{kind}"))
        section.compile(design.rows("ioctl", to=kind, platform=conf.platform))
        body += [*section.drafts, Draft(actors.ioctl_return, (), "return 0", 0, "ioctl", after="guest")]
        nests |= section.nests
    if conf.injects:
        body.append(Draft(actors.kvm_run_fails, (), "", 0, "fault", label="killed", after="idle"))
    if conf.kind_from_c_bit:
        ways.pop("fault")
    else:
        body.append(
            Draft(
                mmu.fault_kind,
                (),
                "reads the attribute",
                0,
                "fault",
                label="fault",
                jumps={f"fault-{k}": f"fault-{k}" for k in KINDS},
            )
        )
    paths, more, _ = fault_paths(design, conf)
    return assemble(_without_markers(head + body + paths)), nests | more


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

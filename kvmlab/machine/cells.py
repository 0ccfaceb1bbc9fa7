"""The cells of the machine that a scenario runs on.

global      era, running, guest[gfn]                     what the guest has asked for, and knows
per gfn     attr, npt, npt_smm                           the xarray; the NPT leaf, and that in address space 1
            reserved, gmem                               empty entries of the xarray; the private page's life
per 2M, 1G  npt_large, mixed                             a leaf of that size; the lpage flag
per PFN     rmp, memory, directmap (+ directmap_2m)      RMP entry, contents, directmap of one 2M region
KVM         in_progress, invalidate_range                the invalidation window
            slot                                         the memslot, where it comes or goes
locks       slots_lock, folio_lock, mmu_lock_*, invalidate_lock_*
per vCPU    acc, tlb[vcpu, gfn], tlb_2m, checked[vcpu, gfn]   the pending access, its translations, what was checked
            snapshot, rmp_bit, fault_slot                its fault: sequence count, error code, memslot
            smm, srcu, grace                             whether it runs in SMM; whether its thread is in KVM
per actor   pc, flush, folio_ref[actor, gfn]             where it is in its program; what its zap found; its pages
failures    failures_left[what]                          what may still fail, once
tdx         see cells_tdx.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations

from ..guest.access import Access
from ..guest.threads import anything
from ..hw.memory import EMPTY, GUEST_KEY, PLAIN, Content, Pfn
from ..hw.snp import HYPERVISOR, PG_2M, RmpEntry, assigned_to
from ..kernel import locks
from ..kernel.directmap import ABSENT, PRESENT
from ..kvm.attributes import kvm_mmu_invalidate_begin
from ..kvm.mmu import mmu_seq_snapshot
from ..kvm.sev import ASID
from ..model.state import Field, Layout
from ..model.step import Instr
from . import cells_tdx
from .conf import NEIGHBOUR, TLB, Conf
from .parts import PARTS, brought_by


def with_usage(conf: Conf, programs: Mapping[str, Sequence[Instr]]) -> Conf:
    """Add to `conf` who can ever hold which lock, and in which orders locks nest both ways."""
    takes: dict[object, dict[str, set[str]]] = {
        step: {}
        for step in (
            locks.mutex_lock,
            locks.write_lock,
            locks.read_lock,
            locks.mutex_unlock,
            locks.write_unlock,
            locks.read_unlock,
        )
    }
    for actor, program in programs.items():
        for instr in program:
            step = getattr(
                instr.step, "step", instr.step
            )  # a lock call may be wrapped, as the last of a fault is
            if step in takes:
                takes[step].setdefault(instr.args[0], set()).add(actor)
    frozen = [
        {
            lock: frozenset(takes[take].get(lock, set()) | takes[drop].get(lock, set()))
            for lock in {**takes[take], **takes[drop]}
        }
        for take, drop in (
            (locks.mutex_lock, locks.mutex_unlock),
            (locks.write_lock, locks.write_unlock),
            (locks.read_lock, locks.read_unlock),
        )
    ]
    return replace(
        conf,
        owners=frozen[0],
        writers=frozen[1],
        readers=frozen[2],
        parts=conf.parts | brought_by(programs),
        many=1 + sum(i.step is kvm_mmu_invalidate_begin for program in programs.values() for i in program),
    )


def rmp_states(conf: Conf, pfn: Pfn) -> tuple[RmpEntry, ...]:
    """Every RMP entry that `pfn` can have in this machine."""
    gfn = next(g for g in conf.gfns if conf.backing["private", g] == pfn)
    ours = assigned_to(ASID, gfn)
    sizes = (ours, ours._replace(size=PG_2M)) if conf.folio_2m else (ours,)
    return (HYPERVISOR, *(e._replace(validated=valid) for e in sizes for valid in (False, True)))


def _contents(conf: Conf) -> tuple[Content, ...]:
    keys = (PLAIN, GUEST_KEY) if conf.encrypts else (PLAIN,)
    if conf.correct_guest:
        guest = [
            Content("guest", GUEST_KEY if kind == "private" and conf.encrypts else PLAIN, era)
            for era, kind in enumerate(conf.eras)
        ]
        guest += [Content("guest", PLAIN, era) for era in range(len(conf.eras)) if conf.stray]
    else:
        guest = [Content("guest", key, 0) for key in keys]
    return (EMPTY, Content("host"), *dict.fromkeys(guest))


def _accesses(conf: Conf) -> tuple[Access | None, ...]:
    found: list[Access | None] = [None]
    for gfn in conf.gfns:
        if not conf.correct_guest:
            found += anything(conf, gfn)
            continue
        for era, kind in enumerate(conf.eras if gfn in conf.converted else conf.eras[:1]):
            found += [Access(kind, op, gfn, era) for op in ("read", "write")]
            if conf.tdx and era and kind == "private":
                found += [Access("private", "accept", gfn, era), Access("shared", "zeropad", gfn, era)]
            found += [Access("shared", "write", gfn, era)] if conf.stray and kind == "private" else []
            if era and conf.has_rmp:
                found.append(Access("private", "pvalidate1" if kind == "private" else "pvalidate0", gfn, era))
                found += [Access("private", "pvalidate2M", gfn, era)] if conf.folio_2m else []
    return tuple(found)


def build_layout(conf: Conf, programs: Mapping[str, Sequence[Instr]]) -> Layout:
    """Declare every cell of the machine that these programs can use."""
    gfns, pfns, private = conf.gfns, conf.pfns, conf.private_pfns
    ranges = [None, *((lo, hi) for lo in gfns for hi in (g + 1 for g in gfns) if lo < hi)]
    faulting = tuple(a for a, program in programs.items() if any(i.step is mmu_seq_snapshot for i in program))
    fields = [Field("pc", tuple(range(len(program))), (actor,)) for actor, program in programs.items()]
    fields.append(Field("pc", (0,), (TLB,)))
    layout = [
        Field("era", tuple(range(len(conf.eras)))),
        Field("running", tuple(range(conf.ioctls + 1 + (len(conf.vcpus) if conf.auto_convert else 0)))),
        Field("guest", ("ready", "new", "claimed", "accepted") if conf.correct_guest else ("ready",), gfns),
        Field("attr", ("shared", "private"), gfns),
        Field("in_progress", tuple(range(conf.many + 1))),
        Field("invalidate_range", tuple(ranges)),
        Field("memory", cells_tdx.lines(_contents(conf)) if conf.tdx else _contents(conf), pfns),
        Field("snapshot", ("none", "same", "moved"), faulting or conf.vcpus),
        Field("acc", _accesses(conf), conf.vcpus),
    ]
    layout += [field for part in PARTS for field in part.cells(conf, programs)]
    fields += layout
    if conf.tdx:
        fields += cells_tdx.fields(conf, tuple(programs))
    for gfn in gfns:
        fields.append(Field("npt", conf.leaves(gfn), (gfn,)))
        fields.append(Field("tlb", conf.leaves(gfn), tuple((v, gfn) for v in conf.vcpus)))
        if conf.rmp_checked_at == "fill":
            rights = [
                (kind, op)
                for kind in ("shared", "private")
                for op in ("read", "write", "pvalidate1", "pvalidate0", "pvalidate2M")
            ]
            fields.append(Field("checked", (None, *rights), tuple((v, gfn) for v in conf.vcpus)))
    if conf.has_rmp:
        fields += [Field("rmp", rmp_states(conf, p), (p,)) for p in private]
        fields += [
            Field("directmap", (PRESENT, ABSENT), private),
            Field("directmap", (PRESENT,), (NEIGHBOUR,)),
        ]
        fields.append(Field("directmap_2m", (True, False)))
    fields += [Field(lock, (None, *sorted(who)), None) for lock, who in sorted(conf.owners.items())]
    for lock, who in sorted(conf.writers.items()):
        fields += [
            Field(f"{lock}_writer", (None, *sorted(who))),
            Field(
                f"{lock}_queue", tuple(p for n in range(len(who) + 1) for p in permutations(sorted(who), n))
            ),
        ]
    for lock, who in sorted(conf.readers.items()):
        fields.append(Field(f"{lock}_reader", (False, True), tuple(sorted(who))))
    return Layout(fields)

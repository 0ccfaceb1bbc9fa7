"""The machine that a scenario runs on: what never changes (`Conf`), and the cells that do.

global      era, running, guest[gfn]                     what the guest has asked for, and knows
per gfn     attr, npt                                    the xarray; the NPT leaf
            reserved                                     empty entries of the xarray
per 2M, 1G  npt_large, mixed                             a leaf of that size; the lpage flag
            npt_smm                                      the leaf in the page table of address space 1
per gfn     gmem                                         the private page: cached, dying or free
per PFN     rmp, memory, directmap (+ directmap_2m)      RMP entry, contents, directmap of one 2M region
KVM         in_progress, invalidate_range, flush         the invalidation window
locks       slots_lock, folio_lock, mmu_lock_*, invalidate_lock_*
per vCPU    acc, tlb[vcpu, gfn], tlb_2m, snapshot, rmp_bit   the pending access, its translations, its fault
            folio_ref, srcu, grace                       whether its thread holds a guest_memfd page, or kvm->srcu
            smm, fault_slot                              whether it runs in SMM; the memslot that its fault found
one         slot                                         the memslot, where it comes or goes
per actor   pc
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import permutations, product

from ..errors import InputError, shown
from ..guest.access import Access
from ..guest.threads import anything
from ..hw.memory import EMPTY, GUEST_KEY, PLAIN, Content, Gfn, Pfn
from ..hw.snp import HYPERVISOR, PG_2M, RmpEntry, assigned_to
from ..kernel import locks
from ..kernel.directmap import ABSENT, PRESENT
from ..kvm.attributes import kvm_mmu_invalidate_begin, xa_reserve
from ..kvm.lpage import LargePage, large_pages
from ..kvm.memslots import SMM, MemSlot, Piece, pieces
from ..kvm.mmu import flush_if_zapped, had_rmp_bit, mmu_seq_snapshot
from ..kvm.sev import ASID
from ..model.state import Field, Layout
from ..model.step import Instr
from . import cells_tdx as machine_tdx

PLATFORMS = {
    "snp": "AMD SEV-SNP: encrypted, ownership checked by the RMP",
    "tdx": "Intel TDX: secure EPT and PAMT kept by the module, memory owned by KeyID",
    "sev": "AMD SEV: encrypted, no RMP",
    "sw": "software-protected VM, as the KVM selftests use it: neither encryption nor RMP",
}
NEIGHBOUR = "N"
TLB = "TLB"  # who drops entries of TLBs, where that is asked: compile.scenario.with_forgetful_tlbs()


WORDS: dict[str, tuple[bool | str, bool | str]] = {"rmp_checked_at": ("access", "fill")}  # not True or False


@dataclass(frozen=True)
class Switches:
    """Choices that sources leave open; the defaults are what the thread says.

    `rmpupdate_flushes`: RMPUPDATE drops the page's TLB entries on all CPUs (thread: yes; APM: silent).
    `rmp_checked_at`: "access" or "fill", when a guest access meets the RMP check.
    `identical_keeps_validated`: RMPUPDATE of an identical state keeps Validated (verismo; APM: silent).
    `access_sets_sizem`: an ordinary access that fails for its size alone sets SIZEM, too (APM: PVALIDATE, RMPADJUST).
    `head_4k_over_2m`: a 4K RMPUPDATE may resize the 2M entry whose first page it names (APM: silent).
    `preempt_count`: CONFIG_PREEMPT_COUNT, without which sleeping in atomic context is not reported.
    `integrity`: tdx: memory with MAC and owner bit (Ci); without, only the owner bit (Li).
    `partial_write_erratum`: tdx: X86_BUG_TDX_PW_MCE, and a host that writes less than a line.
    """

    rmpupdate_flushes: bool = True
    rmp_checked_at: str = "access"
    identical_keeps_validated: bool = True
    access_sets_sizem: bool = False
    head_4k_over_2m: bool = False
    preempt_count: bool = True
    integrity: bool = True
    partial_write_erratum: bool = False

    def __post_init__(self) -> None:
        """InputError for a value that a switch does not have."""
        for name in (switch.name for switch in fields(self)):
            value, (on, off) = getattr(self, name), WORDS.get(name, (True, False))
            if type(value) is not type(on) or value not in (on, off):
                raise InputError(f"switch {name} cannot be {shown(value)}; allowed: {on}, {off}")


@dataclass(frozen=True)
class Conf:
    """What never changes while a model runs; steps read it as `s.conf`, untracked."""

    platform: str
    in_place: bool
    gfns: tuple[Gfn, ...]
    eras: tuple[str, ...]
    asker: str
    vcpus: tuple[str, ...]
    correct_guest: bool
    ioctls: int = 1  # how many ioctls serve one request
    injects: bool = False
    huge: bool = (
        False  # the gfns are one 2M page (two children stand for 512) or one 1G page (of three 2M pages)
    )
    request: tuple[Gfn, ...] = ()  # the gfns that are converted, if not all
    stray: bool = False  # vCPUs may also write with the C-bit of the kind that the page no longer has
    auto_convert: bool = False  # the VMM answers KVM_EXIT_MEMORY_FAULT by converting to what was touched
    hostile: bool = False  # a careless guest that also rescinds at any time
    folio_2m: bool = False  # guest_memfd gives one 2M page for all gfns
    punch: str = ""  # the VMM discards the private page "after" or "before" the ioctl; "free": at any time
    punched: tuple[Gfn, ...] = ()  # the gfns whose private pages are discarded "free", if not all
    xa_fails: bool = False  # one allocation of the xarray may fail
    unlucky: str = ""  # whose reservation fails for certain, at its last gfn
    yields: bool = False  # a zap may yield mmu_lock between two gfns
    deletes: bool = False  # the VMM deletes the memslot, at any time
    adds: bool = False  # the memslot is not there at first; the VMM creates it, at any time
    memslots: tuple[MemSlot, ...] = ()  # if not one over all gfns
    unused: tuple[Gfn, ...] = ()  # gfns that the guest leaves alone
    busy: bool = False  # tdx: one SEAMCALL may answer OPERAND_BUSY without a reason that the model knows
    linux: tuple[int, int] = (6, 2)  # the kernel version of which the design speaks: kvm/versions.py
    switches: Switches = Switches()
    owners: Mapping[str, frozenset[str]] = field(default_factory=dict)
    writers: Mapping[str, frozenset[str]] = field(default_factory=dict)
    readers: Mapping[str, frozenset[str]] = field(default_factory=dict)
    inverted: frozenset[tuple[str, str]] = frozenset()
    asks_flush: bool = False
    remembers_rmp_bit: bool = False
    many: int = 1  # more invalidations in progress than can be if each is ended
    reserves: bool = False  # the design reserves xarray entries, so that a store cannot fail
    backing: Mapping[tuple[str, Gfn], Pfn] = field(init=False)

    def __post_init__(self) -> None:
        """Name the backing pages: S and P are two PFNs of a gfn, or one and the same when in-place."""
        shared = "P" if self.in_place else "S"
        pages = {
            (kind, g): f"{p}{g}" for g in self.gfns for kind, p in (("shared", shared), ("private", "P"))
        }
        object.__setattr__(self, "backing", pages)

    @property
    def converted(self) -> tuple[Gfn, ...]:
        """The gfns that the request covers; the others keep the kind of the first era."""
        return self.request or self.gfns

    @property
    def used(self) -> tuple[Gfn, ...]:
        """The gfns that the guest uses: all that lie in a memslot, but those left alone."""
        inside = (g for piece in self.pieces(self.gfns) if piece.as_id == 0 for g in piece.gfns)
        return tuple(g for g in inside if g not in self.unused)

    @property
    def large(self) -> tuple[LargePage, ...]:
        """The large pages, 2M before 1G, where memory may be mapped so."""
        return large_pages(self.gfns) if self.huge else ()

    @property
    def smm(self) -> bool:
        """Whether there is a second address space, and vCPUs that enter it."""
        return any(slot.as_id == SMM for slot in self.memslots)

    @property
    def looks_up(self) -> bool:
        """Whether it matters which memslot a fault finds."""
        return self.deletes or self.adds or self.smm

    def pieces(self, gfns: Sequence[Gfn]) -> list[Piece]:
        """The memslots that a request for `gfns` overlaps, each with its part."""
        return pieces(self.memslots or (MemSlot(self.gfns[0], len(self.gfns)),), gfns)

    @property
    def gmem(self) -> bool:
        """Whether private pages are allocated and freed in this scenario."""
        return bool(self.punch)

    @property
    def residue(self) -> bool:
        """Whether entries can stay reserved and empty."""
        return bool(self.unlucky)

    @property
    def gfn_of(self) -> Mapping[str, int]:
        """The gfn of each private PFN."""
        return {self.backing["private", g]: g for g in self.gfns}

    @property
    def tdx(self) -> bool:
        """Whether the TDX module keeps the private side."""
        return self.platform == "tdx"

    @property
    def has_rmp(self) -> bool:
        """Whether hardware keeps an ownership table."""
        return self.platform == "snp"

    @property
    def encrypts(self) -> bool:
        """Whether the C-bit selects the guest's key."""
        return self.platform in ("snp", "sev", "tdx")

    @property
    def kind_from_c_bit(self) -> bool:
        """Whether a fault's kind is the C-bit (SHARED bit) of the access; otherwise the attribute at entry."""
        return self.platform in ("snp", "tdx")

    @property
    def accesses_from_asked(self) -> bool:
        """Whether hardware stands in the way, so that a guest may try the new kind from the moment it asked."""
        return self.platform in ("snp", "tdx")

    integrity = property(lambda self: self.switches.integrity)
    partial_write_erratum = property(lambda self: self.switches.partial_write_erratum)
    rmpupdate_flushes = property(lambda self: self.switches.rmpupdate_flushes)
    rmp_checked_at = property(lambda self: self.switches.rmp_checked_at)
    identical_keeps_validated = property(lambda self: self.switches.identical_keeps_validated)
    access_sets_sizem = property(lambda self: self.switches.access_sets_sizem)
    head_4k_over_2m = property(lambda self: self.switches.head_4k_over_2m)
    preempt_count = property(lambda self: self.switches.preempt_count)

    @property
    def private_pfns(self) -> tuple[Pfn, ...]:
        """The PFNs that can be assigned to the guest."""
        return tuple(self.backing["private", g] for g in self.gfns)

    @property
    def pfns(self) -> tuple[Pfn, ...]:
        """Every backing PFN, each once."""
        return tuple(dict.fromkeys(self.backing.values()))


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
            step = getattr(instr.step, "step", instr.step)  # a lock call may be wrapped, as the last of a fault is
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
    steps = {instr.step for program in programs.values() for instr in program}
    return replace(
        conf,
        owners=frozen[0],
        writers=frozen[1],
        readers=frozen[2],
        asks_flush=flush_if_zapped in steps,
        remembers_rmp_bit=had_rmp_bit in steps,
        reserves=xa_reserve in steps,
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
        Field("failures_left", (1, 0) if conf.injects or conf.xa_fails or conf.busy else (0,)),
        Field("guest", ("ready", "new", "claimed", "accepted") if conf.correct_guest else ("ready",), gfns),
        Field("attr", ("shared", "private"), gfns),
        Field("in_progress", tuple(range(conf.many + 1))),
        Field("invalidate_range", tuple(ranges)),
        Field("flush", (False, True) if conf.asks_flush else (False,)),
        Field("memory", machine_tdx.lines(_contents(conf)) if conf.tdx else _contents(conf), pfns),
        Field("snapshot", ("none", "same", "moved"), faulting or conf.vcpus),
        Field("acc", _accesses(conf), conf.vcpus),
        Field("rmp_bit", (None, "RMP", "SIZEM") if conf.remembers_rmp_bit else (None,), conf.vcpus),
    ]
    if conf.huge:
        keys = tuple(page.key for page in conf.large)
        layout += [Field("npt_large", (None, "shared", "private"), keys), Field("mixed", (False, True), keys)]
    if conf.folio_2m:
        layout.append(Field("tlb_2m", (False, True), conf.vcpus))
    if conf.gmem:
        layout.append(Field("gmem", ("cached", "dying", "free"), gfns))
        layout.append(Field("folio_ref", (False, True), tuple(product((a for a in programs if a != "host"), gfns))))
    if conf.looks_up:
        states = ("none", "bound", "valid") if conf.adds else ("valid", "invalid", "none")[: 3 if conf.deletes else 1]
        found = tuple(state for state in states if state != "bound")
        layout += [Field("slot", states), Field("fault_slot", (None, *found), conf.vcpus)]
    if conf.smm:
        layout.append(Field("smm", (False, True), conf.vcpus))
    if conf.deletes:
        layout += [Field("srcu", (False, True), conf.vcpus), Field("grace", (False, True), conf.vcpus)]
    if conf.residue:
        layout.append(Field("reserved", (False, True), gfns))
    fields += layout
    if conf.tdx:
        fields += machine_tdx.fields(conf, tuple(programs))
    for gfn in gfns:
        pages = (None, *dict.fromkeys((conf.backing["shared", gfn], conf.backing["private", gfn])))
        pages = pages[:2] if conf.tdx else pages  # the ordinary EPT maps the shared backing only
        fields.append(Field("npt", pages, (gfn,)))
        fields.append(Field("tlb", pages, tuple((v, gfn) for v in conf.vcpus)))
        fields += [Field("npt_smm", pages, (gfn,))] if conf.smm else []
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

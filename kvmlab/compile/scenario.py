"""Scenarios: who acts, which conversion, which racing accesses; and the model that a design makes of one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..design import Design
from ..design.calls import BACKINGS, does
from ..design.rows import adds_ranges
from ..errors import InputError as InputError
from ..errors import NotApplicable as NotApplicable
from ..guest.threads import may_begin
from ..hw.memory import GUEST_KEY, PLAIN, Content, Gfn
from ..hw.tdx.lines import HOST, Line
from ..kernel.keyids import HKID
from ..kvm.memslots import SMM, MemSlot
from ..kvm.mmu import tlb_entry_vanishes
from ..machine.conf import NEIGHBOUR, PLATFORMS, TLB, Conf, Switches, build_layout, with_usage
from ..machine.out_of_sync import out_of_sync
from ..machine.properties import FATAL
from ..model.step import Actor, Instr, Model, run_step
from .programs import (
    host_program,
    inverted,
    vcpu_program,
    vmm_create_program,
    vmm_delete_program,
    vmm_program,
    vmm_punch_program,
)


@dataclass(frozen=True)
class Scenario:
    """Who acts: the kinds of the page era by era, the vCPUs that race, what the host thread writes.

    `host` is one of "neighbour", "io", "stray", "private": see "Who acts" in docs/model.md.
    """

    name: str
    title: str
    eras: tuple[str, ...]
    racers: int = 1
    host: str = "neighbour"
    correct_guest: bool = True
    gfns: tuple[int, ...] = (0,)
    request: tuple[int, ...] = ()  # the gfns that are converted, if not all
    huge: bool = False  # the gfns are one 2M page
    second_vmm: tuple[int, ...] = ()  # gfns that another VMM thread converts at the same time
    fails: bool = False  # one RMPUPDATE may fail
    stray: bool = False  # a vCPU may also write through the old kind
    auto_convert: bool = False  # the VMM converts to what was touched
    hostile: bool = False  # a careless guest that rescinds at any time, too
    folio_2m: bool = False  # guest_memfd has one 2M page for all gfns
    punch: str = ""  # the VMM discards the private page "after" or "before" the ioctl, or "free": at any time
    punched: tuple[int, ...] = ()  # the gfns that it discards "free", if not all
    xa_fails: bool = False  # one allocation of the xarray may fail
    unlucky: bool = False  # the other VMM thread's reservation fails for certain
    yields: bool = False  # a zap may yield mmu_lock
    busy: bool = False  # one SEAMCALL may find a lock taken
    deletes: bool = False  # a VMM thread deletes the memslot
    adds: bool = False  # there is no memslot until a VMM thread creates one
    memslots: tuple[MemSlot, ...] = ()  # if not one over all gfns
    unused: tuple[int, ...] = ()  # gfns that the guest leaves alone


_ALL = (
    Scenario("tiny", "to private, one racing vCPU", ("shared", "private")),
    Scenario("to-private", "to private, two racing vCPUs", ("shared", "private"), racers=2),
    Scenario("to-shared", "to shared, two racing vCPUs", ("private", "shared"), racers=2),
    Scenario(
        "round-trip", "private, shared, and private again; one racing vCPU", ("private", "shared", "private")
    ),
    Scenario(
        "round-trip-shared",
        "shared, private, and shared again; one racing vCPU",
        ("shared", "private", "shared"),
    ),
    Scenario(
        "host-io",
        "to shared; the host also writes the page while it is the host's",
        ("private", "shared"),
        host="io",
    ),
    Scenario(
        "host-stray",
        "to private and back; the host writes any page present in the directmap",
        ("shared", "private", "shared"),
        host="stray",
    ),
    Scenario(
        "host-writes-private",
        "to private; the host writes the private page itself",
        ("shared", "private"),
        host="private",
    ),
    Scenario(
        "range", "to private, two gfns in two memslots; one racing vCPU", ("shared", "private"), gfns=(0, 1),
        memslots=(MemSlot(0), MemSlot(1)),
    ),
    Scenario(
        "hole",
        "to private, three gfns, the middle one in no memslot; one racing vCPU",
        ("shared", "private"),
        gfns=(0, 1, 2),
        memslots=(MemSlot(0), MemSlot(2)),
    ),
    Scenario(
        "slot-added",
        "to private; there is no memslot until a VMM thread creates it, at any time",
        ("shared", "private"),
        adds=True,
    ),
    Scenario(
        "smm",
        "to private; vCPUs enter SMM, which has an address space and memslots of its own",
        ("shared", "private"),
        memslots=(MemSlot(0), MemSlot(0, as_id=SMM, gmem=False)),
    ),
    Scenario(
        "two-vmms",
        "to private, two gfns; another VMM thread converts one of them at the same time",
        ("shared", "private"),
        gfns=(0, 1),
        second_vmm=(1,),
    ),
    Scenario(
        "two-ranges",
        "to private, the first of three gfns; a VMM thread discards the private page of the last at any time",
        ("shared", "private"),
        gfns=(0, 1, 2),
        request=(0,),
        punch="free",
        punched=(2,),
        unused=(2,),
    ),
    Scenario(
        "auto-convert",
        "to private; the VMM answers an exit by converting to what was touched",
        ("shared", "private"),
        auto_convert=True,
    ),
    Scenario("stray-write", "to private; a vCPU also writes as if shared", ("shared", "private"), stray=True),
    Scenario(
        "huge",
        "to private, one page of a shared 2M page (of two children)",
        ("shared", "private"),
        gfns=(0, 1),
        request=(0,),
        huge=True,
    ),
    Scenario(
        "huge-1g",
        "to private, two gfns of a shared 1G page: the tail of one 2M page and the head of the next",
        ("shared", "private"),
        gfns=(0, 1, 2, 3, 4, 5),
        request=(1, 2),
        huge=True,
        unused=(2, 3, 4),
    ),
    Scenario("hook-fails", "to private; one RMPUPDATE may fail", ("shared", "private"), fails=True),
    Scenario(
        "discard",
        "to shared and back; the VMM discards the private page after the ioctl, the host then uses it",
        ("private", "shared", "private"),
        host="freed",
        punch="after",
    ),
    Scenario(
        "discard-first",
        "the same, but the VMM discards it before the ioctl, as the selftests do",
        ("private", "shared", "private"),
        host="freed",
        punch="before",
    ),
    Scenario(
        "discard-races",
        "to private, while a VMM thread discards the private page, at any time; a careless guest",
        ("shared", "private"),
        racers=0,
        host="freed",
        correct_guest=False,
        punch="free",
    ),
    Scenario(
        "huge-accept",
        "to private, both pages of one 2M guest_memfd page; the guest validates 2M",
        ("shared", "private"),
        gfns=(0, 1),
        huge=True,
        folio_2m=True,
    ),
    Scenario(
        "huge-split",
        "to shared, one page of a private 2M page, discarded afterwards",
        ("private", "shared"),
        host="freed",
        gfns=(0, 1),
        request=(0,),
        huge=True,
        folio_2m=True,
        punch="after",
    ),
    Scenario(
        "vmm-punches",
        "a careless vCPU on a private 2M page, which a VMM thread discards at any time",
        ("private",),
        racers=0,
        host="freed",
        correct_guest=False,
        gfns=(0, 1),
        huge=True,
        folio_2m=True,
        punch="free",
    ),
    Scenario(
        "zap-yields",
        "to private, two gfns; the zap may yield mmu_lock between them",
        ("shared", "private"),
        gfns=(0, 1),
        yields=True,
    ),
    Scenario(
        "xarray-full",
        "to private, two gfns; one allocation of the xarray may fail, and the VMM asks again",
        ("shared", "private"),
        gfns=(0, 1),
        xa_fails=True,
    ),
    Scenario(
        "seamcall-busy",
        "to shared and back; one SEAMCALL may answer OPERAND_BUSY",
        ("private", "shared", "private"),
        busy=True,
    ),
    Scenario(
        "slot-deleted",
        "to private; a VMM thread deletes the memslot at any time",
        ("shared", "private"),
        racers=0,
        deletes=True,
    ),
    Scenario(
        "reserve-fails",
        "to private and back, one page of a shared 2M page; another ioctl cannot reserve its entries",
        ("shared", "private", "shared"),
        racers=0,
        gfns=(0, 1),
        request=(1,),
        huge=True,
        second_vmm=(0, 1),
        unlucky=True,
    ),
    Scenario(
        "hostile",
        "private and back; vCPUs use any C-bit and rescind at any time, the VMM converts to what they touch",
        ("shared", "private", "shared"),
        correct_guest=False,
        hostile=True,
        auto_convert=True,
    ),
    Scenario(
        "careless", "to private; vCPUs use any C-bit at any time", ("shared", "private"), correct_guest=False
    ),
)
SCENARIOS = {scenario.name: scenario for scenario in _ALL}


def _host_targets(conf: Conf, host: str) -> tuple[tuple[str, str], ...]:
    private, shared = conf.backing["private", Gfn(0)], conf.backing["shared", Gfn(0)]
    more = {
        "neighbour": (),
        "io": ((shared, "io"),),
        "stray": ((private, "stray"),),
        "private": ((private, "always"),),
        "freed": tuple((pfn, "freed") for pfn in conf.private_pfns),
    }[host]
    # A 2M page of guest_memfd leaves no neighbour in its region.
    return ((NEIGHBOUR, "always"), *more) if conf.has_rmp and not conf.folio_2m else more


def find_scenario(name: str) -> Scenario:
    """Return a scenario by name; InputError names those that exist."""
    if name not in SCENARIOS:
        raise InputError(f"unknown scenario {name!r}; there are: {', '.join(SCENARIOS)}")
    return SCENARIOS[name]


def check_names(platform: str, backing: str) -> None:
    """InputError unless platform and backing exist."""
    if platform not in PLATFORMS:
        raise InputError(f"unknown platform {platform!r}; there are: {', '.join(PLATFORMS)}")
    if backing not in BACKINGS:
        raise InputError(f"unknown backing {backing!r}; there are: {', '.join(BACKINGS)}")


def build(
    design: Design,
    scenario: Scenario,
    platform: str = "snp",
    backing: str = "split",
    switches: Switches | None = None,
) -> Model:
    """Make the model of `design` in `scenario`.

    NotApplicable when the design has no such case; InputError for a platform or backing that does not exist.
    """
    check_names(platform, backing)
    if design.backing not in (None, backing):
        raise NotApplicable(f"{design.name} is a design for {design.backing} backing")
    if reason := _absent(scenario, platform, backing):
        raise NotApplicable(reason)
    rows = design.rows("ioctl", to="private", platform=platform)
    if scenario.unlucky and not any(does(row.call, "reserves") for row in rows):
        raise NotApplicable(f"{design.name} reserves nothing")
    faults = design.rows("fault", to="private", platform=platform)
    roles = ("looks up", "asks the slot")
    if scenario.deletes and not any(does(row.call, role) for row in faults for role in roles):
        raise NotApplicable(f"the fault path of {design.name} does not look at the memslot")
    if SMM in {slot.as_id for slot in scenario.memslots} and adds_ranges(rows):
        raise NotApplicable("since v6.8 a VM with private memory has one address space")
    model = _bare(design, scenario, platform, backing, switches or Switches())
    if scenario.eras[0] == "private":
        model = replace(model, initial=model.layout.pack(_private_start(design, scenario, model)))
    return model


def _absent(scenario: Scenario, platform: str, backing: str) -> str | None:
    """Why this scenario has no case on a platform or backing, or None if it has one."""
    if scenario.huge and backing == "in-place":
        return "guest_memfd gives 4K folios, so in-place there is no 2M page to map"
    if platform == "tdx" and scenario.huge:
        return "KVM maps private memory of a TD in 4K pages only"
    if platform == "tdx" and scenario.fails:
        return "there is no RMPUPDATE to fail on tdx"
    if platform in ("snp", "tdx") and SMM in {slot.as_id for slot in scenario.memslots}:
        return f"a guest on {platform} has no SMM"
    if scenario.busy and platform != "tdx":
        return f"there are no SEAMCALLs on {platform}"
    if scenario.punch and backing == "in-place":
        return "in-place one page serves both kinds, so nothing is discarded"
    if platform in ("snp", "tdx"):
        return None
    if scenario.folio_2m:
        return f"on {platform} no RMP entry has a size"
    if scenario.fails:
        return f"there is no RMPUPDATE to fail on {platform}"
    if scenario.host == "stray":
        return f"nothing unmaps the directmap on {platform}"
    if scenario.host == "private" and platform == "sw":
        return "user space cannot map guest_memfd's private page"
    return None


def _gfns(numbers: tuple[int, ...]) -> tuple[Gfn, ...]:
    """A scenario is written in plain numbers; from here on they are gfns."""
    return tuple(map(Gfn, numbers))


def _bare(design: Design, scenario: Scenario, platform: str, backing: str, switches: Switches) -> Model:
    vcpus = tuple(f"CPU{n}" for n in range(scenario.racers + 1))
    conf = Conf(
        platform,
        backing == "in-place",
        _gfns(scenario.gfns),
        scenario.eras,
        vcpus[0],
        vcpus,
        scenario.correct_guest,
        ioctls=2 if scenario.second_vmm else 1,
        injects=scenario.fails,
        huge=scenario.huge,
        request=_gfns(scenario.request),
        stray=scenario.stray,
        auto_convert=scenario.auto_convert,
        hostile=scenario.hostile,
        folio_2m=scenario.folio_2m,
        punch=scenario.punch,
        punched=_gfns(scenario.punched),
        xa_fails=scenario.xa_fails,
        unlucky="VMM1" if scenario.unlucky else "",
        yields=scenario.yields,
        busy=scenario.busy,
        deletes=scenario.deletes,
        adds=scenario.adds,
        memslots=scenario.memslots,
        unused=_gfns(scenario.unused),
        linux=design.version,
        switches=switches,
    )
    nests: set[tuple[str, str]] = set()
    programs = {}
    for cpu in vcpus:
        programs[cpu], more = vcpu_program(design, conf, asks=cpu == conf.asker)
        nests |= more
    if scenario.second_vmm:
        programs["VMM1"], more = vmm_program(design, conf, _gfns(scenario.second_vmm))
        nests |= more
    if scenario.punch == "free":
        programs["VMM1"], more = vmm_punch_program(design, conf)
        nests |= more
    if scenario.deletes:
        programs["VMM1"], more = vmm_delete_program(design, conf)
        nests |= more
    if scenario.adds:
        programs["VMM1"], more = vmm_create_program(design, conf)
        nests |= more
    if targets := _host_targets(conf, scenario.host):
        programs["host"] = host_program(targets)
    conf = replace(with_usage(conf, programs), inverted=inverted(nests))
    layout = build_layout(conf, programs)
    start: dict[Any, Any] = {}
    if scenario.eras[0] == "shared":
        written: Any = Content("guest", PLAIN, 0)
        if conf.tdx:
            written = Line(written, dirty=((HOST, written),))
            if conf.in_place:
                start = {("uptodate", gfn): True for gfn in conf.gfns}
        inside = [gfn for piece in conf.pieces(conf.gfns) for gfn in piece.gfns]  # in a hole there is no memory
        start |= {("memory", conf.backing["shared", gfn]): written for gfn in inside}
    if scenario.adds:  # nobody has used what is not there
        start = {("guest", gfn): "accepted" for gfn in conf.gfns}
    asks = "asks for the conversion" if len(conf.eras) > 1 else "vCPU"
    roles = {conf.asker: asks, "host": "kernel thread", "VMM1": "VMM thread"}
    actors = tuple(Actor(key, roles.get(key, "vCPU"), program) for key, program in programs.items())
    title = f"{design.name} on {platform}, {scenario.name}, {backing}"
    return Model(layout, actors, layout.pack(start), conf, FATAL, out_of_sync, title)


def with_forgetful_tlbs(model: Model) -> Model:
    """The same model, in which any TLB entry may vanish at any time.

    Only `Always` asks for it: what a run cannot avoid must not hang on an entry that stays.  Its states are packed
    like those of `model`, and include them.
    """
    vanishes = Instr(tlb_entry_vanishes, next=0, idle=True, text="drops a TLB entry", section="guest")
    return replace(model, actors=(*model.actors, Actor(TLB, "hardware", (vanishes,))))


def _private_start(design: Design, scenario: Scenario, model: Model) -> dict[Any, Any]:
    """Where the design's own conversion to private, run alone, leaves the machine: accepted and written."""
    conf: Conf = model.conf
    backing = "in-place" if conf.in_place else "split"
    solo = Scenario(
        "alone", "", ("shared", "private"), racers=0, gfns=scenario.gfns, huge=scenario.folio_2m,
        folio_2m=scenario.folio_2m,
    )  # fmt: skip
    alone = _bare(design, solo, conf.platform, backing, conf.switches)
    pc = alone.layout.cell("pc", conf.asker)
    x = alone.initial
    seen: set[int] = set()
    while not _has_its_pages(alone, x):
        view, enabled = run_step(alone, alone.actors[0], pc, x, _towards_a_write(alone, x))
        if x in seen or not enabled or FATAL & set(view.violations):
            raise NotApplicable(f"{design.name} alone never gives the guest a private page to start from")
        seen.add(x)
        x = view.after
    now = alone.layout.unpack(x)
    if any(now["attr", gfn] != "private" for gfn in conf.gfns):
        raise NotApplicable(f"{design.name} alone leaves the page shared")
    families = ("rmp", "directmap", "attr", "sept", "mirror", "pamt", "uptodate")
    tables = ("directmap_2m", "sept_table", "mirror_table")
    keep = {k: v for k, v in now.items() if k in tables or (isinstance(k, tuple) and k[0] in families)}
    written: Any = Content("guest", GUEST_KEY if conf.encrypts else PLAIN, 0)
    if conf.tdx:
        written = Line(written, HKID, dirty=((HKID, written),))
    return keep | {("memory", conf.backing["private", gfn]): written for gfn in conf.gfns}


def _has_its_pages(model: Model, x: int) -> bool:
    """Whether the asking vCPU, alone, is back in the guest and has written every page."""
    now = model.layout.unpack(x)
    idle = model.actors[0].program[now["pc", model.conf.asker]].idle
    ready = all(now["guest", gfn] == "ready" for gfn in model.conf.gfns)
    return bool(idle and now["era"] and not now["running"] and ready)


def _towards_a_write(model: Model, x: int) -> tuple[int, ...]:
    """The choice that brings a page nearer to its first write, where the guest may choose."""
    now = model.layout.unpack(x)
    if not model.actors[0].program[now["pc", model.conf.asker]].idle:
        return ()
    offered = [a for gfn in model.conf.gfns for a in may_begin(model.view(x), gfn)]
    wanted = (n for n, a in enumerate(offered) if a.op != "read" and now["guest", a.gfn] != "ready")
    return (next(wanted, 0),)

"""A model: the machine that a scenario asks for, with the programs that a design's text makes of its threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..design import Design
from ..design.calls import BACKINGS, does
from ..design.rows import adds_ranges
from ..errors import InputError, NotApplicable
from ..guest.threads import may_begin
from ..hw.memory import GUEST_KEY, PLAIN, Content, Gfn
from ..hw.tdx.lines import HOST, Line
from ..kernel.failures import RMPUPDATE, SEAMCALL
from ..kernel.keyids import HKID
from ..kvm.mmu import tlb_entry_vanishes
from ..machine.cells import build_layout, with_usage
from ..machine.conf import ADDS, FOLIO_2M, NEIGHBOUR, PLATFORMS, TLB, Conf, Switches
from ..machine.out_of_sync import OutOfSync
from ..machine.parts import PARTS
from ..machine.properties import FATAL
from ..machine.scenario import (
    ANY_TIME,
    Converts,
    CreatesMemslot,
    DeletesMemslot,
    Discards,
    HostWrites,
    Scenario,
)
from ..model.step import Actor, Instr, Model, run_step
from .programs import (
    Program,
    host_program,
    inverted,
    vcpu_program,
    vmm_create_program,
    vmm_delete_program,
    vmm_program,
    vmm_punch_program,
)


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
    for reason in (*_not_here(scenario, platform, backing), *_not_with(design, scenario, platform)):
        raise NotApplicable(reason)
    model = _bare(design, scenario, platform, backing, switches or Switches())
    if scenario.eras[0] == "private":
        model = replace(model, initial=model.layout.pack(_private_start(design, scenario, model)))
    return model


def _not_here(scenario: Scenario, platform: str, backing: str) -> Iterator[str]:
    """Why a scenario has no case on a platform or backing."""
    writes = {thread.what for thread in scenario.threads if isinstance(thread, HostWrites)}
    if scenario.huge and backing == "in-place":
        yield "guest_memfd gives 4K folios, so in-place there is no 2M page to map"
    if platform == "tdx" and scenario.huge:
        yield "KVM maps private memory of a TD in 4K pages only"
    if platform in ("snp", "tdx") and scenario.smm:
        yield f"a guest on {platform} has no SMM"
    if SEAMCALL in scenario.may and platform != "tdx":
        yield f"there are no SEAMCALLs on {platform}"
    if backing == "in-place" and any(isinstance(thread, Discards) for thread in scenario.threads):
        yield "in-place one page serves both kinds, so nothing is discarded"
    if platform in ("sev", "sw") and scenario.folio_2m:
        yield f"on {platform} no RMP entry has a size"
    if platform != "snp" and RMPUPDATE in scenario.may:
        yield f"there is no RMPUPDATE to fail on {platform}"
    if platform in ("sev", "sw") and "stray" in writes:
        yield f"nothing unmaps the directmap on {platform}"
    if platform == "sw" and "private" in writes:
        yield "user space cannot map guest_memfd's private page"
    if scenario.eras[0] == "private" and ADDS in scenario.parts:
        yield "a guest that starts with a private page has memory already"


def _not_with(design: Design, scenario: Scenario, platform: str) -> Iterator[str]:
    """Why a design has nothing to show in a scenario."""
    rows = design.rows("ioctl", to="private", platform=platform)
    faults = design.rows("fault", to="private", platform=platform)
    refused = any(isinstance(thread, Converts) and thread.refused for thread in scenario.threads)
    if refused and not any(does(row.call, "reserves") for row in rows):
        yield f"{design.name} reserves nothing"
    deletes = any(isinstance(thread, DeletesMemslot) for thread in scenario.threads)
    if deletes and not any(does(row.call, role) for row in faults for role in ("looks up", "asks the slot")):
        yield f"the fault path of {design.name} does not look at the memslot"
    if scenario.smm and adds_ranges(rows):
        yield "since v6.8 a VM with private memory has one address space"


def _host_targets(conf: Conf, scenario: Scenario) -> tuple[tuple[str, str], ...]:
    """What the host's thread writes: PFNs, each with when it may.  A 2M guest_memfd page leaves no neighbour."""
    private, shared = conf.backing["private", Gfn(0)], conf.backing["shared", Gfn(0)]
    of = {
        "io": ((shared, "io"),),
        "stray": ((private, "stray"),),
        "private": ((private, "always"),),
        "freed": tuple((pfn, "freed") for pfn in conf.private_pfns),
    }
    always = ((NEIGHBOUR, "always"),) if conf.has_rmp and not conf.folio_2m else ()
    more = [of[thread.what] for thread in scenario.threads if isinstance(thread, HostWrites)]
    return tuple(dict.fromkeys(sum(more, always)))


def _vmm_threads(design: Design, scenario: Scenario, conf: Conf) -> Iterator[Program]:
    """The programs of the VMM threads beside the asking one."""
    discards = tuple(thread for thread in scenario.threads if isinstance(thread, Discards))
    for thread in scenario.threads:
        if isinstance(thread, Converts):
            yield vmm_program(design, conf, _gfns(thread.gfns), discards, thread.refused)
        elif isinstance(thread, Discards) and thread.when == ANY_TIME:
            yield vmm_punch_program(design, conf, _gfns(thread.gfns) or conf.gfns)
        elif isinstance(thread, DeletesMemslot):
            yield vmm_delete_program(design, conf)
        elif isinstance(thread, CreatesMemslot):
            yield vmm_create_program(design, conf)


def _gfns(numbers: tuple[int, ...]) -> tuple[Gfn, ...]:
    """Numbers of pages, as a scenario gives them."""
    return tuple(map(Gfn, numbers))


def _bare(design: Design, scenario: Scenario, platform: str, backing: str, switches: Switches) -> Model:
    """The model, with every page as the host gives it."""
    vcpus = tuple(f"CPU{n}" for n in range(scenario.racers + 1))
    conf = Conf(
        platform, backing == "in-place", _gfns(scenario.gfns), scenario.eras, vcpus[0], vcpus, scenario.correct_guest,
        ioctls=1 + sum(isinstance(thread, Converts) for thread in scenario.threads), parts=scenario.parts,
        request=_gfns(scenario.request), stray=scenario.stray, auto_convert=scenario.auto_convert,
        hostile=scenario.hostile, memslots=scenario.memslots, unused=_gfns(scenario.unused), linux=design.version,
        switches=switches, large_shared=FOLIO_2M not in scenario.parts,  # guest_memfd alone, or shared memory alone
    )  # fmt: skip
    discards = tuple(thread for thread in scenario.threads if isinstance(thread, Discards))
    threads = {cpu: vcpu_program(design, conf, cpu == conf.asker, discards) for cpu in vcpus}
    others = enumerate(_vmm_threads(design, scenario, conf), start=1)
    threads |= {f"VMM{n}": program for n, program in others}
    if targets := _host_targets(conf, scenario):
        threads["host"] = host_program(targets)
    programs = {key: thread.instrs for key, thread in threads.items()}
    nests = frozenset[tuple[str, str]]().union(*(thread.nests for thread in threads.values()))
    conf = replace(with_usage(conf, programs), inverted=inverted(nests))
    layout = build_layout(conf, programs)
    start: dict[Any, Any] = {}
    if scenario.eras[0] == "shared":
        written: Any = Content("guest", PLAIN, 0)
        if conf.tdx:
            written = Line(written, dirty=((HOST, written),))
            if conf.in_place:
                start = {("uptodate", gfn): True for gfn in conf.gfns}
        inside = [
            gfn for piece in conf.pieces(conf.gfns) for gfn in piece.gfns
        ]  # in a hole there is no memory
        start |= {("memory", conf.backing["shared", gfn]): written for gfn in inside}
    if ADDS in conf.parts:  # nobody has used what is not there
        start = {("guest", gfn): "accepted" for gfn in conf.gfns}
    asks = "asks for the conversion" if len(conf.eras) > 1 else "vCPU"
    roles = {conf.asker: asks, "host": "kernel thread"}
    kinds = {key: roles.get(key, "VMM thread" if key.startswith("VMM") else "vCPU") for key in programs}
    actors = tuple(Actor(key, kinds[key], program) for key, program in programs.items())
    title = f"{design.name} on {platform}, {scenario.name}, {backing}"
    quiet = OutOfSync(tuple(part.quiet for part in PARTS if part.quiet and part.name in conf.parts))
    return Model(layout, actors, layout.pack(start), conf, FATAL, quiet, title)


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

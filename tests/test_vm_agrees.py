"""The emulator's one run ends where the explorer says that such a run may end: the same programs, two guests."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_any_design import statement

from kvmlab.compile.build import build
from kvmlab.design import Design, DesignError, shipped
from kvmlab.emulator import Deadlock, GuestSpins, KernelBug, PlatformError, RmpFault, VcFault, Vm, VmError
from kvmlab.errors import NotApplicable
from kvmlab.explore import liveness, rows
from kvmlab.kernel.directmap import ABSENT
from kvmlab.kvm.mmu import large_leaf, leaf
from kvmlab.machine.properties import FATAL
from kvmlab.machine.scenario import Discards, HostWrites, Scenario
from kvmlab.model.state import View
from kvmlab.verdict.report import as_design

P = 4096
LARGE = [
    name
    for name in (*shipped("thread"), *shipped("variant"))
    if "zap" not in name and name != "gmem-in-place"
]
THERE, BACK = ("shared", "private"), ("shared", "private", "shared")
AGAIN = (*BACK, "private")


def property_of(wrong: Any) -> str:
    """The property that the explorer charges for what ends a run of the emulator."""
    if isinstance(wrong, GuestSpins):  # an exit that is answered by running again is a dead guest, not a loop
        return "guest-killed" if "userspace re-enters" in wrong.why else "livelock"
    if isinstance(wrong, Deadlock) and "to be freed" in str(wrong):  # a page that a punch never gives back
        return "deadlock"
    return {
        KernelBug: "kernel-bug",
        RmpFault: "host-rmp-fault",
        PlatformError: "platform-error",
        VcFault: "guest-killed",
        Deadlock: "lock-misuse",
    }[type(wrong)]


class Explored:
    """One vCPU alone: how the machine may look when all is quiet, and what may go wrong."""

    def __init__(
        self, design: str, platform: str, backing: str, eras: tuple[str, ...], discard: str | None = None
    ) -> None:
        discards = (Discards(discard),) if discard else ()
        scenario = Scenario("alone", "", eras, racers=0, threads=discards)
        self.model = build(as_design(design), scenario, platform, backing)
        self.graph = rows.search(self.model)
        self.violated = {name for name, hits in self.graph.hits.items() if hits}
        if liveness.livelock(self.graph):
            self.violated.add("livelock")
        quiet = (self.model.view(self.graph.packed(i)) for i, q in enumerate(self.graph.quiet) if q)
        self.ends = {self._end(s) for s in quiet if s.era == len(eras) - 1 and s.guest[0] == "ready"}

    def _end(self, s: View) -> tuple[Any, ...]:
        pfn = s.conf.backing["private", 0]
        mapped = {None: None, s.conf.backing["shared", 0]: "S", pfn: "P"}[leaf(s, 0)]
        mapped = "P" if s.conf.in_place and mapped else mapped
        entry = s.rmp[pfn] if s.conf.has_rmp else None
        direct = (s.directmap[pfn] == ABSENT, not s.directmap_2m) if s.conf.has_rmp else (False, False)
        page = s.gmem[0] == "cached"
        return (
            s.attr[0],
            mapped,
            bool(entry and entry.assigned),
            bool(entry and entry.validated),
            *direct,
            page,
        )


def emulated(
    design: Design | str, platform: str, backing: str, eras: tuple[str, ...], discard: str = "none"
) -> tuple[tuple[Any, ...] | None, set[str]]:
    """The same of the emulator's run, None if it never ends; and what went wrong in it."""
    vm, bad = Vm(platform, 1, design, backing, vmm="rerun", discard=discard), set()
    guest = vm.guest()
    vm.host.discard = lambda gpa, size: None  # the explorer's VMM discards the private page only
    vm.gmem.allocate(0, P)  # as in the explorer's first state
    try:
        guest.set_memory_encrypted(0, P)
        guest.write(0, b"private")
        if eras != THERE:
            guest.set_memory_decrypted(0, P)
            guest.write(0, b"again")
        if eras == AGAIN:
            guest.set_memory_encrypted(0, P)
            guest.write(0, b"and again")
    except VmError as wrong:
        return None, {property_of(wrong)} | {name for name, _ in vm.violations}
    bad |= {name for name, _ in vm.violations}
    pfn = vm.pfn(0, True)
    npt = int(vm.mmu.leaves(0, 1)[0])
    mapped = None if not npt else "P" if (npt >> 1) - 1 == pfn else "S"
    entry = vm.rmp_entry(pfn)
    direct = bool(vm.directmap.absent[pfn]), bool(vm.directmap.split[pfn // 512])
    attr = "private" if vm.attributes.is_private(0) else "shared"
    page = discard == "none" or bool(vm.gmem.present[0])
    return (attr, mapped, entry.assigned, entry.validated, *direct, page), bad


def exists(name: str, backing: str) -> bool:
    return Design.load(name).backing in (None, backing)


KINDS_OF_RUN = [
    ("snp", "split", THERE), ("snp", "split", BACK), ("snp", "split", AGAIN, "after"),
    ("snp", "split", BACK, "before"), ("snp", "in-place", BACK), ("sev", "split", BACK), ("sev", "in-place", THERE),
    ("sw", "split", AGAIN, "before"),
]  # fmt: skip


@pytest.mark.parametrize(
    "kind", KINDS_OF_RUN, ids=lambda kind: "-".join([*kind[:2], *kind[2][1:], *kind[3:]])
)
def test_one_run_of_any_design_leaves_what_the_explorer_reaches(kind: Any) -> None:
    wrong = []
    for name in shipped("all"):
        if name.startswith("tdx-") or not exists(name, kind[1]):
            continue
        explored, (end, bad) = Explored(name, *kind), emulated(name, *kind)
        if not (bad <= explored.violated and (end is None or end in explored.ends)):
            wrong.append((name, end, bad))
    assert wrong == []


# Texts near those that ship: a statement left out, moved, or put in.


def statements(text: list[str], section: str) -> list[int]:
    """Where the statements of a section stand that are in no other."""
    lines = range(text.index(f"{section}:") + 1, len(text))
    own = takewhile(lambda i: not text[i] or text[i].startswith(" "), lines)
    return [i for i in own if text[i].startswith("    ") and text[i][4] != " "]


@st.composite
def neighbours(draw: Any) -> Any:
    base = Design.load(draw(st.sampled_from([name for name in LARGE if exists(name, "split")])))
    text = base.canonical().partition("\nexpect")[0].splitlines()
    for _ in range(draw(st.integers(1, 3))):
        section = draw(st.sampled_from(["ioctl", "fault", "punch"]))
        if not (places := statements(text, section)):
            continue
        at, to = draw(st.sampled_from(places)), draw(st.sampled_from(places))
        how = draw(st.sampled_from(["leave out", "move", "put in"]))
        if how == "put in":
            text[at:at] = draw(statement(section).filter(lambda line: "range_add" not in line)).splitlines()
            continue
        line = text.pop(at)
        text[to:to] = [line] * (how == "move")
    return "\n".join(text) + "\n"


KINDS = [(THERE, None), (BACK, None), (AGAIN, None), (AGAIN, "after"), (BACK, "before")]


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(neighbours(), st.sampled_from(["snp", "snp", "sw", "sev"]), st.sampled_from(KINDS))
def test_a_text_near_one_that_ships_ends_alike_in_both(
    text: str, platform: str, kind: tuple[tuple[str, ...], str | None]
) -> None:
    eras, discard = kind
    try:
        explored = Explored(text, platform, "split", eras, discard)
    except (DesignError, NotApplicable):
        return
    end, bad = emulated(Design.parse(text), platform, "split", eras, discard or "none")
    assert (bad & FATAL or bad) <= explored.violated
    assert end is None or end in explored.ends


# A 2M page of guest_memfd: two children here, 512 there; the second one stands for all others.

ACCEPT = Scenario("accept", "", THERE, racers=0, gfns=(0, 1), huge=True, folio_2m=True)
SPLIT = Scenario("split", "", ("private", "shared"), racers=0, gfns=(0, 1), request=(0,), huge=True, folio_2m=True,
                 threads=(Discards("after"), HostWrites("freed")))  # fmt: skip
M2 = 1 << 21


def large_ends(design: str, scenario: Scenario) -> set[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Each child's attribute, leaf, and RMP entry, in the states in which all is quiet and both are used."""
    model = build(Design.load(design), scenario)
    graph = rows.search(model)

    def child(s: Any, gfn: Any) -> Any:
        pfn = s.conf.backing["private", gfn]
        mapped = {None: None, pfn: "P"}.get(leaf(s, gfn), "S")
        entry = s.rmp[pfn]
        return (
            s.attr[gfn],
            mapped,
            large_leaf(s, gfn) is not None,
            entry.assigned,
            entry.size,
            entry.validated,
        )

    quiet = (model.view(graph.packed(i)) for i, q in enumerate(graph.quiet) if q)
    last = len(scenario.eras) - 1
    return {
        (child(s, 0), child(s, 1)) for s in quiet if s.era == last and {s.guest[0], s.guest[1]} == {"ready"}
    }


def large_run(design: str, splits: bool) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The same of a 2M page in the emulator, for its first and its second 4K."""
    vm = Vm("snp", 512, design, private_2m=True, discard="after" if splits else "none")
    guest = vm.guest()
    vm.host.discard = lambda gpa, size: None
    vm.gmem.allocate(0, M2)
    guest.set_memory_encrypted(0, M2)
    guest.write(0, b"first")
    guest.write(P, b"second")
    if splits:
        guest.set_memory_decrypted(0, P)
        guest.write(0, b"first")
        guest.write(P, b"second")

    def child(gfn: Any) -> Any:
        pfn, npt = vm.pfn(gfn * P, True), int(vm.mmu.leaves(gfn, gfn + 1)[0])
        mapped = None if not npt else "P" if (npt >> 1) - 1 == pfn else "S"
        entry = vm.rmp_entry(pfn)
        attr = "private" if vm.attributes.is_private(gfn) else "shared"
        return attr, mapped, bool(npt & 1), entry.assigned, entry.size, entry.validated

    return child(0), child(1)


@pytest.mark.parametrize("splits", [False, True])
def test_a_2m_page_ends_as_the_explorer_s_does(splits: bool) -> None:
    scenario = SPLIT if splits else ACCEPT
    assert [design for design in LARGE if large_run(design, splits) not in large_ends(design, scenario)] == []


def test_the_comparison_finds_a_difference_where_there_is_one() -> None:
    explored = Explored("upstream", "snp", "split", THERE)
    assert emulated("v8-post-hook", "snp", "split", THERE)[0] not in explored.ends

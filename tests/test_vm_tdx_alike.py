"""tdx: ranges, requests and zaps run as one do what they do one by one: state, bytes, TLBs, epochs and counts."""

from __future__ import annotations

import random
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from test_vm_selftests import G4, M2, RANGES, SIZE, Conversions

from kvmlab.design import shipped
from kvmlab.emulator import KernelBug, SetMemoryFailed, Vm, VmError, alike, calls, walk
from kvmlab.emulator.columns import Column
from kvmlab.emulator.costs import ACCEPT_SECONDS, REMOVAL_SECONDS
from kvmlab.emulator.workloads import Load, boot

P, PAGES = 4096, 2 * 512 + 100


def play(seed: int, design: str = "upstream", **more: int | str) -> tuple[Vm, list[str]]:
    """A program of guest and host operations over much memory at a time; errors are part of what it does."""
    rng, said = random.Random(seed), []
    vm = Vm("tdx", PAGES, design, **more)
    for _ in range(12):
        guest = vm.guest(rng.randrange(len(vm.tdx.vcpus)))
        lo = rng.choice([0, 0, 1, 512, rng.randrange(PAGES)])
        gpa, size = lo * P, rng.choice([PAGES - lo, rng.randrange(1, PAGES - lo + 1)]) * P
        private = rng.random() < 0.5
        calls: list[Any] = [
            guest.set_memory_encrypted,
            guest.set_memory_encrypted,
            guest.set_memory_decrypted,
            guest.set_memory_decrypted,
            lambda a, s, to=private: vm.set_memory_attributes(a, s, to),
            lambda a, s, g=guest: g.accept_range(a, s),
            lambda a, s, g=guest, to=private: g.page_state_change(a, s, to),
            lambda a, s, g=guest: g.touch(a, s),
            lambda a, s, g=guest: g.write(a + s - 9, b"x" * 9),
            lambda a, s: vm.gmem.punch_hole(a, s),
        ]
        try:
            rng.choice(calls)(gpa, size)
            said.append("ok")
        except VmError as wrong:
            said.append(str(wrong))
            vm.tdx.dead = ""  # go on, or most programs would be short
    return vm, said


def state(vm: Vm) -> tuple[Any, ...]:
    n, module = vm.next_pfn, vm.tdx.module
    return (
        module.states(0, PAGES).tolist(), module.hpa[:PAGES].tolist(), vm.tdx.mirror_of(0, PAGES).tolist(),
        module.pamt[:n].tolist(), module.bepoch[:n].tolist(), module.epochs, sorted(module.table_at.items()),
        vm.attributes.get(0, PAGES).tolist(), vm.mmu.leaves(0, PAGES).tolist(), vm.resident(), vm.mmu.seq,
        {p: bytes(vm.tdx.memory.plain[p]) for p in vm.tdx.memory.plain if any(vm.tdx.memory.plain[p])},
        vm.tdx.memory.owner[:n].tolist(), {p: tuple(lines) for p, lines in vm.tdx.memory.lines.items()},
        [list(tlb.leaves.items()) for tlb in vm.mmu.tlbs],
        [(v.mode, v.epoch, list(v.tlb.leaves.items())) for v in vm.tdx.vcpus], vm.violations,
    )  # fmt: skip


def one_unit(call: calls.Call, column: Column) -> int:
    """A unit of leaves that are done together, and no more: what `Call._alike` says when nothing is run as one."""
    return min(call.vm.zap_batch, column.leading())


KINDS = [{}, {"vcpus": 3}, {"zap_batch": 8}, {"zap_batch": 100}, {"discard": "after"}, {"shared_2m": True}]


def compare(
    seed: int, monkeypatch: pytest.MonkeyPatch, patches: list[tuple[Any, str, Any]], **more: int | str
) -> None:
    many, said = play(seed, **more)
    with monkeypatch.context() as one_by_one:
        for where, name, value in patches:
            one_by_one.setattr(where, name, value)
        single, said_single = play(seed, **more)
    assert said == said_single
    assert many.counters == single.counters
    assert state(many) == state(single)


@pytest.mark.parametrize("more", KINDS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_requests_alike_do_as_one_what_they_do_one_by_one(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], seed: int
) -> None:
    compare(seed, monkeypatch, [(alike, "MOST", 1)], **more)


@pytest.mark.parametrize("more", KINDS, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_zapped_leaves_alike_do_as_one_what_they_do_one_by_one(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], seed: int
) -> None:
    patches = [(alike, "MOST", 1), (calls.Call, "_alike", one_unit)]
    compare(10 + seed, monkeypatch, patches, **more)


@pytest.mark.parametrize("seed", range(3))
def test_runs_of_pages_do_what_single_pages_do(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    patches = [(alike, "MOST", 1), (walk, "SMALLEST", 1), (walk, "LARGEST", 1)]
    compare(20 + seed, monkeypatch, patches)


def test_so_they_do_in_every_design(monkeypatch: pytest.MonkeyPatch) -> None:
    patches: list[tuple[Any, str, Any]] = [(alike, "MOST", 1), (calls.Call, "_alike", one_unit)]
    planted = ("tdx-no-track", "tdx-no-kick", "tdx-no-remove", "tdx-kick-first", "tdx-no-clear")
    for design in (*planted, *shipped()):
        compare(31, monkeypatch, patches, design=design, vcpus=2)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_the_mirror_is_the_secure_ept_and_the_pamt_knows_its_pages(seed: int) -> None:
    vm, _ = play(40 + seed, vcpus=2)
    module, mirror = vm.tdx.module, vm.tdx.mirror_of(0, PAGES)
    there = module.states(0, PAGES) != 0
    assert (there == (mirror != 0)).all() and (module.hpa[:PAGES][there] + 1 == mirror[there]).all()
    owned = {int(pfn) for pfn in module.hpa[:PAGES][there]}
    assert {pfn for pfn in range(vm.next_pfn) if module.pamt[pfn] == 3} == owned
    assert not vm.threads and vm.mmu.in_progress == 0


# What the selftest does, as far as a TD can: its explicit conversions, with ACCEPT after each


class TdConversions(Conversions):
    def map_gpa(
        self, at: int, size: int, private: bool, attributes: Any = True, fallocate: bool = False
    ) -> None:
        super().map_gpa(at, size, private, False, fallocate)
        base = self.base + at
        if private:
            self.guest.set_memory_encrypted(base, size)
        else:
            self.guest.set_memory_decrypted(base, size)


@pytest.mark.parametrize(("vcpus", "memslots"), [(1, 1), (2, 2)])
def test_private_mem_conversions_test_explicit_half_on_a_td(vcpus: int, memslots: int) -> None:
    part = SIZE * vcpus // memslots
    vm = Vm("tdx", slots=[(G4 + i * part, part) for i in range(memslots)], vcpus=vcpus, vmm="kill")
    threads = [TdConversions(vm, i, G4 + i * SIZE) for i in range(vcpus)]
    runs = [t.explicit_conversion(f) for t in threads for f in (False, True)]
    for _ in zip_longest(*runs[::2]):
        pass
    for _ in zip_longest(*runs[1::2]):
        pass
    assert not vm.violations and vm.counters["TDH.MEM.PAGE.REMOVE"] and len(RANGES) == 5 and M2 < SIZE


# A boot-like load


def load(design: str = "upstream", **more: int) -> Load:
    return boot(Vm("tdx", 64 << 8, design, **more), bounce=8 << 20, scattered=32)


def test_every_page_is_one_fault_one_aug_and_one_accept() -> None:
    phase = load().phases["accept"]
    assert phase["ept-violation"] == phase["TDH.MEM.PAGE.AUG"] == 64 << 8
    assert phase["TDG.MEM.PAGE.ACCEPT"] == (64 << 8) + 32


def test_each_private_page_that_goes_shared_is_removed_and_costs_a_track_and_a_kick() -> None:
    total = load().total
    assert total["TDH.MEM.PAGE.REMOVE"] == total["TDH.MEM.TRACK"] == total["kick"] == 2048 + 32


def test_in_batches_the_bounce_buffer_costs_as_many_tracks_as_batches() -> None:
    phases = load(zap_batch=512).phases
    assert phases["bounce buffer"]["TDH.MEM.TRACK"] == 4 and phases["scattered 4K"]["TDH.MEM.TRACK"] == 32


def test_on_tdx_all_orderings_of_the_thread_issue_the_same_seamcalls() -> None:
    totals = {d: load(d).total for d in ("upstream", "v8-post-hook", "set-mem-attr-op", "defer-to-fault")}
    seamcalls = {d: {k: n for k, n in t.items() if k.startswith("TDH.MEM")} for d, t in totals.items()}
    assert len({str(sorted(s.items())) for s in seamcalls.values()}) == 1


def test_without_a_zap_the_way_back_finds_the_page_accepted_already() -> None:
    with pytest.raises(SetMemoryFailed, match="PAGE_ALREADY_ACCEPTED"):
        load("no-zap")


def test_a_design_that_unmaps_the_direct_map_first_oopses_at_the_first_page() -> None:
    with pytest.raises(KernelBug, match="tdx_clflush_page"):
        load("pre-post-directmap")


def test_the_cost_says_what_is_published_and_for_whom() -> None:
    cost = load(vcpus=30).cost
    assert cost.vcpus == 32 and cost.removal_seconds == pytest.approx(2080 * REMOVAL_SECONDS[32])
    assert cost.accept_seconds == pytest.approx(((64 << 8) + 32) * ACCEPT_SECONDS)
    assert "kick-ipi" in cost.unknown and "us a page, 32 idle vCPUs" in cost.text()


def test_16_gib_are_accepted_and_converted_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    column = calls.Call._column

    def noted(*a: Any) -> Any:
        steps.append(a)
        return column(*a)

    monkeypatch.setattr(calls.Call, "_column", noted)
    vm = Vm("tdx", 4 << 20, private=True)
    vm.guest().accept_range(0, 16 << 30)
    vm.guest().set_memory_decrypted(0, 16 << 30)
    assert vm.counters["TDH.MEM.PAGE.REMOVE"] == 4 << 20 and len(steps) < 200


def test_the_tdx_example_in_the_docs_runs_as_it_says(root: Path) -> None:
    text = (root / "docs/emulator.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(text.partition("## TDX")[2].split("```python")[1].split("```")[0], names)
    vm, guest = names["vm"], names["guest"]
    assert guest.read(0x1000, 4) == bytes(4) and vm.counters["TDH.MEM.TRACK"] == 512
    assert names["table"].splitlines()[-1].split()[0] == "512"

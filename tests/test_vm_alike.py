"""Many requests run as one are the same as one after another: state, TLBs, bytes, sequence count and counts."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from kvmlab.design import shipped
from kvmlab.emulator import PlatformError, Vm, VmError, VmSwitches, alike, linux, psc
from kvmlab.hw.snp import RmpEntry

P, M2 = 4096, 1 << 21
PAGES = 4 * 512 + 200


def play(seed: int, design: str, **more: Any) -> tuple[Vm, list[str]]:
    """A guest that converts much at a time, in 4K or 2M entries; errors are part of what it does."""
    rng, said = random.Random(seed), []
    vm = Vm("snp", PAGES, design, **more)
    for _ in range(10):
        guest = vm.guest(rng.randrange(len(vm.mmu.tlbs)))
        lo = rng.choice([0, 0, 1, 512, rng.randrange(PAGES)])
        gpa, size = lo * P, rng.choice([PAGES - lo, rng.randrange(1, PAGES - lo + 1)]) * P
        large, private = rng.random() < 0.5, rng.random() < 0.5
        calls: list[Any] = [
            guest.set_memory_encrypted,
            guest.set_memory_encrypted,
            guest.set_memory_decrypted,
            guest.set_memory_decrypted,
            lambda a, s, g=guest, big=large: linux.accept(g, a, s, large=big),
            lambda a, s, g=guest, to=private: g.page_state_change(a, s, to, page_size=P),
            lambda a, s, g=guest: g.touch(a, s),
            lambda a, s, g=guest: g.write(a + s - 9, b"x" * 9),
            lambda a, s: vm.gmem.punch_hole(a, s),
        ]
        try:
            rng.choice(calls)(gpa, size)
            said.append("ok")
        except VmError as wrong:
            said.append(str(wrong))
    return vm, said


def state(vm: Vm) -> tuple[Any, ...]:
    n = vm.next_pfn
    return (
        vm.rmp.state[:n].tolist(), vm.rmp.gfn[:n].tolist(), vm.attributes.get(0, PAGES).tolist(),
        vm.mmu.leaves(0, PAGES).tolist(), vm.directmap.split.tolist(), vm.directmap.absent[:n].tolist(),
        vm.resident(), {p: page.tobytes() for p, page in vm.memory.pages.items()}, vm.violations, vm.mmu.seq,
        [list(tlb.leaves.items()) for tlb in vm.mmu.tlbs],
        {level: words.tolist() for level, words in next(iter(vm.slots)).lpage_info.items()},
    )  # fmt: skip


KINDS = [
    {}, {"vcpus": 2}, {"private_2m": True}, {"shared_2m": True}, {"discard": "after"}, {"tlb_entries": 1000},
    {"vmm": "rerun"}, {"switches": VmSwitches(rmp_checked_at="fill", identical_keeps_validated=False)},
]  # fmt: skip


def compare(monkeypatch: pytest.MonkeyPatch, seed: int, design: str, more: dict[str, Any]) -> None:
    many, said = play(seed, design, **more)
    with monkeypatch.context() as one_by_one:
        one_by_one.setattr(alike, "MOST", 1)
        single, said_single = play(seed, design, **more)
    assert said == said_single
    assert many.counters == single.counters
    assert state(many) == state(single)


@pytest.mark.parametrize("more", KINDS, ids=str)
@pytest.mark.parametrize("design", ["upstream", "v8-post-hook"])
@pytest.mark.parametrize("seed", range(2))
def test_alike_requests_do_as_one_what_they_do_one_by_one(
    monkeypatch: pytest.MonkeyPatch, design: str, more: dict[str, Any], seed: int
) -> None:
    compare(monkeypatch, seed, design, more)


def test_so_they_do_in_every_design(monkeypatch: pytest.MonkeyPatch) -> None:
    for design in ("no-flush", "no-stale-test", *shipped()):
        compare(monkeypatch, 124, design, {})


def test_accepting_in_4k_requests_runs_few_of_them_and_counts_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    request = psc.request

    def noted(*a: Any) -> Any:
        asked.append(a)
        return request(*a)

    monkeypatch.setattr(psc, "request", noted)
    vm = Vm("snp", 1 << 16)
    linux.accept(vm.guest(), 0, 1 << 28, large=False)
    assert len(asked) == 3 and vm.counters == dict.fromkeys(
        ("psc-buffer", "exit-map-gpa-range", "set-attributes"), 1024
    ) | dict.fromkeys(("npf", "gmem-alloc", "rmpupdate", "pvalidate"), 1 << 16) | {"directmap-split": 128}


def test_a_request_as_a_range_is_the_buffer_of_its_entries() -> None:
    one, other = Vm("snp", 2048), Vm("snp", 2048)
    for gfn, count, private, large in ((0, 64, True, False), (512, 3, True, True), (7, 9, False, False)):
        buffer = psc.entries(gfn, count, private, large)
        one.guest().psc_buffer(0, count - 1, buffer)
        assert psc.request(other.vmm, gfn, count * (512 if large else 1), private) == 0
    assert one.counters == other.counters
    assert np.array_equal(one.attributes.get(0, 2048), other.attributes.get(0, 2048))


def test_while_somebody_looks_on_every_request_is_run_by_itself() -> None:
    vm, seen = Vm("snp", 1024), []
    vm.on_row = lambda row: seen.append(row) if row.call == "kvm_vm_set_region_attr" else None
    linux.accept(vm.guest(), 0, 1024 * P, large=False)
    assert len(seen) == 1024 // linux.BATCH


def test_a_status_that_nobody_injected_is_a_platform_error_as_in_the_explorer() -> None:
    vm = Vm("snp", 1024, "v8-post-hook")
    vm.gmem.allocate(0, 1024 * P)
    for gfn in range(1024):
        vm.rmp.put(vm.pfn(gfn * P, True), RmpEntry(True, 1, gfn, immutable=True))
    with pytest.raises(PlatformError, match="FAIL_PERMISSION"):
        vm.guest().page_state_change(0, 1024 * P, True, page_size=P, batch=64)


@pytest.mark.parametrize("odd", ["attribute", "leaf", "entry", "failure", "tlb"])
def test_a_page_in_another_situation_ends_the_run(odd: str) -> None:
    vm = Vm("snp", 1024)
    if odd == "attribute":
        vm.attributes.store(700, 701, True)
    elif odd == "leaf":
        vm.mmu.leaves(700, 701)[:] = vm.pfn(700 * P, False) + 1 << 1
    elif odd == "entry":
        vm.rmp.update(vm.pfn(700 * P, True), 1, 5)
    elif odd == "tlb":
        vm.mmu.tlbs[0].leaves[700] = 1234 << 1
    else:
        vm.fail("xa_reserve")
    assert alike._alike(vm.vmm, 0, 1024) == (0 if odd == "failure" else 700)

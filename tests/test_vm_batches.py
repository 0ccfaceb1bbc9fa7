"""An array operation on a range is the same as its pages one after another: state, bytes and counts."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvmlab.emulator import Vm, VmError, walk
from kvmlab.hw.snp import PG_2M, PG_4K

P, PAGES = 4096, 1200


def play(seed: int, platform: str, design: str, **more: bool | str) -> tuple[Vm, list[str]]:
    """A program of random guest and host operations; errors are part of what it does."""
    rng, said = random.Random(seed), []
    vm = Vm(platform, PAGES, design, **more)
    guest = vm.guest()
    for _ in range(30):
        lo = rng.choice([0, 1, 511, 512, 513, rng.randrange(PAGES)])
        n = rng.choice([1, 2, 511, 512, 513, rng.randrange(1, PAGES)])
        gpa, size = lo * P, min(n, PAGES - lo) * P
        calls: list[Any] = [
            lambda a, s: guest.touch(a, s, rng.choice(["read", "write"])),
            guest.set_memory_encrypted,
            guest.set_memory_decrypted,
            lambda a, s: vm.set_memory_attributes(a, s, rng.random() < 0.5),
            lambda a, s: guest.set_private(a, rng.random() < 0.5, s),
            vm.gmem.punch_hole,
            lambda a, s: guest.write(a, b"x" * 9),
        ]
        if not vm.in_place:
            calls.append(vm.host.discard)
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
        vm.resident(), {p: page.tobytes() for p, page in vm.memory.pages.items()}, vm.violations,
    )  # fmt: skip


CASES = [
    ("snp", "upstream", {}),
    ("snp", "upstream", {"private_2m": True, "shared_2m": True}),
    ("snp", "v8-post-hook", {"discard": "after"}),
    ("snp", "v8-post-hook", {"backing": "in-place"}),
    ("snp", "gmem-in-place", {}),
    ("snp", "defer-to-fault", {"discard": "before"}),
    ("sev", "upstream", {"shared_2m": True}),
    ("sw", "no-zap", {}),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("platform", "design", "more"), CASES)
def test_runs_of_pages_do_what_single_pages_do(
    monkeypatch: pytest.MonkeyPatch, platform: str, design: str, more: dict[str, Any], seed: int
) -> None:
    fast, said = play(seed, platform, design, **more)
    monkeypatch.setattr(walk, "SMALLEST", 1)
    monkeypatch.setattr(walk, "LARGEST", 1)
    slow, said_slow = play(seed, platform, design, **more)
    assert said == said_slow
    assert state(fast) == state(slow)
    assert fast.counters == slow.counters


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("platform", "design", "more"), CASES)
def test_whatever_happens_the_machine_stays_consistent(
    platform: str, design: str, more: dict[str, Any], seed: int
) -> None:
    vm, _ = play(100 + seed, platform, design, **more)
    leaves = vm.mmu.leaves(0, PAGES)
    for head in range(0, PAGES - 511, 512):
        block = leaves[head : head + 512]
        assert not (block & 1).any() or ((block & 1).all() and len(set(block.tolist())) == 512)
    for head in range(512, vm.next_pfn, 512):
        big = vm.rmp.big(head, 512)
        assert big.all() or not big.any()
        if vm.rmp.region_assigned(head) and not vm.rmp.assigned(head, 512).all():
            assert vm.directmap.split[head // 512]  # else a write to what is the host's would fault
    assert not vm.threads and vm.mmu.in_progress == 0


@pytest.mark.parametrize("size", [PG_4K, PG_2M])
def test_an_update_of_a_range_is_its_updates_one_by_one(size: str) -> None:
    step = 512 if size == PG_2M else 1
    one, many = Vm("snp", 2048), Vm("snp", 2048)
    for vm in (one, many):
        vm.rmp.update(512 + 700, 3, 8)
    base, n = 512, 2048
    results = []
    for at in range(base, base + n, step):
        done, code = one.rmp.update(at, step, at - base, size)
        results.append(done)
        if not done:
            break
    assert many.rmp.update(base, n, 0, size) == (sum(results), code)
    assert (one.rmp.state == many.rmp.state).all() and (one.rmp.gfn == many.rmp.gfn).all()

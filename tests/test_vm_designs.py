"""The texts that the explorer explores, run on real sizes: what a wrong order leaves behind after one run."""

from __future__ import annotations

from typing import Any

import pytest

from kvmlab.design import Design, shipped
from kvmlab.emulator import GuestSpins, KernelBug, MemoryFaultExit, RmpFault, Vm, VmError, VmSwitches

P, M2 = 4096, 1 << 21
SIZE = 2 * M2 + P


def to_private(design: str, **more: VmSwitches) -> Vm:
    """2M + 2M + 4K used as shared, then converted, as the guest sees it; the guest's page table follows."""
    vm = Vm("snp", SIZE // P, design, **more)
    vm.guest().touch(0, SIZE)
    vm.set_memory_attributes(0, SIZE, True)
    vm.guest().set_private(0, True, SIZE)
    return vm


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("platform", ["snp", "sev", "sw"])
def test_every_ordering_runs_a_round_trip_or_fails_as_its_text_says(name: str, platform: str) -> None:
    vm = Vm(platform, SIZE // P, name)
    guest = vm.guest()
    guest.touch(0, SIZE)
    bad = set()
    try:
        guest.set_memory_encrypted(0, SIZE)
        guest.write(SIZE - 7, b"private")
        assert guest.read(SIZE - 7, 7) == b"private"
        guest.set_memory_decrypted(0, SIZE)
        guest.write(0, b"shared")
        assert vm.host.read(0, 6) == b"shared"
    except (VmError, AssertionError) as wrong:
        bad.add(type(wrong).__name__)
    bad |= {name for name, _ in vm.violations}
    assert bad == EXPECTED.get((name, platform), set())


SLEEPERS = ("v7-under-lock", "set-mem-attr-op", "pre-post-as-typed", "pre-post-op-looks-up")
EXPECTED = {
    **{(name, "snp"): {"sleep-in-atomic"} for name in SLEEPERS},
    ("no-zap", "snp"): {"KernelBug"},
    ("zap-by-op", "snp"): {"KernelBug"},
    ("zap-by-op-direction", "snp"): {"AssertionError"},  # going shared, writes go to the old private page
}


FOUND_BY_THE_EXPLORER_AS = {"KernelBug": {"kernel-bug"}, "AssertionError": {"stale-mapping", "integrity"}}


@pytest.mark.parametrize("name", sorted({name for name, platform in EXPECTED if platform == "snp"}))
def test_what_one_run_shows_is_among_what_the_explorer_finds(name: str) -> None:
    explored = Design.load(name).expect["snp"]["round-trip-shared"]
    for seen in EXPECTED[name, "snp"]:
        assert FOUND_BY_THE_EXPLORER_AS.get(seen, {seen}) & set(explored)


def test_v8_in_the_window_a_private_access_loops_on_rmp_faults_until_rmpupdate() -> None:
    vm, looped = Vm("snp", 4, "v8-post-hook"), []
    vm.guest().set_private(0, True)

    def fault(row: Any) -> None:
        if row.call == "rmpupdate":
            with pytest.raises(GuestSpins, match="RMP fault"):
                vm.guest().pvalidate(0, True)
            looped.append(vm.counters["npf-rmp"])

    vm.on_row = fault
    vm.set_memory_attributes(0, P, True)
    vm.on_row = None
    vm.guest().pvalidate(0, True)
    assert looped[0] > 1


def test_inside_the_sequence_window_it_retries_and_never_meets_the_rmp() -> None:
    vm = Vm("snp", 4, "pre-post-directmap")
    vm.guest().set_private(0, True)

    def fault(row: Any) -> None:
        if row.call == "kvm_unmap_gfn_range" and "mmu_lock" not in str(vm.threads[0].held):
            pytest.fail("zaps without mmu_lock")
        if row.lock == "mmu_lock" and vm.mmu.in_progress and "mmu_lock" not in vm.threads[0].held:
            with pytest.raises(GuestSpins):
                vm.guest().pvalidate(0, True)

    vm.on_row = fault
    vm.set_memory_attributes(0, P, True)
    assert "npf-rmp" not in vm.counters and vm.counters["retry"]


def test_a_stray_kernel_write_to_the_neighbour_dies_where_the_directmap_comes_last() -> None:
    vm, died = Vm("snp", 4, "rmp-under-lock-directmap-post"), []

    def stray(row: Any) -> None:
        if row.call == "kvm_unmap_directmap":
            with pytest.raises(RmpFault, match="2M entry"):
                vm.host.directmap_write(vm.pfn(3 * P, True))
            died.append(True)

    vm.on_row = stray
    vm.set_memory_attributes(0, P, True)
    assert died


@pytest.mark.parametrize(("design", "error"), [("v8-post-hook", KernelBug), ("v8-as-posted", RmpFault)])
def test_a_stray_write_to_the_page_itself_oopses_or_rmp_faults(design: str, error: type[Any]) -> None:
    vm = to_private(design)
    with pytest.raises(error):
        vm.host.directmap_write(vm.pfn(0, True))
    vm.host.directmap_write(vm.pfn(SIZE - P, True) + 1)  # the kernel's own page next to the last one


@pytest.mark.parametrize("flush", [True, False])
def test_without_the_flush_a_vcpu_goes_on_writing_to_the_shared_page(flush: bool) -> None:
    design = "upstream" if flush else "no-flush"
    vm = Vm("sev", 4, design, vmm="kill")
    vm.guest().write(0, b"old")
    vm.set_memory_attributes(0, P, True)
    vm.guest().write(0, b"new")
    assert vm.host.read(0, 3) == (b"old" if flush else b"new")


def test_upstream_updates_the_rmp_at_the_fault_and_v8_in_the_ioctl() -> None:
    lazy, eager = to_private("upstream"), to_private("v8-post-hook")
    assert "rmpupdate" not in lazy.counters and eager.counters["rmpupdate"] == SIZE // P
    lazy.guest().pvalidate(0, True)
    assert lazy.counters["rmpupdate"] == 1


def test_without_preempt_count_nothing_is_reported() -> None:
    vm = to_private("v7-under-lock", switches=VmSwitches(preempt_count=False))
    assert not vm.violations


@pytest.mark.parametrize(
    "arguments",
    [("mars", 4), ("snp", 4, "upstream", "in-place"), ("snp", 4, "upstream", "both")],
)
def test_what_does_not_exist_is_a_value_error(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"there are|only"):
        Vm(*arguments)


def test_a_killing_vmm_raises_the_exit() -> None:
    vm = Vm("snp", 4, vmm="kill")
    vm.guest().set_private(0, True)
    with pytest.raises(MemoryFaultExit, match="flags=0x8"):
        vm.guest().pvalidate(0, True)


def test_locks_nested_both_ways_are_seen_in_one_run_too() -> None:
    vm = Vm("snp", 4, "locks-both-ways")
    vm.guest().set_memory_encrypted(0, 4 * P)
    vm.gmem.punch_hole(0, P)
    assert {name for name, _ in vm.violations} == {"lock-misuse"}


def test_an_ioctl_that_holds_mmu_lock_for_read_only_misuses_it_as_in_the_explorer() -> None:
    text = Design.load("v8-post-hook").canonical().partition("\nexpect")[0]
    ioctl, _, rest = text.partition("\nfault:")
    vm = Vm("snp", 4, Design.parse(f"{ioctl.replace('write_', 'read_')}\nfault:{rest}"))
    vm.set_memory_attributes(0, P, True)
    assert "kvm_unmap_gfn_range() without mmu_lock for write" in [why for _, why in vm.violations]

"""A page in a named state: reached by the calls that lead there, and what only a wrong host leaves behind."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from kvmlab import GuestSpins, InputError, MachineCheck, PlatformError, RmpFault, VcFault, Vm, VmDead, VmError
from kvmlab.emulator.place import STATES
from kvmlab.hw.tdx import Leaf
from kvmlab.hw.tdx.entry import State

P, M2 = 4096, 1 << 21
BLOCKED = ("BLOCKED", "PENDING_BLOCKED")
DESIGNS = ("upstream", "v8-post-hook", "defer-to-fault", "gmem-in-place")
WAYS = [
    (platform, start, end)
    for platform, states in STATES.items()
    for start, end in permutations(states, 2)
    if start not in BLOCKED
]


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(("platform", "start", "end"), WAYS)
def test_every_state_is_reached_from_every_other_in_designs_that_keep_order(
    platform: str, start: State | str, end: State | str, design: str
) -> None:
    vm = Vm(platform, 4, design)
    vm.place(0, start, 2 * P)
    vm.place(P, end, 2 * P)
    want = [(state, "shared" if state == "shared" else "private") for state in (start, end, end)]
    assert [vm.placed(gpa) for gpa in (0, P, 2 * P)] == want and vm.violations == []


def test_the_calls_that_lead_to_a_state_are_events() -> None:
    vm = Vm("snp", 4)
    vm.place(0, "validated")
    assert vm.counters == {
        "set-attributes": 1, "npf": 1, "gmem-alloc": 1, "directmap-split": 1, "rmpupdate": 1, "pvalidate": 1,
    }  # fmt: skip


def test_what_is_shared_has_been_read_and_is_mapped() -> None:
    vm = Vm("sw", 4)
    vm.place(0, "shared")
    assert vm.mmu.leaves(0, 2).astype(bool).tolist() == [True, False]


def test_a_page_that_is_assigned_is_not_validated_yet() -> None:
    vm = Vm("snp", 4)
    vm.place(0, "assigned")
    with pytest.raises(VcFault):
        vm.guest().read(0, 1)


def test_where_the_ioctl_assigns_an_unassigned_private_page_takes_a_wrong_host() -> None:
    kinds = []
    for design in ("upstream", "v8-post-hook"):
        vm = Vm("snp", 4, design)
        vm.place(0, "private")
        kinds.append([event.text for event in vm.events if event.kind == "rmpupdate"])
    assert kinds == [[], ["private 4K", "shared 4K"]]


def test_with_large_folios_the_guest_validates_by_2m() -> None:
    vm = Vm("snp", 1024, private_2m=True)
    vm.place(0, "validated", M2 + P)
    assert vm.rmp.big(vm.pfn(0, True), 513).tolist() == [True] * 512 + [False]


def test_an_assigned_page_under_a_shared_attribute_is_a_wrong_host_s() -> None:
    vm = Vm("snp", 4, "v8-post-hook", "in-place")
    vm.place(0, "validated", attribute="shared")
    assert vm.placed(0) == ("validated", "shared")
    with pytest.raises(RmpFault):
        vm.host.write(0, b"host")


def test_a_stale_shared_leaf_under_a_private_attribute_is_a_wrong_host_s() -> None:
    vm = Vm("sw", 4)
    vm.host.write(0, b"stale")
    vm.place(0, "shared", attribute="private")
    assert vm.guest().read(0, 5) == b"stale"


def test_a_td_dies_of_a_page_that_is_pending() -> None:
    vm = Vm("tdx", 4)
    vm.place(0, "PENDING")
    with pytest.raises(VmDead):
        vm.guest().read(0, 1)


def test_an_entry_that_was_blocked_and_never_removed_is_a_fault_without_end() -> None:
    vm = Vm("tdx", 4)
    vm.place(0, "BLOCKED")
    assert vm.events[-1].kind == Leaf.RANGE_BLOCK
    vm.tdx.kick()
    epochs = vm.tdx.module.epochs
    vm.tdx.module.epochs = epochs._replace(td_epoch=epochs.td_epoch + 1)  # a TRACK
    with pytest.raises(GuestSpins):
        vm.guest().read(0, 1)


def test_from_blocked_the_zap_as_merged_ends_in_a_kvm_bug_on() -> None:
    vm = Vm("tdx", 4)
    vm.place(0, "BLOCKED")
    with pytest.raises(PlatformError, match="TDX_GPA_RANGE_ALREADY_BLOCKED"):
        vm.place(0, "shared")


def test_a_mapped_page_that_the_host_takes_for_its_own_is_poisoned_by_its_write() -> None:
    vm = Vm("tdx", 4, "v8-post-hook", "in-place")
    vm.place(0, "MAPPED", attribute="shared")
    vm.host.write(0, b"host")
    with pytest.raises(MachineCheck):
        vm.guest().read(0, 1)


def test_a_design_that_ends_elsewhere_is_told_so() -> None:
    vm = Vm("tdx", 4, "no-zap")
    vm.place(0, "MAPPED")
    with pytest.raises(VmError, match="no-zap brings gpa 0x0 to MAPPED and shared, not to shared"):
        vm.place(0, "shared")


def test_a_page_of_firmware_is_nobody_s_here() -> None:
    vm = Vm("snp", 4)
    vm.rmp.put(vm.pfn(0, True), vm.rmp_entry(0)._replace(assigned=True, gpa=0, immutable=True))
    assert vm.placed(0) == ("foreign", "shared")


def test_the_example_in_the_docs_runs_as_it_says(root: Path) -> None:
    text = (root / "docs/emulator.md").read_text(encoding="utf-8").partition("## A page in a named state")[2]
    names: dict[str, Any] = {}
    with pytest.raises(RmpFault):
        exec(text.split("```python")[1].split("```")[0], names)
    assert names["vm"].placed(0x1000) == ("validated", "shared")


@pytest.mark.parametrize(
    ("platform", "arguments", "allowed"),
    [
        ("snp", (0, "MAPPED"), "on snp there are: shared, private, assigned, validated"),
        ("tdx", (0, "private"), "on tdx there are: shared, FREE, PENDING, MAPPED, BLOCKED, PENDING_BLOCKED"),
        ("sw", (4 * P, "private"), "not all of it is a memslot with a guest_memfd"),
        ("sw", (1, "private"), "a multiple of 4096"),
    ],
)
def test_a_state_or_a_page_that_is_not_there_is_refused_in_words(
    platform: str, arguments: tuple[int, str], allowed: str
) -> None:
    with pytest.raises(InputError, match=allowed):
        Vm(platform, 4).place(*arguments)

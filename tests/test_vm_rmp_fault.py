"""The rows of `rmp_fault:`; against a punch hole, and against another PSMASH, that gets in between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from kvmlab.design import Design
from kvmlab.emulator import GuestSpins, Vm, VmSwitches
from kvmlab.hw.snp import PG_2M

P, M2 = 4096, 1 << 21


OLD, LOOKUP, PSMASH = "psmash-against-punch", "snp_lookup_rmpentry", "snp_rmptable_psmash"


def handler(*rows: str) -> Design:
    """upstream with another `rmp_fault:`."""
    return Design.parse("\n    ".join(["base: upstream\nrmp_fault:", *rows]))


def interposed(point: str, act: Callable[..., Any], design: Design | str = "upstream") -> Vm:
    """4K PVALIDATE of a 2M entry: a SIZEM fault; at `point` of its handler `act(vm)` runs, once."""
    vm = Vm("snp", 512, design, private=True, private_2m=True)

    def at_point(name: Any) -> None:
        if name == point and not hasattr(vm, "seen"):
            vm.seen = vm.counters
            act(vm)

    vm.on_point = at_point
    vm.guest().pvalidate(3 * P, True)
    return vm


def punch(vm: Vm) -> None:
    vm.gmem.punch_hole(0, M2)


def warnings(vm: Vm) -> list[str]:
    warned = [text for name, text in vm.violations if name == "warning"]
    return [e.text for e in vm.events if e.kind == "warn"] + warned


@pytest.mark.parametrize(
    ("point", "words"), [(LOOKUP, "no assigned RMP entry"), (PSMASH, "Unable to split RMP entry")]
)
def test_a_page_punched_under_the_handler_was_worth_a_warning(point: str, words: str) -> None:
    (warning,) = warnings(interposed(point, punch, OLD))
    assert words in warning


@pytest.mark.parametrize("point", [LOOKUP, PSMASH])
def test_a_page_punched_under_the_handler_is_a_benign_race_since_2026(point: str) -> None:
    assert warnings(interposed(point, punch)) == []


@pytest.mark.parametrize("design", ["upstream", OLD])
@pytest.mark.parametrize("point", [LOOKUP, PSMASH])
def test_after_the_punch_the_guest_gets_a_new_page_and_its_pvalidate_succeeds(
    point: str, design: str
) -> None:
    vm = interposed(point, punch, design)
    assert vm.rmp_entry(vm.pfn(3 * P, True)).validated and vm.counters["gmem-alloc"] == 2 * 512
    assert vm.counters["npf-rmp"] == 2  # the one that lost, and that of the new 2M entry


def test_psmash_of_a_punched_page_fails_and_changes_nothing() -> None:
    vm = interposed(PSMASH, punch)
    assert [e.text for e in vm.events if e.kind == "psmash"] == ["FAIL_INPUT", "OK"]


def test_since_2026_an_unassigned_entry_that_nobody_invalidated_is_still_worth_a_warning() -> None:
    vm = interposed(LOOKUP, lambda vm: vm.rmp.update(vm.pfn(0, True), 512, None, PG_2M))
    assert warnings(vm) == ["RMP fault on an unassigned entry"]


@pytest.mark.parametrize("point", [LOOKUP, PSMASH])
def test_a_page_that_somebody_else_splits_meanwhile_needs_no_zap_and_no_warning(point: str) -> None:
    vm = interposed(point, lambda vm: vm.rmp.psmash(vm.pfn(0, True)))
    assert warnings(vm) == [] and "zap" not in vm.counters


def test_while_the_script_acts_the_handler_does_not_call_it_again() -> None:
    vm = interposed(LOOKUP, lambda vm: vm.guest().pvalidate(5 * P, True))
    assert vm.rmp_entry(vm.pfn(5 * P, True)).validated and vm.counters["psmash"] == 1


# The text


def one_4k_pvalidate(design: Design) -> Vm:
    vm = Vm("snp", 512, design, private=True, private_2m=True)
    vm.guest().pvalidate(3 * P, True)
    return vm


@pytest.mark.parametrize(
    "rows", [("return",), ("kvm_zap_gfn_range()",), ("npf_sizem()", "kvm_zap_gfn_range()")]
)
def test_a_handler_that_splits_no_entry_lets_the_guest_fault_for_ever(rows: tuple[str, ...]) -> None:
    with pytest.raises(GuestSpins, match="RMP fault"):
        one_4k_pvalidate(handler(*rows))


def test_a_handler_that_does_not_zap_leaves_it_to_the_next_fault_to_split_the_mapping() -> None:
    vm = one_4k_pvalidate(handler("snp_lookup_rmpentry()", "psmash()"))
    assert vm.counters["npt-split"] == 1 and vm.counters["npf-rmp"] == 2


def test_zap_and_flush_may_be_spelled_out_in_a_handler() -> None:
    spelled = handler(
        "psmash()", "write_lock(mmu_lock)", "kvm_unmap_gfn_range()", "if (flush)", "    kvm_flush_remote_tlbs()",
        "write_unlock(mmu_lock)",
    )  # fmt: skip
    vm = one_4k_pvalidate(spelled)
    assert vm.counters["psmash"] == vm.counters["zap"] == 1 and not vm.violations


def test_a_handler_that_zaps_without_mmu_lock_breaks_lock_misuse() -> None:
    vm = one_4k_pvalidate(handler("psmash()", "kvm_unmap_gfn_range()", "kvm_flush_remote_tlbs()"))
    assert [name for name, _ in vm.violations] == ["lock-misuse"]


def test_without_sizem_v8s_handler_leaves_at_its_first_row() -> None:
    vm, rows = Vm("snp", 4, "v8-post-hook", private=True), []
    vm.on_row = lambda row: rows.append(row.call)
    with pytest.raises(GuestSpins):
        vm.guest().pvalidate(0, True)  # nobody has assigned the page
    assert "npf_sizem" in rows and "psmash" not in rows


@pytest.mark.parametrize(("word", "expected"), [("", 1), ("recheck", 0), ("recheck_unassigned", 0)])
def test_a_race_lost_to_another_psmash_is_a_warning_unless_the_text_looks_again(
    word: str, expected: int
) -> None:
    def split(vm: Any) -> None:
        vm.rmp.psmash(vm.pfn(0, True))

    vm = interposed(PSMASH, split, handler("snp_lookup_rmpentry()", f"psmash({word})", "kvm_zap_gfn_range()"))
    assert len(warnings(vm)) == expected


def test_a_psmash_that_nobody_asked_for_warns_where_there_is_no_2m_entry() -> None:
    vm = Vm("snp", 4, "psmash-unasked", private=True)
    with pytest.raises(GuestSpins):
        vm.guest().pvalidate(0, True)  # nobody has assigned the page
    assert warnings(vm) == [f"Unable to split RMP entry: PSMASH(PFN {vm.pfn(0, True):#x}) = FAIL_INPUT"]


@pytest.mark.parametrize(("switch", "psmashes"), [(False, 0), (True, 1)])
def test_an_ordinary_access_that_fails_for_its_size_reaches_v8s_psmash_only_if_it_sets_sizem(
    switch: bool, psmashes: int
) -> None:
    vm = Vm("snp", 512, "v8-post-hook", private_2m=True, switches=VmSwitches(access_sets_sizem=switch))
    vm.guest().set_memory_encrypted(0, M2)
    vm.guest().write(0, b"2M")
    vm.mmu.leaves(0, 512)[:] = 0
    vm.mmu.flush()
    vm.mmu.leaves(0, 1)[:] = vm.pfn(0, True) + 1 << 1  # a 4K leaf over a 2M entry
    with contextlib.suppress(GuestSpins):
        vm.guest().write(0, b"4K")
    assert vm.counters.get("psmash", 0) == psmashes

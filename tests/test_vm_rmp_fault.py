"""The handler of RMP faults against a punch hole, and against another PSMASH, that gets in between."""

import pytest

from kvmlab.emulator import Vm, VmSwitches
from kvmlab.emulator.rmpfault import LOOKUP, PSMASH

P, M2 = 4096, 1 << 21


def interposed(point, act, benign=False):
    """4K PVALIDATE of a 2M entry: a SIZEM fault; at `point` of its handler `act(vm)` runs, once."""
    vm = Vm("snp", 512, private=True, private_2m=True, switches=VmSwitches(unassigned_is_benign=benign))

    def at_point(name):
        if name == point and not hasattr(vm, "seen"):
            vm.seen = vm.counters
            act(vm)

    vm.on_point = at_point
    vm.guest().pvalidate(3 * P, True)
    return vm


def punch(vm):
    vm.gmem.punch_hole(0, M2)


def warnings(vm):
    return [e.text for e in vm.events if e.kind == "warn"]


@pytest.mark.parametrize(
    ("point", "words"), [(LOOKUP, "unassigned entry"), (PSMASH, "unable to split the RMP entry")]
)
def test_a_page_punched_under_the_handler_was_worth_a_warning(point, words):
    (warning,) = warnings(interposed(point, punch))
    assert words in warning


@pytest.mark.parametrize("point", [LOOKUP, PSMASH])
def test_a_page_punched_under_the_handler_is_a_benign_race_since_2026(point):
    assert warnings(interposed(point, punch, benign=True)) == []


@pytest.mark.parametrize("benign", [True, False])
@pytest.mark.parametrize("point", [LOOKUP, PSMASH])
def test_after_the_punch_the_guest_gets_a_new_page_and_its_pvalidate_succeeds(point, benign):
    vm = interposed(point, punch, benign)
    assert vm.rmp_entry(vm.pfn(3 * P, True)).validated and vm.counters["gmem-alloc"] == 2 * 512
    assert vm.counters["npf-rmp"] == 2  # the one that lost, and that of the new 2M entry


def test_psmash_of_a_punched_page_fails_and_changes_nothing():
    vm = interposed(PSMASH, punch)
    assert [e.text for e in vm.events if e.kind == "psmash"] == ["FAIL_INPUT", "OK"]


def test_since_2026_an_unassigned_entry_that_nobody_invalidated_is_still_worth_a_warning():
    vm = interposed(LOOKUP, lambda vm: vm.sev.make_shared(vm.pfn(0, True), 512, 0), benign=True)
    assert warnings(vm) == ["RMP fault on an unassigned entry"]


@pytest.mark.parametrize("point", [LOOKUP, PSMASH])
def test_a_page_that_somebody_else_splits_meanwhile_needs_no_zap_and_no_warning(point):
    vm = interposed(point, lambda vm: vm.sev.psmash(vm.pfn(0, True)))
    assert warnings(vm) == [] and "zap" not in vm.counters


def test_while_the_script_acts_the_handler_does_not_call_it_again():
    vm = interposed(LOOKUP, lambda vm: vm.guest().pvalidate(5 * P, True))
    assert vm.rmp_entry(vm.pfn(5 * P, True)).validated and vm.counters["psmash"] == 1

"""Each step of KVM's TDX side alone, and memory by KeyID (kvmlab/kvm/tdx.py, kvmlab/kernel/keyids.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from step_tools import BLOCKED, Machine, Ran

from kvmlab.guest.access import Access
from kvmlab.hw.memory import GUEST_KEY, Content
from kvmlab.hw.tdx import HOST, ZERO, Age, Answer, Check, Leaf, Line, Operand, State, Status
from kvmlab.kernel import keyids
from kvmlab.kernel.keyids import HKID
from kvmlab.kvm import gmem, mmu, tdx

WRITER, READER = {"mmu_lock_writer": "CPU0"}, {"mmu_lock_reader[CPU0]": True}
TABLE = {"sept_table": State.NL_MAPPED, "mirror_table": "present"}
OUTSIDE = {"mode[CPU0]": "host", "mode[CPU1]": "host"}
BUG = ["platform-error"]
TD, THEIRS = Content("guest", GUEST_KEY, 1), Content("host")


@pytest.fixture(scope="module")
def tiny() -> Machine:
    return Machine(platform="tdx")


@pytest.fixture(scope="module")
def busy() -> Machine:
    """One SEAMCALL may answer OPERAND_BUSY."""
    return Machine("seamcall-busy", "tdx")


def did(
    result: Any = None,
    wrote: dict[str, Any] | None = None,
    broke: Sequence[str] = (),
    counts: Sequence[str] = (),
) -> Ran:
    return Ran(result, wrote or {}, list(broke), list(counts))


# The kick.


def test_a_kick_makes_every_vcpu_leave_at_once(tiny: Machine) -> None:
    assert tiny.run(tdx.kick, "CPU0") == did(True, {"mode[CPU0]": "host", "mode[CPU1]": "host"})
    assert tiny.run(tdx.kick, "CPU0", at=OUTSIDE) == did(True)


@pytest.mark.parametrize("mode", ["entering", "accepting"])
def test_a_kick_waits_for_a_vcpu_that_is_in_a_module_call(tiny: Machine, mode: str) -> None:
    at = {"mode[CPU0]": "host", "mode[CPU1]": mode}
    assert tiny.run(tdx.kick, "CPU0", at=at) == did(False, {"kicked[CPU1]": True, "kicker": "CPU0"})
    asked = at | {"kicked[CPU1]": True, "kicker": "CPU0"}
    assert tiny.run(tdx.kick, "CPU0", at=asked).result == BLOCKED
    assert tiny.run(tdx.kick, "CPU0", at=OUTSIDE | {"kicker": "CPU0"}) == did(True, {"kicker": None})


def test_one_kicks_at_a_time(tiny: Machine) -> None:
    assert tiny.run(tdx.kick, "CPU0", at={"kicker": "CPU1"}).result == BLOCKED


def test_a_vcpu_that_was_kicked_in_a_module_call_leaves_when_it_is_through(tiny: Machine) -> None:
    at = {"mode[CPU1]": "entering"}
    assert tiny.run(tdx.answers_kick, "CPU1", at=at) == did(None, {"mode[CPU1]": "td"})
    assert tiny.run(tdx.answers_kick, "CPU1", at=at | {"kicked[CPU1]": True}) == did(
        None, {"mode[CPU1]": "host", "kicked[CPU1]": False}
    )


def test_the_request_is_counted_once_it_is_through(tiny: Machine) -> None:
    assert tiny.run(tdx.kvm_make_all_cpus_request, "CPU0", at=OUTSIDE) == did(counts=["kicks"])
    waits = tiny.run(tdx.kvm_make_all_cpus_request, "CPU0", at={"mode[CPU1]": "accepting"})
    assert (waits.result, waits.counts) == ("again", [])


@pytest.mark.parametrize("flush", [tdx.kvm_flush_remote_tlbs, mmu.kvm_flush_remote_tlbs])
def test_a_flush_drops_shared_translations_and_kicks_but_leaves_private_ones(
    tiny: Machine, flush: Callable[..., Any]
) -> None:
    at = {"tlb[CPU1, 0]": "S0", "ptlb[CPU1, 0]": "P0", "mode[CPU0]": "host"}
    assert tiny.run(flush, "CPU0", at=at) == did(
        None, {"tlb[CPU1, 0]": None, "mode[CPU1]": "host"}, counts=["kicks"]
    )


# SEAMCALLs.


def blocked(age: Age, **more: Any) -> dict[str, Any]:
    return TABLE | OUTSIDE | {"sept[0]": State.BLOCKED, "pamt[P0]": "REG", "bepoch[P0]": age} | more


def test_aug_takes_a_free_page(tiny: Machine) -> None:
    ran = tiny.run(tdx.seamcall, Leaf.PAGE_AUG, 0, at=TABLE)
    assert ran == did(Answer(Status.SUCCESS, 0, State.PENDING), {"sept[0]": State.PENDING, "pamt[P0]": "REG"})
    used = tiny.run(tdx.seamcall, Leaf.PAGE_AUG, 0, at=TABLE | {"pamt[P0]": "REG"})
    assert used == did(Answer(Status.PAGE_METADATA_INCORRECT, Operand.R8, by=Check.PAGE))


def test_without_a_table_the_walk_fails(tiny: Machine) -> None:
    assert tiny.run(tdx.seamcall, Leaf.PAGE_AUG, 0).result.rax == 0xC0000B0000000001


def test_sept_add_hangs_the_table_and_takes_no_page_of_the_guest(tiny: Machine) -> None:
    ran = tiny.run(tdx.seamcall, Leaf.SEPT_ADD, 0, at={"pamt[P0]": "REG", "entry_lock[0]": "CPU1"})
    assert ran == did(Answer(Status.SUCCESS, 0, State.NL_MAPPED), {"sept_table": State.NL_MAPPED})
    assert (
        tiny.run(tdx.seamcall, Leaf.SEPT_ADD, 0, at=TABLE).result.status == Status.EPT_ENTRY_STATE_INCORRECT
    )


@pytest.mark.parametrize("leaf", [Leaf.PAGE_AUG, Leaf.RANGE_BLOCK, Leaf.PAGE_REMOVE])
def test_an_accept_under_way_makes_a_leaf_busy(tiny: Machine, leaf: Leaf) -> None:
    ran = tiny.run(tdx.seamcall, leaf, 0, at=TABLE | {"entry_lock[0]": "CPU1"})
    assert ran == did(Answer(Status.OPERAND_BUSY, Operand.RCX, by=Check.ENTRY))


@pytest.mark.parametrize("was", [Age.OLDER, Age.PREVIOUS])
def test_block_notes_the_epoch(tiny: Machine, was: Age) -> None:
    at = TABLE | {"sept[0]": State.MAPPED, "pamt[P0]": "REG", "bepoch[P0]": was}
    ran = tiny.run(tdx.seamcall, Leaf.RANGE_BLOCK, 0, at=at)
    assert ran.wrote == {"sept[0]": State.BLOCKED, "bepoch[P0]": Age.NOW}


@pytest.mark.parametrize("age", [Age.PREVIOUS, Age.OLDER])
def test_remove_of_a_tracked_page_gives_it_back(tiny: Machine, age: Age) -> None:
    ran = tiny.run(tdx.seamcall, Leaf.PAGE_REMOVE, 0, at=blocked(age))
    gone = {"sept[0]": State.FREE, "pamt[P0]": "NDA", "bepoch[P0]": Age.OLDER}
    assert ran.wrote == {name: v for name, v in gone.items() if name != "bepoch[P0]" or age != Age.OLDER}


@pytest.mark.parametrize(
    ("at", "done"),
    [
        (blocked(Age.NOW), False),
        (blocked(Age.PREVIOUS) | {"mode[CPU1]": "td", "vcpu_epoch[CPU1]": Age.PREVIOUS}, False),
        (blocked(Age.PREVIOUS) | {"mode[CPU1]": "entering", "vcpu_epoch[CPU1]": Age.PREVIOUS}, False),
        (blocked(Age.PREVIOUS) | {"mode[CPU1]": "accepting", "vcpu_epoch[CPU1]": Age.PREVIOUS}, False),
        (blocked(Age.PREVIOUS) | {"mode[CPU1]": "td", "vcpu_epoch[CPU1]": Age.NOW}, True),
        (blocked(Age.PREVIOUS) | {"vcpu_epoch[CPU1]": Age.PREVIOUS}, True),  # it is outside
    ],
)
def test_remove_wants_tracking_done(tiny: Machine, at: dict[str, Any], done: bool) -> None:
    answer = tiny.run(tdx.seamcall, Leaf.PAGE_REMOVE, 0, at=at).result
    assert answer.rax == (0 if done else 0xC0000B0800000001)


def test_remove_of_a_page_that_is_not_blocked_is_refused_whatever_its_epoch(tiny: Machine) -> None:
    at = TABLE | {"sept[0]": State.MAPPED, "bepoch[P0]": Age.NOW}
    assert tiny.run(tdx.seamcall, Leaf.PAGE_REMOVE, 0, at=at).result.rax == 0xC0000B0600000001


def test_track_makes_every_epoch_one_older(tiny: Machine) -> None:
    at = OUTSIDE | {"vcpu_epoch[CPU1]": Age.PREVIOUS, "bepoch[P0]": Age.NOW}
    ran = tiny.run(tdx.track, at=at)
    older = {"vcpu_epoch[CPU0]": Age.PREVIOUS, "vcpu_epoch[CPU1]": Age.OLDER, "bepoch[P0]": Age.PREVIOUS}
    assert ran == did(Answer(Status.SUCCESS), older)


def test_track_is_busy_while_a_vcpu_is_counted_or_inside_since_the_epoch_before(tiny: Machine) -> None:
    counted = tiny.run(tdx.track, at={"mode[CPU1]": "entering"})
    assert counted == did(Answer(Status.OPERAND_BUSY, Operand.TD_EPOCH, by=Check.EPOCH))
    inside = tiny.run(tdx.track, at={"vcpu_epoch[CPU1]": Age.PREVIOUS})
    assert inside == did(Answer(Status.PREVIOUS_TLB_EPOCH_BUSY, by=Check.PREVIOUS))


def test_a_busy_answer_may_come_from_nowhere_once_and_not_while_vcpus_are_kept_out(
    busy: Machine, tiny: Machine
) -> None:
    call = tdx.seamcall, Leaf.PAGE_AUG, 0
    struck = busy.run(*call, at=TABLE, choose=(1,))
    busy_tree = Answer(Status.OPERAND_BUSY, Operand.SEPT_TREE, by=Check.TREE)
    assert struck == did(busy_tree, {"failures_left[seamcall]": 0})
    assert busy.run(*call, at=TABLE).result.ok
    for at in ({"failures_left[seamcall]": 0}, {"wait_for_sept_zap": True}):
        assert busy.run(*call, at=TABLE | at, choose=(1,)).result.ok
        assert busy.run(tdx.track, at=OUTSIDE | at, choose=(1,)).result.ok
    assert busy.run(tdx.track, at=OUTSIDE, choose=(1,)).result.status == Status.OPERAND_BUSY
    assert tiny.run(*call, at=TABLE, choose=(1,)).result.ok


@pytest.mark.parametrize(
    ("status", "busy"),
    [
        (Status.OPERAND_BUSY, True),
        (Status.PREVIOUS_TLB_EPOCH_BUSY, False),
        (Status.EPT_WALK_FAILED, False),
        (Status.SUCCESS, False),
    ],
)
def test_busy_is_one_status_exactly(status: Status, busy: bool) -> None:
    assert tdx.is_busy(Answer(status)) is busy


# The zap.


def test_a_zap_takes_the_mirror_leaf_away_first(tiny: Machine) -> None:
    zap = tdx.kvm_unmap_gfn_range, "CPU0", 0
    assert tiny.run(*zap, at=WRITER | {"mirror[0]": "P0"}) == did(
        None, {"mirror[0]": None, "flush[CPU0]": True}
    )
    assert tiny.run(*zap, at=WRITER) == did("skip")
    assert tiny.run(*zap, at=READER).broke == ["lock-misuse"]


def test_only_a_design_that_asks_remembers_that_something_was_zapped() -> None:
    machine = Machine(platform="tdx", design="v8-post-hook")
    at = WRITER | {"mirror[0]": "P0"}
    assert machine.run(tdx.kvm_unmap_gfn_range, "CPU0", 0, at=at).wrote == {"mirror[0]": None}


def zap(machine: Machine, call: str, at: dict[str, Any], word: str | None = None) -> Ran:
    return machine.run(tdx.zap_seamcall, "CPU0", 0, call, word, at=at)


def test_each_seamcall_of_the_zap_is_counted_and_done(tiny: Machine) -> None:
    ran = zap(tiny, "tdh_mem_range_block", TABLE | {"sept[0]": State.MAPPED, "pamt[P0]": "REG"})
    assert (ran.result, ran.counts, ran.wrote["sept[0]"]) == (None, ["seamcalls"], State.BLOCKED)
    ran = zap(tiny, "tdh_mem_track", OUTSIDE)
    assert (ran.result, ran.counts, ran.broke) == (None, ["seamcalls"], [])
    assert ran.wrote == {"vcpu_epoch[CPU0]": Age.PREVIOUS, "vcpu_epoch[CPU1]": Age.PREVIOUS}
    assert zap(tiny, "tdh_mem_page_remove", blocked(Age.OLDER)).wrote["pamt[P0]"] == "NDA"


@pytest.mark.parametrize(
    ("word", "result", "broke"), [(None, None, BUG), ("retry", "again", []), ("kick", "busy", [])]
)
def test_a_busy_seamcall_is_a_bug_retried_or_answered_by_a_kick(
    tiny: Machine, word: str | None, result: str | None, broke: list[str]
) -> None:
    ran = zap(tiny, "tdh_mem_track", {"mode[CPU1]": "entering"}, word)
    counts = ["seamcalls"] if broke else ["seamcalls", "seamcall-busy"]
    assert ran == did(result, {}, broke, counts)


@pytest.mark.parametrize("word", [None, "retry", "kick"])
def test_any_other_answer_is_a_bug(tiny: Machine, word: str | None) -> None:
    ran = zap(tiny, "tdh_mem_track", {"vcpu_epoch[CPU1]": Age.PREVIOUS}, word)
    assert ran == did(None, {}, BUG, ["seamcalls"])


def test_after_a_busy_answer_nobody_enters_until_it_is_done(tiny: Machine) -> None:
    out = {"mode[CPU0]": "host", "mode[CPU1]": "host"}
    assert tiny.run(tdx.stop_vcpus, "CPU0") == did(None, {"wait_for_sept_zap": True} | out, counts=["kicks"])
    waits = tiny.run(tdx.stop_vcpus, "CPU0", at={"mode[CPU1]": "entering"})
    assert (waits.result, waits.wrote["wait_for_sept_zap"]) == ("again", True)
    assert tiny.run(tdx.let_vcpus, "CPU0", at={"wait_for_sept_zap": True}) == did(
        None, {"wait_for_sept_zap": False}
    )


DIRTY = {"memory[P0]": Line(ZERO, HKID, False, ((HKID, TD),))}


def test_wbinvd_writes_the_tds_lines_back_once_the_page_is_free(tiny: Machine) -> None:
    write_back = tdx.tdh_phymem_page_wbinvd, "CPU0", 0
    assert tiny.run(*write_back, at=DIRTY) == did(None, {"memory[P0]": Line(TD, HKID)}, counts=["seamcalls"])
    assert tiny.run(*write_back, at=DIRTY | {"pamt[P0]": "REG"}) == did(None, {}, BUG, ["seamcalls"])


@pytest.mark.parametrize(
    ("linux", "erratum", "clears"),
    [((6, 17), False, True), ((6, 18), False, False), ((6, 18), True, True), ((6, 17), True, True)],
)
def test_a_page_is_cleared_always_or_by_version_only_on_parts_with_the_erratum(
    linux: tuple[int, int], erratum: bool, clears: bool
) -> None:
    machine = Machine(platform="tdx", conf={"linux": linux}, partial_write_erratum=erratum)
    ran = machine.run(tdx.tdx_clear_page, "CPU0", 0, at={"memory[P0]": Line(TD, HKID)})
    assert ran.wrote == ({"memory[P0]": Line(ZERO, HOST)} if clears else {})


# Mapping a private page.


def at_fault(**more: Any) -> dict[str, Any]:
    return {"acc[CPU0]": Access("private", "accept", 0, 1), "snapshot[CPU0]": "same"} | more


OVER = {"snapshot[CPU0]": "none"}


def test_freezing_a_leaf_or_the_table_stops_everybody_else(tiny: Machine) -> None:
    freeze = tdx.freeze_spte, "CPU0"
    assert tiny.run(*freeze, "leaf", at=at_fault()) == did(None, {"mirror[0]": "frozen"})
    assert tiny.run(*freeze, "table", at=at_fault()) == did(None, {"mirror_table": "frozen"})


@pytest.mark.parametrize(("what", "cell"), [("leaf", "mirror[0]"), ("table", "mirror_table")])
def test_who_meets_a_frozen_spte_retries(tiny: Machine, what: str, cell: str) -> None:
    ran = tiny.run(tdx.freeze_spte, "CPU0", what, at=at_fault() | {cell: "frozen"})
    assert ran == did("retry", OVER, counts=["npf"])


def test_a_table_that_is_there_is_used_and_a_leaf_that_is_there_makes_the_fault_spurious(
    tiny: Machine,
) -> None:
    freeze = tdx.freeze_spte, "CPU0"
    assert tiny.run(*freeze, "table", at=at_fault() | {"mirror_table": "present"}) == did("skip")
    assert tiny.run(*freeze, "leaf", at=at_fault() | {"mirror[0]": "P0"}) == did(
        "skip", OVER, counts=["spurious-npf"]
    )


def test_a_fault_that_is_over_lets_go_of_its_page() -> None:
    machine = Machine("discard", "tdx")
    held = {"folio_ref[CPU0, 0]": True, "snapshot[CPU0]": "same"}
    over = OVER | {"folio_ref[CPU0, 0]": False}
    fault = held | {"acc[CPU0]": Access("private", "accept", 0, 2), "era": 2}
    assert machine.run(tdx.mapped, "CPU0", at=held) == did(None, over)
    assert machine.run(tdx.freeze_spte, "CPU0", "leaf", at=fault | {"mirror[0]": "frozen"}).wrote == over
    assert machine.run(tdx.mapped, "CPU0") == did()


def test_the_value_itself_replaces_the_frozen_one(tiny: Machine) -> None:
    write = tdx.write_spte, "CPU0"
    at = at_fault() | {"mirror[0]": "frozen", "mirror_table": "frozen"}
    assert tiny.run(*write, "table", at=at) == did(None, {"mirror_table": "present"})
    assert tiny.run(*write, "leaf", at=at) == did(None, OVER | {"mirror[0]": "P0"})


FROZEN = {"mirror[0]": "frozen"}


def aug(machine: Machine, at: dict[str, Any], call: str = "tdh_mem_page_aug", word: str | None = None) -> Ran:
    return machine.run(tdx.aug_seamcall, "CPU0", call, word, at=at_fault() | at)


def test_an_aug_that_succeeds_is_counted(tiny: Machine) -> None:
    ran = aug(tiny, TABLE | FROZEN)
    assert ran == did(None, {"sept[0]": State.PENDING, "pamt[P0]": "REG"}, counts=["seamcalls"])


@pytest.mark.parametrize("word", [None, "bit_and"])
def test_a_busy_aug_writes_the_old_leaf_back_and_retries_the_fault(tiny: Machine, word: str | None) -> None:
    ran = aug(tiny, TABLE | FROZEN | {"entry_lock[0]": "CPU1"}, word=word)
    assert ran == did("retry", OVER | {"mirror[0]": None}, counts=["seamcalls", "seamcall-busy", "npf"])


def test_a_busy_sept_add_writes_the_old_table_back_and_leaves_the_leaf(busy: Machine) -> None:
    at = at_fault() | {"acc[CPU0]": Access("private", "read", 0, 0), "mirror_table": "frozen"}
    ran = busy.run(tdx.aug_seamcall, "CPU0", "tdh_mem_sept_add", None, at=at, choose=(1,))
    wrote = OVER | {"mirror_table": "absent", "failures_left[seamcall]": 0}
    assert ran == did("retry", wrote, counts=["seamcalls", "seamcall-busy", "npf"])


def test_a_sept_add_that_succeeds_hangs_the_table(tiny: Machine) -> None:
    ran = aug(tiny, {"mirror_table": "frozen"}, "tdh_mem_sept_add")
    assert ran == did(None, {"sept_table": State.NL_MAPPED}, counts=["seamcalls"])


@pytest.mark.parametrize(
    ("at", "bit_and", "retries"),
    [
        (FROZEN, False, False),  # TDX_EPT_WALK_FAILED
        (FROZEN, True, True),  # it has the bit of TDX_OPERAND_BUSY
        (TABLE | FROZEN | {"pamt[P0]": "REG"}, False, False),
        (TABLE | FROZEN | {"pamt[P0]": "REG"}, True, True),
    ],
)
def test_any_other_error_of_an_aug_is_a_bug_unless_busy_is_asked_by_its_bit(
    tiny: Machine, at: dict[str, Any], bit_and: bool, retries: bool
) -> None:
    ran = aug(tiny, at, word="bit_and" if bit_and else None)
    assert ran.broke == ([] if retries else BUG) and ran.result == ("retry" if retries else None)


# Memory by KeyID.


def test_a_write_back_may_have_come_at_any_time_and_in_any_order(tiny: Machine) -> None:
    both = Line(ZERO, HOST, False, ((HOST, THEIRS), (HKID, TD)))
    ends = []
    for choice in range(5):
        s = tiny.view({"memory[P0]": both}, (choice,))
        ends.append(keyids.settled(s, "P0"))
    assert s.choices == (4,) and len(s._choices) == 1 and s._choices[0][1] == 5
    assert ends == [
        both,
        Line(THEIRS, HOST, False, ((HKID, TD),)),
        Line(TD, HKID, False, ((HOST, THEIRS),)),
        Line(TD, HKID),
        Line(THEIRS, HOST),
    ]


def test_a_load_gets_what_its_key_allows_and_poison_brings_a_machine_check(tiny: Machine) -> None:
    load = keyids.load, "P0"
    td = {"memory[P0]": Line(TD, HKID)}
    assert tiny.run(*load, HKID, "TD", at=td) == did(("data", TD))
    assert tiny.run(*load, HOST, "host", at=td) == did(("zeros", ZERO))
    theirs = {"memory[P0]": Line(THEIRS, HOST)}
    ran = tiny.run(*load, HKID, "TD", at=theirs)
    assert ran == did(("poison", ZERO), {"memory[P0]": Line(THEIRS, HOST, True)}, ["host-machine-check"])


def test_a_store_fills_its_line_first(tiny: Machine) -> None:
    store = keyids.store, "P0"
    at = {"memory[P0]": Line(THEIRS, HOST)}
    assert tiny.run(*store, HOST, ZERO, "host", at=at) == did(
        "data", {"memory[P0]": Line(THEIRS, HOST, False, ((HOST, ZERO),))}
    )
    assert tiny.run(*store, HKID, TD, "TD", at=at).broke == ["host-machine-check"]


@pytest.mark.parametrize("integrity", [True, False])
def test_without_a_mac_the_owner_bit_is_still_looked_at(integrity: bool) -> None:
    machine = Machine(platform="tdx", integrity=integrity)
    at = {"memory[P0]": Line(THEIRS, HOST)}
    assert machine.run(keyids.load, "P0", HKID, "TD", at=at).result[0] == "poison"
    assert machine.run(keyids.store, "P0", HKID, TD, "TD", at=at).result == "poison"


@pytest.mark.parametrize(("erratum", "line"), [(False, Line(THEIRS, HOST)), (True, Line(TD, HKID, True))])
def test_a_partial_store_to_a_tds_line_poisons_it_on_parts_with_the_erratum(
    erratum: bool, line: Line
) -> None:
    machine = Machine("host-writes-private", "tdx", partial_write_erratum=erratum)
    ran = machine.run(keyids.partial_store, "P0", THEIRS, at={"memory[P0]": Line(TD, HKID)})
    assert ran.wrote == {"memory[P0]": line} and ran.broke == []


def test_the_module_zeroes_with_the_tds_key_and_the_kernel_with_key_0(tiny: Machine) -> None:
    at = {"memory[P0]": Line(THEIRS, HOST, True)}
    assert tiny.run(keyids.module_zero, "P0", at=at).wrote == {"memory[P0]": Line(ZERO, HKID)}
    assert tiny.run(keyids.clear_by_movdir64b, "P0", at=at).wrote == {"memory[P0]": Line(ZERO, HOST)}


MIXED = {"memory[P0]": Line(ZERO, HKID, False, ((HOST, THEIRS), (HKID, TD)))}


def test_each_flush_is_of_one_key(tiny: Machine) -> None:
    clean = Line(THEIRS, HOST, False, ((HKID, TD),))
    assert tiny.run(keyids.clflush, "P0", at=MIXED).wrote == {"memory[P0]": clean}
    clean = Line(TD, HKID, False, ((HOST, THEIRS),))
    assert tiny.run(keyids.wbinvd, "P0", at=MIXED).wrote == {"memory[P0]": clean}


def test_before_aug_the_kernel_flushes_the_faults_page(tiny: Machine) -> None:
    ran = tiny.run(tdx.clflush, "CPU0", at=at_fault() | MIXED)
    assert ran.wrote == {"memory[P0]": Line(THEIRS, HOST, False, ((HKID, TD),))}


def test_a_new_page_is_zeroed_by_ordinary_stores(tiny: Machine) -> None:
    ran = tiny.run(keyids.clear_highpage, "P0", at={"memory[P0]": Line(THEIRS, HOST)})
    assert ran == did(None, {"memory[P0]": Line(THEIRS, HOST, False, ((HOST, ZERO),))})


@pytest.mark.parametrize("step", [keyids.clflush, keyids.clear_by_movdir64b, keyids.clear_highpage])
def test_what_goes_through_the_directmap_needs_the_page_there(
    tiny: Machine, step: Callable[..., Any]
) -> None:
    ran = tiny.run(step, "P0", at=MIXED | {"directmap[P0]": "absent"})
    assert (ran.wrote, ran.broke) == ({}, ["kernel-bug"])


def test_seamcalls_need_no_directmap(tiny: Machine) -> None:
    at = MIXED | {"directmap[P0]": "absent"}
    assert tiny.run(keyids.wbinvd, "P0", at=at).broke == tiny.run(keyids.module_zero, "P0", at=at).broke == []


# guest_memfd.


def test_a_page_is_zeroed_once_before_its_first_use(tiny: Machine) -> None:
    zeroed = {"uptodate[0]": True, "memory[P0]": Line(THEIRS, HOST, False, ((HOST, ZERO),))}
    at = at_fault() | {"memory[P0]": Line(THEIRS, HOST)}
    get = gmem.kvm_gmem_get_pfn, "CPU0"
    assert tiny.run(*get, "private", at=at) == did(None, zeroed)
    assert tiny.run(*get, "private", at=at | {"uptodate[0]": True}) == did()
    assert tiny.run(*get, "shared", at=at) == did()
    assert tiny.run(gmem.look_up_in_ioctl, "CPU0", (0,), at=at) == did(None, zeroed)


def test_a_page_that_is_freed_is_zeroed_again_before_its_next_use() -> None:
    machine = Machine("discard", "tdx")
    at = {"gmem[0]": "dying", "uptodate[0]": True}
    assert machine.run(gmem.folio_put, "CPU0", 0, at=at).wrote == {"gmem[0]": "free", "uptodate[0]": False}
    at = {"gmem[0]": "free", "memory[P0]": Line(THEIRS, HOST)}
    assert machine.run(gmem.hold_page, "CPU0", 0, at=at).wrote == {
        "gmem[0]": "cached",
        "folio_ref[CPU0, 0]": True,
    }


# What a fault of shared memory does on tdx.


def test_a_stale_fault_is_one_more_fault_of_the_same_loop(tiny: Machine) -> None:
    at = at_fault() | READER | {"snapshot[CPU0]": "moved"}
    ran = tiny.run(mmu.is_page_fault_stale, "CPU0", at=at)
    assert ran == did("retry", OVER, counts=["retry", "npf"])


def test_any_translation_may_vanish(tiny: Machine) -> None:
    at = {"tlb[CPU0, 0]": "S0", "ptlb[CPU1, 0]": "P0"}
    vanishes = mmu.tlb_entry_vanishes, "TLB"
    assert tiny.run(*vanishes, at=at) == did(None, {"tlb[CPU0, 0]": None})
    assert tiny.run(*vanishes, at=at, choose=(1,)) == did(None, {"ptlb[CPU1, 0]": None})
    assert tiny.run(*vanishes).result == BLOCKED

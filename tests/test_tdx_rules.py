"""The TDX module's rules, row by row, without a TD."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlab.hw import tdx
from kvmlab.hw.rules import Rules
from kvmlab.hw.tdx import Guest, Leaf, Level, Operand, Status
from kvmlab.hw.tdx import entry as tdx_entry
from kvmlab.hw.tdx import lines as tdx_lines
from kvmlab.hw.tdx import locks as tdx_locks
from kvmlab.hw.tdx import pamt as tdx_pamt
from kvmlab.hw.tdx import sept as tdx_sept
from kvmlab.hw.tdx import td as tdx_td
from kvmlab.hw.tdx import tlb as tdx_tlb
from kvmlab.hw.tdx import words as tdx_words
from kvmlab.hw.tdx.checks import Check, answer, seamcall, told
from kvmlab.hw.tdx.entry import State
from kvmlab.hw.tdx.locks import EXCLUSIVE, NONE, SHARED, EntryLock, Lock
from kvmlab.hw.tdx.pamt import NDA, Change, PageType, PamtEntry
from kvmlab.hw.tdx.sept import Children
from kvmlab.hw.tdx.td import Lifecycle, TdState
from kvmlab.hw.tdx.tlb import CALM, Age, Epochs, ZeroStep

MODULES = (tdx_words, tdx_sept, tdx_locks, tdx_pamt, tdx_td, tdx_tlb, tdx_lines)
WRITTEN_IN = [found.name for found in pkgutil.iter_modules(tdx.__path__, "kvmlab.hw.tdx.")]
TABLES = [table for module in MODULES for table in vars(module).values() if isinstance(table, Rules)]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.source)
def test_every_table_names_its_source_and_prints_every_row(table: Rules) -> None:
    assert table.source.startswith("TDX")
    assert len(table.text().splitlines()) == len(table.rows) + 3


@pytest.mark.parametrize("name", WRITTEN_IN)
def test_every_rule_can_be_imported_from_the_face(name: str) -> None:
    module = importlib.import_module(name)
    rules = {
        name: rule
        for name, rule in vars(module).items()
        if isinstance(rule, Rules) or getattr(rule, "__module__", "") == module.__name__
    }
    public = [name for name in rules if not name.startswith("_")]
    assert public and all(getattr(tdx, name) is rules[name] for name in public)


# Interface: names and numbers.


@pytest.mark.parametrize(
    ("leaf", "number"),
    [
        (Leaf.VP_ENTER, 0),
        (Leaf.PAGE_ADD, 2),
        (Leaf.SEPT_ADD, 3),
        (Leaf.PAGE_AUG, 6),
        (Leaf.RANGE_BLOCK, 7),
        (Leaf.PAGE_DEMOTE, 15),
        (Leaf.PAGE_PROMOTE, 23),
        (Leaf.PAGE_RDMD, 24),
        (Leaf.PAGE_RECLAIM, 28),
        (Leaf.PAGE_REMOVE, 29),
        (Leaf.SEPT_REMOVE, 30),
        (Leaf.TRACK, 38),
        (Leaf.RANGE_UNBLOCK, 39),
        (Leaf.CACHE_WB, 40),
        (Leaf.PAGE_WBINVD, 41),
        (Leaf.ACCEPT, 6),
        (Leaf.MR_FINALIZE, 17),
        (Leaf.VP_FLUSH, 18),
        (Leaf.MNG_VPFLUSHDONE, 19),
        (Leaf.MNG_KEY_FREEID, 20),
    ],
)
def test_a_leaf_has_its_number(leaf: Leaf, number: int) -> None:
    assert leaf.number == number


@pytest.mark.parametrize(
    ("status", "value", "kind"),
    [
        ("SUCCESS", 0x0000000000000000, tdx.OK),
        ("OPERAND_INVALID", 0xC000010000000000, tdx.ERROR),
        ("OPERAND_ADDR_RANGE_ERROR", 0xC000010100000000, tdx.ERROR),
        ("OPERAND_BUSY", 0x8000020000000000, tdx.RETRY),
        ("PREVIOUS_TLB_EPOCH_BUSY", 0x8000020100000000, tdx.RETRY),
        ("OPERAND_BUSY_HOST_PRIORITY", 0x8000020400000000, tdx.RETRY),
        ("HOST_PRIORITY_BUSY_TIMEOUT", 0x9000020500000000, tdx.RETRY),
        ("PAGE_METADATA_INCORRECT", 0xC000030000000000, tdx.ERROR),
        ("EPT_WALK_FAILED", 0xC0000B0000000000, tdx.ERROR),
        ("GPA_RANGE_NOT_BLOCKED", 0xC0000B0600000000, tdx.ERROR),
        ("GPA_RANGE_ALREADY_BLOCKED", 0x00000B0700000000, tdx.WARNING),
        ("TLB_TRACKING_NOT_DONE", 0xC0000B0800000000, tdx.ERROR),
        ("EPT_INVALID_PROMOTE_CONDITIONS", 0xC0000B0900000000, tdx.ERROR),
        ("PAGE_ALREADY_ACCEPTED", 0x00000B0A00000000, tdx.WARNING),
        ("PAGE_SIZE_MISMATCH", 0xC0000B0B00000000, tdx.ERROR),
        ("EPT_ENTRY_STATE_INCORRECT", 0xC0000B0D00000000, tdx.ERROR),
        ("EPT_PAGE_NOT_FREE", 0xC0000B0E00000000, tdx.ERROR),
        ("INTERRUPTED_RESTARTABLE", 0x8000000400000000, tdx.RETRY),
        ("INTERRUPTED_RESUMABLE", 0x8000000300000000, tdx.RETRY),
        ("TD_ASSOCIATED_PAGES_EXIST", 0xC000040000000000, tdx.ERROR),
        ("TD_FATAL", 0xE000060400000000, tdx.ERROR),
        ("LIFECYCLE_STATE_INCORRECT", 0xC000060700000000, tdx.ERROR),
        ("OP_STATE_INCORRECT", 0xC000060800000000, tdx.ERROR),
        ("NO_VCPUS", 0xC000060900000000, tdx.ERROR),
        ("VCPU_NOT_ASSOCIATED", 0x8000070200000000, tdx.RETRY),
        ("TD_KEYS_NOT_CONFIGURED", 0x8000081000000000, tdx.RETRY),
        ("WBCACHE_NOT_COMPLETE", 0x8000081700000000, tdx.RETRY),
        ("NO_HKID_READY_TO_WBCACHE", 0x0000082100000000, tdx.WARNING),
        ("FLUSHVP_NOT_DONE", 0x8000082400000000, tdx.RETRY),
        ("NON_RECOVERABLE_TD", 0x6000000200000000, tdx.LOST),
        ("NON_RECOVERABLE_TD_NON_ACCESSIBLE", 0x6000000500000000, tdx.LOST),
    ],
)
def test_a_completion_code_has_its_value_and_class(status: str, value: int, kind: str) -> None:
    assert Status[status] == value and tdx.kind(value) == kind


@pytest.mark.parametrize(
    ("operand", "number"),
    [
        ("RCX", 1),
        ("RDX", 2),
        ("R8", 8),
        ("TDR", 0x80),
        ("SEPT_TREE", 0x92),
        ("SEPT_ENTRY", 147),
        ("TD_EPOCH", 0xA9),
        ("OP_STATE", 172),
        ("RAX", 0),
        ("R9", 9),
    ],
)
def test_an_operand_id_has_its_number(operand: str, number: int) -> None:
    assert Operand[operand] == number


@pytest.mark.parametrize(
    ("rax", "text"),
    [
        (0x8000020000000092, "TDX_OPERAND_BUSY | SEPT_TREE"),
        (0x80000200000000A9, "TDX_OPERAND_BUSY | TD_EPOCH"),
        (0x8000020000000001, "TDX_OPERAND_BUSY | RCX"),
        (0x8000020000000008, "TDX_OPERAND_BUSY | R8"),
        (0x00000B0A00000001, "TDX_PAGE_ALREADY_ACCEPTED | 2M"),
        (0x8000020100000000, "TDX_PREVIOUS_TLB_EPOCH_BUSY"),
        (48, "TDX_SUCCESS | EXIT_REASON_EPT_VIOLATION"),
        (0xC0000B0800000055, "TDX_TLB_TRACKING_NOT_DONE | 0x55"),
        (0xC00012340000000A, "0xc000123400000000 | 0xa"),
        (0x00000B0A00000004, "TDX_PAGE_ALREADY_ACCEPTED | 256T"),
        (0x00000B0A00000005, "TDX_PAGE_ALREADY_ACCEPTED | 0x5"),
        (0xC0000B0B00000000, "TDX_PAGE_SIZE_MISMATCH | 4K"),
        (0, "TDX_SUCCESS"),
        (0x8000020000000030, "TDX_OPERAND_BUSY | 0x30"),
    ],
)
def test_a_completion_is_named_with_its_operand(rax: int, text: str) -> None:
    assert tdx.name(rax) == text


def test_linux_and_the_module_differ_in_the_value_of_non_recoverable_td() -> None:
    assert tdx.name(0x4000000200000000) == tdx.name(0x6000000200000000) == "TDX_NON_RECOVERABLE_TD"


def test_the_epoch_busy_code_is_not_the_one_that_kvm_retries() -> None:
    assert tdx.status_part(tdx.busy(Operand.TD_EPOCH)) == Status.OPERAND_BUSY
    assert tdx.status_part(Status.PREVIOUS_TLB_EPOCH_BUSY) != Status.OPERAND_BUSY


def test_levels_cover_powers_of_512_pages_and_have_names() -> None:
    assert [level.pages for level in Level] == [1, 512, 512**2, 512**3, 512**4]
    assert [str(level) for level in Level] == ["4K", "2M", "1G", "512G", "256T"]
    assert [level.value for level in Level] == [0, 1, 2, 3, 4] and tdx.CHILDREN == 512


def test_a_status_and_its_operand_come_apart_again() -> None:
    rax = tdx.with_operand(Status.OPERAND_BUSY, Operand.SEPT_TREE)
    assert (tdx.status_part(rax), tdx.operand_part(rax)) == (Status.OPERAND_BUSY, Operand.SEPT_TREE)
    assert tdx.operand_part(0x80000200FFFFFFFF) == 0xFFFFFFFF and tdx.SEPT_VE_DISABLE == 0x10000000


def test_a_gpa_is_shared_by_bit_47_unless_it_is_wide() -> None:
    assert tdx.is_shared(1 << 47) and not tdx.is_shared(1 << 51)


@pytest.mark.parametrize("leaf", tdx_sept.LEAVES)
@pytest.mark.parametrize("top", [Level.PML4, Level.PML5])
def test_each_leaf_takes_these_levels(leaf: Leaf, top: Level) -> None:
    up_to_top = range(top + 1)
    taken = {
        Leaf.PAGE_ADD: (0,),
        Leaf.PAGE_AUG: (0, 1),
        Leaf.ACCEPT: (0, 1),
        Leaf.PAGE_REMOVE: (0, 1, 2),
        Leaf.PAGE_DEMOTE: (1, 2),
        Leaf.PAGE_PROMOTE: (1, 2),
        Leaf.SEPT_ADD: up_to_top[1:],
        Leaf.SEPT_REMOVE: up_to_top[1:],
        Leaf.RANGE_BLOCK: up_to_top,
        Leaf.RANGE_UNBLOCK: up_to_top,
    }
    assert [level for level in Level if tdx_sept.LEVELS(leaf=leaf, level=level, top=top)] == list(taken[leaf])


@pytest.mark.parametrize(("gpaw", "bit"), [(False, 47), (True, 51)])
def test_the_shared_bit_follows_the_width_of_gpas(gpaw: bool, bit: int) -> None:
    assert tdx.is_shared(1 << bit, gpaw=gpaw) and not tdx.is_shared(1 << bit - 1, gpaw=gpaw)


# S-EPT entries.


@pytest.mark.parametrize(
    ("state", "encoding", "public", "rwx"),
    [
        ("FREE", 0x0E, 0, 0),
        ("NL_MAPPED", 0x00, 132, 7),
        ("NL_BLOCKED", 0x08, 129, 0),
        ("MAPPED", 0x60, 4, 7),
        ("BLOCKED", 0x68, 1, 0),
        ("PENDING", 0x70, 2, 0),
        ("PENDING_BLOCKED", 0x78, 3, 0),
    ],
)
def test_an_entry_state_has_its_encoding_public_number_and_permissions(
    state: str, encoding: int, public: int, rwx: int
) -> None:
    assert (State[state].encoding, State[state].public, State[state].rwx) == (encoding, public, rwx)


def test_no_two_states_share_an_encoding_or_a_public_number() -> None:
    every = [(state.value, state.encoding, state.public) for state in State]
    assert [len(set(column)) for column in zip(*every, strict=True)] == [7, 7, 7]


@pytest.mark.parametrize(
    ("state", "raw"),
    [
        (State.FREE, 0x8000000000000000),
        (State.NL_MAPPED, 0x7),  # no address
        (State.NL_BLOCKED, 0x0),
        (State.MAPPED, 0x80000000123450F7),
        (State.BLOCKED, 0x80000000123450F0),
        (State.PENDING, 0x80000000123450F0),
    ],
)
def test_an_error_shows_the_entry_in_rcx(state: State, raw: int) -> None:
    assert tdx_entry.arch_entry(state, 0x12345000) == raw


def test_these_refusals_show_the_entry_and_others_nothing() -> None:
    assert {check for check in Check if check.reports} == {
        Check.WALK, Check.ENTRY, Check.STATE, Check.BLOCKED, Check.CHILD, Check.CHILDREN,
    }  # fmt: skip


def test_an_entry_without_an_address_shows_its_bits_alone() -> None:
    assert tdx_entry.arch_entry(MAPPED) == 0x80000000000000F7
    assert tdx_entry.arch_entry(BLOCKED) == 0x80000000000000F0


def test_an_error_shows_the_accept_counter_of_a_large_pending_entry() -> None:
    assert tdx_entry.arch_entry(State.PENDING, 0x12200000, 5) == 0x80000000122050F0


def test_an_error_shows_level_and_public_state_in_rdx() -> None:
    assert tdx_entry.arch_info(State.NL_BLOCKED, Level.PD) == 129 << 8 | 1


FREE, NL_MAPPED, NL_BLOCKED, MAPPED, BLOCKED, PENDING, PENDING_BLOCKED = State


@pytest.mark.parametrize(
    ("state", "leaf", "conditions", "then"),
    [
        (FREE, Leaf.SEPT_ADD, {}, NL_MAPPED),
        (FREE, Leaf.PAGE_ADD, {"running": False}, MAPPED),
        (FREE, Leaf.PAGE_AUG, {}, PENDING),
        (FREE, Leaf.PAGE_AUG, {"running": False}, PENDING),
        (PENDING, Leaf.ACCEPT, {}, MAPPED),
        (MAPPED, Leaf.RANGE_BLOCK, {}, BLOCKED),
        (PENDING, Leaf.RANGE_BLOCK, {}, PENDING_BLOCKED),
        (NL_MAPPED, Leaf.RANGE_BLOCK, {}, NL_BLOCKED),
        (BLOCKED, Leaf.RANGE_UNBLOCK, {}, MAPPED),
        (PENDING_BLOCKED, Leaf.RANGE_UNBLOCK, {}, PENDING),
        (NL_BLOCKED, Leaf.RANGE_UNBLOCK, {}, NL_MAPPED),
        (BLOCKED, Leaf.PAGE_REMOVE, {}, FREE),
        (PENDING_BLOCKED, Leaf.PAGE_REMOVE, {}, FREE),
        (MAPPED, Leaf.PAGE_REMOVE, {"running": False, "tracked": False}, FREE),
        (PENDING, Leaf.PAGE_REMOVE, {"running": False, "tracked": False}, FREE),
        (BLOCKED, Leaf.PAGE_DEMOTE, {}, NL_MAPPED),
        (PENDING_BLOCKED, Leaf.PAGE_DEMOTE, {}, NL_MAPPED),
        (MAPPED, Leaf.PAGE_DEMOTE, {"running": False}, NL_MAPPED),
        (NL_BLOCKED, Leaf.PAGE_PROMOTE, {"children": Children.MAPPED}, MAPPED),
        (NL_BLOCKED, Leaf.PAGE_PROMOTE, {"children": Children.PENDING}, PENDING),
        (NL_MAPPED, Leaf.PAGE_PROMOTE, {"children": Children.MAPPED, "running": False}, MAPPED),
        (NL_MAPPED, Leaf.PAGE_PROMOTE, {"children": Children.PENDING, "running": False}, PENDING),
        (NL_BLOCKED, Leaf.SEPT_REMOVE, {"children": Children.FREE}, FREE),
        (NL_MAPPED, Leaf.SEPT_REMOVE, {"children": Children.FREE, "running": False}, FREE),
    ],
)
def test_a_leaf_takes_an_entry_from_state_to_state(
    state: State, leaf: Leaf, conditions: dict[str, Any], then: State
) -> None:
    assert seamcall(leaf, state, **conditions) == (Status.SUCCESS, 0, then, None)


UNTRACKED, IN_USE, BEFORE = {"tracked": False}, {"page_free": False}, {"running": False}


@pytest.mark.parametrize(
    ("state", "leaf", "conditions", "rax"),
    [
        (MAPPED, Leaf.PAGE_ADD, BEFORE, 0xC0000B0D00000001),
        (FREE, Leaf.PAGE_ADD, {}, 0xC000060800000000),
        (FREE, Leaf.PAGE_ADD, BEFORE | IN_USE, 0xC000030000000008),
        (PENDING, Leaf.PAGE_AUG, {}, 0xC0000B0D00000001),
        (BLOCKED, Leaf.PAGE_AUG, {}, 0xC0000B0D00000001),
        (FREE, Leaf.PAGE_AUG, IN_USE, 0xC000030000000008),
        (NL_MAPPED, Leaf.SEPT_ADD, {}, 0xC0000B0D00000001),
        (FREE, Leaf.SEPT_ADD, IN_USE, 0xC000030000000008),
        (FREE, Leaf.RANGE_BLOCK, {}, 0xC0000B0D00000001),
        (BLOCKED, Leaf.RANGE_BLOCK, {}, 0x00000B0700000001),
        (PENDING_BLOCKED, Leaf.RANGE_BLOCK, {}, 0x00000B0700000001),
        (NL_BLOCKED, Leaf.RANGE_BLOCK, {}, 0x00000B0700000001),
        (MAPPED, Leaf.RANGE_UNBLOCK, {}, 0xC0000B0D00000001),
        (BLOCKED, Leaf.RANGE_UNBLOCK, UNTRACKED, 0xC0000B0800000092),
        (FREE, Leaf.PAGE_REMOVE, {}, 0xC0000B0D00000001),
        (NL_BLOCKED, Leaf.PAGE_REMOVE, {}, 0xC0000B0D00000001),
        (MAPPED, Leaf.PAGE_REMOVE, {}, 0xC0000B0600000001),
        (PENDING, Leaf.PAGE_REMOVE, {}, 0xC0000B0600000001),
        (BLOCKED, Leaf.PAGE_REMOVE, UNTRACKED, 0xC0000B0800000001),
        (MAPPED, Leaf.PAGE_DEMOTE, {}, 0xC0000B0600000001),
        (BLOCKED, Leaf.PAGE_DEMOTE, UNTRACKED, 0xC0000B0800000001),
        (BLOCKED, Leaf.PAGE_DEMOTE, IN_USE, 0xC000030000000008),
        (MAPPED, Leaf.PAGE_DEMOTE, BEFORE | IN_USE, 0xC000030000000008),
        (NL_MAPPED, Leaf.PAGE_DEMOTE, {}, 0xC0000B0D00000001),
        (NL_MAPPED, Leaf.PAGE_PROMOTE, BEFORE, 0xC0000B0900000001),
        (NL_MAPPED, Leaf.SEPT_REMOVE, BEFORE, 0xC0000B0E00000001),
        (NL_MAPPED, Leaf.PAGE_PROMOTE, {}, 0xC0000B0600000001),
        (NL_BLOCKED, Leaf.PAGE_PROMOTE, UNTRACKED, 0xC0000B0800000001),
        (NL_BLOCKED, Leaf.PAGE_PROMOTE, {"children": Children.MIXED}, 0xC0000B0900000001),
        (NL_BLOCKED, Leaf.PAGE_PROMOTE, {"children": Children.FREE}, 0xC0000B0900000001),
        (MAPPED, Leaf.PAGE_PROMOTE, {}, 0xC0000B0D00000001),
        (NL_MAPPED, Leaf.SEPT_REMOVE, {"children": Children.FREE}, 0xC0000B0600000001),
        (NL_BLOCKED, Leaf.SEPT_REMOVE, UNTRACKED, 0xC0000B0800000001),
        (NL_BLOCKED, Leaf.SEPT_REMOVE, {"children": Children.MIXED}, 0xC0000B0E00000001),
        (FREE, Leaf.SEPT_REMOVE, {}, 0xC0000B0D00000001),
    ],
)
def test_a_leaf_refuses_a_wrong_state_and_leaves_the_entry_alone(
    state: State, leaf: Leaf, conditions: dict[str, Any], rax: int
) -> None:
    found = seamcall(leaf, state, **conditions)
    assert (found.rax, found.state) == (rax, state)


@pytest.mark.parametrize("state", tuple(State))
@pytest.mark.parametrize("leaf", tdx_sept.LEAVES)
def test_no_leaf_of_a_running_td_makes_a_mapped_entry_of_one_that_was_not_accepted(
    leaf: Leaf, state: State
) -> None:
    then = {seamcall(leaf, state, children=children).state for children in Children}
    assert MAPPED not in then or state in (MAPPED, BLOCKED) or leaf in (Leaf.ACCEPT, Leaf.PAGE_PROMOTE)


@pytest.mark.parametrize("leaf", [Leaf.PAGE_AUG, Leaf.PAGE_REMOVE, Leaf.SEPT_ADD, Leaf.RANGE_BLOCK])
@pytest.mark.parametrize("level", tuple(Level))
def test_a_level_that_a_leaf_does_not_take_is_an_invalid_operand(leaf: Leaf, level: Level) -> None:
    allowed = {
        Leaf.PAGE_AUG: (0, 1),
        Leaf.PAGE_REMOVE: (0, 1, 2),
        Leaf.SEPT_ADD: (1, 2, 3, 4),
        Leaf.RANGE_BLOCK: range(5),
    }
    assert (seamcall(leaf, FREE, level=level).rax == 0xC000010000000001) == (level not in allowed[leaf])


@pytest.mark.parametrize("level", tuple(Level))
@pytest.mark.parametrize("state", tuple(State))
def test_the_op_state_is_asked_before_the_level_and_the_entry(state: State, level: Level) -> None:
    assert seamcall(Leaf.PAGE_ADD, state, level=level).rax == 0xC000060800000000


def test_before_finalize_a_level_that_page_add_does_not_take_is_an_invalid_operand() -> None:
    assert seamcall(Leaf.PAGE_ADD, FREE, running=False, level=Level.PD).rax == 0xC000010000000001


def test_the_level_is_asked_before_the_entry() -> None:
    assert seamcall(Leaf.PAGE_AUG, MAPPED, level=Level.PDPT).rax == 0xC000010000000001


@pytest.mark.parametrize("leaf", [Leaf.TRACK, Leaf.VP_ENTER, Leaf.PAGE_WBINVD])
def test_a_leaf_that_works_on_no_entry_is_refused_in_words(leaf: Leaf) -> None:
    with pytest.raises(ValueError, match=f"{leaf} works on no S-EPT entry; these do: TDH.MEM.PAGE.ADD"):
        seamcall(leaf, FREE)


@pytest.mark.parametrize("state", tuple(State))
def test_a_seamcall_walks_on_only_through_a_table_that_is_not_blocked(state: State) -> None:
    found = answer(Leaf.PAGE_AUG, told(above=(Level.PD, state)))
    assert found.rax == (0 if state == NL_MAPPED else 0xC0000B0000000001)


def test_what_an_answer_says_in_words() -> None:
    assert str(tdx_sept.Outcome(Status.SUCCESS, None, PENDING)) == "-> PENDING"
    assert str(tdx_sept.Outcome(Status.GPA_RANGE_NOT_BLOCKED, Operand.RCX)) == "TDX_GPA_RANGE_NOT_BLOCKED RCX"
    assert str(tdx_sept.Outcome(Status.PAGE_ALREADY_ACCEPTED, "level")) == "TDX_PAGE_ALREADY_ACCEPTED level"


def test_only_success_is_ok() -> None:
    assert seamcall(Leaf.PAGE_AUG, FREE).ok and not seamcall(Leaf.PAGE_AUG, MAPPED).ok
    assert not seamcall(Leaf.RANGE_BLOCK, BLOCKED).ok  # a warning is not success


@pytest.mark.parametrize("state", tuple(State))
def test_a_leaf_entry_is_one_that_maps_a_page(state: State) -> None:
    assert state.leaf == (state in (MAPPED, BLOCKED, PENDING, PENDING_BLOCKED))


@pytest.mark.parametrize(
    ("state", "then"), [(BLOCKED, MAPPED), (PENDING_BLOCKED, PENDING), (MAPPED, MAPPED), (PENDING, PENDING)]
)
def test_demote_leaves_512_entries_that_are_not_blocked(state: State, then: State) -> None:
    assert tdx_sept.demoted(state) == then


def test_a_walk_that_fails_names_rcx_and_a_larger_page_its_level() -> None:
    assert answer(Leaf.RANGE_BLOCK, told(above=(Level.PDPT, FREE))).rax == 0xC0000B0000000001
    assert answer(Leaf.ACCEPT, told(above=(Level.PDPT, MAPPED))).rax == 0x00000B0A00000002


# The life of a TD.

INITIALIZED, RUNNABLE = tdx_td.OpState.INITIALIZED, tdx_td.OpState.RUNNABLE
WITH_KEY = tdx_td.Lifecycle.KEYS_CONFIGURED


@pytest.mark.parametrize(
    ("leaf", "before", "after"),
    [
        (Leaf.PAGE_ADD, True, False),
        (Leaf.MR_FINALIZE, True, False),
        (Leaf.VP_ENTER, False, True),
        (Leaf.PAGE_AUG, True, True),
        (Leaf.TRACK, True, True),
    ],
)
def test_an_op_state_lets_a_leaf_in_or_not(leaf: Leaf, before: bool, after: bool) -> None:
    for op_state, let_in in ((INITIALIZED, before), (RUNNABLE, after), (tdx_td.OpState.UNINITIALIZED, False)):
        found = answer(leaf, told(td=TdState(op_state=op_state)))
        assert found.rax == (0 if let_in else Status.OP_STATE_INCORRECT)


@pytest.mark.parametrize("lifecycle", [each for each in tdx_td.Lifecycle if each != WITH_KEY])
def test_without_its_key_a_td_lets_nothing_in_whatever_its_op_state(lifecycle: Lifecycle) -> None:
    for op_state in tdx_td.OpState:
        td = TdState(lifecycle, op_state)
        assert answer(Leaf.PAGE_AUG, told(td=td)).rax == Status.TD_KEYS_NOT_CONFIGURED
        assert answer(Leaf.PAGE_AUG, told(td=td._replace(fatal=True))).rax == Status.TD_FATAL


@pytest.mark.parametrize(
    ("leaf", "lifecycles", "not_ready"),
    [
        (Leaf.MNG_VPFLUSHDONE, {"HKID_ASSIGNED", "KEYS_CONFIGURED"}, Status.FLUSHVP_NOT_DONE),
        (Leaf.MNG_KEY_FREEID, {"BLOCKED"}, Status.WBCACHE_NOT_COMPLETE),
        (Leaf.PAGE_RECLAIM, {"TEARDOWN"}, Status.TD_ASSOCIATED_PAGES_EXIST),
    ],
)
def test_each_step_of_a_tds_end_has_its_moment(leaf: Leaf, lifecycles: set[str], not_ready: Status) -> None:
    for lifecycle in tdx_td.Lifecycle:
        answers = [tdx_td.TEARDOWN(leaf=leaf, lifecycle=lifecycle, ready=ready) for ready in (True, False)]
        in_time = [Status.SUCCESS, not_ready]
        assert answers == (in_time if lifecycle in lifecycles else [Status.LIFECYCLE_STATE_INCORRECT] * 2)


def test_tracking_counts_once_a_td_may_run() -> None:
    assert [tdx_td.running(op_state) for op_state in tdx_td.OpState] == [False, False, True]


# ACCEPT.


@pytest.mark.parametrize(
    ("state", "level", "outcome"),
    [
        (PENDING, Level.PT, 0),
        (PENDING, Level.PD, 0),
        (MAPPED, Level.PT, 0x00000B0A00000000),
        (MAPPED, Level.PD, 0x00000B0A00000001),
        (NL_MAPPED, Level.PD, 0xC0000B0B00000001),
        (NL_BLOCKED, Level.PD, 0xC0000B0B00000001),
        (FREE, Level.PT, Guest.EXIT_ACCEPT),
        (BLOCKED, Level.PT, Guest.EXIT_ACCEPT),
        (PENDING_BLOCKED, Level.PT, Guest.EXIT_ACCEPT),
    ],
)
def test_accept_answers_by_the_entry_that_it_finds_at_its_level(
    state: State, level: Level, outcome: Guest | int
) -> None:
    found = seamcall(Leaf.ACCEPT, state, level=level)
    assert outcome in (found.status, found.rax)


@pytest.mark.parametrize(
    ("state", "outcome"),
    [
        (MAPPED, 0x00000B0A00000001),
        (PENDING, Guest.EXIT_ACCEPT),  # a 2M page pending for a 4K ask
        (BLOCKED, Guest.EXIT_ACCEPT),
        (PENDING_BLOCKED, Guest.EXIT_ACCEPT),
        (FREE, Guest.EXIT_ACCEPT),  # a table is missing
        (NL_BLOCKED, Guest.EXIT_ACCEPT),
    ],
)
def test_accept_answers_by_the_entry_that_stops_it_above_its_level(
    state: State, outcome: Guest | int
) -> None:
    found = answer(Leaf.ACCEPT, told(above=(Level.PD, state)))
    assert outcome in (found.status, found.rax)


def test_the_exit_of_accept_says_type_1_levels_state_and_leaf() -> None:
    assert tdx_entry.accept_info(PENDING, Level.PT, Level.PD) == 1 | (0 | 1 << 3 | 2 << 6 | 1 << 14) << 32


def test_a_2m_accept_needs_512_chunks() -> None:
    counter, done, chunks = 0, False, 0
    while not done:
        counter, done = tdx_entry.accept_chunk(counter)
        chunks += 1
    assert (chunks, counter) == (512, 0)


@pytest.mark.parametrize(
    ("state", "ve_disable", "outcome"),
    [
        (MAPPED, False, Guest.DATA),
        (MAPPED, True, Guest.DATA),
        (PENDING, False, Guest.VE),
        (PENDING, True, Guest.EXIT_PENDING),
        (FREE, False, Guest.EXIT),
        (BLOCKED, False, Guest.EXIT),
        (PENDING_BLOCKED, False, Guest.EXIT),
        (NL_BLOCKED, False, Guest.EXIT),
    ],
)
def test_an_access_finds_its_page_or_a_ve_or_leaves_the_td(
    state: State, ve_disable: bool, outcome: Guest
) -> None:
    assert tdx_sept.access(state, ve_disable=ve_disable) == outcome


def test_a_pending_page_exits_by_default() -> None:
    assert tdx_sept.access(PENDING) == Guest.EXIT_PENDING


@pytest.mark.parametrize(("counter", "after"), [(0, (1, False)), (510, (511, False)), (511, (0, True))])
def test_a_2m_accept_counts_to_511_and_ends_at_0(counter: int, after: tuple[int, bool]) -> None:
    assert tdx_entry.accept_chunk(counter) == after


def test_an_access_to_a_pending_page_exits_with_type_6_and_other_violations_with_type_0() -> None:
    assert Guest.EXIT_PENDING.extended_qualification == 6 and Guest.EXIT.extended_qualification == 0


def test_no_access_ends_at_a_table() -> None:
    with pytest.raises(ValueError, match="descend"):
        tdx_sept.access(NL_MAPPED)


# PAMT.


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ({}, Status.SUCCESS),
        ({"entry": PamtEntry(PageType.REG)}, Status.PAGE_METADATA_INCORRECT),
        ({"larger": True}, Status.PAGE_METADATA_INCORRECT),
        ({"size": Level.PD}, Status.SUCCESS),
        ({"size": Level.PD, "children": False}, Status.PAGE_METADATA_INCORRECT),
    ],
)
def test_a_page_is_taken_only_if_the_pamt_knows_it_as_free_at_every_size(
    what: dict[str, Any], status: Status
) -> None:
    assert tdx_pamt.is_free(**{"size": Level.PT, "entry": NDA} | what) == status


OURS = PamtEntry(PageType.REG, 7, 3)


@pytest.mark.parametrize(
    ("page_type", "number"),
    [("NDA", 0), ("RSVD", 1), ("REG", 3), ("TDR", 4), ("TDCX", 5), ("TDVPR", 6), ("EPT", 8)],
)
def test_a_page_type_has_its_number(page_type: str, number: int) -> None:
    assert PageType[page_type] == number


def test_a_2m_page_is_refused_for_its_own_entry_a_larger_one_or_one_inside() -> None:
    big = dict(size=Level.PD, entry=NDA)
    for wrong in ({"entry": OURS}, {"larger": True}, {"children": False}):
        assert tdx_pamt.is_free(**big | wrong) == Status.PAGE_METADATA_INCORRECT
    assert tdx_pamt.is_free(Level.PT, NDA, children=False) == Status.SUCCESS
    assert NDA == (PageType.NDA, 0, 0)


def test_the_register_that_named_the_page_is_the_operand() -> None:
    assert tdx_pamt.PAGE_OPERAND == {
        Leaf.PAGE_ADD: 8, Leaf.PAGE_AUG: 8, Leaf.SEPT_ADD: 8, Leaf.PAGE_DEMOTE: 8, Leaf.PAGE_WBINVD: 1,
        Leaf.PAGE_RECLAIM: 1, Leaf.PAGE_RDMD: 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (tdx_pamt.Change(), "kept"),
        (tdx_pamt.Change(PageType.REG, "TD", "0"), "PT REG, OWNER TD, BEPOCH 0"),
        (tdx_pamt.Change(bepoch="TD_EPOCH"), "PT kept, OWNER kept, BEPOCH TD_EPOCH"),
    ],
)
def test_a_change_of_the_pamt_in_words(change: Change, text: str) -> None:
    assert str(change) == text


@pytest.mark.parametrize(
    ("leaf", "of", "before", "after"),
    [
        (Leaf.PAGE_AUG, "page", PamtEntry(bepoch=5), PamtEntry(PageType.REG, 7, 0)),
        (Leaf.PAGE_ADD, "page", NDA, PamtEntry(PageType.REG, 7, 0)),
        (Leaf.SEPT_ADD, "table", NDA, PamtEntry(PageType.EPT, 7, 0)),
        (Leaf.RANGE_BLOCK, "page", OURS, OURS._replace(bepoch=9)),
        (Leaf.PAGE_REMOVE, "page", OURS, OURS._replace(type=PageType.NDA)),
        (Leaf.PAGE_DEMOTE, "page", OURS, OURS._replace(type=PageType.NDA)),
        (Leaf.PAGE_DEMOTE, "children", PamtEntry(bepoch=5), PamtEntry(PageType.REG, 7, 0)),
        (Leaf.PAGE_PROMOTE, "children", OURS, OURS._replace(type=PageType.NDA)),
        (Leaf.PAGE_PROMOTE, "page", NDA, PamtEntry(PageType.REG, 7, 0)),
        (Leaf.RANGE_BLOCK, "table", OURS, OURS._replace(bepoch=9)),
        (Leaf.RANGE_BLOCK, "children", OURS, OURS),
        (Leaf.PAGE_AUG, "children", OURS, OURS),
        (Leaf.PAGE_ADD, "table", OURS, OURS),
        (Leaf.SEPT_ADD, "page", OURS, OURS),
        (Leaf.SEPT_ADD, "children", OURS, OURS),
        (Leaf.PAGE_REMOVE, "table", OURS, OURS),
        (Leaf.PAGE_DEMOTE, "table", NDA._replace(bepoch=4), PamtEntry(PageType.EPT, 7, 4)),
        (Leaf.PAGE_PROMOTE, "table", OURS, OURS._replace(type=PageType.NDA)),
        (Leaf.SEPT_REMOVE, "table", OURS, OURS._replace(type=PageType.NDA)),
        (Leaf.SEPT_REMOVE, "page", OURS, OURS),
        (Leaf.PAGE_RECLAIM, "page", OURS, OURS._replace(type=PageType.NDA)),
        (Leaf.PAGE_RECLAIM, "table", OURS, OURS._replace(type=PageType.NDA)),
        (Leaf.PAGE_RECLAIM, "children", OURS, OURS),
    ],
)
def test_a_leaf_leaves_its_mark_in_the_pamt(leaf: Leaf, of: str, before: PamtEntry, after: PamtEntry) -> None:
    assert tdx_pamt.after(leaf, of, before, owner=7, td_epoch=9) == after


# Locks.

_SHARED_TREE = (Leaf.SEPT_ADD, Leaf.PAGE_AUG, Leaf.PAGE_REMOVE, Leaf.PAGE_DEMOTE, Leaf.PAGE_PROMOTE)
_EXCLUSIVE_TREE = (Leaf.RANGE_BLOCK, Leaf.RANGE_UNBLOCK, Leaf.SEPT_REMOVE)


@pytest.mark.parametrize(
    ("leaf", "lock", "mode"),
    [
        *((leaf, Lock.TREE, SHARED) for leaf in _SHARED_TREE),
        *((leaf, Lock.TREE, EXCLUSIVE) for leaf in _EXCLUSIVE_TREE),
        *((leaf, Lock.ENTRY, EXCLUSIVE) for leaf in (*_SHARED_TREE, *_EXCLUSIVE_TREE, Leaf.ACCEPT)),
        *((leaf, Lock.TDR, SHARED) for leaf in (*_SHARED_TREE, *_EXCLUSIVE_TREE, Leaf.TRACK, Leaf.VP_ENTER)),
        (Leaf.ACCEPT, Lock.TREE, NONE),
        (Leaf.TRACK, Lock.TREE, NONE),
        (Leaf.VP_ENTER, Lock.TREE, NONE),
        (Leaf.VP_ENTER, Lock.EPOCH, SHARED),
        (Leaf.TRACK, Lock.EPOCH, EXCLUSIVE),
        (Leaf.PAGE_AUG, Lock.PAMT, EXCLUSIVE),
        (Leaf.PAGE_AUG, Lock.PARENTS, SHARED),
        (Leaf.PAGE_REMOVE, Lock.PAMT, EXCLUSIVE),
        (Leaf.PAGE_WBINVD, Lock.PAMT, SHARED),
        (Leaf.PAGE_ADD, Lock.TDR, EXCLUSIVE),
        (Leaf.MNG_VPFLUSHDONE, Lock.TDR, EXCLUSIVE),
    ],
)
def test_a_leaf_takes_a_lock_shared_or_exclusive(leaf: Leaf, lock: Lock, mode: str) -> None:
    assert tdx_locks.wanted(leaf, lock) == mode


# Every lock of every leaf, as one file a leaf of the module has it; what is not here is not taken.
WORKS_ON_AN_ENTRY = (*_SHARED_TREE, *_EXCLUSIVE_TREE)
ALL_LOCKS = {
    **{
        leaf: {"TDR": SHARED, "OP_STATE": SHARED, "TREE": SHARED, "ENTRY": EXCLUSIVE} for leaf in _SHARED_TREE
    },
    **{
        leaf: {"TDR": SHARED, "OP_STATE": SHARED, "TREE": EXCLUSIVE, "ENTRY": EXCLUSIVE}
        for leaf in _EXCLUSIVE_TREE
    },
    Leaf.PAGE_ADD: {"TDR": EXCLUSIVE},
    Leaf.MR_FINALIZE: {"TDR": EXCLUSIVE},
    Leaf.MNG_VPFLUSHDONE: {"TDR": EXCLUSIVE},
    Leaf.MNG_KEY_FREEID: {"TDR": EXCLUSIVE},
    Leaf.TRACK: {"TDR": SHARED, "OP_STATE": SHARED, "EPOCH": EXCLUSIVE},
    Leaf.VP_ENTER: {"TDR": SHARED, "OP_STATE": SHARED, "EPOCH": SHARED},
    Leaf.VP_FLUSH: {"TDR": SHARED},
    Leaf.PAGE_RECLAIM: {"TDR": SHARED},
    Leaf.ACCEPT: {"ENTRY": EXCLUSIVE},
}
PAGE_LOCKS = {
    Leaf.PAGE_ADD: {"PARENTS": SHARED, "PAMT": EXCLUSIVE},
    Leaf.SEPT_ADD: {"PARENTS": SHARED, "PAMT": EXCLUSIVE},
    Leaf.PAGE_AUG: {"PARENTS": SHARED, "PAMT": EXCLUSIVE},
    Leaf.PAGE_DEMOTE: {"PARENTS": SHARED, "PAMT": EXCLUSIVE, "LARGE": EXCLUSIVE},
    Leaf.PAGE_PROMOTE: {"PAMT": EXCLUSIVE, "LARGE": EXCLUSIVE},
    Leaf.PAGE_REMOVE: {"PAMT": EXCLUSIVE},
    Leaf.SEPT_REMOVE: {"PAMT": EXCLUSIVE},
    Leaf.PAGE_RECLAIM: {"PARENTS": SHARED, "PAMT": EXCLUSIVE},
    Leaf.PAGE_WBINVD: {"PARENTS": SHARED, "PAMT": SHARED},
    Leaf.PAGE_RDMD: {"PARENTS": SHARED, "PAMT": SHARED},
}


@pytest.mark.parametrize("leaf", tuple(Leaf))
def test_a_leaf_takes_these_locks_and_no_others(leaf: Leaf) -> None:
    taken = {lock.name: tdx_locks.wanted(leaf, lock) for lock in Lock if tdx_locks.wanted(leaf, lock)}
    assert taken == ALL_LOCKS.get(leaf, {}) | PAGE_LOCKS.get(leaf, {})


TDR_NAMED_BY = {
    **dict.fromkeys((Leaf.VP_ENTER, Leaf.VP_FLUSH, Leaf.PAGE_RECLAIM), Operand.TDR),
    **dict.fromkeys((Leaf.TRACK, Leaf.MR_FINALIZE, Leaf.MNG_VPFLUSHDONE, Leaf.MNG_KEY_FREEID), Operand.RCX),
}


@pytest.mark.parametrize("leaf", [leaf for leaf in Leaf if tdx_locks.wanted(leaf, Lock.TDR)])
def test_a_busy_tdr_goes_by_the_register_that_names_it(leaf: Leaf) -> None:
    operand = TDR_NAMED_BY.get(leaf, Operand.RDX)
    assert tdx_locks.BUSY_OPERAND(leaf=leaf, lock=Lock.TDR) == operand


@pytest.mark.parametrize("leaf", [leaf for leaf in Leaf if tdx_locks.wanted(leaf, Lock.PAMT)])
def test_a_busy_pamt_entry_goes_by_the_register_that_names_the_page(leaf: Leaf) -> None:
    given = leaf in (Leaf.PAGE_ADD, Leaf.SEPT_ADD, Leaf.PAGE_AUG, Leaf.PAGE_DEMOTE)
    assert tdx_locks.BUSY_OPERAND(leaf=leaf, lock=Lock.PAMT) == (Operand.R8 if given else Operand.RCX)


@pytest.mark.parametrize(
    ("held", "wanted", "gets"),
    [
        (NONE, EXCLUSIVE, True),
        (NONE, SHARED, True),
        (SHARED, SHARED, True),
        (SHARED, EXCLUSIVE, False),
        (EXCLUSIVE, SHARED, False),
        (EXCLUSIVE, EXCLUSIVE, False),
        (EXCLUSIVE, NONE, True),
    ],
)
def test_two_share_a_lock_only_as_sharers(held: str, wanted: str, gets: bool) -> None:
    assert tdx_locks.COMPATIBLE(held=held, wanted=wanted) is gets


@pytest.mark.parametrize(
    ("side", "taken", "priority", "status", "after"),
    [
        ("host", False, False, Status.SUCCESS, (True, False)),
        ("host", True, False, Status.OPERAND_BUSY, (True, True)),
        ("host", True, True, Status.OPERAND_BUSY, (True, True)),
        ("guest", False, False, Status.SUCCESS, (True, False)),
    ],
)
def test_who_gets_an_entrys_lock_and_what_is_left_there(
    side: str, taken: bool, priority: bool, status: Status, after: tuple[bool, bool]
) -> None:
    assert tdx_locks.acquire_entry(side, EntryLock(taken, priority)) == (status, after)


def test_a_guest_that_gets_the_lock_is_told_success() -> None:
    assert tdx_locks.told_to_guest(Status.SUCCESS) == Status.SUCCESS
    assert tdx_locks.told_to_guest(Status.OPERAND_BUSY) == Status.OPERAND_BUSY
    assert tdx_locks.UNLOCKED == (False, False)


def test_vp_enter_takes_the_tree_only_when_zero_step_mitigation_is_armed() -> None:
    assert tdx_locks.wanted(Leaf.VP_ENTER, Lock.TREE, armed=True) == EXCLUSIVE


def test_a_host_that_fails_on_an_entry_lock_gets_priority_over_the_guest() -> None:
    _, lock = tdx_locks.acquire_entry("host", EntryLock(taken=True))
    lock = tdx_locks.release_entry(lock)
    assert tdx_locks.acquire_entry("guest", lock) == (Status.OPERAND_BUSY_HOST_PRIORITY, lock)


def test_the_hosts_next_success_ends_its_priority() -> None:
    status, lock = tdx_locks.acquire_entry("host", EntryLock(taken=False, host_priority=True))
    assert (status, lock) == (Status.SUCCESS, EntryLock(taken=True, host_priority=False))


@pytest.mark.parametrize("priority", [False, True])
def test_a_guest_that_finds_an_entry_locked_is_busy_and_changes_nothing(priority: bool) -> None:
    lock = EntryLock(True, priority)
    assert tdx_locks.acquire_entry("guest", lock) == (Status.OPERAND_BUSY, lock)


def test_a_guest_is_told_of_host_priority_as_of_any_busy_lock() -> None:
    assert tdx_locks.told_to_guest(Status.OPERAND_BUSY_HOST_PRIORITY) == Status.OPERAND_BUSY


def test_a_guest_that_waits_too_long_for_the_host_leaves_the_td() -> None:
    assert tdx_locks.told_to_guest(Status.OPERAND_BUSY_HOST_PRIORITY, timed_out=True) == 0x9000020500000000


# TLB tracking.


def test_the_first_epoch_is_1() -> None:
    assert Epochs() == (1, (0, 0))


@pytest.mark.parametrize(("epoch", "counts"), [(1, [(0, 1), (0, 2), (0, 1)]), (2, [(1, 0), (2, 0), (1, 0)])])
def test_who_is_inside_is_counted_by_the_parity_of_its_epoch(
    epoch: int, counts: list[tuple[int, int]]
) -> None:
    one, vcpu, _ = tdx_tlb.enter(Epochs(epoch), 0)
    two, _, _ = tdx_tlb.enter(one, 0)
    assert [one.refcount, two.refcount, tdx_tlb.leave(two, vcpu).refcount] == counts


def test_track_is_busy_while_a_vcpu_is_inside_with_the_epoch_before() -> None:
    epochs, _, _ = tdx_tlb.enter(Epochs(), 0)
    status, epochs = tdx_tlb.track(epochs)
    assert status == Status.SUCCESS
    assert tdx_tlb.track(epochs) == (Status.PREVIOUS_TLB_EPOCH_BUSY, epochs)


def test_an_entry_is_tracked_after_one_track_and_one_exit_of_everybody_inside() -> None:
    epochs, vcpu, _ = tdx_tlb.enter(Epochs(), 0)
    blocked = epochs.td_epoch
    _, epochs = tdx_tlb.track(epochs)
    inside, outside = tdx_tlb.tracked(epochs, blocked), tdx_tlb.tracked(tdx_tlb.leave(epochs, vcpu), blocked)
    assert (inside, outside) == (False, True)


def test_without_track_or_with_track_first_an_entry_is_not_tracked() -> None:
    assert not tdx_tlb.tracked(Epochs(5), 5)


def test_an_entry_two_epochs_old_is_tracked_whoever_is_inside() -> None:
    assert tdx_tlb.tracked(Epochs(5, (1, 1)), 3)


def test_one_track_serves_every_block_before_it() -> None:
    _, epochs = tdx_tlb.track(Epochs(4))
    assert all(tdx_tlb.tracked(epochs, bepoch) for bepoch in (2, 3, 4))


@pytest.mark.parametrize(("vcpu", "new", "flush"), [(4, False, True), (5, False, False), (4, True, False)])
def test_vp_enter_flushes_a_vcpu_with_an_old_epoch_unless_it_is_new_on_its_processor(
    vcpu: int, new: bool, flush: bool
) -> None:
    assert tdx_tlb.enter(Epochs(5), vcpu, newly_associated=new)[1:] == (5, flush)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["enter", "leave"]), st.integers(0, 2)),
        st.tuples(st.just("block"), st.integers(0, 1)),
        st.tuples(st.just("track"), st.just(0)),
    ),
    max_size=40,
)


class Both:
    """Three vCPUs and two blocked entries, in absolute epochs and in ages side by side."""

    def __init__(self) -> None:
        self.epochs, self.vcpus, self.blocked = Epochs(2), [1, 1, 1], [1, 1]
        self.ages, self.blocked_ages = [Age.PREVIOUS] * 3, [Age.PREVIOUS] * 2
        self.inside: set[int] = set()

    def inside_ages(self) -> list[Age]:
        return [self.ages[i] for i in self.inside]

    def enter(self, i: int) -> tuple[bool | None, bool | None]:
        if i in self.inside:
            return None, None
        self.inside.add(i)
        self.epochs, self.vcpus[i], flushed = tdx_tlb.enter(self.epochs, self.vcpus[i])
        self.ages[i], flushed_age = tdx_tlb.enter_age(self.ages[i])
        return flushed, flushed_age

    def leave(self, i: int) -> tuple[None, None]:
        if i in self.inside:
            self.inside.remove(i)
            self.epochs = tdx_tlb.leave(self.epochs, self.vcpus[i])
        return None, None

    def block(self, i: int) -> tuple[None, None]:
        self.blocked[i], self.blocked_ages[i] = self.epochs.td_epoch, Age.NOW
        return None, None

    def track(self, _: int) -> tuple[bool, bool]:
        busy = tdx_tlb.track_busy(self.inside_ages())
        status, self.epochs = tdx_tlb.track(self.epochs)
        if not busy:
            self.ages = [tdx_tlb.track_age(age) for age in self.ages]
            self.blocked_ages = [tdx_tlb.track_age(age) for age in self.blocked_ages]
        return status == Status.PREVIOUS_TLB_EPOCH_BUSY, busy

    def tracked(self) -> tuple[list[bool], list[bool]]:
        absolute = [tdx_tlb.tracked(self.epochs, bepoch) for bepoch in self.blocked]
        return absolute, [tdx_tlb.tracked_age(age, self.inside_ages()) for age in self.blocked_ages]


@given(EVENTS)
def test_ages_tell_all_that_absolute_epochs_tell(events: list[tuple[str, int]]) -> None:
    both = Both()
    for name, index in events:
        absolute, by_age = getattr(both, name)(index)
        assert absolute == by_age
        absolute, by_age = both.tracked()
        assert absolute == by_age
        now = both.epochs.td_epoch
        assert both.ages == [tdx_tlb.age(epoch, now) for epoch in both.vcpus]


# Zero-step mitigation.


def stepped(times: int, gpas: Sequence[object] = ("a",)) -> ZeroStep:
    state = CALM
    for i in range(times):
        state = tdx_tlb.ept_violation(state, gpas[i % len(gpas)], progress=False)
    return state


@pytest.mark.parametrize(("times", "armed"), [(6, False), (7, True)])
def test_the_seventh_violation_on_one_instruction_arms_the_mitigation(times: int, armed: bool) -> None:
    assert stepped(times).armed == armed


def test_progress_of_the_guest_disarms_the_mitigation() -> None:
    assert tdx_tlb.td_exit(stepped(9), progress=True) == CALM


def test_at_most_32_gpas_are_listed() -> None:
    assert len(stepped(100, gpas=range(50)).gpas) == 32


@pytest.mark.parametrize(("times", "faulting", "steps"), [(6, "a", False), (7, "a", True), (7, "b", False)])
def test_an_armed_vcpu_enters_only_if_no_listed_gpa_would_fault(
    times: int, faulting: str, steps: bool
) -> None:
    assert tdx_tlb.steps(stepped(times), {faulting}) is steps

"""The board of one secure EPT entry: the module's own answers, drawn from the tables, alive without a kernel."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from itertools import product
from typing import Any

import notebook_rules
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvmlab
from kvmlab.errors import InputError
from kvmlab.hw import tdx
from kvmlab.hw.tdx import sept as tdx_sept
from kvmlab.hw.tdx.entry import State
from kvmlab.hw.tdx.module import Module
from kvmlab.hw.tdx.structures import Result, Td, Vcpu
from kvmlab.hw.tdx.td import OpState
from kvmlab.show import sept_picture
from kvmlab.show.sept_board import SeptBoard, log_line
from kvmlab.show.sept_machine import ENTRY_STATES, BoardState, Click, answer, possible, reachable

TDR, TDVPR, TABLE, PAGE, GPA = 0x1000, 0x2000, 0x10000, 0x80000, 0x5000
STORY = ("VP.ENTER", "access", "AUG", "VP.ENTER", "ACCEPT", "access", "BLOCK")


class Real:
    """The module itself, with tables over one 4K entry."""

    def __init__(self, finalized: bool) -> None:
        self.module = Module()
        self.td: Td = self.module.create_td(TDR, 1)
        self.vcpu: Vcpu = self.module.create_vcpu(self.td, TDVPR)
        for level in (tdx.Level.PML4, tdx.Level.PDPT, tdx.Level.PD):
            assert self.module.tdh_mem_sept_add(self.td, 0, TABLE + 0x1000 * level, level).ok
        if finalized:
            assert self.module.tdh_mr_finalize(self.td).ok

    def click(self, click: Click) -> Result:
        """Do what the board's click stands for."""
        module, td, vcpu = self.module, self.td, self.vcpu
        do: dict[Click, Any] = {
            Click.FINALIZE: lambda: module.tdh_mr_finalize(td),
            Click.ADD: lambda: module.tdh_mem_page_add(td, GPA, PAGE),
            Click.AUG: lambda: module.tdh_mem_page_aug(td, GPA, PAGE),
            Click.BLOCK: lambda: module.tdh_mem_range_block(td, GPA),
            Click.TRACK: lambda: module.tdh_mem_track(td),
            Click.REMOVE: lambda: module.tdh_mem_page_remove(td, GPA),
            Click.UNBLOCK: lambda: module.tdh_mem_range_unblock(td, GPA),
            Click.WBINVD: lambda: module.tdh_phymem_page_wbinvd(PAGE),
            Click.ENTER: lambda: module.vp_enter(td, vcpu),
            Click.KICK: lambda: module.td_exit(td, vcpu),
            Click.ACCESS: lambda: module.access(td, vcpu, GPA),
            Click.ACCEPT: lambda: module.tdg_mem_page_accept(td, vcpu, GPA),
        }
        return do[click]()  # type: ignore[no-any-return]

    def looks_like(self, at: BoardState) -> bool:
        """Whether the module is where the board says."""
        entry, pamt = self.td.entry(GPA, tdx.Level.PT), self.module.pamt_of(PAGE)
        mine = (self.td.op_state, entry.state, pamt.type, self.vcpu.inside, bool(self.vcpu.tlb))
        return mine == (at.op_state, at.entry, at.pamt, at.inside, at.cached)


@given(finalized=st.booleans(), clicks=st.lists(st.sampled_from(Click), max_size=40))
def test_every_sequence_of_clicks_gets_the_modules_own_answers(finalized: bool, clicks: list[Click]) -> None:
    real, at = Real(finalized), SeptBoard((), finalized).at
    for click in clicks:
        if possible(at, click):
            found, result = answer(at, click), real.click(click)
            at = found.after
            assert (found.rax or 0) == result.rax, f"{click} at {at}"
            assert real.looks_like(at)


def test_all_states_of_a_4k_entry_are_on_the_board() -> None:
    assert set(ENTRY_STATES) == set(State) - tdx_sept.TABLES
    assert {at.entry for at in reachable(BoardState())} == set(ENTRY_STATES)


@pytest.mark.parametrize(("finalized", "states"), [(True, 67), (False, 81)])
def test_the_board_is_small_enough_to_be_sent_whole(finalized: bool, states: int) -> None:
    assert len(SeptBoard((), finalized).places) == states


def test_a_vcpu_inside_never_holds_a_translation_of_a_removed_page() -> None:
    assert not any(at.inside and at.cached and at.entry == State.FREE for at in reachable(BoardState()))


def test_the_right_order_removes_the_page() -> None:
    board = kvmlab.sept_board(*STORY, "TRACK", "kick", "REMOVE", "WBINVD")
    assert board.at.entry == State.FREE and all(each.rax in (None, 0, 48) for each in board.log)


@pytest.mark.parametrize(
    ("clicks", "rax"),
    [
        (("REMOVE",), 0xC0000B0800000001),
        (("kick", "REMOVE"), 0xC0000B0800000001),
        (("TRACK", "REMOVE"), 0xC0000B0800000001),
        (("TRACK", "UNBLOCK"), 0xC0000B0800000092),
        (("TRACK", "TRACK"), 0x8000020100000000),
        (("BLOCK",), 0x00000B0700000001),
        (("WBINVD",), 0xC000030000000001),
        (("PAGE.ADD",), 0xC000060800000000),
    ],
)
def test_a_wrong_order_is_refused_bit_for_bit(clicks: tuple[str, ...], rax: int) -> None:
    assert kvmlab.sept_board(*STORY, *clicks).log[-1].rax == rax


@pytest.mark.parametrize("name", ["REMOVE", "page.remove", "TDH.MEM.PAGE.REMOVE", "PAGE.REMOVE"])
def test_a_leaf_may_be_named_in_short_and_in_full(name: str) -> None:
    assert kvmlab.sept_board().click(name).click == Click.REMOVE


def test_an_unknown_click_names_those_that_there_are() -> None:
    with pytest.raises(
        InputError, match=r"click 2: unknown click 'BLOK' \(did you mean RANGE.BLOCK\?\); there"
    ):
        kvmlab.sept_board("AUG", "BLOK")


def test_a_vcpu_outside_cannot_accept() -> None:
    with pytest.raises(InputError, match="click 1: ACCEPT: the vCPU is outside"):
        kvmlab.sept_board("ACCEPT")


def test_a_refused_click_leaves_the_board_as_it_was() -> None:
    board = kvmlab.sept_board("AUG")
    with pytest.raises(InputError):
        board.click("kick")
    assert [each.click for each in board.log] == [Click.AUG]


def test_every_arrow_of_the_tables_has_a_place_and_no_place_is_without_an_arrow() -> None:
    assert {edge[1:3] for edge in sept_picture.edges()} == set(sept_picture.ROUTES)
    assert len(sept_picture.edges()) == len(sept_picture.ROUTES)


def test_what_finalize_ends_is_told_below_the_drawing() -> None:
    assert sept_picture.before_finalize() == (
        "PAGE.ADD FREE -> MAPPED, PAGE.REMOVE PENDING -> FREE, PAGE.REMOVE MAPPED -> FREE"
    )


def test_the_drawing_is_well_formed_and_says_where_the_machine_is() -> None:
    root = ET.fromstring(sept_picture.picture(kvmlab.sept_board(*STORY, "TRACK").at))
    assert (root.get("data-at"), root.get("data-bepoch"), root.get("data-tracked")) == (
        "BLOCKED",
        "previous",
        "no",
    )
    assert "RANGE.BLOCK takes MAPPED to BLOCKED" in str(root.get("aria-label"))


def test_a_log_line_fits_into_a_mail() -> None:
    lines = [log_line(answer(at, c)) for at in reachable(BoardState()) for c in Click if possible(at, c)]
    assert max(map(len, lines)) <= 75


def test_the_text_ends_with_the_table_as_the_spec_prints_it() -> None:
    board = kvmlab.sept_board(*STORY)
    assert board.text().endswith(board.rules.text())
    assert "MAPPED -> BLOCKED" in str(board) and repr(board) == "SeptBoard(BLOCKED, 7 clicks)"


def test_its_table_says_what_the_leaves_answer() -> None:
    table = kvmlab.sept_board().rules
    for leaf, state, tracking in product(*table.inputs.values()):
        row = table(leaf=leaf, state=state, tracking=tracking)
        found = tdx.seamcall(leaf, state, tracked=tracking == "done")
        assert (row.status, row.state or state) == (found.status, found.state)


def test_the_stored_output_needs_no_script_no_style_and_no_svg() -> None:
    still = kvmlab.sept_board(*STORY, "REMOVE").html()
    assert not notebook_rules.ACTIVE.search(still)
    assert "TDX_TLB_TRACKING_NOT_DONE | RCX" in still and "data:image/svg+xml;base64," in still


def test_in_a_notebook_the_live_board_comes_with_its_picture_and_its_text() -> None:
    pytest.importorskip("anywidget", reason="needs anywidget")
    board = kvmlab.sept_board(*STORY)
    bundle, _ = board._repr_mimebundle_()
    assert notebook_rules.WIDGET_VIEW in bundle
    assert (bundle["text/plain"], bundle["text/html"]) == (board.text(), board.html())


def test_the_stored_output_is_the_same_every_time() -> None:
    assert kvmlab.sept_board(*STORY).html() == kvmlab.sept_board(*STORY).html()


def test_all_that_the_browser_needs_is_json_without_loose_ends() -> None:
    view = json.loads(json.dumps(SeptBoard(STORY).view()))
    numbers = [step for steps in view["steps"] for step in steps if step]
    assert {to for to, _ in numbers} <= set(range(len(view["states"])))
    assert {told for _, told in numbers} == set(range(len(view["pool"])))


def test_before_finalize_the_board_lets_a_page_be_added_and_removed_at_once() -> None:
    board = kvmlab.sept_board("PAGE.ADD", "REMOVE", "PAGE.ADD", "MR.FINALIZE", "REMOVE", finalized=False)
    assert [each.rax for each in board.log] == [0, 0, 0, 0, 0xC0000B0600000001]
    assert board.at.op_state == OpState.RUNNABLE

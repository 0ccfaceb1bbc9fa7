"""The TDX module as an object: whole conversions, wrong orders, large pages, locks, the life of a TD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmlab.hw.memory import Hpa
from kvmlab.hw.tdx import Guest, Level, Operand, Status, busy
from kvmlab.hw.tdx.entry import State
from kvmlab.hw.tdx.locks import EXCLUSIVE, SHARED, EntryLock, Lock
from kvmlab.hw.tdx.module import Module
from kvmlab.hw.tdx.pamt import NDA, PageType
from kvmlab.hw.tdx.sept import Children
from kvmlab.hw.tdx.structures import Entry, Result, Td, Vcpu

TDR, TDVPR, HPA, LARGE, GPA = 0x1000, 0x2000, 0x10000, 0x40000000, 0x40000000
SUCCESS, NOT_DONE, NOT_BLOCKED = 0, 0xC0000B0800000001, 0xC0000B0600000001
WRONG_STATE, METADATA = 0xC0000B0D00000001, 0xC000030000000000


class World:
    """A TD with one vCPU, finalized, and tables down to `level` for GPA."""

    def __init__(
        self, level: Level = Level.PT, ve_disable: bool = True, vcpus: int = 1, finalize: bool = True
    ) -> None:
        self.module = Module()
        self.td = self.module.create_td(TDR, hkid=33, ve_disable=ve_disable)
        self.vcpus = [self.module.create_vcpu(self.td, TDVPR + 0x1000 * i) for i in range(vcpus)]
        self.vcpu = self.vcpus[0]
        for at in range(self.td.top, level, -1):
            span = Level(at).pages * 4096
            assert self.sept_add(GPA // span * span, 0xC000 + 0x1000 * at, Level(at)).ok
        if finalize:
            assert self.module.tdh_mr_finalize(self.td).ok

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Call a leaf on the TD: world.block(gpa) is module.tdh_mem_range_block(td, gpa)."""
        leaf = getattr(self.module, LEAVES.get(name, name))
        return lambda *args, **kwargs: leaf(self.td, *args, **kwargs)

    def state(self, level: Level = Level.PT) -> State:
        return self.td.walk("SEAMCALL", GPA, level)[1].state

    def inside(self, method: str, *args: Level | int, **kwargs: int) -> Any:
        """Enter if need be, then call a guest-side method of the vCPU."""
        if not self.vcpu.inside:
            assert self.vp_enter(self.vcpu).ok
        return getattr(self.module, method)(self.td, self.vcpu, *args, **kwargs)

    def accept(self, level: Level = Level.PT, **kwargs: int) -> Any:
        return self.inside("tdg_mem_page_accept", GPA, level, **kwargs)

    def touch(self, **kwargs: bool) -> Any:
        return self.inside("access", GPA, **kwargs)

    def block_and_track(self, level: Level = Level.PT) -> None:
        assert self.block(GPA, level).ok and self.track().ok

    def out(self) -> Any:
        return self.td_exit(self.vcpu)


LEAVES = {
    "add": "tdh_mem_page_add",
    "aug": "tdh_mem_page_aug",
    "sept_add": "tdh_mem_sept_add",
    "block": "tdh_mem_range_block",
    "unblock": "tdh_mem_range_unblock",
    "track": "tdh_mem_track",
    "remove": "tdh_mem_page_remove",
    "demote": "tdh_mem_page_demote",
    "promote": "tdh_mem_page_promote",
    "sept_remove": "tdh_mem_sept_remove",
}


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def private() -> World:
    """A world with an accepted 4K page, its vCPU outside."""
    world = World()
    assert world.aug(GPA, HPA).ok and world.accept().ok
    world.out()
    return world


def large(state: State = State.MAPPED) -> World:
    """A world with a 2M page, accepted or pending, its vCPU outside."""
    world = World(Level.PD)
    assert world.aug(GPA, LARGE, Level.PD).ok
    if state == State.MAPPED:
        assert world.accept(Level.PD).ok
        world.out()
    return world


# To private.


def test_aug_makes_a_pending_page_that_the_pamt_knows(world: World) -> None:
    assert world.aug(GPA, HPA) == (SUCCESS, 0, 0, 0, None)
    assert world.state() == State.PENDING
    assert world.module.tdh_phymem_page_rdmd(HPA)[1:4] == (PageType.REG, TDR, Level.PT)


def test_accept_makes_it_usable(private: World) -> None:
    assert private.state() == State.MAPPED and private.touch().exit == Guest.DATA


def test_accepting_twice_is_a_warning_with_the_level(private: World) -> None:
    assert private.accept().rax == 0x00000B0A00000000


def test_accept_of_nothing_leaves_the_td_and_runs_again_after_aug(world: World) -> None:
    result = world.accept()
    assert (result.rax, result.rdx & 0xF, result.r8, world.vcpu.inside) == (48, 1, GPA, False)
    world.aug(GPA, HPA)
    assert world.accept().ok


@pytest.mark.parametrize(
    ("ve_disable", "outcome", "inside"), [(True, Guest.EXIT_PENDING, False), (False, Guest.VE, True)]
)
def test_touching_a_pending_page_is_a_ve_or_an_exit_of_type_6(
    ve_disable: bool, outcome: Guest, inside: bool
) -> None:
    world = World(ve_disable=ve_disable)
    world.aug(GPA, HPA)
    assert (world.touch().exit, world.vcpu.inside) == (outcome, inside)


def test_a_page_is_private_at_one_gpa_only(private: World) -> None:
    assert private.aug(GPA + 0x1000, HPA).rax == METADATA | Operand.R8


def test_the_last_page_of_the_tdmr_is_taken(world: World) -> None:
    assert world.aug(GPA, world.module.size - 0x1000).ok


def test_a_page_outside_the_tdmr_is_refused(world: World) -> None:
    assert world.aug(GPA, world.module.size).rax == 0xC000010100000008


def test_a_shared_gpa_is_no_operand(world: World) -> None:
    assert world.aug(GPA | 1 << 47, HPA).rax == 0xC000010000000001


def test_aug_without_a_table_fails_the_walk_and_says_where() -> None:
    assert World(Level.PD).aug(GPA, HPA)[:3] == (0xC0000B0000000001, 1 << 63, 1)


def test_a_page_added_before_finalize_is_mapped_at_once() -> None:
    world = World(finalize=False)
    assert world.add(GPA, HPA).ok and world.state() == State.MAPPED


def test_page_add_ends_with_finalize(world: World) -> None:
    assert world.add(GPA, HPA).rax == 0xC000060800000000


@pytest.mark.parametrize("gpa", [GPA + 1, GPA | 1 << 47])
def test_the_op_state_is_asked_before_the_gpa(world: World, gpa: int) -> None:
    assert world.add(gpa, HPA).rax == 0xC000060800000000


def test_the_gpa_is_asked_before_the_tree_lock(world: World) -> None:
    world.module.hold(Lock.TREE, TDR)
    assert world.aug(GPA + 1, HPA).rax == 0xC000010000000001


def test_aug_track_block_and_remove_are_legal_before_finalize() -> None:
    world = World(finalize=False)
    assert world.aug(GPA, HPA).ok and world.block(GPA).ok and world.track().ok and world.remove(GPA).ok


def test_removing_a_page_leaves_owner_and_epoch_in_the_pamt(private: World) -> None:
    private.block_and_track()
    private.remove(GPA)
    assert private.module.pamt_of(HPA) == (PageType.NDA, TDR // 4096, 1)


def test_the_first_entry_of_a_vcpu_on_its_processor_drops_no_translations(private: World) -> None:
    private.touch()
    private.out()
    private.vcpu.associated = False
    private.track()
    assert private.vp_enter(private.vcpu).ok and private.vcpu.tlb
    private.out()
    private.track()
    assert private.vp_enter(private.vcpu).ok and not private.vcpu.tlb


def test_before_finalize_a_page_goes_without_block_and_track() -> None:
    world = World(finalize=False)
    world.add(GPA, HPA)
    assert world.remove(GPA)[:2] == (SUCCESS, HPA)


def test_no_vcpu_enters_before_finalize() -> None:
    world = World(finalize=False)
    assert world.vp_enter(world.vcpu).rax == 0xC000060800000000


def test_what_only_a_vcpu_that_is_inside_does_is_refused_outside(private: World) -> None:
    private_access = private.module.access
    with pytest.raises(ValueError, match="only a vCPU that is inside"):
        private_access(private.td, private.vcpu, GPA)
    with pytest.raises(ValueError, match=r"vp_enter\(\) first"):
        private.module.tdg_mem_page_accept(private.td, private.vcpu, GPA)
    private.vp_enter(private.vcpu)
    with pytest.raises(ValueError, match="only private GPAs"):
        private_access(private.td, private.vcpu, GPA | 1 << 47)
    with pytest.raises(ValueError, match="inside already"):
        private.vp_enter(private.vcpu)


@pytest.mark.parametrize(("gpa", "level"), [(GPA + 1, 0), (GPA | 1 << 47, 0), (GPA, 2), (GPA + 0x1000, 1)])
def test_accept_of_what_is_no_page_is_an_invalid_operand(world: World, gpa: int, level: int) -> None:
    assert world.inside("tdg_mem_page_accept", gpa, Level(level)).rax == 0xC000010000000001
    assert world.vcpu.inside


def test_a_translation_is_of_one_4k_page_of_a_large_one() -> None:
    world = large()
    world.inside("access", GPA + 0x5123)
    assert world.vcpu.tlb == {(GPA + 0x5000) // 4096: LARGE + 0x5000}


@pytest.mark.parametrize(("write", "qualification"), [(True, 2), (False, 1)])
def test_an_exit_says_whether_it_was_a_write_and_names_the_page(
    world: World, write: bool, qualification: int
) -> None:
    result = world.inside("access", GPA + 0x234, write=write)
    assert result == (48, qualification, 0, GPA, Guest.EXIT)


def test_a_page_that_was_augmented_before_is_not_in_the_way_of_another(world: World) -> None:
    assert world.aug(GPA, HPA).ok and world.aug(GPA + 0x1000, HPA + 0x1000).ok
    assert world.td.children == 1 + 3 + 2


# To shared: the right order.


def test_block_track_exit_remove_wbinvd_gives_the_page_back(private: World) -> None:
    assert private.touch().ok
    assert private.block(GPA).ok and private.track().ok
    assert private.out().ok
    assert private.remove(GPA)[:2] == (SUCCESS, HPA)
    assert private.module.tdh_phymem_page_wbinvd(HPA).ok
    assert private.state() == State.FREE


def test_a_page_that_went_and_came_back_is_pending(private: World) -> None:
    private.block_and_track()
    private.remove(GPA)
    assert private.aug(GPA, HPA).ok and private.state() == State.PENDING


# Wrong orders.


def test_remove_without_block_is_not_blocked_and_shows_the_entry(private: World) -> None:
    assert private.remove(GPA)[:3] == (NOT_BLOCKED, 0x80000000000100F7, 4 << 8)


def test_remove_without_track_is_not_done_and_shows_nothing(private: World) -> None:
    private.block(GPA)
    assert private.remove(GPA)[:3] == (NOT_DONE, 0, 0)


def test_remove_with_track_before_block_is_not_done(private: World) -> None:
    private.track()
    private.block(GPA)
    assert private.remove(GPA).rax == NOT_DONE


def test_remove_without_a_kick_is_not_done_while_the_vcpu_is_inside(private: World) -> None:
    private.touch()
    private.block_and_track()
    assert private.remove(GPA).rax == NOT_DONE


def test_the_next_track_without_a_kick_is_epoch_busy(private: World) -> None:
    private.touch()
    private.block_and_track()
    assert private.track().rax == 0x8000020100000000


def test_the_kick_is_not_needed_if_the_vcpus_happen_to_be_outside(private: World) -> None:
    private.block_and_track()
    assert private.remove(GPA).ok


def test_aug_before_remove_finds_the_entry_taken(private: World) -> None:
    private.block_and_track()
    assert private.aug(GPA, HPA + 0x1000)[:3] == (WRONG_STATE, 0x80000000000100F0, 1 << 8)


def test_wbinvd_before_remove_finds_the_page_in_use(private: World) -> None:
    assert private.module.tdh_phymem_page_wbinvd(HPA).rax == METADATA | Operand.RCX


def test_block_twice_is_a_warning(private: World) -> None:
    private.block(GPA)
    assert private.block(GPA)[:3] == (0x00000B0700000001, 0x80000000000100F0, 1 << 8)


def test_unblock_too_early_names_the_tree(private: World) -> None:
    private.block(GPA)
    assert private.unblock(GPA).rax == 0xC0000B0800000092


def test_a_blocked_page_can_be_unblocked_once_tracked(private: World) -> None:
    private.block_and_track()
    assert private.unblock(GPA).ok and private.touch().exit == Guest.DATA


# TLBs.


def test_a_vcpu_that_was_inside_before_block_keeps_its_translation_until_it_exits(private: World) -> None:
    private.touch()
    private.block_and_track()
    before = private.touch().exit
    private.out()
    assert (before, private.touch().exit) == (Guest.DATA, Guest.EXIT)


def test_without_track_a_vcpu_that_exits_and_enters_keeps_its_translation(private: World) -> None:
    private.touch()
    private.block(GPA)
    private.out()
    assert private.touch().exit == Guest.DATA


def test_a_blocked_page_exits_with_a_plain_violation(private: World) -> None:
    private.block(GPA)
    result = private.touch()
    assert (result.rax, result.rdx, result.r8, result.exit) == (48, 0, GPA, Guest.EXIT)


def test_one_track_and_one_exit_serve_many_blocks(world: World) -> None:
    pages = [(GPA + i * 0x1000, HPA + i * 0x1000) for i in range(8)]
    for gpa, hpa in pages:
        world.aug(gpa, hpa)
        world.block(gpa)
    assert world.track().ok and all(world.remove(gpa).ok for gpa, _ in pages)


# Tables.


def test_a_table_is_removed_when_blocked_tracked_and_empty(world: World) -> None:
    world.block_and_track(Level.PD)
    before = world.td.children
    assert world.sept_remove(GPA)[:2] == (SUCCESS, 0xD000)
    assert world.td.children == before - 1 and world.module.pamt_of(0xD000).type == PageType.NDA


def test_a_table_is_removed_whatever_locks_its_free_entries_have(world: World) -> None:
    world.block_and_track(Level.PD)
    world.module.hold_entry(world.td, GPA)
    assert world.sept_remove(GPA).ok


def test_a_table_with_a_page_is_not_removed(private: World) -> None:
    private.block_and_track(Level.PD)
    assert private.sept_remove(GPA)[:3] == (0xC0000B0E00000001, 0, 129 << 8 | 1)


def test_no_leaf_walks_through_a_blocked_table(private: World) -> None:
    private.block(GPA, Level.PD)
    assert private.block(GPA)[:3] == (0xC0000B0000000001, 0, 129 << 8 | 1)


@pytest.mark.parametrize("level", [Level.PD, Level.PDPT, Level.PML4])
def test_a_walk_stops_at_a_blocked_table_of_any_level(private: World, level: Level) -> None:
    span = level.pages * 4096
    private.block(GPA // span * span, level)
    assert private.block(GPA)[:3] == (0xC0000B0000000001, 0, 129 << 8 | level)


def children(states: list[State], first: int = LARGE, stride: int = 0x1000) -> Children:
    """What a table of 512 such pages is to PROMOTE and SEPT.REMOVE."""
    td = Td(TDR, 33)
    for i, entry in enumerate(td.below(GPA, Level.PD)):
        entry.state, entry.hpa = states[i % len(states)], Hpa(first + i * stride)
    return td.below_kind(GPA, Level.PD)


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        (Children.MAPPED, ([State.MAPPED],)),
        (Children.PENDING, ([State.PENDING],)),
        (Children.FREE, ([State.FREE], 0, 0)),
        (Children.MIXED, ([State.MAPPED, State.PENDING],)),
        (Children.MIXED, ([State.BLOCKED],)),
        (Children.MIXED, ([State.MAPPED], LARGE + 0x1000)),  # not aligned
        (Children.MIXED, ([State.MAPPED], LARGE, 0x2000)),  # not one behind another
    ],
)
def test_512_pages_are_one_kind_if_all_are_alike_contiguous_and_aligned(
    kind: Children, args: tuple[Any, ...]
) -> None:
    assert children(*args) == kind


def test_a_blocked_table_keeps_the_td_out(private: World) -> None:
    private.block(GPA, Level.PD)
    assert private.touch().exit == Guest.EXIT


# Large pages.


def test_a_2m_page_is_accepted_as_one(world: World) -> None:
    assert large().state(Level.PD) == State.MAPPED


def test_a_4k_ask_for_a_2m_page_is_already_accepted_or_leaves_the_td() -> None:
    accepted, pending = large().accept().rax, large(State.PENDING).accept()
    assert (accepted, pending.exit) == (0x00000B0A00000001, Guest.EXIT_ACCEPT)


def test_a_2m_ask_where_a_table_hangs_is_a_size_mismatch(private: World) -> None:
    assert private.accept(Level.PD).rax == 0xC0000B0B00000001


def test_an_interrupted_2m_accept_goes_on_where_it_was() -> None:
    world = large(State.PENDING)
    assert world.accept(Level.PD, interrupt_after=500).exit == Guest.INTERRUPTED
    assert world.accept(Level.PD, interrupt_after=11).exit == Guest.INTERRUPTED
    assert world.accept(Level.PD, interrupt_after=1).ok


def test_block_sets_an_interrupted_accept_back_to_its_start() -> None:
    world = large(State.PENDING)
    world.accept(Level.PD, interrupt_after=500)
    world.block(GPA, Level.PD)
    assert world.td.entry(GPA, Level.PD).accept_counter == 0


def test_a_2m_aug_wants_all_512_pages_free() -> None:
    world = World(Level.PD)
    world.module.create_vcpu(world.td, LARGE + 0x3000)
    assert world.aug(GPA, LARGE, Level.PD).rax == METADATA | Operand.R8


def test_wbinvd_of_a_page_inside_a_large_one_finds_it_in_use() -> None:
    assert large().module.tdh_phymem_page_wbinvd(LARGE + 0x1000).rax == METADATA | Operand.RCX


def test_demote_of_a_page_in_use_is_not_blocked() -> None:
    assert large().demote(GPA, HPA).rax == NOT_BLOCKED


def test_a_large_page_that_is_blocked_waits_for_a_track_as_a_small_one_does() -> None:
    world = large()
    assert world.track().ok and world.track().ok and world.block(GPA, Level.PD).ok
    assert world.demote(GPA, HPA).rax == world.remove(GPA, Level.PD).rax == NOT_DONE


def test_demote_splits_into_512_pages_that_are_not_blocked() -> None:
    world = large()
    world.block_and_track(Level.PD)
    assert world.demote(GPA, HPA).ok
    assert {e.state for e in world.td.below(GPA, Level.PD)} == {State.MAPPED}
    assert world.module.pamt_of(HPA) == (PageType.EPT, TDR // 4096, 0)
    assert world.module.pamt_of(LARGE, Level.PD).type == PageType.NDA
    assert world.module.tdh_phymem_page_rdmd(LARGE + 0x1000)[1:4] == (PageType.REG, TDR, Level.PT)


def test_demote_with_a_page_in_use_as_table_is_refused() -> None:
    world = large()
    world.block_and_track(Level.PD)
    assert world.demote(GPA, TDR).rax == METADATA | Operand.R8


def test_demote_that_sees_an_interrupt_has_done_nothing() -> None:
    world = large()
    world.block_and_track(Level.PD)
    world.module.interrupt_pending = True
    assert world.demote(GPA, HPA)[:3] == (0x8000000400000000, GPA | 1, TDR)
    assert world.state(Level.PD) == State.BLOCKED


def test_promote_merges_what_demote_split_and_returns_the_table() -> None:
    world = large()
    world.block_and_track(Level.PD)
    world.demote(GPA, HPA)
    world.block_and_track(Level.PD)
    assert world.promote(GPA)[:2] == (SUCCESS, HPA)
    assert world.state(Level.PD) == State.MAPPED and world.module.tdh_phymem_page_wbinvd(HPA).ok
    assert world.module.pamt_of(LARGE, Level.PD)[:2] == (PageType.REG, TDR // 4096)
    assert {world.module.pamt_of(LARGE + i * 0x1000).type for i in range(512)} == {PageType.NDA}
    assert world.module.pamt_of(LARGE - 0x1000) == NDA


def test_promote_of_a_table_with_a_hole_is_refused(private: World) -> None:
    private.block_and_track(Level.PD)
    assert private.promote(GPA)[:3] == (0xC0000B0900000001, 0, 129 << 8 | 1)


def test_a_1g_page_comes_from_promote_and_goes_by_remove() -> None:
    world = World(Level.PD)
    for i in range(512):
        world.aug(GPA + (i << 21), LARGE + (i << 21), Level.PD)
    world.block_and_track(Level.PDPT)
    assert world.promote(GPA, Level.PDPT).ok
    world.block_and_track(Level.PDPT)
    assert world.remove(GPA, Level.PDPT)[:2] == (SUCCESS, LARGE)


def test_demote_of_an_interrupted_accept_begins_it_anew() -> None:
    world = large(State.PENDING)
    world.accept(Level.PD, interrupt_after=5)
    world.out()
    world.block_and_track(Level.PD)
    world.td.entry(GPA, Level.PD).accept_counter = 5  # BLOCK had set it back
    assert world.demote(GPA, HPA).ok and world.td.entry(GPA, Level.PD).accept_counter == 0
    assert {e.state for e in world.td.below(GPA, Level.PD)} == {State.PENDING}


def test_a_1g_page_is_split_into_2m_pages_one_behind_another() -> None:
    world = World(Level.PD)
    for i in range(512):
        world.aug(GPA + (i << 21), LARGE + (i << 21), Level.PD)
    world.block_and_track(Level.PDPT)
    assert world.promote(GPA, Level.PDPT).ok
    world.block_and_track(Level.PDPT)
    assert world.demote(GPA, HPA, Level.PDPT).ok
    assert [e.hpa for e in world.td.below(GPA, Level.PDPT)] == [LARGE + (i << 21) for i in range(512)]


def test_the_child_count_returns_to_where_it_was() -> None:
    world = large()
    before = world.td.children - 512
    world.block_and_track(Level.PD)
    world.demote(GPA, HPA)
    world.block_and_track(Level.PD)
    world.promote(GPA)
    world.block_and_track(Level.PD)
    world.remove(GPA, Level.PD)
    assert world.td.children == before


# Locks.


@pytest.mark.parametrize(
    ("lock", "mode", "leaf", "operand"),
    [
        (Lock.TREE, EXCLUSIVE, "aug", Operand.SEPT_TREE),
        (Lock.TREE, SHARED, "block", Operand.SEPT_TREE),
        (Lock.OP_STATE, EXCLUSIVE, "block", Operand.OP_STATE),
        (Lock.TDR, EXCLUSIVE, "block", Operand.RDX),
        (Lock.TDR, EXCLUSIVE, "track", Operand.RCX),
        (Lock.EPOCH, SHARED, "track", Operand.TD_EPOCH),
    ],
)
def test_a_lock_that_is_held_makes_a_leaf_busy(
    world: World, lock: Lock, mode: str, leaf: str, operand: Operand
) -> None:
    world.module.hold(lock, TDR, mode)
    args = {"aug": (GPA, HPA), "block": (GPA,), "track": ()}[leaf]
    assert getattr(world, leaf)(*args).rax == busy(operand)
    world.module.release(lock, TDR)
    assert getattr(world, leaf)(*args).rax != busy(operand)


@pytest.mark.parametrize(("leaf", "args"), [("aug", (GPA, HPA)), ("block", (GPA,)), ("remove", (GPA,))])
def test_an_accept_under_way_makes_host_leaves_busy_even_on_a_free_entry(
    world: World, leaf: str, args: tuple[int, ...]
) -> None:
    world.module.hold_entry(world.td, GPA)
    assert getattr(world, leaf)(*args)[:3] == (busy(Operand.RCX), 1 << 63, 0)


def test_a_guest_gives_way_to_the_host_that_came_second(world: World) -> None:
    world.aug(GPA, HPA)
    world.module.hold_entry(world.td, GPA)
    world.block(GPA)
    world.module.hold_entry(world.td, GPA, taken=False)
    assert world.accept().rax == busy(Operand.RCX)
    assert world.block(GPA).ok and world.td.entry(GPA, Level.PT).lock == EntryLock()


def test_a_busy_pamt_entry_of_the_page_given_is_operand_r8(world: World) -> None:
    world.module.hold(Lock.PAMT, (Level.PT, HPA), SHARED)
    assert world.aug(GPA, HPA).rax == busy(Operand.R8)


def test_a_busy_pamt_entry_of_the_page_removed_is_operand_rcx(private: World) -> None:
    private.block_and_track()
    private.module.hold(Lock.PAMT, (Level.PT, HPA), SHARED)
    assert private.remove(GPA).rax == busy(Operand.RCX)


def test_demote_wants_the_large_pages_pamt_entry_last_of_all() -> None:
    world = large()
    world.block_and_track(Level.PD)
    world.module.hold(Lock.PAMT, (Level.PD, LARGE), SHARED)
    world.module.hold(Lock.PAMT, (Level.PT, HPA), SHARED)
    assert world.demote(GPA, HPA).rax == busy(Operand.R8)
    world.module.release(Lock.PAMT, (Level.PT, HPA))
    assert world.demote(GPA, HPA)[:3] == (busy(Operand.RCX), 0, 0)
    world.module.interrupt_pending = True
    assert world.demote(GPA, HPA).rax == Status.INTERRUPTED_RESTARTABLE
    assert world.state(Level.PD) == State.BLOCKED


def split() -> World:
    """A world whose 2M page is split, its table blocked and tracked."""
    world = large()
    world.block_and_track(Level.PD)
    assert world.demote(GPA, HPA).ok
    world.block_and_track(Level.PD)
    return world


def test_promote_wants_the_large_pages_pamt_entry_and_leaves_the_table_alone() -> None:
    world = split()
    world.module.hold(Lock.PAMT, (Level.PD, LARGE), SHARED)
    assert world.promote(GPA).rax == busy(Operand.RCX)
    world.module.release(Lock.PAMT, (Level.PD, LARGE))
    assert world.promote(GPA).ok


def test_promote_wants_the_tables_pamt_entry() -> None:
    world = split()
    world.module.hold(Lock.PAMT, (Level.PT, HPA), SHARED)
    assert world.promote(GPA).rax == busy(Operand.RCX)


def test_promote_meets_a_child_that_is_locked_and_asks_for_priority_there() -> None:
    world = split()
    world.td.below(GPA, Level.PD)[7].lock = EntryLock(taken=True)
    assert world.promote(GPA)[:3] == (busy(Operand.RCX), 0, 129 << 8 | 1)
    assert world.td.below(GPA, Level.PD)[7].lock == EntryLock(taken=True, host_priority=True)
    assert world.state(Level.PD) == State.NL_BLOCKED


@pytest.mark.parametrize(("unfit", "status"), [(8, 0x8000020000000001), (6, 0xC0000B0900000001)])
def test_promote_stops_at_the_first_child_that_is_locked_or_unfit(unfit: int, status: int) -> None:
    world = split()
    children = world.td.below(GPA, Level.PD)
    children[7].lock, children[unfit].state = EntryLock(taken=True), State.FREE
    assert world.promote(GPA).rax == status


def test_promote_meets_a_locked_first_child_before_it_looks_at_it() -> None:
    world = split()
    first = world.td.below(GPA, Level.PD)[0]
    first.lock, first.state = EntryLock(taken=True), State.FREE
    assert world.promote(GPA).rax == busy(Operand.RCX)


@pytest.mark.parametrize(
    ("lock", "where", "says"),
    [
        (Lock.TREE, HPA, "is a TD's, named by its tdr \\(0x1000\\), not by 65536"),
        (Lock.EPOCH, (Level.PT, TDR), "is a TD's"),
        (Lock.ENTRY, TDR, "hold_entry"),
        (Lock.PARENTS, (Level.PD, LARGE), "at the larger size"),
        (Lock.LARGE, (Level.PD, LARGE), "at the larger size"),
        (Lock.PAMT, HPA, "a PAMT key is"),
        (Lock.PAMT, (Level.PD, HPA), "an aligned HPA"),
        (Lock.PAMT, (Level.PT, 1 << 40), "below 0x10000000000"),
        (Lock.PAMT, (Level.PT, -4096), "a PAMT key is"),
        (Lock.PAMT, (Level.PML4, 0), "Level.PT, PD or PDPT"),
        (Lock.PAMT, (Level.PT, TDR), "Lock.TDR"),
    ],
)
def test_a_place_that_has_no_such_lock_is_refused_in_words(
    world: World, lock: Lock, where: int | tuple[Level, int], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        world.module.hold(lock, where)
    assert world.module.held == {}


@pytest.mark.parametrize("size", [Level.PT, Level.PD, Level.PDPT])
def test_a_pamt_entry_of_any_size_can_be_held_from_0_on(world: World, size: Level) -> None:
    world.module.hold(Lock.PAMT, (size, 0))
    assert world.module.held == {(Lock.PAMT, (size, 0)): EXCLUSIVE}


def test_a_lock_is_held_shared_or_exclusive_once_and_released_once(world: World) -> None:
    with pytest.raises(ValueError, match="shared or exclusive, not 'read'"):
        world.module.hold(Lock.TREE, TDR, "read")
    world.module.hold(Lock.TREE, TDR, SHARED)
    with pytest.raises(ValueError, match="is held shared already"):
        world.module.hold(Lock.TREE, TDR)
    with pytest.raises(ValueError, match="epoch at 4096 is not held; S-EPT tree at 4096"):
        world.module.release(Lock.EPOCH, TDR)
    world.module.release(Lock.TREE, TDR)
    with pytest.raises(ValueError, match="is not held; nothing is"):
        world.module.release(Lock.TREE, TDR)


@pytest.mark.parametrize(
    ("gpa", "level"), [(GPA | 1 << 47, 0), (GPA + 1, 0), (GPA + 4096, 1), (1 << 48, 0), (0, 4)]
)
def test_an_entry_that_is_not_there_cannot_be_held(world: World, gpa: int, level: int) -> None:
    with pytest.raises(ValueError, match="no S-EPT entry"):
        world.module.hold_entry(world.td, gpa, Level(level))


def test_a_parent_of_the_page_given_that_is_taken_is_operand_r8(world: World) -> None:
    world.module.hold(Lock.PAMT, (Level.PDPT, 0), EXCLUSIVE)
    assert world.aug(GPA, HPA).rax == busy(Operand.R8)


def test_a_vcpu_that_is_inside_holds_the_tdrs_pamt_entry_shared(world: World) -> None:
    world.vp_enter(world.vcpu)
    assert world.module.tdh_phymem_page_rdmd(TDR).ok
    assert world.module.tdh_phymem_page_reclaim(TDR).rax == busy(Operand.RCX)


def test_a_track_under_way_makes_vp_enter_busy(world: World) -> None:
    world.module.hold(Lock.EPOCH, TDR, EXCLUSIVE)
    assert world.vp_enter(world.vcpu).rax == busy(Operand.TD_EPOCH)


def test_a_vp_enter_that_failed_is_not_counted(world: World) -> None:
    for _ in range(7):
        world.touch(progress=False)
    world.module.hold(Lock.TREE, TDR, SHARED)
    assert world.vp_enter(world.vcpu).rax == busy(Operand.SEPT_TREE)
    assert world.td.epochs.refcount == (0, 0)


# Zero-step mitigation.


def test_an_eighth_entry_to_the_same_fault_is_faked(world: World) -> None:
    for _ in range(7):
        world.touch(progress=False)
    result = world.vp_enter(world.vcpu)
    assert result == (48, 2, 0, GPA, Guest.EXIT) and not world.vcpu.inside


def test_any_other_exit_is_progress_and_so_is_an_access_unless_told_otherwise(world: World) -> None:
    for _ in range(3):
        world.touch(progress=False)
    assert world.vcpu.stepping.violations == 3
    world.accept()  # its exit is no progress, and no violation either
    assert world.vcpu.stepping.violations == 3
    world.vp_enter(world.vcpu)
    world.out()
    assert world.vcpu.stepping.violations == 0
    for _ in range(9):
        world.touch()
    assert not world.vcpu.stepping.armed and world.touch().rcx == 2


def test_a_page_that_is_there_again_ends_the_faking(private: World) -> None:
    private.block_and_track()
    for _ in range(7):
        private.touch(progress=False)
    faked, unblocked = private.vp_enter(private.vcpu), private.unblock(GPA)
    assert (faked.exit, unblocked.ok, private.vp_enter(private.vcpu).ok) == (Guest.EXIT, True, True)


def test_exits_of_accept_never_arm_the_mitigation(world: World) -> None:
    for _ in range(20):
        world.accept()
    assert not world.vcpu.stepping.armed


# The life of a TD.


def test_pages_of_a_living_td_cannot_be_reclaimed(private: World) -> None:
    result = private.module.tdh_phymem_page_reclaim(HPA)
    assert result[:4] == (0xC000060700000000, PageType.REG, TDR, Level.PT)


def test_teardown_takes_flush_write_back_and_reclaims_the_tdr_last(private: World) -> None:
    module, td = private.module, private.td
    assert module.tdh_mng_vpflushdone(td).rax == Status.FLUSHVP_NOT_DONE
    assert module.tdh_vp_flush(td, private.vcpu).ok and module.tdh_mng_vpflushdone(td).ok
    assert module.tdh_mng_key_freeid(td).rax == Status.WBCACHE_NOT_COMPLETE
    assert module.tdh_phymem_cache_wb().ok and module.tdh_mng_key_freeid(td).ok
    assert module.tdh_phymem_page_reclaim(TDR).rax == Status.TD_ASSOCIATED_PAGES_EXIST
    pages = [hpa for (_, hpa), entry in module.pamt.items() if entry.type not in (PageType.NDA, PageType.TDR)]
    assert all(module.tdh_phymem_page_reclaim(hpa).ok for hpa in pages)
    assert module.tdh_phymem_page_reclaim(TDR).ok


def torn_down(world: World) -> Module:
    """Bring a world's TD to teardown: flushed, written back, its HKID free."""
    module, td = world.module, world.td
    for vcpu in world.vcpus:
        if vcpu.associated:
            assert module.tdh_vp_flush(td, vcpu).ok
    assert module.tdh_mng_vpflushdone(td).ok and module.tdh_phymem_cache_wb().ok
    assert module.tdh_mng_key_freeid(td).ok
    return module


def test_a_large_page_is_reclaimed_whole_and_by_its_first_address() -> None:
    module = torn_down(world := large())
    before = world.td.children
    assert module.tdh_phymem_page_reclaim(LARGE + 0x1000) == (
        0xC000010000000001, PageType.REG, TDR, Level.PD, None
    )  # fmt: skip
    assert module.tdh_phymem_page_reclaim(LARGE)[:4] == (0, PageType.REG, TDR, Level.PD)
    assert world.td.children == before - 512
    assert module.pamt_of(LARGE, Level.PD) == (PageType.NDA, TDR // 4096, 0)


@pytest.mark.parametrize("leaf", ["tdh_phymem_page_reclaim", "tdh_phymem_page_rdmd"])
def test_a_page_that_cannot_be_looked_up_is_refused_with_rcx(private: World, leaf: str) -> None:
    call = getattr(private.module, leaf)
    assert call(HPA + 1) == (0xC000010000000001, 0, 0, 0, None)
    assert call(private.module.size) == (0xC000010100000001, 0, 0, 0, None)
    private.module.hold(Lock.PAMT, (Level.PD, 0))
    assert call(HPA) == (busy(Operand.RCX), 0, 0, 0, None)
    private.module.release(Lock.PAMT, (Level.PD, 0))
    private.module.hold(Lock.PAMT, (Level.PT, HPA))
    assert call(HPA).rax == busy(Operand.RCX)


def test_rdmd_shares_a_pamt_entry_and_reclaim_does_not(private: World) -> None:
    private.module.hold(Lock.PAMT, (Level.PT, HPA), SHARED)
    assert private.module.tdh_phymem_page_rdmd(HPA).ok
    assert private.module.tdh_phymem_page_reclaim(HPA).rax == busy(Operand.RCX)


def test_what_is_nobodys_cannot_be_reclaimed_and_reads_as_nobodys(private: World) -> None:
    free = HPA + 0x1000
    assert private.module.tdh_phymem_page_reclaim(free) == (METADATA | Operand.RCX, 0, 0, 0, None)
    assert private.module.tdh_phymem_page_rdmd(free) == (0, PageType.NDA, 0, Level.PT, None)


def test_a_page_within_a_large_one_reads_as_the_large_one() -> None:
    module = large().module
    assert module.tdh_phymem_page_rdmd(LARGE + 0x5000) == (0, PageType.REG, TDR, Level.PD, None)
    module.hold(Lock.PAMT, (Level.PD, LARGE))
    assert module.tdh_phymem_page_rdmd(LARGE + 0x5000).rax == busy(Operand.RCX)


def test_a_busy_tdr_makes_reclaim_of_its_pages_busy(private: World) -> None:
    module = torn_down(private)
    module.hold(Lock.TDR, TDR)
    assert module.tdh_phymem_page_reclaim(HPA)[:4] == (busy(Operand.TDR), PageType.REG, TDR, Level.PT)
    assert module.tdh_phymem_page_reclaim(TDR).rax == busy(Operand.RCX)
    module.release(Lock.TDR, TDR)
    before = private.td.children
    assert module.tdh_phymem_page_reclaim(HPA).ok and private.td.children == before - 1


def test_a_tdr_of_a_living_td_cannot_be_reclaimed(private: World) -> None:
    assert private.module.tdh_phymem_page_reclaim(TDR)[:4] == (0xC000060700000000, PageType.TDR, 0, Level.PT)


def test_write_back_has_something_to_do_only_for_a_td_that_is_flushed(private: World) -> None:
    assert private.module.tdh_phymem_cache_wb().rax == Status.NO_HKID_READY_TO_WBCACHE
    private.module.tdh_vp_flush(private.td, private.vcpu)
    private.module.tdh_mng_vpflushdone(private.td)
    assert not private.td.cache_written_back
    assert private.module.tdh_phymem_cache_wb() == Result() and private.td.cache_written_back


def test_a_vcpu_is_flushed_once_and_while_its_td_has_its_key(private: World) -> None:
    flush = private.module.tdh_vp_flush
    private.touch()
    assert flush(private.td, private.vcpu).ok and not private.vcpu.tlb and not private.vcpu.associated
    assert flush(private.td, private.vcpu).rax == Status.VCPU_NOT_ASSOCIATED
    private.module.hold(Lock.TDR, TDR)
    assert flush(private.td, private.vcpu).rax == busy(Operand.TDR)
    private.module.release(Lock.TDR, TDR)
    private.out()
    private.module.tdh_mng_vpflushdone(private.td)
    assert flush(private.td, private.vcpu).rax == Status.TD_KEYS_NOT_CONFIGURED


@pytest.mark.parametrize("leaf", ["tdh_mng_vpflushdone", "tdh_mng_key_freeid", "tdh_mr_finalize"])
def test_lifecycle_leaves_are_busy_while_the_tdr_is_held(world: World, leaf: str) -> None:
    world.module.hold(Lock.TDR, TDR, SHARED)
    assert getattr(world.module, leaf)(world.td).rax == busy(Operand.RCX)


def test_a_td_without_vcpus_is_not_finalized() -> None:
    module = Module()
    td = module.create_td(TDR, hkid=33)
    assert module.tdh_mr_finalize(td).rax == Status.NO_VCPUS
    module.create_vcpu(td, TDVPR)
    assert module.tdh_mr_finalize(td).ok
    assert module.tdh_mr_finalize(td).rax == Status.OP_STATE_INCORRECT


@pytest.mark.parametrize("hpa", [TDR, 0x1001, 1 << 40])
def test_a_page_that_is_taken_or_none_is_no_root_and_no_vcpu(world: World, hpa: int) -> None:
    with pytest.raises(ValueError, match="is not free; any page of 4K below 0x10000000000"):
        world.module.create_td(hpa, hkid=34)
    with pytest.raises(ValueError, match="is not free"):
        world.module.create_vcpu(world.td, hpa)


def test_a_tds_pages_are_the_pamts(world: World) -> None:
    assert world.module.pamt_of(TDR) == (PageType.TDR, 0, 0)
    assert world.module.pamt_of(TDVPR) == (PageType.TDVPR, TDR // 4096, 0)
    assert world.td.children == 1 + 3  # a vCPU and three tables
    assert world.module.size == 1 << 40 and not world.module.interrupt_pending
    assert Module().create_td(TDR, hkid=33).ve_disable


@pytest.mark.parametrize(
    ("result", "ok"),
    [
        (Result(), True),
        (Result(exit=Guest.DATA), True),
        (Result(48), True),  # an exit reason is no error
        (Result(48, exit=Guest.EXIT), False),
        (Result(exit=Guest.VE), False),
        (Result(exit=Guest.INTERRUPTED), False),
        (Result(0x00000B0700000001), False),  # a warning
        (Result(busy(Operand.RCX)), False),
    ],
)
def test_only_a_success_that_did_the_guests_work_is_ok(result: Result, ok: bool) -> None:
    assert result.ok is ok


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (Result(), "TDX_SUCCESS"),
        (Result(0xC0000B0600000001, 0xF7, 0x400), "TDX_GPA_RANGE_NOT_BLOCKED | RCX (RCX 0xf7, RDX 0x400)"),
        (Result(rdx=1), "TDX_SUCCESS (RCX 0x0, RDX 0x1)"),
        (Result(exit=Guest.VE), "#VE"),
    ],
)
def test_a_result_is_printed_with_its_registers(result: Result, text: str) -> None:
    assert str(result) == text


def test_a_gpa_has_an_entry_if_it_is_private_aligned_and_within_the_tds_width() -> None:
    narrow, wide = Td(TDR, 33), Td(TDR, 33, top=Level.PML5)
    assert narrow.has_entry((1 << 47) - 4096, Level.PT) and not narrow.has_entry(1 << 47, Level.PT)
    assert wide.has_entry(1 << 47, Level.PT) and wide.has_entry((1 << 51) - 4096, Level.PT)
    assert not wide.has_entry(1 << 51, Level.PT) and not wide.has_entry(1 << 52, Level.PT)
    assert not narrow.has_entry(1 << 48, Level.PT)
    assert narrow.has_entry(0, Level.PML4) and not narrow.has_entry(0, Level.PML5)
    assert wide.has_entry(0, Level.PML5) and not wide.has_entry(0x1000, Level.PD)


def test_a_td_begins_before_finalize_with_its_key() -> None:
    td = Td(TDR, 33)
    assert (td.lifecycle, td.op_state, td.fatal) == ("KEYS_CONFIGURED", "INITIALIZED", False)
    assert td.ve_disable and td.top == Level.PML4 and not td.cache_written_back
    assert td.children == 0 and td.epochs == (1, (0, 0))
    vcpu = Vcpu(TDVPR)
    assert (vcpu.epoch, vcpu.associated, vcpu.inside, vcpu.tlb) == (0, False, False, {})
    assert Entry() == Entry(State.FREE, 0, 0, EntryLock())


def test_teardown_has_one_order(private: World) -> None:
    module, td = private.module, private.td
    assert module.tdh_mng_key_freeid(td).rax == Status.LIFECYCLE_STATE_INCORRECT
    module.tdh_vp_flush(td, private.vcpu)
    module.tdh_mng_vpflushdone(td)
    assert module.tdh_mng_vpflushdone(td).rax == Status.LIFECYCLE_STATE_INCORRECT


def test_without_its_key_a_td_answers_no_leaf(private: World) -> None:
    private.module.tdh_vp_flush(private.td, private.vcpu)
    private.module.tdh_mng_vpflushdone(private.td)
    assert private.remove(GPA).rax == 0x8000081000000000


def test_a_machine_check_loses_the_td_on_every_vcpu() -> None:
    world = World(vcpus=2)
    for vcpu in world.vcpus:
        world.vp_enter(vcpu)
    assert world.machine_check(world.vcpus[0]).rax == 0x6000000500000000
    assert world.td_exit(world.vcpus[1]).rax == 0x6000000500000000


def test_a_lost_td_lets_nobody_in_and_gives_no_page_back(private: World) -> None:
    private.touch()
    private.machine_check(private.vcpu)
    assert private.vp_enter(private.vcpu).rax == private.remove(GPA).rax == 0xE000060400000000


def test_lifecycle_leaves_are_busy_while_a_vcpu_is_inside(private: World) -> None:
    private.touch()
    assert private.module.tdh_mng_vpflushdone(private.td).rax == busy(Operand.RCX)

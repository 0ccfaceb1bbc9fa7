"""Each step of the kernel alone: what it needs, what it changes, what it breaks (kvmlab/kernel, kvmlab/kvm)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from step_tools import BLOCKED, Machine, Ran

from kvmlab.guest.access import Access
from kvmlab.hw import snp
from kvmlab.hw.memory import EMPTY, Content
from kvmlab.hw.snp.entry import RmpEntry
from kvmlab.kernel import directmap, locks
from kvmlab.kvm import attributes, gmem, lpage, memslots, mmu, sev

WRITER, READER = {"mmu_lock_writer": "CPU0"}, {"mmu_lock_reader[CPU0]": True}
OURS, MISUSE, SLEEPS = snp.assigned_to(sev.ASID, 0), ["lock-misuse"], ["sleep-in-atomic"]
VALID = OURS._replace(validated=True)
BIG = VALID._replace(size="2M")


@pytest.fixture(scope="module")
def tiny() -> Machine:
    return Machine()


@pytest.fixture(scope="module")
def discard() -> Machine:
    """guest_memfd's pages come and go, under invalidate_lock."""
    return Machine("discard")


@pytest.fixture(scope="module")
def big() -> Machine:
    """Both gfns lie in one 2M page of guest_memfd."""
    return Machine("huge-split")


@pytest.fixture(scope="module")
def huge() -> Machine:
    """Six gfns of a shared 1G page, which is three 2M pages; the request is for gfns 1 and 2."""
    return Machine("huge-1g")


def did(
    result: str | None = None,
    wrote: dict[str, Any] | None = None,
    broke: Sequence[str] = (),
    counts: Sequence[str] = (),
) -> Ran:
    return Ran(result, wrote or {}, list(broke), list(counts))


# Locks.


def test_a_mutex_is_taken_if_nobody_has_it(tiny: Machine) -> None:
    assert tiny.run(locks.mutex_lock, "CPU0", "slots_lock") == did(None, {"slots_lock": "CPU0"})


def test_a_mutex_that_another_has_is_waited_for(tiny: Machine) -> None:
    assert tiny.run(locks.mutex_lock, "CPU0", "folio_lock", at={"folio_lock": "CPU1"}).result == BLOCKED


@pytest.mark.parametrize("held", [WRITER, READER])
def test_a_mutex_under_mmu_lock_sleeps(tiny: Machine, held: dict[str, Any]) -> None:
    assert tiny.run(locks.mutex_lock, "CPU0", "slots_lock", at=held).broke == SLEEPS


def test_a_second_take_of_a_mutex_hangs(tiny: Machine) -> None:
    assert tiny.run(locks.mutex_lock, "CPU0", "slots_lock", at={"slots_lock": "CPU0"}) == did(
        "stuck", broke=MISUSE
    )


def test_only_the_owner_unlocks_a_mutex(tiny: Machine) -> None:
    at = {"folio_lock": "CPU1"}
    assert tiny.run(locks.mutex_unlock, "CPU1", "folio_lock", at=at) == did(None, {"folio_lock": None})
    assert tiny.run(locks.mutex_unlock, "CPU0", "folio_lock", at=at) == did(broke=MISUSE)


def test_a_free_rwlock_is_taken_for_write(tiny: Machine) -> None:
    assert tiny.run(locks.write_lock, "CPU0", "mmu_lock") == did(None, {"mmu_lock_writer": "CPU0"})


@pytest.mark.parametrize("held", [{"mmu_lock_writer": "CPU1"}, {"mmu_lock_reader[CPU1]": True}])
def test_a_writer_that_finds_the_lock_held_queues(tiny: Machine, held: dict[str, Any]) -> None:
    assert tiny.run(locks.write_lock, "CPU0", "mmu_lock", at=held) == did(
        "again", {"mmu_lock_queue": ("CPU0",)}
    )
    queued = held | {"mmu_lock_queue": ("CPU0",)}
    assert tiny.run(locks.write_lock, "CPU0", "mmu_lock", at=queued).result == BLOCKED


def test_writers_are_served_in_the_order_in_which_they_came(tiny: Machine) -> None:
    first = {"mmu_lock_queue": ("CPU0", "CPU1")}
    assert tiny.run(locks.write_lock, "CPU0", "mmu_lock", at=first) == did(
        None, {"mmu_lock_writer": "CPU0", "mmu_lock_queue": ("CPU1",)}
    )
    second = {"mmu_lock_queue": ("CPU1",)}
    assert tiny.run(locks.write_lock, "CPU0", "mmu_lock", at=second) == did(
        "again", {"mmu_lock_queue": ("CPU1", "CPU0")}
    )


@pytest.mark.parametrize("held", [WRITER, READER])
def test_a_second_take_of_an_rwlock_hangs(tiny: Machine, held: dict[str, Any]) -> None:
    assert tiny.run(locks.write_lock, "CPU0", "mmu_lock", at=held) == did("stuck", broke=MISUSE)
    assert tiny.run(locks.read_lock, "CPU0", "mmu_lock", at=held) == did("stuck", broke=MISUSE)


def test_one_that_waits_for_write_does_not_take_twice(tiny: Machine) -> None:
    at = {"mmu_lock_queue": ("CPU0",), "mmu_lock_reader[CPU0]": True}
    assert tiny.run(locks.write_lock, "CPU0", "mmu_lock", at=at).broke == []


def test_readers_share_the_lock(tiny: Machine) -> None:
    at = {"mmu_lock_reader[CPU1]": True}
    assert tiny.run(locks.read_lock, "CPU0", "mmu_lock", at=at) == did(None, {"mmu_lock_reader[CPU0]": True})


@pytest.mark.parametrize("held", [{"mmu_lock_writer": "CPU1"}, {"mmu_lock_queue": ("CPU1",)}])
def test_a_reader_waits_behind_the_writer_and_any_that_waits(tiny: Machine, held: dict[str, Any]) -> None:
    assert tiny.run(locks.read_lock, "CPU0", "mmu_lock", at=held).result == BLOCKED


def test_each_lock_is_let_go_as_it_was_taken(tiny: Machine) -> None:
    assert tiny.run(locks.write_unlock, "CPU0", "mmu_lock", at=WRITER) == did(None, {"mmu_lock_writer": None})
    assert tiny.run(locks.read_unlock, "CPU0", "mmu_lock", at=READER) == did(
        None, {"mmu_lock_reader[CPU0]": False}
    )
    assert tiny.run(locks.write_unlock, "CPU0", "mmu_lock", at=READER) == did(broke=MISUSE)
    assert tiny.run(locks.read_unlock, "CPU0", "mmu_lock", at=WRITER) == did(broke=MISUSE)
    assert tiny.run(locks.write_unlock, "CPU1", "mmu_lock", at=WRITER) == did(broke=MISUSE)


def test_mmu_lock_spins_and_the_rwsem_sleeps(discard: Machine) -> None:
    under = {"mmu_lock_reader[CPU0]": True}
    assert discard.run(locks.write_lock, "CPU0", "invalidate_lock", at=under).broke == SLEEPS
    assert discard.run(locks.write_lock, "CPU0", "invalidate_lock") == did(
        None, {"invalidate_lock_writer": "CPU0"}
    )
    held = {"invalidate_lock_writer": "CPU0"}
    assert discard.run(locks.write_lock, "CPU0", "mmu_lock", at=held).broke == []


def test_an_rwsem_for_read_sleeps_too() -> None:
    machine = Machine(design="gmem-in-place", backing="in-place")
    take = locks.read_lock, "CPU0", "invalidate_lock"
    assert machine.run(*take) == did(None, {"invalidate_lock_reader[CPU0]": True})
    assert machine.run(*take, at=READER).broke == machine.run(*take, at=WRITER).broke == SLEEPS
    assert (
        machine.run(locks.read_lock, "CPU0", "mmu_lock", at={"invalidate_lock_reader[CPU0]": True}).broke
        == []
    )


def test_what_is_held_is_known_of_each_kind(tiny: Machine) -> None:
    at = {
        "slots_lock": "CPU0",
        "folio_lock": "CPU1",
        "mmu_lock_reader[CPU0]": True,
        "mmu_lock_writer": "CPU1",
    }
    assert tiny.run(locks.held, "CPU0", at=at).result == ["slots_lock", "mmu_lock"]
    assert tiny.run(locks.held, "CPU1", at=at).result == ["folio_lock", "mmu_lock"]
    assert tiny.run(locks.held, "host", at=at).result == []


def test_going_back_to_the_guest_with_a_lock_is_a_misuse(tiny: Machine) -> None:
    assert tiny.run(locks.leave, "CPU0", "enters the guest", at=READER).broke == MISUSE
    assert tiny.run(locks.leave, "CPU1", "enters the guest", at=READER).broke == []


def test_two_locks_that_nest_both_ways_are_a_misuse() -> None:
    machine = Machine(conf={"inverted": frozenset({("slots_lock", "folio_lock")})})
    take = locks.mutex_lock, "CPU0", "folio_lock"
    assert machine.run(*take, at={"slots_lock": "CPU0"}) == did(None, {"folio_lock": "CPU0"}, MISUSE)
    assert machine.run(*take).broke == []


def test_nobody_sleeps_in_atomic_context_without_config_preempt_count() -> None:
    machine = Machine(preempt_count=False)
    assert machine.run(locks.mutex_lock, "CPU0", "slots_lock", at=WRITER).broke == []


def test_who_waits_for_itself_waits_for_ever(tiny: Machine) -> None:
    assert tiny.run(locks.stuck, "CPU0").result == BLOCKED


@pytest.mark.parametrize(
    ("at", "write", "broke"),
    [
        (WRITER, True, []),
        (WRITER, False, []),
        (READER, True, MISUSE),
        (READER, False, []),
        ({}, False, MISUSE),
        ({"mmu_lock_writer": "CPU1"}, True, MISUSE),
    ],
)
def test_mmu_lock_is_asserted_for_write_unless_a_reader_is_enough(
    tiny: Machine, at: dict[str, Any], write: bool, broke: list[str]
) -> None:
    assert tiny.run(lambda s: locks.assert_held(s, "CPU0", "it", write=write), at=at).broke == broke


# The directmap.


@pytest.mark.parametrize(
    "step", [directmap.kvm_unmap_directmap, directmap.kvm_map_directmap, directmap.adjust_direct_map]
)
def test_changing_the_directmap_may_sleep(tiny: Machine, step: Callable[..., Any]) -> None:
    for at in (WRITER, READER):
        assert tiny.run(step, "CPU0", 0, at=at).broke == SLEEPS
    assert tiny.run(step, "CPU0", 0).broke == []


def test_unmapping_a_page_splits_the_2m_entry_and_mapping_it_merges_nothing(tiny: Machine) -> None:
    unmapped = {"directmap[P0]": "absent", "directmap_2m": False}
    assert tiny.run(directmap.kvm_unmap_directmap, "CPU0", 0) == did(None, unmapped)
    assert tiny.run(directmap.kvm_map_directmap, "CPU0", 0, at=unmapped) == did(
        None, {"directmap[P0]": "present"}
    )


def test_splitting_leaves_every_page_present(tiny: Machine) -> None:
    assert tiny.run(directmap.adjust_direct_map, "CPU0", 0) == did(None, {"directmap_2m": False})


@pytest.mark.parametrize(
    ("at", "answer"),
    [
        ({}, snp.OK),
        ({"rmp[P0]": OURS}, snp.HOST_PF),
        ({"rmp[P0]": OURS, "directmap_2m": False}, snp.OK),
    ],
)
def test_a_kernel_write_to_the_neighbour_asks_for_the_region_while_it_is_mapped_large(
    tiny: Machine, at: dict[str, Any], answer: str
) -> None:
    assert tiny.run(directmap.host_write, "N", at=at).result == answer


def test_a_kernel_write_needs_a_page_that_is_present_and_the_hosts(tiny: Machine) -> None:
    small = {"directmap_2m": False}
    assert tiny.run(directmap.host_write, "P0", at=small | {"directmap[P0]": "absent"}).result == "absent"
    assert tiny.run(directmap.host_write, "P0", at=small | {"rmp[P0]": OURS}).result == snp.HOST_PF
    assert tiny.run(directmap.host_write, "P0", at=small).result == snp.OK


def test_a_2m_rmpupdate_leaves_the_2m_directmap_entry() -> None:
    whole = Machine("huge-accept")
    assert whole.run(directmap.adjust_direct_map, "CPU0", 0).wrote == {}
    head, other = BIG, BIG._replace(gpa=1)
    assert (
        whole.run(
            directmap.adjust_direct_map, "CPU0", 0, (0, 1), at={"rmp[P0]": head, "rmp[P1]": other}
        ).wrote
        == {}
    )
    assert whole.run(directmap.adjust_direct_map, "CPU0", 0, at={"rmp[P1]": VALID._replace(gpa=1)}).wrote == {
        "directmap_2m": False
    }


def test_part_of_a_2m_entry_goes_by_4k_and_splits_the_directmap(big: Machine) -> None:
    at = {"rmp[P0]": BIG, "rmp[P1]": BIG._replace(gpa=1)}
    assert big.run(directmap.adjust_direct_map, "CPU0", 0, at=at).wrote == {"directmap_2m": False}


def test_a_2m_folio_is_unmapped_whole_unless_some_of_it_is_assigned(big: Machine) -> None:
    both = {"directmap[P0]": "absent", "directmap[P1]": "absent", "directmap_2m": False}
    assert big.run(directmap.unmap_folio, "CPU0", 0).wrote == both
    one = {"directmap[P0]": "absent", "directmap_2m": False}
    assert big.run(directmap.unmap_folio, "CPU0", 0, at={"rmp[P1]": VALID._replace(gpa=1)}).wrote == one


# The invalidation window and the xarray.

OPEN = WRITER | {"in_progress": 1}


@pytest.mark.parametrize(
    ("step", "args"),
    [
        (attributes.kvm_mmu_invalidate_begin, (None,)),
        (attributes.kvm_mmu_invalidate_range_add, (0, 1)),
        (attributes.kvm_mmu_invalidate_end, ()),
        (lpage.kvm_update_lpage_mixed_flag, ((0,), "private", None)),
        (mmu.kvm_unmap_gfn_range, (0,)),
    ],
)
@pytest.mark.parametrize("held", [{}, READER, {"mmu_lock_writer": "CPU1"}])
def test_what_changes_the_window_or_zaps_needs_mmu_lock_for_write(
    tiny: Machine, step: Callable[..., Any], args: tuple[Any, ...], held: dict[str, Any]
) -> None:
    at = {"in_progress": 1}
    assert tiny.run(step, "CPU0", *args, at=at | held).broke == MISUSE
    assert tiny.run(step, "CPU0", *args, at=at | WRITER).broke == []


def test_the_first_begin_resets_the_range_and_later_ones_widen_it(huge: Machine) -> None:
    begin = attributes.kvm_mmu_invalidate_begin, "CPU0"
    assert huge.run(*begin, None, at=WRITER | {"invalidate_range": (1, 2)}) == did(
        None, {"in_progress": 1, "invalidate_range": None}
    )
    assert huge.run(*begin, (1, 3), at=WRITER) == did(None, {"in_progress": 1, "invalidate_range": (1, 3)})
    inside = OPEN | {"invalidate_range": (3, 5)}
    assert huge.run(*begin, (1, 2), at=inside) == did(None, {"in_progress": 2, "invalidate_range": (1, 5)})
    assert huge.run(*begin, None, at=inside) == did(None, {"in_progress": 2})


def test_more_windows_than_can_ever_be_closed_are_many(tiny: Machine) -> None:
    at = WRITER | {"in_progress": 2}
    assert tiny.run(attributes.kvm_mmu_invalidate_begin, "CPU0", None, at=at) == did()
    assert tiny.run(attributes.kvm_mmu_invalidate_end, "CPU0", at=at | {"invalidate_range": (0, 1)}) == did()


def test_all_invalidations_share_one_range(huge: Machine) -> None:
    at = OPEN | {"invalidate_range": (3, 4)}
    assert huge.run(attributes.kvm_mmu_invalidate_range_add, "CPU0", 1, 2, at=at).wrote == {
        "invalidate_range": (1, 4)
    }
    assert huge.run(attributes.kvm_mmu_invalidate_range_add, "CPU0", 4, 6, at=at).wrote == {
        "invalidate_range": (3, 6)
    }
    assert huge.run(attributes.kvm_mmu_invalidate_range_add, "CPU0", 1, 2, at=OPEN).wrote == {
        "invalidate_range": (1, 2)
    }


def test_the_last_end_closes_the_window_and_makes_every_older_snapshot_stale(tiny: Machine) -> None:
    at = OPEN | {"invalidate_range": (0, 1), "snapshot[CPU1]": "same"}
    closed = {"in_progress": 0, "invalidate_range": None, "snapshot[CPU1]": "moved"}
    assert tiny.run(attributes.kvm_mmu_invalidate_end, "CPU0", at=at) == did(None, closed)


def test_an_end_that_is_not_the_last_leaves_the_range(discard: Machine) -> None:
    at = WRITER | {"in_progress": 2, "invalidate_range": (0, 1)}
    assert discard.run(attributes.kvm_mmu_invalidate_end, "CPU0", at=at) == did(None, {"in_progress": 1})


def test_an_end_without_a_begin_is_a_bug_and_moves_no_count(tiny: Machine) -> None:
    at = WRITER | {"snapshot[CPU1]": "same"}
    assert tiny.run(attributes.kvm_mmu_invalidate_end, "CPU0", at=at) == did(None, broke=["kernel-bug"])


@pytest.mark.parametrize(
    ("window", "gfn", "moved", "retry"),
    [
        (None, 0, False, False),
        (None, 0, True, True),
        ((1, 3), 0, False, False),
        ((1, 3), 1, False, True),
        ((1, 3), 2, False, True),
        ((1, 3), 3, False, False),
        ((1, 3), 3, True, True),
    ],
)
def test_a_fault_is_retried_inside_the_window_or_once_the_count_has_moved(
    huge: Machine, window: tuple[int, int] | None, gfn: int, moved: bool, retry: bool
) -> None:
    assert attributes.must_retry(window, gfn, moved) is retry
    at = {"snapshot[CPU0]": "moved" if moved else "same", "invalidate_range": window}
    assert (
        huge.run(attributes.mmu_invalidate_retry_gfn, "CPU0", gfn, at=at | {"in_progress": 1}).result is retry
    )
    assert huge.run(attributes.mmu_invalidate_retry_gfn, "CPU0", gfn, at=at).result is moved


def test_a_store_changes_one_gfns_attribute(huge: Machine) -> None:
    assert huge.run(attributes.kvm_vm_set_region_attr, "CPU0", 2, "private", False) == did(
        None, {"attr[2]": "private"}
    )


SPENT = {"failures_left[xarray]": 0}


@pytest.mark.parametrize("reserved", [False, True])
def test_a_store_may_fail_unless_its_entry_was_reserved(reserved: bool) -> None:
    machine, store = (
        Machine("xarray-full"),
        (attributes.kvm_vm_set_region_attr, "CPU0", 0, "private", reserved),
    )
    stored = did(None, {"attr[0]": "private"})
    assert machine.run(*store) == stored  # or it does not fail
    failed = machine.run(*store, choose=(1,))
    assert failed == (stored if reserved else did("failed", SPENT, counts=["enomem"]))
    assert machine.run(*store, at=SPENT, choose=(1,)) == stored


def test_a_reservation_may_fail_once_and_may_sleep() -> None:
    machine = Machine("xarray-full")
    reserve = attributes.xa_reserve, "CPU0", 0, False
    assert machine.run(*reserve, choose=(1,)) == did("failed", SPENT, counts=["enomem"])
    assert machine.run(*reserve) == machine.run(*reserve, at=SPENT, choose=(1,)) == did()
    assert machine.run(*reserve, at=WRITER).broke == SLEEPS


def test_nothing_fails_where_nothing_may(tiny: Machine) -> None:
    assert tiny.run(attributes.xa_reserve, "CPU0", 0, False, choose=(1,)) == did()
    assert (
        tiny.run(attributes.kvm_vm_set_region_attr, "CPU0", 0, "private", False, choose=(1,)).result is None
    )


@pytest.fixture(scope="module")
def residue() -> Machine:
    """VMM1 cannot reserve the last of its entries; those before stay reserved and empty."""
    return Machine("reserve-fails")


def test_what_was_reserved_before_a_failure_stays(residue: Machine) -> None:
    reserve = attributes.xa_reserve
    assert residue.run(reserve, "VMM1", 0, False) == did(None, {"reserved[0]": True})
    assert residue.run(reserve, "VMM1", 1, True) == did("failed")
    assert residue.run(reserve, "CPU0", 1, False) == did(None, {"reserved[1]": True})
    assert residue.run(reserve, "VMM1", 0, False, at={"attr[0]": "private"}) == did()


def test_a_stored_entry_is_reserved_no_more(residue: Machine) -> None:
    at = {"reserved[0]": True}
    store = attributes.kvm_vm_set_region_attr, "CPU0"
    assert residue.run(*store, 0, "private", False, at=at).wrote == {
        "attr[0]": "private",
        "reserved[0]": False,
    }
    assert residue.run(*store, 1, "private", False, at=at).wrote == {"attr[1]": "private"}


def test_a_range_that_is_uniform_already_is_done(huge: Machine) -> None:
    asks = attributes.kvm_range_has_memory_attributes, "CPU0", (1, 2)
    assert huge.run(*asks, "shared", None).result == "done"
    assert huge.run(*asks, "shared", None, at={"attr[3]": "private"}).result == "done"
    assert huge.run(*asks, "shared", None, at={"attr[2]": "private"}).result is None
    assert huge.run(*asks, "private", None, at={"attr[1]": "private", "attr[2]": "private"}).result == "done"


@pytest.mark.parametrize(
    ("to", "counts", "left", "result"),
    [
        ("shared", True, True, None),
        ("shared", True, False, "done"),
        ("shared", False, True, "done"),
        ("private", True, True, "done"),
    ],
)
def test_an_empty_reserved_entry_is_misread_as_one_with_attributes_only_by_the_bug(
    residue: Machine, to: str, counts: bool, left: bool, result: str | None
) -> None:
    at = {"attr[0]": to, "reserved[1]": left}
    assert (
        residue.run(
            attributes.kvm_range_has_memory_attributes, "CPU0", (0,), to, counts and "reserved", at=at
        ).result
        == result
    )


def test_only_a_scenario_that_fails_has_left_entries(tiny: Machine, residue: Machine) -> None:
    assert tiny.run(attributes.left_reserved).result is False
    assert residue.run(attributes.left_reserved).result is False
    assert residue.run(attributes.left_reserved, at={"reserved[1]": True}).result is True


# Large pages.


def test_six_gfns_are_three_2m_pages_and_a_1g_page() -> None:
    pages = [(page.level, page.gfns) for page in lpage.large_pages((0, 1, 2, 3, 4, 5))]
    assert pages == [("2M", (0, 1)), ("2M", (2, 3)), ("2M", (4, 5)), ("1G", (0, 1, 2, 3, 4, 5))]
    assert [page.level for page in lpage.large_pages((0, 1))] == ["2M"]


@pytest.mark.parametrize(
    ("gfns", "word", "at", "hull"),
    [
        ((1, 2), "PG_LEVEL_2M", {}, (0, 4)),
        ((1, 2), "hugepage", {}, (0, 6)),
        ((1,), "PG_LEVEL_2M", {}, (0, 2)),
        ((0, 1), "PG_LEVEL_2M", {}, None),  # covered whole
        ((1, 2), "PG_LEVEL_2M", {"mixed[2M, 0]": True}, (2, 4)),  # nobody can map it large anyway
    ],
)
def test_the_hull_is_widened_to_large_pages_that_are_covered_in_part(
    huge: Machine, gfns: tuple[int, ...], word: str, at: dict[str, bool], hull: tuple[int, int] | None
) -> None:
    ran = huge.run(lpage.widen_hull, "CPU0", gfns, word, at=OPEN | at)
    assert ran == did(None, {"invalidate_range": hull} if hull else {})


def private(*gfns: Any) -> Any:
    return WRITER | {f"attr[{gfn}]": "private" for gfn in gfns}


@pytest.mark.parametrize(
    ("gfns", "at", "mixed"),
    [
        ((1, 2), private(1, 2), {"mixed[2M, 0]": True, "mixed[2M, 2]": True, "mixed[1G, 0]": True}),
        ((0, 1), private(0, 1), {"mixed[1G, 0]": True}),
        ((0, 1, 2, 3, 4, 5), private(0, 1, 2, 3, 4, 5) | {"mixed[2M, 0]": True}, {"mixed[2M, 0]": False}),
        ((1,), private(0, 1) | {"mixed[2M, 0]": True}, {"mixed[2M, 0]": False, "mixed[1G, 0]": True}),
        ((1,), private(0, 1, 2, 3, 4, 5) | {"mixed[1G, 0]": True}, {"mixed[1G, 0]": False}),
        ((1,), private(0, 1, 2, 3, 4, 5) | {"mixed[2M, 4]": True}, {"mixed[1G, 0]": True}),
    ],
)
def test_a_large_page_is_mixed_if_its_attributes_differ(
    huge: Machine, gfns: tuple[int, ...], at: dict[str, Any], mixed: dict[str, bool]
) -> None:
    assert huge.run(lpage.kvm_update_lpage_mixed_flag, "CPU0", gfns, "private", None, at=at) == did(
        None, mixed
    )


def test_a_1g_page_asks_the_flags_of_its_2m_pages_and_the_first_gfn_of_each(huge: Machine) -> None:
    whole = lpage.LargePage("1G", (0, 1, 2, 3, 4, 5))
    asks = lpage.hugepage_has_attrs, whole, "private", False
    firsts = {"attr[0]": "private", "attr[2]": "private", "attr[4]": "private"}
    assert huge.run(*asks, at=firsts).result is True
    assert huge.run(*asks, at=firsts | {"mixed[2M, 2]": True}).result is False
    assert huge.run(*asks, at={"attr[0]": "private", "attr[2]": "private"}).result is False


@pytest.mark.parametrize(
    ("to", "counts", "left", "mixed"),
    [("shared", True, True, True), ("shared", True, False, False), ("shared", False, True, False)],
)
def test_the_misread_entry_makes_a_uniform_2m_page_mixed(
    residue: Machine, to: str, counts: bool, left: bool, mixed: bool
) -> None:
    at = WRITER | {"reserved[0]": left}
    ran = residue.run(lpage.kvm_update_lpage_mixed_flag, "CPU0", (1,), to, counts and "reserved", at=at)
    assert ran.wrote == ({"mixed[2M, 0]": True} if mixed else {})
    both = at | {"attr[0]": "private", "attr[1]": "private"}
    assert (
        residue.run(lpage.kvm_update_lpage_mixed_flag, "CPU0", (1,), "private", "reserved", at=both).wrote
        == {}
    )


# guest_memfd.


def fault(
    kind: str = "private", op: Any = "read", gfn: int = 0, era: int = 1, cpu: Any = "CPU0"
) -> dict[str, Access]:
    """A vCPU with an access pending."""
    return {f"acc[{cpu}]": Access(kind, op, gfn, era)}


LATER = {"era": 2}  # in the scenario discard: private, shared, and private again
AGAIN = fault(era=2) | LATER


def test_getting_a_private_page_holds_it_and_may_sleep(discard: Machine) -> None:
    get = gmem.kvm_gmem_get_pfn, "CPU0"
    assert discard.run(*get, "private", at=AGAIN) == did(None, {"folio_ref[CPU0, 0]": True})
    assert discard.run(*get, "shared", at=fault("shared")) == did()
    assert discard.run(*get, "shared", at=fault("shared") | READER).broke == SLEEPS
    assert discard.run(*get, "private", at=AGAIN | READER).broke == SLEEPS


def test_a_page_that_is_dying_is_waited_for(discard: Machine) -> None:
    assert discard.run(gmem.hold_page, "CPU0", 0, at={"gmem[0]": "dying"}).result == BLOCKED


def test_a_free_page_is_allocated_and_zeroed_through_the_directmap(discard: Machine) -> None:
    old = Content("host")
    at = {"gmem[0]": "free", "memory[P0]": old}
    new = {"folio_ref[CPU0, 0]": True, "gmem[0]": "cached", "memory[P0]": EMPTY}
    assert discard.run(gmem.hold_page, "CPU0", 0, at=at) == did(None, new)
    gone = at | {"directmap[P0]": "absent"}
    assert discard.run(gmem.hold_page, "CPU0", 0, at=gone).broke == ["kernel-bug"]
    assert discard.run(gmem.hold_page, "CPU0", 0, at=at | {"rmp[P0]": OURS}).broke == ["host-rmp-fault"]


def test_without_an_rmp_nothing_stops_the_zeroing() -> None:
    assert Machine("discard", "sev").run(gmem.hold_page, "CPU0", 0, at={"gmem[0]": "free"}).broke == []


def test_holding_a_page_may_sleep(discard: Machine) -> None:
    assert discard.run(gmem.hold_page, "CPU0", 0, at=READER).broke == SLEEPS


def test_a_2m_page_is_allocated_whole_as_long_as_it_is_free_whole(big: Machine) -> None:
    hold = gmem.hold_page, "CPU0", 0
    both = {"gmem[0]": "free", "gmem[1]": "free"}
    assert big.run(*hold, at=both).wrote == {
        "folio_ref[CPU0, 0]": True,
        "gmem[0]": "cached",
        "gmem[1]": "cached",
    }
    assert big.run(*hold, at={"gmem[0]": "free"}).wrote == {"folio_ref[CPU0, 0]": True, "gmem[0]": "cached"}


def test_putting_lets_go_of_every_page_that_was_held(big: Machine) -> None:
    at = {"folio_ref[CPU0, 0]": True, "folio_ref[CPU1, 1]": True}
    assert big.run(gmem.put_page, "CPU0", at=at) == did(None, {"folio_ref[CPU0, 0]": False})


def test_truncation_waits_for_everybody_elses_reference(discard: Machine) -> None:
    truncate = gmem.truncate_inode_pages_range, "CPU0", 0, (0,)
    assert discard.run(*truncate) == did(None, {"gmem[0]": "dying"})
    assert discard.run(*truncate, at={"folio_ref[CPU1, 0]": True}).result == BLOCKED
    assert discard.run(*truncate, at={"folio_ref[CPU0, 0]": True}).wrote == {"gmem[0]": "dying"}
    assert discard.run(*truncate, at=READER).broke == SLEEPS


@pytest.mark.parametrize("state", ["dying", "free"])
def test_a_page_is_truncated_once(discard: Machine, state: str) -> None:
    at = {"gmem[0]": state, "folio_ref[CPU1, 0]": True}
    assert discard.run(gmem.truncate_inode_pages_range, "CPU0", 0, (0,), at=at) == did()


def test_only_the_part_of_a_2m_page_that_was_asked_for_goes(big: Machine) -> None:
    truncate = gmem.truncate_inode_pages_range, "CPU0", 0, (0,)
    assert big.run(*truncate).wrote == {"gmem[0]": "dying"}
    assert big.run(*truncate, at={"folio_ref[CPU1, 1]": True}).result == BLOCKED  # one folio, one count
    at = {"folio_ref[CPU1, 1]": True, "gmem[1]": "free"}
    assert big.run(*truncate, at=at).wrote == {"gmem[0]": "dying"}


def test_a_2m_page_that_goes_whole_goes_at_once() -> None:
    whole = Machine("vmm-punches")
    assert whole.run(gmem.truncate_inode_pages_range, "VMM1", 0, (0, 1)).wrote == {
        "gmem[0]": "dying",
        "gmem[1]": "dying",
    }
    dying = {"gmem[0]": "dying", "gmem[1]": "dying"}
    assert whole.run(gmem.folio_put, "VMM1", 0, at=dying).wrote == {"gmem[0]": "free", "gmem[1]": "free"}


def test_the_last_reference_frees_a_page_that_is_dying(discard: Machine) -> None:
    assert discard.run(gmem.folio_put, "CPU0", 0, at={"gmem[0]": "dying"}) == did(None, {"gmem[0]": "free"})
    assert discard.run(gmem.folio_put, "CPU0", 0) == did()


def test_a_look_up_in_the_ioctl_may_sleep_and_changes_nothing(tiny: Machine) -> None:
    assert tiny.run(gmem.look_up_in_ioctl, "CPU0", (0,)) == did()
    assert tiny.run(gmem.look_up_in_ioctl, "CPU0", (0,), at=WRITER).broke == SLEEPS


# Zap, flush, translations.


def test_a_zap_removes_the_leaf_and_tells_if_there_was_one(tiny: Machine) -> None:
    zap = mmu.kvm_unmap_gfn_range, "CPU0", 0
    assert tiny.run(*zap, at=WRITER | {"npt[0]": "S0"}) == did(None, {"npt[0]": None, "flush[CPU0]": True})
    assert tiny.run(*zap, at=WRITER) == did()


def test_a_large_leaf_goes_whole(huge: Machine) -> None:
    at = WRITER | {"npt_large[2M, 2]": "shared", "npt_large[2M, 4]": "shared"}
    assert huge.run(mmu.kvm_unmap_gfn_range, "CPU0", 2, at=at).wrote == {
        "npt_large[2M, 2]": None,
        "flush[CPU0]": True,
    }
    at = WRITER | {"npt_large[1G, 0]": "shared"}
    assert huge.run(mmu.kvm_unmap_gfn_range, "CPU0", 5, at=at).wrote == {
        "npt_large[1G, 0]": None,
        "flush[CPU0]": True,
    }


@pytest.fixture(scope="module")
def smm() -> Machine:
    """Two address spaces; in the second, which vCPUs enter in SMM, no memslot has a guest_memfd."""
    return Machine("smm", "sw", "v8-post-hook")


def test_a_zap_goes_by_the_address_space_of_its_memslot(smm: Machine) -> None:
    at = WRITER | {"npt[0]": "S0", "npt_smm[0]": "S0"}
    assert smm.run(mmu.kvm_unmap_gfn_range, "CPU0", 0, 0, at=at).wrote == {"npt[0]": None}
    assert smm.run(mmu.kvm_unmap_gfn_range, "CPU0", 0, 1, at=at).wrote == {"npt_smm[0]": None}
    assert smm.run(lambda s: mmu.leaf(s, 0, True), at={"npt[0]": "S0"}).result is None
    assert smm.run(lambda s: mmu.leaf(s, 0), at={"npt[0]": "S0"}).result == "S0"


def test_the_largest_page_that_is_mapped_over_a_gfn_is_its_leaf(huge: Machine) -> None:
    at = {"npt_large[2M, 0]": "shared", "npt_large[1G, 0]": "private"}
    assert huge.run(mmu.leaf, 0, at=at).result == "P0"
    assert huge.run(mmu.leaf, 1, at={"npt_large[2M, 0]": "shared"}).result == "S1"
    assert huge.run(mmu.leaf, 2, at={"npt_large[2M, 0]": "shared"}).result is None


def test_filling_a_translation_of_a_large_leaf_serves_every_gfn_of_it(huge: Machine) -> None:
    at = {"npt_large[2M, 2]": "shared"}
    filled = {"tlb[CPU1, 2]": "S2", "tlb[CPU1, 3]": "S3"}
    assert huge.run(mmu.fill_translation, "CPU1", 2, "S2", at=at).wrote == filled
    assert huge.run(mmu.fill_translation, "CPU1", 2, "S2").wrote == {"tlb[CPU1, 2]": "S2"}


TRANSLATED = {"tlb[CPU0, 0]": "P0", "tlb[CPU0, 1]": "P1", "tlb[CPU1, 0]": "P0"}


def test_a_2m_translation_is_one_and_goes_whole(big: Machine) -> None:
    leaf = {"npt_large[2M, 0]": "private"}
    filled = {"tlb[CPU0, 0]": "P0", "tlb[CPU0, 1]": "P1", "tlb_2m[CPU0]": True}
    assert big.run(mmu.fill_translation, "CPU0", 0, "P0", at=leaf).wrote == filled
    gone = {"tlb[CPU0, 0]": None, "tlb[CPU0, 1]": None}
    at = TRANSLATED | {"tlb_2m[CPU0]": True}
    assert big.run(mmu.drop_translation, "CPU0", 0, at=at).wrote == gone | {"tlb_2m[CPU0]": False}
    assert big.run(mmu.drop_translation, "CPU0", 0, at=TRANSLATED).wrote == {"tlb[CPU0, 0]": None}


def test_the_size_of_a_translation_is_2m_or_4k(big: Machine, tiny: Machine) -> None:
    assert big.run(mmu.mapped_size, "CPU0", at={"tlb_2m[CPU0]": True}).result == "2M"
    assert big.run(mmu.mapped_size, "CPU0", at={"tlb_2m[CPU1]": True}).result == "4K"
    assert tiny.run(mmu.mapped_size, "CPU0").result == "4K"


def test_a_flush_drops_every_translation_of_every_vcpu(big: Machine) -> None:
    at = TRANSLATED | {"tlb_2m[CPU0]": True}
    gone = dict.fromkeys(TRANSLATED) | {"tlb_2m[CPU0]": False}
    assert big.run(mmu.kvm_flush_remote_tlbs, "CPU0", at=at) == did(None, gone)


def test_a_zap_may_yield_or_not(tiny: Machine) -> None:
    assert tiny.run(mmu.tdp_mmu_yields, "CPU0").result == "skip"
    assert tiny.run(mmu.tdp_mmu_yields, "CPU0", choose=(1,)).result is None


def test_if_flush_is_asked_once(tiny: Machine) -> None:
    assert tiny.run(mmu.flush_if_zapped, "CPU0", at={"flush[CPU0]": True}) == did(
        None, {"flush[CPU0]": False}
    )
    assert tiny.run(mmu.flush_if_zapped, "CPU0") == did("skip")


# The fault path.


def test_a_faults_kind_is_the_attribute_where_the_c_bit_says_nothing() -> None:
    machine = Machine(platform="sev")
    assert machine.run(mmu.fault_kind, "CPU0", at=fault() | {"attr[0]": "private"}).result == "fault-private"
    assert machine.run(mmu.fault_kind, "CPU0", at=fault()).result == "fault-shared"


def test_the_rmp_handler_runs_after_a_fault_with_the_rmp_bit(tiny: Machine) -> None:
    at = {"rmp_bit[CPU0]": "RMP"}
    assert tiny.run(mmu.had_rmp_bit, "CPU0", False) == did("skip")
    assert tiny.run(mmu.had_rmp_bit, "CPU0", False, at=at) == did(None, {"rmp_bit[CPU0]": None})
    assert tiny.run(mmu.had_rmp_bit, "CPU0", True, at=at) == did()


@pytest.mark.parametrize(("bit", "result"), [("RMP", "leave"), ("SIZEM", None)])
def test_v8s_handler_goes_on_with_sizem_alone(tiny: Machine, bit: str, result: str | None) -> None:
    at = {"rmp_bit[CPU0]": bit}
    assert tiny.run(mmu.npf_sizem, "CPU0", at=at) == did(result, {"rmp_bit[CPU0]": None})


def test_a_snapshot_is_of_now(tiny: Machine) -> None:
    at = {"snapshot[CPU0]": "moved"}
    assert tiny.run(mmu.mmu_seq_snapshot, "CPU0", at=at) == did(None, {"snapshot[CPU0]": "same"})


def test_a_fault_of_the_attributes_kind_goes_on(tiny: Machine) -> None:
    at = fault() | {"attr[0]": "private", "snapshot[CPU0]": "same"}
    assert tiny.run(mmu.kvm_mem_is_private, "CPU0", "private", at=at) == did()


def test_a_mismatch_exits_and_ends_the_fault(discard: Machine) -> None:
    at = AGAIN | {"snapshot[CPU0]": "same", "folio_ref[CPU0, 0]": True, "running": 1}
    over = {"snapshot[CPU0]": "none", "folio_ref[CPU0, 0]": False}
    assert discard.run(mmu.kvm_mem_is_private, "CPU0", "private", at=at) == did(
        "exit", over, counts=["exits"]
    )


RETURNED = {"era": 1, "acc[CPU0]": Access("private", "read", 0, 1)}


@pytest.mark.parametrize(
    ("at", "broke"),
    [
        (RETURNED, ["guest-killed"]),
        (RETURNED | {"running": 1}, []),  # the ioctl is still at work
        (RETURNED | {"era": 0}, []),  # nothing was asked for yet
    ],
)
def test_a_right_access_that_exits_after_the_conversion_has_returned_kills_the_guest(
    tiny: Machine, at: dict[str, Any], broke: list[str]
) -> None:
    assert tiny.run(mmu.kvm_mem_is_private, "CPU0", "private", at=at).broke == broke


def test_an_old_access_of_the_right_kind_kills_nobody(discard: Machine) -> None:
    for era in (0, 2):  # before anything was asked for, and when the page has been shared meanwhile
        at = {"era": era, "acc[CPU0]": Access("private", "read", 0, 0)}
        assert discard.run(mmu.kvm_mem_is_private, "CPU0", "private", at=at).broke == []


def test_a_mismatch_lets_go_of_the_memslot(deleted: Machine) -> None:
    at = {"acc[CPU0]": Access("private", "read", 0, 1), "fault_slot[CPU0]": "valid"}
    assert deleted.run(mmu.kvm_mem_is_private, "CPU0", "private", at=at).wrote == {"fault_slot[CPU0]": None}


def test_a_wrong_access_that_exits_kills_nobody(tiny: Machine) -> None:
    at = fault("shared", era=0) | {"era": 1, "attr[0]": "private"}
    assert tiny.run(mmu.kvm_mem_is_private, "CPU0", "shared", at=at).broke == []


@pytest.mark.parametrize("conf", [{"correct_guest": False}, {"auto_convert": True}, {"request": (1,)}])
def test_nobody_is_judged_who_is_careless_or_converted_for_or_asked_for_another_page(
    conf: dict[str, Any],
) -> None:
    machine = Machine(conf=conf)
    assert machine.run(mmu.kvm_mem_is_private, "CPU0", "private", at=fault() | {"era": 1}).broke == []


def test_a_stale_fault_is_retried_and_lets_go(discard: Machine) -> None:
    at = AGAIN | READER | {"snapshot[CPU0]": "moved", "folio_ref[CPU0, 0]": True}
    over = {"snapshot[CPU0]": "none", "folio_ref[CPU0, 0]": False}
    stale = mmu.is_page_fault_stale, "CPU0"
    assert discard.run(*stale, at=at) == did("retry", over, counts=["retry"])
    assert discard.run(*stale, at=at | {"snapshot[CPU0]": "same"}) == did()


def test_the_stale_test_and_the_map_need_mmu_lock_for_read_at_least(tiny: Machine) -> None:
    at = fault() | {"snapshot[CPU0]": "same"}
    for step in ((mmu.is_page_fault_stale, "CPU0"), (mmu.kvm_tdp_mmu_map, "CPU0", "private")):
        assert tiny.run(*step, at=at).broke == MISUSE
        assert tiny.run(*step, at=at | READER).broke == []
        assert tiny.run(*step, at=at | WRITER).broke == []


def test_mapping_installs_the_backing_of_the_faults_kind(discard: Machine) -> None:
    at = AGAIN | READER | {"snapshot[CPU0]": "same", "folio_ref[CPU0, 0]": True}
    over = {"snapshot[CPU0]": "none", "folio_ref[CPU0, 0]": False}
    mapping = mmu.kvm_tdp_mmu_map, "CPU0"
    assert discard.run(*mapping, "private", at=at) == did(None, over | {"npt[0]": "P0"})
    assert discard.run(*mapping, "shared", at=at) == did(None, over | {"npt[0]": "S0"})
    there = at | {"npt[0]": "P0"}
    assert discard.run(*mapping, "private", at=there) == did(None, over, counts=["spurious-npf"])


@pytest.mark.parametrize(
    ("linux", "broke", "counts"),
    [
        ((6, 12), ["kernel-bug"], []),
        ((6, 13), [], ["spurious-npf"]),
        ((6, 15), ["warning"], ["spurious-npf"]),
    ],
)
def test_a_present_leaf_with_another_pfn_is_a_bug_or_spurious_by_the_version(
    linux: tuple[int, int], broke: list[str], counts: list[str]
) -> None:
    small, large = Machine(conf={"linux": linux}), Machine("huge-1g", conf={"linux": linux})
    ran = small.run(mmu.kvm_tdp_mmu_map, "CPU0", "private", at=fault() | READER | {"npt[0]": "S0"})
    assert ran == did(None, {}, broke, counts)
    at = fault(gfn=0, era=0, kind="shared") | READER | {"npt_large[1G, 0]": "private"}
    assert large.run(mmu.kvm_tdp_mmu_map, "CPU0", "shared", at=at) == did(None, {}, broke, counts)


def test_in_smm_the_other_page_table_is_filled(smm: Machine) -> None:
    at = fault("shared", era=0) | READER | {"smm[CPU0]": True, "npt[0]": "P0"}
    assert smm.run(mmu.kvm_tdp_mmu_map, "CPU0", "shared", at=at) == did(None, {"npt_smm[0]": "S0"})


def shared(gfn: int) -> dict[str, Any]:
    return fault("shared", gfn=gfn, era=0) | READER


@pytest.mark.parametrize(
    ("at", "wrote"),
    [
        ({}, {"npt_large[1G, 0]": "shared"}),
        ({"mixed[1G, 0]": True}, {"npt_large[2M, 0]": "shared"}),
        ({"mixed[1G, 0]": True, "mixed[2M, 0]": True}, {"npt[0]": "S0"}),
    ],
)
def test_a_fault_maps_the_largest_page_that_is_not_mixed(
    huge: Machine, at: dict[str, bool], wrote: dict[str, str]
) -> None:
    assert huge.run(mmu.kvm_tdp_mmu_map, "CPU0", "shared", at=shared(0) | at) == did(None, wrote)


def test_a_large_leaf_that_is_there_makes_the_fault_spurious(huge: Machine) -> None:
    at = shared(0) | {"npt_large[1G, 0]": "shared"}
    assert huge.run(mmu.kvm_tdp_mmu_map, "CPU0", "shared", at=at) == did(counts=["spurious-npf"])


def test_smaller_leaves_give_way_to_a_large_one_and_everybody_is_flushed(huge: Machine) -> None:
    at = shared(0) | {"npt[0]": "S0", "npt_large[2M, 2]": "shared", "tlb[CPU1, 0]": "S0"}
    new = {"npt_large[1G, 0]": "shared", "npt[0]": None, "npt_large[2M, 2]": None, "tlb[CPU1, 0]": None}
    assert huge.run(mmu.kvm_tdp_mmu_map, "CPU0", "shared", at=at) == did(None, new)
    stays = shared(0) | {"tlb[CPU1, 5]": "S5"}
    assert huge.run(mmu.kvm_tdp_mmu_map, "CPU0", "shared", at=stays).wrote == {"npt_large[1G, 0]": "shared"}


def test_a_leaf_that_is_too_large_by_now_splits_level_by_level(huge: Machine) -> None:
    at = shared(0) | {"npt_large[1G, 0]": "shared", "mixed[1G, 0]": True, "mixed[2M, 0]": True}
    new = {"npt_large[1G, 0]": None, "npt_large[2M, 2]": "shared", "npt_large[2M, 4]": "shared"}
    new |= {"npt[0]": "S0", "npt[1]": "S1"}
    ran = huge.run(mmu.kvm_tdp_mmu_map, "CPU0", "shared", at=at)
    assert (ran.wrote, ran.counts) == (new, ["spurious-npf"])


def test_private_memory_is_mapped_large_if_its_rmp_entry_is(big: Machine) -> None:
    at = fault(era=0) | READER
    assert big.run(mmu.kvm_tdp_mmu_map, "CPU0", "private", at=at).wrote == {"npt[0]": "P0"}
    assert big.run(mmu.kvm_tdp_mmu_map, "CPU0", "private", at=at | {"rmp[P0]": VALID}).wrote == {
        "npt[0]": "P0"
    }
    assert big.run(mmu.kvm_tdp_mmu_map, "CPU0", "private", at=at | {"rmp[P0]": BIG}).wrote == {
        "npt_large[2M, 0]": "private"
    }
    assert big.run(mmu.kvm_tdp_mmu_map, "CPU0", "shared", at=at).wrote == {"npt[0]": "S0"}


def test_private_memory_of_4k_pages_is_mapped_in_4k(huge: Machine) -> None:
    at = fault(gfn=1) | READER
    assert huge.run(mmu.kvm_tdp_mmu_map, "CPU0", "private", at=at).wrote == {"npt[1]": "P1"}


# Memslots.


@pytest.mark.parametrize(
    ("base", "end", "lo", "hi", "part"),
    [
        (2, 4, 0, 6, (2, 4)),
        (2, 4, 3, 6, (3, 4)),
        (2, 4, 0, 3, (2, 3)),
        (2, 4, 4, 6, None),
        (2, 4, 0, 2, None),
        (2, 4, 3, 4, (3, 4)),
    ],
)
def test_a_range_is_clipped_to_a_memslot(
    base: int, end: int, lo: int, hi: int, part: tuple[int, int] | None
) -> None:
    assert memslots.clip(base, end, lo, hi) == part


def test_a_walk_goes_address_space_by_address_space_in_the_order_of_gfns() -> None:
    slots = [memslots.MemSlot(2), memslots.MemSlot(0, as_id=1, npages=3), memslots.MemSlot(0)]
    assert memslots.pieces(slots, (0, 1, 2)) == [(0, (0,)), (0, (2,)), (1, (0, 1, 2))]
    assert memslots.pieces(slots, ()) == []
    assert memslots.pieces([memslots.MemSlot(0, npages=3)], (1,)) == [(0, (1,))]


def test_a_memslot_is_of_one_page_of_address_space_0_with_a_guest_memfd() -> None:
    assert memslots.MemSlot(5) == (5, 1, 0, True)


@pytest.mark.parametrize(
    ("walk", "visited"),
    [
        (None, [True, True, True]),
        ("kvm_memslots", [True, True, False]),
        ("gfn_to_memslot", [True, False, False]),
    ],
)
def test_a_hook_visits_all_pieces_or_those_of_one_memslot_or_address_space(
    walk: str | None, visited: list[bool]
) -> None:
    places = [(0, 4), (0, 6), (1, 4)]  # address space, first gfn
    assert [memslots.visits(walk, as_id, first, 4) for as_id, first in places] == visited


@pytest.fixture(scope="module")
def deleted() -> Machine:
    """A VMM thread deletes the memslot."""
    return Machine("slot-deleted")


@pytest.fixture(scope="module")
def added() -> Machine:
    """A VMM thread creates the memslot."""
    return Machine("slot-added")


@pytest.mark.parametrize(("slot", "found"), [("valid", "valid"), ("invalid", "invalid"), ("none", "none")])
def test_a_fault_remembers_its_memslot_as_it_found_it(deleted: Machine, slot: str, found: str) -> None:
    assert deleted.run(memslots.kvm_vcpu_gfn_to_memslot, "CPU0", at={"slot": slot}) == did(
        None, {"fault_slot[CPU0]": found}
    )


def test_a_memslot_that_is_bound_but_not_published_is_not_found(added: Machine) -> None:
    assert added.run(memslots.kvm_vcpu_gfn_to_memslot, "CPU0", at={"slot": "bound"}).wrote == {
        "fault_slot[CPU0]": "none"
    }


NOTED = {"snapshot[CPU0]": "same", "fault_slot[CPU0]": "invalid"}
OVER = {"snapshot[CPU0]": "none", "fault_slot[CPU0]": None}


@pytest.mark.parametrize(("word", "result"), [(None, "retry"), ("leave", "leave")])
def test_a_fault_whose_memslot_is_being_deleted_is_over_and_retried(
    deleted: Machine, word: str | None, result: str
) -> None:
    ran = deleted.run(memslots.memslot_invalid, "CPU0", "private", word, at=NOTED)
    assert ran == did(result, OVER, counts=["npf"])


def test_a_fault_whose_memslot_is_valid_goes_on(deleted: Machine) -> None:
    at = {"snapshot[CPU0]": "same", "fault_slot[CPU0]": "valid", "slot": "invalid"}
    assert deleted.run(memslots.memslot_invalid, "CPU0", "private", "leave", at=at) == did()
    assert deleted.run(memslots.faultin, "CPU0", "private", at=at) == did(None, {"fault_slot[CPU0]": None})


@pytest.mark.parametrize(
    ("kind", "result", "counts"), [("private", "exit", ["exits"]), ("shared", "userspace", ["mmio"])]
)
def test_without_a_memslot_a_private_fault_exits_and_a_shared_one_is_mmio(
    deleted: Machine, kind: str, result: str, counts: list[str]
) -> None:
    at = {"snapshot[CPU0]": "same", "fault_slot[CPU0]": "none"}
    for step, more in ((memslots.memslot_invalid, ("leave",)), (memslots.faultin, ())):
        assert deleted.run(step, "CPU0", kind, *more, at=at) == did(result, OVER, counts=counts)


def test_a_design_that_never_looked_takes_the_memslot_as_it_is(deleted: Machine) -> None:
    assert deleted.run(memslots.faultin, "CPU0", "private", at={"slot": "none"}).result == "exit"
    assert deleted.run(memslots.faultin, "CPU0", "private", at={"slot": "valid"}) == did()


def test_in_smm_there_is_no_guest_memfd_for_a_private_fault(smm: Machine) -> None:
    at = {"smm[CPU0]": True, "snapshot[CPU0]": "same"}
    ran = smm.run(memslots.faultin, "CPU0", "private", at=at)
    assert ran == did("userspace", {"snapshot[CPU0]": "none"}, counts=["exits"])
    assert smm.run(memslots.faultin, "CPU0", "shared", at=at).result is None
    assert smm.run(memslots.in_smm, "CPU1", at=at).result is False


@pytest.mark.parametrize(
    ("slot", "gmem_ioctl", "result"),
    [("valid", False, None), ("bound", False, "skip"), ("bound", True, None), ("none", True, "skip")],
)
def test_a_walk_without_a_memslot_is_skipped(
    added: Machine, slot: str, gmem_ioctl: bool, result: str | None
) -> None:
    assert added.run(memslots.overlaps, "CPU0", gmem_ioctl, at={"slot": slot}) == did(result)


def test_deleting_a_memslot_waits_for_the_readers_of_that_moment() -> None:
    machine = Machine("slot-deleted")
    inside = {"srcu[CPU0]": True}
    assert machine.run(memslots.delete_memslot, "VMM1", at=inside) == did(
        None, {"slot": "invalid", "grace[CPU0]": True}
    )
    assert machine.run(memslots.synchronize_srcu, "VMM1", at=inside | {"grace[CPU0]": True}).result == BLOCKED
    assert machine.run(memslots.synchronize_srcu, "VMM1", at=inside).result is None
    left = inside | {"grace[CPU0]": True}
    assert machine.run(memslots.srcu_read_unlock, "CPU0", at=left) == did(
        None, {"srcu[CPU0]": False, "grace[CPU0]": False}
    )
    assert machine.run(memslots.srcu_read_unlock, "CPU0", at={"grace[CPU0]": True}) == did()
    assert machine.run(memslots.srcu_read_lock, "CPU0") == did(None, {"srcu[CPU0]": True})


def test_a_memslot_comes_in_two_steps_and_goes_in_two(added: Machine, deleted: Machine) -> None:
    assert added.run(memslots.kvm_gmem_bind, "VMM1").wrote == {"slot": "bound"}
    assert added.run(memslots.create_memslot, "VMM1", at={"slot": "bound"}).wrote == {"slot": "valid"}
    assert deleted.run(memslots.slot_is_gone, "VMM1", at={"slot": "invalid"}).wrote == {"slot": "none"}


# RMPUPDATE and what wraps it.


def test_rmpupdate_assigns_the_private_page_and_flushes_its_translations(tiny: Machine) -> None:
    at = {"tlb[CPU1, 0]": "S0"}
    ran = tiny.run(sev.rmpupdate, "CPU0", 0, "private", "ioctl", at=at)
    assert ran == did(None, {"rmp[P0]": OURS, "tlb[CPU1, 0]": None})
    silent = Machine(rmpupdate_flushes=False).run(sev.rmpupdate, "CPU0", 0, "private", "ioctl", at=at)
    assert silent == did(None, {"rmp[P0]": OURS})


def test_rmpupdate_flushes_no_other_page() -> None:
    machine = Machine("range")
    at = {"tlb[CPU1, 0]": "S0", "tlb[CPU1, 1]": "S1"}
    ran = machine.run(sev.rmpupdate, "CPU0", 0, "private", "ioctl", at=at)
    assert ran.wrote == {"rmp[P0]": OURS, "tlb[CPU1, 0]": None}


def test_rmpupdate_to_shared_lets_an_unassigned_page_be(tiny: Machine) -> None:
    ran = tiny.run(sev.rmpupdate, "CPU0", 0, "shared", "ioctl")
    assert ran == did("unassigned")
    at = {"rmp[P0]": VALID}
    assert tiny.run(sev.rmpupdate, "CPU0", 0, "shared", "ioctl", at=at).wrote == {"rmp[P0]": snp.HYPERVISOR}


@pytest.mark.parametrize(("keeps", "wrote"), [(True, {}), (False, {"rmp[P0]": OURS})])
def test_repeating_rmpupdate_keeps_validated_by_the_switch(keeps: bool, wrote: dict[str, RmpEntry]) -> None:
    machine = Machine(identical_keeps_validated=keeps)
    assert machine.run(sev.rmpupdate, "CPU0", 0, "private", "ioctl", at={"rmp[P0]": VALID}) == did(
        None, wrote
    )


def test_an_injected_failure_changes_nothing_else() -> None:
    machine = Machine("hook-fails", design="v8-post-hook")
    fails = sev.rmpupdate, "CPU0", 0, "private", "ioctl"
    assert machine.run(*fails, choose=(1,)) == did("failed", {"failures_left[rmpupdate]": 0})
    assert machine.run(*fails) == did(None, {"rmp[P0]": OURS})
    assert machine.run(*fails, at={"failures_left[rmpupdate]": 0}, choose=(1,)) == did(
        None, {"rmp[P0]": OURS}
    )


OTHER = {"rmp[P1]": VALID._replace(gpa=1)}
WHOLE = {"rmp[P0]": BIG, "rmp[P1]": BIG._replace(gpa=1)}
NEW_BIG = {name: entry._replace(validated=False) for name, entry in WHOLE.items()}
TLBS = {"tlb[CPU0, 1]": "P1", "tlb[CPU1, 0]": "P0"}


@pytest.fixture(scope="module")
def accept() -> Machine:
    """Both gfns of one 2M page are converted at once."""
    return Machine("huge-accept")


def test_a_fault_on_a_2m_page_of_which_nothing_is_assigned_assigns_it_whole_and_flushes_it_whole(
    big: Machine,
) -> None:
    ran = big.run(sev.rmpupdate, "CPU0", 1, "private", "fault", at=TLBS)
    assert ran == did(None, NEW_BIG | dict.fromkeys(TLBS))


def test_a_fault_on_a_2m_page_of_which_something_is_assigned_assigns_4k(big: Machine) -> None:
    ran = big.run(sev.rmpupdate, "CPU0", 0, "private", "fault", at=OTHER | TLBS)
    assert ran == did(None, {"rmp[P0]": OURS, "tlb[CPU1, 0]": None})
    assert big.run(sev.rmpupdate, "CPU0", 1, "private", "fault", at=WHOLE) == did()  # it went with the head
    other = big.run(sev.rmpupdate, "CPU0", 1, "private", "fault", at={"rmp[P0]": VALID})
    assert other.wrote == {"rmp[P1]": OURS._replace(gpa=1)}
    assert big.run(sev.rmpupdate, "CPU0", 1, "private", "fault", at=OTHER | {"rmp[P0]": VALID}).wrote == {}


def test_the_ioctl_assigns_2m_if_the_request_has_all_of_it(accept: Machine, big: Machine) -> None:
    assert accept.run(sev.rmpupdate, "CPU0", 0, "private", "ioctl", (0, 1)).wrote == NEW_BIG
    assert accept.run(sev.rmpupdate, "CPU0", 1, "private", "ioctl", (0, 1), at=NEW_BIG).wrote == {}
    assert big.run(sev.rmpupdate, "CPU0", 0, "private", "ioctl").wrote == {"rmp[P0]": OURS}


def test_4k_over_a_2m_entry_overlaps_but_for_its_head_by_the_switch(big: Machine) -> None:
    resizes = Machine("huge-split", head_4k_over_2m=True)
    for machine, gfn, broke in ((big, 0, True), (big, 1, True), (resizes, 0, False), (resizes, 1, True)):
        ran = machine.run(sev.rmpupdate, "CPU0", gfn, "shared", "ioctl", at=WHOLE)
        assert ran.broke == (["platform-error"] if broke else [])
    assert resizes.run(sev.rmpupdate, "CPU0", 0, "shared", "ioctl", at=WHOLE).wrote == {
        "rmp[P0]": snp.HYPERVISOR
    }


def test_discarding_a_2m_entry_whole_frees_every_page_of_it() -> None:
    machine = Machine("vmm-punches")
    gone = dict.fromkeys(WHOLE, snp.HYPERVISOR)
    assert machine.run(sev.rmpupdate, "VMM1", 0, "shared", "punch", (0, 1), at=WHOLE) == did(None, gone)
    assert machine.run(sev.rmpupdate, "VMM1", 1, "shared", "punch", (0, 1), at=OTHER).wrote == {
        "rmp[P1]": snp.HYPERVISOR
    }
    assert machine.run(sev.rmpupdate, "VMM1", 0, "shared", "punch", (0, 1), at=OTHER) == did()
    assert machine.run(sev.rmpupdate, "VMM1", 0, "shared", "ioctl", at=WHOLE).broke == ["platform-error"]


def test_a_repeated_2m_rmpupdate_keeps_validated_by_the_switch(accept: Machine) -> None:
    loses = Machine("huge-accept", identical_keeps_validated=False)
    for gfn in (0, 1):
        assert accept.run(sev.rmpupdate, "CPU0", gfn, "private", "ioctl", (0, 1), at=WHOLE).wrote == {}
    assert loses.run(sev.rmpupdate, "CPU0", 0, "private", "ioctl", (0, 1), at=WHOLE).wrote == NEW_BIG


@pytest.mark.parametrize(
    ("kind", "of", "entry", "result"),
    [
        ("private", "private", OURS, "skip"),
        ("private", "private", snp.HYPERVISOR, None),
        ("shared", "private", OURS, None),
        ("shared", "shared", OURS, "skip"),  # the shared page is never assigned
    ],
)
def test_a_fault_asks_whether_the_entry_fits(
    tiny: Machine, kind: str, of: str, entry: RmpEntry, result: str | None
) -> None:
    at = fault(kind, era=0 if kind == "shared" else 1) | {"rmp[P0]": entry}
    assert tiny.run(sev.rmp_fits, "CPU0", kind, of, at=at) == did(result)


@pytest.mark.parametrize(
    ("attr", "entry", "word", "result", "broke"),
    [
        ("private", BIG, "warn", None, []),
        ("private", VALID, "warn", "leave", []),
        ("shared", BIG, "warn", "leave", []),
        ("private", snp.HYPERVISOR, "warn", "leave", ["warning"]),
        ("private", snp.HYPERVISOR, None, "leave", []),
    ],
)
def test_the_rmp_handler_goes_on_with_an_assigned_2m_entry_alone(
    big: Machine, attr: str, entry: RmpEntry, word: str | None, result: str | None, broke: list[str]
) -> None:
    at = fault(era=0) | {"attr[0]": attr, "rmp[P0]": entry}
    assert big.run(sev.snp_lookup_rmpentry, "CPU0", word, at=at) == did(result, broke=broke)


def test_psmash_splits_the_entry_and_keeps_all_else(big: Machine) -> None:
    split = {"rmp[P0]": VALID, "rmp[P1]": VALID._replace(gpa=1)}
    at = fault(era=0) | WHOLE
    assert big.run(sev.psmash, "CPU0", None, at=at) == did(None, split, counts=["psmash"])


@pytest.mark.parametrize(
    ("entry", "recheck", "result"),
    [
        (VALID, None, None),
        (VALID, "recheck", "leave"),
        (VALID, "recheck_unassigned", "leave"),
        (snp.HYPERVISOR, None, None),
        (snp.HYPERVISOR, "recheck", None),
        (snp.HYPERVISOR, "recheck_unassigned", "leave"),
    ],
)
def test_a_psmash_that_fails_is_warned_of_unless_it_was_a_lost_race(
    big: Machine, entry: RmpEntry, recheck: str | None, result: str | None
) -> None:
    ran = big.run(sev.psmash, "CPU0", recheck, at=fault(era=0) | {"rmp[P0]": entry})
    assert ran == did(result, broke=[] if result else ["warning"])


def test_what_is_only_partly_shared_or_freed_is_split_first(big: Machine, accept: Machine) -> None:
    split = {"rmp[P0]": VALID, "rmp[P1]": VALID._replace(gpa=1)}
    for machine, step, args, wrote in (
        (big, sev.psmash_if_2m, (0,), split),
        (big, sev.psmash_if_partial, ((0,),), split),
        (accept, sev.psmash_if_partial, ((0, 1),), {}),
    ):
        ran = machine.run(step, "CPU0", *args, at=WHOLE)
        assert ran == did(None, wrote, counts=["psmash"] if wrote else [])
    for at in ({}, {"rmp[P0]": VALID}, {"rmp[P1]": BIG._replace(gpa=1)}):
        assert (
            big.run(sev.psmash_if_2m, "CPU0", 0, at=at)
            == big.run(sev.psmash_if_partial, "CPU0", (0,), at=at)
            == did()
        )

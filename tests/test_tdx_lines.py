"""One line of memory under MKTME and TDX: reads, writes, caches, poison."""

from __future__ import annotations

import pytest

from kvmlab.hw.tdx import lines as tdx_lines
from kvmlab.hw.tdx.lines import DATA, HOST, NOISE, POISON, ZERO, ZEROS, Line

TD, OTHER = 33, 34
PRIVATE, SHARED = Line("secret", TD), Line("hello", HOST)


@pytest.mark.parametrize(
    ("line", "keyid", "integrity", "got"),
    [
        (PRIVATE, TD, True, DATA),
        (PRIVATE, TD, False, DATA),
        (SHARED, TD, True, POISON),
        (SHARED, TD, False, POISON),
        (PRIVATE, OTHER, True, POISON),
        (PRIVATE, OTHER, False, NOISE),
        (PRIVATE, HOST, True, ZEROS),
        (PRIVATE, HOST, False, ZEROS),
        (SHARED, HOST, True, DATA),
        (PRIVATE._replace(poison=True), HOST, True, POISON),
        (SHARED._replace(poison=True), HOST, True, POISON),
        (PRIVATE._replace(poison=True), TD, True, POISON),
    ],
)
def test_a_read_gets_what_its_key_and_the_line_allow(
    line: Line, keyid: int, integrity: bool, got: str
) -> None:
    assert tdx_lines.read(line, keyid, integrity=integrity).got == got


def effect(write: str, key: int, line: Line, erratum: bool) -> str | Line:
    """What one write does to a line in memory, in the words of the table."""
    if write == "store":
        return tdx_lines.MERGED if tdx_lines.store(line, key, "x").line.cached(key) else tdx_lines.POISONED
    after = (
        tdx_lines.direct_store(line, key, "x")
        if write == "direct"
        else tdx_lines.partial_write(line, key, "x", erratum=erratum)
    )
    return tdx_lines.POISONED if after.poison else tdx_lines.FULL if after == Line("x", key) else after


@pytest.mark.parametrize("erratum", [False, True])
@pytest.mark.parametrize("owner", ["TD", "host"])
@pytest.mark.parametrize("key", ["private", "shared"])
@pytest.mark.parametrize("write", ["direct", "partial"])
@pytest.mark.parametrize("poison", [False, True])
def test_every_row_about_writes_to_memory_is_what_they_do(
    write: str, key: str, owner: str, erratum: bool, poison: bool
) -> None:
    line = Line("old", TD if owner == "TD" else HOST, poison)
    said = tdx_lines.WRITES(write=write, key=key, owner=owner, erratum=erratum, poison=poison)
    assert effect(write, TD if key == "private" else HOST, line, erratum) == said


@pytest.mark.parametrize("keyid", [HOST, TD])
@pytest.mark.parametrize("erratum", [False, True])
def test_a_cached_store_merges_into_its_line_with_or_without_the_erratum(keyid: int, erratum: bool) -> None:
    key, owner = ("shared", "host") if keyid == HOST else ("private", "TD")
    said = tdx_lines.WRITES(write="store", key=key, owner=owner, erratum=erratum, poison=False)
    assert effect("store", keyid, Line("old", keyid), erratum) == said == tdx_lines.MERGED


def test_a_partial_write_drops_only_its_own_keys_cached_line() -> None:
    line = Line("old", TD, False, ((HOST, "a"), (TD, "b")))
    assert tdx_lines.partial_write(line, HOST, "x", erratum=True) == Line("old", TD, True, ((TD, "b"),))
    assert tdx_lines.partial_write(line, HOST, "x", erratum=False) == Line("x", HOST, False, ((TD, "b"),))


def test_a_write_back_of_a_clean_line_does_nothing() -> None:
    assert tdx_lines.write_back(PRIVATE, TD) == PRIVATE and not PRIVATE.cached(TD)


def test_a_dirty_line_is_read_by_its_own_key_only() -> None:
    line = Line("old", HOST, False, ((TD, "mine"),))
    assert tdx_lines.read(line, TD) == (DATA, "mine", line)
    assert tdx_lines.read(line, HOST) == (DATA, "old", line)


def test_noise_and_data_are_told_apart() -> None:
    assert tdx_lines.read(PRIVATE, OTHER, integrity=False) == (NOISE, NOISE, PRIVATE)
    assert tdx_lines.read(SHARED, HOST) == (DATA, "hello", SHARED)
    assert tdx_lines.store(PRIVATE, OTHER, "x", integrity=False).got == NOISE
    assert tdx_lines.store(PRIVATE, OTHER, "x").got == POISON


def test_who_owns_a_line_is_who_wrote_it_last() -> None:
    assert PRIVATE.td_owner and not SHARED.td_owner and Line() == Line(ZERO, HOST, False, ())
    assert (HOST, ZERO) == (0, 0)


def test_a_machine_check_in_a_td_spares_the_host_by_default() -> None:
    assert tdx_lines.consumed("TD") == tdx_lines.TD_LOST


def test_a_td_that_reads_a_line_of_the_host_leaves_new_poison_in_memory() -> None:
    assert tdx_lines.read(SHARED, TD).line.poison


def test_a_host_that_reads_td_memory_leaves_no_poison_and_sees_zeros() -> None:
    assert tdx_lines.read(PRIVATE, HOST) == (ZEROS, ZERO, PRIVATE)


def test_a_full_line_write_of_the_host_goes_unpunished_until_the_td_reads() -> None:
    line = tdx_lines.direct_store(PRIVATE, HOST, "host data")
    assert tdx_lines.read(line, HOST) == (DATA, "host data", line)
    assert tdx_lines.read(line, TD).got == POISON


def test_an_ordinary_store_of_the_host_does_its_damage_when_the_cache_writes_back() -> None:
    line = tdx_lines.store(PRIVATE, HOST, "host data").line
    assert tdx_lines.read(line, TD).got == DATA
    assert tdx_lines.read(tdx_lines.write_back(line, HOST), TD).got == POISON


@pytest.mark.parametrize(
    ("reader", "seam_nr", "end"),
    [
        ("TD", True, tdx_lines.TD_LOST),
        ("TD", False, tdx_lines.MAY_PANIC),
        ("module", True, tdx_lines.MACHINE_LOST),
        ("host", True, tdx_lines.HOST_MC),
    ],
)
def test_whoever_consumes_poison_goes_down(reader: str, seam_nr: bool, end: str) -> None:
    assert tdx_lines.consumed(reader, seam_nr=seam_nr) == end


@pytest.mark.parametrize("keyid", [HOST, TD])
def test_under_the_erratum_a_partial_write_to_td_memory_poisons_it_for_everybody(keyid: int) -> None:
    line = tdx_lines.partial_write(PRIVATE, HOST, "dma", erratum=True)
    assert tdx_lines.read(line, keyid).got == POISON


def test_without_the_erratum_a_partial_write_is_like_any_other() -> None:
    line = tdx_lines.partial_write(PRIVATE, HOST, "dma", erratum=False)
    assert tdx_lines.read(line, HOST).got == DATA


def test_the_erratum_spares_memory_that_is_not_a_tds() -> None:
    assert not tdx_lines.partial_write(SHARED, HOST, "dma", erratum=True).poison


def test_the_erratum_spares_what_a_td_writes_to_its_own_memory() -> None:
    assert tdx_lines.partial_write(PRIVATE, TD, "x", erratum=True) == Line("x", TD)


def test_memory_has_a_mac_unless_told_otherwise() -> None:
    assert tdx_lines.read(PRIVATE, OTHER).got == POISON


def test_an_ordinary_store_under_the_erratum_is_no_partial_write() -> None:
    line = tdx_lines.write_back(tdx_lines.store(PRIVATE, HOST, "x").line, HOST)
    assert tdx_lines.read(line, HOST).got == DATA


@pytest.mark.parametrize("keyid", [HOST, TD])
def test_a_direct_store_of_a_full_line_heals_poison(keyid: int) -> None:
    line = tdx_lines.direct_store(SHARED._replace(poison=True), keyid, "new")
    assert tdx_lines.read(line, keyid).got == DATA


@pytest.mark.parametrize("erratum", [False, True])
def test_a_partial_write_does_not_heal_poison(erratum: bool) -> None:
    assert tdx_lines.partial_write(SHARED._replace(poison=True), HOST, "x", erratum=erratum).poison


def test_an_ordinary_private_store_consumes_poison_like_a_load() -> None:
    assert tdx_lines.store(SHARED, TD, "x").got == POISON


def test_accept_makes_the_hosts_page_a_page_of_zeros_for_the_td() -> None:
    assert tdx_lines.read(tdx_lines.zero(SHARED, TD), TD)[:2] == (DATA, ZERO)


def test_a_page_taken_back_without_clearing_is_zeros_for_the_host_and_can_be_written() -> None:
    line = tdx_lines.write_back(tdx_lines.store(PRIVATE, HOST, "new").line, HOST)
    assert tdx_lines.read(line, HOST)[:2] == (DATA, "new")


def test_a_forgotten_clflush_before_aug_poisons_the_td_later() -> None:
    dirty = tdx_lines.store(SHARED, HOST, "old").line
    accepted = tdx_lines.zero(dirty, TD)
    assert tdx_lines.read(tdx_lines.write_back(accepted, HOST), TD).got == POISON
    assert tdx_lines.read(tdx_lines.zero(tdx_lines.clflush(dirty), TD), TD).got == DATA


def test_a_forgotten_wbinvd_after_remove_loses_the_hosts_new_data() -> None:
    dirty = tdx_lines.store(PRIVATE, TD, "secret 2").line
    reused = tdx_lines.direct_store(dirty, HOST, "new")
    assert tdx_lines.read(tdx_lines.write_back(reused, TD), HOST).got == ZEROS
    flushed = tdx_lines.direct_store(tdx_lines.wbinvd(dirty, TD), HOST, "new")
    assert tdx_lines.read(flushed, HOST)[:2] == (DATA, "new")


def test_clflush_leaves_a_private_line_and_wbinvd_the_hosts() -> None:
    line = tdx_lines.store(tdx_lines.store(SHARED, HOST, "a").line._replace(keyid=TD), TD, "b").line
    assert tdx_lines.clflush(line).cached(TD) and tdx_lines.wbinvd(line, TD).cached(HOST)


def test_lines_of_two_keys_are_not_coherent() -> None:
    line = tdx_lines.store(PRIVATE, TD, "mine").line
    assert tdx_lines.read(tdx_lines.store(line, HOST, "theirs").line, TD).content == "mine"


def test_what_is_dirty_does_not_depend_on_the_order_of_stores() -> None:
    line = tdx_lines.zero(PRIVATE, TD)
    one = tdx_lines.store(tdx_lines.store(line, HOST, "a").line, TD, "b").line
    two = tdx_lines.store(tdx_lines.store(line, TD, "b").line, HOST, "a").line
    assert one == two

"""One line of memory under MKTME and TDX: reads, writes, caches, poison."""

import pytest

from kvmlab.hw import tdx_lines
from kvmlab.hw.tdx_lines import DATA, HOST, NOISE, POISON, ZERO, ZEROS, Line

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
def test_a_read_gets_what_its_key_and_the_line_allow(line, keyid, integrity, got):
    assert tdx_lines.read(line, keyid, integrity=integrity).got == got


def test_a_td_that_reads_a_line_of_the_host_leaves_new_poison_in_memory():
    assert tdx_lines.read(SHARED, TD).line.poison


def test_a_host_that_reads_td_memory_leaves_no_poison_and_sees_zeros():
    assert tdx_lines.read(PRIVATE, HOST) == (ZEROS, ZERO, PRIVATE)


def test_a_full_line_write_of_the_host_goes_unpunished_until_the_td_reads():
    line = tdx_lines.direct_store(PRIVATE, HOST, "host data")
    assert tdx_lines.read(line, HOST) == (DATA, "host data", line)
    assert tdx_lines.read(line, TD).got == POISON


def test_an_ordinary_store_of_the_host_does_its_damage_when_the_cache_writes_back():
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
def test_whoever_consumes_poison_goes_down(reader, seam_nr, end):
    assert tdx_lines.consumed(reader, seam_nr=seam_nr) == end


@pytest.mark.parametrize("keyid", [HOST, TD])
def test_under_the_erratum_a_partial_write_to_td_memory_poisons_it_for_everybody(keyid):
    line = tdx_lines.partial_write(PRIVATE, HOST, "dma", erratum=True)
    assert tdx_lines.read(line, keyid).got == POISON


def test_without_the_erratum_a_partial_write_is_like_any_other():
    line = tdx_lines.partial_write(PRIVATE, HOST, "dma", erratum=False)
    assert tdx_lines.read(line, HOST).got == DATA


def test_the_erratum_spares_memory_that_is_not_a_tds():
    assert not tdx_lines.partial_write(SHARED, HOST, "dma", erratum=True).poison


def test_an_ordinary_store_under_the_erratum_is_no_partial_write():
    line = tdx_lines.write_back(tdx_lines.store(PRIVATE, HOST, "x").line, HOST)
    assert tdx_lines.read(line, HOST).got == DATA


@pytest.mark.parametrize("keyid", [HOST, TD])
def test_a_direct_store_of_a_full_line_heals_poison(keyid):
    line = tdx_lines.direct_store(SHARED._replace(poison=True), keyid, "new")
    assert tdx_lines.read(line, keyid).got == DATA


@pytest.mark.parametrize("erratum", [False, True])
def test_a_partial_write_does_not_heal_poison(erratum):
    assert tdx_lines.partial_write(SHARED._replace(poison=True), HOST, "x", erratum=erratum).poison


def test_an_ordinary_private_store_consumes_poison_like_a_load():
    assert tdx_lines.store(SHARED, TD, "x").got == POISON


def test_accept_makes_the_hosts_page_a_page_of_zeros_for_the_td():
    assert tdx_lines.read(tdx_lines.zero(SHARED, TD), TD)[:2] == (DATA, ZERO)


def test_a_page_taken_back_without_clearing_is_zeros_for_the_host_and_can_be_written():
    line = tdx_lines.write_back(tdx_lines.store(PRIVATE, HOST, "new").line, HOST)
    assert tdx_lines.read(line, HOST)[:2] == (DATA, "new")


def test_a_forgotten_clflush_before_aug_poisons_the_td_later():
    dirty = tdx_lines.store(SHARED, HOST, "old").line
    accepted = tdx_lines.zero(dirty, TD)
    assert tdx_lines.read(tdx_lines.write_back(accepted, HOST), TD).got == POISON
    assert tdx_lines.read(tdx_lines.zero(tdx_lines.clflush(dirty), TD), TD).got == DATA


def test_a_forgotten_wbinvd_after_remove_loses_the_hosts_new_data():
    dirty = tdx_lines.store(PRIVATE, TD, "secret 2").line
    reused = tdx_lines.direct_store(dirty, HOST, "new")
    assert tdx_lines.read(tdx_lines.write_back(reused, TD), HOST).got == ZEROS
    flushed = tdx_lines.direct_store(tdx_lines.wbinvd(dirty, TD), HOST, "new")
    assert tdx_lines.read(flushed, HOST)[:2] == (DATA, "new")


def test_clflush_leaves_a_private_line_and_wbinvd_the_hosts():
    line = tdx_lines.store(tdx_lines.store(SHARED, HOST, "a").line._replace(keyid=TD), TD, "b").line
    assert tdx_lines.clflush(line).cached(TD) and tdx_lines.wbinvd(line, TD).cached(HOST)


def test_lines_of_two_keys_are_not_coherent():
    line = tdx_lines.store(PRIVATE, TD, "mine").line
    assert tdx_lines.read(tdx_lines.store(line, HOST, "theirs").line, TD).content == "mine"


def test_what_is_dirty_does_not_depend_on_the_order_of_stores():
    line = tdx_lines.zero(PRIVATE, TD)
    one = tdx_lines.store(tdx_lines.store(line, HOST, "a").line, TD, "b").line
    two = tdx_lines.store(tdx_lines.store(line, TD, "b").line, HOST, "a").line
    assert one == two

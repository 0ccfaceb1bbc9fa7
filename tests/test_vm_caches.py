"""The C-bit as part of a cache tag: which flush keeps an old dirty line from coming back late."""

from __future__ import annotations

import pytest

from kvmlab.emulator import Vm, VmError, VmSwitches
from kvmlab.emulator.caches import LINE, CachedMemory

P, KEY = 4096, 7


def test_one_line_is_cached_twice_and_each_copy_has_its_own_data() -> None:
    memory = CachedMemory()
    memory.write(5, 0, b"in clear")
    memory.write(5, 0, b"by key", KEY)
    assert (memory.read(5, 0, 8), memory.read(5, 0, 6, KEY)) == (b"in clear", b"by key")


def test_the_copy_that_is_written_back_last_wins() -> None:
    memory = CachedMemory()
    for first, last in ((0, KEY), (KEY, 0)):
        memory.write(5, 0, b"old")
        memory.write(5, 0, b"new", KEY)
        memory.evict(5, first)
        memory.evict(5, last)
        assert (memory.read(5, 0, 3) == b"old") is (last == 0)
        assert (memory.read(5, 0, 3, KEY) == b"new") is (last == KEY)


def test_only_the_lines_that_were_written_are_written_back() -> None:
    memory = CachedMemory()
    memory.write(5, LINE - 1, b"ab")
    memory.write(5, 3 * LINE, b"c", KEY)
    assert (memory.evict(5, 0), memory.evict(5, KEY), memory.evict(5, 0)) == (2, 1, 0)
    assert memory.read(5, LINE - 1, 2) == b"ab" and memory.read(5, 3 * LINE, 1, KEY) == b"c"


def test_a_page_that_is_cleared_loses_the_lines_in_clear_only() -> None:
    memory = CachedMemory()
    memory.write(5, 0, b"old")
    memory.write(5, 0, b"new", KEY)
    memory.zero(5, 1)
    assert list(memory.dirty) == [(5, KEY)] and memory.read(5, 0, 3) == bytes(3)


@pytest.mark.parametrize("flushes", [True, False])
def test_without_the_guests_flush_old_shared_data_comes_back_over_the_private_page(flushes: bool) -> None:
    switches = VmSwitches(guest_flushes_caches=flushes)
    vm = Vm("snp", 4, "gmem-in-place", caches=True, switches=switches)
    guest, pfn = vm.guest(), vm.pfn(0, True)
    guest.write(0, b"open")
    guest.set_memory_encrypted(0, P)
    guest.write(0, b"mine")
    vm.host.evict(pfn, private=True)
    assert guest.read(0, 4) == b"mine"
    vm.host.evict(pfn, private=False)
    assert (guest.read(0, 4) == b"mine") is flushes
    assert (vm.host.directmap_read(pfn, 4) == b"open") is not flushes


@pytest.mark.parametrize("flushes", [True, False])
def test_without_the_guests_flush_a_private_line_ruins_the_shared_page(flushes: bool) -> None:
    switches = VmSwitches(guest_flushes_caches=flushes)
    vm = Vm("snp", 4, "gmem-in-place", caches=True, switches=switches)
    guest, pfn = vm.guest(), vm.pfn(0, True)
    guest.set_memory_encrypted(0, P)
    guest.write(0, b"mine")
    guest.set_memory_decrypted(0, P)
    guest.write(0, b"open")
    vm.host.evict(pfn, private=False)
    vm.host.evict(pfn, private=True)
    assert (vm.host.read(0, 4) == b"open") is flushes


@pytest.mark.parametrize("flushes", [True, False])
def test_without_kvms_clflush_a_freed_private_page_is_written_by_its_old_line(flushes: bool) -> None:
    vm = Vm("snp", 4, caches=True, switches=VmSwitches(free_flushes_caches=flushes))
    vm.guest().set_memory_encrypted(0, P)
    vm.guest().write(0, b"secret")
    pfn = vm.pfn(0, True)
    vm.gmem.punch_hole(0, P)
    vm.host.directmap_write(pfn, b"kernel")
    vm.host.evict(pfn, private=False)
    vm.host.evict(pfn, private=True)
    assert (vm.host.directmap_read(pfn, 6) == b"kernel") is flushes
    assert vm.counters.get("clflush", 0) == flushes


def test_with_split_backing_the_two_kinds_are_two_pages_and_no_line_has_two_tags() -> None:
    vm = Vm("snp", 4, caches=True, switches=VmSwitches(guest_flushes_caches=False))
    guest, memory = vm.guest(), vm.memory
    guest.write(0, b"open")
    guest.set_memory_encrypted(0, P)
    guest.write(0, b"mine")
    assert isinstance(memory, CachedMemory)
    assert len({pfn for pfn, _ in memory.dirty}) == len(memory.dirty) == 2


def test_by_default_the_part_keeps_both_kinds_coherent() -> None:
    with pytest.raises(VmError, match="caches=True"):
        Vm("snp", 4).host.evict(512, private=True)

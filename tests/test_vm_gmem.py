"""guest_memfd: allocation, punch hole, both backings, binding; guest_memfd_test's own cases with their sizes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from kvmlab.emulator import Deadlock, GuestSpins, RmpFault, SigBus, Vm, VmErrno
from kvmlab.emulator.guest_memfd import FLAG_INIT_SHARED, FLAG_MMAP, GuestMemfd

P, M2 = 4096, 1 << 21


def refusal(call: Callable[..., Any]) -> str:
    with pytest.raises(VmErrno) as caught:
        call()
    return errno.errorcode[caught.value.errno]


@pytest.fixture
def vm() -> Vm:
    return Vm("snp", slots=[])


@pytest.fixture
def file(vm: Vm) -> GuestMemfd:
    return vm.create_guest_memfd(4 * P, FLAG_MMAP | FLAG_INIT_SHARED)


def test_conversion_frees_nothing_so_both_copies_exist() -> None:
    vm = Vm("snp", 8)
    vm.guest().touch(0, 8 * P)
    vm.guest().set_memory_encrypted(0, 8 * P)
    assert vm.resident() == {"shared": 8, "private": 8}


@pytest.mark.parametrize("discard", ["before", "after"])
def test_discarding_keeps_one_copy_at_a_time(discard: str) -> None:
    vm = Vm("snp", 8, discard=discard)
    vm.guest().touch(0, 8 * P)
    vm.guest().set_memory_encrypted(0, 8 * P)
    assert vm.resident() == {"shared": 0, "private": 8}
    vm.guest().set_memory_decrypted(0, 8 * P)
    assert vm.resident()["private"] == 0


def test_the_old_shared_content_shows_again_after_coming_back() -> None:
    vm = Vm("sw", 1)
    vm.guest().write(0, b"old")
    vm.set_memory_attributes(0, P, True)
    vm.guest().write(0, b"new")
    assert vm.host.read(0, 3) == b"old"
    vm.set_memory_attributes(0, P, False)
    assert vm.guest().read(0, 3) == b"old"


def test_going_shared_leaves_the_private_page_assigned_until_it_is_freed() -> None:
    vm = Vm("snp", 4)
    vm.guest().set_memory_encrypted(0, P)
    vm.guest().set_memory_decrypted(0, P)
    assert vm.rmp_entry(vm.pfn(0, True)).assigned
    vm.gmem.punch_hole(0, P)
    assert not vm.rmp_entry(vm.pfn(0, True)).assigned and vm.counters["clflush"] == 1


def test_punch_hole_zaps_before_it_frees_and_ends_the_window_last() -> None:
    vm = Vm("snp", 4)
    vm.guest().set_memory_encrypted(0, P)
    seq = vm.mmu.seq
    vm.log.events.clear()
    vm.gmem.punch_hole(0, P)
    assert [e.kind for e in vm.events] == ["zap", "flush", "rmpupdate", "clflush", "gmem-free"]
    assert vm.mmu.seq == seq + 1 and not vm.mmu.in_progress


def test_punching_part_of_a_2m_page_psmashes_it() -> None:
    vm = Vm("snp", 512, private=True, private_2m=True)
    vm.guest().pvalidate(0, True, M2)
    vm.gmem.punch_hole(3 * P, P)
    assert vm.counters["psmash"] == 1
    assert [vm.rmp_entry(vm.pfn(g * P, True)).assigned for g in (2, 3, 4)] == [True, False, True]
    vm.guest().write(0, b"the rest is mapped 4K from now on")
    assert not vm.mmu.leaves(0, 1)[0] & 1


def test_freeing_a_whole_2m_page_takes_one_rmpupdate() -> None:
    vm = Vm("snp", 512, private=True, private_2m=True)
    vm.guest().pvalidate(0, True, M2)
    vm.gmem.punch_hole(0, M2)
    assert vm.counters["rmpupdate"] == 2 and "psmash" not in vm.counters


def test_a_page_that_cannot_be_made_shared_is_leaked() -> None:
    vm = Vm("snp", 4)
    vm.guest().set_memory_encrypted(0, 2 * P)
    vm.fail("rmpupdate", at=vm.pfn(0, True))
    vm.gmem.punch_hole(0, 2 * P)
    assert vm.leaked == {vm.pfn(0, True)} and not vm.rmp_entry(vm.pfn(P, True)).assigned


def test_a_failing_allocation_makes_kvm_run_fail() -> None:
    vm = Vm("snp", 4, private=True)
    vm.fail("gmem_alloc")
    assert refusal(lambda: vm.guest().pvalidate(0, True)) == "ENOMEM"


# guest_memfd_test


def test_file_read_write(file: GuestMemfd) -> None:
    assert {refusal(file.read), refusal(file.write)} == {"EINVAL"}


def test_create_guest_memfd_invalid_sizes(vm: Vm) -> None:
    assert {refusal(lambda s=s: vm.create_guest_memfd(s)) for s in (*range(1, P), 0, -P)} == {"EINVAL"}


def test_create_guest_memfd_multiple(vm: Vm) -> None:
    one, two = vm.create_guest_memfd(P), vm.create_guest_memfd(2 * P)
    assert one.inode != two.inode and (one.st_size, two.st_size) == (P, 2 * P)


@pytest.mark.parametrize("bit", range(2, 64))
def test_guest_memfd_flags(vm: Vm, bit: int) -> None:
    assert refusal(lambda: vm.create_guest_memfd(P, 1 << bit)) == "EINVAL"


def test_mmap_not_supported(vm: Vm) -> None:
    assert refusal(vm.create_guest_memfd(P).mmap) == "ENODEV"


def test_mmap_cow(file: GuestMemfd) -> None:
    assert refusal(lambda: file.mmap(shared=False)) == "EINVAL"


def test_mmap_supported(file: GuestMemfd) -> None:
    mem = file.mmap()
    mem.write(0, b"\xaa" * 4 * P)
    file.punch_hole(0, P)
    assert mem.read(0, P) == bytes(P) and mem.read(P, 3 * P) == b"\xaa" * 3 * P
    mem.write(0, b"\xaa" * P)
    assert mem.read(0, 4 * P) == b"\xaa" * 4 * P


def test_fault_overflow(file: GuestMemfd) -> None:
    with pytest.raises(SigBus):
        file.mmap().read(4 * P, 1)


def test_fault_private(vm: Vm) -> None:
    with pytest.raises(SigBus):
        vm.create_guest_memfd(4 * P, FLAG_MMAP).mmap().read(0, 1)


def test_fallocate(file: GuestMemfd) -> None:
    file.allocate(0, 4 * P)
    assert refusal(lambda: file.punch_hole(P - 1, P)) == "EINVAL"
    assert refusal(lambda: file.allocate(4 * P, P)) == refusal(lambda: file.allocate(5 * P, P)) == "EINVAL"
    file.punch_hole(4 * P, P)
    file.punch_hole(5 * P, P)
    assert refusal(lambda: file.punch_hole(P, P - 1)) == "EINVAL"
    file.punch_hole(P, P)
    file.allocate(P, P)


@pytest.mark.parametrize("mode", [0, 2, 1 | 4, 1 | 8])
def test_fallocate_modes(file: GuestMemfd, mode: int) -> None:
    assert refusal(lambda: file.fallocate(mode, 0, P)) == errno.errorcode[errno.EOPNOTSUPP]


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 1), (0, P - 1), (0, P + 1), (1, 1), (1, P - 1), (1, P), (1, P + 1), (P, 1), (P, P - 1), (P, P + 1)],
)
def test_invalid_punch_hole(file: GuestMemfd, offset: int, size: int) -> None:
    assert refusal(lambda: file.punch_hole(offset, size)) == "EINVAL"


def test_guest_memfd_guest() -> None:
    vm = Vm("sw", slots=[], backing="in-place", design="v8-post-hook")
    file, gpa = vm.create_guest_memfd(M2, FLAG_MMAP | FLAG_INIT_SHARED), 1 << 32
    vm.set_user_memory_region2(1, gpa, M2, file)
    file.mmap().write(0, b"\xaa" * M2)
    assert vm.guest().read(gpa, M2) == b"\xaa" * M2
    vm.guest().fill(gpa, M2, 0xFF)
    assert file.mmap().read(0, M2) == b"\xff" * M2


# Binding


def test_bind_errors(vm: Vm) -> None:
    file, other = vm.create_guest_memfd(4 * P), Vm("snp", slots=[]).create_guest_memfd(4 * P)

    def bind(gmem: Any, offset: Any = 0, size: Any = P, slot: Any = 0, gpa: Any = 0) -> Any:
        return refusal(lambda: vm.set_user_memory_region2(slot, gpa, size, gmem, offset))

    assert bind(other) == bind("a memfd") == bind(file, 1) == bind(file, 4 * P) == "EINVAL"
    assert refusal(lambda: vm.set_user_memory_region2(0, 0, P, None, flags=4)) == "EBADF"
    vm.set_user_memory_region2(0, 0, 2 * P, file)
    assert bind(file, P, P, 1, 1 << 30) == "EINVAL"  # the file's range, not the guest's addresses


# In-place


@pytest.fixture
def in_place() -> Vm:
    vm = Vm("snp", 8, "gmem-in-place")
    vm.guest().set_memory_encrypted(0, 8 * P)
    return vm


def test_in_place_going_shared_updates_the_rmp_in_the_ioctl(in_place: Vm) -> None:
    in_place.guest().set_memory_decrypted(0, P)
    assert not in_place.rmp_entry(in_place.pfn(0, False)).assigned
    in_place.guest().write(0, b"shared")
    assert in_place.host.read(0, 6) == b"shared"


def test_in_place_the_host_touching_a_private_page_gets_sigbus(in_place: Vm) -> None:
    with pytest.raises(SigBus):
        in_place.host.read(0, 1)


def test_in_place_a_page_that_somebody_holds_cannot_go_private(in_place: Vm) -> None:
    in_place.guest().set_memory_decrypted(0, 4 * P)
    in_place.host.pin(2 * P)
    assert refusal(lambda: in_place.set_memory_attributes(0, 4 * P, True)) == "EAGAIN"
    in_place.host.pin(2 * P, False)
    in_place.set_memory_attributes(0, 4 * P, True)


def waits_at(vm: Vm, gpa: int, private: bool) -> list[str]:
    """The rows of a conversion of the first page before which a host write at `gpa` waits for a lock."""
    rows = []

    def write(row: Any) -> None:
        try:
            vm.host.write(gpa, b"host")
        except Deadlock:
            rows.append(row.call)

    vm.on_row = lambda row: None if row.call == "filemap_invalidate_lock" else write(row)
    vm.set_memory_attributes(0, P, private)
    vm.on_row = None
    return rows


BEHIND_THE_LOCK = [
    "write_lock", "kvm_mmu_invalidate_begin", "kvm_mmu_invalidate_range_add", "kvm_unmap_gfn_range",
    "kvm_flush_remote_tlbs", "write_unlock", "kvm_vm_set_region_attr",
    "write_lock", "kvm_mmu_invalidate_end", "write_unlock", "filemap_invalidate_unlock",
]  # fmt: skip


def test_in_place_from_the_moment_its_pte_goes_a_host_write_waits_for_the_conversion_to_private() -> None:
    vm = Vm("snp", 8, "gmem-in-place")
    vm.host.write(0, b"host")
    assert waits_at(vm, 0, True) == BEHIND_THE_LOCK[1:]


def test_in_place_a_host_write_beside_the_range_waits_only_if_it_has_no_pte() -> None:
    mapped, fresh = Vm("snp", 8, "gmem-in-place"), Vm("snp", 8, "gmem-in-place")
    mapped.host.write(4 * P, b"host")
    assert (waits_at(mapped, 4 * P, True), waits_at(fresh, 4 * P, True)) == ([], BEHIND_THE_LOCK)


def test_in_place_after_the_conversion_to_private_the_host_has_lost_its_mapping() -> None:
    vm = Vm("snp", 8, "gmem-in-place")
    vm.host.write(0, b"host")
    vm.set_memory_attributes(0, P, True)
    with pytest.raises(SigBus):
        vm.host.write(0, b"host")


def test_in_place_a_host_write_waits_for_the_conversion_to_shared(in_place: Vm) -> None:
    def write(row: Any) -> None:
        if row.call == "rmpupdate":
            with pytest.raises(Deadlock, match="waits for invalidate_lock, held by ioctl"):
                in_place.host.write(0, b"host")

    in_place.on_row = write
    in_place.guest().set_memory_decrypted(0, P)
    in_place.host.write(0, b"host")
    assert in_place.guest().read(0, 4) == b"host"


def test_in_place_a_refused_conversion_leaves_the_page_to_the_host() -> None:
    vm = Vm("snp", 8, "gmem-in-place")
    vm.host.write(0, b"host")
    vm.host.pin(0)
    assert refusal(lambda: vm.set_memory_attributes(0, P, True)) == "EAGAIN"
    vm.host.write(0, b"more")
    assert vm.host.read(0, 4) == b"more"


def test_in_place_a_punched_page_comes_back_as_zeros_to_the_host() -> None:
    vm = Vm("snp", 8, "gmem-in-place")
    vm.host.write(0, b"host")
    vm.gmem.punch_hole(0, P)
    assert vm.host.read(0, 4) == bytes(4) and vm.counters["gmem-alloc"] == 2


def test_the_vmm_writing_a_private_page_through_a_mapping_of_the_file_takes_an_rmp_fault() -> None:
    vm = Vm("snp", slots=[])
    file = vm.create_guest_memfd(P, FLAG_MMAP | FLAG_INIT_SHARED)
    vm.set_user_memory_region2(0, 0, P, file)
    vm.guest().set_memory_encrypted(0, P)
    with pytest.raises(RmpFault):
        file.mmap().write(0, b"host")


def test_in_place_a_range_beyond_the_file_is_einval(in_place: Vm) -> None:
    assert refusal(lambda: in_place.set_memory_attributes(7 * P, 2 * P, False)) == "EINVAL"


def test_in_place_v8_a_host_write_to_a_private_page_takes_an_rmp_fault() -> None:
    vm = Vm("snp", 4, "v8-post-hook", "in-place")
    vm.set_memory_attributes(0, P, True)
    with pytest.raises(RmpFault):
        vm.host.write(0, b"x")


def test_in_place_v8_in_the_window_a_c0_write_loops_and_a_c0_read_is_silent() -> None:
    vm, seen = Vm("snp", 4, "v8-post-hook", "in-place"), []
    guest = vm.guest()
    guest.set_memory_encrypted(0, P)
    guest.write(0, b"secret")
    guest.set_private(0, False)

    def after_the_window(row: Any) -> None:
        if row.call == "rmpupdate":
            seen.append(guest.read(0, 6))
            with pytest.raises(GuestSpins, match="RMP"):
                guest.write(0, b"x")

    vm.on_row = after_the_window
    vm.set_memory_attributes(0, P, False)
    assert seen and seen[0] != b"secret"


def test_discarding_the_shared_side_unmaps_it_first() -> None:
    vm = Vm("sw", 4)
    vm.guest().write(0, b"gone")
    vm.host.discard(0, P)
    assert not vm.mmu.leaves(0, 1).any() and vm.resident()["shared"] == 0
    assert vm.guest().read(0, 4) == bytes(4)

"""The KVM selftests' scenarios with their real sizes and patterns, on the emulator.

private_mem_conversions_test and private_mem_kvm_exits_test (tools/testing/selftests/kvm); set_memory_region_test
is in test_vm_regions.py, guest_memfd_test in test_vm_gmem.py.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import pytest

from kvmlab.emulator import MemoryFaultExit, Vm

P, M2, G4 = 4096, 1 << 21, 1 << 32
SIZE = M2 + P
RANGES = [(0, P), (0, M2), (P, P), (P, M2), (M2, P)]


class Conversions:
    """One vCPU of private_mem_conversions_test: guest and host sides of its own chunk.

    Generators yield where the guest would exit, so that several vCPUs can take turns.
    """

    def __init__(self, vm: Vm, index: int, base: int) -> None:
        self.vm, self.guest, self.base = vm, vm.guest(index), base

    def fill(self, at: int, size: int, byte: int) -> None:
        self.guest.fill(self.base + at, size, byte)

    def verify(self, at: int, size: int, byte: int) -> None:
        assert self.guest.read(self.base + at, size) == bytes([byte]) * size

    def sync(self, at: int, size: int, old: int, new: int | None = None) -> None:
        """The host checks the shared side and, in a shared sync, writes the new pattern."""
        assert self.vm.host.read(self.base + at, size) == bytes([old]) * size
        if new is not None:
            self.vm.host.fill(self.base + at, size, new)

    def map_gpa(
        self, at: int, size: int, private: bool, attributes: bool = True, fallocate: bool = False
    ) -> None:
        """The test's hypercall: fallocate comes before the attributes."""
        start, end = self.base + at, self.base + at + size
        for slot, lo, hi in self.vm.slots.pieces(start // P, end // P) if fallocate else ():
            where = ((slot.offset + lo - slot.base) * P, (hi - lo) * P)
            (slot.gmem.allocate if private else slot.gmem.punch_hole)(*where)
        if attributes:
            self.vm.set_memory_attributes(start, size, private)

    def explicit_conversion(self, fallocate: bool) -> Iterator[Any]:
        self.fill(0, SIZE, 0xAA)
        self.verify(0, SIZE, 0xAA)
        self.sync(0, SIZE, 0xAA, 0xCC)
        yield
        self.verify(0, SIZE, 0xCC)
        for at, size in RANGES:
            yield from self.convert_range(at, size, fallocate)

    def convert_range(self, at: int, size: int, fallocate: bool) -> Iterator[Any]:
        self.fill(at, size, 0x11)
        self.map_gpa(at, size, True, fallocate=fallocate)
        yield
        if size > P:
            self.fill(at, P, 0x22)
        else:
            self.fill(at, size, 0x22)
            self.sync(at, size, 0x11)
            yield
            self.verify(at, size, 0x22)
            self.verify(0, at, 0xCC)
            self.verify(at + size, SIZE - at - size, 0xCC)
            self.page_loop(at, size, fallocate)
        self.map_gpa(at, size, False, fallocate=fallocate)
        yield
        self.fill(at, size, 0x33)
        self.sync(at, size, 0x33, 0x44)
        yield
        self.verify(at, size, 0x44)
        self.fill(at, size, 0xCC)
        self.map_gpa(0, SIZE, False, fallocate=True)
        yield

    def page_loop(self, at: int, size: int, fallocate: bool) -> None:
        for i in range(size // P):
            page = at + i * P
            if i % 2:
                self.map_gpa(page, P, False, fallocate=fallocate)
                self.sync(page, P, 0x11, 0x33)
                self.verify(page, P, 0x33)
            else:
                self.sync(page, P, 0x11)

    def punch_hole(self, precise: bool) -> Iterator[Any]:
        self.map_gpa(0, SIZE, True)
        for at, size in RANGES:
            self.map_gpa(0, SIZE, False, attributes=False, fallocate=True)
            yield
            where = (at, size) if precise else (0, SIZE)
            self.fill(*where, 0xCC)
            self.verify(*where, 0xCC)
            self.map_gpa(at, size, False, attributes=False, fallocate=True)
            yield
            self.verify(at, size, 0)

    def program(self) -> Iterator[Any]:
        yield from self.explicit_conversion(False)
        yield from self.explicit_conversion(True)
        yield from self.punch_hole(False)
        yield from self.punch_hole(True)


def conversions_vm(vcpus: int, memslots: int, **more: bool | str) -> tuple[Vm, list[Conversions]]:
    chunk = SIZE + -SIZE % M2 if more.get("shared_2m") else SIZE
    total = chunk * vcpus
    assert total % memslots == 0
    part = total // memslots
    vm = Vm("sw", slots=[(G4 + i * part, part) for i in range(memslots)], vcpus=vcpus, vmm="kill", **more)
    return vm, [Conversions(vm, i, G4 + i * chunk) for i in range(vcpus)]


@pytest.mark.parametrize("backing_2m", [False, True], ids=["4K-pages", "2M-pages"])
@pytest.mark.parametrize(("vcpus", "memslots"), [(1, 1), (2, 1), (2, 2), (3, 9)])
def test_private_mem_conversions_test(vcpus: int, memslots: int, backing_2m: bool) -> None:
    if backing_2m and memslots == 9:
        memslots = 6
    vm, threads = conversions_vm(vcpus, memslots, shared_2m=backing_2m, private_2m=backing_2m)
    for _ in zip_longest(*(thread.program() for thread in threads)):
        pass
    vm.close()
    vm.gmem.punch_hole(0, vm.gmem.st_size)
    vm.gmem.allocate(0, vm.gmem.st_size)
    assert not vm.violations


@pytest.mark.parametrize("design", ["upstream", "v8-post-hook", "defer-to-fault", "pre-post-directmap"])
def test_private_mem_conversions_test_passes_in_each_design_that_zaps(design: str) -> None:
    vm, threads = conversions_vm(1, 1, design=design)
    for _ in threads[0].program():
        pass
    assert not vm.violations


@pytest.mark.parametrize("precise", [False, True], ids=["not-precise", "precise"])
def test_guest_test_punch_hole(precise: bool) -> None:
    _, (thread,) = conversions_vm(1, 1)
    list(thread.punch_hole(precise))


def test_the_odd_page_branch_that_the_selftests_table_never_reaches() -> None:
    _, (thread,) = conversions_vm(1, 1)
    thread.fill(0, SIZE, 0x11)
    thread.map_gpa(0, 4 * P, True)
    thread.page_loop(0, 4 * P, True)


def test_the_selftest_fails_without_the_zap_that_it_is_there_to_find() -> None:
    vm = Vm("sw", 513, "no-zap")
    vm.guest().write(0, b"\x11")
    vm.set_memory_attributes(0, P, True)
    vm.guest().write(0, b"\x22")
    assert vm.host.read(0, 1) == b"\x22"  # the private write went to the shared page


GPA = 0xC0000000


def test_private_access_memslot_deleted() -> None:
    vm = Vm("sw", slots=[], vmm="kill")
    vm.set_user_memory_region2(10, GPA, P, vm.create_guest_memfd(P))
    vm.set_user_memory_region2(0, 0, P)
    vm.set_memory_attributes(GPA, P, True)
    vm.guest().read(GPA, 8)
    vm.set_user_memory_region2(10, GPA, 0)
    with pytest.raises(MemoryFaultExit) as caught:
        vm.guest().read(GPA, 8)
    assert (caught.value.errno, caught.value.flags) == (errno.EFAULT, 1 << 3)
    assert (caught.value.gpa, caught.value.size) == (GPA, P)


@pytest.mark.parametrize("moment", ["kvm_gmem_get_pfn", "read_lock"])
def test_private_access_memslot_deleted_while_the_vcpu_is_in_the_fault_path(moment: str) -> None:
    vm = Vm("sw", slots=[], vmm="kill")
    vm.set_user_memory_region2(10, GPA, P, vm.create_guest_memfd(P))
    vm.set_user_memory_region2(0, 0, P)
    vm.set_memory_attributes(GPA, P, True)

    def delete(row: Any) -> None:
        if row.call == moment and 10 in vm.slots.by_id:
            vm.set_user_memory_region2(10, GPA, 0)

    vm.on_row = delete
    with pytest.raises(MemoryFaultExit) as caught:
        vm.guest().read(GPA, 8)
    assert (caught.value.flags, caught.value.gpa) == (1 << 3, GPA) and not vm.mmu.npt.any()


def test_private_access_memslot_not_private() -> None:
    vm = Vm("sw", slots=[], vmm="kill")
    vm.set_user_memory_region2(10, GPA, P)
    vm.set_memory_attributes(GPA, P, True)
    with pytest.raises(MemoryFaultExit) as caught:
        vm.guest().read(GPA, 8)
    assert (caught.value.gpa, caught.value.size, caught.value.flags) == (GPA, P, 1 << 3)

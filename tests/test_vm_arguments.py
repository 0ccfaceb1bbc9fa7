"""Arguments without meaning: each is refused in words, whatever its type, before anything has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fuzz_vm
import numpy as np
import pytest

from kvmlab import DesignError, InputError, Switches, Vm, VmErrno, VmError, VmSwitches
from kvmlab.emulator.guest import Guest
from kvmlab.emulator.guest_memfd import FLAG_INIT_SHARED, FLAG_MMAP
from kvmlab.emulator.host import Host
from kvmlab.hw.snp import Rmpupdate

P, M2, T4 = 4096, 1 << 21, 1 << 42


def snp(**more: Any) -> Vm:
    return Vm("snp", 8, **more)


def guest() -> Guest:
    return snp().guest()


def host(platform: str = "snp", **more: Any) -> Host:
    return Vm(platform, 8, **more).host


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a PFN that the host does not have": (lambda: snp().rmp_entry(10**6), "the host has PFNs 0 to 0x5ff"),
    "a negative PFN": (lambda: snp().rmp_entry(-1), "the host has PFNs 0 to"),
    "a read of PFN -1": (lambda: host().directmap_read(-1), "the host has PFNs 0 to"),
    "a write of PFN -1": (lambda: host().directmap_write(-1), "the host has PFNs 0 to"),
    "more than a page through the directmap": (
        lambda: host().directmap_write(0, bytes(P + 1)),
        "it has 4096",
    ),
    "a partial write over a line's end": (
        lambda: host("tdx").partial_write(0, b"12", 63),
        "do not fit into a line",
    ),
    "a partial write of a line": (lambda: host("tdx").partial_write(0, bytes(64)), "1 to 63 bytes"),
    "a negative address": (lambda: guest().pvalidate(-P, True), "a multiple of 4096 from 0 to 4 TiB"),
    "half a page": (lambda: guest().set_memory_encrypted(1, 4095), "a multiple of 4096"),
    "a negative size": (lambda: guest().page_state_change(0, -P, True), "a multiple of 4096, from 0"),
    "an address of 2^52": (lambda: guest().read(1 << 52, 1), "from 0 to 4 TiB"),
    "a range that ends beyond 4 TiB": (lambda: guest().touch(T4 - P, 2 * P), "ends beyond 4 TiB"),
    "2^64 bytes": (lambda: guest().fill(0, 1 << 64, 0), "from 0 to 1 GiB"),
    "a number of 5,000 digits": (lambda: guest().read(10**5000, 1), "from 0 to 4 TiB"),
    "a length that is no multiple of 2M": (
        lambda: guest().pvalidate_range(0, P, True, M2),
        "a multiple of the size",
    ),
    "a page size that is none": (lambda: guest().pvalidate(0, True, 8192), "there are: 4096, 2097152"),
    "an access that is none": (lambda: guest().touch(0, P, "nope"), "there are: read, write"),
    "True for a number": (lambda: guest().read(True, 1), "a whole number: a guest address"),
    "1 for True": (lambda: guest().set_private(0, 1), "True or False"),
    "a text for bytes": (lambda: guest().write(0, "x"), "bytes"),
    "a number for bytes": (lambda: guest().write(0, 5), "bytes"),
    "a list for a buffer": (lambda: guest().psc_buffer(0, 1, [1, 2]), "numpy array of uint64"),
    "an entry before the buffer": (lambda: guest().psc_buffer(-3, 1, np.zeros(4, np.uint64)), "what 16 bits"),
    "an entry behind the buffer": (lambda: guest().psc_buffer(0, 4, np.zeros(4, np.uint64)), "has 4 entries"),
    "batches of nothing": (lambda: guest().page_state_change(0, P, True, batch=0), "from 1 to"),
    "more than a register": (lambda: guest().psc_msr(1 << 64), "what a 64-bit register holds"),
    "VMPL 9": (lambda: snp().guest(0, 9), "from 0 to 3"),
    "a VMPL on tdx": (lambda: Vm("tdx", 4).guest(0, 1), "tdx has no VMPLs"),
    "a vCPU that is not there": (lambda: snp().guest(1), "there are 1 vCPUs"),
    "an ACCEPT beyond 4 TiB": (lambda: Vm("tdx", 4).guest().accept(T4), "holds 4 TiB"),
    "a discard of nothing": (lambda: host().discard(0, -P), "a multiple of 4096, from 0"),
    "an address without a memslot": (lambda: snp().pfn(8 * P, True), "no memslot at gpa 0x8000"),
    "an injected success": (lambda: snp().fail("rmpupdate", 600, Rmpupdate.OK), "cannot inject OK"),
    "a failure at a PFN that is not there": (
        lambda: snp().fail("rmpupdate", 10**6),
        "a PFN that the host has",
    ),
    "a failing RMPUPDATE on sev": (
        lambda: Vm("sev", 4).fail("rmpupdate", 600),
        "on sev; there are: xa_store",
    ),
    "a text for an errno": (lambda: snp().set_memory_attributes("0", P, True), "a whole number"),
    "no vCPU": (lambda: snp(vcpus=0), "from 1 to 4096"),
    "no VMM": (lambda: snp(vmm=None), "convert, rerun, kill, or a function"),
    "a TLB of -1": (lambda: snp(tlb_entries=-1), "from 0 to"),
    "switches that are none": (lambda: snp(switches="x"), "VmSwitches"),
    "the explorer's switches": (lambda: snp(switches=Switches()), "VmSwitches"),
    "a batch that is none": (lambda: Vm("tdx", 4, zap_batch="x"), "a whole number: leaves"),
    "batches where there is no TRACK": (lambda: snp(zap_batch=8), "is for tdx"),
    "a design in the place of pages": (
        lambda: Vm("snp", "gmem-in-place", pages=4),  # type: ignore[misc]
        "the order is platform, pages",
    ),
    "4 TiB of memory": (lambda: Vm("tdx", 1 << 30), "256 GiB"),
    "16 PiB in memslots": (lambda: Vm("snp", slots=[(0, 1 << 54)]), "256 GiB"),
    "memslots without a size": (
        lambda: Vm("snp", slots=[(0,)]),  # type: ignore[list-item]
        r"a list of \(gpa, size\)",
    ),
    "pages and memslots": (lambda: Vm("snp", 4, slots=[(0, P)]), "`pages` .* or `slots`"),
    "no memory at all": (lambda: Vm("snp"), "without memory: slots=\\[\\]"),
    "a switch that is neither on nor off": (lambda: VmSwitches(preempt_count="yes"), "allowed: True, False"),
    "a place of the RMP check that is none": (
        lambda: VmSwitches(rmp_checked_at="now"),
        "allowed: access, fill",
    ),
}


@pytest.mark.parametrize(
    ("hook", "value"),
    [("on_row", 5), ("on_point", "f"), ("pending", True), ("mmio", "x"), ("hypercall_exits", 1)],
)
def test_a_hook_that_cannot_be_called_is_refused_when_it_is_set(hook: str, value: int | str) -> None:
    with pytest.raises(InputError, match=rf"^Vm\.{hook} = {value!r}: "):
        setattr(snp(), hook, value)


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_in_words(what: str) -> None:
    call, allowed = REFUSED[what]
    with pytest.raises(InputError, match=allowed):
        call()


def test_the_message_says_which_call_and_which_argument() -> None:
    with pytest.raises(InputError, match=r"^Guest\.pvalidate\(gpa=1\): a multiple of 4096"):
        guest().pvalidate(1, True)


def test_numbers_and_flags_of_numpy_are_numbers_and_flags() -> None:
    vm = snp()
    vm.set_memory_attributes(np.int64(0), np.uint32(P), np.bool_(True))
    assert vm.attributes.is_private(0)


@pytest.mark.parametrize(
    "data", [b"abc", bytearray(b"abc"), memoryview(b"abc"), np.frombuffer(b"abc", np.uint8)]
)
def test_bytes_may_come_in_any_form(data: Any) -> None:
    vm = Vm("sw", 4)
    vm.guest().write(0, data)
    assert vm.host.read(0, 3) == b"abc"


def test_a_refused_write_has_written_nothing() -> None:
    vm = Vm("sw", slots=[(T4 - P, P)])
    with pytest.raises(InputError):
        vm.guest().write(T4 - 8, bytes(16))
    assert vm.memory.pages == {} and vm.counters == {}


EMPTY = {
    "pvalidate_range": {"length": 0, "validate": True},
    "set_private": {"private": True, "size": 0},
    "page_state_change": {"size": 0, "private": True},
    "set_memory_encrypted": {"size": 0},
    "touch": {"n": 0},
}


@pytest.mark.parametrize("call", EMPTY)
def test_an_empty_range_is_no_page_and_no_mistake(call: str) -> None:
    vm = snp()
    getattr(vm.guest(), call)(0, **EMPTY[call])
    assert not {"pvalidate", "npf", "set-attributes"} & set(vm.counters)


def test_mmio_gives_as_many_bytes_as_were_read() -> None:
    vm = snp()
    vm.mmio = 0xBEEF
    assert [vm.guest().read(1 << 30, n) for n in (0, 1, 4)] == [b"", b"\xef", b"\xef\xbe\x00\x00"]


# What KVM answers itself stays its errno.


def errno_of(call: Callable[..., Any]) -> VmErrno:
    with pytest.raises(VmErrno) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    ("offset", "why"), [(-P, "offset -0x1000 .* is negative"), (7, "offset 0x7 .* is not a multiple of 4096")]
)
def test_a_wrong_offset_into_the_file_is_said_to_be_one(offset: int, why: str) -> None:
    vm = Vm("snp", slots=[])
    file = vm.create_guest_memfd(4 * P)
    with pytest.raises(VmErrno, match=f"Invalid argument|{why}") as caught:
        vm.set_user_memory_region2(0, 0, P, file, offset)
    assert caught.match(why)


def test_a_refused_binding_takes_no_memory() -> None:
    vm = Vm("snp", slots=[])
    file = vm.create_guest_memfd(P)
    before = vm.next_pfn
    errno_of(lambda: vm.set_user_memory_region2(0, 0, 2 * P, file))
    assert vm.next_pfn == before and not vm.slots.by_id


def test_without_its_flag_a_guest_memfd_is_not_looked_at() -> None:
    vm = Vm("snp", slots=[])
    vm.set_user_memory_region2(0, 0, P, vm.create_guest_memfd(P), flags=0)
    assert vm.slots.find(0).gmem is None


def test_user_memory_is_that_of_this_vm_and_large_enough() -> None:
    vm = snp()
    calls: tuple[Callable[[], object], ...] = (
        lambda: vm.set_user_memory_region2(1, M2, P, user=next(iter(snp().slots)).user),
        lambda: vm.set_user_memory_region2(1, M2, 9 * P, user=next(iter(vm.slots)).user),
    )
    for call, why in zip(calls, ("another Vm's", "it has 8"), strict=True):
        with pytest.raises(InputError, match=why):
            call()


def test_a_closed_file_is_a_bad_descriptor() -> None:
    vm = Vm("snp", slots=[])
    file = vm.create_guest_memfd(P, FLAG_MMAP | FLAG_INIT_SHARED)
    file.close()
    calls = (lambda: vm.set_user_memory_region2(0, 0, P, file), file.mmap, lambda: file.allocate(0, P))
    assert [errno_of(call).errno for call in calls] == [9, 9, 9]


def test_the_emulated_host_has_512_gib() -> None:
    vm = Vm("snp", slots=[])
    vm.create_guest_memfd(500 << 30)
    assert "the emulated host has 512 GiB" in str(errno_of(lambda: vm.create_guest_memfd(20 << 30)))


# What has no meaning on this Vm.


def test_a_page_is_held_once_and_let_go_by_who_holds_it() -> None:
    vm = snp()
    with pytest.raises(VmError, match="is not held"):
        vm.host.pin(0, False)
    vm.host.pin(0)
    with pytest.raises(VmError, match="held already"):
        vm.host.pin(0)


def test_where_there_is_no_guest_memfd_there_is_no_page_to_hold_and_no_private_one() -> None:
    vm = Vm("sw", slots=[])
    vm.set_user_memory_region2(0, 0, P)
    with pytest.raises(VmError, match="no page to hold"):
        vm.host.pin(0)
    with pytest.raises(InputError, match="no guest_memfd behind the memslot"):
        vm.pfn(0, True)


def test_a_discard_beyond_the_memslots_is_refused_whole() -> None:
    vm = snp()
    vm.host.write(0, b"kept")
    with pytest.raises(VmError, match="not all of gpa 0x0"):
        vm.host.discard(0, 9 * P)
    assert vm.host.read(0, 4) == b"kept"


def test_a_fault_that_finds_no_memory_lets_go_of_its_locks() -> None:
    vm = Vm("snp", 8, "gmem-in-place")
    vm.fail("gmem_alloc")
    assert errno_of(lambda: vm.guest().touch(0, 1)).errno == 12
    vm.set_memory_attributes(0, P, True)
    assert vm.threads == []


def test_a_design_that_is_not_there_is_a_design_error() -> None:
    with pytest.raises(DesignError):
        snp(design="nope")


def test_of_fifty_random_sequences_none_raises_or_takes_what_it_should_not() -> None:
    assert [fault for seed in range(50) for fault in fuzz_vm.sequence(seed, calls=10).faults] == []

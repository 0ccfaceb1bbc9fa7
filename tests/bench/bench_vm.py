"""How fast `kvmlab.Vm` converts, and what it takes: `bench_vm.py [tdx] [GiB ...]` (default: all, 1 16).

Each figure is of a process of its own: seconds of one run, guest pages a second, peak memory above that of a
Vm of one page, a GiB of guest.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from kvmlab.emulator import Vm, linux
from kvmlab.emulator.workloads import boot

GIB = 1 << 30


def ioctl(vm: Vm, size: int) -> None:
    """One ioctl over everything, to private and back."""
    vm.set_memory_attributes(0, size, True)
    vm.set_memory_attributes(0, size, False)


def mapped(vm: Vm, size: int) -> None:
    """The same while every page is mapped and in use."""
    vm.guest().touch(0, size)
    ioctl(vm, size)


def accept(large: bool) -> Any:
    """What a guest does to accept its memory: PSC, fault, PVALIDATE."""

    def run(vm: Vm, size: int) -> None:
        vm.guest().set_private(0, True, size)
        linux.accept(vm.guest(), 0, size, large=large)

    return run


def td_accept(vm: Vm, size: int) -> None:
    """What a TD does to accept its memory: 1G, 2M and 4K asks, an EPT violation a page."""
    vm.guest().set_private(0, True, size)
    linux.accept(vm.guest(), 0, size)


def td_there_and_back(vm: Vm, size: int) -> None:
    """Accept, share (MapGPA, removal leaf by leaf) and take back."""
    td_accept(vm, size)
    vm.guest().set_memory_decrypted(0, size)
    vm.guest().set_memory_encrypted(0, size)


def td_one_by_one(vm: Vm, size: int) -> None:
    """Share and take back 4096 single pages of 64 MiB."""
    td_accept(vm, 64 << 20)
    for gpa in range(0, 64 << 20, 4 * 4096):
        vm.guest().set_memory_decrypted(gpa, 4096)
        vm.guest().set_memory_encrypted(gpa, 4096)


def page_by_page(vm: Vm, size: int) -> None:
    """One ioctl a page, on the first 64 MiB."""
    for gpa in range(0, 64 << 20, 4096):
        vm.set_memory_attributes(gpa, 4096, True)


TDX = {"platform": "tdx"}
TD = {**TDX, "private": True, "vcpus": 4}
HUGE = {"shared_2m": True, "private_2m": True}
CASES: dict[str, tuple[Callable[[Vm, int], object], str, dict[str, Any], int]] = {
    "ioctl there and back, upstream": (ioctl, "upstream", {}, 2),
    "ioctl there and back, v8-post-hook (RMPUPDATE)": (ioctl, "v8-post-hook", {}, 2),
    "touch shared 4K, ioctl there and back, upstream": (mapped, "upstream", {}, 2),
    "touch shared 2M, ioctl there and back, upstream": (mapped, "upstream", HUGE, 2),
    "accept, 4K entries, 4K pages, upstream": (accept(False), "upstream", {}, 1),
    "accept, 2M entries, 4K pages, upstream": (accept(True), "upstream", {}, 1),
    "accept, 2M entries, 2M pages, upstream": (accept(True), "upstream", HUGE, 1),
    "accept, 2M entries, 4K pages, v8-post-hook": (accept(True), "v8-post-hook", {}, 1),
    "boot, upstream": (lambda vm, size: boot(vm), "upstream", {}, 1),
    "boot, v8-post-hook": (lambda vm, size: boot(vm), "v8-post-hook", {}, 1),
    "one ioctl a page (64 MiB), upstream": (page_by_page, "upstream", {}, 0),
    "tdx: accept": (td_accept, "upstream", TD, 1),
    "tdx: accept, share, take back": (td_there_and_back, "upstream", TD, 3),
    "tdx: the same, zap_batch=512": (td_there_and_back, "upstream", {**TD, "zap_batch": 512}, 3),
    "tdx: boot": (lambda vm, size: boot(vm), "upstream", TDX, 1),
    "tdx: 4096 pages, shared and taken back one by one": (td_one_by_one, "upstream", TD, 0),
}


def child(case: str, size: int) -> None:
    """Run one case and print its seconds and its peak memory in KiB."""
    run, design, more, _ = CASES[case]
    kind: dict[str, Any] = {"platform": "snp", **more}
    Vm(pages=1, design=design, **kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    run(Vm(pages=size // 4096, design=design, **kind), size)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))


def main(sizes: list[int], only: str = "") -> None:
    """Print one line a case and size; `pages/s` of what does a fixed number of pages is of 16384 (tdx: 8192)."""
    print(f"{'case':52}{'GiB':>5}{'s':>9}{'pages/s':>13}{'MiB/GiB':>9}")
    for case, (_, _, _, times) in CASES.items():
        for gib in sizes if case.startswith(only) else ():
            out = subprocess.run(
                [sys.executable, __file__, "--child", case, str(gib * GIB)],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            seconds, peak = json.loads(out.stdout)
            pages = times * gib * GIB // 4096 or (8192 if case.startswith("tdx") else (64 << 20) // 4096)
            print(
                f"{case:52}{gib:5}{seconds:9.3f}{pages / seconds:13,.0f}{peak / 1024 / gib:9.1f}", flush=True
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]))
    else:
        words = sys.argv[1:]
        only = words.pop(0) if words and not words[0].isdigit() else ""
        main([int(word) for word in words] or [1, 16], only)

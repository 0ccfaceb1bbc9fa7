"""How fast `kvmlab.Vm` converts, and what it takes: `python tests/bench/bench_vm.py [GiB ...]` (default 1 16).

Each figure is of a process of its own: seconds of one run, guest pages a second, peak memory above that of a
Vm of one page, a GiB of guest.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

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


def accept(large: bool):
    """What a guest does to accept its memory: PSC, fault, PVALIDATE."""

    def run(vm: Vm, size: int) -> None:
        vm.guest().set_private(0, True, size)
        linux.accept(vm.guest(), 0, size, large=large)

    return run


def page_by_page(vm: Vm, size: int) -> None:
    """One ioctl a page, on the first 64 MiB."""
    for gpa in range(0, 64 << 20, 4096):
        vm.set_memory_attributes(gpa, 4096, True)


HUGE = {"shared_2m": True, "private_2m": True}
CASES = {
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
}


def child(case: str, size: int) -> None:
    """Run one case and print its seconds and its peak memory in KiB."""
    run, design, more, _ = CASES[case]
    Vm("snp", 1, design)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    run(Vm("snp", size // 4096, design, **more), size)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))


def main(sizes: list[int]) -> None:
    """Print one line a case and size."""
    print(f"{'case':52}{'GiB':>5}{'s':>9}{'pages/s':>13}{'MiB/GiB':>9}")
    for case, (_, _, _, times) in CASES.items():
        for gib in sizes:
            out = subprocess.run(
                [sys.executable, __file__, "--child", case, str(gib * GIB)],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            seconds, peak = json.loads(out.stdout)
            pages = times * gib * GIB // 4096 or (64 << 20) // 4096
            print(
                f"{case:52}{gib:5}{seconds:9.3f}{pages / seconds:13,.0f}{peak / 1024 / gib:9.1f}", flush=True
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]))
    else:
        main([int(word) for word in sys.argv[1:]] or [1, 16])

"""Random sequences of a Vm's calls, with arguments of the right and of the wrong type: what is let through?

`python tests/fuzz_vm.py 2000 --seed 1` prints how the calls ended, and two numbers that have to be 0.  An
undocumented exception is any but a VmError, an InputError or (of the constructor) a DesignError.  Silent nonsense is
a call that took an argument without meaning, or that left behind what it may not: bytes, RMP entries or attributes
of pages that it did not name, anything at all if it was refused, a lock.
"""

from __future__ import annotations

import argparse
import errno
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvmlab import (
    Deadlock,
    DesignError,
    GuestSpins,
    InputError,
    KernelBug,
    MachineCheck,
    PlatformError,
    RmpFault,
    Vm,
    VmDead,
    VmErrno,
    VmError,
)  # fmt: skip
from kvmlab.design import shipped
from kvmlab.emulator.guest_memfd import FLAG_INIT_SHARED, FLAG_MMAP, GuestMemfd, Mapping
from kvmlab.emulator.place import STATES
from kvmlab.errors import shown
from kvmlab.hw.snp import Rmpupdate
from kvmlab.hw.tdx.entry import State

P, M2, T4, NEAR = 4096, 1 << 21, 1 << 42, 1 << 13  # gfns beyond the last are not looked at
REFUSALS = (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.EEXIST, errno.EFAULT, errno.ENODEV)
# After these somebody is left in the kernel, with what he holds.
OVER = (KernelBug, PlatformError, Deadlock, RmpFault, MachineCheck, GuestSpins, VmDead)
FAR = (1 << 52, 1 << 64, 1 << 80, 10**5000)
NO_NUMBER = (None, True, 1.5, "0", b"0", [0], 2 + 0j, object(), np.float64(4096), np.array([1, 2]))
NO_FLAG: tuple[Any, ...] = (None, 1, 0, "yes", "", [], 1.0, np.int64(1))
NO_BYTES = (None, "text", 5, [1, 2], {1: 2}, object())
NO_WORD: tuple[Any, ...] = (None, 5, "nope", b"read", [], {}, np.array([1, 2]), "x" * 10_000)
SNP = {"psc_msr", "psc_buffer", "pvalidate", "pvalidate_range", "rmpadjust"}
TDX = {"accept", "accept_range", "map_gpa"}
CONSTRUCTOR = {
    "pages": (-1, 0, 1 << 30, *FAR, *NO_NUMBER[2:]), "vcpus": (0, -1, 1 << 20, *NO_NUMBER),
    "slots": (5, "ab", [(0,)], [(0, "x")], [(0, -P)], [5], [(0, 1 << 52)]), "vmm": (None, "nope", 5, []),
    "tlb_entries": (-1, *NO_NUMBER), "keep_events": (0, -1, *NO_NUMBER), "zap_batch": (0, -1, 2, "x", *NO_NUMBER),
    "switches": ("x", 5, {}), "private": NO_FLAG, "shared_2m": NO_FLAG, "private_2m": NO_FLAG, "caches": NO_FLAG,
    "platform": NO_WORD, "backing": NO_WORD[1:], "discard": NO_WORD, "design": (None, 5, b"x", "nope"),
}  # fmt: skip


@dataclass
class Bad:
    """An argument that has no meaning where it stands: the call has to refuse it."""

    value: object


@dataclass
class Run:
    """One Vm, what the calls under way may change of it (gfns, PFNs), and what was found."""

    vm: Vm
    rng: random.Random
    files: list[Any]
    mappings: list[Any] = field(default_factory=list)
    gfns: list[Any] = field(default_factory=list)
    pfns: list[Any] = field(default_factory=list)
    trail: list[Any] = field(default_factory=list)
    faults: list[Any] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    over: bool = False

    # Arguments: mostly good, else of the wrong type, or of the right type and without meaning.

    def pick(
        self,
        good: list[Any] | tuple[Any, ...],
        wrong: tuple[Any, ...] = (),
        meaningless: Sequence[bytes] | tuple[Any, ...] = (),
    ) -> Any:
        dice, value = self.rng.random(), self.rng.choice(good)
        if dice < 0.03 and wrong:
            return Bad(self.rng.choice(wrong))
        if dice < 0.06 and meaningless:
            return Bad(self.rng.choice(meaningless))
        if dice > 0.9 and type(value) is int and abs(value) < 1 << 31:
            return self.rng.choice((np.int64, np.int32))(value)
        return np.bool_(value) if dice > 0.9 and type(value) is bool else value

    def gpas(self) -> list[int]:
        """Guest addresses that matter: ends of memslots and something between, seldom something far away."""
        found = [
            gfn * P for slot in self.vm.slots for gfn in (slot.base, slot.base + 1, slot.end - 1, slot.end)
        ]
        return [1 << 30, 1 << 40, T4 - P] if not found or self.rng.random() < 0.001 else found

    def page(self) -> Any:
        return self.pick(self.gpas(), NO_NUMBER, (-P, -1, 1, 2048, T4 + P, *FAR))

    def gpa(self) -> Any:
        return self.pick(
            [gpa + at for gpa in self.gpas() for at in (0, 8, 4090)], NO_NUMBER, (-P, -1, T4 + P, *FAR)
        )

    def size(self) -> Any:
        return self.pick((P, P, 0, 2 * P, 4 * P, M2, 600 * P), NO_NUMBER, (-P, 1, 4095, T4 + P, *FAR))

    def count(self, *good: int, over: int) -> Any:
        return self.pick(good, NO_NUMBER, (-1, over, *FAR))

    def n(self) -> Any:
        return self.count(0, 1, 7, 64, 4096, 9000, over=1 << 31)

    def flag(self) -> Any:
        return self.pick((True, False), NO_FLAG)

    def data(self, *lengths: int, over: tuple[int, ...] = ()) -> Any:
        return self.pick(
            [bytes([self.rng.randrange(256)]) * n for n in lengths], NO_BYTES, [bytes(n) for n in over]
        )

    def pfn(self) -> Any:
        return self.count(self.rng.randrange(self.vm.next_pfn), over=1 << 27)

    def word(self, *words: State | str) -> Any:
        return self.pick(words, NO_WORD)

    def register(self) -> Any:
        values = (0, P, M2, 1 << 47, (1 << 47) + P, (1 << 52) - P, (1 << 64) - P, self.rng.getrandbits(64))
        return self.pick((*values, *self.gpas()), NO_NUMBER, (-1, 1 << 64, 10**5000))

    def number(self, *good: int) -> Any:
        """What KVM looks at itself."""
        return self.pick(good, NO_NUMBER, (1 << 64, -(1 << 70), 10**5000))

    # Calls: the method, its arguments by place and by name.

    def guest(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        vm = self.vm
        index = self.count(*range(len(vm.mmu.tlbs)), over=99)
        vmpl = self.count(0, *[1] * (vm.has_rmp and self.rng.random() < 0.05), over=4)
        if isinstance(index, Bad) or isinstance(vmpl, Bad):
            return vm.guest, (index, vmpl)
        entry = [int(gpa) | self.rng.randrange(4) << 52 | self.rng.randrange(2) << 56 for gpa in self.gpas()]
        words = [np.array(entry * 4, np.uint64)]
        buffer = self.pick(words, (None, [1, 2], b"x", np.zeros(4), np.zeros((2, 2), np.uint64), 5))
        calls = {
            "read": (self.gpa(), self.n()),
            "write": (self.gpa(), self.data(0, 1, 6, 64, P, 5000)),
            "fill": (self.gpa(), self.n(), self.count(7, over=256)),
            "touch": (self.gpa(), self.count(1, P, M2, over=T4 + P), self.word("read", "write")),
            "set_private": (self.page(), self.flag(), self.size()),
            "page_state_change": (self.page(), self.size(), self.flag()),
            "psc_msr": (self.register(),),
            "psc_buffer": (self.count(0, 1, 3, over=1 << 16), self.count(3, over=100), buffer),
            "map_gpa_range": (
                self.register(),
                self.pick((0, P, M2), NO_NUMBER, (-P, 1, 4095, *FAR[2:])),
                self.flag(),
            ),
            "pvalidate": (self.page(), self.flag(), self.pick((P, P, M2), NO_WORD, (0, 8192))),
            "pvalidate_range": (self.page(), self.size(), self.flag()),
            "rmpadjust": (self.page(), self.count(0, 1, 200, over=256), self.count(3, 99, over=256)),
            "set_memory_encrypted": (self.page(), self.size()),
            "set_memory_decrypted": (self.page(), self.size()),
            "accept": (self.register(), self.pick((P, P, M2, 1 << 30), NO_WORD, (0, 8192))),
            "accept_range": (self.page(), self.size()),
            "map_gpa": (self.register(), self.register()),
        }
        strange = SNP if vm.tdx else TDX if vm.has_rmp else SNP | TDX  # mean something elsewhere
        method = self.rng.choice(sorted(set(calls) - (strange if self.rng.random() < 0.95 else set())))
        return getattr(vm.guest(index, vmpl), method), calls[method]

    def host(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        calls = {
            "read": (self.gpa(), self.n()),
            "write": (self.gpa(), self.data(0, 1, 6, 64, P, 5000)),
            "fill": (self.gpa(), self.n(), self.count(7, over=256)),
            "discard": (self.page(), self.size()),
            "pin": (self.gpa(), self.flag()),
            "directmap_read": (self.pfn(), self.count(0, 64, P, over=4097)),
            "directmap_write": (self.pfn(), self.data(0, 1, P, over=(4097,))),
            "partial_write": (self.pfn(), self.data(1, 8, over=(0, 64)), self.count(0, 56, 60, over=P)),
            "evict": (self.pfn(), self.flag()),
        }
        method = self.rng.choice(sorted(calls))
        return getattr(self.vm.host, method), calls[method]

    def file(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        offset, size = self.number(0, P, 3 * P, M2, -P, 7), self.number(P, 4 * P, M2, 0, -P, 7)
        if not self.files or self.rng.random() < 0.1:
            return self.vm.create_guest_memfd, (size, self.number(0, FLAG_MMAP | FLAG_INIT_SHARED, 8))
        calls = {"allocate": (offset, size), "punch_hole": (offset, size), "close": (), "mmap": (),
                 "fallocate": (self.number(1, 3, 2, 9), offset, size)}  # fmt: skip
        method = self.rng.choice(["allocate", "punch_hole", "fallocate"] * 3 + ["mmap"] * 3 + ["close"])
        return getattr(self.rng.choice(self.files), method), calls[method]

    def mapping(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if not self.mappings:
            return self.file()
        offset, mapping = self.count(0, 9, 5 * P, 1 << 40, over=1 << 63), self.rng.choice(self.mappings)
        calls = {"read": (offset, self.n()), "write": (offset, self.data(0, 6, 5000))}
        method = self.rng.choice(sorted(calls))
        return getattr(mapping, method), calls[method]

    def ioctl(self) -> tuple[Callable[..., Any], tuple[Any, Any, Any]]:
        gpa, size = self.number(*self.gpas(), -P, 1), self.number(P, 4 * P, M2, 600 * P, 0, 7, 1 << 34)
        return self.vm.set_memory_attributes, (gpa, size, self.flag())

    def region(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        file = self.rng.choice((None, "file", *self.files * 3))
        slot, gpa = self.number(0, 1, 2, 3, 70_000, -1), self.number(*self.gpas(), 1 << 30, -P, 7)
        return self.vm.set_user_memory_region2, (
            slot,
            gpa,
            self.number(0, 4 * P, M2, -P, 7),
            file,
            self.number(0, P, -P, 5),
        )

    def old_region(self) -> tuple[Callable[..., Any], tuple[Any, Any, Any]]:
        slot, size = self.number(0, 1, 9, -1), self.number(0, P, 4 * P, 7)
        return self.vm.set_user_memory_region, (slot, self.number(*self.gpas(), -P), size)

    def script(self) -> Any:
        vm, codes = self.vm, (None, 4, "FAIL")
        at = self.count(0, 1, 5, over=-5)
        return self.rng.choice([
            (vm.rmp_entry, (self.pfn(),)),
            (vm.pfn, (self.gpa(), self.flag())),
            (vm.placed, (self.gpa(),)),
            (vm.place, (self.page(), self.word(*STATES[vm.platform]), self.size())),
            (vm.fail, (self.word("xa_store", "xa_reserve", "gmem_alloc"), at)),
            (vm.fail, ("rmpupdate", self.pfn(), self.pick(list(Rmpupdate)[1:], codes, (Rmpupdate.OK,)))),
            (vm.fail, (self.word("TDH.MEM.TRACK", "TDH.MEM.RANGE.BLOCK", "TDG.MEM.PAGE.ACCEPT"),)),
            (vm.repair, ()),
            (vm.resident, ()),
            (vm.cost, ()),
            (vm.close, ()),
        ])  # fmt: skip


OFTEN = {
    "guest": 6,
    "host": 3,
    "file": 1,
    "mapping": 1,
    "ioctl": 2,
    "region": 1,
    "old_region": 1,
    "script": 2,
}
CALLS = [name for name, times in OFTEN.items() for _ in range(times)]
VMM = ("file", "ioctl", "region", "old_region")  # whose errors are checked before anything is done


def some_vm(rng: random.Random) -> tuple[Vm, dict[str, Any]]:
    """A Vm of any kind, and the arguments that made it."""
    more = {
        "platform": rng.choice(("snp", "snp", "tdx", "sev", "sw")), "design": rng.choice(shipped("all")),
        "backing": rng.choice(("split", "in-place")), "discard": rng.choice(("none", "none", "before", "after")),
        "vmm": rng.choice(("convert", "convert", "rerun", "kill")), "vcpus": rng.choice((1, 2)),
        "tlb_entries": rng.choice((0, 1, 128)),
        **{name: rng.random() < 0.25 for name in ("caches", "private", "private_2m", "shared_2m")},
    }  # fmt: skip
    memory = (
        {"pages": rng.choice((1, 5, 16, 1024))}
        if rng.random() < 0.5
        else {"slots": [(0, 4 * P), (8 * P, M2)]}
    )
    try:
        return Vm(**more, **memory), {**more, **memory}
    except InputError:  # a design of the other backing
        return some_vm(rng)


# What a call may change, and what it has changed.


def named(run: Run, call: Any, args: list[Any]) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """The gfns and the PFNs that a call names, with the 2M around them."""
    vm, gfns, pfns = run.vm, [], []
    numbers = [int(a) for a in args if isinstance(a, int | np.integer) and not isinstance(a, bool)]
    owner = call.__self__
    file = owner.gmem if isinstance(owner, Mapping) else owner
    if isinstance(file, GuestMemfd):
        pfns = [(file.base, file.base + file.pages)]
    elif call.__name__ in ("set_user_memory_region2", "set_user_memory_region", "close"):
        gfns = [(0, T4 // P)]
    elif call.__name__ in ("directmap_write", "partial_write", "evict"):
        pfns = [(pfn, pfn + 1) for pfn in numbers[:1]]
    elif call.__name__ in ("psc_buffer", "psc_msr"):
        entries = args[2].ravel().tolist() if isinstance(args[-1], np.ndarray) else numbers
        gfns = [(int(e) >> 12 & (1 << 40) - 1, (int(e) >> 12 & (1 << 40) - 1) + 512) for e in entries]
    elif numbers:
        start = numbers[0] & ~(1 << 47) if call.__name__ == "map_gpa" else numbers[0]
        length = max([P, *numbers[1:2], *(len(a) for a in args if isinstance(a, bytes))])
        gfns = [(start // P, (start + length + P - 1) // P)]
    for lo, hi in gfns:
        for slot, a, b in vm.pieces(max(0, lo - 512), max(0, min(hi + 512, T4 // P))):
            pfns.append((slot.shared_pfn(a), slot.shared_pfn(b)))
            if slot.gmem:
                pfns.append((slot.private_pfn(a), slot.private_pfn(b)))
    return gfns, [(lo - 512, hi + 512) for lo, hi in pfns]


def looked_at(vm: Vm) -> dict[str, Any]:
    """What of a Vm a call may change, part by part."""
    end, tdx = vm.next_pfn, vm.tdx
    slots = [slot for space in vm._spaces for slot in space]
    files: dict[int, Any] = {id(slot.gmem): slot.gmem for slot in slots if slot.gmem}
    seen = {
        "pages": contents(vm),
        "attributes": vm.attributes.private[:NEAR].copy(),
        "RMP": vm.rmp.state[:end].copy(),
        "gfns of the RMP": vm.rmp.gfn[:end].copy(),
        "NPT": vm.mmu.npt[:NEAR].copy(),
        "C-bits": vm.page_table._others[:NEAR].copy(),
        "directmap": np.concatenate([vm.directmap.absent[:end], vm.directmap.split]),
        "files": [(at, f.closed, f.present.tobytes(), sorted(f.pinned)) for at, f in files.items()],
        "slots": [(s.as_id, s.id, s.base, s.npages, id(s.gmem), s.offset) for s in slots],
        "MMU": repr((vm.mmu.window, vm.mmu.in_progress, vm.mmu.seq, [tlb.leaves for tlb in vm.mmu.tlbs])),
        "rest": repr((vm.log.counters, end, vm.failures, vm.rmp.failures, vm.rmp.permissions)),
    }
    if tdx:
        seen["S-EPT"], seen["mirror"] = tdx.module.state[:NEAR].copy(), tdx.mirror[:NEAR].copy()
        seen["PAMT"] = tdx.module.pamt[:end].copy()
        seen["TD"] = repr((tdx.module.epochs, tdx.dead, [(v.mode, v.tlb.leaves) for v in tdx.vcpus]))
    return seen


def contents(vm: Vm) -> dict[int, list[Any]]:
    """The bytes of each page and dirty line that somebody wrote, by PFN."""
    memory: Any = vm.memory
    if vm.tdx:
        return {pfn: [bytes(page)] for pfn, page in memory.plain.items()} | {
            pfn: list(x) for pfn, x in memory.lines.items()
        }
    found = {pfn: [page.tobytes()] for pfn, page in memory.pages.items()}
    for (pfn, key), lines in sorted(getattr(memory, "dirty", {}).items()):
        found.setdefault(pfn, []).append((key, sorted(lines.items())))
    return found


def changed(before: Any, after: Any) -> list[int]:
    """Where two parts differ: PFNs or gfns."""
    if isinstance(before, dict):
        return [at for at in before.keys() | after.keys() if before.get(at) != after.get(at)]
    size = max(len(before), len(after))
    old, new = (np.pad(part, (0, size - len(part))) for part in (before, after))
    return np.flatnonzero(old != new).tolist()


def same(before: Any, after: Any) -> bool:
    return before == after if isinstance(before, str | list) else not changed(before, after)


def of_the_right_size(vm: Vm) -> bool:
    """Every page has 4096 bytes, every line 64."""
    if vm.tdx:
        memory: Any = vm.memory
        pages = memory.plain.values()
        lines = [
            line.content for page in memory.lines.values() for line in page if isinstance(line.content, bytes)
        ]
    else:
        pages = vm.memory.pages.values()
        lines = [line for found in getattr(vm.memory, "dirty", {}).values() for line in found.values()]
    return {len(page) for page in pages} <= {P} and {len(line) for line in lines} <= {64}


def empty(page: Any) -> Any:
    return page is None or not any(any(piece) for piece in page if isinstance(piece, bytes))


def judge(run: Run, before: dict[str, Any], after: dict[str, Any], refused: bool) -> Iterator[Any]:
    """What the calls that have just ended left behind and should not have."""
    vm = run.vm
    if refused and vm.on_row is None:
        yield from (f"refused, but {part} changed" for part in before if not same(before[part], after[part]))
    for part, ranges in (("attributes", run.gfns), ("RMP", run.pfns), ("pages", run.pfns)):
        strays = np.array(changed(before[part], after[part]), np.int64)
        for lo, hi in ranges:
            strays = strays[(strays < lo) | (strays >= hi)]
        # A page that was cleared for its next user may be anybody's.
        left = [at for at in strays.tolist() if part != "pages" or not empty(after[part].get(at))]
        yield from (f"{part} at {at:#x} changed" for at in left[:1])
    if not of_the_right_size(vm):
        yield "a page or a line has another size than before"
    if min(vm.counters.values(), default=0) < 0:
        yield "a negative count"
    if vm.threads and not run.over:
        yield f"{vm.threads[0].name} still holds {vm.threads[0].held}"


def step(run: Run, nested: bool = False) -> None:
    """One call, and what it left behind."""
    kind = run.rng.choice(CALLS)
    call, args = getattr(run, kind)()
    bad, args = any(isinstance(a, Bad) for a in args), [a.value if isinstance(a, Bad) else a for a in args]
    title = f"{type(call.__self__).__name__}.{call.__name__}({', '.join(map(shown, args))})"
    run.trail.append(title)
    for mine, more in zip((run.gfns, run.pfns), named(run, call, args), strict=True):
        mine += more
    before, end, refused = None if nested else looked_at(run.vm), "returns", False
    try:
        answer = call(*args)
    except (VmError, InputError) as wrong:
        end = type(wrong).__name__
        by_errno = type(wrong) is VmErrno and wrong.errno in REFUSALS and kind in VMM
        refused = isinstance(wrong, InputError) or by_errno
        run.over |= isinstance(wrong, OVER) or any(name == "lock-misuse" for name, _ in run.vm.violations)
    except Exception as wrong:
        end = "undocumented"
        run.faults.append(f"UNDOCUMENTED {title}: {type(wrong).__name__}: {wrong}\n{traceback.format_exc()}")
    else:
        if bad:
            run.faults.append(f"took what has no meaning: {title}")
        if call.__name__ in ("read", "directmap_read") and len(answer) != args[1]:
            run.faults.append(f"{title}: {len(answer)} bytes")
        run.files += [answer] * (call.__name__ == "create_guest_memfd")
        run.mappings += [answer] * (call.__name__ == "mmap")
    run.ends[end] += 1
    if before is not None:
        run.over |= any(name == "lock-misuse" for name, _ in run.vm.violations)
        run.faults += [f"{title} ({end}): {text}" for text in judge(run, before, looked_at(run.vm), refused)]
        run.gfns, run.pfns = [], []


def wrong_vm(run: Run) -> None:
    """The constructor with one argument that has no meaning."""
    name = run.rng.choice(sorted(CONSTRUCTOR))
    wrong = {**({} if name == "slots" else {"pages": 4}), name: run.rng.choice(CONSTRUCTOR[name])}
    try:
        Vm(**wrong)
    except (InputError, DesignError) as refused:
        run.ends[type(refused).__name__] += 1
    except Exception as other:
        run.faults.append(f"UNDOCUMENTED Vm({shown(wrong)}): {type(other).__name__}: {other}")
    else:
        run.faults.append(f"took what has no meaning: Vm({shown(wrong)})")


def sequence(seed: int, calls: int = 30) -> Run:
    """One Vm and its calls, up to the first that goes wrong; in some, another CPU acts between the rows."""
    rng = random.Random(seed)
    vm, more = some_vm(rng)
    run = Run(vm, rng, [vm.gmem], trail=[f"seed {seed}: Vm({more})"])
    wrong_vm(run)
    if rng.random() < 0.2:
        vm.on_row = lambda row: step(run, nested=True) if rng.random() < 0.05 else None
    for _ in range(calls):
        if not run.faults:
            step(run)
    return run


def main() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sequences", type=int)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    ends: Counter[str] = Counter()
    faults: list[str] = []
    start = time.time()
    for number in range(options.sequences):
        run = sequence(options.seed * 1_000_000 + number)
        ends += run.ends
        faults += run.faults
        if run.faults:
            print("\n".join([run.trail[0], *run.trail[-4:], *run.faults, ""]), flush=True)
    undocumented = sum(text.startswith("UNDOCUMENTED") for text in faults)
    print(f"{options.sequences} sequences, {ends.total()} calls in {time.time() - start:.0f} s")
    print(", ".join(f"{name} {n}" for name, n in ends.most_common()))
    print(f"{undocumented} undocumented exceptions, {len(faults) - undocumented} times silent nonsense")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""A small protocol of shared-to-private conversion in steps of kvmlab, to measure checkers by.

P pages of one 2M region become private while V vCPUs fault on them (vCPU i on page i mod P) and one host
thread writes to them through the directmap.  `order` says when directmap and RMP are changed:

    0  page by page, directmap then RMPUPDATE, after mmu_lock is dropped
    1  the directmap before the lock is taken, RMPUPDATE under it
    2  as 0, but RMPUPDATE first: the host can meet a private page in the directmap
    3  as 0, without the check of mmu_invalidate_seq: a stale fault is mapped

A huge directmap entry is split when the first page leaves it; a write through one that is still whole faults
if any page under it is private, and with `strict` even through a split one.  After a host fault nobody moves.
"""

from __future__ import annotations

from typing import NamedTuple

from kvmlab.model.state import Field, Layout, View
from kvmlab.model.step import Actor, Instr, Model

NAMES = ("after the lock", "under the lock", "RMPUPDATE first", "no sequence check")
KINDS = ("shared", "private")


class Conf(NamedTuple):
    """What never changes: sizes, the order, and where the converter's program ends."""

    pages: range
    vcpus: tuple[str, ...]
    page_of: dict[str, int]
    order: int
    strict: bool
    end: int


def alive(s: View) -> None:
    s.wait(not s.host_faulted)


def flush(s: View, page: int | None = None) -> None:
    for cpu in s.conf.vcpus:
        if page is None or s.conf.page_of[cpu] == page:
            s.tlb[cpu] = "none"


def request(s: View, me: str) -> None:
    alive(s)


def lock(s: View, me: str) -> None:
    alive(s)
    s.wait(s.mmu_lock == "free")
    s.mmu_lock = me


def unlock(s: View, me: str) -> None:
    alive(s)
    s.mmu_lock = "free"


def begin(s: View, me: str) -> None:
    alive(s)
    s.in_progress = True


def end(s: View, me: str) -> None:
    alive(s)
    s.in_progress, s.seq = False, 1


def zap(s: View, me: str, page: int) -> None:
    alive(s)
    s.npt[page] = "none"


def flush_all(s: View, me: str) -> None:
    alive(s)
    flush(s)


def store(s: View, me: str, page: int) -> None:
    alive(s)
    s.attr[page] = "private"


def unmap_directmap(s: View, me: str, page: int) -> None:
    alive(s)
    s.directmap[page] = False


def rmpupdate(s: View, me: str, page: int) -> None:
    alive(s)
    s.rmp[page] = "private"
    flush(s, page)


def stop(s: View, me: str) -> None:
    s.wait(False)


def finished(s: View, me: str, doing: str, *args: int) -> None:
    """The converter's last step: no page may be left with a shared mapping."""
    STEPS[doing](s, me, *args)
    for page in s.conf.pages:
        if s.npt[page] == "shared":
            s.violate("stale-mapping", f"page {page} is private and still mapped as shared")


def host_pick(s: View, me: str) -> str:
    alive(s)
    return f"page {s.choose(s.conf.pages)}"


def host_write(s: View, me: str, page: int) -> None:
    alive(s)
    if not s.directmap[page]:
        return
    whole = s.conf.strict or all(s.directmap[p] for p in s.conf.pages)
    if s.rmp[page] == "private" or (whole and any(s.rmp[p] == "private" for p in s.conf.pages)):
        s.host_faulted = True
        s.violate("host-rmp-fault", f"the host writes page {page}")


def start(s: View, me: str) -> None:
    alive(s)
    s.kind[me] = "private" if s.pc["converter"] > 0 else "shared"
    s.snapshot[me] = 0


def access(s: View, me: str) -> str | None:
    alive(s)
    s.snapshot[me] = 0
    if s.tlb[me] != s.kind[me]:
        return None
    s.kind[me] = "shared"
    return "done"


def walk(s: View, me: str) -> str | None:
    alive(s)
    s.snapshot[me] = 0
    if s.npt[s.conf.page_of[me]] != s.kind[me]:
        return None
    s.tlb[me] = s.kind[me]
    return "hit"


def snapshot(s: View, me: str) -> None:
    alive(s)
    s.snapshot[me] = s.seq


def check_attr(s: View, me: str) -> str | None:
    alive(s)
    if s.attr[s.conf.page_of[me]] == s.kind[me]:
        return None
    s.kind[me], s.snapshot[me] = "shared", 0
    return "exit"


def check_seq(s: View, me: str) -> str | None:
    alive(s)
    stale = s.conf.order != 3 and (s.in_progress or s.snapshot[me] != s.seq)
    s.snapshot[me] = 0
    if not stale:
        return None
    s.kind[me] = "shared"
    return "stale"


def map_page(s: View, me: str) -> None:
    alive(s)
    kind = s.kind[me]
    s.npt[s.conf.page_of[me]] = kind
    s.kind[me] = "shared"
    if kind == "shared" and s.pc["converter"] == s.conf.end:
        s.violate("stale-mapping", "a shared mapping is made after the conversion")


STEPS = {
    f.__name__: f
    for f in (request, lock, unlock, begin, end, zap, flush_all, store, unmap_directmap, rmpupdate)
}  # fmt: skip


Call = tuple[str, tuple[int, ...]]


def converter_steps(pages: range, order: int) -> list[Call]:
    """The ioctl, one atomic step an entry."""
    each: dict[str, list[Call]] = {
        name: [(name, (p,)) for p in pages] for name in ("zap", "store", "unmap_directmap", "rmpupdate")
    }
    one: dict[str, list[Call]] = {
        name: [(name, ())] for name in ("request", "lock", "begin", "flush_all", "end", "unlock")
    }
    window = one["begin"] + each["zap"] + one["flush_all"] + each["store"]
    if order == 1:
        before = one["request"] + each["unmap_directmap"] + one["lock"]
        return before + window + each["rmpupdate"] + one["end"] + one["unlock"]
    pair = ("rmpupdate", "unmap_directmap") if order == 2 else ("unmap_directmap", "rmpupdate")
    after: list[Call] = [(name, (p,)) for p in pages for name in pair]
    return one["request"] + one["lock"] + window + one["end"] + one["unlock"] + after


def converter(pages: range, order: int) -> tuple[Instr, ...]:
    """The converter's program; the last step also looks for stale mappings."""
    steps = converter_steps(pages, order)
    program = [Instr(STEPS[name], args, n + 1, text=name) for n, (name, args) in enumerate(steps)]
    name, args = steps[-1]
    program[-1] = Instr(finished, (name, *args), len(steps), text=name)
    return (*program, Instr(stop, idle=True, text="finished"))


def host(pages: range) -> tuple[Instr, ...]:
    """The host thread: picks a page, writes it, for ever."""
    pick = Instr(host_pick, jumps={f"page {p}": p + 1 for p in pages}, idle=True, text="pick")
    return (pick, *(Instr(host_write, (p,), 0, text=f"write {p}") for p in pages))


def vcpu() -> tuple[Instr, ...]:
    """A vCPU: TLB, walk, and KVM's fault path."""
    return (
        Instr(start, (), 1, idle=True, text="start"),
        Instr(access, (), 2, {"done": 0}, text="access"),
        Instr(walk, (), 3, {"hit": 1}, text="walk"),
        Instr(snapshot, (), 4, text="mmu_invalidate_seq"),
        Instr(check_attr, (), 5, {"exit": 0}, text="kvm_mem_is_private"),
        Instr(lock, (), 6, text="lock"),
        Instr(check_seq, (), 7, {"stale": 8}, text="is_page_fault_stale"),
        Instr(map_page, (), 8, text="map"),
        Instr(unlock, (), 0, text="unlock"),
    )


def build(P: int, V: int, order: int, strict: bool = False) -> Model:
    """The protocol with `P` pages and `V` vCPUs."""
    pages, cpus = range(P), tuple(f"CPU{i}" for i in range(V))
    program = converter(pages, order)
    page_of = {cpu: i % P for i, cpu in enumerate(cpus)}
    actors = (
        Actor("converter", "converts", program),
        Actor("host", "writes", host(pages)),
        *(Actor(cpu, "vCPU", vcpu()) for cpu in cpus),
    )
    fields = [
        *(Field("pc", tuple(range(len(a.program))), (a.key,)) for a in actors),
        Field("mmu_lock", ("free", "converter", *cpus)),
        Field("in_progress", (False, True)),
        Field("seq", (0, 1)),
        Field("host_faulted", (False, True)),
        Field("attr", KINDS, tuple(pages)),
        Field("rmp", KINDS, tuple(pages)),
        Field("npt", ("none", *KINDS), tuple(pages)),
        Field("directmap", (True, False), tuple(pages)),
        Field("kind", KINDS, cpus),
        Field("snapshot", (0, 1), cpus),
        Field("tlb", ("none", *KINDS), cpus),
    ]
    conf = Conf(pages, cpus, page_of, order, strict, len(program) - 1)
    return Model(Layout(fields), actors, 0, conf, title=f"snpconv {P} pages, {V} vCPUs, {NAMES[order]}")

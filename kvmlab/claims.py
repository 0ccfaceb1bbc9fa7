"""The claims of the thread, each tied to an experiment: the answer is computed, never typed in.

Source: Michael Roth, Re: [PATCH RFC v8 02/56] KVM: x86: Add 'update_mem_attr' x86 op, 2023-03-22, and the mails
that it quotes.  An experiment looks at verdicts and measures of checks and says confirmed, refuted, or
qualified (true only under a named condition).  What this model cannot decide says so, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .design import Design
from .design.calls import BACKINGS
from .machine import Switches
from .report import ALWAYS, NEVER, SOMETIMES, Report, check
from .scenario import InputError

if TYPE_CHECKING:
    from .emulator import Vm

PAGE = 4096
CONFIRMED, REFUTED, QUALIFIED, BEYOND = "confirmed", "refuted", "qualified", "out of the model's reach"


@dataclass
class Bench:
    """Where experiments are done: checks are remembered, and every look at one is written down as evidence."""

    evidence: list[str] = field(default_factory=list)
    _done: dict[Any, Report] = field(default_factory=dict)

    def report(
        self, design: str, scenario: str = "tiny", platform: str = "snp", backing: str = "split", **odd: Any
    ) -> Report:
        """The report of one case; `odd` are switches that differ from their defaults."""
        key = (design, scenario, platform, backing, tuple(odd.items()))
        if key not in self._done:
            self._done[key] = check(design, platform, scenario, backing, Switches(**odd))
        report = self._done[key]
        bad = ", ".join(f"{v.name} {v.verdict}" for v in report.verdicts.values() if v.depth is not None)
        self.note(f"{report.case}: {bad or 'all Never'} ({report.states:,} states)")
        return report

    def verdict(self, prop: str, design: str, scenario: str = "tiny", **case: Any) -> str:
        """The verdict on one property in one case."""
        return self.report(design, scenario, **case).verdicts[prop].verdict

    def clean(self, design: str, *scenarios: str, **case: Any) -> bool:
        """Whether nothing is violated in any of the scenarios."""
        return all(
            not self.report(design, scenario, **case).violated
            for scenario in scenarios or ("tiny", "host-io")
        )

    def most(self, measure: str, design: str, scenario: str = "tiny", **case: Any) -> int | None:
        """The most that a measure reaches in a run; None if unbounded."""
        report = self.report(design, scenario, **case)
        most = report.measures[measure]["most"]
        self.note(f"{report.case}: {measure} at most {'unbounded' if most is None else most}")
        return most

    def calls(self, design: str, section: str, to: str = "private") -> list[str]:
        """The calls of a design's section, in order."""
        found = [row.call for row in Design.load(design).rows(section, to=to)]
        self.note(f"{design}, {section} to {to}: {', '.join(found)}")
        return found

    def vm(self, design: str, **kinds: Any) -> Vm:
        """One emulated VM on snp."""
        from .emulator import Vm

        return Vm("snp", design=design, **kinds)

    def note(self, text: str) -> None:
        """Write down what was looked at."""
        if text not in self.evidence:
            self.evidence.append(text)


@dataclass(frozen=True)
class Claim:
    """One statement of the thread: who made it, what it says, and the experiment that answers it."""

    id: str
    who: str
    text: str
    experiment: Callable[[Bench], tuple[str, str]]

    def answer(self, bench: Bench | None = None) -> Answer:
        """Run the experiment."""
        bench = bench or Bench()
        bench.evidence.clear()
        word, why = self.experiment(bench)
        return Answer(self, word, why, tuple(bench.evidence))


@dataclass(frozen=True)
class Answer:
    """What an experiment says of a claim, why, and the checks that it looked at."""

    claim: Claim
    word: str
    why: str
    evidence: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The element that `kvmlab claims --json` prints."""
        claim = {"id": self.claim.id, "who": self.claim.who, "text": self.claim.text}
        return {**claim, "answer": self.word, "why": self.why, "evidence": list(self.evidence)}


CLAIMS: dict[str, Claim] = {}


def _claim(id: str, who: str, text: str) -> Callable[[Callable[[Bench], tuple[str, str]]], None]:
    def register(experiment: Callable[[Bench], tuple[str, str]]) -> None:
        CLAIMS[id] = Claim(id, who, text, experiment)

    return register


def _beyond(id: str, who: str, text: str, why: str) -> None:
    CLAIMS[id] = Claim(id, who, text, lambda bench: (BEYOND, why))


def _if(holds: bool, why: str, otherwise: str = REFUTED) -> tuple[str, str]:
    return (CONFIRMED if holds else otherwise), why


@_claim("C01", "MR", "one optional op (absent: success) can carry what a platform needs")
def _c01(b: Bench) -> tuple[str, str]:
    absent = b.clean("v8-post-hook", "tiny", platform="sw") and b.clean(
        "v8-post-hook", "tiny", platform="sev"
    )
    return _if(
        absent and b.clean("v8-post-hook"),
        "with the op on snp, and without one on sev and sw, nothing is violated",
    )


@_claim("C02", "MR", "the hook must visit every memslot that overlaps, clipped to it, skipping what is empty")
def _c02(b: Bench) -> tuple[str, str]:
    vm = b.vm("v8-post-hook", slots=[(0, 4 * PAGE), (6 * PAGE, 4 * PAGE)])
    vm.set_memory_attributes(2 * PAGE, 6 * PAGE, True)
    owned = [g for g in (0, 1, 2, 3, 6, 7, 8, 9) if vm.rmp.assigned(vm.pfn(g * PAGE, True))[0]]
    b.note(f"memslots 0-3 and 6-9, request 2-7: the RMP assigns gfns {owned}")
    whole = owned == [2, 3, 6, 7] and b.clean("v8-post-hook", "range", "hole")
    one_slot = b.verdict("livelock", "first-memslot-only", "hole")
    one_space = b.verdict("stale-mapping", "zaps-one-address-space", "smm", platform="sev")
    return _if(
        whole and NEVER not in (one_slot, one_space) and b.clean("v8-post-hook", "smm", platform="sev"),
        "so it reaches the overlap of each memslot, and no more; stopping after the first, a guest in the second "
        "faults for ever; leaving out the second address space, SMM writes on into the shared page",
    )


@_claim("C03", "MR", "the hook runs only for the part that was stored, and only if that is not empty")
def _c03(b: Bench) -> tuple[str, str]:
    ops = []
    for at in (3, 0):
        vm = b.vm("v8-post-hook", pages=8)
        vm.fail("xa_store", at=at)
        vm.set_memory_attributes(0, 8 * PAGE, True)
        ops.append(vm.counters.get("rmpupdate", 0))
        b.note(f"8 pages, the store of page {at} fails: {ops[-1]} RMPUPDATEs")
    return _if(
        ops == [3, 0] and b.clean("v8-post-hook", "xarray-full"),
        "one RMPUPDATE for each page stored before the failure; the VMM asks again for the rest, and nothing breaks",
    )


@_claim("C04", "MR", "a failing hook only warns and the ioctl succeeds: what state is left?")
def _c04(b: Bench) -> tuple[str, str]:
    stuck = b.verdict("livelock", "v8-post-hook", "hook-fails")
    killed = b.verdict("guest-killed", "upstream", "hook-fails")
    there = {what: _after_a_failed_hook(b, True, "split", what) for what in WAYS_IN}
    back = {kind: _after_a_failed_hook(b, False, kind, "a C=0 write") for kind in BACKINGS}
    silent = _after_a_failed_hook(b, False, "in-place", "a C=0 read")
    told = ", ".join(f"{what} {outcome}" for what, outcome in there.items())
    why = (
        f"going private the attribute says so and the RMP does not: {told}; going shared, a C=0 write "
        f"{back['split']}, in-place it {back['in-place']} and a read {silent}; as merged, KVM_RUN fails"
    )
    return _if(stuck == killed == SOMETIMES and back["in-place"] == there["a C=1 access"] == SPINS, why)


SPINS = "faults for ever"
WAYS_IN = ("a C=1 access", "a C=0 access", "a write of the host")


def _after_a_failed_hook(b: Bench, private: bool, backing: str, what: str) -> str:
    """How an access ends to the page at which a v8 hook has failed; the VMM does not answer exits."""
    from .emulator import GuestSpins, KernelBug, MemoryFaultExit, RmpFault

    vm = b.vm("v8-post-hook", pages=2, backing=backing, vmm="kill")
    guest, pfn, ended = vm.guest(), vm.pfn(PAGE, True), "is done"
    if not private:
        guest.set_memory_encrypted(0, 2 * PAGE)
        guest.write(PAGE, b"secret")
    vm.fail("rmpupdate", at=pfn)
    vm.set_memory_attributes(0, 2 * PAGE, private)
    guest.set_private(PAGE, "C=1" in what)
    try:
        if "host" in what:
            vm.host.directmap_write(pfn)
        elif "C=1" in what:
            guest.pvalidate(PAGE, True)
        elif "read" not in what:
            guest.write(PAGE, b"x")
        elif guest.read(PAGE, 6) != b"secret":
            ended = "returns ciphertext without a fault"
    except GuestSpins:
        ended = SPINS
    except MemoryFaultExit:
        ended = "exits to the VMM"
    except (KernelBug, RmpFault) as fatal:
        ended = "oopses" if isinstance(fatal, KernelBug) else "takes an RMP fault"
    b.note(f"v8-post-hook, {backing}, RMPUPDATE to {'private' if private else 'shared'} fails: {what} {ended}")
    return ended


@_claim("C05", "IY", "the hook could be called in kvm_arch_set_memory_attributes()")
def _c05(b: Bench) -> tuple[str, str]:
    return _if(
        b.clean("set-mem-attr-op"), "that place is under mmu_lock, where the directmap update may not sleep"
    )


@_claim("C06", "MR", "under mmu_lock the directmap update gives 'scheduling while atomic'")
def _c06(b: Bench) -> tuple[str, str]:
    seen = b.verdict("sleep-in-atomic", "v7-under-lock")
    unseen = b.verdict("sleep-in-atomic", "v7-under-lock", preempt_count=False)
    return _if(
        seen == ALWAYS and unseen == NEVER, "in every run; without CONFIG_PREEMPT_COUNT nothing reports it"
    )


@_claim("C07", "ZW", "a conversion is four things: attributes, zap (TDX), RMP (SNP), directmap (SNP)")
def _c07(b: Bench) -> tuple[str, str]:
    broken = {
        "the store": b.verdict("guest-killed", "stores-one-way"),
        "the zap": b.verdict("kernel-bug", "no-zap"),
        "RMPUPDATE": b.verdict("livelock", "never-rmpupdate"),
        "the directmap": b.verdict("host-rmp-fault", "keeps-directmap"),
    }
    needed = [what for what, verdict in broken.items() if verdict != NEVER]
    tdx_zap = b.verdict("stale-mapping", "no-zap", platform="tdx") != NEVER
    tdx_alone = b.clean("upstream", platform="tdx")  # nobody touches the directmap there
    word = CONFIRMED if "the zap" not in needed else QUALIFIED
    if len(needed) < 3 or not tdx_zap:
        return (
            REFUTED,
            f"SNP breaks without {', '.join(needed)}; TDX {'breaks' if tdx_zap else 'works'} without the zap",
        )
    directmap = "does not need (4)" if tdx_alone else "needs (4) as well"
    return word, f"SNP breaks without {', '.join(needed)}, so the zap is not TDX's alone; TDX {directmap}"


@_claim("C09", "MR", "in the series directmap and RMP update are one function")
def _c09(b: Bench) -> tuple[str, str]:
    rows = b.calls("v8-post-hook", "ioctl")
    n = rows.index("rmpupdate")
    return _if(rows[n - 1] == "kvm_unmap_directmap", "the op is: unmap the directmap, then RMPUPDATE")


@_claim("C08", "MR", "it is not established that TDX needs the directmap work")
def _c08(b: Bench) -> tuple[str, str]:
    without = b.clean("upstream", "tiny", "to-shared", platform="tdx")
    stray = b.verdict("host-machine-check", "upstream", "host-stray", platform="tdx")
    generic = b.verdict("kernel-bug", "pre-post-directmap", platform="tdx")
    if not without:
        return REFUTED, "TDX breaks without it"
    told = [
        f"conversions are clean without it; a host that writes where it must not still kills the TD ({stray})"
    ]
    if generic != NEVER:
        told.append(
            f"and unmapping for every platform makes the kernel oops at its own zeroing and CLFLUSH ({generic})"
        )
    return (QUALIFIED if stray != NEVER else CONFIRMED), "; ".join(told)


@_claim("C10", "MR", "does doing the RMP outside mmu_lock trouble TDX? what would TDX do in the hook?")
def _c10(b: Bench) -> tuple[str, str]:
    outside, inside = (
        b.clean(d, "tiny", "to-shared", platform="tdx") for d in ("v8-post-hook", "set-mem-attr-op")
    )
    left = {row.call for row in Design.load("v8-post-hook").rows("ioctl", to="shared", platform="tdx")}
    nothing = not left & {"rmpupdate", "kvm_unmap_directmap", "kvm_map_directmap"}
    b.note(f"v8-post-hook, ioctl on tdx: the op leaves {'nothing' if nothing else 'something'} to do")
    slept = b.verdict("sleep-in-atomic", "v8-post-hook", "to-shared", platform="tdx")
    return _if(
        not (outside and inside and nothing and slept == NEVER),
        "no trouble, and nothing: the zap does BLOCK, TRACK, kick, REMOVE under mmu_lock, and no step of it sleeps",
    )


@_claim("C11", "ZW", "does SNP need to zap the NPT at all?")
def _c11(b: Bench) -> tuple[str, str]:
    split, one = b.clean("no-zap"), b.clean("no-zap", backing="in-place")
    if split != one:
        return (
            QUALIFIED,
            "yes with two backings (the old leaf ends in BUG()); no when both kinds are one page",
        )
    return _if(not split, "yes")


@_claim("C12", "MR", "RMPUPDATE flushes the TLB, so perhaps no zap is needed")
def _c12(b: Bench) -> tuple[str, str]:
    split = b.verdict("kernel-bug", "no-zap")
    same = b.verdict("kernel-bug", "no-zap", rmpupdate_flushes=False)
    one = b.clean("no-zap", backing="in-place")
    word = QUALIFIED if one and split != NEVER else (REFUTED if split != NEVER else CONFIRMED)
    return word, f"the leaf stays, flush or not ({split}, without the flush {same}); true only in-place"


@_claim("C13", "MR", "a fault before RMPUPDATE, without unmap and flush, leaves a stale mapping")
def _c13(b: Bench) -> tuple[str, str]:
    left = b.verdict("out-of-sync", "no-zap")
    return _if(
        left != NEVER and b.clean("v8-post-hook"), "the leaf of the shared page survives the conversion"
    )


@_claim("C14", "MR", "the UPM selftests and plain SEV need the unmap too")
def _c14(b: Bench) -> tuple[str, str]:
    broken = [p for p in ("sw", "sev") if not b.clean("no-zap", "tiny", platform=p)]
    return _if(
        broken == ["sw", "sev"],
        "on sw private data lands in the shared page, on sev reads are noise or stale",
    )


@_claim("C15", "ZW", "RMPUPDATE could wait for the next fault")
def _c15(b: Bench) -> tuple[str, str]:
    both, one_way = b.clean("defer-to-fault"), b.clean("upstream")
    if one_way and not both:
        return (
            QUALIFIED,
            "only towards private, as merged; a stale fault that takes pages back undoes a conversion",
        )
    return _if(both, "it can")


@_claim("C16", "MR", "in the ioctl, the MMU can rely on the xarray; deferred, it must ask the RMP")
def _c16(b: Bench) -> tuple[str, str]:
    asks = {
        d: any(c.startswith("rmp_") for c in b.calls(d, "fault"))
        for d in ("v8-post-hook", "defer-to-fault", "upstream")
    }
    return _if(
        list(asks.values()) == [False, True, True], "both deferring designs look the RMP up before they map"
    )


@_claim("C17", "MR", "inside the window a racing fault retries and never maps against the old RMP state")
def _c17(b: Bench) -> tuple[str, str]:
    inside, after = b.most("spurious-npf", "pre-post-directmap"), b.most("spurious-npf", "v8-post-hook")
    return _if(inside == 0 and after is None, "no spurious fault inside the window, any number after it")


@_claim("C18", "MR", "in v8 the guest may loop on RMP faults until RMPUPDATE is done; it works out")
def _c18(b: Bench) -> tuple[str, str]:
    loops = b.most("spurious-npf", "v8-post-hook") is None
    ends = b.verdict("livelock", "v8-post-hook") == NEVER and b.clean("v8-post-hook")
    back = b.most("spurious-npf", "v8-post-hook", "host-io")
    if loops and ends and back is not None:
        return QUALIFIED, "going private it loops and ends; going shared with two backings there is no loop"
    return _if(loops and ends, "it loops, and it ends")


@_claim("C19", "MR", "deferral saves page-state changes, but little beside the other costs")
def _c19(b: Bench) -> tuple[str, str]:
    from .emulator.workloads import boot

    kinds = {"v8-post-hook": {}, "upstream": {}, "upstream, freeing what is unused": {"discard": "after"}}
    loads = {}
    for name, kind in kinds.items():
        vm = b.vm(name.partition(",")[0], pages=1 << 15, **kind)
        loads[name] = boot(vm, in_4k=32 << 20, bounce=8 << 20, scattered=256).total["rmpupdate"]
        b.note(f"boot-like load on 128 MiB, {name}: {loads[name]:,} RMPUPDATEs, {vm.counters['npf']:,} #NPFs")
    now, later, freeing = loads.values()
    saved = f"{now - later:,} of {now:,} RMPUPDATEs"
    why = f"{saved}, those of the way back; none if the VMM frees what it no longer uses"
    return (QUALIFIED if 0 < now - later < now / 4 and freeing == now else REFUTED), why


@_claim("C20", "ZW", "an op should say whether zapping is required")
def _c20(b: Bench) -> tuple[str, str]:
    return _if(
        b.clean("zap-by-op")
        or b.clean("zap-by-op-direction")
        or b.verdict("out-of-sync", "no-zap", "to-shared", platform="tdx") == NEVER,
        "with two backings an SNP that answers no ends in BUG(); a TDX that answered no keeps the page: all say yes",
    )


@_claim("C21", "ZW", "RMPUPDATE needs no mutex; only the directmap update does")
def _c21(b: Bench) -> tuple[str, str]:
    alone, both = (b.verdict("sleep-in-atomic", d) for d in ("pre-post-directmap", "v7-under-lock"))
    return _if(alone == NEVER and both == ALWAYS, "RMPUPDATE alone may stand under mmu_lock")


@_claim("C22", "MR", "the directmap must be unmapped before RMPUPDATE, or a write in the 2M region is fatal")
def _c22(b: Bench) -> tuple[str, str]:
    late = b.verdict("host-rmp-fault", "rmp-under-lock-directmap-post")
    split = b.verdict("host-rmp-fault", "upstream")
    if late != NEVER and split == NEVER:
        return (
            QUALIFIED,
            "something must be done before; splitting to 4K, as merged, is enough for the neighbours",
        )
    return _if(late != NEVER, "it must")


@_claim("C23", "MR", "rmpupdate() unmaps before shared->private and restores after private->shared")
def _c23(b: Bench) -> tuple[str, str]:
    there, back = b.calls("v8-post-hook", "ioctl"), b.calls("v8-post-hook", "ioctl", "shared")
    order = there.index("kvm_unmap_directmap") < there.index("rmpupdate")
    posted = b.verdict("host-rmp-fault", "v8-as-posted", "host-stray")
    early = b.verdict("host-rmp-fault", "maps-too-early", "host-stray")
    meant = order and back.index("rmpupdate") < back.index("kvm_map_directmap") and early != NEVER
    word = QUALIFIED if meant and posted != NEVER else REFUTED
    return word, "as meant, and either order matters; as posted the helper maps the page again at once"


@_claim("C24", "MR", "unmap in a pre hook, map in a post hook")
def _c24(b: Bench) -> tuple[str, str]:
    hooks, typed = (
        b.clean("pre-post-directmap", "tiny", "host-io", "host-stray"),
        b.clean("pre-post-as-typed"),
    )
    tdx, guarded = (b.clean(d, platform="tdx") for d in ("pre-post-directmap", "pre-post-snp-only"))
    if hooks and not typed:
        where = "" if tdx else f"; on tdx the kernel oopses{', unless the hooks ask for snp' if guarded else ''}"
        return QUALIFIED, f"as hooks outside mmu_lock; typed in place of the call, it sleeps under mmu_lock{where}"
    return _if(hooks, "it works")


_beyond("C25", "MR", "pre/post hooks avoid a second memslot walk", "a matter of code, not of behaviour")


@_claim("C26", "MR", "with pre/post hooks RMPUPDATE can run under mmu_lock, inside the window")
def _c26(b: Bench) -> tuple[str, str]:
    return _if(
        b.clean("pre-post-directmap", "tiny", "to-private", "to-shared", "round-trip"), "nothing is violated"
    )


@_claim("C27", "ZW", "RMPUPDATE in kvm_mem_attrs_changed(), all directmap work in the post hook")
def _c27(b: Bench) -> tuple[str, str]:
    return _if(
        b.clean("rmp-under-lock-directmap-post") and b.clean("rmp-under-lock-directmap-post", platform="tdx"),
        "as literally said the unmap comes too late on snp (a host write is fatal); on tdx the kernel oopses",
    )


@_claim("C28", "IY", "the op returns nothing and follows the large-page flags")
def _c28(b: Bench) -> tuple[str, str]:
    snp, tdx = b.clean("set-mem-attr-op"), b.clean("set-mem-attr-op", platform="tdx")
    if tdx and not snp:
        return QUALIFIED, "clean on tdx, where the op is absent; on snp it sleeps under mmu_lock (C05)"
    return _if(snp, "clean on both")


@_claim("C29", "patch", "a 2M range with mixed attributes must not be mapped huge")
def _c29(b: Bench) -> tuple[str, str]:
    kept = b.clean("upstream", "huge") and b.clean("v8-post-hook", "huge")
    kept = kept and b.clean("upstream", "huge-1g") and b.clean("v8-post-hook", "huge-1g")
    slipped = b.verdict("kernel-bug", "narrow-hull", "huge")
    slipped_1g = b.verdict("kernel-bug", "hull-of-2m-only", "huge-1g")
    return _if(
        kept and NEVER not in (slipped, slipped_1g),
        "mapped huge while its attributes change (before May 2025), it ends in BUG(), and a 1G page as well",
    )


def answers(ids: Iterable[str] = (), progress: Callable[[str], Any] | None = None) -> list[Answer]:
    """Run the experiments of some claims (default: all, in order); InputError for an id that does not exist.

    `progress` is called with a line before each.
    """
    wanted = list(ids) or sorted(CLAIMS)
    unknown = [i for i in wanted if i not in CLAIMS]
    if unknown:
        raise InputError(f"unknown claim {unknown[0]!r}; there are {min(CLAIMS)} to {max(CLAIMS)}")
    bench, found = Bench(), []
    for n, i in enumerate(wanted, 1):
        if progress:
            progress(f"{n} of {len(wanted)}: {i}")
        found.append(CLAIMS[i].answer(bench))
    return found

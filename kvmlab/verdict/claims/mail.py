"""The claims of Michael Roth's mail of 22 March 2023 and of the mails that it quotes: C01 to C29.

MR is Michael Roth, ZW Zhi Wang, IY Isaku Yamahata; "patch" is RFC v8 02/56 or its context.
"""

from __future__ import annotations

from typing import Any

from ...design import Design
from ...design.calls import BACKINGS
from ...hw.snp import HOST_ACCESS, OK
from ..report import ALWAYS, NEVER, SOMETIMES
from .bench import ANSWERED, CONFIRMED, PAGE, QUALIFIED, REFUTED, SOURCE, Bench, Finding, claim, listed


def _if(holds: bool, why: str, otherwise: str = "not so here") -> Finding:
    return (CONFIRMED, why) if holds else (REFUTED, otherwise)


@claim("C01", "MR", "one optional op (absent: success) can carry what a platform needs")
def _c01(b: Bench) -> Finding:
    op = "v8-post-hook"
    carried = b.clean(op, "tiny", "host-io", "round-trip", "range")
    absent = all(b.clean(op, "tiny", "host-io", platform=p) for p in ("tdx", "sev", "sw"))
    if not (carried and absent):
        return REFUTED, "it does not"
    late, races = b.bad(op, "slot-added"), b.bad(op, "discard-races")
    return (QUALIFIED if late or races else CONFIRMED), (
        "with the op on snp and without one on tdx, sev and sw conversions are clean; but the op is gone when the "
        f"memslot comes only after the request ({listed(late)}), and a discard at the same time is no part of it "
        f"({listed(races)})"
    )


@claim("C02", "MR", "the hook must visit every memslot that overlaps, clipped to it, skipping what is empty")
def _c02(b: Bench) -> Finding:
    vm = b.vm("v8-post-hook", slots=[(0, 4 * PAGE), (6 * PAGE, 4 * PAGE)])
    vm.set_memory_attributes(2 * PAGE, 6 * PAGE, True)
    owned = [g for g in (0, 1, 2, 3, 6, 7, 8, 9) if vm.rmp.assigned(vm.pfn(g * PAGE, True))[0]]
    b.note(f"memslots 0-3 and 6-9, request 2-7: the RMP assigns gfns {owned}")
    whole = owned == [2, 3, 6, 7] and b.clean("v8-post-hook", "range", "hole")
    one_slot = b.fails("livelock", "first-memslot-only", "hole")
    one_space = b.fails("stale-mapping", "zaps-one-address-space", "smm", platform="sev")
    return _if(
        whole and one_slot and one_space and b.clean("v8-post-hook", "smm", platform="sev"),
        "so it reaches the overlap of each memslot, and no more; stopping after the first, a guest in the second "
        "faults for ever; leaving out the second address space, SMM writes on into the shared page",
    )


@claim("C03", "MR", "the hook runs only for the part that was stored, and only if that is not empty")
def _c03(b: Bench) -> Finding:
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


@claim("C04", "MR", "a failing hook only warns and the ioctl succeeds: what state is left?")
def _c04(b: Bench) -> Finding:
    stuck = b.verdict("livelock", "v8-post-hook", "hook-fails")
    killed = b.verdict("guest-killed", "upstream", "hook-fails")
    there = {what: _after_a_failed_hook(b, True, "split", what) for what in WAYS_IN}
    back = {kind: _after_a_failed_hook(b, False, kind, "a C=0 write") for kind in BACKINGS}
    silent = _after_a_failed_hook(b, False, "in-place", "a C=0 read")
    told = ", ".join(f"{what} {outcome}" for what, outcome in there.items())
    why = (
        f"going private the attribute says so and the RMP does not: {told}; going shared, a C=0 write "
        f"{back['split']}, in-place it {back['in-place']} and a read {silent}; where the fault path does the work "
        "(upstream), KVM_RUN fails"
    )
    return _if(stuck == killed == SOMETIMES and back["in-place"] == there["a C=1 access"] == SPINS, why)


SPINS = "faults for ever"
WAYS_IN = ("a C=1 access", "a C=0 access", "a write of the host")


def _after_a_failed_hook(b: Bench, private: bool, backing: str, what: str) -> str:
    """How an access ends to the page at which a v8 hook has failed; the VMM does not answer exits."""
    from ...emulator import GuestSpins, KernelBug, MemoryFaultExit, RmpFault

    vm = b.vm("v8-post-hook", pages=2, backing=backing, vmm="kill")
    guest, pfn, ended = vm.guest(), vm.pfn(PAGE, True), "is done"
    if not private:
        guest.set_memory_encrypted(0, 2 * PAGE)
        guest.write(PAGE, b"secret")
    vm.fail("rmpupdate", at=pfn)
    left = vm.set_memory_attributes(0, 2 * PAGE, private).size
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
    if left:
        ended = f"(the ioctl has left {left} bytes undone) {ended}"
    b.note(
        f"v8-post-hook, {backing}, RMPUPDATE to {'private' if private else 'shared'} fails: {what} {ended}"
    )
    return ended


@claim("C05", "IY", "the hook could be called in kvm_arch_set_memory_attributes()")
def _c05(b: Bench) -> Finding:
    bad, tdx = b.bad("set-mem-attr-op", "tiny", "host-io"), b.clean("set-mem-attr-op", "tiny", platform="tdx")
    return _if(
        not bad,
        "it can",
        f"not on snp: that place is under mmu_lock, where the op may not sleep ({listed(bad)})"
        + ("; tdx, which has no op, does not mind" if tdx else ""),
    )


@claim(
    "C06", "MR", "under mmu_lock the directmap update gives 'scheduling while atomic', on invalidation too"
)
def _c06(b: Bench) -> Finding:
    seen = b.verdict("sleep-in-atomic", "v7-under-lock")
    punch = b.fails("sleep-in-atomic", "v7-under-lock", "vmm-punches")
    unseen = b.verdict("sleep-in-atomic", "v7-under-lock", preempt_count=False)
    return _if(
        seen == ALWAYS and punch and unseen == NEVER,
        "in every run of the ioctl, and in a discard; without CONFIG_PREEMPT_COUNT nothing reports it",
    )


@claim(
    "C07",
    "ZW",
    "a conversion is four things: attributes, zap (TDX), RMP (SNP), directmap (SNP; TDX as a guess)",
)
def _c07(b: Bench) -> Finding:
    without = {
        "the store": b.bad("stores-one-way", "tiny"),
        "the zap": b.bad("no-zap", "tiny", "host-io"),
        "RMPUPDATE": b.bad("never-rmpupdate", "tiny"),
        "the directmap": b.bad("keeps-directmap", "tiny"),
    }
    zap, needed = without.pop("the zap"), [what for what, bad in without.items() if bad]
    one_page = b.clean("no-zap", "tiny", "host-io", backing="in-place")
    tdx_zap = b.bad("no-zap", "tiny", "host-io", platform="tdx")
    tdx_directmap = b.bad("upstream", "tiny", "host-io", platform="tdx")  # nobody touches it there
    if len(needed) < len(without) or not tdx_zap:
        return REFUTED, f"snp needs {listed(needed)}; tdx without the zap: {listed(tdx_zap)}"
    return (QUALIFIED if zap or not tdx_directmap else CONFIRMED), (
        f"snp breaks without {listed(needed)}, and with two backings without the zap, too ({listed(zap)}; in-place, "
        f"4K, {'it does not' if one_page else 'as well'}), so that is not TDX's alone; the guess: conversions on tdx "
        f"are {'wrong' if tdx_directmap else 'clean'} without directmap work"
    )


@claim("C08", "MR", "it is not established that TDX needs the directmap work")
def _c08(b: Bench) -> Finding:
    without = b.bad("upstream", "tiny", "to-shared", platform="tdx")
    stray = b.bad("upstream", "host-stray", platform="tdx")
    generic = b.bad("pre-post-directmap", "tiny", platform="tdx")
    if without:
        return REFUTED, f"TDX breaks without it ({listed(without)})"
    told = ["conversions are clean without it"]
    if stray:
        told.append(f"a host that writes where it must not still kills the TD ({listed(stray)})")
    if generic:
        told.append(
            f"unmapping for every platform breaks the kernel's own zeroing and CLFLUSH ({listed(generic)})"
        )
    return (QUALIFIED if stray else CONFIRMED), "; ".join(told)


@claim("C09", "MR", "in the series directmap and RMP update are one function")
def _c09(b: Bench) -> Finding:
    rows = b.calls("v8-post-hook", "ioctl")
    n = rows.index("rmpupdate")
    one = rows[n - 1] == "kvm_unmap_directmap"
    return SOURCE, (
        f"patch 15/56, as transcribed here: rmpupdate() {'first unmaps' if one else 'does not unmap'} the page and "
        "then runs the instruction; what would follow from that, C22 to C24 try"
    )


@claim("C10", "MR", "does doing the RMP outside mmu_lock trouble TDX? what would TDX do in the hook?")
def _c10(b: Bench) -> Finding:
    case: dict[str, Any] = {"platform": "tdx"}
    outside, inside = (b.bad(d, "tiny", "to-shared", **case) for d in ("v8-post-hook", "set-mem-attr-op"))
    slept = b.verdict("sleep-in-atomic", "v8-post-hook", "to-shared", **case)
    hook = {"rmpupdate", "kvm_unmap_directmap", "kvm_map_directmap"}
    left = [c for c in b.calls("v8-post-hook", "ioctl", "shared", "tdx") if c in hook]
    trouble = outside or inside or slept != NEVER
    return ANSWERED, (
        f"{'trouble: ' + listed(outside or inside) if trouble else 'no trouble'}; in the hook TDX does "
        f"{listed(left)}: its zap does BLOCK, TRACK, kick, REMOVE under mmu_lock"
        f"{', and no step of it sleeps' if slept == NEVER else ''}"
    )


@claim("C11", "ZW", "does SNP need to zap the NPT at all?")
def _c11(b: Bench) -> Finding:
    there, back = b.bad("no-zap", "tiny"), b.bad("no-zap", "host-io")
    today = b.bad("upstream-no-zap", "tiny", "host-io")
    one_page = b.bad("no-zap", "tiny", "host-io", "round-trip", backing="in-place")
    return ANSWERED, (
        f"with two backings: {'yes' if there or back else 'no'} (without it, in 2023, going private {listed(there)}, "
        f"going shared {listed(back)}; in v6.19 {listed(today)}); where one page serves both kinds, mapped 4K: "
        f"{'yes, ' + listed(one_page) if one_page else 'no'}"
    )


@claim("C12", "MR", "RMPUPDATE flushes the TLB, so perhaps no zap is needed")
def _c12(b: Bench) -> Finding:
    flushes, silent = (b.bad("no-zap", "tiny", "host-io", rmpupdate_flushes=f) for f in (True, False))
    one_page = b.clean("no-zap", "tiny", "host-io", "round-trip", backing="in-place")
    word = CONFIRMED if not flushes else QUALIFIED if one_page else REFUTED
    return word, (
        f"with two backings no flush is enough, for the leaf stays ({listed(flushes)}; "
        f"{'the same' if silent == flushes else listed(silent)} if RMPUPDATE does not flush); "
        f"{'true' if one_page else 'nor is it'} where one page serves both kinds, mapped 4K"
    )


@claim("C13", "MR", "a fault before RMPUPDATE, without unmap and flush, leaves a stale mapping")
def _c13(b: Bench) -> Finding:
    left = b.fails("out-of-sync", "no-zap", "tiny", "host-io")
    used = [s for s in ("tiny", "host-io") if b.fails("stale-mapping", "no-zap", s)]
    flushed = b.fails("out-of-sync", "flush-without-zap", "tiny", "host-io")
    one_page = b.clean("no-zap", "tiny", "host-io", backing="in-place")
    if not (left and b.clean("v8-post-hook", "tiny", "host-io")):
        return REFUTED, "no mapping is left behind"
    ways = {"tiny": "going private", "host-io": "going shared"}
    return (QUALIFIED if one_page or flushed else CONFIRMED), (
        "with two backings a leaf of the old page is left, both ways; accesses complete through it "
        f"{' and '.join(ways[s] for s in used) or 'never'}; "
        f"{'it is the leaf and not the TLB: a flush alone leaves it too' if flushed else 'a flush is enough'}"
        f"{'; in-place (4K) nothing is left' if one_page else ''}"
    )


@claim("C14", "MR", "the UPM selftests and SEV with lazy pinning need the unmap too")
def _c14(b: Bench) -> Finding:
    broken = {p: b.bad("no-zap", "tiny", "host-io", platform=p) for p in ("sw", "sev")}
    return (QUALIFIED if all(broken.values()) else REFUTED), (
        f"without it, two backings: the software-protected VM of the selftests {listed(broken['sw'])}; plain SEV "
        f"{listed(broken['sev'])}. Pinning, lazy or not, is not in the model, nor is the shadow MMU"
    )


@claim("C15", "ZW", "RMPUPDATE could wait for the next fault")
def _c15(b: Bench) -> Finding:
    both = b.bad("defer-to-fault", "tiny", "to-private", "host-io", "round-trip", "range")
    if both:
        return REFUTED, f"it cannot, even with two backings ({listed(both)})"
    taken = b.bad("defer-to-fault-takes-back", "tiny", "host-io")
    discard = b.bad("defer-to-fault", "discard")
    late = b.bad(out_of_the_file_first(b.design("defer-to-fault")), "discard")
    one_page = b.bad("defer-in-place", "tiny", "round-trip", backing="in-place")
    host = b.bad("defer-in-place", "host-io", backing="in-place")
    return (QUALIFIED if taken or discard or host else CONFIRMED), (
        "with two backings it can, in both directions, if the fault makes the RMP fit the page that it is about to "
        "map. If it looks at the private page in any case, a stale shared fault has taken that back before the stale "
        f"test says so, and an RMPUPDATE cannot be undone ({listed(taken)}). A discard must take the page out of the "
        f"file before it makes it shared ({listed(late) if late else 'clean'}; v8's is late: {listed(discard)}). "
        "Where one page serves both kinds the attribute must be read again under a lock that the ioctl holds "
        f"({listed(one_page) if one_page else 'clean'}), and even so the host may be the first to use a page that "
        f"went shared ({listed(host)})"
    )


def out_of_the_file_first(design: Design) -> Design:
    """The design with a discard that takes the page out of the file before it makes it shared."""
    line = next(n for n, text in enumerate(design.lines("punch")) if "truncate" in text)
    return design.move("punch", line, -4)


@claim("C16", "MR", "RMPUPDATE in the ioctl lets the MMU rely on the xarray; deferred, it must ask the RMP")
def _c16(b: Bench) -> Finding:
    asks = {"rmp_match", "rmp_prepare"}
    designs = ("v8-post-hook", "defer-to-fault", "upstream")
    asking = [d for d in designs if asks & set(b.calls(d, "fault"))]
    return SOURCE, (
        "which page to map: as transcribed here, the fault paths that ask the RMP are those of "
        f"{listed(asking)}. Its level: the series itself looks the RMP entry up (sev_adjust_mapping_level(), on "
        'memslots that can be private), so "solely" was no more than "in theory", as the mail says'
    )


@claim("C17", "MR", "inside the window a racing fault retries and never maps against the old RMP state")
def _c17(b: Bench) -> Finding:
    inside, after = (
        [b.most("spurious-npf", d, backing=backing) for backing in BACKINGS]
        for d in ("pre-post-directmap", "v8-post-hook")
    )
    back = [
        b.most("spurious-npf", d, "host-io", backing="in-place")
        for d in ("pre-post-directmap", "v8-post-hook")
    ]
    again = b.most("retry", "pre-post-directmap")
    return _if(
        inside == [0, 0] and after == [None, None] and back[0] is not None and back[1] is None,
        "going private no fault finds its leaf there already and the RMP behind, while after the window any number "
        f"does; going shared in-place {back[0]} at most (two vCPUs fault at once), after the window any number; "
        f"instead it retries, {'without bound' if again is None else f'{again} times at most'}",
    )


@claim("C18", "MR", "in v8 the guest may loop on RMP faults until RMPUPDATE is done; it works out")
def _c18(b: Bench) -> Finding:
    loops = b.most("spurious-npf", "v8-post-hook") is None
    ends = b.clean("v8-post-hook", "tiny", "host-io")
    back = b.most("spurious-npf", "v8-post-hook", "host-io")
    one_page = b.most("spurious-npf", "v8-post-hook", "host-io", backing="in-place")
    stuck = [s for s in ("hook-fails", "slot-added") if b.fails("livelock", "v8-post-hook", s)]
    if not (loops and ends):
        return REFUTED, "it does not end well" if loops else "there is no loop"
    never = {"hook-fails": "if RMPUPDATE fails", "slot-added": "if the memslot comes only after the ioctl"}
    told = [f"{'; and it never ends ' if n == 0 else ' or '}{never[s]}" for n, s in enumerate(stuck)]
    return (QUALIFIED if stuck or back is not None else CONFIRMED), (
        "going private it loops, and ends under a fair scheduler; going shared with two backings "
        f"{'it loops, too' if back is None else 'there is no loop'}"
        f"{', in-place C=0 writes do' if one_page is None else ''}{''.join(told)}"
    )


@claim("C19", "MR", "deferral saves page-state changes, but little beside the other costs")
def _c19(b: Bench) -> Finding:
    from ...emulator.costs import RMPUPDATE_SECONDS, estimate
    from ...emulator.workloads import boot

    kinds: dict[str, dict[str, Any]] = {
        "v8-post-hook": {},
        "defer-to-fault": {},
        "upstream": {},
        "upstream, freeing what is unused": {"discard": "after"},
    }
    loads = {}
    for name, kind in kinds.items():
        vm = b.vm(name.partition(",")[0], pages=1 << 15, **kind)
        loads[name] = boot(vm, in_4k=32 << 20, bounce=8 << 20, scattered=256)
        b.note(
            f"boot-like load on 128 MiB, {name}: {loads[name].total['rmpupdate']:,} RMPUPDATEs, "
            f"{vm.counters['npf']:,} #NPFs, {vm.counters['exit-map-gpa-range']:,} exits to userspace"
        )

    def even(early: dict[str, int], late: dict[str, int]) -> float:
        """GHz at which the exits of `late` take as long as the RMPUPDATEs that it saves."""
        saved = early.get("rmpupdate", 0) - late.get("rmpupdate", 0)
        return estimate(late).exit_cycles / (saved * RMPUPDATE_SECONDS) / 1e9 if saved else float("inf")

    now, both, later, freeing = loads.values()
    all_now, saved = now.total["rmpupdate"], now.total["rmpupdate"] - later.total["rmpupdate"]
    ghz, at_once = (
        even(now.total, later.total),
        even(now.phases["bounce buffer"], later.phases["bounce buffer"]),
    )
    gone = freeing.total["rmpupdate"] == all_now
    small = 0 < saved < later.total["npf"] / 10 and ghz > 5
    return (QUALIFIED if small and gone else REFUTED), (
        f"in a boot-like load of 128 MiB, of {all_now:,} RMPUPDATEs upstream saves {saved:,} (a page that goes "
        f"shared stays the guest's; {'none' if gone else 'some'} if the VMM frees what it no longer uses) and "
        f"deferring both ways {all_now - both.total['rmpupdate']:,}, beside {later.total['npf']:,} nested faults in "
        "any case. At the published prices, 1 us an RMPUPDATE and 1,344 cycles an exit, the exits alone outweigh the "
        f"saving on a CPU below {ghz:.0f} GHz; in the phase that shares 8 MiB at once, below {at_once:.1f} GHz. No "
        "other price is published"
    )


@claim("C20", "ZW", "if SNP needs no zap, an op should say whether zapping is required")
def _c20(b: Bench) -> Finding:
    premise = b.bad("no-zap", "tiny", "host-io")
    says_no = b.bad("zap-by-op", "tiny", "host-io")
    tdx = b.bad("no-zap", "tiny", "host-io", platform="tdx")
    one_page = b.clean("zap-by-op", "tiny", "host-io", backing="in-place")
    if not premise and not says_no:
        return ANSWERED, "it could: an snp that says no is clean"
    return ANSWERED, (
        f"moot with two backings: the premise fails (C11), and an snp that says no gets {listed(says_no)}; tdx would "
        f"have to say yes ({listed(tdx)}). In-place, 4K, snp could {'say no' if one_page else 'not say no, either'}; "
        "to say no going private alone is C31"
    )


@claim("C21", "ZW", "RMPUPDATE needs no mutex; only the directmap update does")
def _c21(b: Bench) -> Finding:
    alone, both = (b.verdict("sleep-in-atomic", d) for d in ("pre-post-directmap", "v7-under-lock"))
    return _if(
        alone == NEVER and both == ALWAYS,
        "the instruction alone may stand under mmu_lock, the op with its directmap work may not",
    )


@claim(
    "C22",
    "MR",
    "the directmap must be unmapped before RMPUPDATE, or any access in the 2M region can be fatal",
)
def _c22(b: Bench) -> Finding:
    late = b.fails("host-rmp-fault", "rmp-under-lock-directmap-post", "tiny")
    never = b.fails("host-rmp-fault", "keeps-directmap", "tiny")
    split = b.bad("upstream", "tiny", "host-io")
    reads = HOST_ACCESS(op="read", mapping="2M", page_assigned=False, region_assigned=True)
    b.note(f"{HOST_ACCESS.source}: a read of a page of the host through a 2M entry: {reads}")
    if not (late and never):
        return REFUTED, "no host access is hurt"
    enough = "a split is not" if split else "splitting the 2M entry, as upstream does, is"
    return (QUALIFIED if not split or reads == OK else CONFIRMED), (
        f"something must be done before, or a write to a neighbour kills the host; {enough} enough for the neighbours"
        f"{'; data reads are not checked' if reads == OK else ''}"
    )


@claim("C23", "MR", "rmpupdate() unmaps before shared->private and restores after private->shared")
def _c23(b: Bench) -> Finding:
    there, back = b.calls("v8-post-hook", "ioctl"), b.calls("v8-post-hook", "ioctl", "shared")
    order = there.index("kvm_unmap_directmap") < there.index("rmpupdate")
    order = order and back.index("rmpupdate") < back.index("kvm_map_directmap")
    meant = b.clean("v8-post-hook", "tiny", "host-stray")
    late = b.fails("host-rmp-fault", "rmp-under-lock-directmap-post", "host-stray")
    early = b.fails("host-rmp-fault", "maps-too-early", "host-stray")
    posted = b.bad("v8-as-posted", "host-stray")
    word = CONFIRMED if not posted else QUALIFIED
    return (word if order and meant and late and early else REFUTED), (
        "as meant, and either order matters to a host that writes whatever is mapped; as posted the helper maps the "
        f"page again at once ({listed(posted)}), which Tom Dohrmann pointed out on 1 March 2023"
    )


@claim("C24", "MR", "unmap in a pre hook, map in a post hook")
def _c24(b: Bench) -> Finding:
    hooks, typed = (
        b.clean("pre-post-directmap", "tiny", "host-io", "host-stray"),
        b.bad("pre-post-as-typed", "tiny"),
    )
    tdx, guarded = (b.bad(d, "tiny", platform="tdx") for d in ("pre-post-directmap", "pre-post-snp-only"))
    if not hooks:
        return REFUTED, "the hooks break something"
    told = ["as hooks outside mmu_lock, on snp"]
    if typed:
        told.append(f"typed in place of the call they stand under mmu_lock ({listed(typed)})")
    if tdx:
        told.append(f"on tdx {listed(tdx)}{'' if guarded else ', unless the hooks ask for snp'}")
    return (QUALIFIED if typed or tdx else CONFIRMED), "; ".join(told)


@claim(
    "C25",
    "MR",
    "pre/post hooks avoid a second memslot walk (a loop over kvm_restrictedmem_get_pfn() remains)",
)
def _c25(b: Bench) -> Finding:
    b.note("patches 48/56 and 52/56: kvm_restrictedmem_get_pfn(slot, gfn, &pfn, &order), in a loop over gfns")
    return SOURCE, (
        "a matter of code, not of behaviour: kvm_restrictedmem_get_pfn() of the series takes the memslot, so that "
        "loop needs the memslot of each gfn, too"
    )


@claim("C26", "MR", "with pre/post hooks RMPUPDATE can run under mmu_lock, inside the window")
def _c26(b: Bench) -> Finding:
    alone = b.bad("pre-post-directmap", "tiny", "to-private", "to-shared", "round-trip")
    looks_up = b.bad("pre-post-op-looks-up", "tiny", "host-io")
    always = b.verdict("sleep-in-atomic", "pre-post-op-looks-up") == ALWAYS
    if alone:
        return REFUTED, f"not even the instruction alone ({listed(alone)})"
    return (QUALIFIED if looks_up else CONFIRMED), (
        "the instruction alone, on pages that were looked up before the lock: clean. The op of the series looks its "
        f"pages up itself, and kvm_restrictedmem_get_pfn() may sleep ({listed(looks_up)}"
        f"{', in every run' if always else ''})"
    )


@claim("C27", "ZW", "RMPUPDATE in kvm_mem_attrs_changed(), all directmap work in the post hook")
def _c27(b: Bench) -> Finding:
    name = "rmp-under-lock-directmap-post"
    there, back = b.bad(name, "tiny"), b.bad(name, "host-io")
    tdx = b.bad(name, "tiny", platform="tdx")
    return _if(
        not (there or tdx),
        "it works",
        f"as literally said the unmap comes too late going private ({listed(there)}); going shared the order is "
        f"{'wrong, too' if back else 'right'}; on tdx {listed(tdx)}",
    )


@claim("C28", "IY", "the op returns nothing and follows the large-page flags")
def _c28(b: Bench) -> Finding:
    snp, tdx = b.bad("set-mem-attr-op", "tiny", "host-io"), b.bad("set-mem-attr-op", "tiny", platform="tdx")
    void, logged = (b.report(d, "hook-fails").violated for d in ("set-mem-attr-op", "v8-post-hook"))
    same = set(void) - set(snp) == set(logged)
    word = CONFIRMED if not snp and not tdx else QUALIFIED if not tdx else REFUTED
    return word, (
        f"its place: {'clean' if not tdx else listed(tdx)} on tdx, where the op is absent, {listed(snp)} on snp; "
        f"returning nothing: what is left when RMPUPDATE fails is {'no different' if same else 'different'} from v8, "
        f"which only logs what the op returns ({listed(logged)})"
    )


@claim("C29", "patch", "a 2M range with mixed attributes must not be mapped huge")
def _c29(b: Bench) -> Finding:
    kept = all(b.clean(d, "huge", "huge-1g") for d in ("upstream", "v8-post-hook"))
    slipped, slipped_1g = b.bad("narrow-hull", "huge"), b.bad("hull-of-2m-only", "huge-1g")
    return _if(
        bool(kept and slipped and slipped_1g),
        f"mapped huge while its attributes change, as in v6.8 to v6.15, it ends in "
        f"{listed(slipped)}, and a 1G page in {listed(slipped_1g)}; 2M and 1G shared pages, two backings",
        "nothing comes of it" if kept else "it is not kept",
    )

"""The claims of the replies of 23 to 29 March 2023: C30 to C40.

MR is Michael Roth, ZW Zhi Wang.  The model was made from the mail of 22 March, before these were read.
"""

from __future__ import annotations

from ...design.calls import BACKINGS
from ...hw.snp import HOST_ACCESS, HOST_PF, OK, PG_2M, PG_4K, Npf
from ...hw.tdx import lines as tdx_lines
from ..report import ALWAYS
from .bench import CONFIRMED, PAGE, QUALIFIED, REFUTED, SOURCE, Bench, Finding, claim, listed
from .mail import out_of_the_file_first

FLUSH = "flush-without-zap"
RMP_ENC = Npf.RMP | Npf.ENC


@claim("C30", "MR", "tested on hardware: a TLB flush alone, without the zap, is not enough")
def _c30(b: Bench) -> Finding:
    stale = b.fails("stale-mapping", FLUSH, "host-io", "to-shared")
    silent = not _faults_after_the_return(b, "to-shared")
    used = [s for s in ("tiny", "to-private") if b.fails("stale-mapping", FLUSH, s)]
    lands, faults = _first_access(b, private=False)
    old_page = lands == "restrictedmem's page" and not faults
    _, code = _first_access(b, private=True)
    rmp_enc = bool(code) and all(c & RMP_ENC == RMP_ENC for c in code)
    held = stale and silent and not used and old_page and rmp_enc
    shown = ", ".join(f"{c:#x}" for c in code) or "no #NPF"
    return (CONFIRMED if held else REFUTED), (
        f"with two backings, as on the hardware: going shared a C=0 access after the return lands in {lands}, "
        f"{'without an' if silent and not faults else 'after an'} #NPF ({'' if stale else 'no '}stale-mapping); "
        f"going private the first C=1 access takes #NPF {shown}{' (RMP and ENC set)' if rmp_enc else ''}, and "
        f"{'an access' if used else 'nothing'} completes through the old leaf"
    )


def _faults_after_the_return(b: Bench, scenario: str, platform: str = "snp") -> list[str]:
    """The #NPFs between the return of the ioctl and the first stale access, in the shortest such run."""
    run = b.report(FLUSH, scenario, platform).trace("stale-mapping")
    events = [frame.event for frame in run.frames[1:] if frame.event is not None]
    back = max((n for n, event in enumerate(events) if event.call.startswith("return")), default=len(events))
    found = [note for event in events[back:] for note in event.notes if note.startswith("#NPF")]
    b.note(
        f"{FLUSH}, {platform}, {scenario}: after the return {events[-1].notes[-1]}, #NPFs before it: {len(found)}"
    )
    return found


def _first_access(b: Bench, private: bool, design: str = FLUSH) -> tuple[str, list[int]]:
    """Where the first access after a conversion lands on one emulated VM, and the codes of its #NPFs."""
    from ...emulator import VmError

    vm = b.vm(design, pages=2, vmm="kill")
    guest = vm.guest()
    if not private:
        guest.set_memory_encrypted(0, PAGE)
    guest.write(0, b"before")
    if private:
        vm.set_memory_attributes(0, PAGE, True)
        guest.set_private(0, True)
    else:
        guest.set_memory_decrypted(0, PAGE)
    seen, lands = len(vm.events), "no page"
    try:
        if private:
            guest.pvalidate(0, True)
        guest.write(0, b"after")
        pages = {vm.pfn(0, True): "restrictedmem's page", vm.pfn(0, False): "the shared page"}
        lands = pages[int(vm.mmu.walk(0, 0, 1)[0] >> 1) - 1]
    except VmError as wrong:
        lands = f"nothing ({wrong})"
    codes = [e.code for e in vm.events[seen:] if e.kind.startswith("npf") and e.code is not None]
    shown = ", ".join(f"{code:#x}" for code in codes) or "none"
    b.note(
        f"{design}, to {'private' if private else 'shared'}: the access lands in {lands}; codes of #NPFs: {shown}"
    )
    return lands, codes


@claim("C31", "MR", "perhaps the zap can be left out going private only; the gain would be lost in the noise")
def _c31(b: Bench) -> Finding:
    one_way = b.design("zap-to-shared-only")
    today = one_way.replace_text(one_way.text.replace("\nbase: ", "\nlinux: v6.19\nbase: "))
    back = b.bad(FLUSH, "host-io", "to-shared")
    kept = b.clean(one_way, "host-io", "to-shared")
    there, now = (b.bad(design, "tiny", "to-private", "round-trip") for design in (one_way, today))
    one_page = b.clean(one_way, "tiny", "round-trip", backing="in-place")
    if not (back and kept):
        return REFUTED, "it is no different going shared"
    stopped = "stale-mapping" not in there + now
    return (QUALIFIED if there or now else CONFIRMED), (
        f"not going shared ({listed(back)}). Going private with two backings "
        f"{'nothing completes through the old leaf, for the RMP stops it' if stopped else 'the old leaf is used'}; "
        f"but KVM's fault path then finds the leaf of the shared page (2023: {listed(there)}; v6.19: {listed(now)})"
        f"{'; in-place (4K) it can be left out' if one_page else ''}. What a zap costs nobody has published"
    )


@claim("C32", "MR", "on SEV there is no #NPF on a mismatch: it depends on the zap even more")
def _c32(b: Bench) -> Finding:
    sev, snp = (
        [s for s in ("tiny", "host-io") if b.fails("stale-mapping", FLUSH, s, platform=p)]
        for p in ("sev", "snp")
    )
    silent = not any(_faults_after_the_return(b, s, "sev") for s in sev)
    fine = b.clean("v8-post-hook", "tiny", "host-io", platform="sev")
    ways = {"tiny": "going private", "host-io": "going shared"}
    return (CONFIRMED if fine and silent and set(sev) > set(snp) else REFUTED), (
        f"with two backings, flushed and not zapped, the old page is used on sev {listed([ways[s] for s in sev])}, "
        f"{'without an #NPF' if silent else 'after an #NPF'}, on snp only {listed([ways[s] for s in snp])}; with the "
        f"zap sev is {'clean' if fine else 'not clean'}"
    )


@claim(
    "C33",
    "MR",
    "wherever the work is done: unmap before RMPUPDATE, restore after it, neither under a spinlock",
)
def _c33(b: Bench) -> Finding:
    kept = b.clean("pre-post-directmap", "tiny", "host-io", "host-stray")
    late = b.fails("host-rmp-fault", "rmp-under-lock-directmap-post", "tiny")
    early = b.fails("host-rmp-fault", "maps-too-early", "host-stray")
    held = b.verdict("sleep-in-atomic", "pre-post-as-typed") == ALWAYS
    split = b.clean("upstream", "tiny", "host-io")
    if not (kept and late and early and held):
        return REFUTED, "one of them can be broken without harm"
    enough = "; before RMPUPDATE a split of the 2M entry is enough (C22)" if split else ""
    return (QUALIFIED if split else CONFIRMED), (
        "a design that keeps all three is clean, and each of them broken alone kills the host or sleeps under "
        f"mmu_lock (the only spinning lock here){enough}"
    )


@claim(
    "C34",
    "ZW",
    "TDX needs no callback: zap from one EPT, fault into the other; outside mmu_lock is no problem",
)
def _c34(b: Bench) -> Finding:
    scenarios = ("tiny", "host-io", "round-trip")
    without = b.bad("never-rmpupdate", *scenarios, platform="tdx")  # v8 without its op
    outside = b.bad("v8-post-hook", *scenarios, platform="tdx")
    snp = b.bad("never-rmpupdate", "tiny")
    zap = b.bad("no-zap", *scenarios, platform="tdx")
    return (CONFIRMED if not without and not outside and snp and zap else REFUTED), (
        f"v8 without its op: {listed(without) if without else 'clean'} on tdx, {listed(snp)} on snp; with it, "
        f"outside mmu_lock: {listed(outside) if outside else 'clean'} on tdx; what tdx cannot do without is the zap "
        f"({listed(zap)})"
    )


@claim(
    "C35",
    "MR",
    "a write through a 2M mapping counts as one to the private page in it; TDX may tell them apart",
)
def _c35(b: Bench) -> Finding:
    near = {"page_assigned": False, "region_assigned": True}
    by_size = {size: HOST_ACCESS(op="write", mapping=size, **near) for size in (PG_2M, PG_4K)}
    b.note(f"{HOST_ACCESS.source}: a write to the host's own page beside one of the guest's: {by_size}")
    whole = b.fails("host-rmp-fault", "keeps-directmap", "tiny")
    split = b.clean("upstream", "tiny", "host-io")
    by_mapping = "mapping" in tdx_lines.WRITES.inputs
    b.note(f"{tdx_lines.WRITES.source}: what a write depends on: {', '.join(tdx_lines.WRITES.inputs)}")
    on_snp = by_size == {PG_2M: HOST_PF, PG_4K: OK} and whole and split
    return (CONFIRMED if on_snp and not by_mapping else QUALIFIED if on_snp else REFUTED), (
        "on snp a write to the host's own page through the 2M entry is an RMP fault as soon as the guest has any "
        "page of the region, and none once the entry is split; on tdx, by the specification as transcribed here, a "
        f"write matters {'by its mapping' if by_mapping else 'line by line, whatever maps it'}"
    )


@claim("C36", "MR", "an RMPUPDATE takes about 1 us; at worst 5 s for a guest of 16 GB")
def _c36(b: Bench) -> Finding:
    from ...emulator import linux
    from ...emulator.costs import RMPUPDATE_SECONDS

    counts = {}
    for large in (False, True):
        vm = b.vm("v8-post-hook", pages=16 << 18, private_2m=large)
        guest = vm.guest()
        guest.set_private(0, True, 16 << 30)
        linux.accept(guest, 0, 16 << 30, large=large)
        counts[large] = vm.counters["rmpupdate"]
        b.note(f"16 GiB accepted in {PG_2M if large else PG_4K}: {counts[large]:,} RMPUPDATEs")
    seconds = counts[False] * RMPUPDATE_SECONDS
    agree = 4 <= seconds <= 5
    return (QUALIFIED if agree else REFUTED), (
        f"a count, not a measurement: {counts[False]:,} RMPUPDATEs for 16 GiB in 4K; if one takes the quoted 1 us, "
        f"that is {seconds:.1f} s, so the two figures {'agree' if agree else 'do not agree'}; in 2M it is "
        f"{counts[True]:,}"
    )


@claim(
    "C37",
    "MR",
    "with lazy acceptance or without, pages are used soon after the request: deferral saves little",
)
def _c37(b: Bench) -> Finding:
    saved = {}
    for how in ("all at once", "lazily", "never"):
        early, later = (_accepted(b, design, how) for design in ("v8-post-hook", "defer-to-fault"))
        saved[how] = early - later
    none = saved["all at once"] == saved["lazily"] == 0 < saved["never"]
    return (CONFIRMED if none else REFUTED), (
        f"going private, RMPUPDATEs that deferring saves of 2,048: {saved['all at once']} where the guest accepts "
        f"all memory at once, {saved['lazily']} where it accepts 2M at a time and uses one page of each, for "
        f"PVALIDATE is an access; of memory that is asked for and never accepted it saves {saved['never']:,}"
    )


def _accepted(b: Bench, design: str, how: str) -> int:
    """The RMPUPDATEs of 8 MiB that go private, `how` they are accepted."""
    from ...emulator import linux

    vm, size, unit = b.vm(design, pages=2048), 8 << 20, 2 << 20
    guest = vm.guest()
    guest.set_private(0, True, size)
    if how == "lazily":
        for gpa in range(0, size, unit):
            linux.accept(guest, gpa, unit)
            guest.write(gpa, b"used")
    elif how == "never":
        guest.page_state_change(0, size, True)
    else:
        linux.accept(guest, 0, size)
    found = vm.counters.get("rmpupdate", 0)
    b.note(f"{design}, 8 MiB accepted {how}: {found:,} RMPUPDATEs")
    return found


@claim("C38", "ZW", "private and shared memory come from different sources, so the zap is needed on SNP too")
def _c38(b: Bench) -> Finding:
    scenarios = ("tiny", "host-io", "round-trip")
    two, one = (b.bad(FLUSH, *scenarios, backing=backing) for backing in BACKINGS)
    return (CONFIRMED if two and not one else REFUTED), (
        f"without it, flushed: with two backings {listed(two)}; where one page serves both kinds (in-place, 4K) "
        f"{listed(one)}, so there it would not be for that reason"
    )


@claim("C39", "MR", "if the callback is SNP's alone, the work may be deferred to the fault, under C33")
def _c39(b: Bench) -> Finding:
    design = b.design("defer-to-fault")
    bad = b.bad(design.name, "tiny", "to-private", "host-io", "round-trip")
    line = next(n for n, text in enumerate(design.lines("fault")) if "rmp_match" in text)
    locked = b.bad(design.move("fault", line, 2), "tiny")  # behind the stale test, so under mmu_lock
    discard, late = b.bad(design.name, "discard"), b.bad(out_of_the_file_first(design), "discard")
    if bad or not locked:
        return REFUTED, f"deferred: {listed(bad)}; with the work under mmu_lock: {listed(locked)}"
    return (QUALIFIED if discard else CONFIRMED), (
        "with two backings deferring in both directions is clean and keeps C33, since it stands before mmu_lock "
        f"(behind the stale test: {listed(locked)}); the conditions are those of C15, such as a discard that takes "
        f"the page out of the file first ({listed(late) if late else 'clean'}; v8's: {listed(discard)})"
    )


@claim("C40", "MR, ZW", "the directmap work stays in SNP's own code for now")
def _c40(b: Bench) -> Finding:
    calls = b.calls("upstream", "fault")
    own = "adjust_direct_map" in calls and "adjust_direct_map" not in b.calls("upstream", "ioctl")
    return SOURCE, (
        "a decision, not a statement about behaviour. v6.19 (upstream), as transcribed here, has it "
        f"{'in what SNP does to a page at its first fault, not in the ioctl' if own else 'elsewhere'}; "
        "what it breaks as a hook for every platform is C24"
    )

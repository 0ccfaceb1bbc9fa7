"""Who acts: vCPUs that run the guest, the thread that asks for the conversion, the host's kernel threads.

A guest knows eras: each conversion that it asks for begins a new one, and the kind of the page in an era is
fixed by the scenario.  What it may do follows `guest[gfn]`: "new" (just asked), "claimed" (one vCPU is at its
PVALIDATE), "accepted" (validated, not yet written), "ready" (written in this era, so a read has a meaning).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .hw import snp
from .hw.memory import GUEST_KEY, PLAIN, Content, readable_by_host, seen_by_guest
from .kernel.directmap import ABSENT, host_write
from .kernel.locks import leave
from .kvm.mmu import leaf
from .kvm.sev import ASID
from .state import View


class Access(NamedTuple):
    """One access by a guest: its kind (the C-bit), what it does, where, and the era in which it began."""

    kind: str
    op: str
    gfn: int
    era: int

    def __str__(self) -> str:
        if self.op.startswith("pvalidate"):
            return f"PVALIDATE({self.gfn}, {self.op[-1]})"
        return f"{self.op} gfn {self.gfn} {self.kind}"


def may_begin(s: View, gfn: int) -> list[Access]:
    """The accesses that a guest may begin now on `gfn`."""
    era = s.era
    if not s.conf.correct_guest:
        plain = [Access(k, op, gfn, 0) for k in ("shared", "private") for op in ("read", "write")]
        return [*plain, Access("private", "pvalidate1", gfn, 0)] if s.conf.has_rmp else plain
    if gfn not in s.conf.converted:
        return [Access(s.conf.eras[0], op, gfn, 0) for op in ("read", "write")]
    kind = s.conf.eras[era]
    if s.running and not s.conf.accesses_from_asked:
        return []
    ops: tuple[str, ...] = ("read", "write")
    if kind == "private" and s.conf.has_rmp:
        ops = {"new": ("pvalidate1",), "claimed": (), "accepted": ("write",), "ready": ops}[s.guest[gfn]]
    stray = [Access("shared", "write", gfn, era)] if s.conf.stray and kind == "private" else []
    return [*(Access(kind, op, gfn, era) for op in ops), *stray]


def guest_idle(s: View, me: str) -> None:
    """Between two accesses: begin one, if the guest may."""
    access = s.choose([a for gfn in s.conf.gfns for a in may_begin(s, gfn)])
    _begin(s, me, access)


def _begin(s: View, me: str, access: Access) -> None:
    s.acc[me] = access
    if access.op == "pvalidate1" and s.conf.correct_guest:
        s.guest[access.gfn] = "claimed"
    s.say(str(access))


def guest_between(s: View, me: str) -> str | None:
    """The asking vCPU between two conversions: go on using the page, or ask for the next one."""
    options: list[Access | None] = [a for gfn in s.conf.gfns for a in may_begin(s, gfn)]
    if all(s.guest[gfn] == "ready" for gfn in s.conf.gfns):
        options.append(None)
    access = s.choose(options)
    if access is None:
        s.say("has used the page")
        return f"ask{s.era + 1}"
    _begin(s, me, access)
    return None


def ask(s: View, me: str) -> str | None:
    """The guest asks for the next conversion; going shared it rescinds validation first (GHCB, PSC)."""
    s.era += 1
    s.running = s.conf.ioctls
    to = s.conf.eras[s.era]
    for gfn in s.conf.converted:
        if s.conf.correct_guest:
            s.guest[gfn] = "new"
    if to == "shared" and s.conf.has_rmp and s.conf.correct_guest:
        era: Any = s.era
        s.acc[me] = Access("private", "pvalidate0", s.conf.converted[0], era)
        s.say(f"asks: to {to}; {s.acc[me]}")
        return "rescind"
    s.say(f"asks: to {to}")
    return None


def ioctl_return(s: View, me: str) -> None:
    """Back from KVM_SET_MEMORY_ATTRIBUTES; with the last of them the conversion has returned."""
    leave(s, me, "returns to user")
    s.running -= 1


def auto_convert(s: View, me: str, kind: str) -> None:
    """The VMM answers KVM_EXIT_MEMORY_FAULT: it converts the page to the kind that was touched."""
    s.running += 1
    s.say(f"VMM converts to {kind}, as touched")


def vmm_waits(s: View, me: str) -> None:
    """The other VMM thread of two-vmms: has its own ioctl to do once the guest has asked."""
    s.wait(s.era > 0)
    s.say("issues its own ioctl")


def vmm_done(s: View, me: str) -> None:
    """A VMM thread that has nothing left to do."""
    s.wait(False)


def kvm_run_fails(s: View, me: str) -> None:
    """KVM_RUN returns an error that is no exit: the VMM gives the VM up."""
    s.violate("guest-killed", "KVM_RUN fails with -EINVAL")


def guest_runs(s: View, me: str) -> str:
    """In the guest with an access pending: fill the TLB from the NPT, or perform the access, or fault.

    One call is one of the three.  An #NPF drops the faulting vCPU's own TLB entry.
    """
    acc: Access = s.acc[me]
    if s.conf.correct_guest and acc.era != s.era and acc.gfn in s.conf.converted:
        s.acc[me] = None
        s.say("drops the access: the page is being converted")
        return _rest(s, me)
    pfn = s.tlb[me, acc.gfn]
    if pfn is None:
        pfn = leaf(s, acc.gfn)
        if pfn is None:
            return _npf(s, me, acc, present=False, rmp=False)
        if s.conf.rmp_checked_at == "fill" and (answer := _fill_check(s, me, acc, pfn)) != snp.OK:
            return _refused(s, me, acc, answer)
        s.tlb[me, acc.gfn] = pfn
        s.say(f"[TLB: gfn {acc.gfn} -> {pfn}]")
        if s.conf.huge and s.npt_2m:  # one 2M entry serves every gfn of the page
            for gfn in s.conf.gfns:
                s.tlb[me, gfn] = leaf(s, gfn)
        return "again"
    by_access = s.conf.rmp_checked_at == "access" or acc.op.startswith("pvalidate")
    answer = _rmp_check(s, acc, pfn) if by_access else _fill_check(s, me, acc, pfn)
    if answer != snp.OK:
        return _refused(s, me, acc, answer)
    return _complete(s, me, acc, pfn)


def _fill_check(s: View, me: str, acc: Access, pfn: str) -> str:
    """With the RMP checked at TLB fill: an entry allows what was checked when it was filled, and no more."""
    kind, op = s.checked[me, acc.gfn] or (None, None)
    if s.tlb[me, acc.gfn] is not None and kind == acc.kind and op in ("write", acc.op):
        return snp.OK
    answer = _rmp_check(s, acc, pfn)
    if answer == snp.OK:
        s.checked[me, acc.gfn] = (acc.kind, acc.op)
    return answer


def _rmp_check(s: View, acc: Access, pfn: str) -> str:
    if not s.conf.has_rmp:
        return snp.OK
    entry = s.rmp.get(pfn, snp.HYPERVISOR)
    op = "pvalidate" if acc.op.startswith("pvalidate") else acc.op
    return snp.guest_access(entry, enc=acc.kind == "private", op=op, asid=ASID, gpa=acc.gfn)


def _refused(s: View, me: str, acc: Access, answer: str) -> str:
    if answer == snp.NPF_RMP:
        return _npf(s, me, acc, present=True, rmp=True)
    s.say(f"#VC {snp.VC_NOT_VALIDATED_CODE:#x}: page not validated")
    if s.conf.correct_guest:
        s.violate("guest-killed", "#VC 0x404 on a page that the guest had validated")
    s.acc[me] = None
    return _rest(s, me)


def _npf(s: View, me: str, acc: Access, *, present: bool, rmp: bool) -> str:
    code = snp.npf_error_code(
        present=present, write=acc.op == "write", enc=acc.kind == "private" and s.conf.encrypts, rmp=rmp
    )
    s.tlb[me, acc.gfn] = None
    if s.conf.remembers_rmp_bit:
        s.rmp_bit[me] = rmp
    s.count("npf")
    s.say(f"#NPF {code:#x}{' RMP' if rmp else ''} gfn {acc.gfn} {acc.kind}")
    return f"fault-{acc.kind}" if s.conf.kind_from_c_bit else "fault"


def _complete(s: View, me: str, acc: Access, pfn: str) -> str:
    """The access completes through `pfn`: judge the mapping, then do what it does."""
    _judge_mapping(s, acc, pfn)
    s.acc[me] = None
    if acc.op.startswith("pvalidate"):
        return _pvalidate(s, me, acc, pfn)
    if acc.op == "write":
        key = GUEST_KEY if acc.kind == "private" and s.conf.encrypts else PLAIN
        content = Content("guest", key, acc.era)
        # What a careless guest writes before the conversion has returned is its own doing.
        asked_for = s.conf.correct_guest or (s.attr[acc.gfn] == "private" and not s.running)
        if acc.kind == "private" and asked_for and readable_by_host(content) and _host_maps(s, acc.gfn, pfn):
            s.violate("confidentiality", f"private write lands in clear in {pfn}, which the host can read")
        s.memory[pfn] = content
        meant = s.conf.correct_guest and acc.kind == s.conf.eras[acc.era]  # not a stray write
        if meant and s.guest[acc.gfn] != "ready":
            s.guest[acc.gfn] = "ready"
    else:
        _judge_read(s, acc, pfn)
    s.say(f"[{acc.op} done in {pfn}]")
    return _rest(s, me)


def _host_maps(s: View, gfn: int, pfn: str) -> bool:
    """Whether user space has the page mapped: the shared backing, or (in-place) any page that is shared."""
    return bool(pfn == s.conf.backing["shared", gfn] and (not s.conf.in_place or s.attr[gfn] == "shared"))


def _judge_mapping(s: View, acc: Access, pfn: str) -> None:
    """stale-mapping: once a conversion has returned, the mapping must be of the backing that the attribute names."""
    if s.era == 0 or s.running:
        return
    attr = s.attr[acc.gfn]
    if pfn != s.conf.backing[attr, acc.gfn]:
        s.violate("stale-mapping", f"{acc.kind} access completes in {pfn}, though the attribute is {attr}")
    elif (
        s.conf.in_place and s.conf.has_rmp and acc.kind == attr and s.rmp[pfn].assigned != (attr == "private")
    ):
        s.violate(
            "stale-mapping", f"{acc.kind} access completes, though the RMP entry of {pfn} is {s.rmp[pfn]}"
        )


def _judge_read(s: View, acc: Access, pfn: str) -> None:
    """integrity: a page that was written in this era shows what the guest or, if shared, the host wrote there."""
    if s.conf.has_rmp and acc.kind == s.attr[acc.gfn] == "shared" and pfn in s.rmp and s.rmp[pfn].assigned:
        s.count("silent-read")
        s.say(f"[{pfn} is still the guest's: ciphertext, no fault]")
    if not s.conf.correct_guest or s.guest[acc.gfn] != "ready":
        return
    content: Content = s.memory[pfn]
    from_guest = content.writer == "guest" and content.era == acc.era
    from_host = content.writer == "host" and acc.kind == "shared"
    seen = seen_by_guest(content, acc.kind == "private", s.conf.encrypts)
    if seen != "data" or not (from_guest or from_host):
        s.violate("integrity", f"{acc.kind} read of {pfn} returns {'noise' if seen != 'data' else content}")


def _pvalidate(s: View, me: str, acc: Access, pfn: str) -> str:
    validate = acc.op == "pvalidate1"
    code, entry = snp.pvalidate(s.rmp[pfn], validate)
    if code == snp.Pvalidate.NOUPDATE:
        s.say("PVALIDATE: carry set, nothing changed")
        if s.conf.correct_guest:
            s.violate("conversion-refused", f"PVALIDATE({acc.gfn}, {int(validate)}) changed nothing")
        return _rest(s, me)
    s.rmp[pfn] = entry
    if not validate:
        s.say(f"[{pfn} rescinded]")
        rest = s.conf.converted[s.conf.converted.index(acc.gfn) + 1 :]
        if not rest:
            return f"rescinded{s.era}"
        s.acc[me] = acc._replace(gfn=rest[0])
        return "again"
    if s.conf.correct_guest:
        s.guest[acc.gfn] = "accepted"
    s.say(f"[{pfn} validated]")
    return _rest(s, me)


def _rest(s: View, me: str) -> str:
    """Where a vCPU goes after an access: the asking one still has conversions to ask for in early eras."""
    return "between" if me == s.conf.asker and s.era + 1 < len(s.conf.eras) else "idle"


def host_thread(s: View, me: str, targets: tuple[str, ...]) -> None:
    """A kernel thread writes through the direct map to one of `targets` (PFNs); one write is one step.

    "stray" targets are written only while they are present; "io" ones only while the page is the host's.
    """
    pfn, _ = s.choose([t for t in targets if _host_may(s, *t)])
    if not s.conf.has_rmp:
        s.say(f"writes {pfn}")
        s.memory[pfn] = Content("host")
        return
    s.say(f"writes {pfn} through the directmap")
    if pfn not in s.directmap:
        s.memory[pfn] = Content("host")
        return
    answer = host_write(s, pfn)
    if answer == ABSENT:
        s.violate("kernel-bug", f"oops: {pfn} is not in the directmap")
    elif answer == snp.HOST_PF:
        s.violate("host-rmp-fault", f"#PF RMP: host write to {pfn}")
    elif pfn in s.memory:
        s.memory[pfn] = Content("host")


def _host_may(s: View, pfn: str, mode: str) -> bool:
    if mode == "stray":
        return bool(s.directmap[pfn] != ABSENT)
    if mode == "io":
        return bool(s.conf.eras[s.era] == "shared" and not s.running)
    return True


def out_of_sync(s: View) -> None:
    """out-of-sync, asked when nobody is inside an operation: do the four places agree?"""
    conf = s.conf
    for gfn in conf.gfns:
        attr = s.attr[gfn]
        named = conf.backing[attr, gfn]
        mapped = [leaf(s, gfn), *(s.tlb[where] for where in s.tlb if where[1] == gfn)]
        if any(pfn not in (None, named) for pfn in mapped):
            s.violate("out-of-sync", f"gfn {gfn} is {attr}, but a leaf or TLB entry maps another page")
        if not conf.has_rmp:
            continue
        private = conf.backing["private", gfn]
        entry = s.rmp[private]
        used = conf.correct_guest and s.guest[gfn] == "ready"
        if used and (
            (attr == "private" and not (entry.assigned and entry.validated))
            or (conf.in_place and attr == "shared" and entry.assigned)
        ):
            s.violate(
                "out-of-sync", f"gfn {gfn} is {attr} and in use, but the RMP entry of {named} is {entry}"
            )
        if entry.assigned and s.directmap_2m:
            s.violate("out-of-sync", f"{private} is assigned under a 2M directmap entry")
        if not entry.assigned and s.directmap[private] == ABSENT:
            s.violate("out-of-sync", f"{private} is the host's but missing from the directmap")
        if not conf.in_place and attr == "shared" and entry.assigned:
            s.count("residue")

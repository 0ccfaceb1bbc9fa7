"""Who acts: vCPUs that run the guest, the thread that asks for the conversion, the host's kernel threads.

A guest knows eras: each conversion that it asks for begins a new one, and the kind of the page in an era is
fixed by the scenario.  What it may do follows `guest[gfn]`: "new" (just asked), "claimed" (one vCPU is at its
PVALIDATE), "accepted" (validated, not yet written), "ready" (written in this era, so a read has a meaning).
"""

from __future__ import annotations

from typing import Any

from ..hw import snp
from ..hw.memory import Content, Gfn, Pfn
from ..hw.tdx.lines import HOST
from ..kernel import keyids
from ..kernel.directmap import ABSENT, host_write
from ..kernel.locks import leave
from ..model.state import View
from .access import Access


def may_begin(s: View, gfn: Gfn) -> list[Access]:
    """The accesses that a guest may begin now on `gfn`."""
    era = s.era
    if not s.conf.correct_guest:
        return anything(s.conf, gfn)
    if gfn not in s.conf.converted:
        return [Access(s.conf.eras[0], op, gfn, 0) for op in ("read", "write")]
    kind = s.conf.eras[era]
    if s.running and not s.conf.accesses_from_asked:
        return []
    if kind == "shared" and s.slot == "none":
        return [Access(kind, "read", gfn, era)]  # the guest probes for memory
    if s.conf.tdx and kind == "private":
        return _tdx_private(s, gfn)
    ops: tuple[str, ...] = ("read", "write")
    if kind == "private" and s.conf.has_rmp:
        ops = {"new": _validate(s, gfn), "claimed": (), "accepted": ("write",), "ready": ops}[s.guest[gfn]]
    stray = [Access("shared", "write", gfn, era)] if s.conf.stray and kind == "private" else []
    return [*(Access(kind, op, gfn, era) for op in ops), *stray]


def _tdx_private(s: View, gfn: Gfn) -> list[Access]:
    """A TD that has asked for private: ACCEPT first; until then a stray read still goes through the old PTE."""
    ops = {"new": ("accept",), "claimed": (), "accepted": ("write",), "ready": ("read", "write")}[
        s.guest[gfn]
    ]
    found = [Access("private", op, gfn, s.era) for op in ops]
    if s.guest[gfn] in ("new", "claimed"):
        found.append(Access("shared", "zeropad", gfn, s.era))  # load_unaligned_zeropad()
    return [*found, *([Access("shared", "write", gfn, s.era)] if s.conf.stray else [])]


def anything(conf: Any, gfn: Gfn) -> list[Access]:
    """What a careless guest does: any C-bit at any time; a hostile one rescinds as it likes, too."""
    found = [Access(kind, op, gfn, 0) for kind in ("shared", "private") for op in ("read", "write")]
    if conf.tdx:
        return [*found, Access("private", "accept", gfn, 0)]
    ops = ("pvalidate1", "pvalidate0") if conf.hostile else ("pvalidate1",)
    return [*found, *(Access("private", op, gfn, 0) for op in ops if conf.has_rmp)]


def _validate(s: View, gfn: Gfn) -> tuple[str, ...]:
    """How Linux validates: where guest_memfd has a 2M page it tries 2M at its head, the others wait for that."""
    if not s.conf.folio_2m:
        return ("pvalidate1",)
    head = s.conf.gfns[0]
    if gfn == head:
        return ("pvalidate2M",)
    return ("pvalidate1",) if s.guest[head] in ("accepted", "ready") else ()


def guest_idle(s: View, me: str) -> str | None:
    """Between two accesses: begin one, if the guest may; where there is SMM, enter or leave it."""
    options: list[Access | str] = [a for gfn in s.conf.used for a in may_begin(s, gfn)]
    access = s.choose([*options, *(["RSM" if s.smm[me] else "SMI"] if s.conf.smm else [])])
    if isinstance(access, str):
        _switches(s, me, access)
        return "idle"
    _begin(s, me, access)
    return None


def _switches(s: View, me: str, how: str) -> None:
    """Into SMM or out of it: another root of the page tables, so nothing in the TLB is used on."""
    s.smm[me] = how == "SMI"
    for gfn in s.conf.gfns:
        s.tlb[me, gfn] = None
    s.say(how)


def _begin(s: View, me: str, access: Access) -> None:
    s.acc[me] = access
    if access.op in ("pvalidate1", "pvalidate2M", "accept") and s.conf.correct_guest:
        s.guest[access.gfn] = "claimed"
    s.say(str(access))


def guest_between(s: View, me: str) -> str | None:
    """The asking vCPU between two conversions: go on using the page, or ask for the next one."""
    options: list[Access | None] = [a for gfn in s.conf.used for a in may_begin(s, gfn)]
    if all(s.guest[gfn] == "ready" for gfn in s.conf.used):
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
    s.running += s.conf.ioctls if s.era == 1 else 1
    to = s.conf.eras[s.era]
    if s.conf.tdx:
        s.mode[me] = "host"  # TDG.VP.VMCALL<MapGPA> leaves the TD
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


def vmm_punches(s: View, me: str) -> None:
    """The other VMM thread of vmm-punches: discards the private pages, at any time."""
    s.say("fallocate(PUNCH_HOLE)")


def vmm_done(s: View, me: str) -> None:
    """A VMM thread that has nothing left to do."""
    s.wait(False)


def kvm_run_fails(s: View, me: str) -> None:
    """KVM_RUN returns an error that is no exit: the VMM gives the VM up."""
    s.violate("guest-killed", "KVM_RUN fails with -EINVAL")


def host_thread(s: View, me: str, targets: tuple[str, ...]) -> None:
    """A kernel thread writes through the directmap to one of `targets` (PFNs); one write is one step.

    "stray" targets are written only while they are present; "io" ones only while the page is the host's;
    "freed" ones once guest_memfd has given the page back, for then it is anybody's.
    """
    pfn, _ = s.choose([t for t in targets if _host_may(s, *t)])
    if s.conf.tdx:
        _host_writes_tdx(s, pfn)
        return
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


def _host_writes_tdx(s: View, pfn: Pfn) -> None:
    """An ordinary store with KeyID 0, which nothing checks; with the erratum switched on, a partial one as well."""
    s.say(f"writes {pfn} through the directmap")
    if pfn in s.directmap and not keyids.mapped(s, pfn, "write"):
        return
    if s.conf.partial_write_erratum and s.choose((False, True)):
        s.say("[less than a line]")
        keyids.partial_store(s, pfn, Content("host"))
    else:
        keyids.store(s, pfn, HOST, Content("host"), "host")


def _host_may(s: View, pfn: Pfn, mode: str) -> bool:
    if mode == "freed":
        return bool(s.gmem[s.conf.gfn_of[pfn]] == "free")
    if mode == "stray":
        return bool(s.directmap[pfn] != ABSENT)
    if mode == "io":
        return bool(s.conf.eras[s.era] == "shared" and not s.running)
    return True

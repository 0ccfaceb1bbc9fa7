"""A vCPU in the guest with an access pending: translate, check, complete, or fault (snp, sev, sw).

What the access finds is judged here: the mapping it went through, the data it read, who can read what it wrote.
"""

from __future__ import annotations

from typing import NamedTuple

from ..hw import snp
from ..hw.memory import GUEST_KEY, PLAIN, Content, Gfn, Pfn, readable_by_host, seen_by_guest
from ..hw.snp import pages as snp_pages
from ..kvm.memslots import in_smm, srcu_read_lock, srcu_read_unlock
from ..kvm.mmu import drop_translation, fill_translation, leaf, mapped_size
from ..kvm.sev import ASID, store_entry
from ..model.state import View


class Access(NamedTuple):
    """One access by a guest: its kind (the C-bit), what it does, where, and the era in which it began."""

    kind: str
    op: str
    gfn: Gfn
    era: int

    def __str__(self) -> str:
        if self.op == "accept":
            return f"ACCEPT({self.gfn})"
        if self.op == "zeropad":
            return f"stray read gfn {self.gfn} {self.kind}"
        if self.op == "pvalidate2M":
            return f"PVALIDATE({self.gfn}, 1) 2M"
        if self.op.startswith("pvalidate"):
            return f"PVALIDATE({self.gfn}, {self.op[-1]})"
        return f"{self.op} gfn {self.gfn} {self.kind}"


def guest_runs(s: View, me: str) -> str:
    """In the guest with an access pending: fill the TLB from the NPT, or perform the access, or fault.

    One call is one of the three.  An #NPF drops the faulting vCPU's own TLB entry.
    """
    acc: Access = s.acc[me]
    srcu_read_unlock(s, me)
    if s.conf.correct_guest and acc.era != s.era and acc.gfn in s.conf.converted:
        s.acc[me] = None
        s.say("drops the access: the page is being converted")
        return _rest(s, me)
    pfn = s.tlb[me, acc.gfn]
    if pfn is None:
        pfn = leaf(s, acc.gfn, in_smm(s, me))
        if pfn is None:
            return _npf(s, me, acc, present=False, rmp=False)
        if s.conf.rmp_checked_at == "fill" and (answer := _fill_check(s, me, acc, pfn)) != snp.OK:
            return _refused(s, me, acc, answer, pfn)
        fill_translation(s, me, acc.gfn, pfn)
        s.say(f"[TLB: gfn {acc.gfn} -> {pfn}]")
        return "again"
    if acc.op.startswith("pvalidate"):
        return _pvalidate(s, me, acc, pfn)
    by_access = s.conf.rmp_checked_at == "access"
    answer = _rmp_check(s, me, acc, pfn) if by_access else _fill_check(s, me, acc, pfn)
    if answer != snp.OK:
        return _refused(s, me, acc, answer, pfn)
    return _complete(s, me, acc, pfn)


def _fill_check(s: View, me: str, acc: Access, pfn: Pfn) -> str:
    """With the RMP checked at TLB fill: an entry allows what was checked when it was filled, and no more."""
    kind, op = s.checked[me, acc.gfn] or (None, None)
    if s.tlb[me, acc.gfn] is not None and kind == acc.kind and op in ("write", acc.op):
        return snp.OK
    answer = _rmp_check(s, me, acc, pfn)
    if answer == snp.OK:
        s.checked[me, acc.gfn] = (acc.kind, acc.op)
    return answer


def _rmp_check(s: View, me: str, acc: Access, pfn: Pfn) -> str:
    if not s.conf.has_rmp:
        return snp.OK
    op = "pvalidate" if acc.op.startswith("pvalidate") else acc.op
    return snp.guest_access(
        s.rmp.get(pfn, snp.HYPERVISOR), enc=acc.kind == "private", op=op, asid=ASID, gpa=acc.gfn,
        size=mapped_size(s, me), region_assigned=_region_assigned(s, me, acc),
    )  # fmt: skip


def _region_assigned(s: View, me: str, acc: Access) -> bool:
    """Whether a page of the 2M region is assigned, where the check asks for more than the page itself."""
    asked = mapped_size(s, me) != snp.PG_4K and acc.op == "write" and acc.kind == "shared"
    return asked and any(s.rmp[p].assigned for p in s.rmp)


def _refused(s: View, me: str, acc: Access, answer: str, pfn: Pfn) -> str:
    if answer == snp.NPF_RMP:
        sizem = s.conf.access_sets_sizem and _too_large(s, me, acc, pfn)
        return _npf(s, me, acc, present=True, rmp=True, sizem=sizem)
    s.say(f"#VC {snp.VC_NOT_VALIDATED_CODE:#x}: page not validated")
    if s.conf.correct_guest:
        s.violate("guest-killed", "#VC 0x404 on a page that the guest had validated")
    s.acc[me] = None
    return _rest(s, me)


def _too_large(s: View, me: str, acc: Access, pfn: Pfn) -> bool:
    """Whether nothing but the size of the mapping is wrong."""
    return snp.fails_for_size(
        s.rmp.get(pfn, snp.HYPERVISOR), enc=acc.kind == "private", op=acc.op, asid=ASID, gpa=acc.gfn,
        size=mapped_size(s, me), region_assigned=_region_assigned(s, me, acc),
    )  # fmt: skip


def _npf(s: View, me: str, acc: Access, *, present: bool, rmp: bool, sizem: bool = False) -> str:
    enc = acc.kind == "private" and s.conf.encrypts
    code = snp_pages.npf_code(present=present, write=acc.op == "write", enc=enc, rmp=rmp, sizem=sizem)
    drop_translation(s, me, acc.gfn)
    srcu_read_lock(s, me)
    s.rmp_bit[me] = "SIZEM" if sizem else "RMP" if rmp else None
    s.count("npf")
    s.say(f"#NPF {code:#x}{' RMP' if rmp else ''}{' SIZEM' if sizem else ''} gfn {acc.gfn} {acc.kind}")
    return f"fault-{acc.kind}" if s.conf.kind_from_c_bit else "fault"


def _complete(s: View, me: str, acc: Access, pfn: Pfn) -> str:
    """The access completes through `pfn`: judge the mapping, then do what it does."""
    _judge_mapping(s, acc, pfn)
    s.acc[me] = None
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


def _host_maps(s: View, gfn: Gfn, pfn: Pfn) -> bool:
    """Whether user space has the page mapped: the shared backing, or (in-place) any page that is shared."""
    return bool(pfn == s.conf.backing["shared", gfn] and (not s.conf.in_place or s.attr[gfn] == "shared"))


def _judge_mapping(s: View, acc: Access, pfn: Pfn) -> None:
    """stale-mapping: once a conversion has returned, the mapping must be of the backing that the attribute names.

    A page that guest_memfd has freed is never anybody's backing.
    """
    if pfn == s.conf.backing["private", acc.gfn] and s.gmem[acc.gfn] == "free":
        s.violate("stale-mapping", f"{acc.kind} access completes in {pfn}, which guest_memfd has freed")
        return
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


def _judge_read(s: View, acc: Access, pfn: Pfn) -> None:
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


def _pvalidate(s: View, me: str, acc: Access, pfn: Pfn) -> str:
    """PVALIDATE through the translation `pfn`: ownership and sizes, then Validated and the carry flag."""
    validate, head = acc.op != "pvalidate0", s.conf.gfns[0]
    code, entry = snp_pages.pvalidate_at(
        s.rmp.get(pfn, snp.HYPERVISOR), validate, asid=ASID, gpa=acc.gfn,
        asked=snp.PG_2M if acc.op == "pvalidate2M" else snp.PG_4K,
        mapping=mapped_size(s, me), part=acc.gfn != head, enc=acc.kind == "private",
    )  # fmt: skip
    if code in (snp.NPF_RMP, snp_pages.SIZEM):
        return _npf(s, me, acc, present=True, rmp=True, sizem=code == snp_pages.SIZEM)
    _judge_mapping(s, acc, pfn)
    if code == snp.Pvalidate.FAIL_SIZEMISMATCH:
        s.acc[me] = acc._replace(op="pvalidate1")  # Linux goes on with 4K pages
        s.say("PVALIDATE: FAIL_SIZEMISMATCH; goes on in 4K")
        return "again"
    s.acc[me] = None
    if code == snp.Pvalidate.NOUPDATE:
        s.say("PVALIDATE: carry set, nothing changed")
        if s.conf.correct_guest:
            s.violate("conversion-refused", f"PVALIDATE({acc.gfn}, {int(validate)}) changed nothing")
        return _rest(s, me)
    store_entry(s, pfn, entry)
    s.say(f"[{pfn} {'validated' if validate else 'rescinded'}]")
    return _accepted(s, me, acc) if validate else _rescinded(s, me, acc)


def _accepted(s: View, me: str, acc: Access) -> str:
    for gfn in s.conf.gfns if acc.op == "pvalidate2M" else (acc.gfn,):
        if s.conf.correct_guest:
            s.guest[gfn] = "accepted"
    return _rest(s, me)


def _rescinded(s: View, me: str, acc: Access) -> str:
    """The next gfn of the request; after the last, the guest asks.  A hostile guest just goes on."""
    if not s.conf.correct_guest:
        return _rest(s, me)
    rest = s.conf.converted[s.conf.converted.index(acc.gfn) + 1 :]
    if not rest:
        return f"rescinded{s.era}"
    s.acc[me] = acc._replace(gfn=rest[0])
    return "again"


def completed_by_userspace(s: View, me: str) -> str:
    """Userspace answers for memory that is not there; the guest goes on behind the access."""
    s.acc[me] = None
    return _rest(s, me)


def _rest(s: View, me: str) -> str:
    """Where a vCPU goes after an access: the asking one still has conversions to ask for in early eras."""
    return "between" if me == s.conf.asker and s.era + 1 < len(s.conf.eras) else "idle"

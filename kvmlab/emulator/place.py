"""Named states of a page, by the calls that lead there: where tests and lessons begin (`vm.place`, `vm.placed`).

A state is reached as a VMM and a guest reach it: the attribute's ioctl, a fault, PVALIDATE or ACCEPT; so a design has
its say, and what it answers is raised.  Three things no KVM does, and a wrong host can: RMPUPDATE alone takes back a
page that the design has assigned already, BLOCK alone leaves an entry BLOCKED, xa_store() alone makes the attribute
say the other thing (`attribute`).  Each is the instruction, the SEAMCALL or the store itself, and an event.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from ..errors import InputError, shown
from ..hw.snp.pages import PAGES_2M
from ..hw.tdx.entry import State
from . import linux, psc
from .events import VmError
from .guest import Guest
from .ioctl import set_memory_attributes
from .kvm_calls import Zap
from .memory import PAGE, prefix
from .rmp import OURS
from .tdx_kvm import TdxKvm
from .tdx_walk import TdWalker
from .vm_state import VmState

SHARED, PRIVATE, ASSIGNED, VALIDATED = "shared", "private", "assigned", "validated"
ATTRIBUTES = (PRIVATE, SHARED)
SNP = {
    SHARED: "attribute shared; the private page is the hypervisor's; the guest has read the shared one",
    PRIVATE: "attribute private; the page is the hypervisor's still, as before the first fault",
    ASSIGNED: "attribute private; the page is assigned to the guest at this gfn, not validated",
    VALIDATED: "the same, validated",
}
TDX = {
    SHARED: "attribute shared, no entry; the guest has read the shared page",
    State.FREE: "attribute private; nothing mapped",
    State.PENDING: "attribute private; a page added (AUG), not accepted",
    State.MAPPED: "the same, accepted",
    State.BLOCKED: "MAPPED, then BLOCK and nothing else: only a wrong host leaves it so",
    State.PENDING_BLOCKED: "PENDING, then BLOCK and nothing else: only a wrong host leaves it so",
}
OTHERS = {
    SHARED: "attribute shared; the guest has read the page",
    PRIVATE: "attribute private; nothing mapped",
}
STATES: dict[str, Mapping[str, str]] = {"snp": SNP, "tdx": TDX, "sev": OTHERS, "sw": OTHERS}
CHAIN = (State.FREE, State.PENDING, State.MAPPED)  # in which a TD's page gets on
BEFORE_BLOCK: dict[str, State] = {State.BLOCKED: State.MAPPED, State.PENDING_BLOCKED: State.PENDING}


def place(guest: Guest, gpa: int, state: str, size: int, attribute: str | None) -> None:
    """Bring pages into a state, each run of pages that are alike by the same calls."""
    vm = guest.vm
    known = STATES[vm.platform]
    if state not in known:
        raise InputError(f"Vm.place(state={shown(state)}): on {vm.platform} there are: {', '.join(known)}")
    lo, hi = gpa // PAGE, (gpa + size) // PAGE
    if sum(b - a for slot, a, b in vm.slots.pieces(lo, hi) if slot.gmem) < hi - lo:
        raise InputError(
            f"Vm.place(gpa={gpa:#x}, size={size:#x}): not all of it is a memslot with a guest_memfd"
        )
    for _, run in groupby(range(lo, hi), key=lambda gfn: placed(vm, gfn)):
        gfns = list(run)
        _run(guest, gfns[0], len(gfns), state)
        for gfn in gfns:
            if (now := placed(vm, gfn)) != (state, SHARED if state == SHARED else PRIVATE):
                raise VmError(
                    f"{vm.design.name} brings gpa {gfn * PAGE:#x} to {' and '.join(now)}, not to {state}"
                )
    if attribute is not None:
        vm.attributes.store(lo, hi, attribute == PRIVATE)


def placed(vm: VmState, gfn: int) -> tuple[str, str]:
    """The state of a page, and its attribute; "foreign": assigned to others (firmware, too), or at another gfn."""
    attribute = PRIVATE if vm.attributes.is_private(gfn) else SHARED
    if vm.tdx:
        entry = vm.tdx.module.entry(gfn)
        return (attribute if entry == State.FREE and attribute == SHARED else str(entry)), attribute
    slot = vm.slots.find(gfn)
    pfn = slot.private_pfn(gfn) if vm.has_rmp and slot and slot.gmem else None
    if pfn is None or not (found := vm.rmp.entry(pfn)).assigned:
        return attribute, attribute
    if found.asid != OURS or vm.rmp.gfn[pfn] != gfn:
        return "foreign", attribute
    return (VALIDATED if found.validated else ASSIGNED), attribute


def _run(guest: Guest, gfn: int, n: int, state: str) -> None:
    """Pages alike: the conversion, then what the platform has beyond it; what is shared is read."""
    vm = guest.vm
    if vm.tdx:
        _tdx(guest, vm.tdx, gfn, n, state)
    else:
        _convert(guest, gfn, n, state != SHARED)
    if vm.has_rmp:
        _snp(guest, gfn, n, state)
    if state == SHARED:
        guest.touch(gfn * PAGE, n * PAGE, "read")


def _convert(guest: Guest, gfn: int, n: int, private: bool) -> None:
    vm = guest.vm
    if (
        vm.has_rmp or vm.attributes.is_private(gfn) != private
    ):  # v8's assigns, whatever the attribute said before
        set_memory_attributes(vm, gfn * PAGE, n * PAGE, private)
    guest.set_private(gfn * PAGE, private, n * PAGE)


def _snp(guest: Guest, gfn: int, n: int, state: str) -> None:
    """The RMP entry: the guest's PVALIDATE, there (whose fault assigns the page) and back; or RMPUPDATE alone."""
    vm = guest.vm
    now, slot = placed(vm, gfn)[0], vm.slots.find(gfn)
    if state in ATTRIBUTES and now not in ATTRIBUTES and slot:
        _take_back(vm, slot.private_pfn(gfn), n, gfn)
    elif state not in ATTRIBUTES and now != state:
        if now != VALIDATED:
            _pvalidate(guest, gfn, n, True)
        if state == ASSIGNED:
            _pvalidate(guest, gfn, n, False)


def _take_back(vm: VmState, pfn: int, n: int, gfn: int) -> None:
    """RMPUPDATE alone, by 4K."""
    for head in range(pfn - pfn % PAGES_2M, pfn + n, PAGES_2M):
        if vm.rmp.big(head)[0]:
            vm.rmp.psmash(head)
            vm.log.add("psmash", "OK", head, 1, 0)
    done, code = vm.rmp.update(pfn, n, None)
    vm.log.add("rmpupdate", "shared 4K", pfn, done, int(code))
    vm.mmu.drop_pages(gfn, gfn + n)


def _pvalidate(guest: Guest, gfn: int, n: int, validate: bool) -> None:
    for at, count, large in psc.plan(gfn, gfn + n, guest.vm.huge(True)):
        linux.pvalidate(guest, at, count * (PAGES_2M if large else 1), large, validate)


def _tdx(guest: Guest, td: TdxKvm, gfn: int, n: int, state: str) -> None:
    """The entry: forward by the fault of an ACCEPT and the ACCEPT, back by way of shared; then BLOCK alone."""
    (now, attribute), wanted = placed(guest.vm, gfn), BEFORE_BLOCK.get(state) or state
    if (now, attribute) != (state, PRIVATE):
        if wanted == SHARED or now not in CHAIN[: CHAIN.index(wanted) + 1]:
            _convert(guest, gfn, n, False)
        if wanted != SHARED:
            _convert(guest, gfn, n, True)
        if wanted == State.PENDING:
            _add(guest, td, gfn, n)
        elif wanted == State.MAPPED and now != State.MAPPED:
            guest.accept_range(gfn * PAGE, n * PAGE)
        if wanted != state and td.module.entry(gfn) == wanted:
            for slot, lo, hi in guest.vm.slots.pieces(gfn, gfn + n):
                Zap(guest.vm, "place()", "block", slot, lo, hi).run()


def _add(guest: Guest, td: TdxKvm, gfn: int, n: int) -> None:
    """The faults that an ACCEPT takes, without the ACCEPT that ends it."""
    walker, states = TdWalker(guest.vmm, td, 0, "write", True), td.module.states(gfn, gfn + n)
    while not states.all():
        td.enter(0)
        first = prefix(states != 0)
        walker.fault(gfn + first, n - first, accept=True)

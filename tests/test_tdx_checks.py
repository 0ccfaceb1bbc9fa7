"""The order of the module's checks, as data, and that whoever asks the module is answered in that order.

For each leaf the checks that refuse are made to, two neighbours at a time, and the earlier one is told; by the
checks alone, by the reference Module, by a step of the explorer and by the emulator.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from step_tools import Machine
from test_tdx_module import GPA, HPA, LARGE, TDR, World, large, split

from kvmlab import Design, TdxError, Vm
from kvmlab.emulator import PlatformError
from kvmlab.emulator.kvm_calls import run_fault
from kvmlab.emulator.tdx_kvm import ENTERING, INSIDE
from kvmlab.emulator.tdx_module import CODE
from kvmlab.hw.tdx import (
    CHECKS,
    Age,
    Answer,
    Check,
    Leaf,
    Level,
    Operand,
    State,
    Status,
    answer,
    busy,
    seamcall,
    told,
)
from kvmlab.hw.tdx.locks import EXCLUSIVE, LOCKS, SHARED, EntryLock, Lock
from kvmlab.hw.tdx.pamt import PageType, PamtEntry
from kvmlab.hw.tdx.sept import UNBLOCKED, Children
from kvmlab.hw.tdx.structures import Result
from kvmlab.hw.tdx.td import Lifecycle, OpState, TdState
from kvmlab.hw.tdx.tlb import ZeroStep
from kvmlab.kvm import tdx as kvm_tdx

FREE, NL_MAPPED, NL_BLOCKED, MAPPED, BLOCKED, PENDING, PENDING_BLOCKED = State
ADDS = (Leaf.PAGE_ADD, Leaf.SEPT_ADD, Leaf.PAGE_AUG)
TAKES_PAGE = (*ADDS, Leaf.PAGE_DEMOTE)
EARLY = TdState(op_state=OpState.INITIALIZED)
# What an entry is, and a TD, for a leaf that is to succeed; where nothing is said it is FREE, and the TD runs.
STATES = {
    Leaf.RANGE_BLOCK: PENDING, Leaf.RANGE_UNBLOCK: PENDING_BLOCKED, Leaf.PAGE_REMOVE: PENDING_BLOCKED,
    Leaf.PAGE_DEMOTE: PENDING_BLOCKED, Leaf.PAGE_PROMOTE: NL_BLOCKED, Leaf.SEPT_REMOVE: NL_BLOCKED,
    Leaf.ACCEPT: PENDING,
}  # fmt: skip
LIVES = {
    Leaf.PAGE_ADD: EARLY, Leaf.MR_FINALIZE: EARLY, Leaf.MNG_KEY_FREEID: TdState(Lifecycle.BLOCKED),
    Leaf.PAGE_RECLAIM: TdState(Lifecycle.TEARDOWN),
}  # fmt: skip
HELD = {
    Check.TDR: Lock.TDR, Check.OP_STATE_LOCK: Lock.OP_STATE, Check.EPOCH: Lock.EPOCH, Check.TREE: Lock.TREE,
    Check.PARENTS: Lock.PARENTS, Check.PAMT: Lock.PAMT, Check.LARGE: Lock.LARGE,
}  # fmt: skip
UNBLOCKED_STATE = UNBLOCKED | {NL_BLOCKED: NL_MAPPED}
NOT_TOGETHER = {Check.STATE, Check.BLOCKED}  # both ask for the entry's state


def wrong_state(leaf: Leaf) -> State:
    """A state in which a leaf does not take the entry; ACCEPT is told of it, and does not leave the TD."""
    return MAPPED if leaf in (*ADDS, Leaf.ACCEPT, Leaf.RANGE_UNBLOCK) else FREE


class ByTheChecks:
    """The checks alone, in a situation that is told."""

    checks = CHECKS

    def __init__(self, leaf: Any) -> None:
        self.leaf = leaf
        self.held: dict[Lock, str] = {}
        self.told: dict[str, Any] = {"td": LIVES.get(leaf, TdState()), "state": STATES.get(leaf, FREE)}
        self.told["children"] = Children.MAPPED if leaf == Leaf.PAGE_PROMOTE else Children.FREE

    def spoil(self, check: Any) -> None:
        td, state = self.told["td"], self.told["state"]
        self.told |= {
            Check.TREE: {"armed": True},
            Check.BUILT: {"td": td._replace(fatal=True)},
            Check.KEYS: {"td": td._replace(lifecycle=Lifecycle.TEARDOWN)},
            Check.OP_STATE: {"td": td._replace(op_state=OpState.UNINITIALIZED)},
            Check.NAMED: {"named": False},
            Check.WALK: {"above": (Level.PD, NL_BLOCKED)},
            Check.ENTRY: {"entry_lock": EntryLock(taken=True)},
            Check.STATE: {"state": wrong_state(self.leaf)},
            Check.BLOCKED: {"state": UNBLOCKED_STATE.get(state, state)},
            Check.TRACKED: {"tracked": False},
            Check.FORM: {"form": Status.OPERAND_ADDR_RANGE_ERROR},
            Check.PAGE: {"page": Status.PAGE_METADATA_INCORRECT},
            Check.CHILD: {"child_locked": True},
            Check.CHILDREN: {"children": Children.MIXED},
            Check.INTERRUPT: {"interrupted": True},
            Check.PREVIOUS: {"previous_inside": True},
            Check.STEPPING: {"armed": True, "steps": True},
            Check.READY: {"ready": False},
            Check.ENDING: {"ready": False, "td": TdState(Lifecycle.HKID_ASSIGNED)},
        }.get(check, {})
        if check in HELD:
            self.held[HELD[check]] = EXCLUSIVE

    def answer(self) -> Answer:
        return answer(self.leaf, told(self.held, **self.told))

    def rax(self) -> Any:
        return self.answer().rax


MODULES = {leaf: CHECKS[leaf] for leaf in (*STATES, *ADDS, Leaf.TRACK, Leaf.VP_ENTER)}


class InTheModule:
    """The reference Module, with dictionaries, locks held by hand and bytes for addresses."""

    checks = MODULES

    def __init__(self, leaf: Any) -> None:
        self.leaf, self.gpa, self.hpa, self.level = leaf, GPA, HPA, Level.PT
        if leaf in (Leaf.PAGE_DEMOTE, Leaf.PAGE_PROMOTE):
            self.level = Level.PD
            self.world = large(PENDING) if leaf == Leaf.PAGE_DEMOTE else split()
        else:
            self.level = Level.PD if leaf in (Leaf.SEPT_ADD, Leaf.SEPT_REMOVE) else Level.PT
            down_to = Level.PD if leaf == Leaf.SEPT_ADD else Level.PT
            self.world = World(down_to, finalize=leaf != Leaf.PAGE_ADD)
        self.module, self.td = self.world.module, self.world.td
        if STATES.get(leaf) in (PENDING, PENDING_BLOCKED) and leaf != Leaf.PAGE_DEMOTE:
            assert self.world.aug(GPA, HPA).ok
        if STATES.get(leaf) in (PENDING_BLOCKED, NL_BLOCKED) and leaf != Leaf.PAGE_PROMOTE:
            self.world.block_and_track(self.level)
        if leaf == Leaf.PAGE_DEMOTE:
            self.hpa = 0x30000
        if leaf == Leaf.ACCEPT:
            assert self.world.vp_enter(self.world.vcpu).ok
        self.entry = self.td.entry(GPA, self.level)

    @property
    def page(self) -> tuple[Level, int]:
        """The PAMT key of the page given, or else of what the entry points to."""
        return (Level.PT, self.hpa) if self.leaf in TAKES_PAGE else (Level.PT, self.entry.hpa)

    def spoil(self, check: Any) -> None:
        module, td, vcpu = self.module, self.td, self.world.vcpu
        match check:
            case Check.TDR | Check.OP_STATE_LOCK | Check.EPOCH | Check.TREE:
                module.hold(HELD[check], TDR)
                vcpu.stepping = ZeroStep(6, (GPA,)) if check == Check.TREE else vcpu.stepping
            case Check.BUILT:
                td.fatal = True
            case Check.OP_STATE:
                td.op_state = OpState.UNINITIALIZED
            case Check.NAMED:
                self.gpa += 1
            case Check.WALK:
                up = Level(self.level + 1)
                td.entry(GPA // (up.pages * 4096) * up.pages * 4096, up).state = NL_BLOCKED
            case Check.ENTRY:
                module.hold_entry(td, GPA, self.level)
            case Check.STATE:
                self.entry.state = wrong_state(self.leaf)
            case Check.BLOCKED:
                self.entry.state = UNBLOCKED_STATE[self.entry.state]
            case Check.TRACKED:
                key = (self.level if self.entry.state.leaf else Level.PT), self.entry.hpa
                module.pamt[key] = module.pamt_of(key[1], key[0])._replace(bepoch=td.epochs.td_epoch)
            case Check.FORM:
                self.hpa = module.size
            case Check.PARENTS:
                module.hold(Lock.PAMT, (Level.PDPT, 0))
            case Check.PAMT:
                module.hold(Lock.PAMT, self.page)
            case Check.PAGE:
                module.pamt[self.page] = PamtEntry(PageType.REG, 7)
            case Check.CHILD:
                td.below(GPA, self.level)[7].lock = EntryLock(taken=True)
            case Check.CHILDREN:
                td.below(GPA, self.level)[8].state = MAPPED
                td.below(GPA, self.level)[9].state = PENDING
            case Check.INTERRUPT:
                module.interrupt_pending = True
            case Check.LARGE:
                module.hold(Lock.PAMT, (Level.PD, LARGE))
            case Check.PREVIOUS:
                td.epochs = td.epochs._replace(refcount=(1, 1))
            case Check.STEPPING:
                vcpu.stepping = ZeroStep(6, (GPA,))

    def rax(self) -> Any:
        if self.leaf == Leaf.TRACK:
            return self.world.track().rax
        if self.leaf == Leaf.VP_ENTER:
            return self.world.vp_enter(self.world.vcpu).rax
        call, args = CALLS[self.leaf]
        given = {"gpa": self.gpa, "hpa": self.hpa, "level": self.level, "vcpu": self.world.vcpu}
        found: Result = getattr(self.module, call)(self.td, *(given[arg] for arg in args.split()))
        return found.rax


CALLS = {
    Leaf.PAGE_ADD: ("tdh_mem_page_add", "gpa hpa"), Leaf.PAGE_AUG: ("tdh_mem_page_aug", "gpa hpa level"),
    Leaf.SEPT_ADD: ("tdh_mem_sept_add", "gpa hpa level"), Leaf.RANGE_BLOCK: ("tdh_mem_range_block", "gpa level"),
    Leaf.RANGE_UNBLOCK: ("tdh_mem_range_unblock", "gpa level"),
    Leaf.PAGE_REMOVE: ("tdh_mem_page_remove", "gpa level"),
    Leaf.PAGE_DEMOTE: ("tdh_mem_page_demote", "gpa hpa level"),
    Leaf.PAGE_PROMOTE: ("tdh_mem_page_promote", "gpa level"),
    Leaf.SEPT_REMOVE: ("tdh_mem_sept_remove", "gpa level"), Leaf.ACCEPT: ("tdg_mem_page_accept", "vcpu gpa level"),
}  # fmt: skip
ON_ENTRY = (Check.WALK, Check.ENTRY, Check.STATE)
KVMS = {  # what the explorer's machine and the emulator's can be made to refuse
    Leaf.SEPT_ADD: (Check.TREE, Check.STATE),
    Leaf.PAGE_AUG: (Check.TREE, *ON_ENTRY, Check.PAGE),
    Leaf.RANGE_BLOCK: (Check.TREE, *ON_ENTRY),
    Leaf.PAGE_REMOVE: (Check.TREE, *ON_ENTRY, Check.BLOCKED, Check.TRACKED),
    Leaf.TRACK: (Check.EPOCH, Check.PREVIOUS),
    Leaf.ACCEPT: ON_ENTRY,
}


class InASemanticStep:
    """A step of the explorer, on cells; the tree's lock is the one that strikes for no reason known."""

    checks = KVMS
    machine = Machine("seamcall-busy", "tdx")

    def __init__(self, leaf: Any) -> None:
        self.leaf = leaf
        self.choose: tuple[int, ...] = ()
        state, table = STATES.get(leaf, FREE), FREE if leaf == Leaf.SEPT_ADD else NL_MAPPED
        self.at: dict[str, Any] = {
            "sept_table": table,
            "sept[0]": state,
            "mode[CPU0]": "host",
            "mode[CPU1]": "host",
        }
        self.at |= {"pamt[P0]": "NDA" if state == FREE else "REG", "bepoch[P0]": Age.PREVIOUS}

    def spoil(self, check: Any) -> None:
        entry = "sept_table" if self.leaf == Leaf.SEPT_ADD else "sept[0]"
        above: dict[str, Any] = {"sept_table": FREE}
        self.at |= {
            Check.WALK: above,
            Check.ENTRY: {"entry_lock[0]": "CPU1"},
            Check.STATE: {entry: NL_MAPPED if self.leaf == Leaf.SEPT_ADD else wrong_state(self.leaf)},
            Check.BLOCKED: {"sept[0]": PENDING},
            Check.TRACKED: {"bepoch[P0]": Age.NOW},
            Check.PAGE: {"pamt[P0]": "REG"},
            Check.EPOCH: {"mode[CPU1]": "entering"},
            Check.PREVIOUS: {"mode[CPU0]": "td", "vcpu_epoch[CPU0]": Age.PREVIOUS},
        }.get(check, {})
        self.choose = (1,) if check == Check.TREE else self.choose

    def rax(self) -> Any:
        steps = {
            Leaf.TRACK: (kvm_tdx.track,),
            Leaf.ACCEPT: (lambda s: answer(Leaf.ACCEPT, kvm_tdx.on_entry(s, 0)),),
        }
        step = steps.get(self.leaf, (kvm_tdx.seamcall, self.leaf, 0))
        return self.machine.run(*step, at=self.at, choose=self.choose).result.rax


EMULATORS = {
    **{leaf: (Check.BUILT, *found) for leaf, found in KVMS.items()},
    Leaf.SEPT_ADD: (Check.BUILT, Check.TREE),
    Leaf.ACCEPT: ON_ENTRY,
    Leaf.VP_ENTER: (Check.BUILT,),
}
ONE_CALL = """
base: upstream
zap:
    {}()
aug:
    freeze_spte({})
    {}()
"""


class InTheEmulator:
    """A Vm: arrays, injected busy answers, a vCPU in VP.ENTER or ACCEPT; KVM makes the one SEAMCALL, and no other."""

    checks = EMULATORS

    def __init__(self, leaf: Any) -> None:
        self.leaf = leaf
        adds = leaf in (Leaf.SEPT_ADD, Leaf.PAGE_AUG)
        call, table = leaf.lower().replace(".", "_"), leaf == Leaf.SEPT_ADD
        said = (
            ("tdh_mem_track", "table" if table else "leaf", call)
            if adds
            else (call, "leaf", "tdh_mem_page_aug")
        )
        kvms = leaf in KVMS and leaf != Leaf.ACCEPT
        design = Design.parse(ONE_CALL.format(*said)) if kvms else "upstream"
        self.vm = Vm("tdx", 1024, design, private=True, vcpus=2)
        self.kvm, self.module = self.vm.tdx, self.vm.tdx.module
        self.module.add_tables(0, 1)
        self.vm.gmem.allocate(0, 4 << 20)
        self.pfn, state = self.vm.pfn(0, True), STATES.get(leaf, FREE)
        self.module.states(0, 1)[0], self.module.hpa[0] = CODE[state], self.pfn
        self.module.pamt[self.pfn] = PageType.NDA if state == FREE else PageType.REG
        self.kvm.mirror_of(0, 1)[0] = 0 if adds else self.pfn + 1
        self.module.epochs = self.module.epochs._replace(td_epoch=5)
        self.gfn = 512 if table else 0

    def put(self, state: State) -> None:
        self.module.states(0, 1)[0] = CODE[state]

    def spoil(self, check: Any) -> None:
        match check:
            case Check.BUILT:
                self.module.fatal = True
            case Check.TREE:
                self.vm.fail(self.leaf)
            case Check.EPOCH:
                self.kvm.vcpus[1].mode = ENTERING
            case Check.PREVIOUS:
                self.kvm.vcpus[0].mode, self.kvm.vcpus[0].epoch = INSIDE, 4
            case Check.WALK:
                self.module.tables[Level.PD][0] = 0
            case Check.ENTRY:
                self.kvm.vcpus[1].accepting = 0
            case Check.STATE:
                self.put(wrong_state(self.leaf))
            case Check.BLOCKED:
                self.put(PENDING)
            case Check.TRACKED:
                self.module.bepoch[self.pfn] = self.module.epochs.td_epoch
            case Check.PAGE:
                self.module.pamt[self.pfn] = PageType.REG

    def rax(self) -> Any:
        if self.leaf == Leaf.ACCEPT:
            return self.kvm.accept(0, 0, 1).rax
        if self.leaf == Leaf.VP_ENTER:
            return self.enter()
        with suppress(PlatformError):
            if self.leaf in (Leaf.SEPT_ADD, Leaf.PAGE_AUG):
                run_fault(self.vm, 0, self.gfn, 1, True, True, 0, "ept-violation")
            else:
                self.vm.set_memory_attributes(0, 4096, False)
        return next(event.code for event in self.vm.events if event.kind == self.leaf)

    def enter(self) -> int:
        try:
            self.kvm.enter(0)
        except TdxError as refused:
            return refused.rax
        return 0


WORLDS = (ByTheChecks, InTheModule, InASemanticStep, InTheEmulator)
EACH = [(world, leaf) for world in WORLDS for leaf in world.checks]
ALONE = [(world, leaf, check) for world, leaf in EACH for check in world.checks[leaf]]
PAIRS = [
    (world, leaf, *pair)
    for world, leaf in EACH
    for pair in pairwise(world.checks[leaf])
    if set(pair) != NOT_TOGETHER
]
BUSY = Status.OPERAND_BUSY
STATUSES = {
    Check.TDR: BUSY, Check.BUILT: Status.TD_FATAL, Check.KEYS: Status.TD_KEYS_NOT_CONFIGURED,
    Check.OP_STATE_LOCK: BUSY, Check.OP_STATE: Status.OP_STATE_INCORRECT, Check.NAMED: Status.OPERAND_INVALID,
    Check.TREE: BUSY, Check.WALK: Status.EPT_WALK_FAILED, Check.ENTRY: BUSY,
    Check.STATE: Status.EPT_ENTRY_STATE_INCORRECT, Check.BLOCKED: Status.GPA_RANGE_NOT_BLOCKED,
    Check.TRACKED: Status.TLB_TRACKING_NOT_DONE, Check.FORM: Status.OPERAND_ADDR_RANGE_ERROR, Check.PARENTS: BUSY,
    Check.PAMT: BUSY, Check.PAGE: Status.PAGE_METADATA_INCORRECT, Check.CHILD: BUSY,
    Check.CHILDREN: Status.EPT_INVALID_PROMOTE_CONDITIONS, Check.INTERRUPT: Status.INTERRUPTED_RESTARTABLE,
    Check.LARGE: BUSY, Check.EPOCH: BUSY, Check.PREVIOUS: Status.PREVIOUS_TLB_EPOCH_BUSY,
}  # fmt: skip


def named(case: Any) -> Any:
    return case.__name__ if isinstance(case, type) else str(case)


def alone(leaf: Leaf, check: Check) -> Any:
    """RAX where nothing else stands in a leaf's way."""
    situation = ByTheChecks(leaf)
    situation.spoil(check)
    return situation.rax()


@pytest.mark.parametrize(("world", "leaf"), EACH, ids=named)
def test_a_leaf_that_no_check_refuses_succeeds(world: type[Any], leaf: Leaf) -> None:
    assert world(leaf).rax() == 0


@pytest.mark.parametrize(("world", "leaf", "check"), ALONE, ids=named)
def test_every_check_of_a_leaf_matters(world: type[Any], leaf: Leaf, check: Check) -> None:
    spoilt = world(leaf)
    spoilt.spoil(check)
    assert spoilt.rax() == alone(leaf, check) != 0


@pytest.mark.parametrize(("world", "leaf", "earlier", "later"), PAIRS, ids=named)
def test_of_two_checks_that_both_fail_the_earlier_one_is_told(
    world: type[Any], leaf: Leaf, earlier: Check, later: Check
) -> None:
    spoilt = world(leaf)
    spoilt.spoil(later)
    spoilt.spoil(earlier)
    assert spoilt.rax() == alone(leaf, earlier)


@pytest.mark.parametrize(("leaf", "check"), [case[1:] for case in ALONE if case[0] is ByTheChecks], ids=named)
def test_an_answer_says_which_check_has_refused(leaf: Leaf, check: Check) -> None:
    situation = ByTheChecks(leaf)
    situation.spoil(check)
    assert situation.answer().by == check


@pytest.mark.parametrize("check", STATUSES, ids=named)
def test_a_check_has_its_status_whatever_the_leaf(check: Check) -> None:
    leaves = [
        leaf
        for leaf, checks in CHECKS.items()
        if check in checks and leaf not in (Leaf.ACCEPT, Leaf.SEPT_REMOVE)
    ]
    assert {alone(leaf, check) >> 32 << 32 for leaf in leaves} == {STATUSES[check]}


@pytest.mark.parametrize("leaf", tuple(Leaf), ids=named)
def test_a_leaf_has_a_check_for_each_lock_that_it_takes_and_for_no_other(leaf: Leaf) -> None:
    of_a_lock = {lock: check for check, lock in HELD.items()} | {Lock.ENTRY: Check.ENTRY}
    taken = {lock for lock in Lock if LOCKS(leaf=leaf, lock=lock, armed=True)}
    assert {of_a_lock[lock] for lock in taken} == set(CHECKS[leaf]) & set(of_a_lock.values())


@pytest.mark.parametrize(
    ("leaf", "held", "rax"),
    [
        (Leaf.PAGE_AUG, {Lock.TREE: SHARED}, 0),
        (Leaf.PAGE_AUG, {Lock.TREE: EXCLUSIVE}, 0x8000020000000092),
        (Leaf.RANGE_BLOCK, {Lock.TREE: SHARED}, 0x8000020000000092),
        (Leaf.PAGE_REMOVE, {Lock.ENTRY: EXCLUSIVE}, 0x8000020000000001),
        (Leaf.PAGE_AUG, {Lock.PAMT: SHARED}, 0x8000020000000008),
        (Leaf.PAGE_REMOVE, {Lock.PAMT: SHARED}, 0x8000020000000001),
        (Leaf.TRACK, {Lock.EPOCH: SHARED}, 0x80000200000000A9),
        (Leaf.VP_ENTER, {Lock.EPOCH: EXCLUSIVE}, 0x80000200000000A9),
        (Leaf.VP_ENTER, {Lock.EPOCH: SHARED}, 0),
        (Leaf.PAGE_AUG, {Lock.TDR: EXCLUSIVE}, 0x8000020000000002),
        (Leaf.VP_ENTER, {Lock.TDR: EXCLUSIVE}, 0x8000020000000080),
        (Leaf.PAGE_AUG, {Lock.OP_STATE: EXCLUSIVE}, 0x80000200000000AC),
        (Leaf.PAGE_AUG, {Lock.TREE: EXCLUSIVE, Lock.ENTRY: EXCLUSIVE}, 0x8000020000000092),
        (Leaf.PAGE_DEMOTE, {Lock.LARGE: SHARED}, 0x8000020000000001),
        (Leaf.PAGE_DEMOTE, {Lock.PAMT: SHARED, Lock.LARGE: SHARED}, 0x8000020000000008),
        (Leaf.PAGE_PROMOTE, {Lock.LARGE: SHARED}, 0x8000020000000001),
        (Leaf.PAGE_REMOVE, {Lock.LARGE: EXCLUSIVE, Lock.PARENTS: EXCLUSIVE}, 0),
        (Leaf.ACCEPT, {Lock.ENTRY: EXCLUSIVE}, 0x8000020000000001),
        (Leaf.ACCEPT, {Lock.TREE: EXCLUSIVE}, 0),
        (Leaf.MR_FINALIZE, {Lock.TDR: SHARED}, 0x8000020000000001),
        (Leaf.PAGE_ADD, {Lock.TDR: SHARED}, 0x8000020000000002),
        (Leaf.PAGE_RECLAIM, {Lock.TDR: EXCLUSIVE}, 0x8000020000000080),
        (Leaf.VP_FLUSH, {Lock.TDR: EXCLUSIVE}, 0x8000020000000080),
        (Leaf.PAGE_RDMD, {Lock.PAMT: SHARED}, 0),
        (Leaf.PAGE_RDMD, {Lock.PARENTS: EXCLUSIVE}, 0x8000020000000001),
        (Leaf.SEPT_ADD, {Lock.PARENTS: EXCLUSIVE}, 0x8000020000000008),
    ],
)
def test_a_leaf_that_meets_a_taken_lock_is_busy_with_that_operand(
    leaf: Leaf, held: dict[Lock, str], rax: int
) -> None:
    situation = ByTheChecks(leaf)
    situation.held, entry = held, EntryLock(taken=Lock.ENTRY in held)
    situation.told["entry_lock"] = entry
    assert situation.rax() == rax


@pytest.mark.parametrize(("armed", "rax"), [(False, 0), (True, busy(Operand.SEPT_TREE))])
def test_vp_enter_wants_the_tree_only_if_its_mitigation_is_armed(armed: bool, rax: int) -> None:
    assert answer(Leaf.VP_ENTER, told({Lock.TREE: SHARED}, armed=armed)).rax == rax


@pytest.mark.parametrize("said", [{"held": {Lock.TREE: EXCLUSIVE}}, {"armed": True}], ids=str)
def test_where_nothing_else_is_said_nothing_else_is_in_the_way(said: Any) -> None:
    assert answer(Leaf.VP_ENTER, told(**said)) == Answer(Status.SUCCESS) and Answer(Status.SUCCESS).rax == 0


def test_a_situation_is_told_only_what_checks_ask_for() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'page_free'"):
        told(page_free=True)


def test_an_answer_about_one_entry_says_what_state_it_has_then_refused_or_not() -> None:
    assert seamcall(Leaf.PAGE_REMOVE, MAPPED).state == MAPPED
    assert answer(Leaf.PAGE_REMOVE, told(state=MAPPED)).state is None


# Who asks reads no more than that.


def cells_read(leaf: Leaf, at: dict[str, Any]) -> set[str]:
    machine = Machine(platform="tdx")
    s = machine.view(at)
    kvm_tdx.seamcall(s, leaf, 0)
    return {repr(cell) for cell in machine.layout.cells if cell.bits and s.reads & cell.mask}


def test_a_step_reads_a_cell_only_if_a_check_asks_for_it() -> None:
    found = {"sept_table": NL_MAPPED}
    assert cells_read(Leaf.PAGE_REMOVE, {}) == {"sept_table"}
    assert cells_read(Leaf.PAGE_REMOVE, found | {"entry_lock[0]": "CPU1"}) == {"sept_table", "entry_lock[0]"}
    on_entry = {"sept_table", "entry_lock[0]", "sept[0]"}
    assert cells_read(Leaf.PAGE_REMOVE, found | {"sept[0]": MAPPED}) == on_entry
    assert cells_read(Leaf.PAGE_AUG, found) == on_entry | {"pamt[P0]"}


# What the module's source says of corners.


def test_of_a_page_inside_a_large_one_it_is_the_large_ones_pamt_entry_that_is_locked() -> None:
    world = large(PENDING)
    world.module.hold(Lock.PAMT, (Level.PT, LARGE + 0x1000))
    assert (
        world.module.tdh_phymem_page_wbinvd(LARGE + 0x1000).rax
        == Status.PAGE_METADATA_INCORRECT | Operand.RCX
    )
    world.module.hold(Lock.PAMT, (Level.PD, LARGE), SHARED)
    assert world.sept_add(1 << 39, LARGE + 0x1000, Level.PML4).rax == busy(Operand.R8)


def test_an_accept_on_a_4k_entry_is_not_in_the_way_of_the_next_table() -> None:
    world = InTheEmulator(Leaf.SEPT_ADD)
    world.kvm.vcpus[1].accepting = world.gfn
    assert world.rax() == 0


def test_a_busy_answer_waits_for_an_accept_that_comes_as_far_as_the_lock() -> None:
    vm = Vm("tdx", 1024, private=True)
    vm.fail(Leaf.ACCEPT)
    with pytest.raises(TdxError, match="OPERAND_BUSY"):
        vm.guest().accept(0, 2 << 20)
    assert vm.counters["ept-violation"] == 1


def test_a_range_stops_at_the_entry_that_a_vcpu_in_accept_holds() -> None:
    design = Design.parse("base: upstream\nzap:\n    tdh_mem_range_block()\n")
    vm = Vm("tdx", 64, design, private=True, vcpus=2)
    vm.place(0, "MAPPED", 64 << 12)
    vm.tdx.vcpus[1].accepting = 9
    with pytest.raises(PlatformError, match="OPERAND_BUSY"):
        vm.set_memory_attributes(0, 64 << 12, False)
    found = [(event.page, event.times, event.code) for event in vm.events if event.kind == Leaf.RANGE_BLOCK]
    assert found[-1] == (9, 1, busy(Operand.RCX)) and vm.tdx.module.entry(10) == MAPPED

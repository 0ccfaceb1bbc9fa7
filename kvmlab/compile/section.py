"""One section of a design compiled: rows in, drafts out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..design import Design, Row
from ..design.calls import DIRECTMAP, INCLUSIVE
from ..design.rows import adds_ranges
from ..hw.tdx import Leaf
from ..kernel import directmap, locks
from ..kvm import attributes, gmem, lpage, memslots, mmu, sev, tdx
from ..machine.conf import Conf
from ..model.state import View
from ..model.step import Step
from .assemble import Draft, nothing

KINDS = ("private", "shared")
LOCK_CALLS: dict[str, tuple[Step, str]] = {
    "mutex_lock": (locks.mutex_lock, "take"),
    "mutex_unlock": (locks.mutex_unlock, "drop"),
    "write_lock": (locks.write_lock, "take"),
    "write_unlock": (locks.write_unlock, "drop"),
    "read_lock": (locks.read_lock, "take"),
    "read_unlock": (locks.read_unlock, "drop"),
    "filemap_invalidate_lock": (locks.write_lock, "take"),
    "filemap_invalidate_unlock": (locks.write_unlock, "drop"),
    "filemap_invalidate_lock_shared": (locks.read_lock, "take"),
    "filemap_invalidate_unlock_shared": (locks.read_unlock, "drop"),
}
UNDO: dict[Step, Step] = {
    locks.mutex_lock: locks.mutex_unlock,
    locks.write_lock: locks.write_unlock,
    locks.read_lock: locks.read_unlock,
}
# Calls page by page: in the ioctl once a gfn of the request, elsewhere on the gfn of the fault.
PER_GFN: dict[str, Step] = {
    "kvm_unmap_directmap": directmap.kvm_unmap_directmap,
    "kvm_map_directmap": directmap.kvm_map_directmap,
    "adjust_direct_map": directmap.adjust_direct_map,
    "kvm_unmap_gfn_range": mmu.kvm_unmap_gfn_range,
}
FAULT_CALLS: dict[str, Step] = {
    "mmu_seq_snapshot": mmu.mmu_seq_snapshot,
    "kvm_mem_is_private": mmu.kvm_mem_is_private,
    "kvm_gmem_is_private": mmu.kvm_mem_is_private,
    "kvm_gmem_get_pfn": gmem.kvm_gmem_get_pfn,
    "is_page_fault_stale": mmu.is_page_fault_stale,
    "kvm_tdp_mmu_map": mmu.kvm_tdp_mmu_map,
    "memslot_invalid": memslots.memslot_invalid,
    "kvm_vcpu_gfn_to_memslot": memslots.kvm_vcpu_gfn_to_memslot,
    "npf_sizem": mmu.npf_sizem,
    "snp_lookup_rmpentry": sev.snp_lookup_rmpentry,
    "psmash": sev.psmash,
}
# What a row's word means to its step, beyond the kind of the fault.
WORD_ARGS: dict[str, Callable[[str | None], tuple[Any, ...]]] = {
    "snp_lookup_rmpentry": lambda word: (word == "warn",),
    "psmash": lambda word: (word,),
    "memslot_invalid": lambda word: (word == "leave",),
}
HELPER = frozenset(
    {"kvm_unmap_directmap", "rmpupdate", "kvm_map_directmap"}
)  # parts of kvm_x86_update_mem_attr()
# The directmap and RMP ops are absent on platforms without an RMP: they do nothing there.
RMP_ONLY = frozenset(
    {
        "kvm_unmap_directmap",
        "kvm_map_directmap",
        "adjust_direct_map",
        "rmpupdate",
        "rmp_prepare",
        "rmp_match",
        "psmash",
        "npf_sizem",
        "snp_lookup_rmpentry",
    }
)
WORKS_ON_PAGES = RMP_ONLY - {"rmp_prepare", "rmp_match", "npf_sizem", "snp_lookup_rmpentry"}
# What the ioctl does memslot by memslot: together, in one walk (kvm_handle_gfn_range()), or each by itself.
WALKS = frozenset({"kvm_mmu_invalidate_range_add", "kvm_unmap_gfn_range"})
IN_MEMSLOTS = WALKS | (WORKS_ON_PAGES - {"psmash"}) | {"kvm_gmem_get_pfn", "kvm_update_lpage_mixed_flag"}
UNDER_MMU_LOCK = frozenset({"kvm_mmu_invalidate_begin", "kvm_mmu_invalidate_end", "kvm_flush_remote_tlbs"})
GMEM_CALLS: dict[str, Step] = {
    "truncate_inode_pages_range": gmem.truncate_inode_pages_range,
    "folio_put": gmem.folio_put,
}


def at_fault(step: Step) -> Step:
    """The same step, on the gfn of the vCPU's pending access."""
    return _AtFault(step)


@dataclass(frozen=True)
class _AtFault:
    step: Step

    def __call__(self, s: View, me: str, *args: Any) -> str | None:
        return self.step(s, me, s.acc[me].gfn, *args)


ZAP_STEPS: dict[str, Step] = {
    "tdh_phymem_page_wbinvd": tdx.tdh_phymem_page_wbinvd,
    "tdx_clear_page": tdx.tdx_clear_page,
}
ZAP_CALLS = frozenset({*ZAP_STEPS, *tdx.ZAP_LEAVES, "tdh_do_no_vcpus", "kvm_make_all_cpus_request"})
_PLAIN: dict[str, Callable[..., str | None]] = {
    "kvm_flush_remote_tlbs": mmu.kvm_flush_remote_tlbs,
    "kvm_mmu_invalidate_end": attributes.kvm_mmu_invalidate_end,
}


@dataclass(frozen=True)
class Partly:
    """The way on when only the first gfns of a range were `stored`: where it starts, what is held, which rows."""

    label: str
    stored: int
    holding: tuple[tuple[Step, str], ...]
    rows: Sequence[Row]


class Section:
    """Compiles one section of a design: rows in, drafts out; keeps track of the locks that it holds."""

    def __init__(
        self,
        conf: Conf,
        section: str,
        kind: str,
        prefix: str,
        gfns: tuple[int, ...] | None,
        design: Design | None = None,
    ) -> None:
        self.conf, self.section, self.kind, self.prefix, self.gfns = conf, section, kind, prefix, gfns
        self.design = design
        self.drafts: list[Draft] = []
        self.failed: str | None = None
        self.unassigned: str | None = None
        self.holding: list[tuple[Step, str]] = []
        self.nests: set[tuple[str, str]] = set()
        self.unwinds: dict[str, tuple[tuple[tuple[Step, str], ...], str]] = {}
        self.partly: list[Partly] = []
        self.covered: tuple[int, int] | None = None
        self.as_id = 0  # the address space whose memslot the rows work on
        self.rows: Sequence[Row] = ()
        self.loop = 0  # which loop over the pages of the request is being compiled; 0: none
        self._labels = self._loops = 0

    def compile(self, rows: Sequence[Row]) -> None:
        """Add the drafts of a whole section, skipping what has no memslot to work on."""
        if self.gfns and not adds_ranges(rows):
            self.covered = (min(self.gfns), max(self.gfns) + 1)
        on_pages = any(row.call in WORKS_ON_PAGES and not self.is_absent(row) for row in rows)
        if self.section == "ioctl" and self.conf.gmem and on_pages:
            self.hold_pages(rows[0])
        self.rows = rows
        looks_up = self.section == "fault" and self.conf.looks_up
        if looks_up and not any(row.call == "kvm_vcpu_gfn_to_memslot" for row in rows):
            self.row(Row("kvm_vcpu_gfn_to_memslot"))
        for without, group in groupby(rows, self.needs_memslot):
            if not without:
                self.groups(list(group))
                continue
            inside, skip = list(group), self.new_label()
            look = "kvm_for_each_memslot_in_gfn_range()"
            self.emit(memslots.overlaps, (self.of_gmem,), inside[0], text=look, jumps={"skip": skip})
            self.groups(inside)
            self.mark(skip)

    @property
    def of_gmem(self) -> bool:
        """Whether this is the ioctl of a guest_memfd, in-place."""
        return any(row.call == "filemap_invalidate_lock" for row in self.rows)

    def is_absent(self, row: Row) -> bool:
        """Whether the platform has no such thing: without an RMP nothing is done for its sake."""
        generic = self.conf.tdx and row.call in DIRECTMAP
        return row.call in RMP_ONLY and not self.conf.has_rmp and not generic

    def needs_memslot(self, row: Row) -> bool:
        """Whether the row is skipped where no memslot overlaps, in scenarios in which one comes later.

        Since v6.8 that is all that stands under mmu_lock; in the v8 era the window covers the request all the same.
        The ioctl of a guest_memfd works on its pages, whoever maps them.
        """
        if not (self.conf.adds and self.section == "ioctl"):
            return False
        if row.call in ("kvm_unmap_gfn_range", "kvm_update_lpage_mixed_flag"):
            return True
        if row.call in IN_MEMSLOTS - WALKS:
            return not self.of_gmem
        return adds_ranges(self.rows) and (row.lock == "mmu_lock" or row.call in UNDER_MMU_LOCK | WALKS)

    def groups(self, rows: Sequence[Row]) -> None:
        """Add the drafts of `rows`, keeping `if (flush)` groups together."""
        for guarded, group in groupby(rows, lambda row: row.under_flush):
            if not guarded:
                self.straight(list(group))
                continue
            inside, skip = list(group), self.new_label()
            self.emit(mmu.flush_if_zapped, (), inside[0], text="if (flush)", jumps={"skip": skip})
            self.straight(inside)
            self.mark(skip)

    def straight(self, rows: Sequence[Row]) -> None:
        """Add the drafts of rows that all run or are all skipped."""
        i = 0
        while i < len(rows):
            together = _helper(rows, i) or _walk(rows, i) or rows[i : i + 1]
            if self.section == "ioctl" and self.gfns is not None and rows[i].call in IN_MEMSLOTS:
                self.memslot_by_memslot(together)
            elif self.gfns and len(together) > 1 and rows[i].call in HELPER:
                gfns = self.gfns
                if rows[i].walk == INCLUSIVE and gfns[-1] + 1 in self.conf.gfns:
                    self.gfns = (*gfns, gfns[-1] + 1)
                self.page_by_page(together)
                self.gfns = gfns
            else:
                for row in together:
                    self.row(row)
            i += len(together)

    def memslot_by_memslot(self, rows: Sequence[Row]) -> None:
        """All these rows on what one memslot has of the request, then on the next."""
        gfns, as_id = self.gfns or (), self.as_id
        for piece in self.conf.pieces(gfns):
            self.as_id, self.gfns = piece
            seen = [row for row in rows if memslots.visits(row.walk, self.as_id, self.gfns[0], gfns[0])]
            if len(seen) > 1 and seen[0].call in HELPER and not self.takes_folio(seen):
                self.page_by_page(seen)
            else:
                self.look_up(seen)
                for row in seen:
                    self.row(row)
        self.gfns, self.as_id = gfns, as_id

    def look_up(self, rows: Sequence[Row]) -> None:
        """The op of the series looks its pages up itself (kvm_restrictedmem_get_pfn(), RFC v8 48/56); it may sleep.

        That is seen only where it must not; elsewhere nobody can tell it from a look-up before all locks.
        """
        op = self.section == "ioctl" and len(rows) > 1 and rows[0].call in HELPER and not self.is_absent(rows[0])
        if op and any(name in locks.SPINNING for _, name in self.holding):
            pages = ", ".join(self.conf.backing["private", gfn] for gfn in self.gfns or ())
            self.emit(gmem.look_up_in_ioctl, (self.gfns,), rows[0], f"kvm_restrictedmem_get_pfn({pages})")

    def takes_folio(self, rows: Sequence[Row]) -> bool:
        """Whether the op works on a whole 2M folio at once: going private, if the request has all of it."""
        private = any(row.call == "rmpupdate" and row.target == "private" for row in rows)
        return private and self.conf.folio_2m and set(self.conf.converted) == set(self.conf.gfns)

    def page_by_page(self, rows: Sequence[Row]) -> None:
        """The op of the series: all its work on one page, then the next; it gives up where RMPUPDATE fails."""
        gfns, self.failed = self.gfns or (), self.new_label()
        with self.page_loop():
            for self.gfns in ((gfn,) for gfn in gfns):
                self.unassigned = self.new_label()  # nothing to restore where nothing was taken
                self.look_up(rows)
                for row in rows:
                    self.row(row)
                self.mark(self.unassigned)
        self.gfns, self.unassigned = gfns, None
        self.mark(self.failed)
        self.failed = None

    def row(self, row: Row) -> None:
        """Add the drafts of one call."""
        call = row.call
        if self.is_absent(row):
            return
        if call in ("memslot_invalid", "kvm_vcpu_gfn_to_memslot") and not self.conf.looks_up:
            return
        if call in LOCK_CALLS:
            self.lock(row)
        elif call == "kvm_unmap_gfn_range" and self.conf.tdx and _zapped(self.kind) == "private":
            self.zap_private(row)
        elif call in PER_GFN:
            self.per_gfn(PER_GFN[call], row, *([self.as_id] if self.as_id else []))
        elif call in ZAP_CALLS:
            self.zap_call(row)
        elif call == "kvm_tdp_mmu_map" and self.conf.tdx and self.kind == "private":
            self.map_private(row)
        elif call == "rmpupdate" and self.gfns is None:
            self.rmpupdate(row)
        elif call == "rmpupdate":
            with self.page_loop():
                self.rmpupdate(row)
        elif call == "kvm_vm_set_region_attr":
            self.store(row)
        elif call == "xa_reserve":
            self.reserve(row)
        elif call == "kvm_range_has_memory_attributes":
            ways = {"done": self.unwind("done")}
            self.emit(
                attributes.kvm_range_has_memory_attributes, (self.gfns, self.kind, row.target is not None), row,
                jumps=ways,
            )  # fmt: skip
        elif call == "kvm_update_lpage_mixed_flag":
            args = (self.gfns, self.kind, row.target is not None)
            self.emit(lpage.kvm_update_lpage_mixed_flag, args, row)
        elif call in GMEM_CALLS:
            if self.conf.gmem:
                self.per_gfn(GMEM_CALLS[call], row)
        elif call == "psmash" and self.section == "punch":
            if self.conf.folio_2m:
                self.emit(sev.psmash_if_partial, (), row)
        elif call == "kvm_gmem_get_pfn" and self.section == "ioctl":
            if self.conf.gmem:
                self.hold_pages(row)
            else:
                self.emit(gmem.look_up_in_ioctl, (self.gfns,), row)
        elif call in FAULT_CALLS:
            self.fault_call(row)
        elif call in ("rmp_prepare", "rmp_match"):
            self.under_folio_lock(row)
        elif call == "kvm_zap_gfn_range":
            self.zap_in_handler(row)
        elif call == "kvm_mmu_invalidate_begin":
            self.emit(attributes.kvm_mmu_invalidate_begin, (self.covered,), row)
        elif call == "kvm_mmu_invalidate_range_add":
            assert self.gfns is not None
            if row.target is None:
                whole = (min(self.gfns), max(self.gfns) + 1)
                self.emit(attributes.kvm_mmu_invalidate_range_add, whole, row)
            elif self.conf.huge:
                levels = lpage.LEVELS[row.target]
                self.emit(lpage.widen_hull, (self.gfns, levels), row, f"{row.call}({row.target})")
        else:
            self.emit(_PLAIN[call], (), row)

    def emit(
        self, step: Step, args: tuple[Any, ...], row: Row, text: str = "", jumps: Mapping[str, str] = {}
    ) -> None:
        """Add one draft."""
        self.drafts.append(
            Draft(step, args, text or f"{row.call}()", row, self.section, jumps=dict(jumps), loop=self.loop)
        )

    @contextmanager
    def page_loop(self) -> Iterator[None]:
        """What is compiled within is done to one page after the other; a loop inside a loop is the same one."""
        outer = self.loop
        self._loops += not outer
        self.loop = outer or self._loops
        yield
        self.loop = outer

    def per_gfn(self, step: Step, row: Row, *args: Any) -> None:
        """Add one draft a gfn of the request, or one for the gfn of the fault."""
        shown = "SMM" if self.as_id else str(args[0]) if args else ""
        if self.gfns is None:
            self.emit(at_fault(step), args, row, f"{row.call}({shown})")
            return
        with self.page_loop():
            for n, gfn in enumerate(self.gfns):
                if n and step is mmu.kvm_unmap_gfn_range and self.conf.yields and self.section == "ioctl":
                    self.yields(row)
                where = f"gfn {gfn}" if step is not sev.rmpupdate else self.conf.backing["private", gfn]
                self.emit(step, (gfn, *args), row, f"{row.call}({', '.join(filter(None, (where, shown)))})")

    def yields(self, row: Row) -> None:
        """Between two gfns of a zap: it may flush, drop mmu_lock and take it again."""
        over = self.new_label()
        for step, args, jumps in (
            (mmu.tdp_mmu_yields, (), {"skip": over}),
            (mmu.kvm_flush_remote_tlbs, (), {}),
            (locks.write_unlock, ("mmu_lock",), {}),
            (locks.write_lock, ("mmu_lock",), {}),
        ):
            self.emit(step, args, row, f"{row.call}(): {step.__name__}()", jumps)
        self.mark(over)

    def store(self, row: Row) -> None:
        """xa_store() gfn by gfn; where one may fail, the rest of the section goes on with what was stored."""
        first = len(self.drafts)
        self.per_gfn(attributes.kvm_vm_set_region_attr, row, self.kind)
        if not self.conf.xa_fails or any(r.call == "xa_reserve" for r in self.rows):
            return
        rest = self.rows[self.rows.index(row) + 1 :]
        for n, draft in enumerate(self.drafts[first:]):
            self.partly.append(Partly(f"{self.new_label()}-stored{n}", n, tuple(self.holding), rest))
            draft.jumps["failed"] = self.partly[-1].label

    def reserve(self, row: Row) -> None:
        """xa_reserve() gfn by gfn; a failure leaves the ioctl with -ENOMEM."""
        gfns = self.gfns or ()
        with self.page_loop():
            for gfn in gfns:
                ways = {"failed": self.unwind("ENOMEM")}
                self.emit(attributes.xa_reserve, (gfn, gfn == gfns[-1]), row, f"xa_reserve(gfn {gfn})", ways)

    def hold_pages(self, row: Row) -> None:
        """The ioctl looks up the pages that it works on before it takes a lock that forbids sleeping."""
        with self.page_loop():
            for gfn in self.gfns or ():
                pfn = self.conf.backing["private", gfn]
                self.emit(gmem.hold_page, (gfn,), row, f"kvm_restrictedmem_get_pfn({pfn})")

    def rmpupdate(self, row: Row) -> None:
        """RMPUPDATE: where it fails the op gives up (ioctl), or KVM_RUN does (fault path)."""
        first, to = len(self.drafts), row.target or self.kind
        splits = to == "shared" and self.conf.folio_2m and self.section != "punch"
        gfns = self.gfns
        for self.gfns in [None] if gfns is None else [(gfn,) for gfn in gfns]:
            if gfns and self.section == "ioctl" and self.gfns != gfns[:1] and self.takes_folio([row]):
                continue  # RMPUPDATE of its first page has done it
            if splits:
                step, args = (sev.psmash_if_2m, self.gfns) if self.gfns else (at_fault(sev.psmash_if_2m), ())
                self.emit(step, args, row, "if (2M entry) psmash()")
            self.per_gfn(sev.rmpupdate, row, to, self.section)
            self.drafts[-1].jumps["unassigned"] = self.unassigned or self.new_label()
            if not self.unassigned:
                self.mark(self.drafts[-1].jumps["unassigned"])
        self.gfns = gfns
        if not self.conf.injects or not self.conf.has_rmp:
            return
        if self.section == "ioctl":
            after = self.failed or self.new_label()
            if not self.failed:
                self.mark(after)
        else:
            after = self.unwind("killed")
        for draft in self.drafts[first:]:
            if draft.step is not nothing:
                draft.jumps["failed"] = after

    def lock(self, row: Row) -> None:
        """Add a lock call, and follow what is held."""
        step, what = LOCK_CALLS[row.call]
        name = row.lock or "invalidate_lock"
        self.take(step, name) if what == "take" else self.drop(step, name)
        shown = row.call if row.call.startswith("filemap") else f"{row.call}({name})"
        self.emit(step, (name,), row, shown if "(" in shown else f"{shown}()")

    def take(self, step: Step, name: str) -> None:
        """Remember that the lock is held from here on."""
        self.nests |= {(other, name) for _, other in self.holding if other != name}
        self.holding.append((step, name))

    def drop(self, step: Step, name: str) -> None:
        """Forget the lock, if it was held that way."""
        for held in reversed(self.holding):
            if held[1] == name and UNDO[held[0]] is step:
                self.holding.remove(held)
                return

    def fault_call(self, row: Row) -> None:
        """Add a step of the fault path; retry and exit drop what is held and leave."""
        ways: tuple[str, ...] = () if self.section == "ioctl" else ("retry", "exit", "leave")
        if ways and self.conf.looks_up:
            ways = (*ways, "userspace")
        jumps = {why: self.unwind(why) for why in ways}
        words: tuple[Any, ...] = WORD_ARGS[row.call](row.target) if row.call in WORD_ARGS else ()
        self.emit(FAULT_CALLS[row.call], (self.kind, *words), row, jumps=jumps)

    def unwind(self, why: str) -> str:
        """Label of the code that drops the locks held here and then leaves for `why`."""
        held = "+".join(f"{take.__name__}:{name}" for take, name in self.holding)
        label = f"{self.prefix}-{why}-{held}"
        self.unwinds[label] = (tuple(self.holding), why)
        return label

    def under_folio_lock(self, row: Row) -> None:
        """rmp_prepare() and rmp_match(): the folio lock, and the row's body if the RMP entry does not fit."""
        if row.call == "rmp_prepare" and self.kind == "shared":
            return
        self.take(locks.mutex_lock, "folio_lock")
        self.emit(locks.mutex_lock, ("folio_lock",), row, f"{row.call}(): folio_lock()")
        fits = self.new_label()
        of = "private" if row.target == "private_pfn" else self.kind
        self.emit(sev.rmp_fits, (self.kind, of), row, f"{row.call}(): RMP lookup", {"skip": fits})
        for inner in row.body or ():
            if inner.call == "kvm_unmap_directmap" and self.conf.folio_2m:
                self.emit(at_fault(directmap.unmap_folio), (), inner)
            else:
                self.row(inner)
        self.mark(fits)
        self.emit(locks.mutex_unlock, ("folio_lock",), row, f"{row.call}(): folio_unlock()")
        self.drop(locks.mutex_unlock, "folio_lock")

    def zap_in_handler(self, row: Row) -> None:
        """kvm_zap_gfn_range(): takes mmu_lock itself, zaps and flushes."""
        self.take(locks.write_lock, "mmu_lock")
        for step, args in (
            (locks.write_lock, ("mmu_lock",)),
            (at_fault(mmu.kvm_unmap_gfn_range), ()),
            (mmu.kvm_flush_remote_tlbs, ()),
            (locks.write_unlock, ("mmu_lock",)),
        ):
            self.emit(
                step, args, row, f"kvm_zap_gfn_range(): {getattr(step, '__name__', 'kvm_unmap_gfn_range')}()"
            )
        self.drop(locks.write_unlock, "mmu_lock")

    def zap_private(self, row: Row) -> None:
        """tdx: the mirror leaf goes, then the SEAMCALLs of the section zap, leaf by leaf."""
        gfns, within = self.gfns or (), self.section
        with self.page_loop():
            for n, gfn in enumerate(gfns):
                if n and self.conf.yields and within == "ioctl":
                    self.yields(row)
                over = self.new_label()
                self.emit(tdx.kvm_unmap_gfn_range, (gfn,), row, f"{row.call}(gfn {gfn})", {"skip": over})
                self.gfns, self.section = (gfn,), "zap"
                for inner in self.design.rows("zap", to=self.kind, platform="tdx") if self.design else ():
                    self.row(inner)
                self.gfns, self.section = gfns, within
                self.mark(over)

    def zap_call(self, row: Row) -> None:
        """One call of the section zap, on the leaf that is being zapped."""
        (gfn,) = self.gfns or (0,)
        if row.call in ZAP_STEPS:
            self.emit(ZAP_STEPS[row.call], (gfn,), row, f"{row.call}(gfn {gfn})")
            return
        if row.call == "kvm_make_all_cpus_request":
            self.emit(tdx.kvm_make_all_cpus_request, (), row)
            return
        wrapped = row.call == "tdh_do_no_vcpus"
        call = (row.target or "") if wrapped else row.call
        text = f"{call}({'' if call == 'tdh_mem_track' else f'gfn {gfn}'})"
        if not wrapped:
            self.emit(tdx.zap_seamcall, (gfn, call, "retry" if row.target else "bug"), row, text)
            return
        done, busy = self.new_label(), self.new_label()
        self.emit(tdx.zap_seamcall, (gfn, call, "kick"), row, text, {"busy": busy})
        self.drafts[-1].after = done
        self.mark(busy)
        self.emit(tdx.stop_vcpus, (), row, "kvm_make_all_cpus_request()")
        self.emit(tdx.zap_seamcall, (gfn, call, "bug"), row, text)
        self.emit(tdx.let_vcpus, (), row, "wait_for_sept_zap = false")
        self.mark(done)

    def map_private(self, row: Row) -> None:
        """tdx: kvm_tdp_mmu_map() on the mirror root is the section aug.

        What a freeze finds present already is skipped: all that follows for the same SPTE.
        """
        within, self.section = self.section, "aug"
        rows = self.design.rows("aug", to="private", platform="tdx") if self.design else ()
        ends: dict[int, list[str]] = {}
        for n, inner in enumerate(rows):
            if inner.call == "freeze_spte":
                last = max(
                    (k for k in range(n, len(rows)) if _frozen_work(rows[k]) == inner.target), default=n
                )
                ends.setdefault(last, []).append(self.new_label())
                self.freeze(inner, ends[last][-1])
            else:
                self.aug_call(inner)
            for label in ends.get(n, ()):
                self.mark(label)
        self.section = within

    def freeze(self, row: Row, over: str) -> None:
        """FROZEN_SPTE for a table or a leaf; present already: go on at `over`."""
        ways = {"retry": self.unwind("retry"), "skip": over}
        self.emit(tdx.freeze_spte, (row.target,), row, f"freeze_spte({row.target})", ways)

    def aug_call(self, row: Row) -> None:
        """One call of the section aug."""
        if row.call == "write_spte":
            self.emit(tdx.write_spte, (row.target,), row, f"write_spte({row.target})")
        elif row.call == "clflush":
            self.emit(tdx.clflush, (), row)
        else:
            leaf = Leaf.SEPT_ADD if row.call == "tdh_mem_sept_add" else Leaf.PAGE_AUG
            ways = {"retry": self.unwind("retry")}
            self.emit(tdx.aug_seamcall, (leaf, row.call, row.target == "bit_and"), row, jumps=ways)

    def new_label(self) -> str:
        """Return a label that no other place has."""
        self._labels += 1
        return f"{self.prefix}-{self._labels}"

    def mark(self, label: str) -> None:
        """Give the place reached now a name; a step that does nothing stands there only if it must."""
        self.drafts.append(Draft(nothing, (), "", None, self.section, label=label))


def _frozen_work(row: Row) -> str | None:
    """Which SPTE a call of the section aug is for: that of the table or the leaf's."""
    if row.call in ("freeze_spte", "write_spte"):
        return row.target
    return "table" if row.call == "tdh_mem_sept_add" else "leaf"


def _zapped(kind: str) -> str:
    """tdx: a conversion zaps the mappings of the kind that the page had (kvm_arch_pre_set_memory_attributes())."""
    return "private" if kind == "shared" else "shared"


def _helper(rows: Sequence[Row], i: int) -> Sequence[Row]:
    """The rows from `i` on that one call of the series' op was spelled out to."""
    same = (rows[i].line, rows[i].origin, rows[i].text)
    n = i
    while n < len(rows) and rows[n].call in HELPER and (rows[n].line, rows[n].origin, rows[n].text) == same:
        n += 1
    return rows[i:n]


def _walk(rows: Sequence[Row], i: int) -> Sequence[Row]:
    """The rows from `i` on that one walk over the memslots does."""
    n = i
    while n < len(rows) and rows[n].call in WALKS:
        n += 1
    return rows[i:n]

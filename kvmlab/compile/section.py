"""One section of a design compiled: rows in, drafts out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any

from ..design import Design, Row
from ..design.calls import (
    ATTRIBUTES,
    DISCARDS,
    INCLUSIVE,
    MEMSLOT,
    MEMSLOTS,
    MIRROR,
    ONCE,
    OP,
    PAGES,
    WALK,
    Call,
    does,
    meanings,
    names_its_lock,
    with_role,
)
from ..design.rows import adds_ranges
from ..hw.memory import Gfn
from ..kernel import locks
from ..kernel.failures import RMPUPDATE, XARRAY
from ..kvm import gmem, memslots, mmu, sev, tdx
from ..machine.conf import ADDS, YIELDS, Conf
from ..model.state import View
from ..model.step import Step
from .assemble import Draft, nothing

KINDS = ATTRIBUTES
OP_PARTS = frozenset(chain(*OP.values()))  # the calls for which the series' op stands


def at_fault(step: Step) -> Step:
    """The same step, on the gfn of the vCPU's pending access."""
    return _AtFault(step)


@dataclass(frozen=True)
class _AtFault:
    step: Step

    def __call__(self, s: View, me: str, *args: Any) -> str | None:
        return self.step(s, me, s.acc[me].gfn, *args)


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
        gfns: tuple[Gfn, ...] | None,
        design: Design | None = None,
    ) -> None:
        self.conf, self.section, self.kind, self.prefix, self.gfns = conf, section, kind, prefix, gfns
        self.design, self.request = design, gfns or ()
        self.drafts: list[Draft] = []
        self.failed: str | None = None
        self.unassigned: str | None = None
        self.holding: list[tuple[Step, str]] = []
        self.nests: set[tuple[str, str]] = set()
        self.unwinds: dict[str, tuple[tuple[tuple[Step, str], ...], str]] = {}
        self.partly: list[Partly] = []
        self.covered: tuple[int, int] | None = None
        self.refused = False  # whether its last reservation fails for certain
        self.as_id = 0  # the address space whose memslot the rows work on
        self.rows: Sequence[Row] = ()
        self.loop = 0  # which loop over the pages of the request is being compiled; 0: none
        self._labels = self._loops = 0

    def compile(self, rows: Sequence[Row]) -> None:
        """Add the drafts of a whole section, skipping what has no memslot to work on."""
        if self.gfns and not adds_ranges(rows):
            self.covered = (min(self.gfns), max(self.gfns) + 1)
        on_pages = any(self.first(row).on_page and not self.is_absent(row) for row in rows)
        if self.section == "ioctl" and self.has(DISCARDS) and on_pages:
            self.hold_pages(rows[0])
        self.rows = rows
        looks_up = self.section == "fault" and self.has(MEMSLOTS)
        if looks_up and not any(does(row.call, "looks up") for row in rows):
            self.row(Row(with_role("looks up")))
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
        return any(row.lock == "invalidate_lock" for row in self.rows)

    @property
    def reserved(self) -> bool:
        """Whether the text reserves entries of the xarray, so that a store cannot fail."""
        return any(does(row.call, "reserves") for row in self.rows)

    def has(self, part: str) -> bool:
        """Whether the machine has a part; every machine has what belongs to none."""
        return part in ("", *self.conf.parts)

    def first(self, row: Row) -> Call:
        """What a row means in this section, whatever the machine has."""
        return meanings(row.call, self.section)[0]

    def is_absent(self, row: Row) -> bool:
        """Whether the platform has no such thing: without an RMP nothing is done for its sake."""
        return self.conf.platform not in self.first(row).on

    def meaning(self, row: Row) -> Call | None:
        """What a row means in this section, with its word, on this machine; None if it does nothing there."""
        for call in meanings(row.call, self.section):
            if (row.target is None or row.target in call.words) and self.has(call.part):
                return call if self.conf.platform in call.on else None
        return None

    def needs_memslot(self, row: Row) -> bool:
        """Whether the row is skipped where no memslot overlaps, in scenarios in which one comes later.

        Since v6.8 that is all that stands under mmu_lock; in the v8 era the window covers the request all the same.
        The ioctl of a guest_memfd works on its pages, whoever maps them.
        """
        if not (self.has(ADDS) and self.section == "ioctl"):
            return False
        call = self.first(row)
        if call.over == PAGES:
            return not self.of_gmem
        return call.over == MEMSLOT or call.lays == "zap" or (adds_ranges(self.rows) and call.under_mmu_lock)

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
            together = _op(rows, i) or self.walk(rows, i) or rows[i : i + 1]
            over = self.first(rows[i]).over
            if self.section == "ioctl" and self.gfns is not None and over in (PAGES, MEMSLOT, WALK):
                self.memslot_by_memslot(together)
            elif self.gfns and len(together) > 1 and rows[i].call in OP_PARTS:
                gfns = self.gfns
                if rows[i].walk == INCLUSIVE and gfns[-1] + 1 in self.conf.gfns:
                    self.gfns = (*gfns, Gfn(gfns[-1] + 1))
                self.page_by_page(together)
                self.gfns = gfns
            else:
                for row in together:
                    self.row(row)
            i += len(together)

    def walk(self, rows: Sequence[Row], i: int) -> Sequence[Row]:
        """The rows from `i` on that one walk over the memslots does."""
        n = i
        while n < len(rows) and self.first(rows[n]).over == WALK:
            n += 1
        return rows[i:n]

    def memslot_by_memslot(self, rows: Sequence[Row]) -> None:
        """All these rows on what one memslot has of the request, then on the next."""
        gfns, as_id = self.gfns or (), self.as_id
        for piece in self.conf.pieces(gfns):
            self.as_id, self.gfns = piece
            seen = [row for row in rows if memslots.visits(row.walk, self.as_id, self.gfns[0], gfns[0])]
            if len(seen) > 1 and seen[0].call in OP_PARTS and not self.takes_folio(seen):
                self.page_by_page(seen)
            else:
                self.look_up(seen)
                for row in seen:
                    self.row(row)
        self.gfns, self.as_id = gfns, as_id

    def look_up(self, rows: Sequence[Row]) -> None:
        """The op of the series looks its pages up itself (kvm_restrictedmem_get_pfn(), RFC v8 48/56); it may sleep.

        It is laid out only under mmu_lock, where sleeping is a bug; elsewhere nobody could tell it from a look-up
        before all locks.
        """
        op = (
            self.section == "ioctl"
            and len(rows) > 1
            and rows[0].call in OP_PARTS
            and not self.is_absent(rows[0])
        )
        if op and any(name in locks.SPINNING for _, name in self.holding):
            pages = ", ".join(self.conf.backing["private", gfn] for gfn in self.gfns or ())
            self.emit(gmem.look_up_in_ioctl, (self.gfns,), rows[0], f"kvm_restrictedmem_get_pfn({pages})")

    def takes_folio(self, rows: Sequence[Row]) -> bool:
        """Whether the op works on a whole 2M folio at once: going private, if the request has all of it."""
        private = any(self.first(row).lays == "rmpupdate" and row.target == "private" for row in rows)
        return private and self.conf.folio_2m and set(self.request) == set(self.conf.gfns)

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
        if call := self.meaning(row):
            getattr(self, f"lay_{call.lays}")(call, row)

    def lay_step(self, call: Call, row: Row) -> None:
        """The call's step: page by page if it is about one, else once."""
        if "gfn" not in call.wants or call.over == ONCE:
            self.step(call, row, self.gfns[0] if self.gfns else None)
        elif self.gfns is None:
            self.step(call, row, None)
        else:
            with self.page_loop():
                for gfn in self.gfns:
                    self.step(call, row, gfn)

    def step(self, call: Call, row: Row, gfn: Gfn | None) -> None:
        """One draft of a call's step, on the page of the fault if no gfn is given."""
        assert call.step is not None
        known = self.known_to_a_step(row, gfn)
        faulting = "gfn" in call.wants and gfn is None
        args = tuple(known[name] for name in call.wants if not (faulting and name == "gfn"))
        ways = {
            end: self.unwind(why)
            for end, why in call.ends.items()
            if why != "userspace" or self.has(MEMSLOTS)
        }
        self.emit(at_fault(call.step) if faulting else call.step, args, row, self.shown(call, row, gfn), ways)

    def known_to_a_step(self, row: Row, gfn: Gfn | None) -> dict[str, Any]:
        """What a step may ask for, by the names of its parameters."""
        lo_hi = (self.gfns[0], self.gfns[-1] + 1) if self.gfns else (None, None)
        return {
            "gfn": gfn, "gfns": self.gfns, "request": self.request, "lo": lo_hi[0], "hi": lo_hi[1],
            "as_id": self.as_id,
            "refused": self.refused and gfn == (self.gfns or (None,))[-1], "reserved": self.reserved,
            "covered": self.covered, "section": self.section,
            "kind": self.kind, "to": row.target if row.target in KINDS else self.kind, "call": row.call,
            "word": row.target, "of": "private" if row.target == "private_pfn" else self.kind,
        }  # fmt: skip

    def shown(self, call: Call, row: Row, gfn: Gfn | None) -> str:
        """The call as a run shows it."""
        if call.shows == "word":
            return f"{row.call}({row.target})"
        if not call.shows:
            return f"{row.call}()"
        page = self.conf.backing["private", gfn] if call.shows == "pfn" and gfn is not None else f"gfn {gfn}"
        more = "SMM" if self.as_id else self.known_to_a_step(row, gfn)["to"] if "to" in call.wants else ""
        return f"{row.call}({', '.join(filter(None, (page if gfn is not None else '', more)))})"

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

    def lay_zap(self, call: Call, row: Row) -> None:
        """kvm_unmap_gfn_range(): between two gfns it may yield; of a TD's private pages the mirror's leaves go."""
        if self.conf.tdx and _zapped(self.kind) == "private":
            self.zap_private(call, row)
            return
        if self.gfns is None:
            self.step(call, row, None)
            return
        with self.page_loop():
            for gfn in self.gfns:
                if gfn != self.gfns[0]:
                    self.yields(row)
                self.step(call, row, gfn)

    def yields(self, row: Row) -> None:
        """Between two gfns of a zap: it may flush, drop mmu_lock and take it again."""
        if not (self.has(YIELDS) and self.section == "ioctl"):
            return
        over = self.new_label()
        for step, args, jumps in (
            (mmu.tdp_mmu_yields, (), {"skip": over}),
            (mmu.kvm_flush_remote_tlbs, (), {}),
            (locks.write_unlock, ("mmu_lock",), {}),
            (locks.write_lock, ("mmu_lock",), {}),
        ):
            self.emit(step, args, row, f"{row.call}(): {step.__name__}()", jumps)
        self.mark(over)

    def lay_store(self, call: Call, row: Row) -> None:
        """xa_store() gfn by gfn; where one may fail, the rest of the section goes on with what was stored."""
        first = len(self.drafts)
        self.lay_step(call, row)
        if not self.has(XARRAY) or self.reserved:
            return
        rest = self.rows[self.rows.index(row) + 1 :]
        for n, draft in enumerate(self.drafts[first:]):
            self.partly.append(Partly(f"{self.new_label()}-stored{n}", n, tuple(self.holding), rest))
            draft.jumps["failed"] = self.partly[-1].label

    def lay_hold(self, call: Call, row: Row) -> None:
        """kvm_gmem_get_pfn() in the ioctl, where pages are freed."""
        self.hold_pages(row)

    def hold_pages(self, row: Row) -> None:
        """The ioctl looks up the pages that it works on before it takes a lock that forbids sleeping."""
        with self.page_loop():
            for gfn in self.gfns or ():
                pfn = self.conf.backing["private", gfn]
                self.emit(gmem.hold_page, (gfn,), row, f"kvm_restrictedmem_get_pfn({pfn})")

    def lay_rmpupdate(self, call: Call, row: Row) -> None:
        """RMPUPDATE: where it fails the op gives up (ioctl), or KVM_RUN does (fault path)."""
        if self.gfns is None:
            self.rmpupdates(call, row)
        else:
            with self.page_loop():
                self.rmpupdates(call, row)

    def rmpupdates(self, call: Call, row: Row) -> None:
        """RMPUPDATE of each page, after PSMASH where part of a 2M entry is to be made shared."""
        first, to = len(self.drafts), row.target or self.kind
        splits = to == "shared" and self.conf.folio_2m and self.section != "punch"
        for gfn in self.gfns or (None,):
            if self.gfns and self.section == "ioctl" and gfn != self.gfns[0] and self.takes_folio([row]):
                continue  # RMPUPDATE of its first page has done it
            if splits:
                step, args = (at_fault(sev.psmash_if_2m), ()) if gfn is None else (sev.psmash_if_2m, (gfn,))
                self.emit(step, args, row, "if (2M entry) psmash()")
            self.step(call, row, gfn)
            self.drafts[-1].jumps["unassigned"] = self.unassigned or self.new_label()
            if not self.unassigned:
                self.mark(self.drafts[-1].jumps["unassigned"])
        if not self.has(RMPUPDATE) or not self.conf.has_rmp:
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

    def lay_lock(self, call: Call, row: Row) -> None:
        """Add a lock call, and follow what is held."""
        name, step = row.lock or call.lock or "", call.step
        assert step is not None
        if step in locks.UNDO:
            self.take(step, name)
        else:
            self.drop(step, name)
        self.emit(step, (name,), row, f"{row.call}({name if names_its_lock(row.call) else ''})")

    def take(self, step: Step, name: str) -> None:
        """Remember that the lock is held from here on."""
        self.nests |= {(other, name) for _, other in self.holding if other != name}
        self.holding.append((step, name))

    def drop(self, step: Step, name: str) -> None:
        """Forget the lock, if it was held that way."""
        for held in reversed(self.holding):
            if held[1] == name and locks.UNDO[held[0]] is step:
                self.holding.remove(held)
                return

    def unwind(self, why: str) -> str:
        """Label of the code that drops the locks held here and then leaves for `why`."""
        held = "+".join(f"{take.__name__}:{name}" for take, name in self.holding)
        label = f"{self.prefix}-{why}-{held}"
        self.unwinds[label] = (tuple(self.holding), why)
        return label

    def lay_in_folio_lock(self, call: Call, row: Row) -> None:
        """The folio lock, and the row's body if the RMP entry does not fit; some calls go one way only."""
        if self.kind not in call.parts:
            return
        self.take(locks.mutex_lock, "folio_lock")
        self.emit(locks.mutex_lock, ("folio_lock",), row, f"{row.call}(): folio_lock()")
        fits, known = self.new_label(), self.known_to_a_step(row, None)
        assert call.step is not None
        args = tuple(known[name] for name in call.wants)
        self.emit(call.step, args, row, f"{row.call}(): RMP lookup", {"skip": fits})
        for inner in row.body or ():
            self.row(inner)
        self.mark(fits)
        self.emit(locks.mutex_unlock, ("folio_lock",), row, f"{row.call}(): folio_unlock()")
        self.drop(locks.mutex_unlock, "folio_lock")

    def lay_whole(self, call: Call, row: Row) -> None:
        """A call that stands for others and takes its lock itself: they are shown as its own."""
        for part in (meanings(name, self.section)[0] for name in call.parts[self.kind]):
            does_it = call.step if part.lays == "zap" else part.step
            assert part.step is not None and does_it is not None
            if part.lock and part.step in locks.UNDO:
                self.take(part.step, part.lock)
            elif part.lock:
                self.drop(part.step, part.lock)
            step = at_fault(does_it) if "gfn" in part.wants else does_it
            self.emit(step, (part.lock,) if part.lock else (), row, f"{row.call}(): {part.name}()")

    def zap_private(self, call: Call, row: Row) -> None:
        """tdx: the mirror leaf goes, then the SEAMCALLs of the section zap, leaf by leaf."""
        gfns, within = self.gfns or (), self.section
        with self.page_loop():
            for n, gfn in enumerate(gfns):
                if n:
                    self.yields(row)
                over = self.new_label()
                self.emit(tdx.kvm_unmap_gfn_range, (gfn,), row, f"{row.call}(gfn {gfn})", {"skip": over})
                self.gfns, self.section = (gfn,), str(call.opens)
                for inner in (
                    self.design.rows(self.section, to=self.kind, platform="tdx") if self.design else ()
                ):
                    self.row(inner)
                self.gfns, self.section = gfns, within
                self.mark(over)

    def lay_no_vcpus(self, call: Call, row: Row) -> None:
        """tdh_do_no_vcpus(): a SEAMCALL; if busy, every vCPU is kicked out and kept out, and once more."""
        (gfn,), seamcall = self.gfns or (Gfn(0),), row.target or ""
        leaf = meanings(seamcall, self.section)[0]
        text, done, busy = (
            self.shown(leaf, replace(row, call=seamcall), gfn),
            self.new_label(),
            self.new_label(),
        )
        self.emit(tdx.zap_seamcall, (gfn, seamcall, "kick"), row, text, {"busy": busy})
        self.drafts[-1].after = done
        self.mark(busy)
        self.emit(tdx.stop_vcpus, (), row, "kvm_make_all_cpus_request()")
        self.emit(tdx.zap_seamcall, (gfn, seamcall, None), row, text)
        self.emit(tdx.let_vcpus, (), row, "wait_for_sept_zap = false")
        self.mark(done)

    def lay_map(self, call: Call, row: Row) -> None:
        """kvm_tdp_mmu_map(); tdx: on the mirror root it is the section aug.

        What a freeze finds present already is skipped: all that follows for the same SPTE.
        """
        if not (self.conf.tdx and self.kind == "private"):
            self.lay_step(call, row)
            return
        within, self.section = self.section, str(call.opens)
        rows = self.design.rows(self.section, to="private", platform="tdx") if self.design else ()
        ends: dict[int, list[str]] = {}
        for n, inner in enumerate(rows):
            self.row(inner)
            if does(inner.call, "freezes"):
                spte = inner.target
                last = max((k for k in range(n, len(rows)) if self.spte(rows[k]) == spte), default=n)
                ends.setdefault(last, []).append(self.new_label())
                self.drafts[-1].jumps["skip"] = ends[last][-1]
            for label in ends.get(n, ()):
                self.mark(label)
        self.section = within

    def spte(self, row: Row) -> str | None:
        """Which SPTE of the mirror a call of the section aug is for: that of the table or the leaf's."""
        return row.target if row.target in MIRROR else self.first(row).spte

    def new_label(self) -> str:
        """Return a label that no other place has."""
        self._labels += 1
        return f"{self.prefix}-{self._labels}"

    def mark(self, label: str) -> None:
        """Emit a label at the place reached now, on a step that does nothing: `without_markers()` removes it."""
        self.drafts.append(Draft(nothing, (), "", None, self.section, label=label))


def _zapped(kind: str) -> str:
    """tdx: a conversion zaps the mappings of the kind that the page had (kvm_arch_pre_set_memory_attributes())."""
    return "private" if kind == "shared" else "shared"


def _op(rows: Sequence[Row], i: int) -> Sequence[Row]:
    """The rows from `i` on for which one call of the series' op stands."""
    same = (rows[i].line, rows[i].origin, rows[i].text)
    n = i
    while n < len(rows) and rows[n].call in OP_PARTS and (rows[n].line, rows[n].origin, rows[n].text) == same:
        n += 1
    return rows[i:n]

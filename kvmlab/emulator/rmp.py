"""The RMP at real size: a byte of state and a gfn per PFN, and the rules of hw/ applied once per distinct state.

A range is brought down to keys (state, whether the GPA is the expected one, place in a 2M region); each distinct
key is decoded, given to the scalar rule, and the answers are scattered with a look-up table.  A 2M entry is
stored on all its 512 pages, so that a look-up of a sub-page finds it, as __snp_lookup_rmpentry() does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..hw import snp
from ..hw.memory import Gfn
from ..hw.snp import PG_2M, PG_4K, RmpEntry, Rmpupdate
from ..hw.snp import pages as snp_pages
from ..hw.snp.pages import PAGES_2M
from .memory import U8, U16, U32, grown, prefix

ASSIGNED, BIG, IMMUTABLE, VMSA, VALIDATED, ASID = 1, 2, 4, 8, 16, 1 << 5
SAME, PART, MAP_BIG, REGION = 1 << 7, 1 << 8, 1 << 9, 1 << 10  # parts of a key that are not stored
OTHERS = PART  # in keys of 2M operations every page is the first of its region
EXPECTED = Gfn(0)  # stands in a key for whatever gfn a page is expected to have
OURS = 1


def encode(entry: RmpEntry) -> int:
    """The byte that stores an entry, without its GPA."""
    flags = (entry.assigned, entry.size == PG_2M, entry.immutable, entry.vmsa, entry.validated)
    return sum(int(on) << bit for bit, on in enumerate(flags)) | min(entry.asid, 3) * ASID


@lru_cache(None)
def decode(key: int) -> RmpEntry:
    """The entry that a key stands for; its GPA is 0 where it is the expected one, else 1."""
    assigned = bool(key & ASSIGNED)
    return RmpEntry(
        assigned=assigned,
        asid=key >> 5 & 3,
        gpa=(EXPECTED if key & SAME else Gfn(1)) if assigned else None,
        size=PG_2M if key & BIG else PG_4K,
        immutable=bool(key & IMMUTABLE),
        vmsa=bool(key & VMSA),
        validated=bool(key & VALIDATED),
    )


def distinct(keys: U16) -> list[int]:
    """The distinct keys of an array, in order."""
    return [int(key) for key in np.flatnonzero(np.bincount(keys, minlength=1))]


class Rmp:
    """RMP entries of all PFNs; every change goes through a rule of hw/snp.py or hw/snp/pages.py.

    `failures` maps a PFN to the code that RMPUPDATE is made to answer there (an injected failure).
    """

    def __init__(self, identical_keeps_validated: bool = True, resizes: bool = False) -> None:
        self.state: U8 = np.zeros(0, np.uint8)
        self.gfn: U32 = np.zeros(0, np.uint32)
        self.permissions: dict[int, snp_pages.Permissions] = {}
        self.failures: dict[int, Rmpupdate] = {}
        self.keeps, self.resizes = identical_keeps_validated, resizes

    def grow(self, pfns: int) -> None:
        """Make room for PFNs below `pfns`; they start as the hypervisor's."""
        self.state, self.gfn = grown(self.state, pfns), grown(self.gfn, pfns)

    def entry(self, pfn: int) -> RmpEntry:
        """The entry that covers one PFN, with its GPA as a gfn (that of the head for a 2M entry).

        A PFN beyond the RMP's end counts as the hypervisor's.
        """
        if not self._covers(pfn):
            return snp.HYPERVISOR
        state = int(self.state[pfn])
        head = pfn - pfn % PAGES_2M if state & BIG else pfn
        found = decode(state)
        return found._replace(gpa=Gfn(int(self.gfn[head]))) if found.assigned else found

    def _covers(self, pfn: int) -> bool:
        return 0 <= pfn < len(self.state)

    def put(self, pfn: int, entry: RmpEntry) -> None:
        """Overwrite one entry (firmware, tests): no rule is asked."""
        self.state[pfn], self.gfn[pfn] = encode(entry), entry.gpa or 0

    def assigned(self, pfn: int, n: int = 1) -> NDArray[np.bool_]:
        """Which of `n` PFNs are assigned."""
        found: NDArray[np.bool_] = self.state[pfn : pfn + n] & ASSIGNED != 0
        return found

    def big(self, pfn: int, n: int = 1) -> NDArray[np.bool_]:
        """Which of `n` PFNs are covered by a 2M entry."""
        found: NDArray[np.bool_] = (self.state[pfn : pfn + n] & (BIG | ASSIGNED)) == (BIG | ASSIGNED)
        return found

    def region_assigned(self, pfn: int) -> bool:
        """Whether any 4K page of the PFN's 2M region is assigned."""
        head = pfn - pfn % PAGES_2M
        return bool(self.assigned(head, PAGES_2M).any())

    def _same(self, pfn: int, n: int, gfn: int) -> U16:
        want = np.arange(gfn, gfn + n, dtype=np.uint32)
        same: U16 = (self.gfn[pfn : pfn + n] == want).astype(np.uint16) * np.uint16(SAME)
        return same

    def update(self, pfn: int, n: int, gfn: int | None, size: str = PG_4K) -> tuple[int, Rmpupdate]:
        """RMPUPDATE of `n` PFNs one after another: towards the guest's `gfn` on, or (None) the hypervisor.

        Stops at the first that fails.  Returns how many PFNs were done, and the last code.
        """
        step = PAGES_2M if size == PG_2M else 1
        room = (len(self.state) - pfn) // step * step
        covered = self._covers(pfn) and room > 0
        if snp_pages.address_fails(size, covered=covered, aligned=True, part=pfn % PAGES_2M > 0):
            return 0, Rmpupdate.FAIL_INPUT
        if n > room:
            done, code = self.update(pfn, room, gfn, size)
            return done, Rmpupdate.FAIL_INPUT if code == Rmpupdate.OK else code
        state = self.state[pfn : pfn + n]
        keys = state.astype(np.uint16) | self._same(pfn, n, gfn or 0)
        if step == 1:
            if bool((state & BIG).any()):
                keys |= (np.arange(pfn, pfn + n) % PAGES_2M > 0).astype(np.uint16) * np.uint16(PART)
        else:
            blocks = state.reshape(-1, step)
            others = ((blocks[:, 1:] & (ASSIGNED | BIG)) == ASSIGNED).any(axis=1)
            keys = keys[::step] | others.astype(np.uint16) * np.uint16(OTHERS)
        new = RmpEntry(
            gfn is not None, OURS if gfn is not None else 0, EXPECTED if gfn is not None else None, size
        )
        good, code, lut = np.zeros(2048, bool), Rmpupdate.OK, np.zeros(2048, np.uint8)
        codes: dict[int, Rmpupdate] = {}
        for key in distinct(keys):
            codes[key], after = self._rule(key, new, size)
            good[key], lut[key] = codes[key] == Rmpupdate.OK, encode(after)
        done = len(keys) if good[list(codes)].all() else prefix(good[keys])
        if done < len(keys):
            code = codes[int(keys[done])]
        for broken in sorted(self.failures):
            if pfn <= broken < pfn + done * step:
                done, code = (broken - pfn) // step, self.failures[broken]
                break
        self._scatter(pfn, lut[keys[:done]], step, gfn)
        return done * step, code

    def _rule(self, key: int, new: RmpEntry, size: str) -> tuple[Rmpupdate, RmpEntry]:
        flag = bool(key & PART)
        return snp_pages.rmpupdate_at(
            decode(key & ~PART), new, part=flag and size == PG_4K, others=flag and size == PG_2M,
            resizes=self.resizes, identical_keeps_validated=self.keeps,
        )  # fmt: skip

    def _scatter(self, pfn: int, states: U8, step: int, gfn: int | None) -> None:
        n = len(states) * step
        for page in [p for p in self.permissions if pfn <= p < pfn + n]:
            same = gfn is not None and self.gfn[page] == gfn + page - pfn
            if not (same and self.keeps and self.state[page] == states[(page - pfn) // step]):
                del self.permissions[page]
        self.state[pfn : pfn + n] = states if step == 1 else np.repeat(states, step)
        self.gfn[pfn : pfn + n] = 0 if gfn is None else np.arange(gfn, gfn + n, dtype=np.uint32)

    def psmash(self, pfn: int) -> Rmpupdate:
        """PSMASH at a PFN: its 2M entry becomes 512 of 4K with consecutive GPAs, Validated kept."""
        covered = self._covers(pfn)
        entry = decode(int(self.state[pfn]) | SAME) if covered else snp.HYPERVISOR
        code, after = snp_pages.psmash_at(entry, covered=covered, part=pfn % PAGES_2M > 0)
        if code == Rmpupdate.OK:
            self.state[pfn : pfn + PAGES_2M] = encode(after)
        return code

    def pvalidate(
        self, pfn: int, n: int, gfn: int, validate: bool, asked: str, map_big: bool
    ) -> tuple[int, snp.Pvalidate | str]:
        """PVALIDATE of `n` PFNs (a multiple of 512 for 2M): how many were done, and the last answer."""
        step = PAGES_2M if asked == PG_2M else 1
        keys = (self.state[pfn : pfn + n].astype(np.uint16) | self._same(pfn, n, gfn))[::step]
        lut, good = np.zeros(2048, np.uint8), np.zeros(2048, bool)
        answers: dict[int, snp.Pvalidate | str] = {}
        for key in distinct(keys):
            answers[key], after = snp_pages.pvalidate_at(
                decode(key),
                validate,
                asid=OURS,
                gpa=EXPECTED,
                asked=asked,
                mapping=PG_2M if map_big else PG_4K,
            )
            good[key], lut[key] = answers[key] == snp.Pvalidate.OK, encode(after)
        done = prefix(good[keys])
        states = lut[keys[:done]]
        self.state[pfn : pfn + done * step] = states if step == 1 else np.repeat(states, step)
        answer = snp.Pvalidate.OK if done == len(keys) else answers[int(keys[done])]
        return done * step, answer

    def fits(
        self, pfn: int, n: int, gfn: int, enc: bool, op: str, validate: bool, prepares: bool
    ) -> NDArray[np.bool_]:
        """Which pages an access will get past once they are mapped, by the same rules, asked one state at a time.

        `prepares`: the fault assigns what is unassigned, at 4K.  The mapping is taken to be 4K.
        """
        keys = self.state[pfn : pfn + n].astype(np.uint16) | self._same(pfn, n, gfn)
        lut = np.zeros(2048, bool)
        for key in distinct(keys):
            entry = decode(key)
            if enc and prepares and not entry.assigned:
                entry = snp.assigned_to(OURS, EXPECTED)
            if op == "pvalidate":
                answer, _ = snp_pages.pvalidate_at(entry, validate, asid=OURS, gpa=EXPECTED)
                lut[key] = answer == snp.Pvalidate.OK
            else:
                lut[key] = snp.guest_access(entry, enc=enc, op=op, asid=OURS, gpa=EXPECTED) == snp.OK
        found: NDArray[np.bool_] = lut[keys]
        return found

    def check(self, pfns: U32, gfns: U32, map_big: NDArray[np.bool_], enc: bool, op: str) -> U8:
        """The access check of an SNP guest, page by page: an index into OUTCOMES each."""
        keys = self.state[pfns].astype(np.uint16)
        keys |= (self.gfn[pfns] == gfns).astype(np.uint16) * np.uint16(SAME)
        if map_big.any():
            keys |= map_big.astype(np.uint16) * np.uint16(MAP_BIG)
            if not enc and op == "write":
                keys |= self._regions(pfns, map_big)
        lut = np.zeros(2048, np.uint8)
        for key in distinct(keys):
            lut[key] = OUTCOMES.index(_answer(key, enc, op))
        return lut[keys]

    def _regions(self, pfns: U32, map_big: NDArray[np.bool_]) -> U16:
        """REGION where a page is mapped large and its 2M region holds an assigned page."""
        flags = np.zeros(len(pfns), np.uint16)
        regions = pfns >> np.uint32(9)
        for region in np.unique(regions[map_big]):
            if self.region_assigned(int(region) * PAGES_2M):
                flags[map_big & (regions == region)] = REGION
        return flags


OUTCOMES: tuple[str, ...] = (snp.OK, snp.NPF_RMP, snp.VC)
Check = Callable[..., str]


@lru_cache(None)
def _answer(key: int, enc: bool, op: str) -> str:
    """One access check, of a key's entry, mapping and region."""
    if op == "pvalidate":
        return snp.OK  # Rmp.pvalidate() asks for itself
    return snp.guest_access(
        decode(key & ~(MAP_BIG | REGION)), enc=enc, op=op, asid=OURS, gpa=EXPECTED,
        size=PG_2M if key & MAP_BIG else PG_4K, region_assigned=bool(key & REGION),
    )  # fmt: skip

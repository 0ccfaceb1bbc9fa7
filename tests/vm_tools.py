"""What several tests of the emulator start from."""

from __future__ import annotations

from typing import Any

from kvmlab.emulator import Vm
from kvmlab.hw import snp
from kvmlab.hw.snp import PG_2M
from kvmlab.hw.snp.entry import RmpEntry
from kvmlab.hw.snp.pages import pvalidate_at

P, M2 = 4096, 1 << 21
OURS = snp.assigned_to(1, 0)
VALID = OURS._replace(validated=True)
BIG = VALID._replace(size=PG_2M)


def private_vm(pages: int = 4, **more: Any) -> Vm:
    """A VM whose guest has accepted all its memory."""
    vm = Vm("snp", pages, **more)
    vm.place(0, "validated", pages * P)
    return vm


def pvalidate(entry: RmpEntry, **more: int | str) -> tuple[Any, RmpEntry]:
    return pvalidate_at(entry, **{"validate": True, "asid": 1, "gpa": 0, **more})

"""A small slice of each kind of fuzzing; `python tests/fuzz_text.py` does as much of it as one likes."""

from __future__ import annotations

import random
import sys

import pytest
from fuzz_text import BAD, FUZZ


@pytest.mark.parametrize(("kind", "count"), [("texts", 600), ("codes", 600)])
def test_nothing_gets_through(kind: str, count: int) -> None:
    found = FUZZ[kind](count, random.Random(7))
    assert [what for what in found if what.startswith(BAD)] == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_a_command_that_gets_signals_ends_in_a_line_and_leaves_no_process() -> None:
    found = FUZZ["signals"](4, random.Random(7))
    assert [what for what in found if what.startswith(BAD)] == []

"""Cells, packing and views."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlab.model.state import Field, Layout, ModelError, View

LAYOUT = Layout(
    [
        Field("pc", tuple(range(40)), ("CPU0", "CPU1")),
        Field("wide", (*range(1000), *(f"v{i}" for i in range(24)))),
        Field("attr", ("shared", "private"), (0, 1)),
        Field("filler", tuple(range(2**15)), tuple(range(4))),
        Field("one", ("only",)),
    ]
)


@given(st.data())
def test_packing_then_unpacking_gives_every_cell_back(data: Any) -> None:
    values = {
        (c.name if c.key is None else (c.name, c.key)): data.draw(st.sampled_from(c.domain))
        for c in LAYOUT.cells
    }
    assert LAYOUT.unpack(LAYOUT.pack(values)) == values


def test_no_cell_straddles_a_word() -> None:
    assert LAYOUT.words == 2
    assert all(c.shift // 64 == (c.shift + max(c.bits, 1) - 1) // 64 for c in LAYOUT.cells)


def test_cells_do_not_overlap() -> None:
    seen = 0
    for c in LAYOUT.cells:
        assert not seen & c.mask
        seen |= c.mask


def test_a_domain_of_one_value_costs_no_bits() -> None:
    assert LAYOUT.cell("one").bits == 0


def test_a_value_outside_the_domain_is_refused_with_cell_value_and_domain() -> None:
    with pytest.raises(ModelError, match=r"attr\[1\] cannot hold 'secret'; allowed: \('shared', 'private'\)"):
        LAYOUT.pack({("attr", 1): "secret"})


def test_a_field_cannot_be_declared_twice() -> None:
    with pytest.raises(ModelError, match="declared twice"):
        Layout([Field("a", (0, 1)), Field("a", (0, 1))])


def test_a_family_may_be_declared_member_by_member() -> None:
    layout = Layout([Field("rmp", (0, 1), ("P0",)), Field("rmp", (0, 1, 2), ("P1",))])
    assert [len(c.domain) for c in layout.cells] == [2, 3]


def test_the_footprint_is_what_was_read_and_not_what_was_only_written() -> None:
    view = View(LAYOUT, 0)
    view.attr[0] = "private"
    assert view.attr[0] == "private" and view.reads == 0
    assert view.attr[1] == "shared" and view.reads == LAYOUT.cell("attr", 1).mask


def test_a_view_refuses_a_cell_that_the_machine_does_not_have() -> None:
    view = View(LAYOUT, 0)
    with pytest.raises(AttributeError, match="no cell 'rmp'"):
        view.rmp  # noqa: B018
    with pytest.raises(AttributeError, match="no single cell 'attr'"):
        view.attr = 1


def test_choices_are_enumerated_once_each() -> None:
    seen: list[str] = []
    prefix: tuple[int, ...] | None = ()
    while prefix is not None:
        view = View(LAYOUT, 0, prefix=prefix)
        first = view.choose("ab")
        seen.append(first + (view.choose("xyz") if first == "a" else ""))
        prefix = view.next_prefix()
    assert seen == ["ax", "ay", "az", "b"]

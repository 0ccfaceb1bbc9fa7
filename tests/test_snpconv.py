"""The yardstick protocol has the state counts that SPIN, TLC and plain Python give it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import bench_engines
import pytest
import snpconv

from kvmlab.explore import arrays, rows

# (pages, vCPUs): states and transitions for the orders 0, 1, 2, 3
STATES = {
    (1, 1): ((424, 1198), (398, 1116), (449, 1198), (478, 1342)),
    (2, 2): ((18_024, 74_321), (15_684, 64_313), (19_202, 74_321), (25_314, 103_913)),
    (1, 3): ((122_356, 560_574), (97_508, 441_770), (133_193, 560_574), (274_006, 1_243_398)),
}


def cases(*sizes: tuple[int, int]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("P", "V", "order", "expected"),
        [(*size, order, expected) for size in sizes for order, expected in enumerate(STATES[size])],
    )


@cases((1, 1), (2, 2))
def test_the_dict_engine_counts_what_other_checkers_count(P: int, V: int, order: int, expected: Any) -> None:
    graph = rows.search(snpconv.build(P, V, order))
    assert (len(graph.states), graph.transitions) == expected


@cases((1, 1), (2, 2), (1, 3))
def test_the_array_engine_counts_what_other_checkers_count(P: int, V: int, order: int, expected: Any) -> None:
    graph = arrays.search(snpconv.build(P, V, order))
    assert (len(graph.states), graph.transitions) == expected


@cases((1, 3))
def test_a_sweep_counts_what_other_checkers_count(P: int, V: int, order: int, expected: Any) -> None:
    space = arrays.sweep(snpconv.build(P, V, order))
    assert (len(space.states), space.transitions) == expected


@pytest.mark.parametrize(
    ("order", "strict", "verdict"),
    [
        (0, False, {}),
        (1, False, {}),
        (2, False, {"host-rmp-fault": 13}),
        (3, False, {"stale-mapping": 22}),
        (0, True, {"host-rmp-fault": 14}),
        (1, True, {}),
    ],
)
def test_the_shortest_violation_is_the_one_that_other_checkers_find(
    order: int, strict: bool, verdict: dict[str, int]
) -> None:
    found = arrays.search(snpconv.build(2, 2, order, strict)).hit_depth
    assert {prop: depth for prop, depth in found.items() if prop != "deadlock"} == verdict


@pytest.mark.skipif(not (shutil.which("spin") and shutil.which("gcc")), reason="needs spin and gcc")
@pytest.mark.parametrize("order", [0, 3])
def test_spin_counts_the_same_states(order: int, tmp_path: Path) -> None:
    pan = bench_engines.compile_pan(2, 2, order, tmp_path, breadth_first=False)
    assert bench_engines.run_pan(pan)[:2] == STATES[2, 2][order]

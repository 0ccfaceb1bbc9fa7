"""What Python callers may give, and what they are told when it is none of that."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest

import kvmlab
from kvmlab.errors import InputError
from kvmlab.pool import processes, spread


@pytest.mark.parametrize("design", [None, 7, ["no-zap"]])
def test_what_is_no_design_is_refused(design: int | list[str] | None) -> None:
    with pytest.raises(InputError, match="a design is a Design, a name, a file or a text"):
        kvmlab.check(design)


@pytest.mark.parametrize("limit", ["x", 0, -(10**5000), 1.5], ids=["text", "none", "negative", "part"])
def test_what_is_no_limit_is_refused(limit: Any) -> None:
    with pytest.raises(InputError, match="a positive whole number of states"):
        kvmlab.check("no-zap", limit=limit)


def test_a_limit_of_any_size_is_one() -> None:
    assert kvmlab.check("no-zap", scenario="tiny", limit=10**5000).complete


def test_out_of_memory_says_in_which_case_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("kvmlab.verdict.report.explore", exhausted)
    with pytest.raises(
        MemoryError, match="no-zap, snp, tiny, split backing: out of memory; a limit on states"
    ):
        kvmlab.check("no-zap", scenario="tiny")


def test_a_matrix_takes_designs_and_texts_and_names_each_by_itself() -> None:
    mine = kvmlab.Design.parse("base: no-zap\n", "mine.kvm")
    text = "base: upstream\n\nrmp_fault:\n    return\n"
    found = kvmlab.matrix([mine, text, text, "no-zap"], ["snp"], ["tiny"], ["split"])
    assert [square.design for square in found.squares] == ["mine.kvm", "(text)", "(text) 2", "no-zap"]
    assert [square.worst for square in found.squares][::3] == ["kernel-bug", "kernel-bug"]
    assert all(name in str(found) for name in ("mine.kvm", "(text) 2", "BUG kernel-bug"))


def test_several_processes_give_the_same_matrix_as_one() -> None:
    asked = (["no-zap", "upstream"], ["snp"], ["tiny", "host-io"], ["split"])
    assert kvmlab.matrix(*asked, jobs=2) == kvmlab.matrix(*asked)


@pytest.mark.parametrize(("wanted", "items", "most"), [(20_000, 8, 8), (2, 8, 2), (8, 1, 1), (1, 0, 1)])
def test_no_more_processes_start_than_there_is_work_and_there_are_cpus(
    wanted: int, items: int, most: int
) -> None:
    assert processes(wanted, items) == min(most, os.cpu_count() or 1)


def fails_at(number: Any, how: Any) -> Any:
    if number == how:
        raise MemoryError("no more") if how == 3 else os._exit(1)
    return number


def fails_at_3(number: Any) -> Any:
    return fails_at(number, 3)


def dies_at_5(number: Any) -> Any:
    return fails_at(number, 5)


@pytest.mark.parametrize(
    ("function", "told"), [(fails_at_3, "no more"), (dies_at_5, "a process that checked was killed")]
)
def test_what_happens_in_a_process_is_raised_where_it_is_waited_for(
    function: Callable[..., Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(MemoryError, match=told), spread(function, range(8), 2) as results:
        list(results)


def test_without_the_lab_extra_the_workbench_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kvmlab.show.widget", raising=False)
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(
        ImportError, match=r"kvmlab.workbench needs anywidget, which is not installed; `make lab`"
    ):
        kvmlab.workbench  # noqa: B018 - it is imported when it is asked for

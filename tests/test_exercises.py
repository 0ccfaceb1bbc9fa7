"""Every exercise of the notebooks can be solved by what its text says, and every live cell stands alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("anywidget", reason="needs anywidget")

import notebook_rules

import notebooks
from kvmlab.hw.tdx.entry import State
from kvmlab.show.sept_board import SeptBoard
from kvmlab.show.sept_machine import BoardState, Click, answer, possible
from kvmlab.show.widget import Workbench

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
TURN = "## Your turn"
LIVE = ("workbench(", "sept_board(")
UP, DOWN = -1, 1  # Alt+Up, Alt+Down


def cells(path: Path) -> list[tuple[str, str]]:
    """Each cell of a notebook: its type, its source."""
    return [(cell["cell_type"], cell["source"]) for cell in notebooks.load(path)["cells"]]


def run(source: str) -> Any:
    """What a cell shows when it is the first that a fresh kernel runs: the value of its last line."""
    *lines, last = source.splitlines()
    names: dict[str, Any] = {"display": lambda *_: None}
    exec("\n".join(lines), names)
    return eval(last, names)


def exercise(number: str) -> tuple[str, Any]:
    """The text of a notebook's exercise, and what the cell below it shows."""
    (path,) = (path for path in NOTEBOOKS if path.name.startswith(number))
    found = cells(path)
    (at,) = (n for n, (_, source) in enumerate(found) if TURN in source)
    return found[at][1].partition(TURN)[2], run(found[at + 1][1])


def bench_of(number: str, *named: str) -> Workbench:
    """The workbench of an exercise whose text names these lines and keys."""
    text, bench = exercise(number)
    assert isinstance(bench, Workbench)
    assert all(name in text for name in named)
    return bench


def press(bench: Workbench, section: str, text: str, by: int) -> list[str]:
    """Alt+Up or Alt+Down on a line; the properties that are violated then."""
    line = [line.strip() for line in bench.session.design.lines(section)].index(text)
    bench._handle_custom_msg({"do": "move", "section": section, "line": line, "by": by}, [])
    bench.wait()
    assert not bench.view["problem"]
    return bench.report.violated


def take(bench: Workbench, actor: str, until: str) -> None:
    """Take over, and let one CPU step until one of its steps says `until`."""
    while True:
        at = bench.session.position
        bench._handle_custom_msg({"do": "take", "at": at, "actor": actor, "choice": 0}, [])
        assert not bench.view["problem"]
        if until in bench.view["trace"]["steps"][-1]["say"]:
            return


def test_every_exercise_is_solved_here() -> None:
    found = {path.name[:2] for path in NOTEBOOKS for _, source in cells(path) if TURN in source}
    assert found == {"00", "01", "02", "04", "05", "06"}


LIVE_CELLS = [
    pytest.param(source, id=f"{path.name[:2]}-{notebook_rules.cell_id(n)}")
    for path in NOTEBOOKS
    for n, (kind, source) in enumerate(cells(path))
    if kind == "code" and any(call in source.splitlines()[-1] for call in LIVE)
]


@pytest.mark.parametrize("source", LIVE_CELLS)
def test_a_live_cell_stands_alone_in_a_fresh_kernel(source: str) -> None:
    assert isinstance(run(source), Workbench | SeptBoard)


def test_there_are_live_cells() -> None:
    assert len(LIVE_CELLS) >= 6


def test_the_tour_s_line_goes_wrong_under_the_lock_and_right_above_it() -> None:
    op = "static_call(kvm_x86_update_mem_attr)()"
    bench = bench_of("00", f"`{op}`", "Alt+Up")
    assert bench.report.violated == []
    assert press(bench, "ioctl", op, UP) == ["sleep-in-atomic"]
    presses = 1
    while press(bench, "ioctl", op, UP):
        presses += 1
    assert presses == 4


def test_cpu1_goes_round_v8_s_loop_twice_and_gets_out() -> None:
    bench = bench_of("01", "Take over", "#NPF with the RMP bit twice")
    bench._handle_custom_msg({"do": "position", "position": 0}, [])
    take(bench, "CPU0", "kvm_mmu_invalidate_end")
    take(bench, "CPU0", "write_unlock")
    for _ in range(2):
        take(bench, "CPU1", "RMP gfn 0")
    take(bench, "CPU0", "rmpupdate")
    take(bench, "CPU1", "validated")
    assert all(bench.session.so_far().values())


def test_the_unmap_moved_before_the_window_s_second_half_violates_nothing() -> None:
    line = "if (attr == private)"
    bench = bench_of("02", f"`{line}`", "Alt+Up")
    assert bench.report.violated == ["host-rmp-fault"]
    seen = [press(bench, "ioctl", line, UP)]
    while seen[-1]:
        seen.append(press(bench, "ioctl", line, UP))
    assert len(seen) == 10
    assert ["sleep-in-atomic"] in seen


def test_the_blocked_page_is_free_after_three_clicks_and_track_can_be_busy() -> None:
    text, board = exercise("04")
    assert "as few clicks as possible" in text
    assert "makes TRACK busy" in text
    ways: dict[BoardState, tuple[Click, ...]] = {board.at: ()}
    assert board.at.entry == State.BLOCKED
    queue = [board.at]
    for at in queue:  # grows while we go: breadth first
        for click in (click for click in Click if possible(at, click)):
            after = answer(at, click).after
            if after not in ways:
                ways[after] = (*ways[at], click)
                queue.append(after)
    free = min((way for at, way in ways.items() if at.entry == State.FREE), key=len)
    assert len(free) == 3
    busy = [at for at in ways if possible(at, Click.TRACK) and "BUSY" in answer(at, Click.TRACK).name]
    assert busy


def test_two_neighbours_of_the_zap_may_change_places() -> None:
    bench = bench_of("05", "Which two neighbours", "`zap:`", "Alt+Up")
    lines = [line.strip() for line in bench.session.design.lines("zap")]
    clean = []
    for upper, lower in pairwise(lines):
        if not press(bench, "zap", upper, DOWN):
            clean.append((upper, lower))
        bench._handle_custom_msg({"do": "undo"}, [])
        bench.wait()
    assert clean == [("tdh_phymem_page_wbinvd()", "tdx_quirk_reset_page()")]


def test_the_discard_moved_to_the_front_violates_nothing() -> None:
    line = "truncate_inode_pages_range()"
    bench = bench_of("06", f"`{line}`", "`punch:`", "Alt+Up")
    assert bench.report.violated == ["kernel-bug"]
    presses = 1
    while press(bench, "punch", line, UP):
        presses += 1
    assert presses == 2

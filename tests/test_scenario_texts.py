"""Scenarios as text: what is said, what is refused and how, files, sizes, and codes that carry them."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvmlab
from kvmlab import InputError
from kvmlab.design import DesignError
from kvmlab.kernel.failures import RMPUPDATE
from kvmlab.machine.conf import YIELDS
from kvmlab.machine.scenario import Converts, Discards, HostWrites
from kvmlab.machine.scenario_text import parse_scenario, spelled
from kvmlab.machine.scenarios import NAMES, SCENARIOS, find_scenario, read_scenario, scenario_text

OWN = """
// own: two gfns go private while the VMM punches the second
start: shared
asks: private            // once
vcpus: 1
memory:
    gfns 0-1
threads:
    vmm: punch(gfn 1)
    host: write(freed page)
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_scenario_that_ships_is_spelled_as_it_stands_in_its_file(name: str) -> None:
    assert spelled(SCENARIOS[name]) == scenario_text(name)


def test_every_file_is_listed() -> None:
    folder = Path(kvmlab.__file__).parent / "scenarios"
    assert {path.stem for path in folder.glob("*.kvm")} == set(NAMES)


def test_a_text_says_who_acts() -> None:
    found = parse_scenario(OWN)
    assert (found.name, found.eras, found.racers, found.gfns) == ("own", ("shared", "private"), 0, (0, 1))
    assert found.threads == (Discards("any time", (1,)), HostWrites("freed"))


def test_what_is_not_said_is_as_in_tiny() -> None:
    tiny = SCENARIOS["tiny"]
    assert parse_scenario(f"// tiny: {tiny.title}\nstart: shared\nasks: private\n") == tiny


def test_it_may_be_quoted_from_a_mail() -> None:
    assert parse_scenario("".join(f"> > {line}\n" for line in OWN.splitlines())) == parse_scenario(OWN)


def test_failures_and_yields_are_named() -> None:
    found = parse_scenario("start: shared\nasks: private\nmay: rmpupdate fails, zap yields\n")
    assert found.may == (RMPUPDATE, YIELDS)


def test_another_ioctl_may_be_one_that_cannot_reserve() -> None:
    text = "start: shared\nasks: private\nmemory:\n    gfns 0-1\nthreads:\n    vmm: ioctl(gfn 1) cannot reserve\n"
    assert parse_scenario(text).threads == (Converts((1,), refused=True),)


@pytest.mark.parametrize(
    ("line", "message", "allowed"),
    [
        ("start: shard", "'shard' is not known here", "allowed: shared, private"),
        ("asks: private, public", "'public' is not known here", "allowed: shared, private"),
        (
            "asks: shared",
            "it is shared already when the guest asks for it",
            "allowed: the other kind each time",
        ),
        ("vcpus: 0", "'0' is not known here", "allowed: 1, 2, 3, 4, 5, 6"),
        ("vcpus: many", "'many' is not known here", "allowed: 1, 2, 3, 4, 5, 6"),
        ("guest: carless", "'carless' is not known here", "allowed: correct, strays, careless, hostile"),
        ("exits: never", "'never' is not known here", "allowed: rerun, convert"),
        ("may: rmpupdate", "'rmpupdate' is not known here", "allowed: rmpupdate fails, xarray fails"),
        ("thread: vmm", "unknown line 'thread: vmm'", "allowed: threads:"),
        ("punch()", "unknown line 'punch()'", "allowed: start: shared"),
        ("memory: gfn 0", "'memory:' is a list: its lines stand below it, indented", ""),
        ("memory:\n    pages 0-1", "'pages 0-1' says nothing of memory", "such as: gfns 0-1"),
        ("memory:\n    gfns 3-1", "no range of gfns", "allowed: 0 to 7, the lower one first"),
        ("memory:\n    gfns 0-9", "no range of gfns", "allowed: 0 to 7, the lower one first"),
        ("memory:\n    gfns 1-2", "gfns are counted from 0", "allowed: gfns 0-2"),
        ("memory:\n    converted: gfn 1", "not all of that is memory", "allowed: gfn 0"),
        ("memory:\n    unused: gfn 4", "not all of that is memory", "allowed: gfn 0"),
        ("memory:\n    memslot: gfns 0-1", "not all of that is memory", "allowed: gfn 0"),
        (
            "memory:\n    unused: gfn 0, smm",
            "'unused: gfn 0, smm' says nothing of memory",
            "such as: gfns 0-1",
        ),
        ("threads:\n    vmm: pnuch()", "'vmm: pnuch()' is no thread", "such as: vmm: punch()"),
        ("threads:\n    host: write(page)", "'host: write(page)' is no thread", "such as: host: write("),
        ("threads:\n    vmm: punch(gfn 1)", "a thread works on what is no memory", "allowed: gfn 0"),
        ("start: shared\nstart: shared", "'start:' is given twice", ""),
    ],
)
def test_what_it_does_not_take_is_told_with_line_and_caret(line: str, message: str, allowed: str) -> None:
    text = line if line.startswith("start") else f"start: shared\n{line}"
    with pytest.raises(DesignError) as caught:
        parse_scenario(text + "\n", "mine")
    said = str(caught.value)
    assert said.startswith("mine:") and message in said and "^" in said and allowed in said


def test_without_a_start_it_is_none() -> None:
    with pytest.raises(DesignError, match="a scenario begins with 'start: shared' or 'start: private'"):
        parse_scenario("vcpus: 1\n")


def test_a_file_is_taken_wherever_a_name_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.kvm"
    path.write_text("start: shared\nasks: private\n", encoding="utf-8")
    report = kvmlab.check("v8-post-hook", scenario=str(path))
    assert report.states == kvmlab.check("v8-post-hook", scenario="tiny").states
    assert report.as_json()["scenario"] == "mine"


def test_neither_name_nor_file_is_told() -> None:
    with pytest.raises(InputError, match=r"unknown scenario .tyni.; there are: tiny, .* and files"):
        read_scenario("tyni")


@pytest.mark.parametrize(("vcpus", "states"), [(1, 32), (2, 940), (3, 22_401)])
def test_more_vcpus_race(vcpus: int, states: int) -> None:
    assert kvmlab.check("v8-post-hook", scenario="tiny", vcpus=vcpus).states == states


@pytest.mark.parametrize(("gfns", "states"), [(1, 940), (2, 7_755)])
def test_more_gfns_are_converted(gfns: int, states: int) -> None:
    assert kvmlab.check("v8-post-hook", scenario="tiny", gfns=gfns).states == states


@pytest.mark.parametrize(
    ("scenario", "size", "message"),
    [
        ("tiny", {"vcpus": 7}, "1 to 6 vCPUs, not 7"),
        ("tiny", {"gfns": 9}, "1 to 8 gfns, not 9"),
        ("range", {"gfns": 3}, "range says which gfn is what"),
        ("two-vmms", {"gfns": 3}, "two-vmms says which gfn is what"),
    ],
)
def test_sizes_that_cannot_be_are_told(scenario: str, size: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_scenario(scenario, **size)


@pytest.mark.parametrize(
    "scenario", ["tiny+hook-fails", read_scenario("tiny", 3), spelled(parse_scenario(OWN))]
)
def test_a_code_carries_its_scenario(scenario: str) -> None:
    trace = kvmlab.check("no-zap", scenario=scenario).trace()
    again = kvmlab.replay(trace.code)
    assert again.case.scenario == scenario and again.code == trace.code and len(trace.code) < 230


def test_a_joined_scenario_has_a_text() -> None:
    joined = find_scenario("host-stray+discard")
    assert parse_scenario(spelled(joined)).threads == joined.threads


# Properties of one's own

ASKS = """
start: shared
asks: private
never: attr[0] == private && rmp[P0] == hypervisor && !running && era == 1
sometimes: guest[0] == ready && rmp[P0] == validated
"""


@pytest.mark.parametrize(
    ("design", "held"),
    [("v8-post-hook", [True, True]), ("upstream", [False, True]), ("no-zap", [True, True])],
)
def test_never_and_sometimes_are_answered_over_all_states(design: str, held: list[bool]) -> None:
    report = kvmlab.check(design, scenario=ASKS)
    assert [found["holds"] for found in report.as_json()["asked"]] == held


def test_the_run_to_where_it_is_true_ends_there() -> None:
    report = kvmlab.check("upstream", scenario=ASKS)
    trace = report.reach(0)
    assert trace.steps == int(report.graph.depth[report.asked[0].hits[0].state])
    assert kvmlab.replay(trace.code).code == trace.code


def test_a_sometimes_that_never_comes_is_bad() -> None:
    text = "start: shared\nasks: private\nsometimes: attr[0] == private && npt[0] == S0 && quiet\n"
    report = kvmlab.check("v8-post-hook", scenario=text)
    assert report.bad and not report.violated and "Never, NOT as asked" in report.text()


def test_a_search_that_is_cut_says_neither() -> None:
    report = kvmlab.check("v8-post-hook", scenario=ASKS, limit=10)
    assert [found["holds"] for found in report.as_json()["asked"]] == [None, None]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("attr[0] == privat", r"no value of attr\[0\] 'privat' in this machine; there are: private"),
        ("rpm[P0] == hypervisor", r"no cell 'rpm\[P0\]' in this machine; there are: rmp\[P0\]"),
        ("sept[0] == FREE", r"no cell 'sept\[0\]' in this machine"),
    ],
)
def test_what_the_machine_does_not_have_is_told(expression: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kvmlab.check("v8-post-hook", scenario=f"start: shared\nasks: private\nnever: {expression}\n").text()


@pytest.mark.parametrize(
    "expression",
    ["", "attr[0] ==", "attr[0] == private &&", "(quiet", "quiet)", "a & b", "== private", "!" * 99],
)
def test_what_is_no_expression_is_told_with_a_caret(expression: str) -> None:
    with pytest.raises(DesignError) as caught:
        parse_scenario(f"start: shared\nnever: {expression}\n")
    assert "cannot read the expression" in str(caught.value) and "^" in str(caught.value)

"""The boot-like load at a size that tests can afford: what is counted, and where designs differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvmlab.emulator import Vm
from kvmlab.emulator.costs import RMPUPDATE_SECONDS
from kvmlab.emulator.events import Log
from kvmlab.emulator.workloads import Load, boot

PAGES = 64 << 8  # 64 MiB


def load(design: str = "upstream", platform: str = "snp", **more: bool) -> Load:
    return boot(Vm(platform, PAGES, design, **more), in_4k=8 << 20, bounce=8 << 20, scattered=32)


def test_with_4k_folios_every_page_costs_one_rmpupdate_and_one_fault() -> None:
    phase = load().phases
    accepted = phase["accept 2M"]["rmpupdate"] + phase["accept 4K"]["rmpupdate"]
    assert accepted == PAGES == phase["accept 2M"]["npf"] + phase["accept 4K"]["npf"]


def test_with_2m_folios_it_is_one_a_2m_and_4k_requests_psmash() -> None:
    phase = load(private_2m=True).phases
    assert phase["accept 2M"]["rmpupdate"] == phase["accept 2M"]["pvalidate"] == (PAGES - 2048) // 512
    assert phase["accept 4K"]["psmash"] == 2048 // 512


def test_upstream_saves_the_rmpupdates_of_pages_that_only_visit_the_shared_side() -> None:
    upstream, v8 = load("upstream").total["rmpupdate"], load("v8-post-hook").total["rmpupdate"]
    assert v8 - upstream == 2048 + 2 * 32


@pytest.mark.parametrize("phase", ["accept 2M", "accept 4K"])
def test_deferring_to_the_fault_saves_nothing_of_what_the_guest_accepts(phase: str) -> None:
    deferred, early = (
        load(design).phases[phase]["rmpupdate"] for design in ("defer-to-fault", "v8-post-hook")
    )
    assert deferred == early


def test_with_two_backings_deferring_both_ways_saves_what_upstream_saves() -> None:
    assert load("defer-to-fault").total["rmpupdate"] == load("upstream").total["rmpupdate"]


def test_a_shared_fault_that_takes_the_private_page_back_saves_nothing() -> None:
    assert load("defer-to-fault-takes-back").total["rmpupdate"] == load("v8-post-hook").total["rmpupdate"]


def test_deferring_saves_the_pages_that_are_never_used() -> None:
    def unused(design: Any) -> Any:
        vm = Vm("snp", 1024, design)
        vm.guest().page_state_change(0, 1024 * 4096, True)
        vm.guest().page_state_change(0, 1024 * 4096, False)
        return vm.counters.get("rmpupdate", 0)

    assert (unused("v8-post-hook"), unused("defer-to-fault"), unused("upstream")) == (2048, 0, 0)


def test_the_cost_names_what_nobody_has_published() -> None:
    cost = load().cost
    assert cost.rmpupdate_seconds == pytest.approx(PAGES * RMPUPDATE_SECONDS)
    assert {"pvalidate", "ipi", "directmap-split"} <= set(cost.unknown)


def test_the_text_has_a_line_a_phase() -> None:
    lines = load().text().splitlines()
    assert [line.split("  ")[0].strip() or line.split()[0] for line in lines[:1]] == ["upstream"]
    assert sum("accept" in line for line in lines) == 2 and "total" in lines[-2]


@pytest.mark.parametrize("platform", ["sev", "sw"])
def test_without_an_rmp_there_is_none_to_update(platform: str) -> None:
    total = load(platform=platform).total
    assert "rmpupdate" not in total and total["exit-map-gpa-range"]


def test_the_example_in_the_docs_runs_as_it_says(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    text = (root / "docs/emulator.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(text.split("```python")[1].split("```")[0], names)
    vm = names["vm"]
    assert vm.host.read(0x1000, 4) == b"open" and names["guest"].read(0x1000, 4) == b"mine"
    assert vm.host.directmap_read(vm.pfn(0x1000, private=True), 4) != b"mine"
    assert "rmpupdate @" in capsys.readouterr().out


def test_an_event_stands_before_what_it_brings_about() -> None:
    vm = Vm("snp", 8, private=True)
    vm.guest().pvalidate_range(0, 8 * 4096, True)
    assert [e.kind for e in vm.events] == ["npf", "gmem-alloc", "directmap-split", "rmpupdate", "pvalidate"]
    assert {e.times for e in vm.events} == {1, 8}


def test_old_events_are_dropped_and_counted_all_the_same() -> None:
    log = Log(keep=10)
    for page in range(95):
        log.amend(log.add("npf", page=page), 2)
    assert len(log.events) <= 20 and log.events[-1].page == 94 and log.counters["npf"] == 190

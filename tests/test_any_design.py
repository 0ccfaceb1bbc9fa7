"""Whatever the language allows can be checked: a verdict comes out, never a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmlab.design import Design
from kvmlab.design.calls import CALLS, SECTIONS, Call, words
from kvmlab.emulator import Vm, VmError
from kvmlab.emulator.memory import PAGE
from kvmlab.emulator.vmm import DISCARDS
from kvmlab.errors import NotApplicable
from kvmlab.verdict.report import check


def _words(call: Call, section: str) -> list[str]:
    """What may stand between the parentheses and means something."""
    if call.lock:
        return [call.lock]
    said = words(call.name, section)
    return [*said] if call.needs else ["", *said]


def statement(section: str) -> Any:
    """One statement that may stand in a section, as text."""
    calls = [c for c in CALLS if section in c.sections and not c.holds_calls]
    said = [(c.name, word) for c in calls for word in _words(c, section)]
    plain = st.sampled_from(sorted(said)).map(lambda call: f"    {call[0]}({call[1]})")
    guard = st.sampled_from(["attr == private", "attr == shared", "platform != snp"])
    return st.one_of(plain, plain, st.tuples(guard, plain).map(lambda gp: f"    if ({gp[0]})\n    {gp[1]}"))


@st.composite
def designs(draw: Any) -> Any:
    parts = []
    for section in SECTIONS:
        lines = draw(st.lists(statement(section), min_size=1, max_size=9))
        if section == "ioctl":
            lines.insert(draw(st.integers(0, len(lines))), "    kvm_vm_set_region_attr()")
        parts += [f"{section}:", *lines]
    return "\n".join(parts) + "\n"


SCENARIOS = ["tiny", "host-io", "hook-fails", "auto-convert", "discard", "huge-split", "xarray-full",
             "hole", "slot-added", "slot-deleted", "smm", "two-ranges", "huge-1g", "discard-races"]  # fmt: skip


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(designs(), st.sampled_from(SCENARIOS), st.sampled_from(["snp", "sw", "tdx"]))
def test_any_design_that_parses_gets_a_verdict_and_a_run(text: str, scenario: str, platform: str) -> None:
    try:
        report = check(Design.parse(text), platform, scenario, limit=3_000)
    except NotApplicable:
        return
    assert set(report.verdicts) and report.trace().text()


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    designs(), st.sampled_from(["snp", "tdx", "sev", "sw"]), st.booleans(), st.sampled_from(sorted(DISCARDS))
)
def test_any_design_that_parses_runs_in_the_emulator_or_ends_in_words(
    text: str, platform: str, large: bool, discard: str
) -> None:
    pages, more = (
        (1024, {"private_2m": platform == "snp", "shared_2m": platform != "tdx"}) if large else (4, {})
    )
    vm = Vm(platform, pages, Design.parse(text), discard=discard, vmm="rerun", **more)
    guest = vm.guest()
    acts: tuple[Callable[[], object], ...] = (
        lambda: guest.write(0, b"shared"),
        lambda: guest.set_memory_encrypted(0, pages * PAGE),
        lambda: guest.write(PAGE, b"private"),
        lambda: guest.set_memory_decrypted(0, PAGE),
        lambda: guest.write(0, b"again"),
        lambda: vm.gmem.punch_hole(0, 2 * PAGE),
        vm.gmem.close,
        vm.close,
    )
    for act in acts:
        with contextlib.suppress(VmError):  # and nothing else
            act()

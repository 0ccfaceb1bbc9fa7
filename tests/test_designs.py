"""Every design that ships: its verdicts are those that its file expects, as `Result:` lines of litmus tests are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from bless_designs import _split, verdicts
from same_model import ONLY_READ, identity

from kvmlab.compile.build import build
from kvmlab.design import Design, shipped
from kvmlab.design.calls import BACKINGS
from kvmlab.errors import NotApplicable
from kvmlab.machine.properties import BY_NAME
from kvmlab.machine.scenarios import SCENARIOS
from kvmlab.model.state import Field, Layout
from kvmlab.model.step import Instr, Model

# By scenario, so that designs which make the same model of one stand together, and one process checks them.
EXPECTED = sorted(
    (
        (name, platform, where)
        for name in shipped("all")
        for platform, lines in Design.load(name).expect.items()
        for where in lines
    ),
    key=lambda case: (case[1], case[2], case[0]),
)


@pytest.mark.parametrize(("name", "platform", "where"), EXPECTED)
def test_a_design_does_what_its_file_expects(name: Any, platform: Any, where: Any) -> None:
    scenario, backing = _split(where)
    assert verdicts(name, platform, scenario, backing) == Design.load(name).expect[platform][where]


def tiny() -> Model:
    return build(Design.load("v8-post-hook"), SCENARIOS["tiny"])


def with_first_instr(model: Model, **changes: Any) -> Model:
    asker, *others = model.actors
    program = (replace(asker.program[0], **changes), *asker.program[1:])
    return replace(model, actors=(replace(asker, program=program), *others))


OTHER_MODELS: dict[str, Callable[[Model], Model]] = {
    "step": lambda m: with_first_instr(m, step=lambda s, me: None),
    "args": lambda m: with_first_instr(m, args=("other",)),
    "next": lambda m: with_first_instr(m, next=7),
    "jumps": lambda m: with_first_instr(m, jumps={"other": 7}),
    "idle": lambda m: with_first_instr(m, idle=not m.actors[0].program[0].idle),
    "loop": lambda m: with_first_instr(m, loop=7),
    "one actor less": lambda m: replace(m, actors=m.actors[:-1]),
    "layout": lambda m: replace(m, layout=Layout([Field("attr", ("shared", "private", "other"))])),
    "initial": lambda m: replace(m, initial=m.initial + 1),
    "conf": lambda m: replace(m, conf=replace(m.conf, stray=True)),
    "fatal": lambda m: replace(m, fatal=frozenset()),
    "quiet": lambda m: replace(m, quiet=None),
}


@pytest.mark.parametrize("what", OTHER_MODELS)
def test_no_check_is_shared_with_a_model_that_differs_in(what: str) -> None:
    assert identity(OTHER_MODELS[what](tiny())) != identity(tiny())


def test_a_check_is_shared_by_models_that_only_read_differently() -> None:
    assert identity(with_first_instr(tiny(), text="other", row=None, section="other")) == identity(tiny())


def test_every_field_of_a_model_has_been_thought_of() -> None:
    assert {f.name for f in fields(Model)} == {
        "layout",
        "actors",
        "initial",
        "conf",
        "fatal",
        "quiet",
        "title",
    }
    assert {f.name for f in fields(Instr)} - set(ONLY_READ) <= OTHER_MODELS.keys()


def has(design: Design, scenario: str, backing: str) -> bool:
    """Whether the design has a case of the scenario."""
    try:
        build(design, SCENARIOS[scenario], backing=backing)
    except NotApplicable:
        return False
    return True


@pytest.mark.parametrize("name", [*shipped("thread"), *shipped("variant")])
def test_a_design_of_the_thread_expects_something_in_every_case_that_it_has(name: str) -> None:
    design = Design.load(name)
    backings = [b for b in BACKINGS if design.backing in (None, b)]
    cases = {s if b == "split" else f"{s}/{b}" for s in SCENARIOS for b in backings if has(design, s, b)}
    assert set(design.expect["snp"]) == cases


def test_expectations_name_only_properties_and_scenarios_that_exist() -> None:
    for name, platform, where in EXPECTED:
        scenario, backing = _split(where)
        assert scenario in SCENARIOS and backing in BACKINGS
        assert set(Design.load(name).expect[platform][where]) <= set(BY_NAME)


@pytest.mark.parametrize("prop", BY_NAME)
def test_each_property_is_broken_by_a_planted_design(prop: str) -> None:
    planted = [Design.load(name) for name in shipped("planted")]
    broken = [
        d.name for d in planted for lines in d.expect.values() for found in lines.values() if prop in found
    ]
    assert broken


# What these break is no property of a default run: test_tdx_explorer.py shows it.
BREAKS_ELSEWHERE = {
    "tdx-no-clear": "with the erratum of partial writes",
    "tdx-retries-for-ever": "a measure has no bound",
}


@pytest.mark.parametrize("name", [name for name in shipped("planted") if name not in BREAKS_ELSEWHERE])
def test_a_planted_design_breaks_something(name: str) -> None:
    assert any(found for lines in Design.load(name).expect.values() for found in lines.values())


@pytest.mark.parametrize("name", shipped("planted"))
def test_what_a_planted_design_breaks_its_base_does_not(name: str) -> None:
    planted = Design.load(name)
    base = Design.load(planted.base)
    for platform, lines in planted.expect.items():
        for where, found in lines.items():
            assert not set(found) & set(base.expect.get(platform, {}).get(where, ()))

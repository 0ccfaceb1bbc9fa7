"""Every design that ships: its verdicts are those that its file expects, as `Result:` lines of litmus tests are."""

import pytest
from bless_designs import _split, verdicts

from kvmlab.compile.build import build
from kvmlab.design import Design, shipped
from kvmlab.design.calls import BACKINGS
from kvmlab.errors import NotApplicable
from kvmlab.machine.properties import BY_NAME
from kvmlab.machine.scenarios import SCENARIOS

EXPECTED = [
    (name, platform, where)
    for name in shipped("all")
    for platform, lines in Design.load(name).expect.items()
    for where in lines
]


@pytest.mark.parametrize(("name", "platform", "where"), EXPECTED)
def test_a_design_does_what_its_file_expects(name, platform, where):
    scenario, backing = _split(where)
    assert verdicts(name, platform, scenario, backing) == Design.load(name).expect[platform][where]


def has(design, scenario, backing):
    """Whether the design has a case of the scenario."""
    try:
        build(design, SCENARIOS[scenario], backing=backing)
    except NotApplicable:
        return False
    return True


@pytest.mark.parametrize("name", [*shipped("thread"), *shipped("variant")])
def test_a_design_of_the_thread_expects_something_in_every_case_that_it_has(name):
    design = Design.load(name)
    backings = [b for b in BACKINGS if design.backing in (None, b)]
    cases = {s if b == "split" else f"{s}/{b}" for s in SCENARIOS for b in backings if has(design, s, b)}
    assert set(design.expect["snp"]) == cases


def test_expectations_name_only_properties_and_scenarios_that_exist():
    for name, platform, where in EXPECTED:
        scenario, backing = _split(where)
        assert scenario in SCENARIOS and backing in BACKINGS
        assert set(Design.load(name).expect[platform][where]) <= set(BY_NAME)


@pytest.mark.parametrize("prop", BY_NAME)
def test_each_property_is_broken_by_a_planted_design(prop):
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
def test_a_planted_design_breaks_something(name):
    assert any(found for lines in Design.load(name).expect.values() for found in lines.values())


@pytest.mark.parametrize("name", shipped("planted"))
def test_what_a_planted_design_breaks_its_base_does_not(name):
    planted = Design.load(name)
    base = Design.load(planted.base)
    for platform, lines in planted.expect.items():
        for where, found in lines.items():
            assert not set(found) & set(base.expect.get(platform, {}).get(where, ()))

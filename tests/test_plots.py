"""The picture of a load: a bar for each design and count on the page's own ground, and all of it in words too."""

from __future__ import annotations

import re

import pytest

from kvmlab.emulator.costs import estimate
from kvmlab.emulator.workloads import Load
from kvmlab.show.plots import COUNTS, LONGEST, load_figure

LOADS = [
    Load("early", {"boot": {"rmpupdate": 70144, "npf": 9, "npf-rmp": 2}, "use": {"npf": 1}}, estimate({})),
    Load(
        "late", {"boot": {"rmpupdate": 35072, "npf": 12, "zap": 7, "flush": 5, "psc-buffer": 3}}, estimate({})
    ),
]


def test_the_figure_has_a_bar_for_each_design_and_count_on_one_scale() -> None:
    widths = [int(found) for found in re.findall(r"width:(\d+)px", load_figure(LOADS).html())]
    assert widths == [LONGEST, LONGEST // 2, *[0] * 8]


def test_each_bar_has_its_number() -> None:
    numbers = re.findall(r">([\d,]+)</td>", load_figure(LOADS).html())
    assert numbers == ["70,144", "35,072", "12", "12", "0", "7", "0", "5", "0", "3"]


def test_the_figure_brings_no_paper_of_its_own() -> None:
    grounds = set(re.findall(r"background:(#\w+)", load_figure(LOADS).html()))
    assert grounds == {"#0072B2", "#E69F00", "#0000"}  # the bars' two hues, and nothing


def test_the_words_carry_every_number() -> None:
    early, late = load_figure(LOADS).text().splitlines()[1:]
    assert early == "  early: RMPUPDATE 70,144, #NPF 12, zaps 0, flushes 0, PSC exits 0"
    assert late.count(",") == len(COUNTS)  # one in 35,072


def test_a_notebook_gets_the_picture_and_the_words() -> None:
    figure = load_figure(LOADS)
    assert figure._repr_mimebundle_() == {"text/plain": figure.text(), "text/html": figure.html()}


def test_no_load_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        load_figure([])

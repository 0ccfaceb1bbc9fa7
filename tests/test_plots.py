"""The picture of a load: light to import, a bar for each design and count, and all of it in words too."""

from __future__ import annotations

import base64
import subprocess
import sys

import pytest

from kvmlab.emulator.costs import estimate
from kvmlab.emulator.workloads import Load
from kvmlab.show.plots import COUNTS, load_figure, load_text

LOADS = [
    Load("early", {"boot": {"rmpupdate": 70144, "npf": 9, "npf-rmp": 2}, "use": {"npf": 1}}, estimate({})),
    Load(
        "late", {"boot": {"rmpupdate": 65536, "npf": 12, "zap": 7, "flush": 5, "psc-buffer": 3}}, estimate({})
    ),
]


def test_importing_the_module_imports_no_matplotlib() -> None:
    code = "import sys, kvmlab.show.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_figure_has_a_bar_for_each_design_and_count() -> None:
    pytest.importorskip("matplotlib")
    (axes,) = load_figure(LOADS).axes
    widths = {bars.get_label(): [int(bar.get_width()) for bar in bars] for bars in axes.containers}
    assert widths == {"early": [70144, 12, 0, 0, 0], "late": [65536, 12, 7, 5, 3]}


def test_the_words_carry_every_number() -> None:
    early, late = load_text(LOADS).splitlines()[1:]
    assert early == "  early: RMPUPDATE 70,144, #NPF 12, zaps 0, flushes 0, PSC exits 0"
    assert late.count(",") == len(COUNTS)  # one in 65,536


def test_a_notebook_gets_a_png_with_those_words() -> None:
    pytest.importorskip("matplotlib")
    shown = load_figure(LOADS)._repr_mimebundle_()  # type: ignore[attr-defined]
    assert base64.b64decode(shown["image/png"]).startswith(b"\x89PNG")
    assert shown["text/plain"] == load_text(LOADS)


def test_no_load_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        load_figure([])


def test_the_picture_has_no_ground_of_its_own_so_that_it_glares_on_no_page() -> None:
    pytest.importorskip("matplotlib")
    figure = load_figure(LOADS)
    alphas = [painted.get_facecolor()[-1] for painted in (figure, figure.axes[0])]
    assert alphas == [0, 0]

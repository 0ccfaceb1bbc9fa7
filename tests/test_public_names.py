"""What `kvmlab` offers by name, without importing it before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kvmlab
from kvmlab import emulator


@pytest.mark.parametrize("name", kvmlab.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(kvmlab, name) is not None


def test_dir_lists_the_public_names() -> None:
    assert set(kvmlab.__all__) <= set(dir(kvmlab))


def test_the_emulator_and_all_that_it_raises_are_public() -> None:
    assert set(emulator.__all__) <= set(kvmlab.__all__)


def test_asking_for_the_names_imports_nothing() -> None:
    program = "import sys, kvmlab; dir(kvmlab); print([n for n in sys.modules if n.startswith('kvmlab.')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Vn'"):
        kvmlab.Vn  # noqa: B018


def test_a_result_is_html_in_a_notebook_that_imported_nothing_but_kvmlab() -> None:
    program = """if True:
        import sys, kvmlab
        report = kvmlab.check("no-zap", scenario="tiny")
        print("kvmlab.show.html" in sys.modules, *report._repr_mimebundle_())
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False text/plain text/html\n"

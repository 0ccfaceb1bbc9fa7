"""The frame: the order of rooms, what a light import needs, what the wheel carries, links, and Binder's plan."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import links
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import kvmlab
from kvmlab import address

# Low to high, as drawn: a module may import what stands in its own line or above.  A folder means all its modules.
ROOMS = [
    line[4:28].replace("/", " ").split() for line in str(kvmlab.__doc__).splitlines() if line[:4] == " " * 4
]
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}
HEAVY = {"IPython", "anywidget", "ipywidgets", "jupyterlab", "matplotlib", "numpy", "scipy"}
HEAVY_MODULES = {
    "kvmlab.explore.arrays",
    "kvmlab.explore.dedup",
    "kvmlab.explore.levels",
    "kvmlab.explore.tables",
    "kvmlab.show.plots",
    "kvmlab.show.widget",
}


def modules(package: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name; a folder's own file by the folder's."""
    paths = (path for path in sorted(package.rglob("*.py")) if "__pycache__" not in path.parts)
    named = {".".join(["kvmlab", *path.relative_to(package).with_suffix("").parts]): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


def targets(node: ast.AST, here: list[str]) -> list[str]:
    """The dotted names that an import statement asks for; `here` is the folder of the module, as a list of names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = here[: len(here) - node.level + 1] if node.level else []
        return [".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names]
    return []


def imports(package: Path) -> dict[str, dict[str, int]]:
    """For each module, the package's modules that it imports, with the line.

    An import counts wherever it stands: in a function, or where only a type checker reads it.
    """
    known = modules(package)
    found: dict[str, dict[str, int]] = {}
    for name, path in known.items():
        here = (name if path.name == "__init__.py" else name.rpartition(".")[0]).split(".")
        mine: dict[str, int] = found.setdefault(name, {})
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for target in targets(node, here):
                while target.startswith("kvmlab.") and target not in known:  # a name in a module
                    target = target.rpartition(".")[0]
                if target.partition(".")[0] == "kvmlab" and target != name:
                    mine.setdefault(target, getattr(node, "lineno", 0))
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def upward_imports(package: Path) -> list[str]:
    """Each import of a higher room, each module without a room, and each import by a name made at run time."""
    found = []
    for name, theirs in imports(package).items():
        if room(name) not in LEVEL:
            found.append(f"{name} has no room: add it to the list in kvmlab/__init__.py")
            continue
        for other, line in theirs.items():
            if LEVEL.get(room(other), 0) > LEVEL[room(name)]:
                found.append(f"{name}:{line} imports {other}, which is higher")
    for name, path in modules(package).items():
        if name != "kvmlab" and re.search(
            r"\b(import_module|__import__)\b", path.read_text(encoding="utf-8")
        ):
            found.append(f"{name} imports by a name made at run time")
    return found


def circle(package: Path) -> list[str]:
    """Modules that import each other in a circle; empty if there are none."""
    try:
        TopologicalSorter(imports(package)).prepare()
    except CycleError as found:
        return list(found.args[1])
    return []


def plant(package: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    return package


def test_nothing_imports_upward(root: Path) -> None:
    assert upward_imports(root / "kvmlab") == []


@pytest.mark.parametrize(
    "statement",
    [
        "import kvmlab.cli",
        "from kvmlab.show import html",
        "from ..show.html import report_html",
        "from ..show import html",
        "def f():\n    from ..show import html",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..show.html import Html",
        "def f():\n    from .. import check",
        "from importlib import import_module",
        "def f():\n    return __import__('kvmlab.show.html')",
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, statement: str) -> None:
    plant(
        tmp_path,
        {"__init__.py": "", "show/html.py": "", "cli/__init__.py": "", "verdict/report.py": statement},
    )
    assert len(upward_imports(tmp_path)) == 1


def test_a_module_without_a_room_is_found(tmp_path: Path) -> None:
    (tmp_path / "helpers.py").touch()
    assert upward_imports(tmp_path) == [
        "kvmlab.helpers has no room: add it to the list in kvmlab/__init__.py"
    ]


def test_a_downward_import_is_allowed(tmp_path: Path) -> None:
    text = "from ..model.state import Cell\nfrom . import directmap\n"
    files = {"model/state.py": "", "kernel/directmap.py": "", "kernel/locks.py": text}
    assert upward_imports(plant(tmp_path, files)) == []


def test_no_modules_import_each_other_in_a_circle(root: Path) -> None:
    assert circle(root / "kvmlab") == []


def test_the_emulator_lists_its_modules_in_the_order_in_which_they_import(root: Path) -> None:
    folder = "kvmlab.emulator."
    text = ast.get_docstring(ast.parse((root / "kvmlab/emulator/__init__.py").read_text())) or ""
    lines = [names.split() for names in re.findall(r"^([a-z_ ]+?)  +\S", text, re.MULTILINE)]
    level = {folder + name: at for at, names in enumerate(lines) for name in names}
    found = {name: theirs for name, theirs in imports(root / "kvmlab").items() if name.startswith(folder)}
    assert set(found) == set(level)
    assert [
        (name, other) for name in found for other in found[name] if level.get(other, 0) > level[name]
    ] == []


@pytest.mark.parametrize(
    "back",
    [
        "from .gmem import Gmem",
        "from . import gmem",
        "import kvmlab.kvm.gmem",
        "def f():\n    from .gmem import Gmem",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .gmem import Gmem",
        "from ..kernel.locks import Lock",
        "from . import Gmem",
    ],
)
def test_a_circle_inside_a_room_is_found(tmp_path: Path, back: str) -> None:
    files = {
        "kernel/locks.py": "from ..kvm import gmem",
        "kvm/__init__.py": "from .gmem import Gmem",
        "kvm/gmem.py": "from .mmu import zap",
        "kvm/mmu.py": back,
    }
    assert "kvmlab.kvm.mmu" in circle(plant(tmp_path, files))


def test_a_room_may_offer_the_names_of_its_modules(tmp_path: Path) -> None:
    sept = {"hw/tdx/sept.py": "from . import entry", "hw/tdx/entry.py": ""}
    files = {"hw/tdx/__init__.py": "from .sept import SEPT", **sept}
    assert circle(plant(tmp_path, files)) == []


IMPORT_ALL_WITHOUT = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ImportError(f"{name} is heavy")

sys.meta_path.insert(0, Refuse())
for name in NAMES:
    importlib.import_module(name)
"""


def import_without_heavy(names: list[str], folder: Path) -> str:
    """Import in a fresh interpreter that refuses the heavy packages; the last line of its complaint."""
    program = IMPORT_ALL_WITHOUT.replace("HEAVY", repr(sorted(HEAVY))).replace("NAMES", repr(names))
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    return done.stderr.strip().rpartition("\n")[2]


def test_the_core_imports_without_numpy_and_widgets(root: Path) -> None:
    light = set(modules(root / "kvmlab")) - HEAVY_MODULES - {"kvmlab.__main__"}
    names = sorted(name for name in light if room(name) != "emulator")
    assert import_without_heavy(names, root) == ""


def test_a_heavy_import_is_found(tmp_path: Path) -> None:
    (tmp_path / "careless.py").write_text("import numpy\n")
    assert "numpy is heavy" in import_without_heavy(["careless"], tmp_path)


def test_the_wheel_carries_every_file_of_the_package(root: Path, tracked: list[Path], tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling").WheelBuilder(str(root))
    built = Path(next(wheel.build(directory=str(tmp_path), versions=["standard"])))
    carried = set(zipfile.ZipFile(built).namelist())
    ours = {path.as_posix() for path in tracked if path.parts[0] == "kvmlab"}
    assert built.name.endswith("-py3-none-any.whl")
    assert {name for name in carried if name.startswith("kvmlab/")} == ours


LINK = re.compile(r"(?:https?://)?(?:mybinder\.org/v2|github\.com[:/][\w.-]+/kvmlab)[^\s)\"'>\\]*")


def hand_made(text: str) -> list[str]:
    """The links to this repository in a text that kvmlab/address.py would not make."""
    if not (repository := address.repo_url()):
        return LINK.findall(text)
    ours = (repository, str(address.binder_url()).partition("?")[0])
    return [link for link in LINK.findall(text) if not link.startswith(ours)]


def test_no_link_to_the_repository_is_made_by_hand(root: Path, tracked: list[Path]) -> None:
    found = {}
    for path in set(tracked) - {Path("kvmlab/address.py")}:
        if links_there := hand_made((root / path).read_text(encoding="utf-8", errors="ignore")):
            found[path] = links_there
    assert found == {}


def test_a_link_made_by_hand_is_found() -> None:
    assert len(hand_made("[Binder](https://mybinder.org" + "/v2/gh/no/such/main)")) == 1
    assert len(hand_made("git clone git@github.com" + ":no/kvmlab.git")) == 1


def test_without_an_address_there_is_no_link(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(address, "REPOSITORY", None)
    assert [address.repo_url(), address.binder_url("notebooks/a.ipynb")] == [None, None]
    assert links.block(tmp_path) == ""


def test_with_an_address_all_links_follow_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(address, "REPOSITORY", "someone/kvmlab")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_start.ipynb").touch()
    filled = links.fill("a\n<!-- links -->\nold\n<!-- /links -->\nb\n", tmp_path)
    assert hand_made(filled) == []
    assert "someone/kvmlab/main?urlpath=lab/tree/notebooks/00_start.ipynb)" in filled
    assert "old" not in filled
    assert len(hand_made(filled.replace("someone", "else"))) == 2


def test_the_marked_links_of_the_documents_are_up_to_date(root: Path, tracked: list[Path]) -> None:
    for path in tracked:
        if path.suffix == ".md":
            text = (root / path).read_text(encoding="utf-8")
            assert links.fill(text, root) == text, f"{path}: run 'make links'"


def binder_plan(folder: Path) -> str:
    """What repo2docker would build: its log and the Dockerfile."""
    pytest.importorskip("repo2docker", reason="needs repo2docker")
    command = [sys.executable, "-m", "repo2docker", "--no-build", "--debug", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def binder_problems(folder: Path) -> list[str]:
    """What keeps Binder from running the workbook as it stands in a folder."""
    plan, found = binder_plan(folder), []
    python = re.search(r"conda environment for python=(\d+\.\d+)", plan)
    if not python or Version(python[1]) < Version("3.11"):
        found.append(f"Python is {python[1] if python else 'not chosen by conda'}, 3.11 or later is needed")
    install = plan.find('install --no-cache-dir -r "binder/requirements.txt"')
    if not 0 < plan.find("COPY --chown=0:0 src/ ") < install:
        found.append("binder/requirements.txt is not installed after the sources have been copied")
    requirements = folder / "binder" / "requirements.txt"
    if not requirements.exists() or "-e .[lab]" not in requirements.read_text().splitlines():
        found.append("the package is not installed in place with its [lab] extra")
    return found


def test_binder_gets_a_new_enough_python_and_the_package_in_place(clone: Path) -> None:
    assert binder_problems(clone) == []


def test_binder_without_runtime_txt_would_get_too_old_a_python(clone: Path) -> None:
    (clone / "binder" / "runtime.txt").unlink()
    assert "Python is 3.10" in binder_problems(clone)[0]


def test_binder_without_requirements_txt_would_not_install_the_package(clone: Path) -> None:
    (clone / "binder" / "requirements.txt").unlink()
    assert len(binder_problems(clone)) == 2


def test_what_binder_brings_is_new_enough_for_the_lab_extra(root: Path) -> None:
    repo2docker = pytest.importorskip("repo2docker", reason="needs repo2docker")
    folder = Path(repo2docker.__file__).parent / "buildpacks" / "conda"
    version = (root / "binder" / "runtime.txt").read_text().strip().removeprefix("python-")
    lock = (folder / f"environment.py-{version}-linux-64.lock").read_text()
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["optional-dependencies"]["lab"]):
        brought = re.search(rf"/{requirement.name}-(\d[\w.]*)-", lock)
        assert not brought or brought[1] in requirement.specifier, f"{requirement}: Binder has {brought[1]}"


def test_the_directmap_is_one_word_wherever_somebody_reads_it(root: Path, tracked: list[Path]) -> None:
    two_words = re.compile(r"\bdirect\s+map\b", re.IGNORECASE)
    texts = {path: (root / path).read_text(encoding="utf-8", errors="ignore") for path in tracked}
    assert [str(path) for path, text in texts.items() if two_words.search(text)] == []

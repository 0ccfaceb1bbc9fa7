"""The frame: layers, what a light import needs, what the wheel carries, links, and Binder's plan."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from kvmlab import links

# Low to high: a module may import what stands in its own line or above. A folder means all its modules, and
# a name all names that go on after an underscore (design: design_rows, ...).
LAYERS = [
    ["errors", "links", "nbrules", "pool"],
    ["model"],
    ["hw"],
    ["kernel"],
    ["kvm"],
    ["guest"],
    ["design", "designs"],
    ["machine"],
    ["emulator"],
    ["compile"],
    ["explore"],
    ["verdict"],
    ["show"],
    ["__init__", "__main__", "cli", "nb", "nbfiles"],
]
# What a function may import although it is higher, and why.
LATE = {
    ("verdict/report.py", "show"): "a report renders itself, but only when somebody looks at it",
    ("verdict/matrix.py", "show"): "as a report does",
    ("verdict/trace.py", "show"): "as a report does",
    ("verdict/code.py", "show"): "a code vouches for what a replay shows",
    ("verdict/session.py", "show"): "as a report does",
}
HEAVY = {"IPython", "anywidget", "ipywidgets", "jupyterlab", "matplotlib", "numpy", "scipy"}
HEAVY_MODULES = {
    "explore/arrays.py",
    "explore/dedup.py",
    "explore/levels.py",
    "explore/tables.py",
    "nbfiles.py",
    "show/plots.py",
    "show/widget.py",
}

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def level_of(name: str) -> int | None:
    return LEVEL.get(name, LEVEL.get(name.partition("_")[0]))


def modules(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*.py") if "__pycache__" not in path.parts)


def first_name(path: Path, package: Path) -> str:
    return path.relative_to(package).with_suffix("").parts[0]


def targets(node: ast.AST, path: Path, package: Path) -> Iterator[str]:
    """The dotted names inside the package that an import statement asks for."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        here = ["kvmlab", *path.relative_to(package).parent.parts]
        base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
        base = ".".join(filter(None, [base, node.module]))
        yield from (f"{base}.{alias.name}" for alias in node.names)


def imports(path: Path, package: Path) -> Iterator[tuple[int, str, bool]]:
    """Each import of the package's own: line, file or folder at its top level, whether in a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        for target in targets(node, path, package):
            top, _, name = target.partition(".")
            if top == "kvmlab" and name:
                first = name.partition(".")[0]
                known = level_of(first) is not None
                yield getattr(node, "lineno", 0), first if known else "__init__", id(node) in late


def upward_imports(package: Path) -> list[str]:
    """Each import of a higher layer, and each module without a layer."""
    found = []
    for path in modules(package):
        name, mine = path.relative_to(package).as_posix(), level_of(first_name(path, package))
        if mine is None:
            found.append(f"{name} has no layer: add it to LAYERS")
            continue
        for line, other, late in imports(path, package):
            allowed = late and (name, other) in LATE
            if (level_of(other) or 0) > mine and not allowed:
                found.append(f"{name}:{line} imports {other}, which is higher")
    return found


def test_nothing_imports_upward(root: Path) -> None:
    assert upward_imports(root / "kvmlab") == []


@pytest.mark.parametrize(
    "statement",
    [
        "import kvmlab.cli",
        "from kvmlab.show import text",
        "from ..scenario import Scenario",
        "def f():\n    from kvmlab import check",
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, statement: str) -> None:
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel" / "locks.py").write_text(statement)
    assert len(upward_imports(tmp_path)) == 1


def test_a_late_import_is_allowed_only_in_a_function(tmp_path: Path) -> None:
    (tmp_path / "verdict").mkdir()
    (tmp_path / "verdict" / "report.py").write_text("def text():\n    from ..show import text\n")
    assert upward_imports(tmp_path) == []
    (tmp_path / "verdict" / "report.py").write_text("from ..show import text\n")
    assert len(upward_imports(tmp_path)) == 1


def test_a_module_without_a_layer_is_found(tmp_path: Path) -> None:
    (tmp_path / "helpers.py").touch()
    assert upward_imports(tmp_path) == ["helpers.py has no layer: add it to LAYERS"]


def test_a_downward_import_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel" / "locks.py").write_text("from ..state import Cell\nfrom . import directmap\n")
    assert upward_imports(tmp_path) == []


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
    package, names = root / "kvmlab", ["kvmlab"]
    for path in modules(package):
        name = path.relative_to(root).with_suffix("")
        where = path.relative_to(package).as_posix()
        if where not in HEAVY_MODULES and not where.startswith("emulator/") and name.name != "__main__":
            names.append(".".join(name.parts).removesuffix(".__init__"))
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
    """The links to this repository in a text that ``kvmlab.links`` would not make."""
    if not (repository := links.repo_url()):
        return LINK.findall(text)
    ours = (repository, str(links.binder_url()).partition("?")[0])
    return [link for link in LINK.findall(text) if not link.startswith(ours)]


def test_no_link_to_the_repository_is_made_by_hand(root: Path, tracked: list[Path]) -> None:
    found = {}
    for path in set(tracked) - {Path("kvmlab/links.py")}:
        if links_there := hand_made((root / path).read_text(encoding="utf-8", errors="ignore")):
            found[path] = links_there
    assert found == {}


def test_a_link_made_by_hand_is_found() -> None:
    assert len(hand_made("[Binder](https://mybinder.org" + "/v2/gh/no/such/main)")) == 1
    assert len(hand_made("git clone git@github.com" + ":no/kvmlab.git")) == 1


def test_without_an_address_there_is_no_link(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(links, "REPOSITORY", None)
    assert [links.repo_url(), links.binder_url("notebooks/a.ipynb")] == [None, None]
    assert links.block(tmp_path) == ""


def test_with_an_address_all_links_follow_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(links, "REPOSITORY", "someone/kvmlab")
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

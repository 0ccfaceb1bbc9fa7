"""How many small faults, planted one at a time in the rules, the tests find: ``python tests/mutants.py [PATH...]``.

Prints the mutation score of kvmlab/hw, kvmlab/kernel and kvmlab/kvm (or of the given folders and files) and names
each survivor.  Works in a copy of the tree.  ``--sample N --seed S`` takes N of the mutants, always the same ones.

Why none of the known tools: mutmut 3 mutates inside functions only, and half of these rules are tables at module
level; Cosmic Ray starts a new Python with one fixed command for each mutant, and its arithmetic operators make ten
mutants of every sign.  Here a mutant costs a fork of a process that has pytest and numpy already, meets the tests
of its own file first, and the slow ones that explore whole scenarios only if it survives those.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kvmlab/hw", "kvmlab/kernel", "kvmlab/kvm")
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.txt")
# What a file's name begins with: the tests that are about it, and those that it meets if it survives them.
TESTS = {
    "kvmlab/hw/tdx/lines": ("test_tdx_lines", "test_tdx_explorer"),
    "kvmlab/hw/tdx/c": ("test_tdx_checks test_tdx_module test_tdx_rules", "test_vm_tdx_accept"),
    "kvmlab/hw/tdx/module": ("test_tdx_module", "test_tdx_rules"),
    "kvmlab/hw/tdx/p": ("test_tdx_module", "test_tdx_rules test_vm_tdx_accept"),
    "kvmlab/hw/tdx/str": ("test_tdx_module", "test_tdx_rules"),
    "kvmlab/hw/tdx": ("test_tdx_rules", "test_tdx_module test_vm_tdx_accept test_tdx_explorer"),
    "kvmlab/hw": ("test_snp_rules test_vm_instructions test_vm_hardware", "test_scenarios"),
    "kvmlab/k": ("test_steps test_steps_tdx", "test_memslots test_tdx_explorer test_scenarios"),
}
MEMORY, PATIENCE = 4 << 30, 4  # bytes of address space; times as long as without a mutant


class Mutant(NamedTuple):
    """One change: where, what was changed to what, and the whole file with it."""

    file: str
    line: int
    what: str
    text: str

    @property
    def key(self) -> tuple[str, str]:
        """How an equivalent mutant is listed: by file and change, so that it may move to another line."""
        return self.file, self.what


COMPARE = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
BINARY = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
Change = tuple[ast.AST, str, Any]  # an attribute of a node, and what it is to be


def changes(node: ast.AST) -> Iterator[Change]:
    """Ways to mutate one node."""
    match node:
        case ast.Compare():
            for i, op in enumerate(node.ops):
                yield node, "ops", [*node.ops[:i], COMPARE[type(op)](), *node.ops[i + 1 :]]
        case ast.BoolOp() | ast.BinOp() | ast.AugAssign() if type(node.op) in BINARY:
            yield node, "op", BINARY[type(node.op)]()
        case ast.UnaryOp(op=ast.Not()):
            yield node, "op", ast.UAdd()  # + of a bool has its truth
        case ast.Constant(value=bool()):
            yield node, "value", not node.value
        case ast.Constant(value=int(number)):
            yield node, "value", number + 1
        case ast.If() | ast.IfExp() | ast.While() if isinstance(
            node.test, ast.Name | ast.Attribute | ast.Call
        ):
            yield node, "test", ast.UnaryOp(ast.Not(), node.test)
        case ast.Set() if len(node.elts) > 1:
            for i in range(len(node.elts)):
                yield node, "elts", node.elts[:i] + node.elts[i + 1 :]
        case ast.Call(func=ast.Name(id="Rules")):
            rows = rows_of(node)
            for row, after in zip(rows, rows[1:] + rows[:1], strict=True):
                if ast.dump(row.elts[-1]) != ast.dump(after.elts[-1]):
                    yield row, "elts", [*row.elts[:-1], after.elts[-1]]
    for field in ("body", "orelse"):  # a statement that only has an effect is left out
        found = getattr(node, field, None)
        block: list[ast.stmt] = found if isinstance(found, list) else []
        for i, statement in enumerate(block):
            if has_effect(statement):
                yield node, field, [*block[:i], ast.Pass(lineno=statement.lineno), *block[i + 1 :]]


def rows_of(table: ast.Call) -> list[ast.Tuple]:
    """The rows of a Rules table."""
    return [row for row in getattr(table.args[2], "elts", ()) if isinstance(row, ast.Tuple)]


def has_effect(statement: ast.stmt) -> bool:
    """Whether a statement can be left out so that something else may go on without a NameError."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return getattr(statement.value.func, "attr", "") != "say"  # what a run tells the reader is no rule
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return bool(targets) and all(isinstance(target, ast.Attribute | ast.Subscript) for target in targets)


def untouched(node: ast.AST) -> list[ast.AST | None]:
    """Parts of a node in which nothing is mutated: annotations, assertions, texts.

    Nor are the inputs of a table and of its rows, for Rules refuses to make a table of any such mutant.
    """
    parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    match node:
        case (
            ast.Call(func=ast.Attribute(attr="say"))
            | ast.Assert()
            | ast.JoinedStr()
            | ast.Raise()
            | ast.FunctionDef(name="__str__" | "text" | "name")
        ):
            parts.append(node)
        case ast.Call(func=ast.Name(id="Rules")):
            parts += [node.args[1], *(column for row in rows_of(node) for column in row.elts[:-1])]
    return parts


def mutants(file: str) -> list[Mutant]:
    """All mutants of a file, in the order of its lines."""
    return mutants_of((ROOT / file).read_text(encoding="utf-8"), file)


def mutants_of(text: str, file: str) -> list[Mutant]:
    """All mutants of a text."""
    tree = ast.parse(text)
    parts = [part for node in ast.walk(tree) for part in untouched(node) if part]
    skip = {id(inner) for part in parts for inner in ast.walk(part)}
    before, found, seen = ast.unparse(tree).splitlines(), [], defaultdict[str, int](int)
    for node in [node for node in ast.walk(tree) if id(node) not in skip]:
        for owner, field, value in changes(node):
            was = getattr(owner, field)
            setattr(owner, field, value)
            after = ast.unparse(tree).splitlines()
            setattr(owner, field, was)
            what = difference(before, after)
            seen[what] += 1
            what += f"  (no. {seen[what]})" if seen[what] > 1 else ""
            left_out = value if field in ("body", "orelse") else []
            line = next((s.lineno for s in left_out if isinstance(s, ast.Pass)), getattr(owner, "lineno", 0))
            found.append(Mutant(file, line, what, "\n".join(after) + "\n"))
    return sorted(found, key=lambda mutant: mutant.line)


def difference(before: list[str], after: list[str]) -> str:
    """What one mutation has changed, of a long line only the place."""
    old, new = next((a.strip(), b.strip()) for a, b in zip(before, after, strict=False) if a != b)
    if max(len(old), len(new)) > 110:
        alike = next(
            (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new))
        )
        start = max(0, alike - 45)
        old, new = (f"... {text[start : start + 80]} ..." for text in (old, new))
    return f"{old}  =>  {new}"


class Copy:
    """A copy of the tree, in which tests run in forked children."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.groups, self.usual = folder, 1 if quick else 2, dict[str, float]()
        for name in ("kvmlab", "tests", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        for cache in folder.rglob("__pycache__"):
            shutil.rmtree(cache)

    def passes(self, tests: str, timeout: float) -> bool:
        """Whether these test files pass; a run that takes longer is stopped and does not."""
        child = os.fork()
        if not child:
            try:
                self._run(tests)
            finally:
                os._exit(1)
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status == 0
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False

    def _run(self, tests: str) -> None:
        os.setsid()
        os.chdir(self.folder)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        sys.dont_write_bytecode = bool(self.usual)  # the first, unmutated runs fill the caches
        sys.path[:0] = [str(self.folder), str(self.folder / "tests")]
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        import pytest

        args = [f"tests/{name}.py" for name in tests.split()]
        os._exit(int(pytest.main(["-xq", "-p", "no:cacheprovider", *args])))

    def measure(self, tests: list[str]) -> None:
        """Time the tests as they are; SystemExit if they do not pass."""
        usual = {}
        for each in tests:
            start = time.monotonic()
            if not self.passes(each, 3600):
                raise SystemExit(f"without any mutant these do not pass: {each}")
            usual[each] = time.monotonic() - start
        self.usual = usual

    def survives(self, mutant: Mutant) -> bool:
        """Whether no test notices the mutant."""
        path = self.folder / mutant.file
        was = path.read_text(encoding="utf-8")
        path.write_text(mutant.text, encoding="utf-8")
        for cached in path.parent.glob(f"__pycache__/{path.stem}.*"):
            cached.unlink()
        try:
            return all(
                self.passes(t, 10 + PATIENCE * self.usual[t]) for t in tests_for(mutant.file)[: self.groups]
            )
        finally:
            path.write_text(was, encoding="utf-8")


def tests_for(file: str) -> tuple[str, ...]:
    """The test files that a mutant of this file meets, one group after another."""
    return next(tests for start, tests in TESTS.items() if file.startswith(start))


def equivalents() -> dict[tuple[str, str], str]:
    """The mutants that change nothing observable, listed by hand: file and change, and the reason."""
    entries = EQUIVALENT.read_text(encoding="utf-8").split("\n\n") if EQUIVALENT.exists() else []
    found = {}
    for entry in entries:
        lines = [line for line in entry.splitlines() if line and not line.startswith("#")]
        if lines:
            file, what, reason = lines[0], lines[1].strip(), " ".join(line.strip() for line in lines[2:])
            found[file, what] = reason
    return found


def main() -> int:
    """Command line; 1 if a mutant survives, 2 if an equivalent one is listed that does not exist."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "path", nargs="*", default=FOLDERS, help="folders or files; default: all three folders"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="try N of them")
    parser.add_argument("--seed", type=int, default=0, help="which N")
    parser.add_argument("--quick", action="store_true", help="spare survivors the slow tests")
    parser.add_argument("--list", action="store_true", help="only list them")
    given = parser.parse_args()
    files = sorted({str(f) for path in given.path for f in python_files(path)})
    every = {file: mutants(file) for file in files}
    listed = {key: reason for key, reason in equivalents().items() if key[0] in every}
    if gone := listed.keys() - {mutant.key for found in every.values() for mutant in found}:
        print("listed as equivalent, but there is no such mutant:", file=sys.stderr)
        print(*map(": ".join, sorted(gone)), sep="\n", file=sys.stderr)
        return 2
    chosen = [mutant for found in every.values() for mutant in found if mutant.key not in listed]
    if given.sample is not None and given.sample < len(chosen):
        kept = set(random.Random(given.seed).sample(range(len(chosen)), given.sample))
        chosen = [mutant for i, mutant in enumerate(chosen) if i in kept]
    if given.list:
        print(*(f"{m.file}:{m.line}: {m.what}" for m in chosen), sep="\n")
        return 0
    return report(chosen, try_all(chosen, given.quick), len(listed))


def python_files(path: str) -> list[Path]:
    """The Python files of a folder of the tree, or the file itself, relative to the root."""
    whole = ROOT / Path(path)
    found = sorted(whole.rglob("*.py")) if whole.is_dir() else [whole]
    return [file.resolve().relative_to(ROOT) for file in found]


def try_all(chosen: list[Mutant], quick: bool) -> list[Mutant]:
    """Those that survive."""
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        import hypothesis  # noqa: F401 - forked children need not import them again
        import numpy  # noqa: F401
        import pytest  # noqa: F401

        copy = Copy(Path(folder), quick)
        copy.measure(list(dict.fromkeys(t for m in chosen for t in tests_for(m.file)[: copy.groups])))
        for i, mutant in enumerate(chosen, 1):
            if copy.survives(mutant):
                survivors.append(mutant)
                print(f"{mutant.file}:{mutant.line}: {mutant.what}", flush=True)
            print(f"\r{i} of {len(chosen)}, {len(survivors)} survive ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return survivors


def report(chosen: list[Mutant], survivors: list[Mutant], equivalent: int) -> int:
    """Print the score by folder; 1 if a mutant survives."""
    total, alive = defaultdict[str, int](int), defaultdict[str, int](int)
    for mutant in chosen:
        total[str(Path(mutant.file).parent)] += 1
    for mutant in survivors:
        alive[str(Path(mutant.file).parent)] += 1
    for folder, n in total.items():
        print(f"{folder:<16}{n - alive[folder]:>5} of {n:>5} found: {1 - alive[folder] / n:.1%}")
    print(f"{equivalent} more change nothing observable ({EQUIVALENT.name})")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())

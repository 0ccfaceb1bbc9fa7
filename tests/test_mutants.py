"""What tests/mutants.py changes, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import mutants
import pytest


def planted(text: str) -> list[str]:
    """What is changed to what in a text of one or a few lines."""
    return [mutant.what for mutant in mutants.mutants_of(text, "a.py")]


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("a == b", ["a != b"]),
        ("a < b <= c", ["a <= b <= c", "a < b < c"]),
        ("a and b", ["a or b"]),
        ("not a", ["+a"]),
        ("a + b", ["a - b"]),
        ("x = True", ["x = False"]),
        ("x = 7", ["x = 8"]),
        ("{A, B}", ["{B}", "{A}"]),
        ("x.y = z", ["pass"]),
        ("x[y] = z", ["pass"]),
        ("f(x)", ["pass"]),
        ("x = y", []),
        ("x: 'int | None' = y", []),
        ("def f(x: int | None) -> A | B: return x", []),
        ("s.say(f'{a + b}')", []),
        ("assert a == b", []),
        ("raise E(a + b)", []),
        ("'a' 'text'", []),
    ],
)
def test_a_text_has_these_mutants(text: str, changed: list[str]) -> None:
    assert planted(text) == [f"{text}  =>  {new}" for new in changed]


def test_a_condition_is_turned_round() -> None:
    assert planted("if a:\n    b = c") == ["if a:  =>  if not a:"]


def test_each_row_of_a_table_gets_the_outcome_of_another_and_its_inputs_are_left_alone() -> None:
    found = planted("T = Rules('spec', {'a': (False, True)}, [(False, X), (True, Y)])")
    assert [what.partition("[")[2].partition("  =>")[0] for what in found] == ["(False, X), (True, Y)])"] * 2
    assert [what.rpartition("[")[2] for what in found] == [
        "(False, Y), (True, Y)])",
        "(False, X), (True, X)])",
    ]


def test_two_like_changes_are_told_apart() -> None:
    assert planted("x = 1\nx = 1") == ["x = 1  =>  x = 2", "x = 1  =>  x = 2  (no. 2)"]


def test_a_mutant_is_the_whole_text_with_one_change_and_names_its_line() -> None:
    first, second = mutants.mutants_of("x = y\nx.a = z\nf(x)\n", "a.py")
    assert (first.line, first.text) == (2, "x = y\npass\nf(x)\n")
    assert (second.line, second.text) == (3, "x = y\nx.a = z\npass\n")


def test_every_mutant_that_is_listed_as_equivalent_exists_and_has_a_reason() -> None:
    listed = mutants.equivalents()
    files = {file for file, _ in listed}
    assert listed.keys() <= {mutant.key for file in files for mutant in mutants.mutants(file)}
    assert all(listed.values())


def test_every_file_of_the_rules_has_its_tests(root: Path) -> None:
    for folder in mutants.FOLDERS:
        for file in mutants.python_files(folder):
            for group in mutants.tests_for(file.as_posix()):
                assert all((root / "tests" / f"{name}.py").exists() for name in group.split())

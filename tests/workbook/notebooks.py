"""The normal form of committed notebooks: ``python tests/workbook/notebooks.py run|normalise|check [NOTEBOOK...]``.

Stored outputs are what readers see before anything runs, and what nbval compares when everything does. Hence
they must be the same on every machine and on every day, and must survive viewers that remove scripts, styles
and inline SVG: GitHub, nbconvert, and JupyterLab before a notebook is trusted.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import notebook_rules as rules

Notebook = dict[str, Any]

METADATA = rules.METADATA
WIDGET_VIEW = rules.WIDGET_VIEW
CELL_TIMEOUT = 600  # seconds; only a hang reaches it


def normalise(nb: Notebook) -> Notebook:
    """A copy in normal form: same sources and outputs, nothing of the machine, the day or the editor.

    Drops empty cells, all metadata but tags, tracebacks (they hold paths; name and message stay), and the
    live view of a widget wherever a fallback is stored with it (its model id is drawn anew in every run, and
    nbval does not compare it).
    """
    nb = copy.deepcopy(nb)
    nb["nbformat"], nb["nbformat_minor"] = 4, 5
    nb["metadata"] = copy.deepcopy(METADATA)
    nb["cells"] = [cell for cell in nb["cells"] if cell["source"].strip()]
    executed = 0
    for index, cell in enumerate(nb["cells"]):
        cell["id"] = rules.cell_id(index)
        cell["source"] = "\n".join(line.rstrip() for line in cell["source"].strip("\n").splitlines())
        tags = cell["metadata"].get("tags")
        cell["metadata"] = {"tags": tags} if tags else {}
        if cell["cell_type"] == "code":
            executed += 1
            cell["execution_count"] = executed
            cell["outputs"] = list(_outputs(cell["outputs"], executed))
    return nb


def _outputs(outputs: list[dict[str, Any]], executed: int) -> Iterator[dict[str, Any]]:
    """The outputs of one cell: what is printed in one go in one piece, because the pieces depend on timing."""
    previous: dict[str, Any] = {}
    for output in outputs:
        kind = output["output_type"]
        if kind == "stream":
            if previous.get("name") == output["name"]:
                previous["text"] += output["text"]
                continue
        elif kind == "error":
            output["traceback"] = []
        else:
            if rules.has_fallback(output):
                output["data"].pop(WIDGET_VIEW, None)
            if kind == "execute_result":
                output["execution_count"] = executed
        if previous:
            yield previous
        previous = output
    if previous:
        yield previous


def check(nb: Notebook) -> list[str]:
    """What keeps a notebook from being committed: cell, rule, what is allowed. Empty if all is well."""
    problems = rules.problems(nb)
    if not problems and dumps(nb) != dumps(normalise(nb)):
        problems.append("notebook: normal form: write it with 'python tests/workbook/notebooks.py normalise'")
    return problems


def load(path: Path) -> Notebook:
    """Read a notebook; raises ValueError with the file's name if it is not one."""
    import nbformat

    try:
        nb: Notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except Exception as error:  # nbformat raises a dozen unrelated kinds
        raise ValueError(f"{path}: not a notebook: {str(error).splitlines()[0][:80]}") from error
    return nb


def dumps(nb: Notebook) -> str:
    """The notebook as the text of its file."""
    import nbformat

    node = nbformat.from_dict(nb)  # type: ignore[no-untyped-call]
    return str(nbformat.writes(node)).rstrip("\n") + "\n"  # type: ignore[no-untyped-call]


def execute(nb: Notebook, folder: Path) -> None:
    """Run all cells in a fresh kernel and store the outputs; raises ValueError that names a failing cell."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    for _, cell in rules.code(nb):  # what an earlier run has stored says nothing about this one
        cell["outputs"] = []
    client = NotebookClient(
        nb,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        extra_arguments=["--log-level=ERROR"],  # ipykernel warns at every start that it listens on TCP
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise ValueError(f"cell {_failed(nb)}: {error.ename}: {error.evalue}") from error
    except (CellTimeoutError, DeadKernelError) as error:
        raise ValueError(f"the kernel gave no answer: {str(error).splitlines()[0]}") from error


def _failed(nb: Notebook) -> str:
    """The place of the cell whose error stopped the run: the last one with outputs."""
    ran = [index for index, cell in enumerate(nb["cells"]) if cell.get("outputs")]
    return rules.cell_id(ran[-1]) if ran else "?"


def treat(verb: str, path: Path) -> list[str]:
    """Do one verb to one file and return the problems that are left."""
    nb = load(path)
    if verb == "run":
        try:
            execute(nb, path.parent)
        except ValueError as error:  # the file keeps its last good outputs
            return [str(error)]
    if verb != "check":
        nb = normalise(nb)
        if (text := dumps(nb)) != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
    return check(nb)


def main(argv: list[str] | None = None) -> int:
    """Command line. Exit status: 0 all well, 1 problems found, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python tests/workbook/notebooks.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument("verb", choices=["run", "normalise", "check"])
    parser.add_argument("paths", nargs="*", type=Path, help="default: notebooks/*.ipynb")
    args = parser.parse_args(argv)
    found = 0
    for path in args.paths or sorted(Path("notebooks").glob("*.ipynb")):
        try:
            problems = treat(args.verb, path)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        found += len(problems)
        print(f"{path}: {f'{len(problems)} to mend' if problems else 'in order'}")
        for problem in problems:
            print(f"  {problem}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

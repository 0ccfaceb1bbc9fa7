"""What a committed notebook must look like, one small function a rule.

Each rule yields ``(cell id, what is wrong and what is allowed)``. The text of outputs is searched, not
trusted: a rule that has never failed proves nothing, so each one has a mutation in the tests.
"""

from __future__ import annotations

import ast
import datetime
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

Notebook = dict[str, Any]
Found = Iterator[tuple[str, str]]

METADATA: dict[str, Any] = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
NOT_COMPARED = {WIDGET_VIEW, "image/png", "image/jpeg"}  # nbval's own list
MAX_BYTES = 150_000
MAX_LINES = 12

# An address is Python's "at 0x...>" or a user-space pointer; gfns, PFNs and status codes are neither.
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+(?:>|&gt;)|\b0x(?:7f|55|56)[0-9a-f]{10}\b")
PATH = re.compile(
    r"(?<![\w./:<-])/(?!dev/|proc/|sys/)\w[\w.-]*/[\w.-]+"  # absolute; the kernel's own trees are meant
    r"|\b[A-Z]:\\\\?\w"  # the same on Windows
    r"|(?<![\w.-])[\w.-]+@[\w-]+:[~/]"  # a shell's prompt
)
CLOCK = re.compile(r"\b\d{1,2}:\d\d:\d\d\b|\b\d{4}-\d\d-\d\dT\d\d|\d ?(?:ms|µs|states/s)\b")
ACTIVE = re.compile(r"<\s*(svg|style|script|link|iframe)\b", re.IGNORECASE)
CAPTURE = re.compile(r"\b(?:Output|interact\w*)\s*\(|@(?:\w+\.)*interact\b|\bclear_output\b")
IMAGE = re.compile(r"<\s*img\b[^>]*>", re.IGNORECASE)
ALT = re.compile(r"""\balt\s*=\s*(["'])(.*?)\1""", re.IGNORECASE | re.DOTALL)
BASE64 = re.compile(r"base64,[A-Za-z0-9+/=\s]+")
UNCHECKED = re.compile(r"nbval[-_](?:ignore[-_]output|skip)", re.IGNORECASE)

RULES: dict[str, Callable[[Notebook], Found]] = {}


def rule(name: str) -> Callable[[Callable[[Notebook], Found]], Callable[[Notebook], Found]]:
    """Register a rule under the name that its messages carry."""

    def register(function: Callable[[Notebook], Found]) -> Callable[[Notebook], Found]:
        RULES[name] = function
        return function

    return register


def problems(nb: Notebook) -> list[str]:
    """All that the rules find, one line each."""
    return [f"{where}: {name}: {what}" for name, each in RULES.items() for where, what in each(nb)]


def cell_id(index: int) -> str:
    """The id of the cell at a place in the notebook: it tells where, and is the same after every run."""
    return f"c{index:02d}"


def cells(nb: Notebook) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each cell with the id that its place gives it."""
    return ((cell_id(index), cell) for index, cell in enumerate(nb["cells"]))


def code(nb: Notebook) -> list[tuple[str, dict[str, Any]]]:
    """Each code cell with its id."""
    return [(where, cell) for where, cell in cells(nb) if cell["cell_type"] == "code"]


def tags(cell: dict[str, Any]) -> list[str]:
    """The tags of a cell."""
    return list(cell["metadata"].get("tags", []))


def outputs(nb: Notebook) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each stored output with the id of its cell."""
    return ((where, output) for where, cell in code(nb) for output in cell["outputs"])


def mimes(nb: Notebook) -> Iterator[tuple[str, str, str]]:
    """Each MIME part of each output: cell id, MIME type, text (embedded images cut out)."""
    for where, output in outputs(nb):
        for mime, data in output.get("data", {}).items():
            text = data if isinstance(data, str) else json.dumps(data)
            yield where, mime, BASE64.sub("base64,", text)


def sources(nb: Notebook) -> Iterator[tuple[str, str]]:
    """The text of each cell with its id."""
    return ((where, cell["source"]) for where, cell in cells(nb))


def shown(nb: Notebook) -> Iterator[tuple[str, str]]:
    """All that a reader can read in outputs: streams, error messages, and the textual MIME parts."""
    for where, output in outputs(nb):
        yield where, output.get("text", "") + output.get("evalue", "")
    for where, mime, text in mimes(nb):
        if mime not in NOT_COMPARED:
            yield where, text


def has_fallback(output: dict[str, Any]) -> bool:
    """Whether a reader without a kernel still sees a picture of this output."""
    return "text/html" in output.get("data", {})


def compared(nb: Notebook) -> int:
    """The number of cells of which strict nbval compares at least one stored output."""
    return sum(any(_is_compared(output) for output in cell["outputs"]) for _, cell in code(nb))


def _is_compared(output: dict[str, Any]) -> bool:
    return "data" not in output or bool(set(output["data"]) - NOT_COMPARED)


def _meaningful(alt: str) -> bool:
    """Words about the picture, not the class of the object that drew it."""
    return len(alt.split()) >= 3 and not alt.lstrip().startswith("<")


@rule("metadata")
def _metadata(nb: Notebook) -> Found:
    if nb["metadata"] != METADATA:
        yield "notebook", f"only kernelspec python3 and language_info.name, not {sorted(nb['metadata'])}"
    for where, cell in cells(nb):
        if extra := sorted(set(cell["metadata"]) - {"tags"}):
            yield where, f"only tags are allowed, not {', '.join(extra)}"


@rule("ids")
def _ids(nb: Notebook) -> Found:
    for where, cell in cells(nb):
        if cell.get("id") != where:
            yield where, f"the id follows from the place, it is not {cell.get('id')}"


@rule("counts")
def _counts(nb: Notebook) -> Found:
    for wanted, (where, cell) in enumerate(code(nb), 1):
        results = [out for out in cell["outputs"] if out["output_type"] == "execute_result"]
        if any(each.get("execution_count") != wanted for each in [cell, *results]):
            yield where, f"execution_count must be {wanted}: run all cells in order"


@rule("private")
def _private(nb: Notebook) -> Found:
    for where, text in chain(sources(nb), shown(nb)):
        if found := PATH.search(text):
            yield where, f"{found[0]} is a path or name of one machine; relative paths are allowed"


@rule("time")
def _time(nb: Notebook) -> Found:
    today = datetime.date.today()
    forms = [today.strftime(form) for form in ("%Y-%m-%d", "%d %b %Y", "%b %d, %Y", "%d %B %Y")]
    for where, text in shown(nb):
        found = CLOCK.search(text)
        if found or any(form in text for form in forms):
            yield where, f"{found[0] if found else today} depends on when it ran; print what was computed"


@rule("address")
def _address(nb: Notebook) -> Found:
    for where, text in shown(nb):
        if found := ADDRESS.search(text):
            yield where, f"{found[0]} is another one in every run; give the object a __repr__"


@rule("markup")
def _markup(nb: Notebook) -> Found:
    for where, mime, text in mimes(nb):
        if mime in {"image/svg+xml", "application/javascript"}:
            yield where, f"{mime} is removed by viewers; use inline style or <img src='data:...'>"
        elif mime == "text/html" and (found := ACTIVE.search(text)):
            yield where, f"<{found[1]}> is removed by viewers; use inline style or <img src='data:...'>"


@rule("widget")
def _widget(nb: Notebook) -> Found:
    for where, output in outputs(nb):
        if WIDGET_VIEW in output.get("data", {}):
            cure = "normalise the notebook" if has_fallback(output) else "store text/html with it"
            yield where, f"a stored live view is blank without its kernel; {cure}"


@rule("alt")
def _alt(nb: Notebook) -> Found:
    for where, output in outputs(nb):
        data = output.get("data", {})
        if any(mime.startswith("image/") for mime in data) and not _meaningful(data.get("text/plain", "")):
            yield where, "a picture needs a text/plain that says in words what it shows"
        for image in IMAGE.findall(BASE64.sub("base64,", str(data.get("text/html", "")))):
            if not ((alt := ALT.search(image)) and _meaningful(alt[2])):
                yield where, "an <img> needs an alt that says in words what it shows"


@rule("errors")
def _errors(nb: Notebook) -> Found:
    for where, cell in code(nb):
        failed = any(output["output_type"] == "error" for output in cell["outputs"])
        if failed != ("raises-exception" in tags(cell)):
            yield where, "a stored error and the tag raises-exception go together, neither stands alone"
        if any(output.get("name") == "stderr" for output in cell["outputs"]):
            yield where, "nothing may be written to stderr: mend the cause of the warning"


@rule("compared")
def _compared(nb: Notebook) -> Found:
    for where, cell in code(nb):
        if UNCHECKED.search(" ".join([cell["source"], *tags(cell)])):
            yield where, "no cell is exempt from the comparison; make its output the same in every run"
    if not compared(nb):
        yield "notebook", "no stored output would be compared; run it and keep the outputs"


@rule("size")
def _size(nb: Notebook) -> Found:
    if (size := len(json.dumps(nb, ensure_ascii=False, indent=1).encode())) > MAX_BYTES:
        yield "notebook", f"{size} bytes, at most {MAX_BYTES} are allowed: show less, or write a report file"


@rule("length")
def _length(nb: Notebook) -> Found:
    for where, cell in code(nb):
        if (lines := len(cell["source"].splitlines())) > MAX_LINES:
            yield where, f"{lines} lines, at most {MAX_LINES} are allowed: move the logic into kvmlab/"


@rule("capture")
def _capture(nb: Notebook) -> Found:
    for where, cell in code(nb):
        if found := CAPTURE.search(cell["source"]):
            yield where, f"{found[0]}: captured output cannot be compared; display an HTML widget instead"


@rule("python")
def _python(nb: Notebook) -> Found:
    for where, cell in code(nb):
        try:
            ast.parse(cell["source"])
        except SyntaxError as error:
            yield where, f"plain Python is allowed, no magics: line {error.lineno}: {error.msg}"


@rule("assert")
def _assert(nb: Notebook) -> Found:
    where, last = code(nb)[-1] if code(nb) else ("notebook", {"source": ""})
    try:
        asserts = any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(last["source"])))
    except SyntaxError:
        asserts = False
    if not asserts:
        yield where, "the last code cell must assert the answer of the notebook"

"""What a command writes to its terminal: results, progress, complaints.  What cannot be written is an error."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable

WIDEST = 100  # columns; longer lines are hard to read


class OutputError(Exception):
    """Standard output cannot be written: says why."""


def emit(text: str) -> None:
    """Write to standard output; if its reader has gone away the rest goes nowhere.  Else OutputError."""
    _write(text + "\n")


def flush() -> None:
    """Write out what others have left in the buffer; errors as for `emit`."""
    _write("")


def _write(text: str) -> None:
    if sys.stdout is None:
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except UnicodeEncodeError as wrong:
        what = ascii(wrong.object[wrong.start : wrong.end][:10])
        message = (
            f"standard output takes {wrong.encoding} only, and {what} is none; try PYTHONUTF8=1 kvmlab ..."
        )
        raise OutputError(message) from None
    except BrokenPipeError:
        discard()
    except OSError as problem:
        discard()
        raise OutputError(f"cannot write to standard output: {problem.strerror}") from None


def discard() -> None:
    """From here on standard output goes nowhere; else Python would try again at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def complain(text: str) -> None:
    """Write to standard error, if anybody listens."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        return


def progress(text: str = "") -> None:
    """Show what is going on, on a terminal only; nothing takes it away again."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"\r\033[K{text[: _columns() - 1]}", end="", file=sys.stderr, flush=True)


def folded(text: str, indent: int = 0) -> str:
    """The text broken at word ends for a terminal; as it is for a pipe, whose reader wants whole lines."""
    if sys.stdout is None or not sys.stdout.isatty():
        return text
    width = max(min(_columns(), WIDEST), indent + 20)
    lead = " " * (len(text) - len(text.lstrip()))
    lines = textwrap.wrap(
        text.strip(), width, initial_indent=lead,
        subsequent_indent=" " * indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join(lines)


def listed(entries: Iterable[tuple[str, str]], room: int) -> None:
    """Names, each with what it is."""
    for name, what in entries:
        emit(folded(f"{name:<{room}} {what}", room + 1))


def _columns() -> int:
    return shutil.get_terminal_size().columns

"""The command `kvmlab`: signals, what goes wrong, and the exit status.

0 nothing bad can happen; 1 something can; 2 bad input, out of memory, interrupted, or output that cannot be written;
3 nothing bad was found, but not everything was looked at.  A pipe that is closed changes none of that.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

# Ctrl-C may come before all of this is imported, so little is imported here, and that late.


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run one command and return its exit status; without arguments, those of the process, whose signals it takes."""
    if arguments is not None:
        return _run(arguments)
    # What signal.py wraps, without the wait for it.
    from _signal import SIG_DFL, SIG_IGN, SIGINT, SIGTERM, getsignal, signal  # type: ignore[import-not-found]

    caught = [
        number for number in (SIGINT, SIGTERM) if getsignal(number) != SIG_IGN
    ]  # a shell may have its reasons
    for number in caught:
        signal(number, SIG_DFL)  # until there is somebody to catch it, Ctrl-C ends the process without a word
    from . import commands  # noqa: F401 - so that what follows takes no time

    for number in caught:
        signal(number, _stop)
    status = 2
    try:
        status = _run(sys.argv[1:])
        signal(SIGINT, SIG_IGN)  # the verdict stands
        signal(SIGTERM, SIG_IGN)
    except KeyboardInterrupt:  # between two lines
        sys.stderr.write("kvmlab: interrupted\n")
    return status


def _stop(number: int, frame: "FrameType | None") -> None:
    """Interrupt the command, which cleans up; a second signal ends it at once."""
    from signal import SIGINT, SIGTERM, signal

    signal(SIGINT, _end)
    signal(SIGTERM, _end)
    raise KeyboardInterrupt


def _end(number: int, frame: "FrameType | None") -> None:
    """End at once, and leave no worker behind."""
    import os

    if multiprocessing := sys.modules.get("multiprocessing"):
        for worker in multiprocessing.active_children():
            worker.kill()
    os.write(2, b"kvmlab: interrupted\n")
    os._exit(2)


def _run(arguments: "Sequence[str]") -> int:
    """Run one command; whatever goes wrong is told in words."""
    from . import commands, console

    try:
        try:
            status = commands.run(arguments)
        except SystemExit as leaving:  # argparse, after --help or a complaint of its own
            status = leaving.code if isinstance(leaving.code, int) else 2
        console.flush()
        return status
    except KeyboardInterrupt:
        problem = "interrupted"
    except MemoryError as out:
        problem = str(out) if type(out) is MemoryError and str(out) else "out of memory; try --limit STATES"
    except RecursionError:
        problem = "something in the input is nested too deeply"
    except commands.problems() as wrong:
        problem = str(wrong)
    except Exception as bug:  # as a traceback it would end with 1, which means something else
        problem = f"this is a bug in kvmlab: {type(bug).__name__}: {bug}{_where(bug)}"
    console.progress()
    console.complain(f"kvmlab: {problem}")
    return 2


def _where(bug: Exception) -> str:
    from traceback import extract_tb

    last = extract_tb(bug.__traceback__)[-1]
    return f" ({last.filename}:{last.lineno})"


if __name__ == "__main__":
    sys.exit(main())

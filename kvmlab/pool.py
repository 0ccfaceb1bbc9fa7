"""A map over several processes that leaves none behind, whatever ends it.

Workers ignore Ctrl-C, which a terminal sends to all of them: the process that asks is the one that ends them.  If
that one is killed, each worker meets the end of its pipe when it asks for more work.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def processes(wanted: int, items: int) -> int:
    """How many processes are worth starting: no more than there are items, or CPUs."""
    return max(1, min(wanted, items, os.cpu_count() or 1))


@contextmanager
def spread(function: Callable[[T], R], items: Sequence[T], jobs: int) -> Iterator[Iterable[R]]:
    """The results of `function`, in the order of the items, worked out by up to `jobs` processes.

    An exception of the function is raised here; MemoryError if a process was killed.
    """
    jobs = processes(jobs, len(items))
    if jobs == 1:
        yield map(function, items)
        return
    workers: dict[Connection, Process] = {}
    try:
        with _signals_held_back():
            for _ in range(jobs):
                mine, theirs = Pipe()
                worker = Process(target=_work, args=(function, theirs, mine), daemon=True)
                worker.start()
                theirs.close()
                workers[mine] = worker
        yield _results(list(workers), items)
    finally:
        for worker in workers.values():
            worker.kill()
        for pipe, worker in workers.items():
            worker.join()
            pipe.close()


def _results(pipes: list[Connection], items: Sequence[T]) -> Iterator[Any]:
    """Hand out the items, and yield the answers in the order of the items."""
    todo = iter(enumerate(items))
    busy: dict[Connection, int] = {}
    done: dict[int, tuple[Any, Exception | None]] = {}

    def hand_out(pipe: Connection) -> None:
        if (following := next(todo, None)) is not None:
            busy[pipe] = following[0]
            pipe.send(following[1])

    for pipe in pipes:
        hand_out(pipe)
    for number in range(len(items)):
        while number not in done:
            ready = wait(list(busy))
            for pipe in [pipe for pipe in busy if pipe in ready]:
                try:
                    done[busy.pop(pipe)] = pipe.recv()
                    hand_out(pipe)
                except (EOFError, OSError):
                    raise MemoryError(
                        "a process that checked was killed, perhaps for want of memory"
                    ) from None
        result, problem = done.pop(number)
        if problem is not None:
            raise problem
        yield result


def _work(function: Callable[[T], R], pipe: Connection, other_end: Connection) -> None:
    """Answer items until there are no more; runs in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    other_end.close()  # or this process itself would keep the pipe from ending
    try:
        while True:
            item = pipe.recv()
            try:
                answer: tuple[Any, Exception | None] = function(item), None
            except MemoryError as problem:
                answer = None, MemoryError(str(problem))  # numpy's cannot be sent
            except Exception as problem:
                ours = type(problem).__module__.startswith("kvmlab")
                answer = None, problem if ours else RuntimeError(f"{type(problem).__name__}: {problem}")
            pipe.send(answer)
    except (EOFError, OSError):
        return


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """While a process starts it has no way yet to be interrupted cleanly."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

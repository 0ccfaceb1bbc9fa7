"""A check that runs in a thread of its own, reports its progress, and can be cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from ..explore.graph import Watch

Found = TypeVar("Found")
PROGRESS_EVERY = 0.25  # seconds between two reports


class Cancelled(Exception):
    """The search was cancelled."""


class Search(Generic[Found]):
    """One piece of work: `work(watch)` gives what is found; then `done(search)` is called, in the same thread.

    `watch` is to be called now and then with the number of states known, and passes it to `tell`.  Afterwards
    `found` is the result, or `failure` what was raised instead; a cancelled search calls nobody.
    """

    def __init__(
        self,
        work: Callable[[Watch], Found],
        tell: Callable[[Search[Found], int], None],
        done: Callable[[Search[Found]], None],
    ) -> None:
        self.found: Found | None = None
        self.failure: Exception | None = None
        self._work, self._tell, self._done = work, tell, done
        self._cancelled = False
        self._told = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="kvmlab-search", daemon=True)

    def start(self) -> None:
        """Begin; where there are no threads (in a browser's Python) the work is done when this returns."""
        try:
            self._thread.start()
        except RuntimeError:
            self._run()

    def wait(self) -> None:
        """Return when the work has ended, in whichever way."""
        if self._thread.is_alive():
            self._thread.join()

    def cancel(self) -> None:
        """Let the work end at its next call of the watch, and forget its result."""
        self._cancelled = True

    def _run(self) -> None:
        try:
            self.found = self._work(self._watch)
        except Cancelled:
            return
        except Exception as failure:
            self.failure = failure
        if not self._cancelled:
            self._done(self)

    def _watch(self, states: int) -> None:
        if self._cancelled:
            raise Cancelled
        now = time.monotonic()
        if now - self._told >= PROGRESS_EVERY:
            self._told = now
            self._tell(self, states)

"""A run that shows itself: as a race diagram in plain text, as a code, and in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .code import encode
from .diagram import WIDTH, diagram
from .display import Displayed
from .run import Run


@dataclass(frozen=True)
class Trace(Displayed, Run):
    """A run of a case, to be read: `text()` draws it, `code` replays it."""

    @cached_property
    def code(self) -> str:
        """A short code that `kvmlab.replay` and `kvmlab replay` turn back into this run."""
        return encode(self)

    def text(self, width: int = WIDTH) -> str:
        """The run as a plain-text race diagram, ASCII, at most `width` columns, CPU columns as in mails."""
        return diagram(self, self.code, width)

"""The answers to a question that cannot be asked: what does not exist, what has no such case, what cannot be read."""

from __future__ import annotations

import reprlib


class Refusal(Exception):
    """What a user asked for is refused, and `str()` says all there is to say; a notebook shows that alone."""

    def _render_traceback_(self) -> list[str]:
        """What IPython prints in place of a traceback: the lines of the code that refused help nobody."""
        return [f"{type(self).__name__}: {self}"]


class InputError(Refusal, ValueError):
    """What a user asked for does not exist: says what, and what would be allowed."""


class NotApplicable(Refusal):
    """This design has no such case; the text says why."""


def shown(value: object) -> str:
    """A value as an error message has it: in one short line, whatever it is."""
    try:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 0xFFFF:
            text = hex(value)
        else:
            text = reprlib.repr(value)
    except Exception:  # somebody's own __repr__
        text = f"<{type(value).__name__}>"
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return text if text.isprintable() else ascii(text)

"""The two answers to a question that cannot be asked: what does not exist, and what has no such case."""

from __future__ import annotations

import reprlib


class InputError(ValueError):
    """What a user asked for does not exist: says what, and what would be allowed."""


class NotApplicable(Exception):
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

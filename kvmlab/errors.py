"""The two answers to a question that cannot be asked: what does not exist, and what has no such case."""

from __future__ import annotations


class InputError(ValueError):
    """What a user asked for does not exist: says what, and what would be allowed."""


class NotApplicable(Exception):
    """This design has no such case; the text says why."""

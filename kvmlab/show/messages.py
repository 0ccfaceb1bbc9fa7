"""The messages that the workbench's browser half sends: reading their fields, and refusing what makes no sense."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import InputError, Refusal

LARGEST = 1_000_000  # a larger number in a message is a mistake
CODE = re.compile(r"kvmlab:\d+:")  # how the code of a run begins, whatever its version

Message = Mapping[str, Any]


def has_code(text: str) -> bool:
    """Whether a text holds the code of a run, as a diagram does, other than in a comment of a design."""
    return any(CODE.search(line) for line in text.splitlines() if not line.lstrip("> \t").startswith("//"))


def in_words(failure: Exception) -> str:
    """What a user is told of a request that failed."""
    if isinstance(failure, Refusal):
        return str(failure)
    if isinstance(failure, MemoryError):
        return str(failure) or "out of memory; nothing has changed"
    if isinstance(failure, RecursionError):
        return "this text is nested too deeply; nothing has changed"
    return f"kvmlab has a bug here: {type(failure).__name__}: {failure}"


def a_text(message: Message, name: str) -> str:
    """The text of a field; InputError if there is none."""
    value = message.get(name)
    if not isinstance(value, str):
        raise InputError(f"a message needs a text {name!r}")
    return value


def a_number(message: Message, name: str) -> int:
    """The whole number of a field, at most `LARGEST` either way; InputError if there is none."""
    value = message.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > LARGEST:
        raise InputError(f"a message needs a whole number {name!r} of at most {LARGEST:,}")
    return value


def one_of(message: Message, name: str, allowed: tuple[str, ...]) -> str:
    """The text of a field that must be one of those allowed; InputError says which these are."""
    value = a_text(message, name)
    if value not in allowed:
        raise InputError(f"unknown {name} {value[:40]!r}; there are: {', '.join(allowed)}")
    return value

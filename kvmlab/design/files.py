"""Where designs are kept: the files that ship, a file of the reader's, standard input."""

from __future__ import annotations

import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from .errors import DesignError, Place, quoted
from .source import LIMIT

BaseLoader = Callable[[str], str | None]  # from a base's name to its text; None: it has none of that name
KINDS = ("thread", "variant", "planted", "all")
THREAD = (
    "v7-under-lock",
    "v8-post-hook",
    "set-mem-attr-op",
    "no-zap",
    "zap-by-op",
    "defer-to-fault",
    "rmp-under-lock-directmap-post",
    "pre-post-directmap",
    "upstream",
)
_FOLDER = Path(__file__).parent.parent / "designs"


def shipped(kind: str | None = None) -> tuple[str, ...]:
    """The names of the designs that ship: those of the thread in the order of its claims, then the variants.

    `kind`: "thread", "variant", "planted" (each breaks something on purpose) or "all" of them.
    """
    if kind is not None and kind not in KINDS:
        raise DesignError(f"no designs of kind '{quoted(str(kind))}'", Place("shipped", 0, 0), allowed=KINDS)
    variants, planted = _names()
    parts = {"thread": THREAD, "variant": variants, "planted": planted, None: (*THREAD, *variants)}
    return (*THREAD, *variants, *planted) if kind == "all" else parts[kind]


@cache
def _names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    variants = tuple(sorted(path.stem for path in _FOLDER.glob("*.kvm") if path.stem not in THREAD))
    return variants, tuple(sorted(path.stem for path in (_FOLDER / "planted").glob("*.kvm")))


def shipped_text(name: str) -> str:
    """The text of a design that ships."""
    folder = _FOLDER / "planted" if name in shipped("planted") else _FOLDER
    return (folder / f"{name}.kvm").read_text(encoding="utf-8")


def is_text(design: str) -> bool:
    """Whether this is the text of a design itself, not a name or a file's path."""
    if "\n" in design:
        return True
    try:
        return "(" in design and not Path(design).exists()
    except (OSError, ValueError):  # longer than a path can be
        return True


def siblings(folder: Path) -> BaseLoader:
    """Bases that are files beside a design; shipped ones come first."""

    def load(name: str) -> str | None:
        for path in (folder / f"{name}.kvm", folder / name):
            if path.is_file():
                return decode(from_file(path), path.name)
        return None

    return load


def from_stdin() -> bytes:
    """At most one byte more than a design may have, from standard input."""
    if sys.stdin is None:
        return b""
    raw = getattr(sys.stdin, "buffer", None)
    return raw.read(LIMIT + 1) if raw else sys.stdin.read(LIMIT + 1).encode()


def from_file(path: Path) -> bytes:
    """At most one byte more than a design may have, from a file; DesignError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(LIMIT + 1)
    except (OSError, ValueError) as wrong:
        reason = getattr(wrong, "strerror", None) or "not a path"
        message = f"neither a design that ships nor a file that can be read ({reason})"
        allowed, offer = [*shipped(), "a file", "- for standard input"], "allowed"
        if near := get_close_matches(path.name[:80], shipped("all"), n=3, cutoff=0.5):
            allowed, offer = near, "nearest known"
        raise DesignError(message, Place(str(path), 0, 0), allowed=allowed, offer=offer) from None


def decode(data: bytes, name: str) -> str:
    """The bytes as text; DesignError if there are too many or they are no text."""
    if len(data) > LIMIT:
        raise DesignError(f"more than {LIMIT // 1024} kB: not a design", Place(name, 0, 0))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as wrong:
        line = data[: wrong.start].count(b"\n") + 1
        message = f"not UTF-8 text (byte 0x{data[wrong.start]:02x})"
        raise DesignError(message, Place(name, line, 0)) from None

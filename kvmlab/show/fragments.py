"""What the workbench sends to the browser, made small: a class in place of each inline style, what recurs once."""

from __future__ import annotations

import re
from hashlib import blake2s

from .style import Html

# Quotes in text are escaped, so this finds attributes only.
_STYLE = re.compile(r' style="([^"]*)"')


class Fragments:
    """The HTML fragments of one run: a class for each inline style, and a pool with each table row once."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self.names: dict[str, str] = {}
        self.pool: dict[str, int] = {}

    def shared(self, html: Html) -> int:
        """Put the fragment into the pool, if it is new, and return its index there."""
        return self.pool.setdefault(self.classed(html), len(self.pool))

    def classed(self, html: Html) -> str:
        """The same markup with a class in place of each inline style."""
        return _STYLE.sub(lambda found: f' class="{self._name(found[1])}"', html)

    def _name(self, style: str) -> str:
        """The class for a style, made from the style alone: two workbenches on one page then agree on it."""
        digest = blake2s(style.encode(), digest_size=5).hexdigest()
        return self.names.setdefault(style, f"k{digest}")

    def css(self) -> str:
        """The rules of all classes, each valid only below the scope."""
        return "\n".join(f"{self.scope} .{name}{{{style}}}" for style, name in self.names.items())

"""How a result shows itself: as plain text, and in a notebook as HTML, too.

The HTML is made in show/, which stands higher: as soon as anything of it is imported, it puts its function into
`as_html`.  `kvmlab` sees to that before it hands out the first public name from here.
"""

from __future__ import annotations

from collections.abc import Callable

as_html: Callable[[Displayed], str] | None = None


class Displayed:
    """Something with a `text()`, which `print` and notebooks show."""

    def text(self) -> str:
        """The result as plain text."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.text()

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        html = {"text/html": as_html(self)} if as_html else {}
        return {"text/plain": self.text(), **html}

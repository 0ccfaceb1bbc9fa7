"""The public address of this repository, and the links that are made from it.

The address stands here alone.  As long as there is none the functions return None, because a dead link in a mail is
worse than no link.
"""

from __future__ import annotations

from urllib.parse import quote

REPOSITORY: str | None = None
"""``OWNER/kvmlab`` on GitHub, once the address is fixed."""

REF = "main"
"""What links point at. A tag is better as soon as there is one: Binder builds a branch anew at every push."""


def repo_url() -> str | None:
    """The repository's page, or None while it has no public address."""
    return f"https://github.com/{REPOSITORY}" if REPOSITORY else None


def binder_url(notebook: str | None = None, ref: str = REF) -> str | None:
    """The Binder link that opens a notebook (its path from the root), or None without an address."""
    if not REPOSITORY:
        return None
    base = f"https://mybinder.org/v2/gh/{REPOSITORY}/{quote(ref, safe='')}"
    return base + "?urlpath=" + quote(f"lab/tree/{notebook}" if notebook else "lab", safe="/")

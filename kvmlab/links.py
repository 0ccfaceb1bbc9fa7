"""The public address of this repository, and every link that is made from it.

The address stands here alone. As long as there is none the functions return None and the documents show no
link, because a dead link in a mail is worse than no link. ``python -m kvmlab.links FILE...`` rewrites what
stands between the two marks of each file; a test fails on a link written anywhere else.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import quote

REPOSITORY: str | None = None
"""``OWNER/kvmlab`` on GitHub, once the address is fixed."""

REF = "main"
"""What links point at. A tag is better as soon as there is one: Binder builds a branch anew at every push."""

FIRST_NOTEBOOK = "notebooks/00"
MARKED = re.compile(r"(<!-- links -->\n).*?(<!-- /links -->)", re.DOTALL)


def repo_url() -> str | None:
    """The repository's page, or None while it has no public address."""
    return f"https://github.com/{REPOSITORY}" if REPOSITORY else None


def binder_url(notebook: str | None = None, ref: str = REF) -> str | None:
    """The Binder link that opens a notebook (its path from the root), or None without an address."""
    if not REPOSITORY:
        return None
    base = f"https://mybinder.org/v2/gh/{REPOSITORY}/{quote(ref, safe='')}"
    return base + "?urlpath=" + quote(f"lab/tree/{notebook}" if notebook else "lab", safe="/")


def block(root: Path) -> str:
    """The Markdown lines with all links; empty while there is no address."""
    if not REPOSITORY:
        return ""
    notebooks = sorted(path.relative_to(root).as_posix() for path in root.glob(FIRST_NOTEBOOK + "*.ipynb"))
    opened = binder_url(notebooks[0] if notebooks else None)
    return f"Run it in the browser, nothing to install: [Binder]({opened}).\nSources: <{repo_url()}>.\n"


def fill(text: str, root: Path) -> str:
    """The text with the lines between its ``<!-- links -->`` marks made anew."""
    lines = block(root)
    return MARKED.sub(lambda found: found[1] + lines + found[2], text)


def main(names: list[str]) -> int:
    """Rewrite the marked lines of the named files; run in the repository's root."""
    for path in map(Path, names):
        try:
            old = path.read_text(encoding="utf-8")
        except OSError as error:
            print(f"{path}: {error.strerror}", file=sys.stderr)
            return 2
        if (new := fill(old, Path.cwd())) != old:
            path.write_text(new, encoding="utf-8")
            print(f"{path}: links rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The links in the documents: ``python tests/workbook/links.py FILE...`` rewrites what stands between their marks.

Every link is made from the address in kvmlab/address.py; without one the documents show none.  A test fails on a link
written by hand.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from kvmlab.address import binder_url, repo_url

FIRST_NOTEBOOK = "notebooks/00"
MARKED = re.compile(r"(<!-- links -->\n).*?(<!-- /links -->)", re.DOTALL)


def block(root: Path) -> str:
    """The Markdown lines with all links; empty while there is no address."""
    if not repo_url():
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

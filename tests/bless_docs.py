"""Write into README.md and docs/*.md what their `<!-- run: kvmlab ... -->` commands print today."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- run: kvmlab ([^\n]*) -->\n```\n(.*?)```", re.S)


def pages() -> list[Path]:
    """Every page that people read."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _printed(match: re.Match[str]) -> str:
    command = [sys.executable, "-m", "kvmlab", *match[1].split()]
    out = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return f"<!-- run: kvmlab {match[1]} -->\n```\n{out}```"


if __name__ == "__main__":
    for page in pages():
        page.write_text(BLOCK.sub(_printed, page.read_text()))

"""What all tests share: deterministic Hypothesis, the repository's own files, and Chromium."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
NOT_OURS = {".git", ".venv", ".hypothesis", ".ipynb_checkpoints", "__pycache__", "build", "dist"}

settings.register_profile("kvmlab", deadline=None, derandomize=True, database=None)
settings.load_profile("kvmlab")


def files_of_the_repository() -> list[Path]:
    """Every file that is committed or could be, relative to the root; without git, all that is no cache."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = [Path(name) for name in done.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        names = [name for name in names if not NOT_OURS & set(name.parts) and "_cache" not in str(name)]
    return sorted(name for name in names if (ROOT / name).is_file())


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """The repository's own files, relative to the root."""
    return files_of_the_repository()


@pytest.fixture
def clone(tracked: list[Path], tmp_path: Path) -> Path:
    """A copy of the repository's own files that a test may change."""
    for name in tracked:
        target = tmp_path / "clone" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return tmp_path / "clone"


def find_chromium() -> str | None:
    """Chromium's path: KVMLAB_CHROMIUM, else what is installed under one of its usual names."""
    return os.environ.get("KVMLAB_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUMS)), None)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Chromium's path; without one the test is skipped, or fails where a browser is required."""
    if path := find_chromium():
        return path
    reason = "no Chromium: install it, or set KVMLAB_CHROMIUM to its path"
    if os.environ.get("KVMLAB_REQUIRE_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """A headless Chromium, driven by Playwright.

    One a module and no longer: while Playwright runs, its event loop is in the way of nbclient's.
    """
    from playwright.sync_api import sync_playwright

    # Chromium refuses its sandbox to root, and a container's /dev/shm is too small for it.
    args = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, headless=True, args=args)
        yield running
        running.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh page in a context of its own, which allows the clipboard; errors in the page fail the test."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    fresh, errors = context.new_page(), []
    fresh.on("pageerror", lambda error: errors.append(error))
    yield fresh
    context.close()
    assert not errors, f"the page raised {errors}"

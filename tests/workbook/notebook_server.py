"""JupyterLab as `kvmlab lab` starts it in a clone: opening a notebook, or saving it, changes nothing but the work.

JupyterLab writes the kernel's exact Python into every notebook that it opens: a committed one then counts as
changed before anything was done, and shows in `git diff` after it was saved.  So the notebook that it is given
says that already, and the file keeps the language's name alone (see `notebook_rules.METADATA`).
"""

from __future__ import annotations

import sys
from typing import Any

from ipykernel.ipkernel import IPythonKernel
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from jupyterlab.labapp import main
from notebook_rules import METADATA

LANGUAGE = "language_info"


class Contents(AsyncLargeFileManager):
    """The server's own files, but for one entry of a notebook's metadata."""

    async def get(self, *args: Any, **kwargs: Any) -> Any:
        """A file's model; a Python notebook in it says which Python runs here."""
        model = await super().get(*args, **kwargs)  # type: ignore[no-untyped-call]
        found = _python(model)
        if found is not None:
            found[LANGUAGE] = dict(IPythonKernel.language_info)
        return model

    async def save(self, model: Any, path: str = "") -> Any:
        """Write a file's model; of a Python notebook's language the name alone."""
        found = _python(model)
        if found is not None:
            found[LANGUAGE] = dict(METADATA[LANGUAGE])
        return await super().save(model, path)  # type: ignore[no-untyped-call]


def _python(model: dict[str, Any]) -> dict[str, Any] | None:
    """The metadata of a notebook with this Python's kernel, if that is what the model holds."""
    if model.get("type") != "notebook" or not model.get("content"):
        return None
    metadata: dict[str, Any] = model["content"]["metadata"]
    kernel = METADATA["kernelspec"]["name"]
    return metadata if metadata.get("kernelspec", {}).get("name") == kernel else None


if __name__ == "__main__":
    sys.argv.insert(1, f"--ServerApp.contents_manager_class={__name__}.{Contents.__name__}")
    sys.exit(main())

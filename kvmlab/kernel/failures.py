"""What may fail: a scenario allows one failure of a kind, and each place where it could strike is tried."""

from __future__ import annotations

from ..model.state import View

RMPUPDATE, XARRAY, SEAMCALL = "rmpupdate", "xarray", "seamcall"
FAILURES = (RMPUPDATE, XARRAY, SEAMCALL)


def fails(s: View, what: str) -> bool:
    """Whether this is the one failure of its kind; where a scenario has none, never."""
    if not s.failures_left[what] or not s.choose((False, True)):
        return False
    s.failures_left[what] = 0
    return True

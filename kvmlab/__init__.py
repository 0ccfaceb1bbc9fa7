"""kvmlab: how should KVM convert guest memory between shared and private?  Switch the order and see.

Rooms, low to high; nothing imports upward, and nothing in a circle (tests/test_frame.py reads this list):

    errors  address  pool   what is asked for and does not exist; the public address; processes
    model/                  cells, packing, views; steps, programs, learned rows
    hw/                     rules of the hardware, snp/ and tdx/: tables, pure functions
    kernel/                 locks and context; the directmap
    kvm/                    attributes, MMU and fault path, SNP and TDX ops
    guest/                  vCPUs and what their accesses meet; VMM threads, the host's threads
    design/  designs/       the language of orderings, and the orderings
    machine/                the cells of a machine and their table; what never changes, what must never happen
    compile/                designs and scenarios into models
    explore/                every interleaving: two engines, liveness, shortest runs; pages in the same situation
    emulator/               one VM at real size, by the same rules and the same text
    verdict/                runs, race diagrams and codes; reports, the matrix, the claims; sessions
    show/                   HTML, pictures, widget; the board of a secure EPT entry
    __init__                the public names, each imported when it is first used
    cli/  __main__          what is printed; the command
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, whose import the command cannot wait for

__version__ = "0.1.0"

_EMULATOR = (
    "Deadlock", "Event", "GpFault", "GuestSpins", "GuestTerminated", "InstructionError", "InternalError", "KernelBug",
    "MachineCheck", "MapGpaError", "MemoryFaultExit", "MmioExit", "PlatformError", "PscError", "RmpFault",
    "SetMemoryFailed", "ShutdownExit", "SigBus", "TdxError", "VcFault", "VeFault", "Vm", "VmDead", "VmErrno",
    "VmError", "VmSwitches", "VmplFault",
)  # fmt: skip
_WHERE = {
    **dict.fromkeys(_EMULATOR, "emulator"),
    "Design": "design",
    "DesignError": "design",
    "InputError": "errors",
    "NotApplicable": "errors",
    "ReplayError": "verdict.run",
    "Report": "verdict.report",
    "Session": "verdict.session",
    "Switches": "machine.conf",
    "Trace": "verdict.trace",
    "check": "verdict.report",
    "compare": "verdict.report",
    "matrix": "verdict.matrix",
    "replay": "verdict.replay",
    "sept_board": "show.sept_board",
    "workbench": "show.widget",
}
__all__ = sorted(_WHERE)

HOW_TO_INSTALL = "`make lab` in the repository sets everything up, and so does there: pip install -e '.[lab]'"

if TYPE_CHECKING:
    from typing import Any

    from .design import Design as Design
    from .design import DesignError as DesignError
    from .emulator import *  # noqa: F403
    from .errors import InputError as InputError
    from .errors import NotApplicable as NotApplicable
    from .machine.conf import Switches as Switches
    from .show.sept_board import sept_board as sept_board
    from .show.widget import workbench as workbench
    from .verdict.matrix import matrix as matrix
    from .verdict.replay import replay as replay
    from .verdict.report import Report as Report
    from .verdict.report import check as check
    from .verdict.report import compare as compare
    from .verdict.run import ReplayError as ReplayError
    from .verdict.session import Session as Session
    from .verdict.trace import Trace as Trace


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `import kvmlab` stays light."""
    if name not in _WHERE:
        raise AttributeError(f"module 'kvmlab' has no attribute {name!r}")
    from importlib import import_module

    try:
        if _WHERE[name].startswith("verdict."):
            import_module(".show", __name__)  # so that a notebook shows reports and runs as HTML
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    except ModuleNotFoundError as missing:
        if name != "workbench":
            raise
        message = f"kvmlab.workbench needs {missing.name}, which is not installed; {HOW_TO_INSTALL}"
        raise ImportError(message, name=missing.name) from None


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return [*__all__, "__version__"]

"""One entry of the secure EPT as bits: its states, and what the module shows of it in registers.

Source: TDX module 1.5.01, sept_state_lookup.c, x86_defs.h, sept_manager.[ch].  Left out: the nine states that only
live migration knows.
"""

from __future__ import annotations

from enum import StrEnum

from ..memory import Hpa
from .words import Guest, Level


class State(StrEnum):
    """State of a secure EPT entry: the number in the entry (`encoding`), the one told to the VMM (`public`)."""

    encoding: int
    public: int

    def __new__(cls, text: str, encoding: int, public: int) -> State:
        """Make the member `text` (sept_state_lookup.c)."""
        state = str.__new__(cls, text)
        state._value_, state.encoding, state.public = text, encoding, public
        return state

    FREE = "FREE", 0x0E, 0
    NL_MAPPED = "NL_MAPPED", 0x00, 132
    NL_BLOCKED = "NL_BLOCKED", 0x08, 129
    MAPPED = "MAPPED", 0x60, 4
    BLOCKED = "BLOCKED", 0x68, 1
    PENDING = "PENDING", 0x70, 2
    PENDING_BLOCKED = "PENDING_BLOCKED", 0x78, 3

    @property
    def rwx(self) -> int:
        """Bits 2:0 of the entry."""
        return 7 if self in (State.NL_MAPPED, State.MAPPED) else 0

    @property
    def leaf(self) -> bool:
        """Whether bit 7 says that the entry maps a page."""
        return bool(self.encoding >> 6)


NO_PAGE = Hpa(0)


def accept_chunk(counter: int) -> tuple[int, bool]:
    """Zero the next 4K of a 2M ACCEPT: the entry's counter (bits 20:12) afterwards, and whether it was the last."""
    return (0, True) if counter == 511 else (counter + 1, False)


def arch_entry(state: State, hpa: Hpa = NO_PAGE, accept_counter: int = 0) -> int:
    """RCX of an error that reports the entry: what the module shows of it (set_arch_septe_details_in_vmm_regs()).

    `hpa` in bytes.  Of a table it shows RWX only.  The accept counter of a 2M PENDING entry is seen in bits 20:12,
    for the module clears it in another copy than the one it returns.
    """
    if state == State.FREE:
        return 1 << 63
    if not state.leaf:
        return state.rwx
    write_back, ipat, leaf, suppress_ve = 6 << 3, 1 << 6, 1 << 7, 1 << 63
    return state.rwx | write_back | ipat | leaf | hpa | accept_counter << 12 | suppress_ve


def arch_info(state: State, level: Level) -> int:
    """RDX of such an error: level in bits 2:0, public state in bits 15:8."""
    return state.public << 8 | level


def accept_info(state: State, asked: Level, found: Level) -> int:
    """RDX of the TD exit that ACCEPT ends in: type 1, and in bits 63:32 levels asked and found, state, leaf."""
    info = asked | found << 3 | state.public << 6 | state.leaf << 14
    return Guest.EXIT_ACCEPT.extended_qualification | info << 32

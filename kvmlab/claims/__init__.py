"""The claims of the thread, each tied to an experiment: the answer is computed, never typed in.

Source: "Re: [PATCH RFC v8 02/56] KVM: x86: Add 'update_mem_attr' x86 op", linux-kernel.  `mail` has those of
Michael Roth's mail of 22 March 2023 and of the mails that it quotes, `replies` those of 23 to 29 March.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..scenario import InputError
from . import mail, replies  # noqa: F401 - they fill CLAIMS
from .bench import ANSWERED, CLAIMS, CONFIRMED, QUALIFIED, REFUTED, SOURCE, Answer, Bench, Claim

__all__ = [
    "ANSWERED", "CLAIMS", "CONFIRMED", "QUALIFIED", "REFUTED", "SOURCE", "Answer", "Bench", "Claim", "answers",
]  # fmt: skip


def answers(ids: Iterable[str] = ()) -> list[Answer]:
    """Run the experiments of some claims (default: all, in order); InputError for an id that does not exist."""
    wanted = list(ids) or sorted(CLAIMS)
    unknown = [i for i in wanted if i not in CLAIMS]
    if unknown:
        raise InputError(f"unknown claim {unknown[0]!r}; there are {min(CLAIMS)} to {max(CLAIMS)}")
    bench = Bench()
    return [CLAIMS[i].answer(bench) for i in wanted]

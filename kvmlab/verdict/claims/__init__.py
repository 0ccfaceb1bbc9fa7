"""The claims of the thread, each tied to an experiment: the answer is computed, never typed in.

Source: "Re: [PATCH RFC v8 02/56] KVM: x86: Add 'update_mem_attr' x86 op", linux-kernel.  `mail` has those of
Michael Roth's mail of 22 March 2023 and of the mails that it quotes, `replies` those of 23 to 29 March.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ...errors import InputError
from . import mail, replies  # noqa: F401 - they fill CLAIMS
from .bench import ANSWERED, CLAIMS, CONFIRMED, QUALIFIED, REFUTED, SOURCE, Answer, Bench, Claim

__all__ = [
    "ANSWERED", "CLAIMS", "CONFIRMED", "QUALIFIED", "REFUTED", "SOURCE", "Answer", "Bench", "Claim", "answers",
]  # fmt: skip


def answers(ids: Iterable[str] = (), progress: Callable[[str], Any] | None = None) -> list[Answer]:
    """Run the experiments of some claims (default: all, in order); InputError for an id that does not exist.

    `progress` is called with a line before each.
    """
    wanted = list(ids) or sorted(CLAIMS)
    unknown = [i for i in wanted if i not in CLAIMS]
    if unknown:
        raise InputError(f"unknown claim {unknown[0]!r}; there are {min(CLAIMS)} to {max(CLAIMS)}")
    bench, found = Bench(), []
    for n, i in enumerate(wanted, 1):
        if progress:
            progress(f"{n} of {len(wanted)}: {i}")
        found.append(CLAIMS[i].answer(bench))
    return found

"""Random messages to the workbench, as a broken or hostile browser would send them; nothing may escape.

``python tests/fuzz_messages.py 20000 --seed 1`` prints how many there were, how many were refused in words, and
each one that was not: an exception, an answer that owns to a bug, or a value that is not JSON.  Exit status 1 if
there is one.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import kvmlab
from kvmlab.design import shipped
from kvmlab.design.calls import BACKINGS, CALLS, SECTIONS
from kvmlab.machine.conf import PLATFORMS
from kvmlab.machine.properties import BY_NAME
from kvmlab.machine.scenarios import SCENARIOS
from kvmlab.show.widget import _VERBS, Workbench

FRESH = 100  # messages after which another workbench is asked
SMALL = ("tiny", "host-io", "hook-fails", "careless", "discard-races", "slot-added")  # explored in a moment
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 10**9, 10**5000, -(10**5000), 0.5, float("nan"), float("inf"), "", " ", "-", "\0",
    "x" * 10_000, "no-zap", "ioctl", "<b>", "\ud800", "\u202e", [], [1], {}, {"do": "edit"}, b"x", ("ioctl", 1),
)  # fmt: skip
TYPED = ("", "(", ")", ":", "{", "if (", "else", "\t", "\0", "é", "\u202e", "kvmlab:1:", "kvmlab:2:", "//")
FIELDS = ("text", "section", "line", "by", "to", "platform", "scenario", "backing", "design", "property", "at",
          "actor", "choice", "position", "do")  # fmt: skip


class Fuzz:
    """A source of messages: all that is random comes from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.runs = [kvmlab.check(name, scenario="tiny").trace() for name in ("no-zap", "v8-post-hook")]
        self.texts = [kvmlab.Design.load(name).text for name in shipped("all")]

    def bench(self) -> Workbench:
        """A workbench on some design."""
        return kvmlab.workbench(self.random.choice(shipped()), scenario="tiny")

    def message(self, bench: Workbench) -> object:
        """The next message: mostly one that makes some sense, with a field or two that may not."""
        pick = self.random.random()
        if pick < 0.05:
            return self.random.choice(ODD)
        do = self.random.choice([*_VERBS, "explode"])
        makers: dict[str, Callable[[Workbench], dict[str, Any]]] = {
            "edit": self._text, "paste": self._text, "move": self._move, "choose": self._choose, "load": self._load,
            "versus": self._load, "show": self._show, "take": self._take, "position": self._position,
        }  # fmt: skip
        made = makers[do](bench) if do in makers else {}
        message = {"do": do, **made}
        if pick < 0.35:
            for _ in range(self.random.randint(1, 2)):
                message[self.random.choice(FIELDS)] = self.random.choice(ODD)
        if pick < 0.1:
            message.pop(self.random.choice(list(message)))
        return message

    def _text(self, bench: Workbench) -> dict[str, Any]:
        random = self.random
        kind = random.randrange(5)
        if kind == 0:
            run = random.choice(self.runs)
            text = random.choice(
                [run.code, run.text(), "".join(f"> {line}\n" for line in run.text().splitlines())]
            )
        elif kind == 1:
            calls = [random.choice(CALLS).name for _ in range(random.randint(1, 12))]
            text = f"{random.choice(SECTIONS)}:\n" + "".join(f"    {call}()\n" for call in calls)
        else:
            text = random.choice([bench.session.design.text, *self.texts])
        return {"text": self._half_edited(text) if random.random() < 0.7 else text}

    def _half_edited(self, text: str) -> str:
        """A text as somebody leaves it: lines gone, doubled, moved; characters gone, or odd ones typed."""
        random = self.random
        lines = text.splitlines()
        for _ in range(random.randint(1, 4)):
            if not lines:
                break
            at = random.randrange(len(lines))
            kind = random.randrange(6)
            if kind == 0:
                del lines[at]
            elif kind == 1:
                lines.insert(random.randrange(len(lines) + 1), lines[at])
            elif kind == 2:
                lines[at] = "    " * random.randint(0, 3) + lines[at].strip()
            else:
                cut = random.randint(0, len(lines[at]))
                typed = random.choice(TYPED)
                lines[at] = lines[at][:cut] + typed + lines[at][cut + random.randint(0, 2) :]
        return "\n".join(lines[: random.randint(0, len(lines))] if random.random() < 0.2 else lines)

    def _move(self, bench: Workbench) -> dict[str, Any]:
        where = {"section": self.random.choice(SECTIONS), "line": self.random.randint(-1, 20)}
        return {**where, self.random.choice(["by", "by", "to"]): self.random.randint(-4, 20)}

    def _choose(self, bench: Workbench) -> dict[str, Any]:
        offers = {
            "platform": list(PLATFORMS),
            "backing": list(BACKINGS),
            "scenario": [*SMALL, *SMALL, *SCENARIOS],
        }
        names = self.random.sample(list(offers), self.random.randint(0, 3))
        return {name: self.random.choice(offers[name]) for name in names}

    def _load(self, bench: Workbench) -> dict[str, Any]:
        return {"design": self.random.choice([None, *shipped("all")])}

    def _show(self, bench: Workbench) -> dict[str, Any]:
        return {"property": self.random.choice(["sample", *BY_NAME])}

    def _take(self, bench: Workbench) -> dict[str, Any]:
        at = self.random.randint(0, bench.session.trace.steps)
        actors = [actor.key for actor in bench.session.case.model.actors]
        return {"at": at, "actor": self.random.choice(actors), "choice": self.random.randint(0, 2)}

    def _position(self, bench: Workbench) -> dict[str, Any]:
        return {"position": self.random.randint(-1, bench.session.trace.steps + 1)}


def wrong(bench: Workbench, message: object, wait: bool) -> str:
    """Send one message, and say what is wrong with the answer; empty if nothing is."""
    try:
        bench._handle(message)
        if bench._request and bench._request.case.scenario not in SMALL:
            bench._handle({"do": "cancel"})  # as somebody who does not want to wait
        if wait:
            bench.wait()
            if bench.pending:
                return "something is still pending"
        problem = bench.view["problem"]
        json.dumps([bench.view, bench.pending], allow_nan=False).encode()
        return problem if "has a bug" in problem else ""
    except Exception as escaped:
        return f"{type(escaped).__name__}: {escaped}"


def brief(message: object) -> str:
    """The message in one line; Python does not print a number of 5,000 digits."""
    try:
        return repr(message)[:200]
    except ValueError:
        return f"a {type(message).__name__} with a huge number"


def fuzz(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Send that many messages; what became of them, and what was wrong."""
    source, found, faults = Fuzz(seed), Counter[str](), list[str]()
    bench = source.bench()
    before = threading.excepthook
    threading.excepthook = lambda args: faults.append(f"in a thread: {args.exc_value!r}")
    try:
        for n in range(count):
            if n % FRESH == 0:
                bench._settle()
                bench = source.bench()
            message = source.message(bench)
            # Some come while the last one's check is still under way.
            if fault := wrong(bench, message, wait=source.random.random() < 0.8):
                faults.append(f"message {n}, {brief(message)}: {fault[:300]}")
            found["refused" if bench.view["problem"] else "done"] += 1
        bench.wait()
    finally:
        threading.excepthook = before
    return found, faults


def main(argv: list[str] | None = None) -> int:
    """Command line; exit status 1 if anything escaped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    began = time.perf_counter()
    found, faults = fuzz(options.count, options.seed)
    took = time.perf_counter() - began
    became = f"{found['done']} done, {found['refused']} refused in words, {len(faults)} escaped"
    print(f"{options.count} messages in {took:.0f} s: {became}")
    print(*faults[:20], sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

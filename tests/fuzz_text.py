"""Random texts, codes, diagrams and signals: what gets through that should not?

    python tests/fuzz_text.py texts|codes|signals N [--seed S]

`texts`: N texts through the parser, near those that ship, of random words, and pathological; each is a design or a
DesignError, and a design's canonical text and the code of its edit say the same design.  `codes`: N codes and
diagrams with a changed, a missing or an added character, or a cut; each is refused or replays the run that it was
made of.  `signals`: N commands that get signals at random moments; each ends soon, in a line, and leaves no process.
Prints what it counted, and ends with 1 if anything got through.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

import kvmlab
from kvmlab.design import Design, DesignError, shipped
from kvmlab.design.calls import CALLS, CONDITIONS, SECTIONS
from kvmlab.design.files import shipped_text
from kvmlab.design.patch import patch_of, patched
from kvmlab.machine.conf import Switches
from kvmlab.verdict import diagram as drawing
from kvmlab.verdict import replay as reading
from kvmlab.verdict.run import ReplayError
from kvmlab.verdict.trace import Trace

Counts = Counter[str]
BAD = "GOT THROUGH: "  # what has to be 0 begins so

# -- texts

ODD = "\0\x1b\x7f\x85\u00a0\u200b\u200d\u202e\u2066\ufeff\u0430\u00b2\u2026\U0001f4a3\t\r\f"
WORDS = """base: backing: linux: expect~snp: if else else~if return return~0 flush~|= ret~= static_call ( ) () (( ))
{ } : ; , = // /* */ # ... >~ >~>~ + - @@~-1,2~+3,4~@@ v8-post-hook upstream split in-place v6.19 tiny:~all~Never
private shared mmu_lock kvm &kvm->slots_lock 0x500000004 -EIO goto~out out: while~(1) do"""
TOKENS = (
    *(name for call in CALLS for name in (call.name, *call.aliases)), *CONDITIONS, *(f"{name}:" for name in SECTIONS),
    *(word.replace("~", " ") for word in WORDS.split()), "\n", "\n", "\n    ", "\n        ", "\n\t", *ODD,
)  # fmt: skip


def near(rng: random.Random) -> str:
    """A text that ships, with some lines and characters changed."""
    lines = shipped_text(rng.choice(shipped("all"))).splitlines()
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        match rng.randrange(8):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, lines[other])
            case 2:
                lines[at], lines[other] = lines[other], lines[at]
            case 3:
                lines[at] = " " * rng.randrange(13) + lines[at].lstrip()
            case 4:
                lines[at] = changed(rng, lines[at], "".join(map(chr, range(32, 127))) + ODD)
            case 5:
                lines.insert(
                    at, f"{' ' * rng.randrange(9)}{rng.choice(TOKENS)}{rng.choice(('', '()', ':', '():'))}"
                )
            case 6:
                lines[at] = rng.choice(("> ", ">> ", "+", "\t", "// ", "/* ")) + lines[at]
            case _:
                del lines[rng.randrange(len(lines)) :]
        lines = lines or [""]
    return "\n".join(lines)


def soup(rng: random.Random) -> str:
    """Words of the language, and some that are not, in any order."""
    return "".join(f"{rng.choice(TOKENS)}{rng.choice(' ' * 6 + chr(10))}" for _ in range(rng.randrange(60)))


def pathological(rng: random.Random) -> str:
    """The same thing very often."""
    n, token = rng.choice((17, 100, 300)), rng.choice(TOKENS)
    deep = "".join(f"{' ' * depth}if (attr == private)\n" for depth in range(n))
    calls = "ioctl:\n" + f"    {token}()\n" * n
    return rng.choice((token * n, f"{token}\n" * n, deep + token, "(" * n + ")" * n, calls))


def texts(count: int, rng: random.Random) -> Counts:
    """How many texts were a design, and how many were none; the slowest in milliseconds."""
    kinds: tuple[Callable[[random.Random], str], ...] = (*[near] * 12, *[soup] * 7, pathological)
    found: Counts = Counter()
    slowest = 0.0
    for n in range(count):
        given, began = rng.choice(kinds)(rng), time.perf_counter()
        try:
            design = Design.parse(given)
            found["a design"] += 1
            if n % 20 == 0:
                if Design.parse(design.canonical()).digest != design.digest:
                    found[f"{BAD}another canonical text"] += 1
                if (
                    again := patched(*patch_of(design))
                ).digest != design.digest or again.backing != design.backing:
                    found[f"{BAD}another edit"] += 1
        except DesignError as refused:
            found["refused"] += 1
            if any(not char.isprintable() for char in str(refused).replace("\n", "")):
                found[f"{BAD}a control character in a message"] += 1
        except Exception as problem:
            found[f"{BAD}{type(problem).__name__}"] += 1
            print(repr(given), repr(problem), file=sys.stderr)
        slowest = max(slowest, time.perf_counter() - began)
    found["slowest, ms"] = round(1000 * slowest)
    return found


# -- codes and diagrams

EDIT = ("static_call(kvm_x86_update_mem_attr)()\n\n    mutex", "rmpupdate()\n\n    mutex")
LETTERS = "".join(map(chr, range(32, 127))) + "\n\u00e9\u202e"


def runs() -> list[Trace]:
    """Runs of every kind: fatal, not fatal, a cycle, a sample, a measure, by hand; edited; other knobs."""
    mine = Design.parse(shipped_text("v8-post-hook").replace(*EDIT), "mine (1).kvm")
    reports = [
        kvmlab.check("no-zap", scenario="tiny"),
        kvmlab.check("never-rmpupdate", scenario="tiny"),
        kvmlab.check("never-maps-back", scenario="host-io"),
        kvmlab.check("keeps-mmu-lock", scenario="tiny"),
        kvmlab.check("v7-under-lock", scenario="tiny", switches=Switches(rmpupdate_flushes=False)),
        kvmlab.check("tdx-no-kick", platform="tdx", scenario="round-trip"),
        kvmlab.check("gmem-in-place", scenario="tiny", backing="in-place"),
        kvmlab.check(mine, scenario="tiny"),
    ]
    by_hand = kvmlab.Session("v8-post-hook", scenario="tiny")
    for _ in range(12):
        by_hand.take(by_hand.enabled()[-1].actor)
    measured = kvmlab.check("v8-post-hook", scenario="tiny").example("spurious-npf")
    return [*(report.trace() for report in reports), by_hand.trace, measured]


def changed(rng: random.Random, text: str, letters: str = LETTERS) -> str:
    """The text with one character changed, missing, or more."""
    at = rng.randrange(len(text) + 1)
    return (
        text[:at]
        + rng.choice(("", rng.choice(letters), rng.choice(letters) + text[at : at + 1]))
        + text[at + 1 :]
    )


def cut(rng: random.Random, text: str) -> str:
    """The text without its beginning, its end, or some lines or characters in between."""
    one, other = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    lines = text.splitlines()
    del lines[rng.randrange(len(lines))]
    return rng.choice((text[one:], text[:one], text[:one] + text[other:], "\n".join(lines)))


def quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines())


def codes(count: int, rng: random.Random) -> Counts:
    """How many changed codes and diagrams were refused, and how many still were the run that they were made of."""
    traces = runs()
    told = [(trace.code, trace.text()) for trace in traces]
    # A diagram's code is intact most of the time, and what it should be is drawn once.
    decode, draw = lru_cache(reading.decode), lru_cache(drawing._drawn)
    with patch.object(reading, "decode", decode), patch.object(drawing, "_drawn", draw):
        return _codes(count, rng, told)


def _codes(count: int, rng: random.Random, told: list[tuple[str, str]]) -> Counts:
    found: Counts = Counter()
    for _ in range(count):
        own, diagram = rng.choice(told)
        kind, whole = rng.choice((("code", own), ("diagram", diagram)))
        how = rng.choice((changed, changed, cut))
        given = how(rng, whole)
        try:
            trace = reading.replay(quoted(given) if rng.random() < 0.3 else given)
        except ReplayError:
            found[f"{kind}s refused"] += 1
            continue
        except Exception as problem:
            found[f"{BAD}{type(problem).__name__}"] += 1
            print(repr(given), repr(problem), file=sys.stderr)
            continue
        if trace.text() != diagram:
            found[f"{BAD}a {kind} of another run"] += 1
            print(repr(given), file=sys.stderr)
        elif kind == "diagram" and not says_no_more(given, diagram):
            found[f"{BAD}a diagram that says something else"] += 1
            print(repr(given), file=sys.stderr)
        else:
            found[f"{kind}s that are the same run"] += 1
    return found


def says_no_more(given: str, diagram: str) -> bool:
    """Whether a text with the diagram's code says what the diagram says, or has neither title nor verdict left.

    Spaces, line breaks, quote marks and the length of a rule make no difference here; the columns are tested
    by themselves.
    """
    plain = [
        re.sub(r"(?m)^(?:>[> ]*)|-{3,}", "", text[: text.index("kvmlab:2:")]) for text in (given, diagram)
    ]
    above, drawn = ("".join(text.split()) for text in plain)
    return above.endswith(drawn) or not re.search(r"=>|\(amodel,nothardware\)|\dsteps?,\d+switch", above)


# -- signals

COMMANDS = (
    ["check", "v8-post-hook"], ["check", "no-zap", "--scenario", "tiny"], ["claims", "C06"], ["designs"],
    ["matrix", "--platform", "snp", "--scenario", "tiny", "--scenario", "host-io", "--jobs", "2"],
    ["matrix", "--platform", "tdx", "--design", "upstream", "--jobs", "20000"], ["switches"],
    ["report", "no-zap", "--scenario", "tiny", "-o", os.devnull],
)  # fmt: skip
STATUS = (0, 1, 2, -signal.SIGINT, -signal.SIGTERM)  # the last two: before kvmlab could catch them


def signals(count: int, rng: random.Random) -> Counts:
    """How the commands ended."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else those started in the background ignore it
    found: Counts = Counter()
    for _ in range(count):
        command, to_all = rng.choice(COMMANDS), rng.random() < 0.7
        process = subprocess.Popen(
            [sys.executable, "-m", "kvmlab", *command],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        for pause in (rng.choice((0.1, 0.5, 2.0)) * rng.random(), *[0.08 * rng.random()] * rng.randrange(3)):
            if ended(process, pause):
                break
            number = rng.choice((signal.SIGINT, signal.SIGINT, signal.SIGTERM))
            (os.killpg if to_all else os.kill)(process.pid, number)
        if not ended(process, 30):
            found[f"{BAD}a command that does not end"] += 1
            print(command, file=sys.stderr)
            process.kill()
        _, said = process.communicate()
        found[f"status {process.returncode}"] += 1
        if process.returncode not in STATUS and "init_import_site" not in said:
            found[f"{BAD}a status of {process.returncode}"] += 1
        if "Traceback" in said:
            ours = re.search(r'File "[^"]*kvmlab/(?!cli\.py|__init__\.py|__main__\.py)', said)
            found[f"{BAD}a traceback" if ours else "while Python itself was starting"] += 1
            print(command, said, file=sys.stderr)
        if left := survivors(process.pid):
            found[f"{BAD}{left} processes left"] += 1
    return found


def ended(process: subprocess.Popen[str], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def survivors(session: int) -> int:
    """How many processes of a session are still there ten seconds after its first has ended."""
    deadline = time.monotonic() + 10
    while (left := sum(1 for _ in members(session))) and time.monotonic() < deadline:
        os.sched_yield()
    for pid in members(session):
        os.kill(pid, signal.SIGKILL)
    return left


def members(session: int) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = entry.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            yield int(entry.parent.name)


FUZZ = {"texts": texts, "codes": codes, "signals": signals}


def main() -> int:
    """Run one kind, and print what it counted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=FUZZ)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    found = FUZZ[options.kind](options.count, random.Random(options.seed))
    print(f"{options.count} {options.kind}, seed {options.seed}, {time.monotonic() - began:.0f} s")
    for what, number in sorted(found.items()):
        print(f"  {number:>9,}  {what}")
    return int(any(what.startswith(BAD) for what in found))


if __name__ == "__main__":
    sys.exit(main())

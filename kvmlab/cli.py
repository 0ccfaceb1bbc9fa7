"""The command `kvmlab`: exit status 0 nothing bad can happen, 1 something can, 2 bad input."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__

if TYPE_CHECKING:
    from .report import Report


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong on stderr and leave with status 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="kvmlab", description="Check how KVM converts guest memory between shared and private."
    )
    parser.add_argument("--version", action="version", version=f"kvmlab {__version__}")
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return sub.add_parser(name, help=help, description=help)

    designs = command("designs", "list the designs that ship, one line each")
    designs.add_argument("--planted", action="store_true", help="also those planted to break a property")
    designs.add_argument("--calls", action="store_true", help="list the calls that a design may make instead")
    command("scenarios", "list the scenarios, one line each")
    command("properties", "list the properties, one line each")
    claims = command(
        "claims", "run the experiments and print each claim of the thread with its computed answer"
    )
    claims.add_argument("ids", nargs="*", metavar="ID", help="only these, with their evidence")
    claims.add_argument("--json", action="store_true")
    command("switches", "list the choices that sources leave open, and the verdicts that depend on each")
    show = command("show", "print the text of a design")
    show.add_argument("design")
    diff = command("diff", "print the lines in which two designs differ")
    diff.add_argument("a")
    diff.add_argument("b")
    check = command("check", "explore all interleavings, one verdict a property")
    check.add_argument("designs", nargs="+", metavar="DESIGN", help="a name, a file, or - for standard input")
    _case(check, many=True)
    check.add_argument(
        "--limit", type=_positive, metavar="STATES", help="stop after so many states (not complete)"
    )
    check.add_argument("--json", action="store_true")
    matrix = command("matrix", "all designs in all scenarios, worst verdict a cell")
    _case(matrix, many=True, switches=False)
    matrix.add_argument("--design", action="append", metavar="DESIGN", help="only this one (may be repeated)")
    matrix.add_argument("--json", action="store_true")
    matrix.add_argument("--jobs", type=int, metavar="N", help="processes that check (default: one a CPU)")
    trace = command("trace", "print a counterexample, or a sample run, as a race diagram")
    trace.add_argument("design")
    _case(trace, many=False)
    trace.add_argument("--property", metavar="NAME", help="of this property (default: the nearest violation)")
    trace.add_argument("--measure", metavar="NAME", help="the shortest run that counts this measure instead")
    trace.add_argument(
        "--count", type=_positive, default=1, metavar="N", help="up to N runs that differ in who acts"
    )
    trace.add_argument("--code", action="store_true", help="print only the code that replays it")
    replay = command("replay", "replay a run from its code, or (-) from a diagram on standard input")
    replay.add_argument("code")
    replay.add_argument("--step", type=int, metavar="N", help="also print the machine after step N")
    report = command("report", "write one HTML page that can be stepped through offline")
    report.add_argument("designs", nargs="+", metavar="DESIGN")
    report.add_argument("-o", "--output", required=True, metavar="FILE.html")
    _case(report, many=True)
    command("lab", "open the workbook in JupyterLab; what follows is passed on to it")
    return parser


def _case(parser: argparse.ArgumentParser, many: bool, switches: bool = True) -> None:
    action: Any = "append" if many else "store"
    for name in ("platform", "scenario", "backing"):
        parser.add_argument(
            f"--{name}", action=action, metavar=name[0].upper(), help="may be repeated" if many else None
        )
    if switches:
        parser.add_argument(
            "--switch",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="an open choice: see docs/model.md",
        )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = build_parser()
    options, more = parser.parse_known_args(arguments)
    if more and options.command != "lab":
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    options.arguments = more
    from .design import DesignError
    from .scenario import InputError, NotApplicable
    from .trace import ReplayError

    try:
        return int(_COMMANDS[options.command](options))
    except (DesignError, InputError, ReplayError) as problem:
        print(f"kvmlab: {problem}", file=sys.stderr)
    except NotApplicable as reason:
        print(f"n/a: {reason}")
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("kvmlab: interrupted", file=sys.stderr)
    return 2


def _designs(options: argparse.Namespace) -> int:
    from .design import Design, shipped

    if options.calls:
        from .design.calls import CALLS

        for call in CALLS:
            print(f"{call.name:<34} {', '.join(call.sections):<35} {call.meaning}")
        return 0
    for name in (*shipped("thread"), *shipped("variant"), *(shipped("planted") if options.planted else ())):
        print(f"{name:<30} {Design.load(name).title}")
    return 0


def _scenarios(options: argparse.Namespace) -> int:
    from .scenario import SCENARIOS

    for scenario in SCENARIOS.values():
        print(f"{scenario.name:<20} {scenario.title}")
    return 0


def _properties(options: argparse.Namespace) -> int:
    from .properties import PROPERTIES

    for p in PROPERTIES:
        print(f"{p.name:<20} {p.sentence}{' (ends the run)' if p.fatal else ''}")
    return 0


def _claims(options: argparse.Namespace) -> int:
    from .claims import answers

    found = answers(options.ids)
    if options.json:
        print(json.dumps([answer.as_json() for answer in found], indent=1))
        return 0
    for answer in found:
        print(f"{answer.claim.id} {answer.claim.who}: {answer.claim.text}")
        print(f"    {answer.word}: {answer.why}")
        for line in answer.evidence if options.ids else ():
            print(f"      {line}")
    return 0


def _switches(options: argparse.Namespace) -> int:
    from .grid import ALTERNATIVES, dependence
    from .trace import changed

    for platform, chosen, scenarios in ALTERNATIVES:
        ((name, value),) = changed(chosen).items()
        found = dependence(chosen, scenarios=scenarios, platform=platform, jobs=os.cpu_count() or 1)
        some = f"{len(found) or 'no'} verdict{'' if len(found) == 1 else 's'}"
        print(f"{platform}, {name}={value}: {some} of the shipped designs")
        for design, scenario, backing, prop, before, after in found:
            print(f"    {design}, {scenario}, {backing}: {prop} {before} -> {after}")
    return 0


def _show(options: argparse.Namespace) -> int:
    from .design import Design

    print(Design.load(options.design).text.rstrip())
    return 0


def _diff(options: argparse.Namespace) -> int:
    from .design import Design

    text = Design.load(options.a).diff(Design.load(options.b))
    print(text or "the same ordering")
    return 0


def _reports(options: argparse.Namespace, limit: int | None = None) -> Iterator[Report | str]:
    """The report of each case asked for, or the line that says why there is none."""
    from .design import Design
    from .report import check
    from .scenario import NotApplicable
    from .trace import parse_switches

    switches = parse_switches(options.switch)
    for design in [Design.load(name) for name in options.designs]:
        for platform in options.platform or ["snp"]:
            for backing in options.backing or [design.backing or "split"]:
                for scenario in options.scenario or ["to-private", "to-shared"]:
                    _progress(f"{design.name} {platform} {scenario} {backing}")
                    try:
                        yield check(design, platform, scenario, backing, switches, limit)
                    except NotApplicable as reason:
                        yield f"{design.name}, {platform}, {scenario}, {backing} backing: n/a ({reason})"
    _progress("")


def _check(options: argparse.Namespace) -> int:
    found: list[Any] = []
    bad = False
    for report in _reports(options, options.limit):
        if isinstance(report, str):
            _say(options, report)
            continue
        bad = bad or bool(report.violated)
        _say(options, report.text())
        found.append(report.as_json() if options.json else None)
    if options.json:
        print(json.dumps(found, indent=1))
    return int(bad)


def _report(options: argparse.Namespace) -> int:
    from .scenario import InputError
    from .show.page import page_html

    found = list(_reports(options))
    reports = [report for report in found if not isinstance(report, str)]
    for line in found:
        if isinstance(line, str):
            print(line)
    if not reports:
        raise InputError("none of these cases exists, so there is nothing to write")
    try:
        Path(options.output).write_text(page_html(reports), encoding="utf-8")
    except OSError as problem:
        raise InputError(f"cannot write {options.output}: {problem.strerror}") from None
    print(f"{options.output}: {len(reports)} checks, {sum(len(r.violated) for r in reports)} violations")
    return int(any(report.violated for report in reports))


def _say(options: argparse.Namespace, text: str) -> None:
    _progress("")
    if not options.json:
        print(text)


def _progress(text: str) -> None:
    """Show what is going on, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:78]}", end="", file=sys.stderr, flush=True)


def _matrix(options: argparse.Namespace) -> int:
    from .grid import matrix

    asked = {
        "platforms": options.platform,
        "scenarios": options.scenario,
        "backings": options.backing,
        "designs": options.design,
    }
    found = matrix(
        **{name: value for name, value in asked.items() if value},
        progress=_progress,
        elements=options.json,
        jobs=(os.cpu_count() or 1) if options.jobs is None else options.jobs,
    )
    _progress("")
    if options.json:
        print(json.dumps([square.as_json() for square in found.squares], indent=1))
    else:
        print(found.text())
    return int(any(square.worst not in ("ok", "n/a") for square in found.squares))


def _trace(options: argparse.Namespace) -> int:
    from .design import Design
    from .properties import BY_NAME
    from .report import check
    from .scenario import InputError
    from .trace import parse_switches

    if options.property and options.property not in BY_NAME:
        raise InputError(f"unknown property {options.property!r}; there are: {', '.join(BY_NAME)}")
    report = check(
        Design.load(options.design),
        options.platform or "snp",
        options.scenario or "to-private",
        options.backing or "split",
        parse_switches(options.switch),
    )
    if options.measure:
        found = [report.example(options.measure)]
    elif options.count > 1:
        found = report.traces(options.property or next(iter(report.violated), "livelock"), options.count)
    else:
        found = [report.trace(options.property)]
    print("\n\n".join(trace.code if options.code else trace.text() for trace in found))
    return int(any(trace.why in BY_NAME for trace in found))


def _replay(options: argparse.Namespace) -> int:
    from .code import replay
    from .show.text import machine_text

    pasted = sys.stdin.read(1_000_000) if options.code == "-" else options.code
    trace = replay(pasted)
    text = trace.text()
    print(text)
    if options.code == "-" and _lanes(text) != _lanes(pasted):
        print("kvmlab: the pasted diagram is not what its code replays; the above is", file=sys.stderr)
    if options.step is not None:
        if not 0 <= options.step < len(trace.frames):
            from .scenario import InputError

            raise InputError(f"--step {options.step}: this run has steps 0 to {len(trace.frames) - 1}")
        print(machine_text(trace.case.model, trace.frames[options.step].state))
    return int(any(f.event and f.event.violations for f in trace.frames))


def _lanes(text: str) -> list[str]:
    """The words of a diagram from the rule under its heads to its verdict, without quote marks."""
    import re

    plain = "\n".join(re.sub(r"^(?:\s*>)+ ?", "", line) for line in text.splitlines())
    under = re.search(r"^-{4,}(?: +-{4,})*$(.*?)^=> ", plain, re.M | re.S)
    return under[1].split() if under else []


def _lab(options: argparse.Namespace) -> int:
    from importlib.util import find_spec

    from .scenario import InputError

    if find_spec("jupyterlab") is None:
        raise InputError(
            "JupyterLab is not installed here; `make lab` sets everything up, or: pip install 'kvmlab[lab]'"
        )
    root = Path(__file__).resolve().parent.parent
    folder = root / "notebooks"
    where = ["--notebook-dir", str(root)] if folder.is_dir() else []
    tour = next(iter(sorted(folder.glob("00*.ipynb"))), None) if folder.is_dir() else None
    page = [f"--LabApp.default_url=/lab/tree/notebooks/{tour.name}"] if tour else []
    root_too = ["--allow-root"] if getattr(os, "geteuid", lambda: 1)() == 0 else []  # as in a container
    os.execv(
        sys.executable, [sys.executable, "-m", "jupyterlab", *where, *page, *root_too, *options.arguments]
    )


_COMMANDS = {
    "designs": _designs, "scenarios": _scenarios, "properties": _properties, "claims": _claims, "switches": _switches,
    "show": _show, "diff": _diff, "check": _check, "matrix": _matrix, "trace": _trace, "replay": _replay,
    "report": _report, "lab": _lab,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

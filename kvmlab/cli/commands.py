"""The commands of `kvmlab`: what each takes, and what it prints; `cli` says what their exit status means."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import HOW_TO_INSTALL, __version__
from .console import OutputError, complain, emit, folded, listed, progress

if TYPE_CHECKING:
    from ..verdict.report import Report


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong on stderr and leave with status 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """As argparse's, which says nothing when its message cannot be written."""
        if message:
            (complain if file is sys.stderr else emit)(message.rstrip("\n"))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="kvmlab",
        description="Check how KVM converts guest memory between shared and private.",
        epilog="Exit status: 0 nothing bad can happen, 1 something can, 2 bad input, out of memory or output that "
        "cannot be written, 3 nothing bad found, but not complete.",
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
    show = command("show", "print the text of a design, or of a scenario")
    show.add_argument("design", nargs="?")
    show.add_argument("--scenario", metavar="S", help="names joined by +, or a file")
    _sizes(show)
    diff = command("diff", "print the lines in which two designs differ")
    diff.add_argument("a")
    diff.add_argument("b")
    check = command("check", "explore all interleavings, one verdict a property")
    check.add_argument("designs", nargs="+", metavar="DESIGN", help="a name, a file, or - for standard input")
    _case(check, many=True)
    check.add_argument("--json", action="store_true")
    matrix = command("matrix", "all designs in all scenarios, worst verdict a cell")
    _case(matrix, many=True, switches=False)
    matrix.add_argument("--design", action="append", metavar="DESIGN", help="only this one (may be repeated)")
    matrix.add_argument("--json", action="store_true")
    matrix.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="processes that check (at most, and by default, one a CPU)",
    )
    trace = command("trace", "print a counterexample, or a sample run, as a race diagram")
    trace.add_argument("design")
    _case(trace, many=False)
    trace.add_argument("--property", metavar="NAME", help="of this property (default: the nearest violation)")
    trace.add_argument(
        "--asked", type=_positive, metavar="N", help="to the scenario's N-th never: or sometimes:"
    )
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
    parser.add_argument(
        "--limit", type=_positive, metavar="STATES", help="stop after so many states (not complete: status 3)"
    )
    parser.add_argument(
        "--seconds", type=_positive, metavar="N", help="stop each search after so many seconds (the same)"
    )
    _sizes(parser)
    if switches:
        parser.add_argument(
            "--switch",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="an open choice: see docs/model.md",
        )


def _sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vcpus", type=_positive, metavar="N", help="so many vCPUs in the scenario")
    parser.add_argument("--gfns", type=_positive, metavar="N", help="so many gfns in the scenario")


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 15 or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a positive whole number (of at most 15 digits)"
        )
    return int(text)


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit status, and raises what `problems` lists."""
    parser = build_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    options, more = parser.parse_known_args(arguments)
    if more and options.command != "lab":
        parser.error(f"unrecognized arguments: {ascii(' '.join(more))[1:-1]}")
    options.arguments = more
    from ..errors import NotApplicable

    try:
        return _COMMANDS[options.command](options)
    except NotApplicable as reason:
        emit(f"n/a: {reason}")
        return 0


def problems() -> tuple[type[Exception], ...]:
    """What is wrong with the input or the output, not with kvmlab."""
    from ..design import DesignError
    from ..errors import InputError
    from ..verdict.run import ReplayError

    return DesignError, InputError, ReplayError, OutputError


def _status(bad: bool, complete: bool) -> int:
    """1 something bad can happen; else 0, or 3 if not everything was looked at."""
    return 1 if bad else 0 if complete else 3


def _designs(options: argparse.Namespace) -> int:
    from ..design import Design, shipped

    if options.calls:
        from ..design.calls import listed as calls

        for name, sections, meaning in calls():
            emit(folded(f"{name:<34} {', '.join(sections):<35} {meaning}", 71))
        return 0
    names = (*shipped("thread"), *shipped("variant"), *(shipped("planted") if options.planted else ()))
    listed(((name, Design.load(name).title) for name in names), 30)
    return 0


def _scenarios(options: argparse.Namespace) -> int:
    from ..machine.scenarios import SCENARIOS

    listed(((scenario.name, scenario.title) for scenario in SCENARIOS.values()), 20)
    return 0


def _properties(options: argparse.Namespace) -> int:
    from ..machine.properties import PROPERTIES

    listed(((p.name, f"{p.sentence}{' (ends the run)' if p.fatal else ''}") for p in PROPERTIES), 20)
    return 0


def _claims(options: argparse.Namespace) -> int:
    from ..verdict.claims import answers

    found = answers(options.ids, progress)
    progress()
    if options.json:
        emit(json.dumps([answer.as_json() for answer in found], indent=1))
        return 0
    for answer in found:
        emit(folded(f"{answer.claim.id} {answer.claim.who}: {answer.claim.text}", 4))
        emit(folded(f"    {answer.word}: {answer.why}", 4))
        for line in answer.evidence if options.ids else ():
            emit(folded(f"      {line}", 8))
    return 0


def _switches(options: argparse.Namespace) -> int:
    from ..verdict.matrix import ALTERNATIVES, dependence
    from ..verdict.run import changed

    for n, (platform, chosen, scenarios) in enumerate(ALTERNATIVES, 1):
        ((name, value),) = changed(chosen).items()

        def told(what: str, before: str = f"switch {n} of {len(ALTERNATIVES)}, {name}") -> None:
            progress(f"{before}: {what}")

        jobs = os.cpu_count() or 1
        found = dependence(chosen, scenarios=scenarios, platform=platform, jobs=jobs, progress=told)
        progress()
        some = f"{len(found) or 'no'} verdict{'' if len(found) == 1 else 's'}"
        emit(f"{platform}, {name}={value}: {some} of the shipped designs")
        for design, scenario, backing, prop, before, after in found:
            emit(f"    {design}, {scenario}, {backing}: {prop} {before} -> {after}")
    return 0


def _show(options: argparse.Namespace) -> int:
    from ..design import Design
    from ..errors import InputError
    from ..machine.scenario_text import spelled
    from ..machine.scenarios import find_scenario, read_scenario, scenario_text

    if not options.design and not options.scenario:
        raise InputError("show what?  The name of a design or its file, or --scenario with one of those")
    if options.design:
        emit(Design.load(options.design).text.rstrip())
    if options.scenario:
        scene = read_scenario(options.scenario, options.vcpus, options.gfns)
        emit(
            (
                spelled(find_scenario(scene)) if "\n" in scene or "+" in scene else scenario_text(scene)
            ).rstrip()
        )
    return 0


def _diff(options: argparse.Namespace) -> int:
    from ..design import Design

    emit(Design.load(options.a).diff(Design.load(options.b)) or "the same ordering")
    return 0


def _reports(options: argparse.Namespace) -> Iterator[Report | str]:
    """The report of each case asked for, or the line that says why there is none."""
    from ..design import Design
    from ..errors import NotApplicable
    from ..machine.scenarios import find_scenario
    from ..verdict.report import check
    from ..verdict.run import parse_switches

    switches = parse_switches(options.switch)
    scenarios = _read_scenarios(options, ["to-private", "to-shared"])
    cases = [
        (design, platform, scenario, backing)
        for design in [Design.load(name) for name in options.designs]
        for platform in options.platform or ["snp"]
        for backing in options.backing or [design.backing or "split"]
        for scenario in scenarios
    ]
    for n, (design, platform, scenario, backing) in enumerate(cases, 1):
        name = find_scenario(scenario).name
        progress(f"{n} of {len(cases)}: {design.name} {platform} {name} {backing}")
        try:
            report: Report | str = check(
                design, platform, scenario, backing, switches, options.limit, options.seconds
            )
        except NotApplicable as reason:
            report = f"{design.name}, {platform}, {name}, {backing} backing: n/a ({reason})"
        progress()
        yield report


def _read_scenarios(options: argparse.Namespace, usual: list[str]) -> list[str]:
    from ..machine.scenarios import read_scenario

    return [read_scenario(scenario, options.vcpus, options.gfns) for scenario in options.scenario or usual]


def _check(options: argparse.Namespace) -> int:
    found: list[Any] = []
    bad, complete = False, True
    for report in _reports(options):
        if not isinstance(report, str):
            bad, complete = bad or report.bad, complete and report.complete
        if not options.json:
            emit(report if isinstance(report, str) else report.text())
        elif not isinstance(report, str):
            found.append(report.as_json())
    if options.json:
        emit(json.dumps(found, indent=1))
    return _status(bad, complete)


def _report(options: argparse.Namespace) -> int:
    from ..design.errors import quoted
    from ..errors import InputError
    from ..show.page import page_html

    found = list(_reports(options))
    reports = [report for report in found if not isinstance(report, str)]
    for line in found:
        if isinstance(line, str):
            emit(line)
    if not reports:
        raise InputError("none of these cases exists, so there is nothing to write")
    _write(Path(options.output), page_html(reports))
    violations = sum(len(r.violated) for r in reports)
    emit(f"{quoted(options.output, 200)}: {len(reports)} checks, {violations} violations")
    return _status(violations > 0, all(report.complete for report in reports))


def _write(path: Path, text: str) -> None:
    """Write a file whole, or leave what was there; InputError if neither can be done."""
    from ..design.errors import quoted
    from ..errors import InputError

    part: Path | None = None
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")  # a device, a pipe
            return
        path = path.resolve()
        part = path.with_name(f".kvmlab-{os.getpid()}")
        part.write_text(text, encoding="utf-8")
        if path.exists():
            part.chmod(path.stat().st_mode)
        part.replace(path)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or "not a path"
        raise InputError(f"cannot write {quoted(str(path), 200)}: {reason}") from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _matrix(options: argparse.Namespace) -> int:
    from ..design import Design
    from ..machine.scenarios import SCENARIOS
    from ..verdict.matrix import matrix

    asked = {
        "platforms": options.platform,
        "scenarios": _read_scenarios(options, list(SCENARIOS) if options.vcpus or options.gfns else []),
        "backings": options.backing,
        "designs": [Design.load(name) for name in options.design or ()],
    }
    found = matrix(
        **{name: value for name, value in asked.items() if value},
        progress=progress,
        elements=options.json,
        jobs=options.jobs or os.cpu_count() or 1,
        limit=options.limit,
        seconds=options.seconds,
    )
    progress()
    if options.json:
        emit(json.dumps([square.as_json() for square in found.squares], indent=1))
    else:
        emit(found.text())
    bad = any(square.worst not in ("ok", "?", "n/a") for square in found.squares)
    return _status(bad, all(square.complete for square in found.squares))


def _trace(options: argparse.Namespace) -> int:
    from ..design import Design
    from ..errors import InputError
    from ..machine.properties import BY_NAME
    from ..verdict.report import check
    from ..verdict.run import parse_switches

    if options.property and options.property not in BY_NAME:
        raise InputError(f"unknown property {options.property!r}; there are: {', '.join(BY_NAME)}")
    design = Design.load(options.design)
    report = check(
        design,
        options.platform or "snp",
        options.scenario or "to-private",
        options.backing or design.backing or "split",
        parse_switches(options.switch),
        options.limit,
        options.seconds,
        options.vcpus,
        options.gfns,
    )
    broken = next((n for n, asked in enumerate(report.asked) if asked.hits and asked.broken(True)), None)
    if options.asked and options.asked > len(report.asked):
        raise InputError(f"--asked {options.asked}: the scenario asks {len(report.asked)} things itself")
    if options.asked:
        found = [report.reach(options.asked - 1)]
    elif options.measure:
        found = [report.example(options.measure)]
    elif not options.property and not report.violated and broken is not None:
        found = [report.reach(broken)]
    elif options.count > 1:
        found = report.traces(options.property or next(iter(report.violated), "livelock"), options.count)
    else:
        found = [report.trace(options.property)]
    emit("\n\n".join(trace.code if options.code else trace.text() for trace in found))
    if not report.complete:
        complain(f"kvmlab: not complete: {report.not_checked[-1]}")
    bad = options.property in report.violated if options.property else report.bad
    return _status(bad, report.complete)


def _replay(options: argparse.Namespace) -> int:
    from ..design.files import from_stdin
    from ..errors import InputError
    from ..machine.table import machine_text
    from ..verdict.replay import replay

    trace = replay(from_stdin().decode("utf-8", "replace") if options.code == "-" else options.code)
    if options.step is not None and not 0 <= options.step < len(trace.frames):
        raise InputError(f"--step {options.step}: this run has steps 0 to {len(trace.frames) - 1}")
    emit(trace.text())
    if options.step is not None:
        emit(machine_text(trace.case.model, trace.frames[options.step].state))
    return int(bool(trace.violated))


def _lab(options: argparse.Namespace) -> int:
    from importlib.util import find_spec

    from ..errors import InputError

    root = Path(__file__).resolve().parents[2]
    if find_spec("jupyterlab") is None:
        raise InputError(f"JupyterLab is not installed here; {HOW_TO_INSTALL}")
    folder = root / "notebooks"
    where = ["--notebook-dir", str(root)] if folder.is_dir() else []
    tour = next(iter(sorted(folder.glob("00*.ipynb"))), None) if folder.is_dir() else None
    page = [f"--LabApp.default_url=/lab/tree/notebooks/{tour.name}"] if tour else []
    server = (
        root / "tests" / "workbook" / "notebook_server.py"
    )  # keeps a notebook as it was when it is only opened
    start = [str(server)] if server.is_file() else ["-m", "jupyterlab"]
    root_too = ["--allow-root"] if getattr(os, "geteuid", lambda: 1)() == 0 else []  # as in a container
    os.execv(sys.executable, [sys.executable, *start, *where, *page, *root_too, *options.arguments])


_COMMANDS = {
    "designs": _designs, "scenarios": _scenarios, "properties": _properties, "claims": _claims, "switches": _switches,
    "show": _show, "diff": _diff, "check": _check, "matrix": _matrix, "trace": _trace, "replay": _replay,
    "report": _report, "lab": _lab,
}  # fmt: skip

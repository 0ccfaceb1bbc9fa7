"""What the claims' experiments are made of: checks and emulated VMs, each noted as evidence of the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...design import Design
from ...machine.conf import Switches
from ..report import NEVER, Report, check
from ..run import changed

if TYPE_CHECKING:
    from ...emulator import Vm

PAGE = 4096
CONFIRMED, REFUTED = "confirmed", "refuted"
QUALIFIED = "qualified"  # true only under a named condition
ANSWERED = "answered"  # a question, not a statement
SOURCE = "the source says"  # only our transcription of a text shows it, no experiment
Finding = tuple[str, str]  # one of these words, and why


@dataclass
class Bench:
    """Runs checks, each once; notes the result of every one that an experiment asks for, and its case."""

    evidence: list[str] = field(default_factory=list)
    _cases: dict[str, list[str]] = field(default_factory=dict)
    _done: dict[Any, Report] = field(default_factory=dict)

    def begin(self) -> None:
        """Begin another experiment: no evidence and no cases yet; finished checks are kept."""
        self.evidence.clear()
        self._cases.clear()

    def design(self, name: str) -> Design:
        """A design that ships."""
        return Design.load(name)

    def report(
        self,
        design: str | Design,
        scenario: str = "tiny",
        platform: str = "snp",
        backing: str = "split",
        **odd: Any,
    ) -> Report:
        """The report of one case; `odd` are switches that differ from their defaults."""
        if isinstance(design, str):
            design = self.design(design)
        switches = Switches(**odd)
        key = (design.name, design.digest, platform, scenario, backing, switches)
        if key not in self._done:
            self._done[key] = check(design, platform, scenario, backing, switches)
        report = self._done[key]
        self.note(f"{report.case}: {', '.join(violated(report)) or 'all Never'} ({report.states:,} states)")
        where = " ".join([platform, backing, *(f"{n}={v}" for n, v in changed(switches).items())])
        if scenario not in self._cases.setdefault(where, []):
            self._cases[where].append(scenario)
        return report

    def verdict(self, prop: str, design: str | Design, scenario: str = "tiny", **case: Any) -> str:
        """The verdict on one property in one case."""
        return self.report(design, scenario, **case).verdicts[prop].verdict

    def fails(self, prop: str, design: str | Design, *scenarios: str, **case: Any) -> bool:
        """Whether the property is violated in each of the scenarios, in some run."""
        verdicts = [self.verdict(prop, design, scenario, **case) for scenario in scenarios]
        return NEVER not in verdicts

    def bad(self, design: str | Design, *scenarios: str, **case: Any) -> list[str]:
        """What is violated in any of the scenarios: names of properties, gravest first."""
        found = [self.report(design, scenario, **case) for scenario in scenarios]
        return [name for name in found[0].verdicts if any(name in report.violated for report in found)]

    def clean(self, design: str | Design, *scenarios: str, **case: Any) -> bool:
        """Whether nothing is violated in any of the scenarios."""
        return not self.bad(design, *scenarios, **case)

    def most(self, measure: str, design: str, scenario: str = "tiny", **case: Any) -> int | None:
        """The most that a measure reaches in a run; None if unbounded."""
        report = self.report(design, scenario, **case)
        most = report.measures[measure]["most"]
        self.note(f"{report.case}: {measure} at most {'unbounded' if most is None else most}")
        return most

    def calls(self, design: str, section: str, to: str = "private", platform: str = "snp") -> list[str]:
        """The calls of a design's section, in order, with the body of a composite one after it."""
        rows = self.design(design).rows(section, to=to, platform=platform)
        found = [call.call for row in rows for call in (row, *(row.body or ()))]
        self.note(f"{design}, {section} to {to} on {platform}: {', '.join(found)}")
        return found

    def vm(self, design: str, **kinds: Any) -> Vm:
        """One emulated VM on snp."""
        from ...emulator import Vm

        self._cases.setdefault("one run of the emulator", [])
        return Vm("snp", design=self.design(design), **kinds)

    def note(self, text: str) -> None:
        """Note a piece of evidence, once."""
        if text not in self.evidence:
            self.evidence.append(text)

    @property
    def cases(self) -> str:
        """The cases that the experiment asked for, in words: its answer holds for these alone."""
        alike: dict[str, list[str]] = {}
        for where, scenarios in self._cases.items():
            alike.setdefault(", ".join(scenarios), []).append(where)
        return "; ".join(
            f"{' and '.join(where)}: {names}" if names else where[0] for names, where in alike.items()
        )


def violated(report: Report) -> list[str]:
    """The violated properties of a report with their verdicts."""
    return [f"{v.name} {v.verdict}" for v in report.verdicts.values() if v.depth is not None]


@dataclass(frozen=True)
class Claim:
    """One statement of the thread: who made it, what it says, and the experiment that answers it."""

    id: str
    who: str
    text: str
    experiment: Callable[[Bench], Finding]

    def answer(self, bench: Bench | None = None) -> Answer:
        """Run the experiment; the reason ends with the cases that it asked for, in brackets."""
        bench = bench or Bench()
        bench.begin()
        word, why = self.experiment(bench)
        return Answer(self, word, f"{why} [{bench.cases}]" if bench.cases else why, tuple(bench.evidence))


@dataclass(frozen=True)
class Answer:
    """What an experiment says of a claim, why and in which cases, and its evidence."""

    claim: Claim
    word: str
    why: str
    evidence: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The element that `kvmlab claims --json` prints."""
        claim = {"id": self.claim.id, "who": self.claim.who, "text": self.claim.text}
        return {**claim, "answer": self.word, "why": self.why, "evidence": list(self.evidence)}


CLAIMS: dict[str, Claim] = {}


def claim(id: str, who: str, text: str) -> Callable[[Callable[[Bench], Finding]], None]:
    """Register an experiment as the answer to a claim."""

    def register(experiment: Callable[[Bench], Finding]) -> None:
        CLAIMS[id] = Claim(id, who, text, experiment)

    return register


def listed(names: Sequence[str]) -> str:
    """The names as a phrase; "nothing" if there are none."""
    *most, last = names or ["nothing"]
    return f"{', '.join(most)} and {last}" if most else last

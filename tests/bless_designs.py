"""Write what the model says today into the `expect` blocks of each shipped design.

python tests/bless_designs.py [DESIGN...]   then read the diff: every changed verdict is a finding to explain.
A planted design expects only what its own block already names, so a new one needs a first line by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

import same_model

from kvmlab.design import Design, shipped
from kvmlab.design.calls import BACKINGS
from kvmlab.errors import NotApplicable
from kvmlab.machine.scenarios import SCENARIOS
from kvmlab.verdict.run import Case

LONG_ON_TDX = ("two-vmms", "two-ranges", "hostile")  # millions of states a design: left to `kvmlab matrix`
ON_SEV = ("smm",)  # what neither snp nor tdx has
FOLDER = Path(__file__).parent.parent / "kvmlab" / "designs"


def verdicts(name: str, platform: str, scenario: str, backing: str) -> dict[str, str] | None:
    """What the model says: the violated properties with their verdicts; None where there is no such case."""
    try:
        return same_model.verdicts(Case(Design.load(name), platform, scenario, backing))
    except NotApplicable:
        return None


def cases(name: str) -> list[tuple[str, str, str]]:
    """The cases that the block of a design covers: those it names if planted, else every one on snp and tdx.

    On sev those that neither of them has.
    """
    if name in shipped("planted"):
        named = Design.load(name).expect
        return [(p, *_split(where)) for p, lines in named.items() for where in lines]
    return [
        (platform, scenario, backing)
        for platform in ("snp", "tdx", "sev")
        for backing in BACKINGS
        for scenario in SCENARIOS
        if platform == "snp" or scenario in ON_SEV or (platform == "tdx" and scenario not in LONG_ON_TDX)
    ]


def _split(where: str) -> tuple[str, str]:
    scenario, _, backing = where.partition("/")
    return scenario, backing or "split"


def block(name: str) -> str:
    """The expect blocks of a design as text."""
    lines: list[str] = []
    last = ""
    for platform, scenario, backing in cases(name):
        found = verdicts(name, platform, scenario, backing)
        if found is None:
            continue
        if platform != last:
            lines.append(f"\nexpect {platform}:")
            last = platform
        where = scenario if backing == "split" else f"{scenario}/{backing}"
        lines.append(f"    {where}: {', '.join(f'{p} {v}' for p, v in found.items()) or 'all Never'}")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    """Rewrite the files."""
    for name in names or shipped("all"):
        path = next(FOLDER.rglob(f"{name}.kvm"))
        text = path.read_text()
        head = text[: text.index("\nexpect ")] if "\nexpect " in text else text
        path.write_text(head.rstrip("\n") + "\n" + block(name))
        print(name)


if __name__ == "__main__":
    main(sys.argv[1:])

"""The protocol of `snpconv` in Promela, so that SPIN can be measured on the same state space."""

from __future__ import annotations

from collections.abc import Iterable

HEADER = """\
byte lock; bit in_progress, seq, requested, faulted;
bit attr[{P}], rmp[{P}], unmapped[{P}];  /* unmapped: from the directmap */
byte npt[{P}], tlb[{V}];               /* 0 none, 1 shared, 2 private */
#define step d_step {{ !faulted  /* after a host fault nobody moves */
"""

VCPU = """\
active proctype vcpu{i}() {{
  bit kind, snapshot;
start:
  if :: step -> kind = requested }} fi;  /* a goto may lead to an if, not to a d_step */
access:
  if
  :: step && tlb[{i}] == kind + 1 -> kind = 0 }}; goto start
  :: step && tlb[{i}] != kind + 1 }}
  fi;
  if
  :: step && npt[{p}] == kind + 1 -> tlb[{i}] = kind + 1 }}; goto access
  :: step && npt[{p}] != kind + 1 }}
  fi;
  step -> snapshot = seq }};
  if
  :: step && attr[{p}] != kind -> kind = 0; snapshot = 0 }}; goto start
  :: step && attr[{p}] == kind }}
  fi;
  step && lock == 0 -> lock = {owner} }};
  if
  :: step && {stale} -> kind = 0; snapshot = 0 }}; goto drop
  :: step && !({stale}) -> snapshot = 0 }}
  fi;
  step -> npt[{p}] = kind + 1; kind = 0 }};
drop:
  if :: step -> lock = 0 }} fi;
  goto start
}}
"""


def statement(name: str, page: int | None, V: int, P: int) -> str:
    """One step of the converter."""
    flushed = [i for i in range(V) if page is None or i % P == page]
    flush = "".join(f" tlb[{i}] = 0;" for i in flushed)
    return {
        "request": "-> requested = 1",
        "lock": "&& lock == 0 -> lock = 1",
        "unlock": "-> lock = 0",
        "begin": "-> in_progress = 1",
        "end": "-> in_progress = 0; seq = 1",
        "zap": f"-> npt[{page}] = 0",
        "flush_all": f"->{flush}".rstrip(";"),
        "store": f"-> attr[{page}] = 1",
        "unmap_directmap": f"-> unmapped[{page}] = 1",
        "rmpupdate": f"-> rmp[{page}] = 1;{flush}".rstrip(";"),
    }[name]


def converter(P: int, V: int, program: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """The thread that converts; it ends in a statement that never runs, so that its process stays."""
    steps = [statement(name, args[0] if args else None, V, P) for name, args in program]
    body = "".join(f"  step {text} }};\n" for text in steps)
    return f"active proctype converter() {{\n{body}end_stop:\n  false\n}}\n"


def host(P: int, strict: bool) -> str:
    """The host thread: picks a page, writes it; a write may take an RMP fault, after which nobody moves."""
    any_private = " || ".join(f"rmp[{p}]" for p in range(P))
    whole = "1" if strict else " && ".join(f"!unmapped[{p}]" for p in range(P))
    picks = "".join(f"  :: step && page == 0 -> page = {p + 1} }}\n" for p in range(P))
    fault = f"!unmapped[page - 1] && (rmp[page - 1] || (({whole}) && ({any_private})))"
    return f"""\
active proctype host() {{
  byte page;
end_idle:
  do
{picks}  :: step && page != 0 -> faulted = ({fault}); page = 0 }}
  od
}}
"""


def write(
    P: int,
    V: int,
    program: Iterable[tuple[str, tuple[int, ...]]],
    check_seq: bool = True,
    strict: bool = False,
) -> str:
    """The whole model, without assertions: for counting states.

    `program` is the converter's, from `snpconv.converter_steps`; `check_seq` is false for order 3.
    """
    stale = "(in_progress || snapshot != seq)" if check_seq else "false"
    vcpus = [VCPU.format(i=i, p=i % P, owner=i + 2, stale=stale) for i in range(V)]
    return "\n".join([HEADER.format(P=P, V=V), converter(P, V, program), host(P, strict), *vcpus])

"""A design as what was edited in one that ships, in few letters: for a run's code, which has to fit into a mail.

The edit is a list of numbers in digits of five bits, low ones first, the fifth bit says that more follow.  They mean
in turn: how many signs come, those signs, then how many to copy and from where, counted from the beginning of
the base's text, to which all that is written is added.  It depends on nothing but this file, so the same
design has the same code everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from . import Design, shipped
from .calls import SECTIONS
from .errors import DesignError
from .source import LIMIT

DIGITS = "abcdefghijklmnopqrstuvwxyz234567"
SIGNS = "_aeiklmnoprtuv \nbcdfghjqswxyz()=!:-.,*/0123456789"  # the first sixteen cost one digit
SHORTEST = 5  # a copy of fewer signs costs more than the signs
NEARER = 8  # lines by which another design has to be nearer than the one that was edited


def patch_of(design: Design) -> tuple[Design, str]:
    """The shipped design nearest to this one, and what makes this one of it."""
    base = _nearest(design)
    blocks = [design.spelled(name) for name in SECTIONS if design.spelled(name) != base.spelled(name)]
    if design.backing != base.backing:
        blocks.insert(0, f"backing: {design.backing}")
    if design.linux != base.linux:
        blocks.insert(0, f"linux: {design.linux}")
    name = "" if design.name == f"{base.name}*" else design.name
    return base, pack("\n".join([name, *blocks]), _text(base))


def pack(text: str, base: str) -> str:
    """A text as what makes it of another one, in digits."""
    return "".join(_digits(_pack(text, base)))


def patched(base: Design, edit: str) -> Design:
    """The design that `patch_of` has written down; DesignError if these are not its digits."""
    name, _, text = unpack(edit, _text(base)).partition("\n")
    return Design.parse(f"base: {base.name}\n{text}\n", name or f"{base.name}*")


def _nearest(design: Design) -> Design:
    """The shipped design with the fewest other lines; the one that was edited, if it is about as near."""
    own = [name for name in (design.name.rstrip("*"), design.base or "") if name in shipped("all")]
    lines = _lines(design)

    def distance(base: Design) -> int:
        other = _lines(base)
        return ((lines - other) + (other - lines)).total() + (0 if base.name in own else NEARER)

    bases = [Design.load(name) for name in dict.fromkeys((*own, *shipped()))]
    return min((base for base in bases if base.backing in (None, design.backing)), key=distance)


def _lines(design: Design) -> Counter[str]:
    """The lines without their indentation, which changes with what stands around them."""
    return Counter(line.strip() for line in _text(design).splitlines())


def _text(design: Design) -> str:
    return "\n".join(design.spelled(name) for name in SECTIONS)


def _pack(text: str, base: str) -> Iterator[int]:
    """The numbers that make `text` out of the base's."""
    at = 0
    signs: list[int] = []
    while at < len(text):
        length, where = _longest(text, at, base + text[:at])
        if length < SHORTEST:
            index = SIGNS.find(text[at])
            signs.append(index if index >= 0 else len(SIGNS) + ord(text[at]))
            at += 1
            continue
        yield from (len(signs), *signs, length, where)
        signs = []
        at += length
    if signs:
        yield from (len(signs), *signs)


def _longest(text: str, at: int, known: str) -> tuple[int, int]:
    """Length and place of the longest beginning of `text[at:]` that is known."""
    length, where = 0, 0
    while at + length < len(text) and (there := known.find(text[at : at + length + 1], where)) >= 0:
        length, where = length + 1, there
    return length, where


def unpack(edit: str, base: str) -> str:
    """The text that `pack` has made of another one; DesignError if these are not its digits."""
    known = base
    numbers = _numbers(edit)
    for count in numbers:
        for _ in range(min(count, LIMIT)):
            sign = _next(numbers)
            known += SIGNS[sign] if sign < len(SIGNS) else _char(sign - len(SIGNS))
        length = next(numbers, None)
        if length is None:
            break
        where = _next(numbers)
        if where + length > len(known) or len(known) + length > 2 * LIMIT:
            raise _unreadable()
        known += known[where : where + length]
    return known[len(base) :]


def _digits(numbers: Iterator[int]) -> Iterator[str]:
    for number in numbers:
        while number > 15:
            yield DIGITS[number & 15 | 16]
            number >>= 4
        yield DIGITS[number]


def _numbers(edit: str) -> Iterator[int]:
    number = shift = 0
    for digit in edit:
        value = DIGITS.find(digit)
        if value < 0 or shift > 28:
            raise _unreadable()
        number |= (value & 15) << shift
        shift += 4
        if value < 16:
            yield number
            number = shift = 0
    if shift:
        raise _unreadable()


def _next(numbers: Iterator[int]) -> int:
    number = next(numbers, None)
    if number is None:
        raise _unreadable()
    return number


def _char(code: int) -> str:
    try:
        return chr(code)
    except (ValueError, OverflowError):
        raise _unreadable() from None


def _unreadable() -> DesignError:
    return DesignError("what was edited in it cannot be read")

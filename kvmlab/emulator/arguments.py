"""What the calls of a Vm take: every argument is looked at here, at the public face, before anything is changed.

`@takes(name=check, ...)` stands above a public call.  What is refused is an InputError in words: which call, which
argument, what would be allowed.  What KVM or the hardware answers itself (an errno, a status) is not refused here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Any, ParamSpec, TypeVar

import numpy as np

from ..errors import InputError, shown
from .memory import HOST_PAGES, LIMIT, PAGE

P = ParamSpec("P")
R = TypeVar("R")
Check = Callable[[Any, Any], Any]  # of the object that is called and the value: the value to go on with

MOST_BYTES = 1 << 30  # that one call moves
EXTENTS = ("size", "length", "n", "data")  # how far a call reaches from its `gpa` on


class Refused(Exception):
    """A check says no; its text is what would be allowed."""


def takes(**checks: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check the arguments of a call by name; the range that begins at `gpa` may not leave the guest's addresses."""

    def decorate(call: Callable[P, R]) -> Callable[P, R]:
        parameters = signature(call).parameters
        places = [(list(parameters).index(name), name, check) for name, check in checks.items()]
        ranges = checks.get("gpa") in (ADDRESS, PAGE_ADDRESS)
        extent = next((name for name in EXTENTS if ranges and name in checks), "")

        @wraps(call)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            given: list[Any] = list(args)
            title = f"{type(given[0]).__name__}.{call.__name__}".removesuffix(".__init__")
            seen: dict[str, Any] = {}
            for at, name, check in places:
                if at < len(given) and name in kwargs:
                    raise InputError(f"{title}(): {name} is given twice; the order is {_order(parameters)}")
                try:
                    if at < len(given):
                        seen[name] = given[at] = check(given[0], given[at])
                    elif name in kwargs:
                        seen[name] = kwargs[name] = check(given[0], kwargs[name])
                except Refused as allowed:
                    value = given[at] if at < len(given) else kwargs[name]
                    raise InputError(f"{title}({name}={shown(value)}): {allowed}") from None
            if extent:
                _stays_inside(title, seen, extent, seen.get(extent, parameters[extent].default))
            return call(*given, **kwargs)

        return checked

    return decorate


def settable(owner: object, name: str, value: Any, check: Check) -> Any:
    """The value for an attribute that a script may set."""
    try:
        return check(owner, value)
    except Refused as allowed:
        raise InputError(f"{type(owner).__name__}.{name} = {shown(value)}: {allowed}") from None


def _order(parameters: Any) -> str:
    return ", ".join(
        p.name for p in parameters.values() if p.name != "self" and p.kind != Parameter.KEYWORD_ONLY
    )


def _stays_inside(title: str, seen: dict[str, Any], extent: str, reach: Any) -> None:
    size = len(reach) if isinstance(reach, bytes) else reach
    if isinstance(gpa := seen.get("gpa"), int) and isinstance(size, int) and gpa + size > LIMIT * PAGE:
        raise InputError(f"{title}(gpa={shown(gpa)}, {extent}={shown(reach)}): ends beyond 4 TiB, {_HELD}")


# The checks.


def whole(least: int, most: int, what: str, step: int = 1) -> Check:
    """A whole number (numpy's, too; True and False are none) from `least` to `most`, a multiple of `step`."""

    def check(_: Any, value: Any) -> int:
        number = _index(value, what)
        if not least <= number <= most or number % step:
            raise Refused(what)
        return number

    return check


def _index(value: Any, what: str) -> int:
    if not isinstance(value, bool | np.bool_):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise Refused(f"a whole number: {what}") from None


def one_of(*words: str | int) -> Check:
    """One of these words, or of these numbers."""
    what = f"there are: {', '.join(map(str, words))}"

    def check(_: Any, value: Any) -> str | int:
        found = _index(value, what) if isinstance(words[0], int) else value
        if not isinstance(found, str | int) or found not in words:
            raise Refused(what)
        return found

    return check


def instance(kind: type | tuple[type, ...], what: str) -> Check:
    """An object of one class, or of one of several."""

    def check(_: Any, value: Any) -> Any:
        if not isinstance(value, kind):
            raise Refused(what)
        return value

    return check


def either(*checks: Check) -> Check:
    """What one of the checks takes; the first that does decides."""

    def check(owner: Any, value: Any) -> Any:
        texts = []
        for one in checks:
            try:
                return one(owner, value)
            except Refused as refused:
                texts.append(str(refused))
        raise Refused(", or ".join(texts))

    return check


def optional(check: Check) -> Check:
    """None, or what `check` takes."""
    return either(check, instance(type(None), "None"))


def _flag(_: Any, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise Refused("True or False")
    return bool(value)


def _data(_: Any, value: Any) -> bytes:
    try:
        found = memoryview(value).tobytes()
    except (TypeError, ValueError, BufferError, NotImplementedError):
        raise Refused("bytes") from None
    if len(found) > MOST_BYTES:
        raise Refused("at most 1 GiB of bytes")
    return found


def _function(_: Any, value: Any) -> Any:
    if not callable(value):
        raise Refused("a function")
    return value


def _pfn(owner: Any, value: Any) -> int:
    last = getattr(owner, "vm", owner).next_pfn - 1
    return int(whole(0, last, f"the host has PFNs 0 to {last:#x}")(owner, value))


def _vcpu(owner: Any, value: Any) -> int:
    count = len(owner.mmu.tlbs)
    return int(whole(0, count - 1, f"there are {count} vCPUs, from 0 on")(owner, value))


def _vmpl(owner: Any, value: Any) -> int:
    last, what = (3, "a VMPL, from 0 to 3") if owner.has_rmp else (0, f"0: {owner.platform} has no VMPLs")
    return int(whole(0, last, what)(owner, value))


def _buffer(_: Any, value: Any) -> Any:
    found = isinstance(value, np.ndarray) and value.dtype == np.uint64 and value.ndim == 1
    if not found or not value.flags.writeable:
        raise Refused("a writable one-dimensional numpy array of uint64, as psc.entries() makes it")
    return value


def _slots(_: Any, value: Any) -> list[tuple[int, int]]:
    what = "a list of (gpa, size), in bytes"
    if not isinstance(value, list | tuple | np.ndarray):
        raise Refused(what)
    try:
        found = [(_index(gpa, what), _index(size, what)) for gpa, size in value]
    except (TypeError, ValueError):
        raise Refused(what) from None
    if any(size <= 0 for _, size in found) or sum(size for _, size in found) > HOST_PAGES // 2 * PAGE:
        raise Refused(f"each with a size, and together at most {GUEST_MEMORY}")
    return found


_HELD = "which is as much of a guest's addresses as the emulator holds"
GUEST_MEMORY = "256 GiB, for the emulated host has 512 GiB"
FLAG, DATA, FUNCTION, PFN, VCPU, VMPL, BUFFER, SLOTS = (
    _flag, _data, _function, _pfn, _vcpu, _vmpl, _buffer, _slots,
)  # fmt: skip
ADDRESS = whole(0, LIMIT * PAGE, f"a guest address, from 0 to 4 TiB, {_HELD}")
PAGE_ADDRESS = whole(0, LIMIT * PAGE, f"a multiple of 4096 from 0 to 4 TiB, {_HELD}", PAGE)
PAGES = whole(0, LIMIT * PAGE, "whole pages, in bytes: a multiple of 4096, from 0 to 4 TiB", PAGE)
BYTES = whole(0, MOST_BYTES, "bytes, from 0 to 1 GiB in one call")
BYTE = whole(0, 255, "a byte, from 0 to 255")
REGISTER = whole(0, (1 << 64) - 1, "what a 64-bit register holds")
NUMBER = whole(-(1 << 63), (1 << 64) - 1, "what 64 bits hold; what is wrong with it says KVM")

"""Checks of arguments, used in several modules."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import TypeVar

_K = TypeVar("_K", bound=str)
_V = TypeVar("_V")

UINT32_MAX = 2**32 - 1
"""The largest size, crop side or layer on the wire."""


def check_choice(name: str, given: object, allowed: Iterable[str | None]) -> None:
    """Raise ValueError unless `given` is one of `allowed`."""
    allowed = tuple(allowed)
    if given not in allowed:
        raise ValueError(f"{name} has {given!r}; allowed are {quoted(allowed)}")


def lookup(name: str, given: _K, values: Mapping[_K, _V]) -> _V:
    """Return `values[given]`. Raises ValueError, naming the allowed keys, if there is none."""
    check_choice(name, given, values)
    return values[given]


def check_bool(name: str, given: object) -> bool:
    """Return `given`. Raises TypeError unless it is True or False."""
    if not isinstance(given, bool):
        raise TypeError(f"{name} is {given!r}; allowed are True and False")
    return given


def check_deadline(deadline: float, name: str = "deadline") -> float:
    """Return seconds as a float. Raises TypeError or ValueError unless they are positive and finite."""
    if not isinstance(deadline, numbers.Real):
        raise TypeError(f"{name} is {deadline!r}; it must be a positive number of seconds")
    if not (deadline > 0 and math.isfinite(deadline)):
        raise ValueError(f"{name} is {deadline!r}; it must be a positive number of seconds")
    return float(deadline)  # added to the clock, numpy's float32 would lose seconds, even minutes


def check_count(name: str, given: object, least: int, what: str) -> int:
    """Return a whole number. Raises TypeError, or ValueError if it is less than `least`; `what` says what it counts."""
    try:
        number = operator.index(given)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} is {given!r}; it must be a number of {what}, at least {least}") from None
    if isinstance(given, bool) or number < least:
        raise ValueError(f"{name} is {given!r}; it must be a number of {what}, at least {least}")
    return number


def pixel_size(name: str, size: int | Iterable[int]) -> tuple[int, int]:
    """Return (height, width) for a number or a pair. Raises ValueError."""
    try:
        height, width = map(operator.index, size if isinstance(size, Iterable) else (size, size))
    except (TypeError, ValueError):
        height = width = 0
    if not (0 < height <= UINT32_MAX and 0 < width <= UINT32_MAX):
        raise ValueError(
            f"{name} is {size!r}; it must be a number of pixels from 1 to {UINT32_MAX} or a pair (height, width) "
            "of them"
        )
    return height, width


def quoted(names: Iterable[str | None]) -> str:
    """Return the names quoted, comma-separated."""
    return ", ".join(repr(name) for name in names)

"""Checks of arguments that several of the others make."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import TypeVar

_K = TypeVar("_K", bound=str)
_V = TypeVar("_V")

UINT32_MAX = 2**32 - 1
"""Of sizes, crops and layers on the wire."""


def check_choice(name: str, given: object, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if given not in allowed:
        raise ValueError(f"{name} has {given!r}; allowed are {listed(allowed)}")


def choice(name: str, given: _K, values: Mapping[_K, _V]) -> _V:
    """What `values` has for `given`."""
    check_choice(name, given, values)
    return values[given]


def check_bool(name: str, given: object) -> bool:
    if not isinstance(given, bool):
        raise TypeError(f"{name} is {given!r}; allowed are True and False")
    return given


def check_deadline(deadline: float, name: str = "deadline") -> float:
    if not isinstance(deadline, numbers.Real):
        raise TypeError(f"{name} is {deadline!r}; it must be a positive number of seconds")
    if not (deadline > 0 and math.isfinite(deadline)):
        raise ValueError(f"{name} is {deadline!r}; it must be a positive number of seconds")
    return float(deadline)  # in sums with the clock, numpy's float32 would lose seconds, and minutes


def pixel_size(name: str, size: int | Iterable[int]) -> tuple[int, int]:
    """(height, width) of a number or a pair."""
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


def listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)

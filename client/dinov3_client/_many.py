"""Helpers of both `extract_many`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

from dinov3_client._images import ImageLike


def check_in_flight(in_flight: int) -> int:
    """Return `in_flight` as an int. Raises TypeError or ValueError unless it is at least 1."""
    try:
        number = operator.index(in_flight)
    except TypeError:
        raise TypeError(f"in_flight is {in_flight!r}; it must be a number of batches") from None
    if number < 1:
        raise ValueError(f"in_flight is {number}; it must be at least 1")
    return number


def as_list(batch: ImageLike | Iterable[ImageLike]) -> ImageLike | Iterable[ImageLike]:
    """Return `batch`, as a list if it is an iterator.

    Some iterators, such as itertools.groupby's groups, are empty once the next batch was read.
    """
    return list(batch) if isinstance(batch, Iterator) else batch

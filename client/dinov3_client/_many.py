"""What both `extract_many` share."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

from dinov3_client._images import ImageLike


def check_in_flight(in_flight: int) -> int:
    try:
        number = operator.index(in_flight)
    except TypeError:
        raise TypeError(f"in_flight is {in_flight!r}; it must be a number of batches") from None
    if number < 1:
        raise ValueError(f"in_flight is {number}; it must be at least 1")
    return number


def held(batch: ImageLike | Iterable[ImageLike]) -> ImageLike | Iterable[ImageLike]:
    """`batch`, with its images taken where it is an iterator: those of some are gone once the next batch is asked for
    (itertools.groupby's)."""
    return list(batch) if isinstance(batch, Iterator) else batch

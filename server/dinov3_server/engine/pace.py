"""Learn how long a device takes from the batches that it ran. Pure: every call that needs the time is given it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

# Before the first batch: ViT-L on a CPU, about. Too slow an estimate refuses a few requests of a server that has just
# started; too fast a one admits work that ends too late.
INITIAL_SECONDS_PER_TOKEN = 1.25e-3
# Device time over which an estimate forgets: a machine that slows down is noticed within two of these, or one batch.
MEMORY_SECONDS = 1.0
# An estimate that no batch has confirmed for this long does not hold a row back from an idle device.
TRUST_SECONDS = 2.0
# After this long, the estimate of a shape gives way to the one over all shapes.
SHAPE_SECONDS = 10.0
# Shapes that are remembered, those used last.
MOST_SHAPES = 64
# The part by which a prediction is lengthened, as batches vary by it.
MARGIN = 0.1
# How strongly a fit is drawn to a line through the origin, relative to the mean square of the batch sizes.
_RIDGE = 0.05


class BatchTime(NamedTuple):
    """One batch that a device ran: `rows` images of `tokens` tokens each took it `seconds`."""

    shape: Hashable
    tokens: int
    rows: int
    seconds: float


@dataclass
class _Fit:
    """Seconds of a batch as `fixed + each * rows`: least squares over recent batches, older ones weighing less."""

    weight: float = 0.0
    rows: float = 0.0
    square: float = 0.0
    seconds: float = 0.0
    product: float = 0.0
    at: float = 0.0

    def observe(self, rows: int, seconds: float, now: float) -> None:
        keep = math.exp(-seconds / MEMORY_SECONDS)
        self.weight = self.weight * keep + 1
        self.rows = self.rows * keep + rows
        self.square = self.square * keep + rows * rows
        self.seconds = self.seconds * keep + seconds
        self.product = self.product * keep + rows * seconds
        self.at = now

    def line(self) -> tuple[float, float]:
        """(fixed, each), neither negative. Batches of one size tell no fixed part: it is 0 then."""
        rows, seconds = self.rows / self.weight, self.seconds / self.weight
        square = self.square / self.weight
        variance, covariance = square - rows * rows, self.product / self.weight - rows * seconds
        ridge = _RIDGE * square
        through_origin = seconds / rows
        each = (max(0.0, covariance) + ridge * through_origin) / (max(0.0, variance) + ridge)
        each = min(each, through_origin)
        return seconds - each * rows, each


class Pace:
    """The pace of one device: `seconds_per_token` over all its recent batches, and a fit for each shape."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._fits: OrderedDict[Hashable, _Fit] = OrderedDict()
        self.observed_at = -math.inf

    @property
    def known(self) -> bool:
        return self._tokens > 0

    @property
    def seconds_per_token(self) -> float:
        return self._seconds / self._tokens if self._tokens else INITIAL_SECONDS_PER_TOKEN

    def observe(self, batch: BatchTime, now: float) -> None:
        """Take in a batch that has just ended. `seconds` is the time in which the device worked on it alone."""
        keep = math.exp(-batch.seconds / MEMORY_SECONDS)
        self._tokens = self._tokens * keep + batch.rows * batch.tokens
        self._seconds = self._seconds * keep + batch.seconds
        self.observed_at = now
        fit = self._fits.setdefault(batch.shape, _Fit())
        self._fits.move_to_end(batch.shape)
        if len(self._fits) > MOST_SHAPES:
            self._fits.popitem(last=False)
        fit.observe(batch.rows, batch.seconds, now)

    def trusted(self, now: float) -> bool:
        """Tell whether the estimates may hold rows back: the device is known, and was busy a moment ago."""
        return self.known and now - self.observed_at <= TRUST_SECONDS

    def batch_seconds(self, shape: Hashable, tokens: int, rows: int, now: float) -> float:
        """Predict the device time of a batch of `rows` images of `tokens` tokens each, with a margin."""
        fixed, each = self._line(shape, tokens, now)
        return (fixed + each * rows) * (1 + MARGIN)

    def rows_within(self, shape: Hashable, tokens: int, seconds: float, now: float) -> int:
        """Return the largest batch that is predicted to end within `seconds`; 0 where not one row does."""
        fixed, each = self._line(shape, tokens, now)
        return max(0, math.floor((seconds / (1 + MARGIN) - fixed) / max(each, 1e-9)))

    def efficient_rows(self, shape: Hashable, tokens: int, now: float) -> int:
        """Return the batch size of which half the time is the fixed part: smaller ones waste the device."""
        fixed, each = self._line(shape, tokens, now)
        return max(1, math.ceil(fixed / max(each, 1e-9)))

    def _line(self, shape: Hashable, tokens: int, now: float) -> tuple[float, float]:
        fit = self._fits.get(shape)
        if fit is None or now - fit.at > SHAPE_SECONDS:
            return 0.0, self.seconds_per_token * tokens
        return fit.line()

"""Estimate how long batches take on a device, from the batches that it ran.

Pure: every call that needs the time is given it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

# The estimate before the first batch, about that of ViT-L on a CPU. Too slow an estimate refuses a few requests of a
# server that has just started; too fast a one admits requests that end too late.
INITIAL_SECONDS_PER_TOKEN = 1.25e-3
# Device time after which the weight of a batch has decayed to 1/e. A device that slows down is noticed within two of
# these, or one batch.
MEMORY_SECONDS = 1.0
# Age from which an estimate is too old to keep a row from an idle device, and is replaced by the next batch. If it were
# averaged with it, one slow batch would count for as long as it took, and a device with little to do would need minutes
# of short batches to be known as fast again.
TRUST_SECONDS = 2.0
# Age from which the estimate of a shape is replaced by that over all shapes.
SHAPE_SECONDS = 10.0
# How many shapes are remembered; the least recently used one goes first.
MOST_SHAPES = 64
# Predictions are longer by at least this fraction, and by ERROR_FACTOR times the mean relative error of the last
# predictions, about 1 / ERROR_WEIGHT of them. On simulated devices with steady times, with exponential noise of 40 %,
# and with a speed that changes by 2.5 every 3 s, 2.5 keeps the device time of late rows below 2 %.
MARGIN = 0.1
ERROR_FACTOR = 2.5
ERROR_WEIGHT = 0.1
# How strongly a fit is regularised towards a line through the origin, relative to the mean square of the batch sizes.
_RIDGE = 0.05


class BatchTime(NamedTuple):
    """The device time of a batch of `rows` images with `tokens` tokens each."""

    shape: Hashable
    tokens: int
    rows: int
    seconds: float


def _kept(seconds: float, observed_at: float, now: float) -> float:
    """Return the fraction of its weight that an estimate of `observed_at` keeps after a batch of `seconds`."""
    return math.exp(-seconds / MEMORY_SECONDS) if now - seconds - observed_at <= TRUST_SECONDS else 0.0


@dataclass
class _Fit:
    """A least-squares fit of the time of a batch, `fixed + each * rows` seconds; the weight of older batches decays."""

    weight: float = 0.0
    rows: float = 0.0
    square: float = 0.0
    seconds: float = 0.0
    product: float = 0.0
    at: float = -math.inf

    def observe(self, rows: int, seconds: float, now: float) -> None:
        keep = _kept(seconds, self.at, now)
        self.weight = self.weight * keep + 1
        self.rows = self.rows * keep + rows
        self.square = self.square * keep + rows * rows
        self.seconds = self.seconds * keep + seconds
        self.product = self.product * keep + rows * seconds
        self.at = now

    def line(self) -> tuple[float, float]:
        """Return (fixed, each), neither negative. With batches of a single size, `fixed` is 0."""
        rows, seconds = self.rows / self.weight, self.seconds / self.weight
        square = self.square / self.weight
        variance, covariance = square - rows * rows, self.product / self.weight - rows * seconds
        ridge = _RIDGE * square
        through_origin = seconds / rows
        each = (max(0.0, covariance) + ridge * through_origin) / (max(0.0, variance) + ridge)
        each = min(each, through_origin)
        return seconds - each * rows, each


class Pace:
    """The speed of one device: `seconds_per_token` over all its recent batches, and a fit for each shape."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._error = 0.0  # mean relative error of the last predictions
        self._fits: OrderedDict[Hashable, _Fit] = OrderedDict()
        self.observed_at = -math.inf

    @property
    def known(self) -> bool:
        return self._tokens > 0

    @property
    def seconds_per_token(self) -> float:
        return self._seconds / self._tokens if self._tokens else INITIAL_SECONDS_PER_TOKEN

    @property
    def margin(self) -> float:
        """The fraction by which predictions are longer than the estimates."""
        return max(MARGIN, ERROR_FACTOR * self._error)

    def observe(self, batch: BatchTime, now: float) -> None:
        """Learn from a batch that has just ended. Its `seconds` are those that the device worked on it alone."""
        if self.trusted(now - batch.seconds):
            fixed, each = self._line(batch.shape, batch.tokens, now)
            error = abs(batch.seconds / (fixed + each * batch.rows) - 1)
            self._error += ERROR_WEIGHT * (error - self._error)
        keep = _kept(batch.seconds, self.observed_at, now)
        self._tokens = self._tokens * keep + batch.rows * batch.tokens
        self._seconds = self._seconds * keep + batch.seconds
        self.observed_at = now
        fit = self._fits.setdefault(batch.shape, _Fit())
        self._fits.move_to_end(batch.shape)
        if len(self._fits) > MOST_SHAPES:
            self._fits.popitem(last=False)
        fit.observe(batch.rows, batch.seconds, now)

    def trusted(self, now: float) -> bool:
        """Return whether the estimates are recent enough to keep rows from the device."""
        return self.known and now - self.observed_at <= TRUST_SECONDS

    def tokens_left(self, running: int, since: float, now: float) -> int:
        """Return how many of the `running` tokens the device has left, if it has computed them since `since`."""
        return max(0, running - int((now - since) / self.seconds_per_token))

    def batch_seconds(self, shape: Hashable, tokens: int, rows: int, now: float) -> float:
        """Return the predicted device time of a batch of `rows` images of `tokens` tokens each, with a margin."""
        fixed, each = self._line(shape, tokens, now)
        return (fixed + each * rows) * (1 + self.margin)

    def rows_within(self, shape: Hashable, tokens: int, seconds: float, now: float) -> int:
        """Return the rows of the largest batch that is predicted to end within `seconds`; 0 if not even one row."""
        fixed, each = self._line(shape, tokens, now)
        return max(0, math.floor((seconds / (1 + self.margin) - fixed) / max(each, 1e-9)))

    def efficient_rows(self, shape: Hashable, tokens: int, now: float) -> int:
        """Return the batch size that spends half its time on the fixed part; smaller batches waste the device."""
        fixed, each = self._line(shape, tokens, now)
        return max(1, math.ceil(fixed / max(each, 1e-9)))

    def _line(self, shape: Hashable, tokens: int, now: float) -> tuple[float, float]:
        """Return (fixed, each) of a shape."""
        fit = self._fits.get(shape)
        if fit is None or now - fit.at > SHAPE_SECONDS:
            return 0.0, self.seconds_per_token * tokens
        return fit.line()

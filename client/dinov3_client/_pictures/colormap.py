"""A color map, and tick values for its legend."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

# Every 17th of the 256 colors of matplotlib's "magma" (Nathaniel J. Smith and Stefan van der Walt, CC0): it is
# perceptually uniform, also in gray and to the color-blind. Interpolated linearly, it is within 3 levels of theirs.
_COLORS = (
    "000004 0b0924 20114b 3b0f70 57157e 721f81 8c2981 a8327d c43c75 de4968 f1605d fa7f5e fe9f6d febf84 fddea0 fcfdbf"
)
_TABLE = np.array([list(bytes.fromhex(color)) for color in _COLORS.split()], np.float64)


def magma(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Map values [...] in 0..1 to RGB [..., 3], dark to bright."""
    places = np.linspace(0, 1, len(_TABLE))
    channels = [np.interp(values, places, channel) for channel in _TABLE.T]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


def ticks(low: float, high: float) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten that enclose low..high: at most 11, or 7 with decimals."""
    assert low < high, "a range"
    exponent = math.floor(math.log10(high - low)) - 1
    while True:
        for step in (1.0, 2.0, 5.0):
            step *= 10.0**exponent
            # With a tolerance: 0.3 / 0.1 is less than 3.
            first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
            if last - first < (11 if step >= 0.1 else 7):
                return [round(index * step, max(0, -exponent)) for index in range(first, last + 1)]
        exponent += 1

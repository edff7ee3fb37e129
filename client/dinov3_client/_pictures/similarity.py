"""Points in pictures, their patches, and cosine similarities."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinov3_client._dtypes import Array

_PIXELS = re.compile(r"-?\d+")
_FRACTION = re.compile(r"-?(\d+\.\d*|\.\d+)")


@dataclass(frozen=True)
class Point:
    """A point in a picture, in pixels from its upper left corner or in fractions of width and height."""

    x: float
    y: float
    fractions: bool

    def within(self, width: int, height: int) -> tuple[float, float]:
        """Return (x, y) as fractions; of a pixel, its middle. Raises ValueError if the point lies outside."""
        if self.fractions:
            if not (0 <= self.x <= 1 and 0 <= self.y <= 1):
                raise ValueError("fractions are 0.0 to 1.0 (pixels are whole numbers)")
            return self.x, self.y
        if not (0 <= self.x < width and 0 <= self.y < height):
            raise ValueError(f"of {width} x {height} pixels, X is 0 to {width - 1} and Y is 0 to {height - 1}")
        return (self.x + 0.5) / width, (self.y + 0.5) / height


def read_point(text: str) -> Point:
    """Parse "320,200" (pixels) or "0.5,0.3" (fractions). Raises ValueError."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 2:
        for pattern in (_PIXELS, _FRACTION):
            if all(map(pattern.fullmatch, parts)):
                return Point(float(parts[0]), float(parts[1]), pattern is _FRACTION)
    raise ValueError(f"{text!r} is not a point, such as 320,200 (pixels) or 0.5,0.3 (fractions of width and height)")


def patch_at(place: tuple[float, float], grid: tuple[int, int]) -> tuple[int, int]:
    """Return row and column, in a grid (rows, columns), of the patch at `place`, fractions (x, y) of the picture."""
    x, y = place
    rows, columns = grid
    return min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)


def cosines(token: Array, tokens: Array) -> NDArray[np.float64]:
    """Return the cosines [T] of `token` [D] with each of `tokens` [T, D]; 0 if one of the two is zero."""
    one, all_ = np.asarray(token, np.float64), np.asarray(tokens, np.float64)
    lengths = np.linalg.norm(one) * np.linalg.norm(all_, axis=1)
    products: NDArray[np.float64] = all_ @ one
    found = np.zeros_like(products)
    np.divide(products, lengths, out=found, where=lengths > 0)
    return found

"""The reference images on which features are compared: defined by a formula, the same bytes on every machine.

With integers only (`//` rounds down), the pixel of image k (0, 1, ...) of H x W at row y, column x, channel c is

    shade + board + grain, where

    shade = 5 wave // 8, with wave = 255 - |510 m // period - 255|, period = 181 + 50 k,
            m = (2 x + y + 60 c + k x y // 64) mod period; inside the disc (2 y - H)^2 + (3 x - W)^2 < (H // 2)^2
            wave is 255 minus that
    board = 48 ((x // 20 + y // 28) mod 2)
    grain = ((7919 x + 104729 y + 1299709 c + 15485863 k)^2 // 1024) mod 32

so there are smooth shades in three phases, long and short edges, and texture. Sizes are multiples of 32, which every
variant accepts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Increment when an image changes: it invalidates stored results.
VERSION = 1
SIZES = ((224, 224), (256, 384), (128, 320))


def reference_images() -> list[NDArray[np.uint8]]:
    """Return one [H, W, 3] RGB image of each of `SIZES`."""
    return [_image(k, height, width) for k, (height, width) in enumerate(SIZES)]


def _image(k: int, height: int, width: int) -> NDArray[np.uint8]:
    y = np.arange(height, dtype=np.int64)[:, None, None]
    x = np.arange(width, dtype=np.int64)[None, :, None]
    c = np.arange(3, dtype=np.int64)[None, None, :]
    period = 181 + 50 * k
    wave = 255 - abs(510 * ((2 * x + y + 60 * c + k * x * y // 64) % period) // period - 255)
    inside = (2 * y - height) ** 2 + (3 * x - width) ** 2 < (height // 2) ** 2
    shade = 5 * np.where(inside, 255 - wave, wave) // 8
    board = 48 * ((x // 20 + y // 28) % 2)
    grain = (7919 * x + 104729 * y + 1299709 * c + 15485863 * k) ** 2 // 1024 % 32
    return np.asarray(shade + board + grain, dtype=np.uint8)

"""What one answer of the server holds. R rows, T tokens, D channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dinov3_client._dtypes import Array
from dinov3_client._errors import StatusError
from dinov3_client._request import TokenKind

Key = tuple[int | None, TokenKind]
"""A layer as asked for (None: the last one, after the final norm) and a kind of token."""


@dataclass(frozen=True)
class Timings:
    """Where the time of a call went on the server, in seconds of wall clock."""

    decode_seconds: float
    """Decoding and resizing all of its images."""
    queue_seconds: float
    """Longest wait of one of its images for the device."""
    inference_seconds: float
    """Sum over its batches, from the first copy in to the last copy out."""
    batch_images: int
    """Images in the largest batch that held one of its own, of whichever request."""
    batches: int
    """Batches that its images were spread over."""


class Tokens(NamedTuple):
    """One kind of token of some rows, as it travelled."""

    values: Array
    """[R, D], [R, T, D] or, channels first, [R, D, rows, columns]."""
    scales: Array | None
    """Of int8: float32 [R], or [R, T]; value = int8 * scale."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.values.shape[1:]

    def broadcast_scales(self) -> Array:
        """`scales`, to be multiplied with `values`."""
        assert self.scales is not None
        if self.values.ndim == 4:
            return self.scales.reshape(len(self.values), 1, *self.values.shape[2:])
        return self.scales.reshape(*self.scales.shape, 1)

    def read(self) -> Array:
        """The features; a view of what came in unless it was int8."""
        return self.values if self.scales is None else np.multiply(self.values, self.broadcast_scales())


@dataclass(frozen=True)
class Block:
    """Rows of one input size."""

    input_size: tuple[int, int]
    grids: Mapping[int | None, tuple[int, int]]
    """Rows and columns of patches as they came, of each layer as asked for and of the last (None)."""
    rows: Array
    """[R] int64, ascending: the number of each row, within its answer or (joined) within the call."""
    tensors: Mapping[Key, Tokens]


@dataclass(frozen=True)
class Answer:
    """The answer to one Query."""

    blocks: tuple[Block, ...]
    errors: Mapping[int, StatusError]
    """By the index of the image within the call."""
    timings: Timings
    frontend: int
    fingerprint: str
    nbytes: int
    """Of the message."""

"""The contents of one ExtractResponse as numpy arrays. R rows, T tokens, D channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dinov3_client._dtypes import Array
from dinov3_client._errors import StatusError
from dinov3_serving.features import TokenKind

TensorKey = tuple[int | None, TokenKind]
"""A layer number as requested (None: the last layer, after the final norm) and a token kind."""


@dataclass(frozen=True)
class Timings:
    """The time that a call spent on the server, in seconds of wall clock."""

    decode_seconds: float
    """Decoding and resizing all of its images."""
    queue_seconds: float
    """The longest wait of one of its images for the device."""
    inference_seconds: float
    """Sum over its batches, each from the first copy to the device to the last copy from it."""
    batch_images: int
    """Images in the largest of its batches, those of other requests included."""
    batches: int
    """Number of batches that its images were spread over."""


class TokenArray(NamedTuple):
    """The tokens of one kind of some rows, as received: arrays of numpy or tensors of torch."""

    values: Any
    """[R, D], [R, T, D] or, channels first, [R, D, rows, columns]."""
    scales: Any
    """Of int8 values: float32 [R] or [R, T]; feature = value * scale. None of other dtypes."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

    def read(self) -> Any:
        """Return the features: `values` itself, or int8 values times their scales as float32."""
        if self.scales is None:
            return self.values
        if self.values.ndim == 4:
            return self.values * self.scales.reshape(len(self.values), 1, *self.values.shape[2:])
        return self.values * self.scales[..., None]


@dataclass(frozen=True)
class Block:
    """The rows of one input size."""

    input_size: tuple[int, int]
    grids: Mapping[int | None, tuple[int, int]]
    """(rows, columns) of the received patches by requested layer; None is the last layer."""
    rows: Array
    """[R] int64, ascending: the number of each row within its answer or, once joined, within the call."""
    tensors: Mapping[TensorKey, TokenArray]


@dataclass(frozen=True)
class Answer:
    """The answer to one PreparedRequest."""

    blocks: tuple[Block, ...]
    errors: Mapping[int, StatusError]
    """By index of the image within the call."""
    timings: Timings
    frontend: int
    fingerprint: str
    nbytes: int
    """Size of the message in bytes."""

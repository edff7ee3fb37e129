"""Lay out the images of one request in an arena, for the frontend and the worker alike.

A block is R images of one shape: first their pixels, packed [R, ...], then each of their output buffers
(`ModelInfo.output_buffers`), packed [R, ...]. All are aligned to cache lines. Offsets are in bytes from the start of
the arena.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from dinov3_server.models.interface import FeatureSpec, ModelInfo, PixelShape

ALIGNMENT = 64


def aligned(nbytes: int) -> int:
    """Round up to a multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Block:
    """R images of one shape in an arena, R being `count`.

    Row r's pixels begin at `pixel_offset + r * shape.nbytes`. Its output buffer i begins at
    `output_offsets[i] + r * strides[i]` and is `strides[i]` bytes long. The block ends at `end`.
    """

    shape: PixelShape
    count: int
    spec: FeatureSpec
    pixel_offset: int
    output_offsets: tuple[int, ...]
    strides: tuple[int, ...]
    end: int

    @classmethod
    def plan(cls, model: ModelInfo, shape: PixelShape, count: int, spec: FeatureSpec, base: int = 0) -> Block:
        """Return a block that begins at `base`; it takes `plan(...).end - base` bytes."""
        block = _planned(model, shape, count, spec)
        return block.moved(base) if base else block

    def moved(self, nbytes: int) -> Block:
        """Return the same block `nbytes` further on."""
        offsets = tuple(start + nbytes for start in self.output_offsets)
        end = self.end + nbytes
        return Block(self.shape, self.count, self.spec, self.pixel_offset + nbytes, offsets, self.strides, end)

    def __reduce__(self) -> tuple[Callable[..., Block], tuple[object, ...]]:
        """Take the block apart for pickle.

        Shapes and specs are nests of small objects, which take most of the time, and there are few: their pickles are
        cached.
        """
        packed = _packed(self.shape, self.spec)
        return unpickled, (packed, self.count, self.pixel_offset, self.output_offsets, self.strides, self.end)

    def row_pixel_offset(self, row: int) -> int:
        """Return where the pixels of a row begin."""
        return self.pixel_offset + row * self.shape.nbytes

    def row_output_offsets(self, row: int) -> tuple[int, ...]:
        """Return where each output buffer of a row begins."""
        return tuple(start + row * stride for start, stride in zip(self.output_offsets, self.strides, strict=True))

    def zero_features(self, memory: memoryview, row: int) -> None:
        """Overwrite the features of a row with zeros. `memory` is the whole arena."""
        for start, nbytes in zip(self.row_output_offsets(row), self.strides, strict=True):
            memory[start : start + nbytes] = bytes(nbytes)


@lru_cache(maxsize=1024)
def _planned(model: ModelInfo, shape: PixelShape, count: int, spec: FeatureSpec) -> Block:
    """Return the block that begins at 0."""
    cursor = aligned(count * shape.nbytes)
    strides = tuple(buffer.nbytes for buffer in model.output_buffers(spec, shape))
    offsets = []
    for stride in strides:
        offsets.append(cursor)
        cursor += aligned(count * stride)
    return Block(shape, count, spec, 0, tuple(offsets), strides, cursor)


@lru_cache(maxsize=1024)
def _packed(shape: PixelShape, spec: FeatureSpec) -> bytes:
    return pickle.dumps((shape, spec), pickle.HIGHEST_PROTOCOL)


@lru_cache(maxsize=1024)
def _unpacked(packed: bytes) -> tuple[PixelShape, FeatureSpec]:
    shape, spec = pickle.loads(packed)
    return shape, spec


def unpickled(
    packed: bytes, count: int, pixel_offset: int, output_offsets: tuple[int, ...], strides: tuple[int, ...], end: int
) -> Block:
    """Return the block that `Block.__reduce__` took apart."""
    shape, spec = _unpacked(packed)
    return Block(shape, count, spec, pixel_offset, output_offsets, strides, end)

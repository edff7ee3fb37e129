"""How the images of one request lie in an arena: the plan that frontend and worker share.

A block is R images of one shape: first their pixels, packed [R, ...], then each output buffer
(`ModelInfo.output_buffers`), packed [R, ...] too. All start on cache lines. Every offset counts from the start of the
arena.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from dinov3_server.models.interface import FeatureSpec, ModelInfo, PixelShape

ALIGNMENT = 64


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Block:
    """R images of one shape in an arena.

    Row r's pixels lie at `pixels + r * shape.nbytes`; its part of section i at
    `sections[i] + r * strides[i]`, `strides[i]` bytes long. The block ends at `end`.
    """

    shape: PixelShape
    count: int
    spec: FeatureSpec
    pixels: int
    sections: tuple[int, ...]
    strides: tuple[int, ...]
    end: int

    @classmethod
    def plan(cls, model: ModelInfo, shape: PixelShape, count: int, spec: FeatureSpec, base: int = 0) -> Block:
        """Lay out a block at `base`; `plan(...).end - base` is what it takes, so plan at 0 to size it."""
        block = _planned(model, shape, count, spec)
        return block.moved(base) if base else block

    def moved(self, nbytes: int) -> Block:
        """Return the same block `nbytes` further on."""
        sections = tuple(start + nbytes for start in self.sections)
        return Block(self.shape, self.count, self.spec, self.pixels + nbytes, sections, self.strides, self.end + nbytes)

    def __reduce__(self) -> tuple[Callable[..., Block], tuple[object, ...]]:
        """For pickle. Shapes and specs are few, and take longest, as nests of small objects: their pickles are kept."""
        packed = _packed(self.shape, self.spec)
        return unpickled, (packed, self.count, self.pixels, self.sections, self.strides, self.end)

    def row_pixels(self, row: int) -> int:
        return self.pixels + row * self.shape.nbytes

    def row_sections(self, row: int) -> tuple[int, ...]:
        return tuple(start + row * stride for start, stride in zip(self.sections, self.strides, strict=True))


@lru_cache(maxsize=1024)
def _planned(model: ModelInfo, shape: PixelShape, count: int, spec: FeatureSpec) -> Block:
    cursor = aligned(count * shape.nbytes)
    strides = tuple(buffer.nbytes for buffer in model.output_buffers(spec, shape))
    sections = []
    for stride in strides:
        sections.append(cursor)
        cursor += aligned(count * stride)
    return Block(shape, count, spec, 0, tuple(sections), strides, cursor)


@lru_cache(maxsize=1024)
def _packed(shape: PixelShape, spec: FeatureSpec) -> bytes:
    return pickle.dumps((shape, spec), pickle.HIGHEST_PROTOCOL)


@lru_cache(maxsize=1024)
def _unpacked(packed: bytes) -> tuple[PixelShape, FeatureSpec]:
    shape, spec = pickle.loads(packed)
    return shape, spec


def unpickled(
    packed: bytes, count: int, pixels: int, sections: tuple[int, ...], strides: tuple[int, ...], end: int
) -> Block:
    """Return the block that `Block.__reduce__` took apart."""
    shape, spec = _unpacked(packed)
    return Block(shape, count, spec, pixels, sections, strides, end)

"""How the images of one request lie in an arena: the plan that frontend and worker share.

A block is R images of one shape: first their pixels, packed [R, ...], then each output, packed
[R, tokens, D]. Sections start on cache lines. Every offset counts from the start of the arena.
"""

from __future__ import annotations

from dataclasses import dataclass

from dinov3_server.backbone.interface import FeatureSpec, ModelInfo, PixelShape

ALIGNMENT = 64


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Block:
    """R images of one shape in an arena.

    Row r's pixels lie at `pixels + r * shape.nbytes`; its part of output i at
    `outputs[i] + r * strides[i]`, `strides[i]` bytes long. The block ends at `end`.
    """

    shape: PixelShape
    count: int
    spec: FeatureSpec
    pixels: int
    outputs: tuple[int, ...]
    strides: tuple[int, ...]
    end: int

    @classmethod
    def plan(cls, model: ModelInfo, shape: PixelShape, count: int, spec: FeatureSpec, base: int = 0) -> Block:
        """Lay out a block at `base`; `plan(...).end - base` is what it takes, so plan at 0 to size it."""
        cursor = base + aligned(count * shape.nbytes)
        strides = tuple(model.output_nbytes(output, spec.dtype, shape) for output in spec.outputs)
        outputs = []
        for stride in strides:
            outputs.append(cursor)
            cursor += aligned(count * stride)
        return cls(shape, count, spec, base, tuple(outputs), strides, cursor)

    def __reduce__(self) -> tuple[type[Block], tuple[object, ...]]:
        """For pickle, as the order of the fields: what it does by itself with slots takes twice as long."""
        return Block, (self.shape, self.count, self.spec, self.pixels, self.outputs, self.strides, self.end)

    def row_pixels(self, row: int) -> int:
        return self.pixels + row * self.shape.nbytes

    def row_outputs(self, row: int) -> tuple[int, ...]:
        return tuple(start + row * stride for start, stride in zip(self.outputs, self.strides, strict=True))

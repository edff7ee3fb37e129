"""How the images of one request lie in an arena: the plan that frontend and worker share.

A block is R images of one shape: first their pixels, packed [R, ...], then each section of what is wanted of them
(`ModelInfo.sections`), packed [R, ...] too. All start on cache lines. Every offset counts from the start of the arena.
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
        cursor = base + aligned(count * shape.nbytes)
        strides = tuple(section.nbytes for section in model.sections(spec, shape))
        sections = []
        for stride in strides:
            sections.append(cursor)
            cursor += aligned(count * stride)
        return cls(shape, count, spec, base, tuple(sections), strides, cursor)

    def __reduce__(self) -> tuple[type[Block], tuple[object, ...]]:
        """For pickle, as the order of the fields: what it does by itself with slots takes twice as long."""
        return Block, (self.shape, self.count, self.spec, self.pixels, self.sections, self.strides, self.end)

    def row_pixels(self, row: int) -> int:
        return self.pixels + row * self.shape.nbytes

    def row_sections(self, row: int) -> tuple[int, ...]:
        return tuple(start + row * stride for start, stride in zip(self.sections, self.strides, strict=True))

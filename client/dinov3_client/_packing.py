"""The rows of a call, read over all of them or one by one. N rows: one an image, or one a view."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dinov3_client._answer import Block, Key, Tokens
from dinov3_client._dtypes import Array
from dinov3_client._errors import MixedSizes
from dinov3_client._request import TokenKind


class Packing:
    """Blocks of one call and the places of their rows in it. Knows no Features, so that no cycle keeps arrays."""

    def __init__(
        self,
        images: Array,
        views: Array,
        blocks: Iterable[Block],
        shapes: Mapping[Key, tuple[int, ...]],
        quantized: bool,
        dtype: np.dtype[Any],
    ) -> None:
        self.images = images
        """[N] int64: the image of each row."""
        self.views = views
        """[N] int64: the view, within its image, of each row."""
        self.blocks = tuple(blocks)
        self.shapes = shapes
        """What was asked for, with the shape of one row that failed while the others tell none."""
        self.quantized = quantized
        """They travelled as int8."""
        self.dtype = dtype
        """Of the arrays as they are read."""

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def sizes(self) -> dict[tuple[int, int], list[Block]]:
        """By input size, in order of first use."""
        sizes: dict[tuple[int, int], list[Block]] = {}
        for block in self.blocks:
            sizes.setdefault(block.input_size, []).append(block)
        return sizes

    @cached_property
    def _places(self) -> dict[int, tuple[Block, int]]:
        return {int(row): (block, place) for block in self.blocks for place, row in enumerate(block.rows)}

    def pack(self, layer: int | None, kind: TokenKind) -> Array | None:
        """Of all rows. CLS and registers have one shape whatever the input size; patches only where pooled."""
        key: Key = (layer, kind)
        if key not in self.shapes:
            return None
        blocks = self._alike(key)
        return self._joined(
            blocks, key, lambda tokens: tokens.read(), (len(self), *self._row_shape(blocks, key)), self.dtype
        )

    def pack_quantized(self, layer: int | None, kind: TokenKind) -> tuple[Array, Array] | None:
        """Values and scales of all rows, of int8 features."""
        key: Key = (layer, kind)
        if key not in self.shapes:
            return None
        blocks = self._alike(key)
        shape = self._row_shape(blocks, key)
        tokens = [] if kind == "cls" else [int(np.prod(shape[1:])) if len(shape) == 3 else shape[0]]
        return (
            self._joined(blocks, key, lambda tokens: tokens.values, (len(self), *shape), np.dtype(np.int8)),
            self._joined(blocks, key, _scales, (len(self), *tokens), np.dtype(np.float32)),
        )

    def row(self, row: int, layer: int | None, kind: TokenKind) -> Array | None:
        """Of one row."""
        key: Key = (layer, kind)
        if key not in self.shapes:
            return None
        if row in self._places:
            block, place = self._places[row]
            values, scales = block.tensors[key]
            here = slice(place, place + 1)
            found: Array = Tokens(values[here], None if scales is None else scales[here]).read()[0]
            return found
        others = self.block(row)
        return np.zeros(self.shapes[key] if others is None else others.tensors[key].row_shape, self.dtype)

    def grid(self, layer: int | None) -> tuple[int, int]:
        """Of each row; (0, 0) where all failed."""
        grids = {block.grids[layer] for block in self.blocks}
        if len(grids) > 1:
            raise mixed_sizes("grid", self.sizes)
        return grids.pop() if grids else (0, 0)

    def row_grid(self, row: int, layer: int | None) -> tuple[int, int]:
        """Of one row; (0, 0) where it failed before its size was known."""
        block = self.block(row)
        return block.grids[layer] if block else (0, 0)

    def input_size(self) -> tuple[int, int]:
        """Of each row; (0, 0) where all failed."""
        if len(self.sizes) > 1:
            raise mixed_sizes("input_size", self.sizes)
        return next(iter(self.sizes), (0, 0))

    def block(self, row: int) -> Block | None:
        """Whose sizes a row has. One that failed and is in no block takes the others', where they have one size."""
        if row in self._places:
            return self._places[row][0]
        return self.blocks[0] if len(self.sizes) == 1 else None

    def at_size(self, size: tuple[int, int]) -> Packing:
        """The rows of one input size, in the order of the call."""
        if size not in self.sizes:
            raise no_such_size(size, self.sizes)
        blocks = self.sizes[size]
        rows = np.sort(np.concatenate([block.rows for block in blocks]))
        placed = [
            Block(block.input_size, block.grids, np.searchsorted(rows, block.rows), block.tensors) for block in blocks
        ]
        return Packing(self.images[rows], self.views[rows], placed, self.shapes, self.quantized, self.dtype)

    def _alike(self, key: Key) -> tuple[Block, ...]:
        """All blocks, if one row of each has the same shape."""
        layer, kind = key
        if kind == "patches" and len({block.grids[layer] for block in self.blocks}) > 1:
            raise mixed_sizes("patches", self.sizes)
        return self.blocks

    def _row_shape(self, blocks: Sequence[Block], key: Key) -> tuple[int, ...]:
        return blocks[0].tensors[key].row_shape if blocks else self.shapes[key]

    def _joined(
        self,
        blocks: Sequence[Block],
        key: Key,
        read: Callable[[Tokens], Array],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> Array:
        """What `read` gives of all rows; itself where they are one block."""
        if len(blocks) == 1 and len(blocks[0].rows) == len(self):
            return read(blocks[0].tensors[key])
        joined = np.zeros(shape, dtype)
        for block in blocks:
            joined[places(block.rows)] = read(block.tensors[key])
        return joined


def mixed_sizes(what: str, sizes: Collection[tuple[int, int]]) -> MixedSizes:
    return MixedSizes(
        f"the rows came out in {len(sizes)} input sizes ({named(sizes)}), so that there is no one {what} for all; "
        f"use features.at_size(SIZE).{what} of each size or features[i].{what} of each row, or give one size"
    )


def no_such_size(size: tuple[int, int], sizes: Collection[tuple[int, int]]) -> ValueError:
    return ValueError(f"no features have the input size {named([size])}; there are {named(sizes) or 'none'}")


def places(rows: Array) -> Array | slice:
    """`rows`, ascending, as an index: a slice, which copies faster, where they are neighbours."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _scales(tokens: Tokens) -> Array:
    assert tokens.scales is not None
    return tokens.scales


def named(sizes: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in sizes)

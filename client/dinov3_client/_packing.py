"""Packed arrays over all rows of a call, and arrays of single rows. N rows: one per image or view."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dinov3_client._answer import Block, TensorKey, Tokens
from dinov3_client._dtypes import Array
from dinov3_client._errors import MixedSizes
from dinov3_serving.features import TokenKind


class Packing:
    """The blocks of a call and where their rows belong. Does not refer to Features: a cycle would keep arrays alive."""

    def __init__(
        self,
        images: Array,
        views: Array,
        blocks: Iterable[Block],
        shapes: Mapping[TensorKey, tuple[int, ...]],
        quantized: bool,
        dtype: np.dtype[Any],
    ) -> None:
        self.images = images
        """[N] int64: the index of each row's image."""
        self.views = views
        """[N] int64: the index of each row's view within its image."""
        self.blocks = tuple(blocks)
        self.shapes = shapes
        """The requested tensors, each with the shape of a failed row, for use if no block has one."""
        self.quantized = quantized
        """Whether they were sent as int8."""
        self.dtype = dtype
        """Of the arrays as read."""

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def sizes(self) -> dict[tuple[int, int], list[Block]]:
        """The blocks of each input size, in order of first use."""
        sizes: dict[tuple[int, int], list[Block]] = {}
        for block in self.blocks:
            sizes.setdefault(block.input_size, []).append(block)
        return sizes

    @cached_property
    def _places(self) -> dict[int, tuple[Block, int]]:
        return {int(row): (block, place) for block in self.blocks for place, row in enumerate(block.rows)}

    def pack(self, layer: int | None, kind: TokenKind) -> Array | None:
        """Return one array of all rows; None if it was not requested.

        CLS and registers have one shape whatever the input size; patches of several sizes only if pooled.
        """
        key: TensorKey = (layer, kind)
        if key not in self.shapes:
            return None
        blocks = self._alike(key)
        return self._joined(
            blocks, key, lambda tokens: tokens.read(), (len(self), *self._row_shape(blocks, key)), self.dtype
        )

    def pack_quantized(self, layer: int | None, kind: TokenKind) -> tuple[Array, Array] | None:
        """Return values and scales of all rows of int8 features; None if they were not requested."""
        key: TensorKey = (layer, kind)
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
        """Return the array of one row; None if it was not requested."""
        key: TensorKey = (layer, kind)
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
        """Return the grid of all rows; (0, 0) if all failed. Raises MixedSizes."""
        grids = {block.grids[layer] for block in self.blocks}
        if len(grids) > 1:
            raise mixed_sizes("grid", self.sizes)
        return grids.pop() if grids else (0, 0)

    def row_grid(self, row: int, layer: int | None) -> tuple[int, int]:
        """Return the grid of one row; (0, 0) if it failed before its size was known."""
        block = self.block(row)
        return block.grids[layer] if block else (0, 0)

    def input_size(self) -> tuple[int, int]:
        """Return the input size of all rows; (0, 0) if all failed. Raises MixedSizes."""
        if len(self.sizes) > 1:
            raise mixed_sizes("input_size", self.sizes)
        return next(iter(self.sizes), (0, 0))

    def block(self, row: int) -> Block | None:
        """Return the block with the sizes of a row. A failed row has those of the others, if these agree."""
        if row in self._places:
            return self._places[row][0]
        return self.blocks[0] if len(self.sizes) == 1 else None

    def at_size(self, size: tuple[int, int]) -> Packing:
        """Return the rows of one input size, in the order of the call. Raises ValueError if there are none."""
        if size not in self.sizes:
            raise no_such_size(size, self.sizes)
        blocks = self.sizes[size]
        rows = np.sort(np.concatenate([block.rows for block in blocks]))
        placed = [
            Block(block.input_size, block.grids, np.searchsorted(rows, block.rows), block.tensors) for block in blocks
        ]
        return Packing(self.images[rows], self.views[rows], placed, self.shapes, self.quantized, self.dtype)

    def _alike(self, key: TensorKey) -> tuple[Block, ...]:
        """Return all blocks if their rows have the same shape; else raise MixedSizes."""
        layer, kind = key
        if kind == "patches" and len({block.grids[layer] for block in self.blocks}) > 1:
            raise mixed_sizes("patches", self.sizes)
        return self.blocks

    def _row_shape(self, blocks: Sequence[Block], key: TensorKey) -> tuple[int, ...]:
        return blocks[0].tensors[key].row_shape if blocks else self.shapes[key]

    def _joined(
        self,
        blocks: Sequence[Block],
        key: TensorKey,
        read: Callable[[Tokens], Array],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> Array:
        """Return `read` of all rows, without a copy if they are one block."""
        if len(blocks) == 1 and len(blocks[0].rows) == len(self):
            return read(blocks[0].tensors[key])
        joined = np.zeros(shape, dtype)
        for block in blocks:
            joined[row_index(block.rows)] = read(block.tensors[key])
        return joined


def mixed_sizes(what: str, sizes: Collection[tuple[int, int]]) -> MixedSizes:
    return MixedSizes(
        f"the rows have {len(sizes)} input sizes ({format_sizes(sizes)}), so that there is no one {what} for all; "
        f"use features.at_size(SIZE).{what} of each size or features[i].{what} of each row, or give one size"
    )


def no_such_size(size: tuple[int, int], sizes: Collection[tuple[int, int]]) -> ValueError:
    return ValueError(
        f"no features have the input size {format_sizes([size])}; there are {format_sizes(sizes) or 'none'}"
    )


def row_index(rows: Array) -> Array | slice:
    """Return an index for ascending `rows`: a slice, which copies faster, if they are contiguous."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _scales(tokens: Tokens) -> Array:
    assert tokens.scales is not None
    return tokens.scales


def format_sizes(sizes: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in sizes)

"""Packed arrays over all rows of a call, and arrays of single rows. N rows: one per image or view."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from dinov3_client._answer import Block, TensorKey, TokenArray
from dinov3_client._dtypes import Array
from dinov3_client._errors import MixedSizes
from dinov3_serving.features import TokenKind


@dataclass(frozen=True, eq=False)
class Packing:
    """The blocks of a call and where their rows belong. Does not refer to Features: a cycle would keep arrays alive.

    Its arrays are numpy's; a subclass may have others.
    """

    images: Any
    """[N] int64: the index of each row's image."""
    views: Any
    """[N] int64: the index of each row's view within its image."""
    blocks: tuple[Block, ...]
    shapes: Mapping[TensorKey, tuple[int, ...]]
    """The requested tensors, each with the shape of a failed row, for use if no block has one."""
    quantized: bool
    """Whether they were sent as int8."""
    dtype: Any
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

    def pack(self, layer: int | None, kind: TokenKind) -> Any:
        """Return one array of all rows; None if it was not requested.

        CLS and registers have one shape whatever the input size; patches of several sizes only if pooled.
        """
        key: TensorKey = (layer, kind)
        if key not in self.shapes:
            return None
        return self._joined(key, lambda tokens: tokens.read(), self._row_shape(key), self.dtype)

    def pack_quantized(self, layer: int | None, kind: TokenKind) -> tuple[Array, Array] | None:
        """Return values and scales of all rows of int8 features; None if they were not requested."""
        key: TensorKey = (layer, kind)
        if key not in self.shapes:
            return None
        shape = self._row_shape(key)
        tokens = () if kind == "cls" else (int(np.prod(shape[1:])) if len(shape) == 3 else shape[0],)
        return (
            self._joined(key, lambda tokens: tokens.values, shape, np.dtype(np.int8)),
            self._joined(key, lambda tokens: tokens.scales, tokens, np.dtype(np.float32)),
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
            found: Array = TokenArray(values[here], None if scales is None else scales[here]).read()[0]
            return found
        others = self.block(row)
        return np.zeros(self.shapes[key] if others is None else others.tensors[key].row_shape, self.dtype)

    def grid(self, layer: int | None, name: str = "grid") -> tuple[int, int]:
        """Return the grid of all rows; (0, 0) if all failed. Raises MixedSizes, for the attribute `name`."""
        grids = {block.grids[layer] for block in self.blocks}
        if len(grids) > 1:
            raise _mixed_sizes(name, self.sizes)
        return grids.pop() if grids else (0, 0)

    def row_grid(self, row: int, layer: int | None) -> tuple[int, int]:
        """Return the grid of one row; (0, 0) if it failed before its size was known."""
        block = self.block(row)
        return block.grids[layer] if block else (0, 0)

    def input_size(self) -> tuple[int, int]:
        """Return the input size of all rows; (0, 0) if all failed. Raises MixedSizes."""
        if len(self.sizes) > 1:
            raise _mixed_sizes("input_size", self.sizes)
        return next(iter(self.sizes), (0, 0))

    def block(self, row: int) -> Block | None:
        """Return the block with the sizes of a row. A failed row has those of the others, if these agree."""
        if row in self._places:
            return self._places[row][0]
        return self.blocks[0] if len(self.sizes) == 1 else None

    def at_size(self, size: tuple[int, int]) -> Self:
        """Return the rows of one input size, in the order of the call. Raises ValueError if there are none."""
        if size not in self.sizes:
            raise ValueError(
                f"no features have the input size {_format_sizes([size])}; there are "
                f"{_format_sizes(self.sizes) or 'none'}"
            )
        rows = self.rows_of(size)
        blocks = tuple(replace(block, rows=np.searchsorted(rows, block.rows)) for block in self.sizes[size])
        index = self.index(rows)
        return replace(self, images=self.images[index], views=self.views[index], blocks=blocks)

    def rows_of(self, size: tuple[int, int]) -> Array:
        """Return the numbers of the rows of one input size, ascending."""
        return np.sort(np.concatenate([block.rows for block in self.sizes[size]]))

    def index(self, rows: Array) -> Any:
        """Return an index for ascending `rows`: a slice, which copies faster, if they are contiguous."""
        first, last = int(rows[0]), int(rows[-1])
        return slice(first, last + 1) if last - first + 1 == len(rows) else rows

    def format_shape(self, layer: int | None, kind: TokenKind, row: int | None = None) -> str:
        """Return the name of a tensor with its shape, of one row or of all, for representations of features."""
        block = self.block(0 if row is None else row) if len(self) else None
        shape = self.shapes[layer, kind] if block is None else block.tensors[layer, kind].row_shape
        if row is not None:
            return f"{kind} {list(shape)}"
        if kind == "patches" and len({one.tensors[layer, kind].row_shape for one in self.blocks}) > 1:
            return f"{kind} of {len(self.sizes)} sizes"
        return f"{kind} {[len(self), *shape]}"

    def format_dtype(self) -> str:
        """Return the dtype as text, for the representation of features."""
        return str(self.dtype)

    def _zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.zeros(shape, dtype)

    def _row_shape(self, key: TensorKey) -> tuple[int, ...]:
        """Return the shape that all rows have in common. Raises MixedSizes."""
        layer, kind = key
        if kind == "patches":
            self.grid(layer, "patches")
        return self.blocks[0].tensors[key].row_shape if self.blocks else self.shapes[key]

    def _joined(self, key: TensorKey, read: Callable[[TokenArray], Any], row_shape: tuple[int, ...], dtype: Any) -> Any:
        """Return `read` of all rows, without a copy if they are one block."""
        if len(self.blocks) == 1 and len(self.blocks[0].rows) == len(self):
            return read(self.blocks[0].tensors[key])
        joined = self._zeros((len(self), *row_shape), dtype)
        for block in self.blocks:
            joined[self.index(block.rows)] = read(block.tensors[key])
        return joined


def _mixed_sizes(what: str, sizes: Collection[tuple[int, int]]) -> MixedSizes:
    return MixedSizes(
        f"the rows have {len(sizes)} input sizes ({_format_sizes(sizes)}), so that there is no one {what} for all; "
        f"use features.at_size(SIZE).{what} of each size or features[i].{what} of each row, or give one size"
    )


def _format_sizes(sizes: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in sizes)

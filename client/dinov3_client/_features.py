"""The answer as numpy arrays. N images, P patches, G registers, D channels.

Arrays are read-only views of the bytes that came in, without another copy, wherever all images of a call have one
input size; `array.copy()` gives a writable one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, overload

import numpy as np

from dinov3_client._dtypes import Array
from dinov3_client._errors import MixedSizes, StatusError
from dinov3_client._request import TokenKind

Key = tuple[int | None, TokenKind]
"""A layer as asked for (None: the last one, after the final norm) and a kind of token."""


@dataclass(frozen=True)
class Timings:
    """Where the time of a request went on the server, in seconds of wall clock."""

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


@dataclass(frozen=True)
class Block:
    """The images of one input size."""

    input_size: tuple[int, int]
    grids: Mapping[int | None, tuple[int, int]]
    """Rows and columns of patches, of each layer as asked for and of the last (None)."""
    rows: Array
    """[R] the image of each row."""
    tensors: Mapping[Key, Array]
    """[R, D] or [R, tokens, D]."""


class Packing:
    """The blocks of an answer, read over all images or of one. Knows no Features, so that no cycle keeps arrays."""

    def __init__(
        self, count: int, blocks: Sequence[Block], shapes: Mapping[Key, tuple[int, ...]], dtype: np.dtype[Any]
    ) -> None:
        self.count = count
        self.blocks = tuple(blocks)
        self.shapes = shapes
        """What was asked for, with the shape of one image that has no row while the others tell none."""
        self.dtype = dtype
        self._places = {int(image): (block, row) for block in blocks for row, image in enumerate(block.rows)}

    def pack(self, layer: int | None, kind: TokenKind) -> Array | None:
        """Of all images. CLS and registers have one shape whatever the input size; patches do not."""
        key: Key = (layer, kind)
        if key not in self.shapes:
            return None
        if not self.blocks:
            return np.zeros((self.count, *self.shapes[key]), self.dtype)
        first = (self.sole_block(kind) if kind == "patches" else self.blocks[0]).tensors[key]
        if len(first) == self.count:
            return first
        packed = np.zeros((self.count, *first.shape[1:]), self.dtype)
        for block in self.blocks:
            packed[block.rows] = block.tensors[key]
        return packed

    def row(self, image: int, layer: int | None, kind: TokenKind) -> Array | None:
        """Of one image."""
        key: Key = (layer, kind)
        if key not in self.shapes:
            return None
        if image in self._places:
            block, row = self._places[image]
            features: Array = block.tensors[key][row]
            return features
        block_of_others = self.block(image)
        shape = self.shapes[key] if block_of_others is None else block_of_others.tensors[key].shape[1:]
        return np.zeros(shape, self.dtype)

    def grid(self, layer: int | None) -> tuple[int, int]:
        """Of each image; (0, 0) where all failed."""
        return self.sole_block("grid").grids[layer] if self.blocks else (0, 0)

    def row_grid(self, image: int, layer: int | None) -> tuple[int, int]:
        """Of one image; (0, 0) where it failed before its size was known."""
        block = self.block(image)
        return block.grids[layer] if block else (0, 0)

    def block(self, image: int) -> Block | None:
        """Whose sizes an image has. A failed one without a row takes the others', where they have one size."""
        if image in self._places:
            return self._places[image][0]
        return self.blocks[0] if len(self.blocks) == 1 else None

    def sole_block(self, what: str) -> Block:
        if len(self.blocks) > 1:
            sizes = ", ".join(f"{height}x{width}" for height, width in (block.input_size for block in self.blocks))
            raise MixedSizes(
                f"the images came out in {len(self.blocks)} input sizes ({sizes}), so that there is no one {what} "
                f"for all; use features[i].{what}, or give a size"
            )
        return self.blocks[0]


class LayerFeatures:
    """The tokens of one layer, of all images of a call or of one of them. What was not asked for is None.

    Layers of a ConvNeXt have a D and a grid of their own.
    """

    def __init__(self, get: Callable[[TokenKind], Array | None], grid: Callable[[], tuple[int, int]]) -> None:
        self._get = get
        self._grid = grid

    @cached_property
    def cls(self) -> Array | None:
        """[N, D], or [D] of one image: the CLS token."""
        return self._get("cls")

    @cached_property
    def patches(self) -> Array | None:
        """[N, P, D], or [P, D] of one image: the patch tokens, row by row of the grid. No registers among them."""
        return self._get("patches")

    @cached_property
    def registers(self) -> Array | None:
        """[N, G, D], or [G, D] of one image: the register tokens."""
        return self._get("registers")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of each image, (rows, columns); (0, 0) where all images failed."""
        return self._grid()


class ImageFeatures(LayerFeatures):
    """The features of one image: those of the last layer, and `layers`, keyed as they were asked for.

    `input_size` is the (height, width) in pixels that the model saw and `grid` the patches of it, (0, 0) both
    where an image failed before its size was known. `error` is set where the image failed; its arrays are zeros.
    """

    def __init__(self, packing: Packing, image: int, layers: Iterable[int], error: StatusError | None) -> None:
        super().__init__(partial(packing.row, image, None), partial(packing.row_grid, image, None))
        self.layers: dict[int, LayerFeatures] = {
            layer: LayerFeatures(partial(packing.row, image, layer), partial(packing.row_grid, image, layer))
            for layer in layers
        }
        block = packing.block(image)
        self.input_size = block.input_size if block else (0, 0)
        self.error = error


class Features(LayerFeatures, Sequence[ImageFeatures]):
    """The features of the images of one call, in their order.

    Its own `cls`, `patches` and `registers` are those of the last layer after the final norm, packed over all
    images; `layers[i]` has the same for each layer asked for, under the number asked for. `features[i]` has those
    of one image, and works also where the images came out in several input sizes: then `patches`, `grid` and
    `input_size` of all images raise MixedSizes, while `cls` and `registers` stay packed.

    `errors` maps the indices of failed images to their errors (with `on_error="return"`; else it is empty); their
    rows are zeros. `timings`, `frontend` (which server process answered) and `fingerprint` (of the model) are the
    answer's.
    """

    def __init__(
        self,
        packing: Packing,
        *,
        layers: Sequence[int],
        errors: Mapping[int, StatusError],
        timings: Timings,
        frontend: int,
        fingerprint: str,
    ) -> None:
        super().__init__(partial(packing.pack, None), partial(packing.grid, None))
        self.layers: dict[int, LayerFeatures] = {
            layer: LayerFeatures(partial(packing.pack, layer), partial(packing.grid, layer)) for layer in layers
        }
        self.errors = dict(errors)
        self.timings = timings
        self.frontend = frontend
        self.fingerprint = fingerprint
        self._packing = packing

    @property
    def input_size(self) -> tuple[int, int]:
        """Pixels that the model saw of each image, (height, width); (0, 0) where all images failed."""
        return self._packing.sole_block("input_size").input_size if self._packing.blocks else (0, 0)

    def __len__(self) -> int:
        return self._packing.count

    @overload
    def __getitem__(self, index: int) -> ImageFeatures: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageFeatures]: ...
    def __getitem__(self, index: int | slice) -> ImageFeatures | list[ImageFeatures]:
        images = range(len(self))[index]
        if isinstance(images, range):
            return [self[image] for image in images]
        return ImageFeatures(self._packing, images, self.layers, self.errors.get(images))

    def __repr__(self) -> str:
        kinds = ", ".join(kind for layer, kind in self._packing.shapes if layer is None)
        sizes = ", ".join(f"{len(b.rows)} of {b.input_size[0]}x{b.input_size[1]}" for b in self._packing.blocks)
        return (
            f"<Features of {len(self)} images ({sizes}): {kinds}, layers {list(self.layers)}, "
            f"{self._packing.dtype.name}, {len(self.errors)} failed>"
        )

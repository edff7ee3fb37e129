"""The answers to a call as numpy arrays. N rows (images, or views of them), P patches, G registers, D channels.

Arrays are read-only views of the bytes that came in, without another copy, wherever all rows came in one answer and
have one input size; `array.copy()` gives a writable one. int8 features are read as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, overload

import numpy as np

from dinov3_client._answer import Answer, Block, Key, Timings
from dinov3_client._checks import pixel_size
from dinov3_client._dtypes import Array, numpy_of
from dinov3_client._errors import InvalidResponse, StatusError, image_errors
from dinov3_client._packing import Packing
from dinov3_client._request import OnError, Options, TokenKind
from dinov3_client._split import Query

if TYPE_CHECKING:
    from dinov3_client.torch._tensors import TorchFeatures


class LayerFeatures:
    """The tokens of one layer, of all rows of a call or of one of them. What was not asked for is None.

    Layers of a ConvNeXt have a D and a grid of their own.
    """

    def __init__(self, get: Callable[[TokenKind], Array | None], grid: Callable[[], tuple[int, int]]) -> None:
        self._get = get
        self._grid = grid

    @cached_property
    def cls(self) -> Array | None:
        """[N, D], or [D] of one row: the CLS token."""
        return self._get("cls")

    @cached_property
    def patches(self) -> Array | None:
        """[N, P, D], or [P, D] of one row: the patch tokens, row by row of the grid. No registers among them.

        With `channels_first` [N, D, rows, columns], or [D, rows, columns].
        """
        return self._get("patches")

    @cached_property
    def registers(self) -> Array | None:
        """[N, G, D], or [G, D] of one row: the register tokens."""
        return self._get("registers")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of each row of features, (rows, columns); (0, 0) where all images failed."""
        return self._grid()


class ImageFeatures(LayerFeatures):
    """The features of one row, an image or a view of it: those of the last layer, and `layers`, keyed as asked for.

    `image` and `view` are its indices, of the image within the call and of the view within the image. `input_size` is
    the (height, width) in pixels that the model saw and `grid` the patches, (0, 0) both where an image failed before
    its size was known. `error` is set where the image failed; its arrays are zeros.
    """

    def __init__(self, packing: Packing, row: int, layers: Iterable[int], errors: Mapping[int, StatusError]) -> None:
        super().__init__(partial(packing.row, row, None), partial(packing.row_grid, row, None))
        self.layers: dict[int, LayerFeatures] = {
            layer: LayerFeatures(partial(packing.row, row, layer), partial(packing.row_grid, row, layer))
            for layer in layers
        }
        block = packing.block(row)
        self.input_size = block.input_size if block else (0, 0)
        self.image = int(packing.images[row])
        self.view = int(packing.views[row])
        self.error = errors.get(self.image)


class Features(LayerFeatures, Sequence[ImageFeatures]):
    """The features of one call: a row for each image, or for each of its views, in their order.

    Its own `cls`, `patches` and `registers` are those of the last layer after the final norm, packed over all rows;
    `layers[i]` has the same for each layer asked for, under the number asked for. `images` and `views`, [N] int64, are
    the indices of each row's image within the call and view within the image.

    Where the rows came out in several input sizes, `patches` (unless pooled), `grid` and `input_size` of all of them
    raise MixedSizes; `cls` and `registers` stay packed. `at_size(224)` has the rows of one size, and `features[i]`
    those of one row.

    `errors` maps the indices of failed images to their errors (with `on_error="return"`; else it is empty); their
    rows are zeros. `timings`, `frontend` (which server process answered) and `fingerprint` (of the model; with a
    projection, "+" and that of the projection follow) are the answer's, `nbytes` are the bytes that came. A call that
    was split has times and bytes summed up (the wait and the batch at their largest), and the first one's frontend.
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
        nbytes: int,
    ) -> None:
        super().__init__(partial(packing.pack, None), partial(packing.grid, None))
        self.layers: dict[int, LayerFeatures] = {
            layer: LayerFeatures(partial(packing.pack, layer), partial(packing.grid, layer)) for layer in layers
        }
        self.images = packing.images
        self.views = packing.views
        self.errors = dict(errors)
        self.timings = timings
        self.frontend = frontend
        self.fingerprint = fingerprint
        self.nbytes = nbytes
        self._packing = packing

    @property
    def input_size(self) -> tuple[int, int]:
        """Pixels that the model saw of each row, (height, width); (0, 0) where all images failed."""
        return self._packing.input_size()

    @property
    def input_sizes(self) -> tuple[tuple[int, int], ...]:
        """What `at_size` can be asked for, in order of first use."""
        return tuple(self._packing.sizes)

    def at_size(self, size: int | tuple[int, int]) -> Features:
        """The rows of one input size, pixels or (height, width) of them, in their order.

        Rows of failed images are among them, as zeros, unless their input size was never known. `errors` stay those of
        the call, by image. Raises ValueError where no row has this size.
        """
        return Features(
            self._packing.at_size(pixel_size("size", size)),
            layers=tuple(self.layers),
            errors=self.errors,
            timings=self.timings,
            frontend=self.frontend,
            fingerprint=self.fingerprint,
            nbytes=self.nbytes,
        )

    def quantized(self, kind: TokenKind, layer: int | None = None) -> tuple[Array, Array] | None:
        """int8 features as they travelled: (int8 values, float32 scales), without another copy as far as possible.

        Values have the shape of the array that they stand for. Scales are [N] of cls and [N, tokens] else, also where
        the channels come first: value * scale is the feature. None where `kind` was not asked for; raises ValueError
        where the call did not ask for int8.
        """
        if not self._packing.quantized:
            raise ValueError("these features are not int8: quantized() is for dtype='int8'")
        return self._packing.pack_quantized(layer, kind)

    def torch(self, *, pin_memory: bool = False) -> TorchFeatures:
        """The same as writable torch tensors, with one copy; `pin_memory` puts that into page-locked memory.

        Raises ImportError where torch is not installed, and RuntimeError for `pin_memory` without a CUDA device.
        """
        from dinov3_client.torch._tensors import TorchFeatures

        return TorchFeatures.copied(self, self._packing, pin_memory=pin_memory)

    def __len__(self) -> int:
        return len(self._packing)

    @overload
    def __getitem__(self, index: int) -> ImageFeatures: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageFeatures]: ...
    def __getitem__(self, index: int | slice) -> ImageFeatures | list[ImageFeatures]:
        rows = range(len(self))[index]
        if isinstance(rows, range):
            return [self[row] for row in rows]
        return ImageFeatures(self._packing, rows, self.layers, self.errors)

    def __repr__(self) -> str:
        kinds = ", ".join(kind for layer, kind in self._packing.shapes if layer is None)
        sizes = ", ".join(
            f"{sum(len(block.rows) for block in blocks)} of {height}x{width}"
            for (height, width), blocks in self._packing.sizes.items()
        )
        rows = "rows" if self.views.any() else "images"
        return (
            f"<Features of {len(self)} {rows} ({sizes}): {kinds}, layers {list(self.layers)}, "
            f"{self._packing.dtype.name}, {len(self.errors)} failed>"
        )


def join(queries: Sequence[Query], answers: Sequence[Answer], on_error: OnError) -> Features:
    """The features of one call from the answers to its `queries`, in their order.

    Raises ImageErrors where images failed and `on_error` is "raise", InvalidResponse where the answers do not fit
    together.
    """
    options = queries[0].options
    errors = {image: error for answer in answers for image, error in answer.errors.items()}
    counts = np.maximum([views for query in queries for views in query.views], 1)
    if errors and on_error == "raise":
        labels = {image: label for query in queries for image, label in query.labels.items()}
        raise image_errors(errors, labels, len(counts))
    fingerprints = dict.fromkeys(answer.fingerprint for answer in answers)
    if len(fingerprints) > 1:
        raise InvalidResponse(f"one call was answered by several models, of the fingerprints {', '.join(fingerprints)}")
    blocks: list[Block] = []
    first_row = 0
    for query, answer in zip(queries, answers, strict=True):
        blocks += [
            Block(block.input_size, block.grids, block.rows + first_row, block.tensors) for block in answer.blocks
        ]
        first_row += sum(max(1, views) for views in query.views)
    _check_shapes(blocks)
    images = np.repeat(np.arange(len(counts)), counts)
    return Features(
        Packing(
            images=images,
            views=np.arange(len(images)) - (np.cumsum(counts) - counts)[images],
            blocks=blocks,
            shapes={key: _shape_without_row(key, blocks, options) for key in _keys(options)},
            quantized=options.dtype == "int8",
            dtype=numpy_of("float32" if options.dtype == "int8" else options.dtype),
        ),
        layers=tuple(layer.asked for layer in options.layers),
        errors=errors,
        timings=Timings(
            decode_seconds=sum(answer.timings.decode_seconds for answer in answers),
            queue_seconds=max(answer.timings.queue_seconds for answer in answers),
            inference_seconds=sum(answer.timings.inference_seconds for answer in answers),
            batch_images=max(answer.timings.batch_images for answer in answers),
            batches=sum(answer.timings.batches for answer in answers),
        ),
        frontend=answers[0].frontend,
        fingerprint=answers[0].fingerprint,
        nbytes=sum(answer.nbytes for answer in answers),
    )


def _check_shapes(blocks: Sequence[Block]) -> None:
    """Channels and registers are the model's, so that they are the same in all blocks."""
    for block in blocks[1:]:
        for key, tokens in block.tensors.items():
            found, first = tokens.values.shape, blocks[0].tensors[key].values.shape
            sides = _sides_of_the_model(key, len(found))
            if [found[side] for side in sides] != [first[side] for side in sides]:
                raise InvalidResponse(f"{key[1]} has shapes {list(first)} and {list(found)} in one answer")


def _sides_of_the_model(key: Key, axes: int) -> tuple[int, ...]:
    if key[1] == "patches":
        return (1,) if axes == 4 else (2,)
    return tuple(range(1, axes))


def _keys(options: Options) -> list[Key]:
    keys: list[Key] = [(None, kind) for kind in options.kinds]
    return keys + [(layer.asked, kind) for layer in options.layers for kind in layer.kinds]


def _shape_without_row(key: Key, blocks: Sequence[Block], options: Options) -> tuple[int, ...]:
    """Of one failed row whose input size is unknown: as far as the others tell it."""
    channels = 0
    if blocks:
        shape = blocks[0].tensors[key].row_shape
        if key[1] != "patches" or options.pooling:
            return shape
        channels = shape[0] if options.channels_first else shape[1]
    if key[1] == "cls":
        return (channels,)
    if key[1] == "patches" and options.channels_first:
        return (channels, *(options.pooling.grid if options.pooling else (0, 0)))
    return (0, channels)

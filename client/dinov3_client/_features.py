"""The features of a call as numpy arrays. N rows (images, or views of them), P patches, G registers, D channels.

If all rows have one input size and came in one response, arrays are read-only views of the received bytes, without
another copy; `array.copy()` is writable. int8 features are read as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, overload

import numpy as np

from dinov3_client._answer import Answer, Block, TensorKey, Timings
from dinov3_client._checks import check_choice, pixel_size
from dinov3_client._dtypes import Array, numpy_of
from dinov3_client._errors import InvalidResponse, StatusError, image_errors
from dinov3_client._packing import Packing
from dinov3_client._pytorch import not_compiled
from dinov3_client._request import OnError, RequestOptions
from dinov3_client._split import PreparedRequest
from dinov3_serving.features import TokenKind

if TYPE_CHECKING:
    from torch import device as TorchDevice
    from torch import dtype as TorchDtype

    from dinov3_client.torch._tensors import TorchFeatures

A = TypeVar("A")  # an array or a tensor


class LayerFeatures(Generic[A]):
    """The tokens of one layer, of all rows of a call or of one row. Outputs that were not requested are None.

    Type checkers take all as requested (`A | Any`): a caller knows, and need not ask.

    Layers of a ConvNeXt have a D and a grid of their own.
    """

    def __init__(self, get: Callable[[TokenKind], A | None], grid: Callable[[], tuple[int, int]]) -> None:
        self._get = get
        self._grid = grid

    @cached_property
    def cls(self) -> A | Any:
        """[N, D], or [D] of one row: the CLS token."""
        return self._get("cls")

    @cached_property
    def patches(self) -> A | Any:
        """[N, P, D], or [P, D] of one row: the patch tokens in row-major order, without registers.

        With `channels_first` [N, D, rows, columns], or [D, rows, columns].
        """
        return self._get("patches")

    @cached_property
    def registers(self) -> A | Any:
        """[N, G, D], or [G, D] of one row: the register tokens."""
        return self._get("registers")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches of each row; (0, 0) if all images failed."""
        return self._grid()


class ImageFeatures(LayerFeatures[Array]):
    """The features of one row (an image or a view of it): of the last layer and, keyed as requested, of `layers`.

    image, view: the index of the image within the call, and of the view within the image.
    input_size: (height, width) of the model's input in pixels; like `grid`, (0, 0) if the image failed before its size
        was known.
    error: set if the image failed; its arrays are zeros then.
    """

    def __init__(self, packing: Packing, row: int, layers: Iterable[int], errors: Mapping[int, StatusError]) -> None:
        super().__init__(partial(packing.row, row, None), partial(packing.row_grid, row, None))
        self.layers: dict[int, LayerFeatures[Array]] = {
            layer: LayerFeatures(partial(packing.row, row, layer), partial(packing.row_grid, row, layer))
            for layer in layers
        }
        block = packing.block(row)
        self.input_size = block.input_size if block else (0, 0)
        self.image = int(packing.images[row])
        self.view = int(packing.views[row])
        self.error = errors.get(self.image)
        self._packing = packing
        self._row = row

    def __repr__(self) -> str:
        name = f"image {self.image}" + (f", view {self.view}" if self._packing.views.any() else "")
        if self.error is not None:
            return f"<ImageFeatures of {name}: failed, {self.error.message}>"
        (height, width), (rows, columns) = self.input_size, self.grid
        kinds = [
            self._packing.format_shape(None, kind, self._row) for layer, kind in self._packing.shapes if layer is None
        ]
        return (
            f"<ImageFeatures of {name}, {height}x{width}: {', '.join(kinds)}, grid {rows}x{columns}, "
            f"layers {list(self.layers)}, {self._packing.format_dtype()}>"
        )


@dataclass(frozen=True)
class CallResult:
    """The results of a call besides its tokens; see `Features`."""

    layers: tuple[int, ...]
    """As requested."""
    errors: Mapping[int, StatusError]
    timings: Timings
    frontend: int
    fingerprint: str
    nbytes: int


class PackedFeatures(LayerFeatures[A]):
    """The features of one call, packed over all rows, in arrays of any library: see `Features`."""

    images: A
    views: A

    def __init__(self, packing: Packing, result: CallResult) -> None:
        super().__init__(partial(packing.pack, None), partial(packing.grid, None))
        self.layers: dict[int, LayerFeatures[A]] = {
            layer: LayerFeatures(partial(packing.pack, layer), partial(packing.grid, layer)) for layer in result.layers
        }
        self.images = packing.images
        self.views = packing.views
        self.errors = dict(result.errors)
        self.timings = result.timings
        self.frontend = result.frontend
        self.fingerprint = result.fingerprint
        self.nbytes = result.nbytes
        self._packing = packing
        self._result = result

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the model's input in pixels; (0, 0) if all images failed."""
        return self._packing.input_size()

    @property
    def input_sizes(self) -> tuple[tuple[int, int], ...]:
        """The input sizes that `at_size` accepts, in order of first use."""
        return tuple(self._packing.sizes)

    @not_compiled
    def at_size(self, size: int | tuple[int, int]) -> Self:
        """Return the rows of one input size, given as pixels or (height, width), in their order.

        Includes the rows of failed images, as zeros, unless their input size is unknown. `errors` are those of the
        whole call. Raises ValueError if no row has this size.
        """
        return type(self)(self._packing.at_size(pixel_size("size", size)), self._result)

    def __len__(self) -> int:
        return len(self._packing)

    def __repr__(self) -> str:
        kinds = ", ".join(
            self._packing.format_shape(None, kind) for layer, kind in self._packing.shapes if layer is None
        )
        sizes = ", ".join(
            f"{sum(len(block.rows) for block in blocks)} of {height}x{width}"
            for (height, width), blocks in self._packing.sizes.items()
        )
        rows = "rows" if self._packing.views.any() else "images"
        return (
            f"<{type(self).__name__} of {len(self)} {rows} ({sizes}): {kinds}, layers {list(self.layers)}, "
            f"{self._packing.format_dtype()}, {len(self.errors)} failed>"
        )


class Features(PackedFeatures[Array]):
    """The features of one call: a row for each image, or for each of its views, in their order.

    cls, patches, registers: tokens of the last layer after the final norm, packed over all rows.
    layers: the same for each requested layer, keyed by the number requested.
    images, views: [N] int64, the index of each row's image within the call, and of its view within the image.
    errors: the errors of failed images by index, with `on_error="return"`; their rows are zeros. Else empty.
    timings, frontend, fingerprint: where the server spent the time, which of its processes answered, and the model
        (MODEL, or MODEL+PROJECTION with a projection).
    nbytes: bytes received.

    If the rows have several input sizes, `patches` (unless pooled), `grid` and `input_size` raise MixedSizes, while
    `cls` and `registers` stay packed. `at_size(224)` gives the rows of one size and `features[i]` one row.

    A call that was split has the sums of times and bytes (the largest wait and batch), and the first one's frontend.

    It has a length, indices and iteration, but is no Sequence: Lightning rebuilds the sequences in a batch from their
    items. Objects with a method `to` are moved to the device by that.
    """

    @not_compiled
    def quantized(self, kind: TokenKind, layer: int | None = None) -> tuple[Array, Array] | None:
        """Return int8 features as received, (int8 values, float32 scales), if possible without another copy.

        Values have the shape of the array that they stand for. Scales are [N] of cls, else [N, tokens], also with
        `channels_first`; the feature is value * scale. Returns None if `kind` was not requested. Raises ValueError if
        the call did not request int8.
        """
        if not self._packing.quantized:
            raise ValueError("these features are not int8: quantized() is for dtype='int8'")
        return self._packing.pack_quantized(layer, kind)

    @not_compiled
    def numpy(self, dtype: Literal["float32", "float16"] | None = None) -> dict[str, Array]:
        """Return writable copies of all arrays by name, for `numpy.savez(file, **arrays)`, Arrow and data frames.

        The names are those of FeatureDataset: cls, patches, registers, and layerI_cls and so on of layer I as
        requested. dtype: what to convert them to. None: as they are, but bfloat16, which numpy's files and Arrow do not
        know, as float32.

        Raises MixedSizes for patches of several input sizes: use `at_size`.
        """
        check_choice("dtype", dtype, ("float32", "float16", None))
        to = dtype or ("float32" if self._packing.dtype.name == "bfloat16" else None)
        return {
            kind if layer is None else f"layer{layer}_{kind}": np.array(self._packing.pack(layer, kind), to)
            for layer, kind in self._packing.shapes
        }

    @not_compiled
    def torch(self, *, pin_memory: bool = False) -> TorchFeatures:
        """Return the same as writable torch tensors, copied once; with `pin_memory` into page-locked memory.

        Raises ImportError if torch is not installed, and RuntimeError for `pin_memory` without a CUDA device.
        """
        from dinov3_client.torch._tensors import TorchFeatures

        return TorchFeatures.copied(self._packing, self._result, pin_memory=pin_memory)

    def to(
        self, device: TorchDevice | str | int, dtype: TorchDtype | None = None, *, non_blocking: bool = False
    ) -> TorchFeatures:
        """Return `self.torch().to(...)`: the same as torch tensors on `device`, as frameworks move a batch."""
        return self.torch().to(device, dtype, non_blocking=non_blocking)

    @overload
    def __getitem__(self, index: int) -> ImageFeatures: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageFeatures]: ...
    def __getitem__(self, index: int | slice) -> ImageFeatures | list[ImageFeatures]:
        rows = range(len(self))[index]
        if isinstance(rows, range):
            return [self[row] for row in rows]
        return ImageFeatures(self._packing, rows, self.layers, self.errors)

    def __iter__(self) -> Iterator[ImageFeatures]:
        return (self[row] for row in range(len(self)))


def join(requests: Sequence[PreparedRequest], answers: Sequence[Answer], on_error: OnError) -> Features:
    """Join the answers to the `requests` of a call, in their order, to its features.

    Raises ImageErrors if images failed and `on_error` is "raise", InvalidResponse if the answers do not fit together.
    """
    options = requests[0].options
    errors = {image: error for answer in answers for image, error in answer.errors.items()}
    counts = np.maximum([views for prepared in requests for views in prepared.views], 1)
    if errors and on_error == "raise":
        raise image_errors(errors, len(counts))
    fingerprints = dict.fromkeys(answer.fingerprint for answer in answers)
    if len(fingerprints) > 1:
        raise InvalidResponse(f"one call was answered by several models, of the fingerprints {', '.join(fingerprints)}")
    blocks: list[Block] = []
    first_row = 0
    for prepared, answer in zip(requests, answers, strict=True):
        blocks += [replace(block, rows=block.rows + first_row) for block in answer.blocks]
        first_row += sum(max(1, views) for views in prepared.views)
    _check_shapes(blocks)
    images = np.repeat(np.arange(len(counts)), counts)
    return Features(
        Packing(
            images=images,
            views=np.arange(len(images)) - (np.cumsum(counts) - counts)[images],
            blocks=tuple(blocks),
            shapes={key: _shape_without_row(key, blocks, options) for key in _keys(options)},
            quantized=options.dtype == "int8",
            dtype=numpy_of("float32" if options.dtype == "int8" else options.dtype),
        ),
        CallResult(
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
        ),
    )


def _check_shapes(blocks: Sequence[Block]) -> None:
    """Raise InvalidResponse unless all blocks have the same channels and registers."""
    for block in blocks[1:]:
        for key, tokens in block.tensors.items():
            found, first = tokens.values.shape, blocks[0].tensors[key].values.shape
            sides = _sides_of_the_model(key, len(found))
            if [found[side] for side in sides] != [first[side] for side in sides]:
                raise InvalidResponse(f"{key[1]} has shapes {list(first)} and {list(found)} in one answer")


def _sides_of_the_model(key: TensorKey, axes: int) -> tuple[int, ...]:
    if key[1] == "patches":
        return (1,) if axes == 4 else (2,)
    return tuple(range(1, axes))


def _keys(options: RequestOptions) -> list[TensorKey]:
    keys: list[TensorKey] = [(None, kind) for kind in options.kinds]
    return keys + [(layer.asked, kind) for layer in options.layers for kind in layer.kinds]


def _shape_without_row(key: TensorKey, blocks: Sequence[Block], options: RequestOptions) -> tuple[int, ...]:
    """Return the shape of a failed row of unknown input size, as far as other rows determine it; 0 for other sides."""
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

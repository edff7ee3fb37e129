"""Features as torch tensors. N rows (images, or views of them), P patches, G registers, D channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch

from dinov3_client._answer import TensorKey, Timings
from dinov3_client._checks import pixel_size
from dinov3_client._dtypes import Array
from dinov3_client._errors import StatusError
from dinov3_client._features import Features
from dinov3_client._packing import Packing, mixed_sizes, no_such_size, row_index
from dinov3_serving.features import TokenKind

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


class _Tokens(NamedTuple):
    """The tokens of one kind of some rows, as received."""

    values: torch.Tensor
    scales: torch.Tensor | None
    """Of int8 values, in a shape that broadcasts over them."""

    def read(self) -> torch.Tensor:
        return self.values if self.scales is None else self.values * self.scales


@dataclass(frozen=True)
class _Group:
    """The rows of one input size."""

    rows: Array
    """[R] int64, ascending: their numbers among all rows."""
    grids: Mapping[int | None, tuple[int, int]]
    tensors: Mapping[TensorKey, _Tokens]


@dataclass(frozen=True)
class _Metadata:
    """The metadata of features: all but their tensors."""

    layers: tuple[int, ...]
    shapes: Mapping[TensorKey, tuple[int, ...]]
    """The requested tensors, each with the shape of a failed row, for use if no group has one."""
    dtype: torch.dtype
    device: torch.device
    errors: Mapping[int, StatusError]
    timings: Timings
    frontend: int
    fingerprint: str


class TorchLayerFeatures:
    """The tokens of one layer, of all rows. Outputs that were not requested are None."""

    def __init__(self, get: Callable[[TokenKind], torch.Tensor | None], grid: Callable[[], tuple[int, int]]) -> None:
        self._get = get
        self._grid = grid

    @cached_property
    def cls(self) -> torch.Tensor | None:
        """[N, D]: the CLS token."""
        return self._get("cls")

    @cached_property
    def patches(self) -> torch.Tensor | None:
        """[N, P, D] or, with `channels_first`, [N, D, rows, columns]: the patch tokens, without registers."""
        return self._get("patches")

    @cached_property
    def registers(self) -> torch.Tensor | None:
        """[N, G, D]: the register tokens."""
        return self._get("registers")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches of each row; (0, 0) if all images failed."""
        return self._grid()


class TorchFeatures(TorchLayerFeatures):
    """`Features` as torch tensors, which are writable and do not refer to the received bytes.

    `cls`, `patches` and `registers` of all rows, `layers[i]` with the same, `images` and `views` [N] int64, `grid`,
    `input_size`, `errors`, `timings`, `frontend` and `fingerprint` are as in `Features`. Rows of each input size have
    tensors of their own: `at_size` returns them without a copy, while `cls` and `registers` of all rows are copied.

    int8 features stay int8, with their scales, until `to` moves them and dequantises them on the new device. A tensor
    that is read earlier is dequantised to float32 where it is.
    """

    def __init__(
        self, groups: Mapping[tuple[int, int], _Group], images: torch.Tensor, views: torch.Tensor, metadata: _Metadata
    ) -> None:
        # Functions of their arguments, not of self: a cycle would keep tensors alive.
        super().__init__(*_readers(groups, len(images), metadata, None))
        self.layers: dict[int, TorchLayerFeatures] = {
            layer: TorchLayerFeatures(*_readers(groups, len(images), metadata, layer)) for layer in metadata.layers
        }
        self.images = images
        self.views = views
        self.errors = dict(metadata.errors)
        self.timings = metadata.timings
        self.frontend = metadata.frontend
        self.fingerprint = metadata.fingerprint
        self._groups = groups
        self._metadata = metadata

    @classmethod
    def copied(cls, features: Features, packing: Packing, *, pin_memory: bool) -> TorchFeatures:
        """See `Features.torch`."""
        if pin_memory and not torch.cuda.is_available():
            raise RuntimeError("pin_memory=True needs a CUDA device, and torch sees none here: leave it out")
        metadata = _Metadata(
            layers=tuple(features.layers),
            shapes=packing.shapes,
            dtype=_DTYPES[packing.dtype.name],
            device=torch.device("cpu"),
            errors=features.errors,
            timings=features.timings,
            frontend=features.frontend,
            fingerprint=features.fingerprint,
        )
        groups = {size: _group(packing, size, pin_memory) for size in packing.sizes}
        images, views = (
            _copied([(slice(None), part)], len(packing), pin_memory) for part in (packing.images, packing.views)
        )
        return cls(groups, images, views, metadata)

    def to(
        self, device: torch.device | str | int, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> TorchFeatures:
        """Return the features on `device`, in `dtype` (None: unchanged, float32 for int8 features).

        Features are copied in the dtype received and converted on the device, int8 as value * scale. With
        `non_blocking` the host does not wait for copies from page-locked memory; torch keeps that memory until they
        are done.
        """
        if isinstance(device, torch.dtype):  # which torch's own `to` accepts
            raise TypeError(f"device is {device}: name a device first, as in features.to('cpu', {device})")

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        def converted(tokens: _Tokens) -> _Tokens:
            scales = None if tokens.scales is None else moved(tokens.scales)
            # Not one `to` for both: that would convert on the host and copy the larger tensor.
            return _Tokens(_Tokens(moved(tokens.values), scales).read().to(dtype or self._metadata.dtype), None)

        groups = {
            size: replace(group, tensors={key: converted(tokens) for key, tokens in group.tensors.items()})
            for size, group in self._groups.items()
        }
        images, views = moved(self.images), moved(self.views)
        metadata = replace(self._metadata, dtype=dtype or self._metadata.dtype, device=images.device)
        return TorchFeatures(groups, images, views, metadata)

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the model's input in pixels; (0, 0) if all images failed."""
        if len(self._groups) > 1:
            raise mixed_sizes("input_size", self._groups)
        return next(iter(self._groups), (0, 0))

    @property
    def input_sizes(self) -> tuple[tuple[int, int], ...]:
        """The input sizes that `at_size` accepts, in order of first use."""
        return tuple(self._groups)

    def at_size(self, size: int | tuple[int, int]) -> TorchFeatures:
        """Return the rows of one input size, given as pixels or (height, width), in order; tensors are shared.

        Raises ValueError if no row has this size.
        """
        asked = pixel_size("size", size)
        if asked not in self._groups:
            raise no_such_size(asked, self._groups)
        group = self._groups[asked]
        rows = _index(group.rows, self.images.device)
        own = replace(group, rows=np.arange(len(rows)))
        return TorchFeatures({asked: own}, self.images[rows], self.views[rows], self._metadata)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        kinds = ", ".join(kind for layer, kind in self._metadata.shapes if layer is None)
        sizes = ", ".join(f"{len(g.rows)} of {height}x{width}" for (height, width), g in self._groups.items())
        return (
            f"<TorchFeatures of {len(self)} rows ({sizes}): {kinds}, layers {list(self.layers)}, "
            f"{self._metadata.dtype} on {self._metadata.device}, {len(self.errors)} failed>"
        )


def _readers(
    groups: Mapping[tuple[int, int], _Group], rows: int, metadata: _Metadata, layer: int | None
) -> tuple[Callable[[TokenKind], torch.Tensor | None], Callable[[], tuple[int, int]]]:
    return partial(_pack, groups, rows, metadata, layer), partial(_grid, groups, layer, "grid")


def _pack(
    groups: Mapping[tuple[int, int], _Group], rows: int, metadata: _Metadata, layer: int | None, kind: TokenKind
) -> torch.Tensor | None:
    """Return one tensor of all rows, without a copy if they have one size; None if it was not requested."""
    key: TensorKey = (layer, kind)
    if key not in metadata.shapes:
        return None
    if kind == "patches":
        _grid(groups, layer, kind)
    of_each = [(group.rows, group.tensors[key].read()) for group in groups.values()]
    if len(of_each) == 1 and len(of_each[0][0]) == rows:
        return of_each[0][1]
    shape = of_each[0][1].shape[1:] if of_each else metadata.shapes[key]
    packed = torch.zeros((rows, *shape), dtype=metadata.dtype, device=metadata.device)
    for where, tensor in of_each:
        packed[_index(where, metadata.device)] = tensor
    return packed


def _index(rows: Array, device: torch.device) -> torch.Tensor:
    # A blocking copy would wait for all earlier work of the GPU.
    return torch.from_numpy(rows).to(device, non_blocking=True)


def _grid(groups: Mapping[tuple[int, int], _Group], layer: int | None, what: str) -> tuple[int, int]:
    grids = {group.grids[layer] for group in groups.values()}
    if len(grids) > 1:
        raise mixed_sizes(what, groups)
    return grids.pop() if grids else (0, 0)


def _group(packing: Packing, size: tuple[int, int], pin_memory: bool) -> _Group:
    """Copy the rows of one size out of the received bytes."""
    blocks = packing.sizes[size]
    rows = np.sort(np.concatenate([block.rows for block in blocks]))
    where = [row_index(np.searchsorted(rows, block.rows)) for block in blocks]
    tensors = {}
    for key in packing.shapes:
        of_blocks = [block.tensors[key] for block in blocks]
        values = [tokens.values for tokens in of_blocks]
        scales = [tokens.broadcast_scales() for tokens in of_blocks] if packing.quantized else None
        tensors[key] = _Tokens(
            _copied(list(zip(where, values, strict=True)), len(rows), pin_memory),
            _copied(list(zip(where, scales, strict=True)), len(rows), pin_memory) if scales else None,
        )
    return _Group(rows, blocks[0].grids, tensors)


def _copied(parts: Sequence[tuple[Array | slice, Array]], rows: int, pin_memory: bool) -> torch.Tensor:
    """Return a tensor of `rows` rows, with each array copied to its index."""
    first = parts[0][1]
    tensor = torch.empty((rows, *first.shape[1:]), dtype=_torch_dtype(first), pin_memory=pin_memory)
    # As bytes: torch does not know numpy's bfloat16, and received arrays need not be aligned.
    target = tensor.view(torch.uint8).numpy()
    for where, array in parts:
        target[where] = array.view(np.uint8)
    return tensor


def _torch_dtype(array: Array) -> torch.dtype:
    return torch.int64 if array.dtype == np.int64 else _DTYPES[array.dtype.name]

"""Features as torch tensors. N rows (images, or views of them), P patches, G registers, D channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dinov3_client._answer import Block, TokenArray
from dinov3_client._dtypes import Array
from dinov3_client._features import CallResult, PackedFeatures
from dinov3_client._packing import Packing
from dinov3_client._pytorch import not_compiled

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


class TorchFeatures(PackedFeatures[torch.Tensor]):
    """`Features` as torch tensors, which are writable and do not refer to the received bytes.

    `cls`, `patches` and `registers` of all rows, `layers[i]` with the same, `images` and `views` [N] int64, `grid`,
    `input_size`, `errors`, `timings`, `frontend`, `fingerprint` and `nbytes` are as in `Features`. Rows of each input
    size have tensors of their own: `at_size` returns them without a copy, while `cls` and `registers` of all rows are
    copied.

    int8 features stay int8, with their scales, until `to` moves them and dequantizes them on the new device. A tensor
    that is read earlier is dequantized to float32 where it is.
    """

    _packing: _TorchPacking

    @classmethod
    def copied(cls, packing: Packing, result: CallResult, *, pin_memory: bool) -> TorchFeatures:
        """See `Features.torch`."""
        if pin_memory and not torch.cuda.is_available():
            raise RuntimeError("pin_memory=True needs a CUDA device, and torch sees none here: leave it out")
        blocks = tuple(_copied_block(packing, size, pin_memory) for size in packing.sizes)
        images, views = (
            _copied([(slice(None), array)], len(packing), pin_memory) for array in (packing.images, packing.views)
        )
        dtype, device = _DTYPES[packing.dtype.name], torch.device("cpu")
        return cls(_TorchPacking(images, views, blocks, packing.shapes, packing.quantized, dtype, device), result)

    @not_compiled
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
        packing = self._packing
        dtype = dtype or packing.dtype

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        def converted(tokens: TokenArray) -> TokenArray:
            scales = None if tokens.scales is None else moved(tokens.scales)
            # Not one `to` for both: that would convert on the host and copy the larger tensor.
            return TokenArray(TokenArray(moved(tokens.values), scales).read().to(dtype), None)

        blocks = tuple(
            replace(block, tensors={key: converted(tokens) for key, tokens in block.tensors.items()})
            for block in packing.blocks
        )
        images, views = moved(self.images), moved(self.views)
        there = replace(packing, images=images, views=views, blocks=blocks, dtype=dtype, device=images.device)
        return TorchFeatures(there, self._result)


@dataclass(frozen=True, eq=False)
class _TorchPacking(Packing):
    """The tensors of a call: one block for each input size."""

    device: torch.device

    def index(self, rows: Array) -> slice | torch.Tensor:
        index = super().index(rows)
        # A blocking copy would wait for all earlier work of the GPU.
        return index if isinstance(index, slice) else torch.from_numpy(rows).to(self.device, non_blocking=True)

    def format_dtype(self) -> str:
        return f"{self.dtype} on {self.device}"

    def _zeros(self, shape: tuple[int, ...], dtype: Any) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)


def _copied_block(packing: Packing, size: tuple[int, int], pin_memory: bool) -> Block:
    """Copy the rows of one size out of the received bytes."""
    blocks, rows = packing.sizes[size], packing.rows_of(size)
    where = [packing.index(np.searchsorted(rows, block.rows)) for block in blocks]

    def joined(arrays: Sequence[Array]) -> torch.Tensor:
        return _copied(list(zip(where, arrays, strict=True)), len(rows), pin_memory)

    tensors = {}
    for key in packing.shapes:
        of_blocks = [block.tensors[key] for block in blocks]
        scales = joined([tokens.scales for tokens in of_blocks]) if packing.quantized else None
        tensors[key] = TokenArray(joined([tokens.values for tokens in of_blocks]), scales)
    return replace(blocks[0], rows=rows, tensors=tensors)


def _copied(arrays: Sequence[tuple[Array | slice, Array]], rows: int, pin_memory: bool) -> torch.Tensor:
    """Return a tensor of `rows` rows, with each array copied to its index."""
    first = arrays[0][1]
    tensor = torch.empty((rows, *first.shape[1:]), dtype=_torch_dtype(first), pin_memory=pin_memory)
    # As bytes: torch does not know numpy's bfloat16, and received arrays need not be aligned.
    target = tensor.reshape(rows, -1).view(torch.uint8).numpy()
    for where, array in arrays:
        target[where] = array.reshape(len(array), -1).view(np.uint8)
    return tensor


def _torch_dtype(array: Array) -> torch.dtype:
    return torch.int64 if array.dtype == np.int64 else _DTYPES[array.dtype.name]

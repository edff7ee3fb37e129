"""Patch embedding: one dense layer maps each patch of p x p pixels to a token."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov3_server.models.variant import Dataset
from dinov3_server.nn.linear import linear

# The dense layer's input is byte - 128: exact in bfloat16 and with a mean near zero, so that folding mean and std loses
# no precision.
_BYTE_CENTRE = 128


class PatchEmbedding:
    """Embeds patches of normalized floats or of bytes.

    `weight` [D, 3, p, p] and `bias` [D] are fp32, for normalized pixels. Bytes have a second dense layer with mean, std
    and the division by 255 folded in. Heights and widths must be multiples of `multiple`: p, or more if the model
    merges patches later. `dtype` is that of the matrix products.
    """

    def __init__(self, weight: Tensor, bias: Tensor, dataset: Dataset, *, multiple: int, dtype: torch.dtype) -> None:
        self._side = weight.shape[-1]
        self._multiple = multiple
        self._dtype = dtype
        byte_weight, byte_bias = _fold_normalization(weight, bias, dataset)
        self._floats = linear(weight.flatten(1), bias, dtype)
        self._bytes = linear(byte_weight, byte_bias, dtype)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Embed [B, H, W, 3] uint8 RGB or [B, 3, H, W] normalized floats: [B, H / p, W / p, D].

        Raises ValueError for pixels of another shape or dtype.
        """
        side, multiple = self._side, self._multiple
        is_bytes = pixels.dtype == torch.uint8
        height, width, channels = pixels.shape[1:] if is_bytes else (*pixels.shape[2:], pixels.shape[1])
        if channels != 3 or height % multiple or width % multiple or not height or not width:
            raise ValueError(
                f"pixels of shape {tuple(pixels.shape)} {pixels.dtype}; they must be [B, H, W, 3] uint8 or "
                f"[B, 3, H, W] floats with H and W positive multiples of {multiple}"
            )
        rows, columns = height // side, width // side
        if is_bytes:
            grid = pixels.view(-1, rows, side, columns, side, 3).permute(0, 1, 3, 2, 4, 5)
            # Make it contiguous while it is bytes: that is the cheapest copy.
            patches = grid.reshape(-1, rows, columns, side * side * 3).to(self._dtype).sub_(_BYTE_CENTRE)
            return self._bytes(patches)
        grid = pixels.view(-1, 3, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        return self._floats(grid.to(self._dtype).reshape(-1, rows, columns, 3 * side * side))


def _fold_normalization(weight: Tensor, bias: Tensor, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Convert a [D, 3, p, p] patch embedding of (byte / 255 - mean) / std to a [D, p p 3] one of byte - 128.

    (byte / 255 - mean) / std = (byte - 128) / (255 std) + (128 / 255 - mean) / std
    """
    # In fp64, as a sum of 768 products loses digits in fp32; it runs only once.
    mean = torch.tensor(dataset.mean, dtype=torch.float64, device=weight.device)
    std = torch.tensor(dataset.std, dtype=torch.float64, device=weight.device)
    exact = weight.double()
    offset = (exact.sum((2, 3)) * ((_BYTE_CENTRE / 255 - mean) / std)).sum(1)
    scaled = exact / (255 * std)[:, None, None]
    return scaled.permute(0, 2, 3, 1).flatten(1).float(), (bias.double() + offset).float()

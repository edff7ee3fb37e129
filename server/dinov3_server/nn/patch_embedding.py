"""Pixels to the first tokens: each patch of p x p pixels goes through one dense layer."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov3_server.models.variant import Dataset
from dinov3_server.nn.linear import linear

# Bytes enter the dense layer as byte - 128: exact in bfloat16, and near zero mean, so that the folded mean and std
# cost no precision.
_BYTE_CENTRE = 128


class PatchEmbedding:
    """`weight` [D, 3, p, p] and `bias` [D] are fp32, and of normalised pixels; bytes are normalised by a layer of their
    own, which has mean, std and the division by 255 in it.

    `multiple` is what heights and widths of pixels must be multiples of: p, or more where the model goes on to join
    patches. `dtype` is that of the products.
    """

    def __init__(self, weight: Tensor, bias: Tensor, dataset: Dataset, *, multiple: int, dtype: torch.dtype) -> None:
        self._side = weight.shape[-1]
        self._multiple = multiple
        self._dtype = dtype
        of_bytes, offset = _fold_normalisation(weight, bias, dataset)
        self._of_floats = linear(weight.flatten(1).to(dtype).contiguous(), bias.to(dtype))
        self._of_bytes = linear(of_bytes.to(dtype).contiguous(), offset.to(dtype))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Of [B, H, W, 3] uint8 RGB or [B, 3, H, W] normalised floats: [B, H / p, W / p, D].

        Raises ValueError for pixels of another shape or dtype.
        """
        side, multiple = self._side, self._multiple
        is_bytes = pixels.dtype == torch.uint8
        height, width, channels = pixels.shape[1:] if is_bytes else (*pixels.shape[2:], pixels.shape[1])
        if channels != 3 or height % multiple or width % multiple or not height or not width:
            raise ValueError(
                f"pixels of shape {tuple(pixels.shape)} {pixels.dtype}; wanted [B, H, W, 3] uint8 or [B, 3, H, W] "
                f"floats with H and W positive multiples of {multiple}"
            )
        rows, columns = height // side, width // side
        if is_bytes:
            grid = pixels.view(-1, rows, side, columns, side, 3).permute(0, 1, 3, 2, 4, 5)
            # Made contiguous as bytes, when a copy is cheapest.
            patches = grid.reshape(-1, rows, columns, side * side * 3).to(self._dtype).sub_(_BYTE_CENTRE)
            return self._of_bytes(patches)
        grid = pixels.view(-1, 3, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        return self._of_floats(grid.to(self._dtype).reshape(-1, rows, columns, 3 * side * side))


def _fold_normalisation(weight: Tensor, bias: Tensor, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """A [D, 3, p, p] patch embedding of (byte / 255 - mean) / std as a [D, p p 3] one of byte - 128.

    (byte / 255 - mean) / std = (byte - 128) / (255 std) + (128 / 255 - mean) / std
    """
    # In fp64: it is done once, and a sum of 768 products loses digits in fp32.
    mean = torch.tensor(dataset.mean, dtype=torch.float64, device=weight.device)
    std = torch.tensor(dataset.std, dtype=torch.float64, device=weight.device)
    exact = weight.double()
    offset = (exact.sum((2, 3)) * ((_BYTE_CENTRE / 255 - mean) / std)).sum(1)
    scaled = exact / (255 * std)[:, None, None]
    return scaled.permute(0, 2, 3, 1).flatten(1).float(), (bias.double() + offset).float()

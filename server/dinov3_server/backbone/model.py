"""What runners ask of a model, of whichever family and origin; and our own model of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from dinov3_server.backbone.weights.checkpoint import Checkpoint
from dinov3_server.families.dinov3_convnext.model import ConvNext
from dinov3_server.families.dinov3_convnext.variants import ConvNextVariant
from dinov3_server.families.dinov3_vit.model import VisionTransformer
from dinov3_server.families.dinov3_vit.variants import VitVariant
from dinov3_server.models.interface import Output


class Model(Protocol):
    """A network on a device."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, pixels: Tensor, outputs: Iterable[Output]) -> dict[Output, Tensor]:
        """Features of `pixels`: [B, H, W, 3] uint8 RGB or [B, 3, H, W] normalised floats, H and W multiples of the
        patch size.

        Gives for each output a [B, D] (cls) or [B, tokens, D] fp32 tensor; they may be views of one another's memory.
        Raises ValueError for what the model does not have. To be captured as a CUDA graph, it neither waits for the
        device nor depends on the values of the pixels.
        """
        ...

    def tables(self, height: int, width: int) -> tuple[Tensor, ...]:
        """What a forward pass of pixels of this size reads beside weights and forgets some time: whoever has captured
        one keeps these."""
        ...


def our_model(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> Model:
    """Our own network with these weights."""
    variant, tensors, dataset = checkpoint.variant, checkpoint.tensors, checkpoint.dataset
    match variant:
        case VitVariant():
            assert checkpoint.periods is not None, "a ViT's checkpoint has its RoPE periods"
            return VisionTransformer(variant, tensors, checkpoint.periods, dataset, dtype=dtype, device=device)
        case ConvNextVariant():
            return ConvNext(variant, tensors, dataset, dtype=dtype, device=device)
    raise TypeError(f"{variant.name} is of no known family")

"""The interface between runners and networks, and the native network of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
        """Compute features of `pixels`: [B, H, W, 3] uint8 RGB or [B, 3, H, W] normalized floats, H and W multiples of
        the patch size.

        Returns for each output a [B, D] (cls) or [B, tokens, D] fp32 tensor; they may share memory. Raises ValueError
        for outputs that the model does not have. So that it can be captured as a CUDA graph, it neither waits for the
        device nor depends on the values of the pixels.
        """
        ...

    def features(self, pixels: Tensor, outputs: Iterable[Output]) -> Iterator[tuple[Output, Tensor]]:
        """Yield what a call would return, each output as soon as it is computed, so that not all need be kept."""
        ...

    def cached_tensors(self, height: int, width: int) -> tuple[Tensor, ...]:
        """Return the cached tensors, beside weights, that a forward pass of pixels of this size reads.

        The model may drop them from its cache at any time, so a CUDA graph must keep them alive.
        """
        ...


def native_model(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> Model:
    """Build our implementation of the checkpoint's variant with its weights."""
    variant, tensors, dataset = checkpoint.variant, checkpoint.tensors, checkpoint.dataset
    match variant:
        case VitVariant():
            assert checkpoint.periods is not None, "a ViT's checkpoint has its RoPE periods"
            return VisionTransformer(variant, tensors, checkpoint.periods, dataset, dtype=dtype, device=device)
        case ConvNextVariant():
            return ConvNext(variant, tensors, dataset, dtype=dtype, device=device)
    raise TypeError(f"no network for {type(variant).__name__}: add its family here")

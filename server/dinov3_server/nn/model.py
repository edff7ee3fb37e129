"""The interface between runners and networks, and what all networks do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from dinov3_server.models.interface import Output
from dinov3_server.models.variant import Variant


class Model(Protocol):
    """A network on a device."""

    device: torch.device

    def __call__(self, pixels: Tensor, outputs: Iterable[Output]) -> dict[Output, Tensor]:
        """Compute features of `pixels`: [B, H, W, 3] uint8 RGB or [B, 3, H, W] normalized floats, H and W multiples of
        the patch size.

        Returns for each output a [B, D] (cls) or [B, tokens, D] fp32 tensor; they may share memory. Raises ValueError
        for outputs that the model does not have. So that it can be captured as a CUDA graph, it neither waits for the
        device nor depends on the values of the pixels.
        """
        return dict(self.features(pixels, outputs))

    def features(self, pixels: Tensor, outputs: Iterable[Output]) -> Iterator[tuple[Output, Tensor]]:
        """Yield what a call returns, each output as soon as it is computed, so that not all need be kept."""
        ...

    def cached_tensors(self, height: int, width: int) -> tuple[Tensor, ...]:
        """Return the cached tensors, beside weights, that a forward pass of pixels of this size reads.

        The model may drop them from its cache at any time, so a CUDA graph must keep them alive.
        """
        return ()


def source_layer(output: Output, variant: Variant) -> int:
    """Return the layer that computes `output`. Raises ValueError if the variant does not have it."""
    kinds = ("cls", "registers", "patches") if variant.registers else ("cls", "patches")
    if output.kind not in kinds:
        raise ValueError(f"no output kind {output.kind!r} in {variant.name}: its kinds are {', '.join(kinds)}")
    if output.layer is None:
        return variant.depth - 1
    if not 0 <= output.layer < variant.depth:
        raise ValueError(f"no layer {output.layer} in {variant.name}: its layers are 0 to {variant.depth - 1}")
    return output.layer

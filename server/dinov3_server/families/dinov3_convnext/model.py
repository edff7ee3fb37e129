"""The DINOv3 ConvNeXt, for inference only.

Written from the papers (arXiv:2201.03545, arXiv:2508.10104) and the layout of the published checkpoints. Some algebra
is done once, at load: LayerScale is folded into the layer before it, the scale and shift of every norm but the stem's
and the last into the layer after it; mean, std and the division by 255 into the stem for bytes. Maps stay [B, h, w, C]
throughout (channels last), so that dense layers are matrix products, and so are the convolutions between stages, whose
patches do not overlap. Only the stages that the requested outputs need are computed.

The residual stream and the norms are always fp32; convolutions and matrix products are in the model's dtype.

Shapes: B images, H x W pixels; stage i has a map of h x w = H / s x W / s cells of C channels, s = 4 * 2^i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_server.families.dinov3_convnext.variants import ConvNextVariant
from dinov3_server.models.interface import Output
from dinov3_server.models.variant import Dataset
from dinov3_server.nn.linear import Linear, linear
from dinov3_server.nn.model import Model, source_layer
from dinov3_server.nn.norm import Norm
from dinov3_server.nn.patch_embedding import PatchEmbedding

_KERNEL = 7  # of the depthwise convolutions


class ConvNext(Model):
    """A ConvNeXt.

    `tensors` are canonical (see variants.py), in any floating dtype and on any device; the model keeps none of them.
    On the meta device it can be built and run without memory.
    """

    def __init__(
        self,
        variant: ConvNextVariant,
        tensors: Mapping[str, Tensor],
        dataset: Dataset,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.variant = variant
        self.dtype = dtype
        self.device = device
        if device.type == "cuda" and dtype == torch.float32:
            # Otherwise cuDNN's convolutions round to TF32. The setting is process-wide.
            torch.backends.cudnn.allow_tf32 = False

        def exact(name: str) -> Tensor:
            return tensors[name].to(device, torch.float32)

        def norm(name: str) -> Norm:
            return Norm(exact(f"{name}.weight"), exact(f"{name}.bias"), variant.norm_eps)

        stem = exact("downsample_layers.0.0.weight"), exact("downsample_layers.0.0.bias")
        self._stem = PatchEmbedding(*stem, dataset, multiple=variant.patch_size, dtype=dtype)
        self._stem_norm = norm("downsample_layers.0.1")
        self._downsamples = [_downsample(variant, dtype, i, exact) for i in range(1, variant.depth)]
        self._stages = [
            [_block(variant, dtype, f"stages.{i}.{j}.", exact) for j in range(depth)]
            for i, depth in enumerate(variant.depths)
        ]
        self._norm = norm("norm")

    def features(self, pixels: Tensor, outputs: Iterable[Output]) -> Iterator[tuple[Output, Tensor]]:
        """Yield the features as `Model` says: [B, C] (cls, the mean of the map) or [B, h w, C] (patches, row-major).

        Layers are stages. The final norm applies to the last stage only; `norm` does not change the others' features.
        """
        by_layer: dict[int, list[Output]] = {}
        for output in outputs:
            by_layer.setdefault(source_layer(output, self.variant), []).append(output)
        if not by_layer:
            return
        x = self._stem_norm(self._stem(pixels).float())
        for layer in range(max(by_layer) + 1):
            if layer:
                x = self._downsamples[layer - 1](x)
            for block in self._stages[layer]:
                x = block(x)
            if group := by_layer.get(layer):
                yield from self._pick(x, group)

    def _pick(self, x: Tensor, group: list[Output]) -> Iterator[tuple[Output, Tensor]]:
        """Yield the outputs of one stage, from its map."""
        for output in group:
            tokens = x.mean((1, 2)) if output.kind == "cls" else x.flatten(1, 2)
            is_last = source_layer(output, self.variant) == self.variant.depth - 1
            yield output, self._norm(tokens) if is_last and output.norm else tokens


@dataclass(eq=False)
class _Downsample:
    """Norm, then the 2 x 2 convolution of stride 2: [B, h, w, C] to [B, h / 2, w / 2, C']."""

    dtype: torch.dtype
    eps: float
    reduction: Linear

    def __call__(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        x = F.layer_norm(x, (channels,), eps=self.eps).to(self.dtype)
        cells = x.view(batch, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
        return self.reduction(cells.reshape(batch, height // 2, width // 2, 4 * channels)).float()


@dataclass(eq=False)
class _Block:
    """x + pwconv2(gelu(pwconv1(norm(dwconv x)))), the norm's scale and shift in pwconv1 and LayerScale in pwconv2.

    x, [B, h, w, C] fp32, may be overwritten.
    """

    dtype: torch.dtype
    eps: float
    kernels: Tensor  # of the depthwise convolution
    bias: Tensor
    pwconv1: Linear
    pwconv2: Linear

    def __call__(self, x: Tensor) -> Tensor:
        channels = x.shape[-1]
        planes = x.to(self.dtype).permute(0, 3, 1, 2)
        mixed = F.conv2d(planes, self.kernels, self.bias, padding=_KERNEL // 2, groups=channels).permute(0, 2, 3, 1)
        normed = F.layer_norm(mixed, (channels,), eps=self.eps)
        hidden = self.pwconv1.gelu(normed)
        # In another dtype the addition is a separate operator; in place, it takes half the memory.
        return self.pwconv2.add(hidden, x) if self.dtype == x.dtype else x.add_(self.pwconv2(hidden))


def _downsample(
    variant: ConvNextVariant, dtype: torch.dtype, stage: int, exact: Callable[[str], Tensor]
) -> _Downsample:
    """Build the downsampling before a stage other than the first."""
    prefix = f"downsample_layers.{stage}."
    weight = exact(f"{prefix}1.weight").permute(0, 2, 3, 1)  # [C', 2, 2, C]
    scale, shift = exact(f"{prefix}0.weight"), exact(f"{prefix}0.bias")
    bias = exact(f"{prefix}1.bias") + weight.sum((1, 2)) @ shift
    return _Downsample(dtype, variant.norm_eps, linear((weight * scale).flatten(1), bias, dtype))


def _block(variant: ConvNextVariant, dtype: torch.dtype, prefix: str, exact: Callable[[str], Tensor]) -> _Block:
    """Build a block from canonical tensors."""
    scale, shift, gamma = exact(f"{prefix}norm.weight"), exact(f"{prefix}norm.bias"), exact(f"{prefix}gamma")
    weight1, weight2 = exact(f"{prefix}pwconv1.weight"), exact(f"{prefix}pwconv2.weight")
    pwconv1 = linear(weight1 * scale, exact(f"{prefix}pwconv1.bias") + weight1 @ shift, dtype)
    pwconv2 = linear(gamma[:, None] * weight2, gamma * exact(f"{prefix}pwconv2.bias"), dtype)
    kernels = exact(f"{prefix}dwconv.weight").to(dtype).contiguous(memory_format=torch.channels_last)
    return _Block(dtype, variant.norm_eps, kernels, exact(f"{prefix}dwconv.bias").to(dtype), pwconv1, pwconv2)

"""Our ViT, synthetic images, and comparisons of features. Needs only torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dinov3_server.families.dinov3_vit.model import VisionTransformer
from dinov3_server.families.dinov3_vit.variants import PERIODS, VitVariant
from dinov3_server.models.interface import Output
from dinov3_server.models.variant import DATASETS, Dataset
from dinov3_server.nn.model import Model

LVD = DATASETS["lvd1689m"]
CPU = torch.device("cpu")


def ours(
    variant: VitVariant,
    tensors: dict[str, Tensor],
    periods: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    dataset: Dataset = LVD,
    device: torch.device = CPU,
) -> VisionTransformer:
    """Build our ViT, with the official RoPE periods unless `tensors` or `periods` have others."""
    given = {} if periods is None else {PERIODS: periods}
    return VisionTransformer(variant, variant.constants() | tensors | given, dataset, dtype=dtype, device=device)


def picture(height: int, width: int, count: int = 1, seed: int = 0) -> Tensor:
    """Return [count, height, width, 3] uint8: smooth shades with some noise, as photos have."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.linspace(0, 1, height)[:, None, None]
    x = torch.linspace(0, 1, width)[None, :, None]
    images = []
    for _ in range(count):
        frequency, phase = 1 + 5 * torch.rand(2, 3, generator=generator), torch.rand(2, 3, generator=generator)
        waves = torch.sin(2 * math.pi * (frequency[0] * y + phase[0])) * torch.cos(
            2 * math.pi * (frequency[1] * x + phase[1])
        )
        noise = torch.randn(height, width, 3, generator=generator)
        images.append((128 + 90 * waves + 12 * noise).clamp(0, 255).to(torch.uint8))
    return torch.stack(images)


def normalized(images: Tensor, dataset: Dataset = LVD) -> Tensor:
    """Convert [B, H, W, 3] bytes to the [B, 3, H, W] normalized floats that other implementations take."""
    scaled = (images.float() / 255 - torch.tensor(dataset.mean)) / torch.tensor(dataset.std)
    return scaled.permute(0, 3, 1, 2).contiguous()


def every_output(depth: int) -> list[Output]:
    """Return the final outputs, and each layer's with and without the final norm."""
    final = [Output("cls"), Output("registers"), Output("patches")]
    return final + [
        Output(kind, layer, norm)
        for layer in range(depth)
        for norm in (False, True)
        for kind in ("cls", "registers", "patches")
    ]


class ModelOf:
    """A model with the features that `compute` returns."""

    def __init__(self, compute: Callable[[Tensor, list[Output]], dict[Output, Tensor]]) -> None:
        self._compute = compute

    def __call__(self, pixels: Tensor, outputs: list[Output]) -> dict[Output, Tensor]:
        return self._compute(pixels, outputs)

    def features(self, pixels: Tensor, outputs: list[Output]) -> Iterable[tuple[Output, Tensor]]:
        return self(pixels, outputs).items()


@torch.inference_mode()
def worst_error(model: Model, pixels: Tensor, expected: dict[Output, Tensor]) -> float:
    """Return the largest relative error, norm(a - b) / norm(b), of any output."""
    actual = model(pixels, list(expected))
    assert {output: tensor.shape for output, tensor in actual.items()} == {
        output: tensor.shape for output, tensor in expected.items()
    }
    return max(
        float((actual[output].double() - tensor.double()).norm() / tensor.double().norm())
        for output, tensor in expected.items()
    )


def worst_cosine(actual: Tensor, expected: Tensor) -> float:
    """Return the smallest cosine of any token."""
    return float(torch.cosine_similarity(actual.double(), expected.double(), dim=-1).min())

"""The models that are measured: ours in its variants, and transformers'."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from bench.gpu.plan import BOTH, WANTED, Config, Plan
from dinov3_server.backbone.runners.base import finite_rows
from dinov3_server.backbone.runners.cuda_graphs import ForwardGraph, ForwardResult, compute
from dinov3_server.backbone.runners.postprocessing import Postprocessing
from dinov3_server.families.dinov3_vit.model import VisionTransformer
from dinov3_server.families.dinov3_vit.variants import VitVariant
from dinov3_server.models.variant import DATASETS
from dinov3_server.nn import attention, linear, rope
from dinov3_server.nn.rope import Rope

Forward = Callable[[Tensor], ForwardResult]


def native_model(plan: Plan, variant: VitVariant) -> VisionTransformer:
    """Return our model with random weights, drawn on the device."""
    generator = torch.Generator(plan.device).manual_seed(0)
    tensors = {}
    for name, shape in variant.canonical_shapes().items():
        drawn = torch.randn(shape, generator=generator, device=plan.device).mul_(0.02)
        tensors[name] = drawn.add_(1.0) if "norm" in name and name.endswith("weight") else drawn
    with mock.patch.object(linear, "packs", return_value=False):  # as on CUDA, also in a dry run on a CPU
        return variant.build(tensors | variant.constants(), DATASETS["lvd1689m"], dtype=plan.dtype, device=plan.device)


def bytes_for(plan: Plan, config: Config) -> Tensor:
    """Return random pixels [B, size, size, 3] on the device."""
    generator = torch.Generator(plan.device).manual_seed(0)
    shape = (config.batch, config.size, config.size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=plan.device, generator=generator)


def eager(model: VisionTransformer) -> Forward:
    """Return the forward pass of the server: from bytes to CLS and patches in bfloat16, and the check of finiteness."""

    def run(pixels: Tensor) -> ForwardResult:
        _, height, width, _ = pixels.shape
        grid = height // model.variant.patch_size, width // model.variant.patch_size
        return compute(model, pixels, WANTED, lambda features: Postprocessing(features, lambda layer: grid, {}))

    return run


def graph(run: Forward, model: VisionTransformer, pixels: Tensor) -> Callable[[], object]:
    """Return a captured `run` of `pixels`, with the copies in and out of the server. It must have run before."""
    size = pixels.shape[1]
    captured = ForwardGraph(run, pixels, model.cached_tensors(size, size), pool=None)
    return lambda: captured.replay(pixels, len(pixels))


def compiled(model: VisionTransformer) -> Forward:
    """Return the same forward pass compiled by torch.compile, of a model from `fusible`."""

    def whole(pixels: Tensor) -> tuple[list[list[Tensor]], Tensor]:
        features = model(pixels, BOTH)
        values = [[features[output].to(torch.bfloat16).contiguous()] for output in BOTH]
        return values, torch.stack([finite_rows(sections) for sections in values], dim=1)

    fast = torch.compile(whole, dynamic=False, fullgraph=True)
    return lambda pixels: ForwardResult(*fast(pixels))


@contextmanager
def fusible(model: VisionTransformer, size: int) -> Iterator[VisionTransformer]:
    """Yield the same model for images of `size`, with RoPE in real numbers: Inductor generates no complex code.

    It can be called inside the block, and so can the given model.
    """
    table = torch.view_as_real(model.cached_tensors(size, size)[0]).clone()  # [P, 1, 1, d/2, 2]

    def rotate_into(out: Tensor, vectors: Tensor, rotations: Tensor) -> None:
        if rotations.is_complex():
            rope.rotate_into(out, vectors, rotations)
            return
        even, odd = vectors.float().reshape(*vectors.shape[:-1], -1, 2).unbind(-1)
        cosine, sine = rotations.unbind(-1)
        rotated = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
        out.copy_(rotated.flatten(-2))

    def packs(weight: Tensor) -> bool:  # as on CUDA
        return False

    twin = copy.copy(model)
    twin._rope = cast(Rope, FixedRope(table))
    with mock.patch.object(attention, "rotate_into", rotate_into), mock.patch.object(attention, "packs", packs):
        yield twin


class FixedRope:
    """RoPE with one table for every grid."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def rotations(self, rows: int, columns: int) -> Tensor:
        return self.table


def transformers_model(plan: Plan, config: Config) -> tuple[Any, Tensor]:
    """Return transformers' model on the device, and normalized pixels [B, 3, size, size].

    Raises ImportError if transformers is not installed or has no DINOv3.
    """
    from transformers import DINOv3ViTModel

    from bench.reference import transformers_config

    with torch.device(plan.device):
        model = DINOv3ViTModel(transformers_config(config.variant)).eval().to(plan.dtype)
        pixels = torch.randn(config.batch, 3, config.size, config.size, dtype=plan.dtype)
    return model, pixels

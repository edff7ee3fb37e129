"""Our features against transformers' DINOv3ViTModel: the same weights, the same RoPE periods, every layer."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import DINOv3ViTModel

from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.families.dinov3_vit.variants import VitVariant
from dinov3_server.families.registry import lookup
from dinov3_server.models.interface import Output
from dinov3_server.models.variant import DATASETS
from dinov3_server.nn import attention
from dinov3_server.nn.rope import default_periods
from tests.server.backbone.features import normalized, ours, picture, worst_cosine, worst_error
from tests.server.backbone.reference import photographs, transformers_features, transformers_model

FP32_BOUND = 1e-5
BF16_COSINE = 0.9995
SIZES = [(224, 224), (256, 256), (384, 512)]
FINAL = (Output("cls"), Output("registers"), Output("patches"))


class Pair(NamedTuple):
    variant: VitVariant
    tensors: dict[str, Tensor]
    periods: Tensor
    theirs: DINOv3ViTModel


@pytest.fixture(scope="module", params=["vits16", "vits16plus"])
def pair(request: pytest.FixtureRequest) -> Pair:
    variant = lookup(request.param)
    tensors = random_tensors(variant, seed=7)
    periods = default_periods(variant.head_dim, variant.rope_base)
    return Pair(variant, tensors, periods, transformers_model(variant, tensors, periods))


@pytest.mark.parametrize("size", SIZES)
def test_fp32_every_output_of_every_layer(pair: Pair, size: tuple[int, int]) -> None:
    model = ours(pair.variant, pair.tensors, pair.periods)
    images = picture(*size)
    expected = transformers_features(pair.theirs, normalized(images))
    assert len(expected) == 3 + 6 * pair.variant.depth
    assert worst_error(model, normalized(images), expected) <= FP32_BOUND
    assert worst_error(model, images, expected) <= FP32_BOUND, "the normalization folded into the patch embedding"


def test_fp32_on_noise_in_a_batch(pair: Pair) -> None:
    model = ours(pair.variant, pair.tensors, pair.periods)
    pixels = torch.randn(3, 3, 160, 96, generator=torch.Generator().manual_seed(1))
    assert worst_error(model, pixels, transformers_features(pair.theirs, pixels)) <= FP32_BOUND


def test_sat_normalization(pair: Pair) -> None:
    sat = DATASETS["sat493m"]
    model = ours(pair.variant, pair.tensors, pair.periods, dataset=sat)
    images = picture(96, 96)
    expected = transformers_features(pair.theirs, normalized(images, sat))
    assert worst_error(model, images, expected) <= FP32_BOUND
    assert worst_error(ours(pair.variant, pair.tensors, pair.periods), images, expected) > 1e-2


@pytest.mark.parametrize("size", SIZES)
def test_bf16_cosine_of_every_token(pair: Pair, size: tuple[int, int]) -> None:
    model = ours(pair.variant, pair.tensors, pair.periods, dtype=torch.bfloat16)
    images = photographs(*size)
    expected = transformers_features(pair.theirs, normalized(images))
    for pixels in (images, normalized(images)):
        with torch.inference_mode():
            actual = model(pixels, FINAL)
        cosines = {output.kind: worst_cosine(actual[output], expected[output]) for output in FINAL}
        assert min(cosines.values()) >= BF16_COSINE, cosines


def test_a_missing_rope_is_caught(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(pair.variant, pair.tensors, pair.periods)
    images = picture(224, 224)
    expected = transformers_features(pair.theirs, normalized(images))
    monkeypatch.setattr(attention, "rotate_into", lambda out, vectors, rotations: out.copy_(vectors))
    assert worst_error(model, images, expected) > 1e-2


def test_other_periods_are_caught(pair: Pair) -> None:
    exact = 100.0 ** (2 * torch.arange(pair.variant.head_dim // 4) / (pair.variant.head_dim // 2))
    assert not torch.equal(exact, pair.periods), "the official periods are rounded to bfloat16"
    images = picture(224, 224)
    expected = transformers_features(pair.theirs, normalized(images))
    assert worst_error(ours(pair.variant, pair.tensors, exact), images, expected) > 10 * FP32_BOUND


def test_swapped_ffn_matrices_are_caught(pair: Pair) -> None:
    swapped = dict(pair.tensors)
    if pair.variant.ffn == "swiglu":
        one, other = "blocks.5.mlp.w1.weight", "blocks.5.mlp.w2.weight"
    else:
        one, other = "blocks.5.mlp.fc1.weight", "blocks.6.mlp.fc1.weight"
    swapped[one], swapped[other] = swapped[other], swapped[one]
    images = picture(224, 224)
    expected = transformers_features(pair.theirs, normalized(images))
    assert worst_error(ours(pair.variant, swapped, pair.periods), images, expected) > 1e-2

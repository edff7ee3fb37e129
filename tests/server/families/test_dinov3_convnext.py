"""Our ConvNeXt against transformers' DINOv3ConvNextModel with the same weights; skipped work and refused inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.families.dinov3_convnext import model as convnext
from dinov3_server.families.dinov3_convnext.model import ConvNext
from dinov3_server.families.dinov3_convnext.variants import CONVNEXTS, ConvNextVariant
from dinov3_server.models.interface import Output
from dinov3_server.models.variant import DATASETS, Dataset
from tests.server.backbone.convnext_files import NARROW
from tests.server.backbone.features import CPU, LVD, normalized, picture, worst_cosine, worst_error
from tests.server.backbone.reference import photographs, transformers_convnext, transformers_convnext_features

TINY = CONVNEXTS["dinov3_convnext_tiny"]
FINAL = (Output("cls"), Output("patches"))
FP32_BOUND = 1e-5
BF16_COSINE = 0.9995
META = torch.device("meta")


def varied_tensors(variant: ConvNextVariant, seed: int = 0) -> dict[str, Tensor]:
    """Return random weights with a LayerScale that differs between channels, as in trained ones."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(tensor.shape, generator=generator) if name.endswith("gamma") else tensor
        for name, tensor in random_tensors(variant, seed).items()
    }


def ours(
    variant: ConvNextVariant,
    tensors: dict[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    dataset: Dataset = LVD,
    device: torch.device = CPU,
) -> ConvNext:
    return ConvNext(variant, tensors, dataset, dtype=dtype, device=device)


def run(model: ConvNext, pixels: Tensor, outputs: Iterable[Output]) -> dict[Output, Tensor]:
    with torch.inference_mode():
        return model(pixels, outputs)


@pytest.mark.parametrize("variant", [TINY, NARROW], ids=["tiny", "narrow"])
@pytest.mark.parametrize("size", [(224, 224), (256, 384), (32, 32), (64, 32)])
def test_fp32_every_output_of_every_stage(variant: ConvNextVariant, size: tuple[int, int]) -> None:
    tensors, images = varied_tensors(variant), picture(*size, count=2)
    expected = transformers_convnext_features(transformers_convnext(variant, tensors), normalized(images))
    assert len(expected) == 2 + 4 * 4
    grids = {output.layer: tensor.shape[1:] for output, tensor in expected.items() if output.kind == "patches"}
    assert grids[0] == (size[0] * size[1] // 16, variant.dims[0])
    assert grids[None] == grids[3] == (size[0] * size[1] // 1024, variant.embed_dim)
    model = ours(variant, tensors)
    assert worst_error(model, normalized(images), expected) <= FP32_BOUND
    assert worst_error(model, images, expected) <= FP32_BOUND, "the normalization folded into the stem"


def test_sat_normalization() -> None:
    sat, tensors, images = DATASETS["sat493m"], varied_tensors(NARROW), picture(96, 96)
    expected = transformers_convnext_features(transformers_convnext(NARROW, tensors), normalized(images, sat))
    assert worst_error(ours(NARROW, tensors, dataset=sat), images, expected) <= FP32_BOUND
    assert worst_error(ours(NARROW, tensors), images, expected) > 1e-2


def test_bf16_cosine_of_every_token() -> None:
    tensors, images = varied_tensors(TINY), photographs(224, 288)
    expected = transformers_convnext_features(transformers_convnext(TINY, tensors), normalized(images))
    model = ours(TINY, tensors, dtype=torch.bfloat16)
    for pixels in (images, normalized(images)):
        actual = run(model, pixels, expected)
        cosines = {output: worst_cosine(actual[output], expected[output]) for output in expected}
        assert min(cosines.values()) >= BF16_COSINE, cosines


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    """Blocks overwrite their input, but never one that is already an output."""
    model, images = ours(NARROW, varied_tensors(NARROW), dtype=dtype), picture(64, 96, count=2)
    outputs = [
        Output(kind, layer, norm)
        for layer in (None, 0, 1, 2, 3)
        for norm in (False, True)
        for kind in ("cls", "patches")
    ]
    for output, together in run(model, images, outputs).items():
        assert together.dtype == torch.float32
        assert torch.equal(run(model, images, [output])[output], together), output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    model, images = ours(NARROW, varied_tensors(NARROW), dtype=dtype), picture(64, 96, count=3)
    together = run(model, images, FINAL)
    for row in range(3):
        for output, alone in run(model, images[row : row + 1], FINAL).items():
            bound = 1e-5 if dtype == torch.float32 else 2e-2
            assert float((alone[0] - together[output][row]).norm() / alone.norm()) < bound


def test_computation_stops_at_the_deepest_requested_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    model, blocks = ours(NARROW, varied_tensors(NARROW)), []
    original = convnext._Block.__call__
    monkeypatch.setattr(convnext._Block, "__call__", lambda self, x: (blocks.append(self), original(self, x))[1])
    for outputs, count in [
        ([Output("cls", 0)], 1),
        ([Output("cls", 0), Output("patches", 1, norm=False)], 3),
        ([Output("patches", 2)], 6),
        ([Output("cls")], 7),
        ([Output("cls", 3), Output("patches", 0)], 7),
        ([], 0),
    ]:
        blocks.clear()
        assert set(run(model, picture(32, 64), outputs)) == set(outputs)
        assert len(blocks) == count, outputs


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 32, 48, 3, dtype=torch.uint8),  # a multiple of 16
        torch.zeros(1, 3, 36, 32),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 32, 32, 3),
        torch.zeros(1, 0, 32, 3, dtype=torch.uint8),
    ],
)
def test_pixels_of_an_unsupported_size_are_refused(pixels: Tensor) -> None:
    with pytest.raises(ValueError, match="positive multiples of 32"):
        run(ours(NARROW, varied_tensors(NARROW)), pixels, FINAL)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (Output("registers"), "no output kind 'registers' in dinov3_convnext_tiny: its kinds are cls, patches"),
        (Output("cls", 4), "no layer 4 in dinov3_convnext_tiny: its layers are 0 to 3"),
        (Output("patches", -1), "no layer -1"),
    ],
)
def test_missing_outputs_are_refused(output: Output, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        run(ours(NARROW, varied_tensors(NARROW)), picture(32, 32), [output])


@pytest.mark.parametrize("variant", CONVNEXTS.values(), ids=lambda variant: variant.name)
def test_every_variant_builds_and_runs_without_memory(variant: ConvNextVariant) -> None:
    tensors = {key: torch.empty(shape, device=META) for key, shape in variant.canonical_shapes().items()}
    model = ours(variant, tensors, dtype=torch.bfloat16, device=META)
    outputs = [*FINAL, *(Output("patches", layer) for layer in range(4))]
    features = run(model, torch.empty(2, 64, 96, 3, dtype=torch.uint8, device=META), outputs)
    shapes = [(2, variant.embed_dim), (2, 6, variant.embed_dim)]
    shapes += [(2, cells, channels) for cells, channels in zip((384, 96, 24, 6), variant.dims, strict=True)]
    assert [tuple(features[output].shape) for output in outputs] == shapes
    assert all(values.device == META for values in features.values())
    assert model.cached_tensors(64, 96) == ()


def test_convolutions_and_products_are_in_the_models_dtype_and_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN and oneDNN have fast kernels only for these; otherwise they copy silently."""
    shallow = dataclasses.replace(TINY, depths=(1, 1, 1, 1))
    tensors = {key: torch.empty(shape, device=META) for key, shape in shallow.canonical_shapes().items()}
    model, given = ours(shallow, tensors, dtype=torch.bfloat16, device=META), []
    original = torch.nn.functional.conv2d
    monkeypatch.setattr(
        convnext.F, "conv2d", lambda *given_now, **more: (given.append(given_now), original(*given_now, **more))[1]
    )
    run(model, torch.empty(2, 64, 96, 3, dtype=torch.uint8, device=META), FINAL)
    assert len(given) == 4
    for planes, weight, bias in given:
        assert {planes.dtype, weight.dtype, bias.dtype} == {torch.bfloat16}
        assert planes.is_contiguous(memory_format=torch.channels_last)

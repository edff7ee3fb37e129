"""The ViT: skipped work, building without memory, odd sizes, layers and attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.families.dinov3_vit import model as vit
from dinov3_server.families.dinov3_vit.variants import VITS, VitVariant
from dinov3_server.families.registry import lookup
from dinov3_server.models.interface import Output
from dinov3_server.nn import attention
from dinov3_server.nn.linear import Linear, PackedLinear, linear
from dinov3_server.nn.rope import Rope, default_periods
from tests.server.backbone.features import every_output, normalized, ours, picture, worst_error
from tests.server.backbone.reference import transformers_features, transformers_model

TINY = dataclasses.replace(lookup("vits16"), embed_dim=64, depth=3, heads=2, ffn_dim=128)
META = torch.device("meta")


def tiny(variant: VitVariant = TINY, dtype: torch.dtype = torch.float32) -> vit.VisionTransformer:
    return ours(variant, random_tensors(variant, 3), dtype=dtype)


def run(model: vit.VisionTransformer, pixels: Tensor, outputs: Iterable[Output]) -> dict[Output, Tensor]:
    with torch.inference_mode():
        return model(pixels, outputs)


def test_computation_stops_at_the_deepest_requested_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    calls = []
    original = vit._Block.__call__

    def counted(self: vit._Block, x: Tensor, rotations: Tensor, keep: int | None) -> Tensor:
        calls.append(keep)
        return original(self, x, rotations, keep)

    monkeypatch.setattr(vit._Block, "__call__", counted)
    for outputs, keeps in [
        ([Output("patches", 0)], [None]),
        ([Output("cls", 1)], [None, 1]),
        ([Output("patches", 0), Output("registers", 1, norm=False)], [None, 5]),
        ([Output("cls")], [None, None, 1]),
        ([Output("cls"), Output("patches")], [None, None, None]),
        ([], []),
    ]:
        calls.clear()
        assert set(run(model, picture(32, 48), outputs)) == set(outputs)
        assert calls == keeps, outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    model, images = tiny(dtype=dtype), picture(48, 64, count=2)
    together = run(model, images, every_output(TINY.depth))
    for output, expected in together.items():
        alone = run(model, images, [output])[output]
        assert alone.shape == expected.shape
        torch.testing.assert_close(alone, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_the_last_layer_by_number_is_the_last_layer() -> None:
    names = [Output("patches"), Output("patches", TINY.depth - 1, True), Output("patches", TINY.depth - 1, False)]
    features = run(tiny(), picture(32, 32), names)
    assert torch.equal(features[names[0]], features[names[1]])
    assert not torch.allclose(features[names[0]], features[names[2]])


@pytest.mark.parametrize("size", [(16, 16), (16, 400), (368, 32)])
def test_all_sizes_from_one_patch_on(size: tuple[int, int]) -> None:
    tensors, periods = random_tensors(TINY, 3), default_periods(TINY.head_dim, 100.0)
    images = picture(*size, count=2)
    expected = transformers_features(transformers_model(TINY, tensors, periods), normalized(images))
    assert worst_error(tiny(), images, expected) <= 1e-5


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 32, 40, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 40, 32),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 32, 32, 3),
        torch.zeros(1, 0, 32, 3, dtype=torch.uint8),
    ],
)
def test_pixels_that_are_not_a_grid_of_patches_are_refused(pixels: Tensor) -> None:
    with pytest.raises(ValueError, match="positive multiples of 16"):
        run(tiny(), pixels, [Output("cls")])


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_missing_layer_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=f"no layer {layer} .* 0 to 2"):
        run(tiny(), picture(32, 32), [Output("cls", layer)])


def test_rotations_are_cached_for_a_bounded_number_of_grids() -> None:
    rope = Rope(default_periods(64, 100.0))
    assert rope.rotations(3, 5) is rope.rotations(3, 5)
    assert rope.rotations(3, 5).shape == (15, 1, 1, 32)
    for rows in range(1, 200):
        rope.rotations(rows, 1)
    assert rope.rotations.cache_info().currsize <= 64


def test_default_periods_are_the_official_ones() -> None:
    periods = default_periods(64, 100.0)
    assert periods.shape == (16,)
    assert periods[0] == 1
    assert torch.equal(periods, periods.bfloat16().float())
    torch.testing.assert_close(periods, 100.0 ** (torch.arange(16) / 16), rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_equal_plain_ones(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(96, 64, generator=generator) / 8, torch.randn(96, generator=generator)
    x, other = torch.randn(2, 7, 64, generator=generator), torch.randn(2, 7, 96, generator=generator)
    layer = linear(weight.to(dtype), bias.to(dtype))
    if not isinstance(layer, PackedLinear):
        pytest.skip("this torch has no oneDNN linear for this CPU")
    plain = Linear(weight.to(dtype).double(), bias.to(dtype).double())
    bounds = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    x, other = x.to(dtype), other.to(dtype)
    with torch.inference_mode():
        for method in ("__call__", "gelu", "silu"):
            torch.testing.assert_close(getattr(layer, method)(x).double(), getattr(plain, method)(x.double()), **bounds)
        for method in ("add", "mul"):
            torch.testing.assert_close(
                getattr(layer, method)(x, other).double(), getattr(plain, method)(x.double(), other.double()), **bounds
            )


@pytest.mark.parametrize("scores", [1 << 22, 2 * 3 * 50 * 50, 3 * 50 * 7], ids=["all", "two images", "7 queries"])
@pytest.mark.parametrize("queries", [None, 5])
@pytest.mark.parametrize("kernel", ["products", "convolutions", "fused"])
def test_attention(kernel: str, queries: int | None, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_SCORES", scores)
    if kernel == "fused":
        monkeypatch.setattr(attention, "packs", lambda tensor: False)
    bf16 = kernel == "products"
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(5, 50, 3, 3, 32, generator=generator).to(torch.bfloat16 if bf16 else torch.float32)
    angles = torch.rand(45, 1, 1, 16, generator=generator)

    exact = qkv.double()
    pairs = torch.view_as_complex(exact[:, 5:, :2].unflatten(-1, (-1, 2)))
    exact[:, 5:, :2] = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    q, k, v = exact.permute(2, 0, 3, 1, 4)
    expected = torch.softmax(q[:, :, :queries] @ k.transpose(-1, -2), -1) @ v
    expected = expected.transpose(1, 2).flatten(2)

    with torch.inference_mode():
        attended = attention.attention(qkv, torch.polar(torch.ones_like(angles), angles), queries)
    assert attended.dtype == qkv.dtype
    assert attended.shape == expected.shape
    for image in range(5):
        error = (attended[image].double() - expected[image]).norm() / expected[image].norm()
        assert error < (0.02 if bf16 else 1e-6)


@pytest.mark.parametrize("name", VITS)
def test_every_variant_builds_and_runs_without_memory(name: str) -> None:
    variant = VITS[name]
    tensors = {key: torch.empty(shape, device=META) for key, shape in variant.canonical_shapes().items()}
    periods = default_periods(variant.head_dim, variant.rope_base)
    model = ours(variant, tensors, periods, dtype=torch.bfloat16, device=META)
    pixels = torch.empty(2, 64, 96, 3, dtype=torch.uint8, device=META)
    features = run(model, pixels, [Output("cls"), Output("registers"), Output("patches")])
    width = variant.embed_dim
    assert [tuple(f.shape) for f in features.values()] == [(2, width), (2, 4, width), (2, 24, width)]
    assert all(f.device == META for f in features.values())


@pytest.mark.parametrize("name", ["vits16", "vith16plus", "vit7b16"])
@pytest.mark.parametrize("output", [Output("cls"), Output("patches")], ids=["cls", "patches"])
def test_fused_attention_gets_supported_inputs(name: str, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's flash and cuDNN kernels need bfloat16, contiguous channels of a head, and 16-byte aligned addresses;
    otherwise torch silently uses a slow kernel."""
    variant = dataclasses.replace(lookup(name), depth=1)
    tensors = {n: torch.empty(shape, device=META) for n, shape in variant.canonical_shapes().items()}
    model = ours(variant, tensors, torch.ones(variant.head_dim // 4), dtype=torch.bfloat16, device=META)
    given: list[Tensor] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        given.extend((q, k, v))
        return original(q, k, v, scale=scale)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    run(model, torch.empty(2, 64, 96, 3, dtype=torch.uint8, device=META), [output])
    assert len(given) == 3
    for tensor in given:
        assert tensor.dtype == torch.bfloat16
        assert tensor.stride(-1) == 1
        offsets = [stride * tensor.itemsize for stride in tensor.stride()[:-1]]
        assert all(nbytes % 16 == 0 for nbytes in (*offsets, tensor.storage_offset() * tensor.itemsize))


def test_7b_at_depth_2_agrees_with_transformers() -> None:
    # Two of its forty blocks, at a quarter of its width so that they fit beside the other tests: the heads' size (128)
    # and the missing qkv bias are what is its own.
    variant = dataclasses.replace(lookup("vit7b16"), depth=2, embed_dim=1024, heads=8, ffn_dim=2048)
    tensors, periods = random_tensors(variant, 1), default_periods(variant.head_dim, 100.0)
    assert variant.head_dim == lookup("vit7b16").head_dim
    assert not any("attn.q.bias" in name for name in tensors)
    images = picture(96, 64)
    expected = transformers_features(transformers_model(variant, tensors, periods), normalized(images))
    assert worst_error(ours(variant, tensors, periods), images, expected) <= 1e-5


def test_7b_at_depth_2_runs_in_full_width() -> None:
    variant = dataclasses.replace(lookup("vit7b16"), depth=2)
    # The blocks share their tensors: 0.4 GB in bfloat16 for each.
    first = dataclasses.replace(variant, depth=1)
    tensors = random_tensors(first, 1, dtype=torch.bfloat16)
    tensors |= {key.replace("blocks.0.", "blocks.1."): value for key, value in tensors.items() if "blocks.0." in key}
    assert {key: value.shape for key, value in tensors.items()} == variant.canonical_shapes()
    model = ours(variant, tensors, dtype=torch.bfloat16)
    features = run(model, picture(32, 48), [Output("cls"), Output("patches")])
    assert features[Output("cls")].shape == (1, 4096)
    assert features[Output("patches")].shape == (1, 6, 4096)
    assert all(f.isfinite().all() for f in features.values())
    # The final norm makes every token of unit variance around the norm's own weights.
    assert 0.5 < features[Output("patches")].std() < 2

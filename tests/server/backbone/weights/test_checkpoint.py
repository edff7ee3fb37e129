"""Weights: every layout gives the same tensors, and anything else is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel

from dinov3_server.backbone.weights.checkpoint import load_checkpoint
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.errors import CheckpointError, ConfigError
from dinov3_server.families.dinov3_convnext.variants import ConvNextVariant
from dinov3_server.families.dinov3_vit.variants import PERIODS, VitVariant
from dinov3_server.families.registry import VARIANTS, lookup
from dinov3_server.models.variant import Variant
from tests.server.backbone.convnext_files import (
    NARROW,
    convnext_official_state,
    convnext_timm_state,
    convnext_transformers_state,
)
from tests.server.backbone.features import normalized, ours, picture, worst_error
from tests.server.backbone.files import SHALLOW, SHALLOW_SWIGLU, official_state, timm_state, transformers_state
from tests.server.backbone.reference import transformers_features, transformers_model

NO_BIAS = dataclasses.replace(SHALLOW_SWIGLU, qkv_bias=False)
VITS = pytest.mark.parametrize("variant", [SHALLOW, SHALLOW_SWIGLU, NO_BIAS], ids=["mlp", "swiglu", "no-qkv-bias"])


def official_file(path: Path, variant: VitVariant = SHALLOW, **changes: Tensor | None) -> Path:
    """An official file; `changes` replace keys, or remove them where they are None."""
    state: dict[str, Tensor | None] = {**official_state(variant, random_tensors(variant, 5)), **changes}
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    return path


@VITS
def test_every_layout_gives_the_same_tensors(tmp_path: Path, variant: VitVariant) -> None:
    tensors = random_tensors(variant, 5)
    official = official_state(variant, tensors)
    torch.save(official, tmp_path / "zipped.pth")
    torch.save(official, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file({k: v.contiguous() for k, v in official.items()}, tmp_path / "official.safetensors")
    save_file(transformers_state(variant, tensors, older=True), tmp_path / "older.safetensors")
    save_file(transformers_state(variant, tensors, older=False), tmp_path / "newer.safetensors")
    save_file(timm_state(variant, tensors, biases=variant.qkv_bias), tmp_path / "timm.safetensors")
    torch.save(transformers_state(variant, tensors, older=True), tmp_path / "transformers.bin")
    transformers_model(variant, tensors, official["rope_embed.periods"]).save_pretrained(tmp_path / "saved")
    for path in [*sorted(p for p in tmp_path.iterdir() if p.is_file()), tmp_path / "saved/model.safetensors"]:
        checkpoint = load_checkpoint(path, variant)
        assert checkpoint.tensors.keys() == {*variant.canonical_shapes(), PERIODS}, path
        assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in tensors.items()), path
        assert torch.equal(checkpoint.tensors[PERIODS], official[PERIODS]), path


def test_timm_leaves_out_biases_of_queries_and_values_that_are_zero(tmp_path: Path) -> None:
    tensors = random_tensors(SHALLOW, 5)
    without = timm_state(SHALLOW, tensors, biases=False)
    save_file(without, tmp_path / "without.safetensors")
    with_zeros = {
        k: torch.zeros(384) if k.endswith(("q_bias", "v_bias")) else v
        for k, v in timm_state(SHALLOW, tensors, biases=True).items()
    }
    save_file(with_zeros, tmp_path / "with.safetensors")
    assert len(with_zeros) == len(without) + 2 * SHALLOW.depth
    stored, implied = (
        load_checkpoint(tmp_path / name, SHALLOW).tensors for name in ("with.safetensors", "without.safetensors")
    )
    assert implied.keys() == stored.keys()
    assert all(torch.equal(implied[name], tensor) for name, tensor in stored.items())
    assert not any(implied[name].any() for name in implied if name.endswith(("attn.q.bias", "attn.v.bias")))


def test_timm_stores_these_biases_in_all_blocks_or_in_none(tmp_path: Path) -> None:
    state = timm_state(SHALLOW, random_tensors(SHALLOW, 5), biases=True)
    del state["blocks.1.attn.q_bias"]
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"in the timm .*: 1 missing: blocks\.1\.attn\.q_bias \(384\)\.$"):
        load_checkpoint(tmp_path / "a.safetensors", SHALLOW)


def test_every_layout_of_a_convnext_gives_the_same_tensors(tmp_path: Path) -> None:
    tensors = random_tensors(NARROW, 5)
    torch.save(convnext_official_state(tensors), tmp_path / "official.pth")
    save_file(tensors, tmp_path / "one-name-of-the-norm.safetensors")
    save_file(convnext_transformers_state(NARROW, tensors, older=True), tmp_path / "older.safetensors")
    save_file(convnext_transformers_state(NARROW, tensors, older=False), tmp_path / "newer.safetensors")
    save_file(convnext_timm_state(NARROW, tensors), tmp_path / "timm.safetensors")
    for path in sorted(tmp_path.iterdir()):
        checkpoint = load_checkpoint(path, NARROW)
        assert {k: v.shape for k, v in checkpoint.tensors.items()} == NARROW.canonical_shapes(), path
        assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in tensors.items()), path
        assert (checkpoint.variant, checkpoint.dataset.name) == (NARROW, "lvd1689m")


def test_a_convnext_saved_by_transformers(tmp_path: Path) -> None:
    tensors = random_tensors(NARROW, 5)
    config = DINOv3ConvNextConfig(hidden_sizes=list(NARROW.dims), depths=list(NARROW.depths))
    model = DINOv3ConvNextModel(config)
    model.load_state_dict(convnext_transformers_state(NARROW, tensors, older=False), strict=True)
    model.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path, NARROW).tensors
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_two_names_of_a_convnext_norm_must_agree(tmp_path: Path) -> None:
    state = convnext_official_state(random_tensors(NARROW, 5))
    torch.save(state | {"norms.3.bias": state["norm.bias"] + 1}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"norms\.3\.bias and norm\.bias are two names of one tensor, and differ"):
        load_checkpoint(tmp_path / "a.pth", NARROW)


def test_a_saved_transformers_model_gives_its_features(tmp_path: Path) -> None:
    tensors, periods = random_tensors(SHALLOW, 2), torch.linspace(1, 70, 16).bfloat16().float()
    theirs = transformers_model(SHALLOW, tensors, periods)
    theirs.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path / "model.safetensors", SHALLOW)
    images = picture(64, 80)
    expected = transformers_features(theirs, normalized(images))
    assert worst_error(ours(SHALLOW, dict(checkpoint.tensors), periods), images, expected) <= 1e-5


def test_rope_periods_come_from_the_file(tmp_path: Path) -> None:
    periods = torch.linspace(1, 90, 16)
    path = official_file(tmp_path / "a.pth", **{"rope_embed.periods": periods.bfloat16()})
    loaded = load_checkpoint(path, SHALLOW).tensors[PERIODS]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, periods.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in official_state(SHALLOW, random_tensors(SHALLOW, 5)).items()}
    torch.save(state, tmp_path / "a.pth")
    checkpoint = load_checkpoint(tmp_path / "a.pth", SHALLOW)
    assert all(checkpoint.tensors[name].dtype == dtype for name in SHALLOW.canonical_shapes())


def test_the_norm_of_local_crops_is_ignored(tmp_path: Path) -> None:
    extra = {"local_cls_norm.weight": torch.ones(384), "local_cls_norm.bias": torch.ones(384)}
    checkpoint = load_checkpoint(official_file(tmp_path / "a.pth", **extra), SHALLOW)
    assert set(checkpoint.tensors) == {*SHALLOW.canonical_shapes(), PERIODS}


QKV = "blocks.1.attn.qkv"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"norm.weight": None}, r"1 missing: norm\.weight \(384\)\."),
        ({f"{QKV}.bias_mask": None}, r"1 missing: blocks\.1\.attn\.qkv\.bias_mask \(1152\)"),
        ({"rope_embed.periods": torch.ones(8)}, r"1 of another shape: rope_embed\.periods \(8\) instead of \(16\)"),
        ({"blocks.3.norm1.weight": torch.ones(384)}, r"1 unexpected: blocks\.3\.norm1\.weight \(384\)"),
        ({"adapter.weight": torch.ones(2, 3)}, r"1 unexpected: adapter\.weight \(2, 3\)"),
        ({"cls_token": torch.ones(1, 384)}, r"1 of another shape: cls_token \(1, 384\) instead of \(1, 1, 384\)"),
        ({f"{QKV}.weight": torch.ones(1152, 192)}, r"qkv\.weight \(1152, 192\) instead of \(1152, 384\)"),
        ({"mask_token": torch.ones(1, 5)}, r"mask_token \(1, 5\) instead of \(1, 384\)"),
        ({"norm.bias": None, "extra": torch.ones(1)}, r"1 missing: norm\.bias \(384\); 1 unexpected: extra \(1\)"),
        ({"norm.bias": torch.ones(384, dtype=torch.int32)}, r"not float32, bfloat16 or float16: norm\.bias \(int32\)"),
        (
            {f"{QKV}.bias_mask": torch.full((1152,), torch.nan)},
            r"bias_mask must be 1.*: blocks\.1\.attn\.qkv\.bias_mask",
        ),
        ({f"{QKV}.bias_mask": torch.ones(1152)}, r"0 for keys.*: blocks\.1\.attn\.qkv\.bias_mask$"),
    ],
)
def test_one_wrong_key(tmp_path: Path, changes: dict[str, Tensor | None], told: str) -> None:
    path = official_file(tmp_path / "a.pth", **changes)
    with pytest.raises(CheckpointError, match=told) as caught:
        load_checkpoint(path, SHALLOW)
    assert str(path) in str(caught.value)


def test_one_wrong_key_in_the_transformers_layout(tmp_path: Path) -> None:
    state = transformers_state(SHALLOW, random_tensors(SHALLOW, 5), older=True)
    state["layer.0.attention.k_proj.bias"] = torch.zeros(384)
    del state["layer.2.mlp.up_proj.bias"]
    save_file(state, tmp_path / "a.safetensors")
    told = (
        r"in the transformers layout: 1 missing: layer\.2\.mlp\.up_proj\.bias \(1536\); "
        r"1 unexpected: layer\.0\.attention\.k_proj\.bias \(384\)"
    )
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(tmp_path / "a.safetensors", SHALLOW)


def test_a_key_under_both_of_its_names_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(SHALLOW, 5)
    both = transformers_state(SHALLOW, tensors, older=True) | transformers_state(SHALLOW, tensors, older=False)
    torch.save(both, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"\d+ present under two spellings: 'layer\.0"):
        load_checkpoint(tmp_path / "a.pth", SHALLOW)


def states(variant: Variant) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """A state in each layout, of zeros that share one value: shapes without memory."""
    tensors = {name: torch.zeros(1).expand(shape) for name, shape in variant.canonical_shapes().items()}
    if isinstance(variant, VitVariant):
        yield "official", official_state(variant, tensors)
        yield "transformers", transformers_state(variant, tensors, older=False)
        yield "timm", timm_state(variant, tensors, biases=False)
    if isinstance(variant, ConvNextVariant):
        yield "official", convnext_official_state(tensors)
        yield "transformers", convnext_transformers_state(variant, tensors, older=False)
        yield "timm", convnext_timm_state(variant, tensors)


@pytest.mark.parametrize(
    ("holds", "wanted"),
    [
        ("vits16", "vitb16"),
        ("vits16plus", "vits16"),
        ("vits16", "convnext_tiny"),
        ("convnext_tiny", "vits16"),
        ("convnext_tiny", "convnext_small"),
    ],
)
def test_another_variant_is_recognized(tmp_path: Path, holds: str, wanted: str) -> None:
    known = {name.removeprefix("dinov3_"): variant for name, variant in VARIANTS.items()}
    for layout, state in states(known[holds]):
        torch.save(state, tmp_path / f"{layout}.pth")
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(tmp_path / f"{layout}.pth", known[wanted])
        told = str(caught.value)
        assert f"{layout}.pth" in told
        assert f"dinov3_{wanted}" in told
        assert told.endswith(f"It looks like dinov3_{holds}.")
        assert len(told) < 3000, "many wrong keys are counted, not all named"


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ({}, "holds nothing of dinov3_vits16; its keys are none"),
        ({"conv1.weight": torch.ones(1)}, r"holds nothing of dinov3_vits16; its keys are conv1\.weight\.$"),
        ({"reg_token": torch.ones(1, 4, 384)}, r"holds nothing of dinov3_vits16; its keys are reg_token\.$"),
    ],
)
def test_tensors_of_another_model_are_refused(tmp_path: Path, saved: dict[str, Tensor], told: str) -> None:
    torch.save(saved, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(tmp_path / "a.pth", SHALLOW)


@pytest.mark.parametrize(
    ("path", "extra", "dataset"),
    [
        ("dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth", (), "lvd1689m"),
        ("dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", (), "sat493m"),
        ("models--facebook--dinov3-vitl16-pretrain-sat493m/snapshots/0a/model.pth", (), "sat493m"),
        ("renamed.pth", (), "lvd1689m"),
        ("renamed.pth", ("local_cls_norm.weight", "local_cls_norm.bias"), "sat493m"),
    ],
)
def test_the_dataset_is_guessed_from_the_file(tmp_path: Path, path: str, extra: tuple[str, ...], dataset: str) -> None:
    variant = dataclasses.replace(lookup("vitl16"), depth=1)
    tensors = {name: torch.zeros(1).expand(shape) for name, shape in variant.canonical_shapes().items()}
    state = official_state(variant, tensors) | {key: torch.zeros(variant.embed_dim) for key in extra}
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, tmp_path / path)
    assert load_checkpoint(tmp_path / path, variant).dataset.name == dataset


def test_a_dataset_that_the_variant_was_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "sat493m").mkdir()
    assert load_checkpoint(official_file(tmp_path / "sat493m/a.pth"), SHALLOW).dataset.name == "lvd1689m"


@pytest.mark.parametrize("dataset", ["lvd1689m", "sat493m"])
def test_a_given_dataset_outweighs_file_names(tmp_path: Path, dataset: str) -> None:
    variant = dataclasses.replace(lookup("vitl16"), depth=1)
    tensors = {name: torch.zeros(1).expand(shape) for name, shape in variant.canonical_shapes().items()}
    other = {"lvd1689m": "sat493m", "sat493m": "lvd1689m"}[dataset]
    path = tmp_path / f"dinov3_vitl16_pretrain_{other}.pth"
    torch.save(official_state(variant, tensors), path)
    assert load_checkpoint(path, variant).dataset.name == other
    assert load_checkpoint(path, variant, dataset).dataset.name == dataset


@pytest.mark.parametrize("dataset", ["sat493m", "imagenet"])
def test_a_given_dataset_that_the_variant_was_not_trained_on(tmp_path: Path, dataset: str) -> None:
    told = rf"dataset '{dataset}': dinov3_vits16 was not trained on it; its weights are of lvd1689m"
    with pytest.raises(ConfigError, match=told):
        load_checkpoint(tmp_path / "not even looked at", SHALLOW, dataset)

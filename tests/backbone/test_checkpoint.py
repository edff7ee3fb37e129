"""Weights files: every layout gives the same tensors, and anything else is refused by name."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinov3_server.backbone.checkpoint import load_checkpoint
from dinov3_server.backbone.layouts import canonical_shapes
from dinov3_server.backbone.random_weights import random_tensors
from dinov3_server.backbone.registry import VitVariant, lookup
from dinov3_server.errors import CheckpointError
from tests.backbone.features import normalised, ours, picture, worst_error
from tests.backbone.files import SHALLOW, SHALLOW_SWIGLU, official_state, transformers_state
from tests.backbone.reference import transformers_features, transformers_model

NO_BIAS = dataclasses.replace(SHALLOW_SWIGLU, qkv_bias=False)
VARIANTS = pytest.mark.parametrize("variant", [SHALLOW, SHALLOW_SWIGLU, NO_BIAS], ids=["mlp", "swiglu", "no-qkv-bias"])


def official_file(path: Path, variant: VitVariant = SHALLOW, **changes: Tensor | None) -> Path:
    """An official file; `changes` replace keys, or remove them where they are None."""
    state: dict[str, Tensor | None] = {**official_state(variant, random_tensors(variant, 5)), **changes}
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    return path


@VARIANTS
def test_every_layout_gives_the_same_tensors(tmp_path: Path, variant: VitVariant) -> None:
    tensors = random_tensors(variant, 5)
    official = official_state(variant, tensors)
    torch.save(official, tmp_path / "zipped.pth")
    torch.save(official, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file({k: v.contiguous() for k, v in official.items()}, tmp_path / "official.safetensors")
    save_file(transformers_state(variant, tensors, older=True), tmp_path / "older.safetensors")
    save_file(transformers_state(variant, tensors, older=False), tmp_path / "newer.safetensors")
    torch.save(transformers_state(variant, tensors, older=True), tmp_path / "transformers.bin")
    transformers_model(variant, tensors, official["rope_embed.periods"]).save_pretrained(tmp_path / "saved")
    for path in [*sorted(p for p in tmp_path.iterdir() if p.is_file()), tmp_path / "saved/model.safetensors"]:
        checkpoint = load_checkpoint(path, variant)
        assert {k: v.shape for k, v in checkpoint.tensors.items()} == canonical_shapes(variant), path
        assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in tensors.items()), path
        assert torch.equal(checkpoint.periods, official["rope_embed.periods"]), path


def test_a_saved_transformers_model_gives_its_features(tmp_path: Path) -> None:
    tensors, periods = random_tensors(SHALLOW, 2), torch.linspace(1, 70, 16).bfloat16().float()
    theirs = transformers_model(SHALLOW, tensors, periods)
    theirs.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path / "model.safetensors", SHALLOW)
    images = picture(64, 80)
    expected = transformers_features(theirs, normalised(images))
    assert worst_error(ours(SHALLOW, dict(checkpoint.tensors), periods), images, expected) <= 1e-5


def test_periods_are_the_files_own(tmp_path: Path) -> None:
    periods = torch.linspace(1, 90, 16)
    path = official_file(tmp_path / "a.pth", **{"rope_embed.periods": periods.bfloat16()})
    loaded = load_checkpoint(path, SHALLOW).periods
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, periods.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in official_state(SHALLOW, random_tensors(SHALLOW, 5)).items()}
    torch.save(state, tmp_path / "a.pth")
    checkpoint = load_checkpoint(tmp_path / "a.pth", SHALLOW)
    assert all(tensor.dtype == dtype for tensor in checkpoint.tensors.values())


def test_the_separate_norm_of_local_crops_is_left_out(tmp_path: Path) -> None:
    extra = {"local_cls_norm.weight": torch.ones(384), "local_cls_norm.bias": torch.ones(384)}
    checkpoint = load_checkpoint(official_file(tmp_path / "a.pth", **extra), SHALLOW)
    assert set(checkpoint.tensors) == set(canonical_shapes(SHALLOW))


QKV = "blocks.1.attn.qkv"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"norm.weight": None}, r"1 missing: norm\.weight \(384\)\."),
        ({f"{QKV}.bias_mask": None}, r"1 missing: blocks\.1\.attn\.qkv\.bias_mask \(1152\)"),
        ({"rope_embed.periods": None}, r"1 missing: rope_embed\.periods \(16\)"),
        ({"blocks.3.norm1.weight": torch.ones(384)}, r"1 unexpected: blocks\.3\.norm1\.weight \(384\)"),
        ({"head.weight": torch.ones(2, 3)}, r"1 unexpected: head\.weight \(2, 3\)"),
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


def test_one_wrong_key_in_transformers_layout(tmp_path: Path) -> None:
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


def test_a_key_in_both_spellings(tmp_path: Path) -> None:
    tensors = random_tensors(SHALLOW, 5)
    both = transformers_state(SHALLOW, tensors, older=True) | transformers_state(SHALLOW, tensors, older=False)
    torch.save(both, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"both spellings of 'layer\.0"):
        load_checkpoint(tmp_path / "a.pth", SHALLOW)


@pytest.mark.parametrize("layout", ["official", "transformers"])
@pytest.mark.parametrize(("holds", "wanted"), [("vits16", "vitb16"), ("vits16plus", "vits16"), ("vitb16", "vits16")])
def test_another_variant_is_recognised(tmp_path: Path, holds: str, wanted: str, layout: str) -> None:
    variant = lookup(holds)
    # Zeros that share one value: shapes without memory.
    tensors = {name: torch.zeros(1).expand(shape) for name, shape in canonical_shapes(variant).items()}
    if layout == "official":
        torch.save(official_state(variant, tensors), tmp_path / "a.pth")
    else:
        torch.save(transformers_state(variant, tensors, older=False), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=f"does not hold dinov3_{wanted} .* looks like dinov3_{holds}") as caught:
        load_checkpoint(tmp_path / "a.pth", lookup(wanted))
    assert len(str(caught.value)) < 3000, "many wrong keys are counted, not all named"


class Code:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (exec, ("raise SystemExit('it ran')",))


def whole_file(path: Path) -> bytes:
    return official_file(path).read_bytes()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (b"\n <?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page.*expired signed URL"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer.*git lfs pull"),
        (b'{"weight_map": {}}', "is JSON"),
        (b"\0" * 4096, "neither a PyTorch file"),
        (b"abc", "neither a PyTorch file"),
    ],
)
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=told) as caught:
        load_checkpoint(path, SHALLOW)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [0.001, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_pth(tmp_path: Path, kept: float, zipped: bool) -> None:
    path = tmp_path / "a.pth"
    state = official_state(SHALLOW, random_tensors(SHALLOW, 5))
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(CheckpointError, match=r"damaged or truncated, at \d+ bytes"):
        load_checkpoint(path, SHALLOW)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    state = {**official_state(SHALLOW, random_tensors(SHALLOW, 5)), "hook": Code()}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"refused: .* could run code; export the state dict alone$"):
        load_checkpoint(tmp_path / "a.pth", SHALLOW)


def test_a_plain_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Code()))
    with pytest.raises(CheckpointError, match=r"refused: .* could run code; export the state dict alone$"):
        load_checkpoint(tmp_path / "a.pth", SHALLOW)


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ({"teacher": {"a": torch.ones(1)}, "iteration": 5}, "holds teacher, iteration beside or instead of tensors"),
        ([torch.ones(1)], "holds a list and not a dictionary"),
        ({0: torch.ones(1)}, "not a dictionary of named tensors"),
        ({}, "holds no DINOv3 vision transformer"),
        ({"conv1.weight": torch.ones(1)}, "holds no DINOv3 vision transformer; its keys are conv1.weight"),
        ({"downsample_layers.0.0.weight": torch.ones(1), "norm.weight": torch.ones(1)}, "holds a ConvNeXt"),
        ({"cls_token": torch.ones(1), "reg_token": torch.ones(1)}, "is in timm's layout"),
    ],
)
def test_a_pth_of_something_else(tmp_path: Path, saved: object, told: str) -> None:
    torch.save(saved, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(tmp_path / "a.pth", SHALLOW)


def test_a_path_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        load_checkpoint(tmp_path / "nothing.pth", SHALLOW)
    with pytest.raises(CheckpointError, match="Is a directory"):
        load_checkpoint(tmp_path, SHALLOW)


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
def test_the_dataset_follows_from_the_file(tmp_path: Path, path: str, extra: tuple[str, ...], dataset: str) -> None:
    variant = dataclasses.replace(lookup("vitl16"), depth=1)
    tensors = {name: torch.zeros(1).expand(shape) for name, shape in canonical_shapes(variant).items()}
    state = official_state(variant, tensors) | {key: torch.zeros(variant.embed_dim) for key in extra}
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, tmp_path / path)
    assert load_checkpoint(tmp_path / path, variant).dataset.name == dataset


def test_a_dataset_that_the_variant_was_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "sat493m").mkdir()
    assert load_checkpoint(official_file(tmp_path / "sat493m/a.pth"), SHALLOW).dataset.name == "lvd1689m"

"""What training leaves behind: every layout of one good state gives the same features; anything less is refused."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov3_server.backbone.weights.checkpoint import load_checkpoint
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.errors import CheckpointError
from dinov3_server.families.dinov3_convnext.variants import CONVNEXTS
from dinov3_server.families.dinov3_vit.variants import VitVariant
from dinov3_server.models.interface import Output
from dinov3_server.models.variant import Variant
from tests.server.backbone.convnext_files import (
    NARROW,
    convnext_official_state,
    convnext_timm_state,
    convnext_transformers_state,
)
from tests.server.backbone.features import CPU, picture
from tests.server.backbone.files import SHALLOW, SHALLOW_SWIGLU, official_state, timm_state, transformers_state

State = dict[str, Tensor]

GOOD = official_state(SHALLOW, random_tensors(SHALLOW, 5))
OTHER = official_state(SHALLOW, random_tensors(SHALLOW, 6))
HEADS: State = {
    "dino_head.mlp.0.weight": torch.ones(8, 384),
    "ibot_head.last_layer.weight": torch.ones(8, 4),
    "dino_loss.center": torch.ones(1, 8),
}


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def compiled_blocks(state: State) -> State:
    """The names after `model.blocks[i] = torch.compile(model.blocks[i])`."""
    return {key.replace("norm1.", "_orig_mod.norm1."): tensor for key, tensor in state.items()}


def merged(state: State) -> State:
    """The names after PEFT's `merge_adapter`, once the adapters' own weights are dropped."""
    return {key.replace("attn.qkv.", "attn.qkv.base_layer."): tensor for key, tensor in state.items()}


LAYOUTS: dict[str, Callable[[State, State], dict[str, Any]]] = {
    "Meta's teacher_checkpoint.pth": lambda good, _: {"teacher": under("backbone.", good) | HEADS},
    "Meta's training state": lambda good, other: {
        "iteration": 99,
        "model": under("student.backbone.", other)
        | under("student.", HEADS)
        | under("teacher.backbone.", good)
        | under("model_ema.backbone.", good)
        | under("gram_teacher.backbone.", other),
        "optimizer": {"state": {"student.backbone.norm.weight": {"exp_avg": torch.ones(384), "step": 3.0}}},
    },
    "student and teacher": lambda good, other: {"student": other, "teacher": good, "epoch": 3},
    "student alone": lambda good, _: {"student": under("module.backbone.", good), "epoch": 3},
    "DataParallel": lambda good, _: under("module.", good),
    "torch.compile": lambda good, _: under("_orig_mod.", good),
    "torch.compile of DataParallel": lambda good, _: {"model": under("_orig_mod.module.", good)},
    "compiled blocks": lambda good, _: compiled_blocks(good),
    "backbone and head of a module": lambda good, _: under("backbone.", good) | {"classifier.weight": torch.ones(2, 3)},
    "state_dict": lambda good, _: {"state_dict": good, "epoch": 1},
    "Lightning": lambda good, _: {
        "epoch": 1,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": under("model.backbone.", good) | {"model.head.weight": torch.ones(2, 3)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "hyper_parameters": {"lr": 1e-4},
    },
    "Lightning, one module under two names": lambda good, _: {
        "state_dict": under("backbone.", good) | under("model.backbone.", good)
    },
    "model and EMA": lambda good, other: {"model": other, "model_ema": good, "optimizer": {}},
    "timm's EMA": lambda good, other: {"state_dict": other, "state_dict_ema": good, "args": argparse.Namespace(lr=1)},
    "an averaged model of torch": lambda good, _: under("module.", good) | {"n_averaged": torch.tensor(7)},
    "EMA before teacher": lambda good, other: {"teacher": other, "ema": good},
    "FSDP and activation checkpoints": lambda good, _: {
        key.replace("blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."): tensor
        for key, tensor in good.items()
    },
    "DeepSpeed": lambda good, _: {"module": good, "ds_config": {"zero": 0}, "global_steps": 4},
    "PEFT, merged": lambda good, _: under("base_model.model.", merged(good)),
    "heads beside the backbone": lambda good, _: (
        good | HEADS | {"head.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}
    ),
    "no buffers for rotation": lambda good, _: {k: v for k, v in good.items() if k != "rope_embed.periods"},
    "arguments, paths and numbers": lambda good, _: {
        "model": good,
        "args": argparse.Namespace(output=PosixPath("/data"), best=np.float64(0.5), epochs=np.int64(3)),
        "best": np.float32(0.5),
    },
    "parameters": lambda good, _: {"model": {key: nn.Parameter(tensor) for key, tensor in good.items()}},
}


def features(path: Path, variant: Variant) -> list[Tensor]:
    model = load_checkpoint(path, variant).build(dtype=torch.float32, device=CPU)
    wanted = [Output("cls"), Output("patches"), Output("cls", 1, norm=False)]
    with torch.inference_mode():
        found = model(picture(64, 96), wanted)
    return [found[output] for output in wanted]


def same_features(path: Path, plain: Path, variant: Variant) -> bool:
    loaded, expected = features(path, variant), features(plain, variant)
    return all(torch.equal(one, other) for one, other in zip(loaded, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_features_of_the_plain_file(tmp_path: Path, layout: str) -> None:
    torch.save(GOOD, tmp_path / "plain.pth")
    torch.save(LAYOUTS[layout](GOOD, OTHER), tmp_path / "a.pth")
    assert same_features(tmp_path / "a.pth", tmp_path / "plain.pth", SHALLOW)


@pytest.mark.parametrize(
    "layout", ["Meta's teacher_checkpoint.pth", "Lightning", "model and EMA", "student and teacher"]
)
@pytest.mark.parametrize("format", ["official", "transformers", "timm"])
def test_layouts_of_a_convnext(tmp_path: Path, layout: str, format: str) -> None:
    good, other = random_tensors(NARROW, 5), random_tensors(NARROW, 6)
    write: Callable[[State], State] = {
        "official": convnext_official_state,
        "transformers": lambda tensors: convnext_transformers_state(NARROW, tensors, older=False),
        "timm": lambda tensors: convnext_timm_state(NARROW, tensors) | {"head.fc.weight": torch.ones(2, 3)},
    }[format]
    torch.save(convnext_official_state(good), tmp_path / "plain.pth")
    torch.save(LAYOUTS[layout](write(good), write(other)), tmp_path / "a.pth")
    assert same_features(tmp_path / "a.pth", tmp_path / "plain.pth", NARROW)


@pytest.mark.parametrize("prefix", ["", "backbone.", "base_model.model.", "model.", "module.dinov3."])
@pytest.mark.parametrize("format", ["transformers, older", "transformers, newer", "timm"])
def test_a_prefix_in_the_other_formats(tmp_path: Path, format: str, prefix: str) -> None:
    tensors = random_tensors(SHALLOW, 5)
    state = {
        "transformers, older": lambda: transformers_state(SHALLOW, tensors, older=True),
        "transformers, newer": lambda: transformers_state(SHALLOW, tensors, older=False),
        "timm": lambda: timm_state(SHALLOW, tensors, biases=True),
    }[format]()
    save_file(under(prefix, state) | {"classifier.weight": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    torch.save(official_state(SHALLOW, tensors), tmp_path / "plain.pth")
    assert same_features(tmp_path / "a.safetensors", tmp_path / "plain.pth", SHALLOW)


def test_integers_beside_the_backbone_in_safetensors(tmp_path: Path) -> None:
    save_file(under("model.", GOOD) | {"steps": torch.tensor([7])}, tmp_path / "a.safetensors")
    torch.save(GOOD, tmp_path / "plain.pth")
    assert same_features(tmp_path / "a.safetensors", tmp_path / "plain.pth", SHALLOW)


def test_a_teacher_of_another_size_is_left_out(tmp_path: Path) -> None:
    larger = official_state(SHALLOW_SWIGLU, random_tensors(SHALLOW_SWIGLU, 5))
    torch.save({"teacher": larger, "student": GOOD}, tmp_path / "a.pth")
    torch.save(GOOD, tmp_path / "plain.pth")
    assert same_features(tmp_path / "a.pth", tmp_path / "plain.pth", SHALLOW)


def test_the_log_says_what_was_taken_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(LAYOUTS["Meta's training state"](GOOD, OTHER), tmp_path / "a.pth")
    with caplog.at_level(logging.INFO):
        load_checkpoint(tmp_path / "a.pth", SHALLOW)
    (line,) = caplog.messages
    assert f"a.pth: taken are the {len(GOOD)} tensors under 'model.model_ema.backbone.'; left out: " in line
    n = len(OTHER)
    assert line.endswith(f"model.gram_teacher ({n}), model.student ({n + 3}), model.teacher ({n}), optimizer (1)")


def test_the_log_names_heads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(GOOD | HEADS, tmp_path / "a.pth")
    with caplog.at_level(logging.INFO):
        load_checkpoint(tmp_path / "a.pth", SHALLOW)
    assert "left out: dino_head (1), dino_loss (1), ibot_head (1)" in caplog.text


def test_a_plain_file_is_loaded_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(GOOD, tmp_path / "a.pth")
    with caplog.at_level(logging.INFO):
        load_checkpoint(tmp_path / "a.pth", SHALLOW)
    assert not caplog.messages


def test_missing_periods_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(LAYOUTS["no buffers for rotation"](GOOD, OTHER), tmp_path / "a.pth")
    with caplog.at_level(logging.INFO):
        load_checkpoint(tmp_path / "a.pth", SHALLOW)
    assert "no rope_embed.periods: those of Meta's published models are used" in caplog.text


def without(state: State, *endings: str) -> State:
    return {key: tensor for key, tensor in state.items() if not key.endswith(endings)}


def test_parameters_without_buffers_are_masked_as_the_published_models(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"ema": without(GOOD, ".bias_mask", ".periods")}, tmp_path / "a.pth")
    torch.save(GOOD, tmp_path / "plain.pth")
    with caplog.at_level(logging.INFO):
        assert same_features(tmp_path / "a.pth", tmp_path / "plain.pth", SHALLOW)
    assert "no buffers: the bias of keys is masked to zero" in caplog.text


def lora(state: State) -> State:
    added = {"blocks.0.attn.qkv.lora_A.default.weight": torch.ones(4, 384)}
    return under("base_model.model.", merged(state) | added)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (lora(GOOD), r"adapter \(PEFT, LoRA\) that are not merged .*qkv\.lora_A\.default\.weight\. .*merge_and_unload"),
        (
            under("base_model.model.", {"blocks.0.attn.qkv.lora_A.weight": torch.ones(4, 384)}),
            r"adapter .* not merged into the model's: base_model\.model\.blocks\.0\.attn\.qkv\.lora_A\.weight\.",
        ),
        ({"a": GOOD, "b": OTHER}, r"holds dinov3_vits16 2 times, .* under 'a\.', 'b\.'\. Export the state dict of one"),
        (
            {"teacher": without(GOOD, "norm1.bias")},
            r"in the official layout \(under 'teacher\.'\): 3 missing: blocks\.0\.norm1\.bias \(384\)",
        ),
        (
            {"teacher": under("backbone.", GOOD | {"blocks.0.adapter.weight": torch.ones(3)})},
            r"\(under 'teacher\.backbone\.'\): 1 unexpected: blocks\.0\.adapter\.weight \(3\)",
        ),
        (GOOD | {"cls_norm.weight": torch.ones(384)}, r"1 unexpected: cls_norm\.weight \(384\)"),
        (GOOD | {"pos_embed": torch.ones(1, 197, 384)}, r"1 unexpected: pos_embed \(1, 197, 384\)"),
        (
            GOOD | {"blocks.0._orig_mod.norm1.bias": torch.ones(384)},
            r"1 present under two spellings: 'blocks\.0\.norm1\.bias'",
        ),
        ({"epoch": 3, "args": {"lr": 0.1}}, "holds a dict and not a dictionary of named tensors"),
        ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "holds two tensors named 'a.b'"),
    ],
)
def test_what_is_no_whole_backbone_is_refused(tmp_path: Path, saved: object, message: str) -> None:
    torch.save(saved, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.pth", SHALLOW)


def test_another_variant_under_a_prefix_is_recognized(tmp_path: Path) -> None:
    tiny = CONVNEXTS["dinov3_convnext_tiny"]
    tensors = {name: torch.zeros(1).expand(shape) for name, shape in tiny.canonical_shapes().items()}
    torch.save({"teacher": under("backbone.", convnext_official_state(tensors))}, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=r"holds nothing of dinov3_vits16; .* It looks like dinov3_convnext_tiny\."
    ):
        load_checkpoint(tmp_path / "a.pth", SHALLOW)


def test_dictionaries_that_hold_themselves_end(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"model": GOOD}
    loop["again"] = loop
    torch.save(loop, tmp_path / "a.pth")
    torch.save(GOOD, tmp_path / "plain.pth")
    assert same_features(tmp_path / "a.pth", tmp_path / "plain.pth", SHALLOW)


class Config:
    """As of a configuration library."""


def test_a_file_with_other_classes_names_them(tmp_path: Path) -> None:
    torch.save({"model": GOOD, "config": Config(), "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"other than tensors \(\S*Config\), .* export the state dict alone$"):
        load_checkpoint(tmp_path / "a.pth", SHALLOW)


def recipe(seed: int = 5) -> tuple[dict[str, Tensor], State]:
    """Canonical tensors of Meta's default configuration, without registers and key masks, and the file's."""
    variant = dataclasses.replace(SHALLOW, registers=0, key_bias=True)
    tensors = random_tensors(variant, seed)
    return tensors, official_state(variant, tensors)


def test_metas_recipe_without_registers_and_key_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors, state = recipe()
    torch.save({"teacher": under("backbone.", state) | HEADS}, tmp_path / "a.pth")
    with caplog.at_level(logging.INFO):
        checkpoint = load_checkpoint(tmp_path / "a.pth", SHALLOW)
    variant = checkpoint.variant
    assert isinstance(variant, VitVariant)
    assert (variant.registers, variant.key_bias, variant.norm_eps) == (0, True, 1e-6)
    assert variant.parameters == SHALLOW.parameters - 4 * 384
    assert {"blocks.0.attn.k.bias", "blocks.2.attn.k.bias"} < checkpoint.tensors.keys()
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in tensors.items() if tensor.numel())
    assert "no registers (n_storage_tokens: 0)" in caplog.text
    assert "keys have a bias (mask_k_bias: false), and norms the epsilon 1e-06" in caplog.text
    again = load_checkpoint(tmp_path / "a.pth", variant)
    assert again.variant == variant
    assert again.tensors.keys() == checkpoint.tensors.keys()


def test_the_recipe_serves_cls_and_patches(tmp_path: Path) -> None:
    _, state = recipe()
    torch.save(state, tmp_path / "a.pth")
    model = load_checkpoint(tmp_path / "a.pth", SHALLOW).build(dtype=torch.float32, device=CPU)
    outputs = [Output("cls"), Output("patches")]
    images = picture(64, 96)
    found = model(images, outputs)
    assert [tuple(found[output].shape) for output in outputs] == [(1, 384), (1, 24, 384)]
    with pytest.raises(ValueError, match="no output kind 'registers'"):
        model(images, [Output("registers")])
    state["blocks.1.attn.qkv.bias"][384:768] += 1  # of keys
    torch.save(state, tmp_path / "b.pth")
    other = load_checkpoint(tmp_path / "b.pth", SHALLOW).build(dtype=torch.float32, device=CPU)(images, outputs)
    assert not torch.equal(found[outputs[0]], other[outputs[0]]), "the bias of keys is used"

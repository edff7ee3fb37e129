"""UpstreamModel: imports from the checkout, weights under Meta's keys, and features."""

from __future__ import annotations

import dataclasses
import os
import py_compile
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import cache_from_source
from pathlib import Path

import pytest
import torch

from dinov3_server.backbone.parity.upstream import UpstreamModel, load_upstream, official_tensors
from dinov3_server.backbone.weights.checkpoint import Checkpoint, load_checkpoint
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.errors import UpstreamCodeError
from dinov3_server.families.dinov3_vit.variants import VitVariant
from dinov3_server.families.registry import lookup
from dinov3_server.models.interface import Output
from dinov3_server.models.variant import DATASETS
from tests.server.backbone.features import CPU, every_output, normalized, ours, picture, worst_cosine, worst_error
from tests.server.backbone.files import SHALLOW, SHALLOW_SWIGLU, official_state, transformers_state
from tests.support.upstream_code import write_checkout

TINY = dataclasses.replace(lookup("vits16"), embed_dim=64, depth=2, heads=2, ffn_dim=128)


@pytest.fixture(autouse=True)
def _forget_what_was_imported() -> Iterator[None]:
    finders, environment = list(sys.meta_path), dict(os.environ)
    yield
    sys.meta_path[:] = finders
    os.environ.clear()
    os.environ.update(environment)
    for name in [name for name in sys.modules if name.partition(".")[0] == "dinov3"]:
        del sys.modules[name]


def checkpoint(folder: Path, variant: VitVariant = TINY) -> Checkpoint:
    torch.save(official_state(variant, random_tensors(variant, 5)), folder / "weights.pth")
    return load_checkpoint(folder / "weights.pth", variant)


def test_every_output_equals_the_native_models(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path)
    theirs = UpstreamModel(write_checkout(tmp_path / "code"), weights, dtype=torch.float32, device=CPU)
    model = ours(TINY, dict(weights.tensors))
    images = picture(64, 96, count=2)
    for pixels in (images, normalized(images)):
        for wanted in (every_output(TINY.depth), [Output("cls")], [Output("patches", 0, norm=False)], []):
            with torch.inference_mode():
                expected = theirs(pixels, wanted)
            assert list(expected) == wanted or set(expected) == set(wanted)
            assert all(tokens.dtype == torch.float32 for tokens in expected.values())
            if wanted:
                assert worst_error(model, pixels, expected) <= 1e-5


def test_bfloat16_equals_autocast(tmp_path: Path) -> None:
    """Weights of matrix products are rounded at load; the features equal those of autocast with float32 weights."""
    weights, code = checkpoint(tmp_path), write_checkout(tmp_path / "code")
    pixels, wanted = normalized(picture(64, 96)), [Output("cls"), Output("patches")]
    half = UpstreamModel(code, weights, dtype=torch.bfloat16, device=CPU)
    module = load_upstream(code, weights, CPU)
    with torch.inference_mode():
        features = half(pixels, wanted)
        exact = module.forward_features(pixels)
        with torch.autocast("cpu", torch.bfloat16):
            cast = module.forward_features(pixels)
    assert torch.equal(features[wanted[0]], cast["x_norm_clstoken"].float())
    assert torch.equal(features[wanted[1]], cast["x_norm_patchtokens"].float())
    assert 0.999 < worst_cosine(features[wanted[1]], exact["x_norm_patchtokens"]) < 0.9999999


@pytest.mark.parametrize("variant", [SHALLOW, SHALLOW_SWIGLU, dataclasses.replace(SHALLOW, qkv_bias=False)])
def test_translated_weights_equal_those_of_an_official_file(variant: VitVariant) -> None:
    tensors = random_tensors(variant, 1)
    translated = official_tensors(Checkpoint(variant, DATASETS["lvd1689m"], tensors | variant.constants()))
    expected = official_state(variant, tensors)
    del expected["mask_token"]  # unused
    for i in range(variant.depth if variant.qkv_bias else 0):
        expected[f"blocks.{i}.attn.qkv.bias"] *= expected[f"blocks.{i}.attn.qkv.bias_mask"]
    assert translated.keys() == expected.keys()
    assert all(torch.equal(translated[key], expected[key]) for key in expected)


def test_an_official_files_own_tensors_are_loaded_untranslated(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path)
    stored = torch.load(tmp_path / "weights.pth")
    loaded = official_tensors(weights)
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[key], stored[key]) for key in stored)
    # Independently of the canonical ones.
    broken = dataclasses.replace(weights, tensors={name: tensor + 1 for name, tensor in weights.tensors.items()})
    module = load_upstream(write_checkout(tmp_path / "code"), broken, CPU)
    assert torch.equal(module.norm.weight, stored["norm.weight"])
    # The key bias, which the mask disables, is loaded as in the file.
    assert float(module.blocks[0].attn.qkv.bias[TINY.embed_dim]) == 3.0


def test_unused_tensors_are_optional(tmp_path: Path) -> None:
    state = official_state(TINY, random_tensors(TINY, 5))
    del state["mask_token"]
    state |= {"local_cls_norm.weight": torch.ones(64), "local_cls_norm.bias": torch.ones(64)}
    torch.save(state, tmp_path / "weights.pth")
    module = load_upstream(write_checkout(tmp_path / "code"), load_checkpoint(tmp_path / "weights.pth", TINY), CPU)
    assert not module.mask_token.any()
    assert not hasattr(module, "local_cls_norm")


def test_a_transformers_file_in_half_precision(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.bfloat16() for name, tensor in random_tensors(TINY, 5).items()}
    state = {
        key: tensor.bfloat16().contiguous() for key, tensor in transformers_state(TINY, tensors, older=True).items()
    }
    save_file(state, tmp_path / "model.safetensors")
    weights = load_checkpoint(tmp_path / "model.safetensors", TINY)
    theirs = UpstreamModel(write_checkout(tmp_path / "code"), weights, dtype=torch.float32, device=CPU)
    images = picture(64, 96)
    with torch.inference_mode():
        expected = theirs(images, every_output(TINY.depth))
    assert worst_error(ours(TINY, dict(weights.tensors)), images, expected) <= 1e-5


def test_only_sources_are_read_and_nothing_is_written(tmp_path: Path) -> None:
    """A __pycache__ with other code is ignored, and the checkout is not changed."""
    code = write_checkout(tmp_path / "code")
    source = code / "dinov3" / "hub" / "backbones.py"
    other = tmp_path / "other.py"
    other.write_text("def dinov3_vits16(**_):\n    raise RuntimeError('compiled from something else')\n")
    # Unchecked: Python would use it without comparing it with the source.
    py_compile.compile(
        str(other),
        cache_from_source(str(source)),
        doraise=True,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    before = {path: path.stat().st_mtime_ns for path in code.rglob("*")}
    assert load_upstream(code, checkpoint(tmp_path), CPU).norm.weight.numel() == 64
    assert {path: path.stat().st_mtime_ns for path in code.rglob("*")} == before


def test_importing_creates_no_compiler_cache_folder(tmp_path: Path) -> None:
    """A read-only container has no /tmp: Meta's imports must not need one."""
    code, temporary = write_checkout(tmp_path / "code", "import torch._dynamo"), tmp_path / "temporary"
    temporary.mkdir()
    program = "import sys; from pathlib import Path; from dinov3_server.backbone.parity.upstream import _import_from; "
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    subprocess.run(
        [sys.executable, "-c", f"{program}_import_from(Path(sys.argv[1])); import torch._dynamo", str(code)],
        env=environment | {"TMPDIR": str(temporary)},
        check=True,
    )
    assert list(temporary.iterdir()) == []


def test_an_installed_package_of_the_same_name_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(write_checkout(tmp_path / "elsewhere", "SCALE = 2.0"))
    module = load_upstream(write_checkout(tmp_path / "code"), checkpoint(tmp_path), CPU)
    assert module.forward_features.__globals__["SCALE"] == 1.0
    assert str(tmp_path / "code") not in sys.path


def test_the_checkout_may_be_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkout(tmp_path / "code")
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "code")
    monkeypatch.chdir(tmp_path / "here")
    weights = checkpoint(tmp_path)
    for code in ("../code", "../link"):
        load_upstream(Path(code), weights, CPU)


def test_a_second_checkout_in_one_process_is_refused(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path)
    load_upstream(write_checkout(tmp_path / "code"), weights, CPU)
    with pytest.raises(UpstreamCodeError, match=r"this process has dinov3 from .*code/dinov3/hub/backbones.py already"):
        load_upstream(write_checkout(tmp_path / "other"), weights, CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("import dinov3.layers", "no module 'dinov3.layers' in "),
        ("del dinov3_vits16", "has no attribute 'dinov3_vits16'"),
        ("DEPTH = 3", r"Missing key\(s\) in state_dict: \"blocks.2"),
        ("DEPTH = 1", r"Unexpected key\(s\) in state_dict: \"blocks.1"),
        ("WIDTH = 32", "size mismatch for cls_token"),
    ],
)
def test_unusable_code_is_an_upstream_code_error(tmp_path: Path, changes: str, message: str) -> None:
    code = write_checkout(tmp_path / "code", changes)
    with pytest.raises(UpstreamCodeError, match=message) as refused:
        load_upstream(code, checkpoint(tmp_path), CPU)
    assert f"Meta's code in {code} does not make dinov3_vits16" in str(refused.value)


def test_a_folder_without_the_code_is_an_upstream_code_error(tmp_path: Path) -> None:
    with pytest.raises(UpstreamCodeError, match="no module 'dinov3' in "):
        load_upstream(tmp_path / "nowhere", checkpoint(tmp_path), CPU)

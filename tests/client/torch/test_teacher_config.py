"""The configuration of RemoteDinoV3Teacher: what its keys may be, and the model that it must name."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dinov3_client import Client, ModelMismatch
from dinov3_client.testing import MODEL, FakeServer
from dinov3_client.torch import RemoteDinoV3Teacher
from tests.support.waiting import LIMIT


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, deadline=LIMIT) as client:
        yield client


def make(client: Client, config: Any) -> RemoteDinoV3Teacher:
    return RemoteDinoV3Teacher(config, client=client)


def test_the_configuration_may_be_a_file(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "dinov3.yaml"
    path.write_text(
        'name: "DinoV3Teacher"\nmodel_type: "vit_small"\npretrained: true\nfreeze_teacher: true\n'
        'checkpoint_path: "weights/dinov3_vits16.pth"\npatch_size: 16\nextract_cls_token: true\n'
        'extract_patch_tokens: false\ndevice: "cpu"\nfeature_output_dir: "teacher_features/dino/"\nformat: "npz"\n'
    )
    teacher = make(client, path)
    assert teacher.get_feature_types() == ["cls_token"]
    assert teacher.get_model_info()["model_type"] == "vit_small"
    assert make(client, str(path)).get_feature_types() == ["cls_token"]
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="holds no mapping"):
        make(client, path)


def test_a_file_without_pyyaml_is_a_clear_error(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match="pip install pyyaml"):
        make(client, tmp_path / "dinov3.yaml")


@pytest.mark.parametrize("key", ["small", "vit_small", "vits16", "dinov3_vits16", "dinov3-vits16", "DINOv3_ViTS16"])
def test_names_of_the_model(client: Client, key: str) -> None:
    make(client, {"model_type": key, "device": "cpu"})


@pytest.mark.parametrize(
    ("weights", "path"),
    [
        ("dinov3_vits16.pth", "weights/dinov3_vits16.pth"),
        ("/models/dinov3_vits16.pth", Path("/home/me/dinov3_vits16.pth")),
        ("dinov3_vits16.pth", "f00d"),
        ("dinov3_vits16.pth", "dinov3_vits16"),
        ("hf://facebook/dinov3-vits16@abc", "facebook/dinov3-vits16"),
        ("hf://facebook/dinov3-vits16@abc", "hf://facebook/dinov3-vits16"),
        ("hf://facebook/dinov3-vits16@abc", "hf://facebook/dinov3-vits16@abc"),
        ("random:7", "random:7"),
        ("hf://facebook/dinov3-vits16-pretrain-lvd1689m@a1", "w/dinov3_vits16_pretrain_lvd1689m-08c60483.pth"),
        ("/w/dinov3_vits16_pretrain_lvd1689m-08c60483.pth", "facebook/dinov3-vits16-pretrain-lvd1689m"),
    ],
)
def test_names_of_the_weights(server: FakeServer, client: Client, weights: str, path: object) -> None:
    server.model = replace(MODEL, weights=weights)
    make(client, {"checkpoint_path": path, "device": "cpu"})


@pytest.mark.parametrize(
    ("config", "named", "weights"),
    [
        ({"model_type": "vit_base"}, "model_type is 'vit_base'", "dinov3_vits16.pth"),
        ({"model_type": "vit_giant2"}, "no giant2", "dinov3_vits16.pth"),
        ({"patch_size": 14}, "patch_size is 14", "dinov3_vits16.pth"),
        ({"checkpoint_path": "weights/other.pth"}, "checkpoint_path is 'weights/other.pth'", "dinov3_vits16.pth"),
        ({"checkpoint_path": "dinov3_vits14_pretrain.pth"}, "a name of DINOv2", "dinov3_vits16.pth"),
        ({"checkpoint_path": "f00"}, "checkpoint_path is 'f00'", "dinov3_vits16.pth"),
        ({"checkpoint_path": "other/dinov3-vits16"}, "checkpoint_path", "hf://facebook/dinov3-vits16@abc"),
        ({"checkpoint_path": "facebook/dinov3-vitb16"}, "checkpoint_path", "hf://facebook/dinov3-vits16@abc"),
        ({"checkpoint_path": "hf://facebook/dinov3-vits16@abd"}, "checkpoint", "hf://facebook/dinov3-vits16@abc"),
        ({"checkpoint_path": "dinov3_vits16.pth"}, "checkpoint_path is 'dinov3_vits16.pth'", "random:0"),
        (
            {"checkpoint_path": "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth"},
            "checkpoint_path is 'dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth'",
            "hf://facebook/dinov3-vitl16-pretrain-sat493m@a1",
        ),
    ],
)
def test_another_model_than_is_named_is_refused_with_both_named(
    server: FakeServer, client: Client, config: dict[str, Any], named: str, weights: str
) -> None:
    server.model = replace(MODEL, weights=weights)
    with pytest.raises(ModelMismatch, match=named) as caught:
        make(client, config)
    assert f"the server serves dinov3_vits16 with the weights '{weights}' (fingerprint f00d)" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "kind", "problem"),
    [
        (types.SimpleNamespace(device="cpu"), TypeError, "config is a SimpleNamespace; .* such as vars"),
        ({"extract_cls_token": "no"}, TypeError, "extract_cls_token is 'no' in the configuration; it must be bool"),
        ({"patch_size": True}, TypeError, "patch_size is True"),
        ({"model_type": 5}, TypeError, "model_type is 5"),
        ({"extract_cls_token": False, "extract_patch_tokens": False}, ValueError, "nothing to extract"),
        ({"device": "gpu"}, ValueError, "device is 'gpu', which cannot be used here"),
    ],
)
def test_a_wrong_configuration(client: Client, config: Any, kind: type[Exception], problem: str) -> None:
    with pytest.raises(kind, match=problem):
        make(client, config)


# The keys that distillation code gives its teachers, whatever else they are for.
KEYS_OF_OTHERS = {
    "name": "DINOv3",
    "batch_size": 32,
    "num_workers": 8,
    "model_name": "facebook/dinov3-vits16-pretrain-lvd1689m",
    "dinov3_repo_path": "dinov3",
    "dinov3_weights_path": "dinov3.pth",
    "dinov3_model_type": "dinov3_vits16",
    "ckpt_path": None,
    "mean": (0.485, 0.456, 0.406),
    "img_size": 592,
    "layers": [5, 7, 9, 11],
    "freeze_teacher": True,
    "enable_visualization": False,
    "vis_output_dir": "teacher_features/visualizations",
    "precision": "bf16-mixed",
    5: "five",
}


def test_keys_of_other_code_are_ignored(client: Client) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(client, KEYS_OF_OTHERS | {"device": "auto"}).to("cpu")
        make(client, {"batch_size": 8, "device": "cpu", "patch_sizes": [16], "patch_size": 16})


def test_keys_that_look_misspelt_are_warned_of_once(client: Client) -> None:
    with pytest.warns(UserWarning, match="ignores these keys") as caught:
        make(client, {"extract_cls_tokn": False, "patch_sizes": 16, "batch_size": 8, "device": "cpu"})
    assert [str(each.message) for each in caught] == [
        "the teacher ignores these keys of its configuration: 'extract_cls_tokn' (did you mean 'extract_cls_token'?), "
        "'patch_sizes' (did you mean 'patch_size'?)"
    ]
    assert caught[0].filename == __file__

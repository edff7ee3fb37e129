"""RemoteDinoV3Teacher: the calls of existing distillation code, its configuration, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dinov3_client import Client, InvalidRequest, ModelMismatch
from dinov3_client.testing import MODEL, FakeServer, expected
from dinov3_client.torch import RemoteDinoV3Teacher
from tests.support.waiting import LIMIT

GENERATOR = np.random.default_rng(3)
PIXELS: NDArray[np.uint8] = GENERATOR.integers(0, 256, (3, 32, 48, 3), np.uint8)
NORMALIZED = GENERATOR.normal(size=(3, 3, 32, 48)).astype(np.float32)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, deadline=LIMIT) as client:
        yield client


def make(client: Client, config: Any = None, **options: Any) -> RemoteDinoV3Teacher:
    return RemoteDinoV3Teacher({"device": "cpu"} if config is None else config, client=client, **options)


def check(features: dict[str, torch.Tensor], images: Any) -> None:
    """Features of all images, exactly: the teacher was made with dtype="float32"."""
    assert list(features) == ["cls_token", "patch_tokens"]
    for name, kind in (("cls_token", "cls"), ("patch_tokens", "patches")):
        tensor = features[name]
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
        np.testing.assert_array_equal(tensor.numpy(), [expected(image, kind) for image in images])  # type: ignore[arg-type]


def test_features_of_pixels_in_either_layout_as_arrays_and_tensors(client: Client) -> None:
    planes = np.ascontiguousarray(PIXELS.transpose(0, 3, 1, 2))
    teacher = make(client, dtype="float32")
    check(teacher.extract_features(planes), PIXELS)
    check(teacher.extract_features(torch.from_numpy(planes)), PIXELS)
    check(teacher(torch.from_numpy(planes)), PIXELS)
    teacher = make(client, dtype="float32", layout="BHWC")
    check(teacher.extract_features(PIXELS), PIXELS)
    check(teacher(torch.from_numpy(PIXELS)), PIXELS)
    check(teacher(PIXELS[1]), PIXELS[1:2])


def test_floating_point_is_normalized_already_and_sent_as_float32(client: Client) -> None:
    teacher = make(client, dtype="float32")
    check(teacher(NORMALIZED), NORMALIZED)
    check(teacher(NORMALIZED.astype(np.float64)), NORMALIZED)
    check(teacher(torch.from_numpy(NORMALIZED).requires_grad_()), NORMALIZED)
    check(teacher(torch.from_numpy(NORMALIZED[0])), NORMALIZED[:1])
    half = torch.from_numpy(NORMALIZED).bfloat16()
    check(teacher(half), half.float().numpy())
    teacher = make(client, dtype="float32", layout="BHWC")
    check(teacher(torch.from_numpy(NORMALIZED).permute(0, 2, 3, 1)), NORMALIZED)


def test_patches_have_no_registers_among_them(server: FakeServer, client: Client) -> None:
    features = make(client, layout="BHWC")(PIXELS)
    assert features["patch_tokens"].shape == (3, 2 * 3, MODEL.embed_dim)
    assert features["cls_token"].shape == (3, MODEL.embed_dim)
    assert not server.requests[-1].outputs.registers


def test_features_that_are_not_extracted_are_not_requested(server: FakeServer, client: Client) -> None:
    teacher = make(client, {"extract_cls_token": False, "device": "cpu"}, layout="BHWC")
    assert list(teacher(PIXELS)) == teacher.get_feature_types() == ["patch_tokens"]
    assert teacher.get_feature_dims() == {"patch_tokens": 24}
    assert not server.requests[-1].outputs.cls
    teacher = make(client, {"extract_patch_tokens": False, "device": "cpu"}, layout="BHWC")
    assert list(teacher(PIXELS)) == ["cls_token"]
    assert not server.requests[-1].outputs.patches


@pytest.mark.parametrize(
    ("layout", "images", "problem"),
    [
        ("BCHW", PIXELS, r"shape \[3, 32, 48, 3\]; with layout='BCHW' it must be \[B, 3, H, W\]"),
        ("BHWC", NORMALIZED, r"shape \[3, 3, 32, 48\]; with layout='BHWC' it must be \[B, H, W, 3\]"),
        ("BHWC", PIXELS[0, 0], r"shape \[48, 3\]"),
        ("BHWC", np.zeros((1, 2, 32, 32, 3), np.uint8), "shape"),
    ],
)
def test_another_layout_than_declared_is_refused(client: Client, layout: Any, images: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make(client, layout=layout)(images)


def test_invalid_images_are_refused(client: Client) -> None:
    teacher = make(client)
    with pytest.raises(TypeError, match="images are of int64; they must be uint8"):
        teacher(torch.zeros((1, 3, 32, 32), dtype=torch.int64))
    with pytest.raises(TypeError, match="images is a list; it must be a tensor or an array"):
        teacher([PIXELS])
    with pytest.raises(InvalidRequest, match="multiple"):  # nothing is resized
        teacher(np.zeros((1, 3, 518, 518), np.uint8))
    with pytest.raises(ValueError, match="layout has 'HWC'"):
        make(client, layout="HWC")


@pytest.mark.parametrize("images", [PIXELS.astype(np.float32), -PIXELS.astype(np.float64), (PIXELS + 1.0) * np.inf])
def test_floats_that_cannot_be_normalized_are_refused(server: FakeServer, client: Client, images: Any) -> None:
    teacher = make(client, layout="BHWC")
    with pytest.raises(ValueError, match=r"from .* to .*; .* normalized .* -2\.12 \(black\) to 2\.64 \(white\)\. Give"):
        teacher(images)
    assert server.requests == []


def test_floats_that_look_as_if_they_were_not_normalized_are_warned_of(client: Client) -> None:
    teacher = make(client, layout="BHWC", dtype="float32")
    images = (PIXELS / 255).astype(np.float32)
    told: set[str] = set()
    for given in (images, images / 2):
        with pytest.warns(UserWarning, match="values of images are within 0 to 1; .* Are these normalized") as caught:
            check(teacher(given), given.transpose(0, 3, 1, 2))
        told.add(str(caught[0].message))
    assert len(told) == 1  # else Python would show it for each batch
    for known in (np.zeros_like(images), (images - 0.45) / 0.22):  # without a warning
        check(teacher(known), known.transpose(0, 3, 1, 2))


def test_its_description_of_the_model(client: Client) -> None:
    teacher = make(client)
    assert teacher.get_feature_types() == ["cls_token", "patch_tokens"]
    assert teacher.get_feature_dims() == {"cls_token": 24, "patch_tokens": 24}
    assert teacher.get_feature_strides() == [16]
    info = teacher.get_model_info()
    assert info["model_name"] == info["model_type"] == "dinov3_vits16"
    assert info["checkpoint_path"] == info["weights"] == "dinov3_vits16.pth"
    assert info["patch_size"] == 16
    assert info["feature_dims"] == teacher.get_feature_dims()
    assert info["num_parameters"] == MODEL.parameters
    assert info["num_trainable_parameters"] == 0
    assert "dinov3_vits16" in repr(teacher)


def test_its_description_of_a_convnext(server: FakeServer, client: Client) -> None:
    server.model = replace(
        MODEL,
        name="dinov3_convnext_tiny",
        layer_dims=(20, 40),
        layer_strides=(4, 32),
        register_tokens=0,
    )
    teacher = make(client, {"model_type": "convnext_tiny", "device": "cpu"})
    assert teacher.get_feature_dims() == {"cls_token": 40, "patch_tokens": 40}
    assert teacher.get_feature_strides() == [32]
    assert teacher(np.zeros((2, 3, 64, 96), np.uint8))["patch_tokens"].shape == (2, 2 * 3, 40)


def test_it_is_a_module_without_parameters(client: Client) -> None:
    teacher = make(client, layout="BHWC", dtype="float32")
    assert list(teacher.parameters()) == []
    assert teacher.state_dict() == {}
    student = torch.nn.ModuleDict({"teacher": teacher, "student": torch.nn.Linear(2, 2)})
    student.train().requires_grad_(True)
    check(teacher.eval()(PIXELS), PIXELS)
    assert teacher.half()(PIXELS)["cls_token"].dtype == torch.float16
    assert teacher.to(torch.bfloat16)(PIXELS)["patch_tokens"].dtype == torch.bfloat16
    assert teacher.to("meta")(PIXELS)["cls_token"].device.type == "meta"


def test_a_copy_works(client: Client) -> None:
    check(copy.deepcopy(make(client, layout="BHWC", dtype="float32"))(PIXELS), PIXELS)


def test_another_model_behind_the_same_address_is_refused(server: FakeServer, client: Client) -> None:
    teacher = make(client, layout="BHWC")
    teacher(PIXELS)
    server.model = replace(MODEL, fingerprint="beef")
    for _ in range(2):  # however often it is tried
        with pytest.raises(ModelMismatch):
            teacher(PIXELS)


def test_one_server_is_named(server: FakeServer, client: Client) -> None:
    teacher = RemoteDinoV3Teacher({"device": "cpu"}, target=server.target, layout="BHWC", dtype="float32")
    check(teacher(PIXELS), PIXELS)
    with pytest.raises(ValueError, match="one of the two"):
        RemoteDinoV3Teacher({})
    with pytest.raises(ValueError, match="one of the two"):
        RemoteDinoV3Teacher({}, client=client, target=server.target)


def test_saved_features(client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "teacher_features" / "dino"
    teacher = make(client, {"feature_output_dir": str(folder), "device": "cpu"}, layout="BHWC", dtype="float32")
    features = teacher.extract_features(PIXELS, image_ids=["a", "b.jpg", "c"], save_features=True)
    check(features, PIXELS)
    names = [f"{name}_dinov3_features.npz" for name in ("a", "b.jpg", "c")]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name, image in zip(names, PIXELS, strict=True):
        with np.load(folder / name) as saved:
            assert sorted(saved) == ["cls_token", "patch_tokens"]
            assert saved["cls_token"].dtype == np.float32
            np.testing.assert_array_equal(saved["cls_token"], expected(image, "cls"))
            np.testing.assert_array_equal(saved["patch_tokens"], expected(image, "patches"))
    teacher.extract_features(PIXELS, image_ids=["x", "y", "z"])  # not asked to be saved
    assert len(list(folder.iterdir())) == 3
    narrow = make(client, {"feature_output_dir": tmp_path, "device": "cpu", "extract_patch_tokens": False})
    features = narrow.half().extract_features(NORMALIZED[:1], ["a"], save_features=True)
    with np.load(tmp_path / names[0]) as saved:
        assert list(saved) == ["cls_token"]
        assert saved["cls_token"].dtype == np.float32
        np.testing.assert_array_equal(saved["cls_token"], features["cls_token"][0].float())


def test_a_file_that_cannot_be_written_whole_is_not_there(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make(client, {"feature_output_dir": tmp_path, "device": "cpu"}, layout="BHWC")
    teacher.extract_features(PIXELS[:1], ["a"], save_features=True)
    before = (tmp_path / "a_dinov3_features.npz").read_bytes()

    def half(file: Any, **_: object) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(OSError, match="no space left"):
        teacher.extract_features(PIXELS[1:], ["a", "b"], save_features=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a_dinov3_features.npz"]
    assert (tmp_path / "a_dinov3_features.npz").read_bytes() == before


@pytest.mark.parametrize("name", ["../a", "/etc/a", "a/b", "..\\a", "", "a\0"])
def test_names_that_leave_the_folder_are_refused(server: FakeServer, client: Client, tmp_path: Path, name: str) -> None:
    teacher = make(client, {"feature_output_dir": tmp_path / "in", "device": "cpu"}, layout="BHWC")
    with pytest.raises(ValueError, match="not a plain file name"):
        teacher.extract_features(PIXELS, ["a", "b", name], save_features=True)
    assert server.requests == []
    assert list(tmp_path.iterdir()) == []


def test_names_may_be_whole_numbers(client: Client, tmp_path: Path) -> None:
    """As a DataLoader collates them."""
    teacher = make(client, {"feature_output_dir": tmp_path, "device": "cpu"}, layout="BHWC")
    given: list[Any] = [torch.tensor([4, 5, 6]), np.array([7, 8, 9]), [10, np.str_("11"), "12"]]
    for ids in given:
        teacher.extract_features(PIXELS, ids, save_features=True)
    assert {path.name.removesuffix("_dinov3_features.npz") for path in tmp_path.iterdir()} == set(
        map(str, range(4, 13))
    )
    for name in (None, 1.5, b"a", torch.tensor(1.5)):
        with pytest.raises(TypeError, match="it must be str or int"):
            teacher.extract_features(PIXELS[:1], cast(Any, [name]), save_features=True)


@pytest.mark.parametrize(
    ("ids", "problem"),
    [(None, "given: none"), (["a"], "3 images; given: 1"), ("abc", "given: 'abc'"), (["a", "b", "a"], "'a' twice")],
)
def test_every_image_needs_a_name_of_its_own(client: Client, tmp_path: Path, ids: Any, problem: str) -> None:
    teacher = make(client, {"feature_output_dir": tmp_path, "device": "cpu"}, layout="BHWC")
    with pytest.raises(ValueError, match=problem):
        teacher.extract_features(PIXELS, ids, save_features=True)


def test_saving_needs_a_folder(client: Client) -> None:
    with pytest.raises(ValueError, match="feature_output_dir"):
        make(client, layout="BHWC").extract_features(PIXELS, ["a", "b", "c"], save_features=True)

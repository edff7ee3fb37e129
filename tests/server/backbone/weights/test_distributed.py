"""Folders of torch.distributed.checkpoint: read chunk by chunk, and without running what their pickle names."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from dinov3_server.backbone.weights.checkpoint import load_checkpoint
from dinov3_server.backbone.weights.distributed import DistributedTensors
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.backbone.weights.tensor_files import read_tensors
from dinov3_server.errors import CheckpointError
from tests.server.backbone.convnext_files import NARROW, convnext_official_state
from tests.server.backbone.files import SHALLOW, official_state

SMALL = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4), "steps": 7}


def save(state: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is only one process
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def training_state(good: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Any]:
    """As `dinov3/checkpointer` of Meta's training saves it."""
    model = {f"student.backbone.{key}": tensor for key, tensor in other.items()}
    for name in ("teacher", "model_ema"):
        model |= {f"{name}.backbone.{key}": tensor for key, tensor in good.items()}
    model["student.dino_head.last_layer.weight"] = torch.ones(8, 4)
    moments = {f"student.backbone.{key}": {"exp_avg": tensor} for key, tensor in other.items()}
    return {"iteration": 199, "model": model, "optimizer": {"state": moments}}


def test_metas_training_state(tmp_path: Path) -> None:
    tensors = random_tensors(SHALLOW, 5)
    good, other = official_state(SHALLOW, tensors), official_state(SHALLOW, random_tensors(SHALLOW, 6))
    folder = save(training_state(good, other), tmp_path / "199")
    loaded = load_checkpoint(folder, SHALLOW)
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors.items())
    assert loaded.official is not None


def test_metas_sharded_teacher_of_a_convnext(tmp_path: Path) -> None:
    tensors = random_tensors(NARROW, 5)
    state = {f"backbone.{key}": tensor for key, tensor in convnext_official_state(tensors).items()}
    folder = save({"iteration": 199, "model": state}, tmp_path / "sharded_teacher_checkpoint")
    loaded = load_checkpoint(folder, NARROW).tensors
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_only_the_backbone_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, other = (official_state(SHALLOW, random_tensors(SHALLOW, seed)) for seed in (5, 6))
    folder = save(training_state(good, other), tmp_path / "199")
    read: list[str] = []
    look_up = DistributedTensors.__getitem__
    monkeypatch.setattr(DistributedTensors, "__getitem__", lambda self, key: read.append(key) or look_up(self, key))
    load_checkpoint(folder, SHALLOW)
    assert set(read) == {f"model.model_ema.backbone.{key}" for key in good}


def rewrite(folder: Path, change: Callable[[Any], None]) -> None:
    """Change the unpickled `.metadata`."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_chunks_of_several_processes(tmp_path: Path) -> None:
    """Each process writes its rows into a file of its own."""
    whole = torch.arange(24.0).reshape(6, 4)
    folder = save({"a": whole[:4].clone()}, tmp_path / "a")
    rest = save({"a": whole[4:].clone()}, tmp_path / "b")
    (rest / "__0_0.distcp").rename(folder / "__1_0.distcp")
    theirs = pickle.loads((rest / ".metadata").read_bytes())

    def add(metadata: Any) -> None:
        metadata.state_dict_metadata["a"].size = torch.Size((6, 4))
        (stored,) = theirs.storage_data.values()
        stored.relative_path = "__1_0.distcp"
        metadata.storage_data[MetadataIndex("a", torch.Size((4, 0)))] = stored

    rewrite(folder, add)
    assert torch.equal(read_tensors(folder)["a"], whole)


class Code:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return exec, ("raise SystemExit('it ran')",)


def test_code_in_the_metadata_is_not_run(tmp_path: Path) -> None:
    folder = save(SMALL, tmp_path / "a")
    rewrite(folder, lambda metadata: setattr(metadata, "planner_data", Code()))
    assert torch.equal(read_tensors(folder)["a"], SMALL["a"])
    (folder / ".metadata").write_bytes(pickle.dumps(Code()))
    with pytest.raises(CheckpointError, match=r"\.metadata: damaged, or not of a checkpoint of torch\.distributed"):
        read_tensors(folder)


def test_code_in_a_tensor_is_not_run(tmp_path: Path) -> None:
    folder = save(SMALL, tmp_path / "a")
    torch.save(Code(), folder / "__0_0.distcp")
    size = (folder / "__0_0.distcp").stat().st_size

    def point(metadata: Any) -> None:
        for stored in metadata.storage_data.values():
            stored.offset, stored.length = 0, size

    rewrite(folder, point)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: a cannot be read"):
        read_tensors(folder)["a"]


def test_bytes_that_are_no_tensor_are_not_read(tmp_path: Path) -> None:
    assert set(read_tensors(save(SMALL | {"code": Code}, tmp_path / "a"))) == {"a", "b"}


def stored_of(metadata: Any, key: str) -> Any:
    return next(stored for index, stored in metadata.storage_data.items() if index.fqn == key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(stored_of(m, "a"), "relative_path", "../a"), r"says that a is in '\.\./a', outside"),
        (lambda m: setattr(stored_of(m, "a"), "relative_path", "__9_0.distcp"), r"__9_0\.distcp: is missing"),
        (lambda m: setattr(stored_of(m, "a"), "length", 10), "a cannot be read: damaged or truncated"),
        (lambda m: setattr(stored_of(m, "a"), "offset", -5), "a cannot be read: damaged or truncated"),
        (
            lambda m: setattr(stored_of(m, "a"), "transform_descriptors", ["stream.zstd"]),
            "a is compressed; .* dcp_to_torch",
        ),
        (
            lambda m: setattr(m.state_dict_metadata["a"], "size", torch.Size((3, 3))),
            r"chunks of a do not make up its shape",
        ),
        (lambda m: m.storage_data.clear(), "chunks of a do not make up its shape"),
    ],
)
def test_metadata_that_contradict_the_files_are_refused(
    tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    folder = save(SMALL, tmp_path / "a")
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensors(folder)["a"]
    assert str(folder) in str(caught.value)


def test_a_chunk_outside_of_its_tensor_is_refused(tmp_path: Path) -> None:
    folder = save({"a": torch.ones(2, 3)}, tmp_path / "a")

    def move(metadata: Any) -> None:
        metadata.state_dict_metadata["a"].size = torch.Size((3, 2))

    rewrite(folder, move)
    with pytest.raises(CheckpointError, match="a chunk of a is outside its shape"):
        read_tensors(folder)["a"]


@pytest.mark.parametrize("kept", [0, 1, 100])
def test_truncated_metadata_are_refused(tmp_path: Path, kept: int) -> None:
    folder = save(SMALL, tmp_path / "a")
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"\.metadata: damaged"):
        read_tensors(folder)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_part_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = save(SMALL, tmp_path / "a")
    with pytest.raises(CheckpointError, match=f"give its folder, {folder}$"):
        read_tensors(folder / name)

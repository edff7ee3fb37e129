"""Reading a file, a folder, or an index with its shards; and refusing files that are something else."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor

from dinov3_server.backbone.weights.checkpoint import load_checkpoint
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.backbone.weights.tensor_files import read_tensors
from dinov3_server.errors import CheckpointError
from tests.server.backbone.files import SHALLOW, official_state, transformers_state
from tests.server.backbone.reference import transformers_model

ONE, OTHER = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
STATE = {"a": torch.arange(4.0), "b": torch.ones(2, 3), "c": torch.zeros(5)}


def sharded(folder: Path) -> dict[str, Any]:
    """STATE in two shards, and the index that goes with them."""
    save_file({"a": STATE["a"]}, folder / ONE)
    save_file({"b": STATE["b"], "c": STATE["c"]}, folder / OTHER)
    index = {"metadata": {"total_size": 60}, "weight_map": {"a": ONE, "b": OTHER, "c": OTHER}}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_shards_written_by_huggingface_hub(tmp_path: Path) -> None:
    state = transformers_state(SHALLOW, random_tensors(SHALLOW, 5), older=True)
    save_torch_state_dict(state, tmp_path, max_shard_size="5MB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert same(read_tensors(tmp_path), state)
    assert same(read_tensors(tmp_path / "model.safetensors.index.json"), state)


def test_shards_written_by_transformers(tmp_path: Path) -> None:
    tensors, periods = random_tensors(SHALLOW, 5), torch.linspace(1, 70, 16)
    transformers_model(SHALLOW, tensors, periods).save_pretrained(tmp_path, max_shard_size="5MB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    loaded = load_checkpoint(tmp_path, SHALLOW).tensors
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert same(read_tensors(tmp_path), STATE)


def test_shards_in_the_layout_of_the_hugging_face_cache(tmp_path: Path) -> None:
    """Names in a snapshot are links to blobs, whose names are their hashes."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots"
    blobs.mkdir()
    snapshot.mkdir()
    sharded(blobs)
    for position, path in enumerate(sorted(blobs.iterdir())):
        blob = path.rename(blobs / f"{position:064x}")
        (snapshot / path.name).symlink_to(f"../blobs/{blob.name}")
    assert same(read_tensors(snapshot), STATE)


def test_an_index_may_have_any_name(tmp_path: Path) -> None:
    sharded(tmp_path)
    renamed = (tmp_path / "model.safetensors.index.json").rename(tmp_path / "weights.json")
    assert same(read_tensors(renamed), STATE)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"without model\.safetensors or model\.safetensors\.index\.json; it holds nothing"),
        ({"b.pth": b"", "a.txt": b""}, r"it holds a\.txt, b\.pth\. If one of these"),
        ({"model.safetensors": b"", "model.safetensors.index.json": b""}, "holds both"),
    ],
)
def test_a_folder_without_weights_or_with_two_kinds(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensors(tmp_path)
    assert str(tmp_path) in str(caught.value)


def with_map(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda index: {**index, "weight_map": {**index["weight_map"], **changes}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {}, "no index of shards either: it has no weight_map"),
        (lambda index: {**index, "weight_map": {}}, "not an object with a file name for each tensor"),
        (lambda index: {**index, "weight_map": [ONE]}, "not an object with a file name for each tensor"),
        (with_map(a=f"../{ONE}"), r"names '\.\./model-00001-of-00002\.safetensors'; allowed are plain names"),
        (with_map(a=f"/etc/{ONE}"), "allowed are plain names"),
        (with_map(a=f"..\\{ONE}"), "allowed are plain names"),
        (with_map(a=".."), "allowed are plain names"),
        (with_map(a=""), "allowed are plain names"),
        (with_map(a=f"{ONE}\0"), "allowed are plain names"),
        (with_map(a=3), "names 3; allowed are plain names"),
        (with_map(a=None), "allowed are plain names"),
        (with_map(a="model-00003.safetensors"), r"1 of its 2 files are missing beside it: model-00003\.safetensors;"),
        (with_map(d=ONE), rf"{ONE}: lacks tensors that model\.safetensors\.index\.json says are in it: d"),
        (with_map(b=ONE), rf"{ONE}: lacks tensors that .* says are in it: b"),
        (lambda index: {**index, "weight_map": {"a": ONE, "b": OTHER}}, rf"{OTHER}: holds tensors .* not in it: c"),
        (with_map(a="model.safetensors.index.json"), "is JSON, not weights"),
    ],
)
def test_an_index_that_contradicts_its_shards_is_refused(
    tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    write_index(tmp_path, change(sharded(tmp_path)))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensors(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"weight_map": {"a": "x"', "not JSON, or truncated"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "a name occurs twice"),
        (b'{"a": {"weight_map": ', "not JSON, or truncated"),
        (b'{"\xff": 1}', "not JSON"),
        (b'{"a":' + b"[" * 100_000, "not JSON"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": STATE["a"], "b": STATE["b"]}, tmp_path / ONE)
    with pytest.raises(CheckpointError, match=rf"{ONE}: holds tensors that .* says are not in it: b"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"\xff" * 200, "neither a PyTorch file"),
    ],
)
def test_a_shard_that_is_not_weights_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    sharded(tmp_path)
    (tmp_path / OTHER).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensors(tmp_path)
    assert OTHER in str(caught.value)


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / OTHER).write_bytes((tmp_path / OTHER).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{OTHER}: .* truncated, at \d+ bytes"):
        read_tensors(tmp_path)


def test_a_safetensors_file_whose_first_byte_is_a_brace(tmp_path: Path) -> None:
    """123 is a brace: a header of that length makes the file's first byte one, and the file still is not JSON."""
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(123)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert path.read_bytes().startswith(b"{")
    assert same(read_tensors(path), {"a": torch.zeros(1)})


class Code:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (b"\n <?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page.*expired signed URL"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer.*git lfs pull"),
        (b'{"architectures": ["DINOv3ViTModel"]}', "is JSON, not weights, and no index of shards"),
        (b"\0" * 4096, "neither a PyTorch file"),
        (b"abc", "neither a PyTorch file"),
    ],
)
def test_a_file_that_is_not_weights_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensors(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [0.001, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_pth_is_refused(tmp_path: Path, kept: float, zipped: bool) -> None:
    path = tmp_path / "a.pth"
    state = official_state(SHALLOW, random_tensors(SHALLOW, 5))
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(CheckpointError, match=r"damaged or truncated, at \d+ bytes"):
        read_tensors(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    state = {**official_state(SHALLOW, random_tensors(SHALLOW, 5)), "hook": Code()}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"refused: .* could run code; export the state dict alone$"):
        read_tensors(tmp_path / "a.pth")


def test_a_plain_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Code()))
    with pytest.raises(CheckpointError, match=r"refused: .* could run code; export the state dict alone$"):
        read_tensors(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"teacher": {"a": 1}, "iteration": 5}, "holds a dict and not a dictionary of named tensors"),
        ([torch.ones(1)], "holds a list and not a dictionary"),
        ({0: torch.ones(1)}, "not a dictionary of named tensors"),
    ],
)
def test_a_pth_without_a_state_dict_is_refused(tmp_path: Path, saved: object, message: str) -> None:
    torch.save(saved, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path / "a.pth")


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_tensors(tmp_path / "nothing.pth")

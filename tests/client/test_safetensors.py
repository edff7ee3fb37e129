"""The files that the client writes, read by safetensors itself."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open

from dinov3_client import _safetensors


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "bytes": rng.integers(-128, 128, (3, 5)).astype(np.int8),
        "scale": rng.normal(size=3).astype(np.float32),
        "turned": rng.normal(size=(4, 3)).astype(np.float32).T,  # not contiguous
        "half": rng.normal(size=(7,)).astype(np.float16),
        "brain": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
        "rows": np.arange(6, dtype=np.int64).reshape(2, 3),
        "one": np.float32(3.5).reshape(()),
        "none": np.zeros((0, 4), np.float32),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"an older file")
    _safetensors.write(path, tensors, {"model": "dinov3_vits16", "source": "Bäume"})
    assert [each.name for each in tmp_path.iterdir()] == ["x.safetensors"]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"model": "dinov3_vits16", "source": "Bäume"}
        assert sorted(file.keys()) == sorted(tensors)
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            if name == "brain":
                assert found.dtype == torch.bfloat16
                found, tensor = found.float(), tensor.astype(np.float32)
            assert tuple(found.shape) == tensor.shape
            assert found.numpy().dtype == tensor.dtype
            assert np.array_equal(found.numpy(), tensor)


def test_every_tensor_begins_at_a_multiple_of_its_element(tmp_path: Path) -> None:
    tensors = {"a": np.ones(3, np.int8), "b": np.ones(5, np.float16), "c": np.ones(1, np.int64), "d": np.ones(3, "f4")}
    path = tmp_path / "x.safetensors"
    _safetensors.write(path, tensors, {})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    described = json.loads(data[8 : 8 + length])
    assert "__metadata__" not in described
    for name, tensor in tensors.items():
        begin, end = described[name]["data_offsets"]
        assert begin % tensor.itemsize == 0
        assert np.array_equal(np.frombuffer(data[8 + length :][begin:end], tensor.dtype), tensor)
    assert len(data) == 8 + length + sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(("name", "dtype"), [("x", np.complex64), ("x", ">f4"), ("__metadata__", np.float32)])
def test_unsupported_tensors_are_refused_and_the_older_file_stays(tmp_path: Path, name: str, dtype: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"an older file")
    with pytest.raises(ValueError, match="safetensors does not support this name or dtype"):
        _safetensors.write(path, {name: np.ones(3, dtype)}, {})
    assert path.read_bytes() == b"an older file"
    assert [each.name for each in tmp_path.iterdir()] == ["x.safetensors"]

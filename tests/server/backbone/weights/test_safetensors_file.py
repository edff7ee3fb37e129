"""Reading safetensors: values, memory mapping, and refusing every kind of damaged file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dinov3_server.backbone.weights.tensor_files import read_safetensors
from dinov3_server.errors import CheckpointError


def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(5, 7, generator=generator),
        "half": torch.randn(3, generator=generator).half(),
        "brain": torch.randn(2, 1, 3, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "ünïcode": torch.ones(1),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    read = read_safetensors(path)
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_the_file_is_mapped_and_never_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    before = path.read_bytes()
    read_safetensors(path)["a"].zero_()
    assert path.read_bytes() == before


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape if isinstance(shape, str) else list(shape), "data_offsets": [begin, end]}


def test_tensors_that_are_not_aligned(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.5])
    header = json.dumps({"a": entry(0, 2, (1,), "F16"), "b": entry(2, 10)}).encode()
    for padding in range(4):  # puts `b` at every remainder
        data = b"\0\0" + values.numpy().tobytes()
        read = read_safetensors(write(tmp_path / f"{padding}.safetensors", header + b" " * padding, data))
        assert torch.equal(read["b"], values)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        pytest.param(b"{", b"", id="not JSON"),
        pytest.param(b"\xff\xfe", b"", id="not UTF-8"),
        pytest.param(b"[1]", b"", id="not an object"),
        pytest.param(b"[" * 100_000, b"", id="nested too deeply"),
        pytest.param({"a": 3}, b"", id="entry is a number"),
        pytest.param({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), id="no data_offsets"),
        pytest.param({"a": entry(dtype=["F32"])}, bytes(8), id="dtype is a list"),
        pytest.param({"a": entry(dtype="F33")}, bytes(8), id="unknown dtype"),
        pytest.param({"a": entry(shape="2")}, bytes(8), id="shape is a string"),
        pytest.param({"a": entry(shape=(-2,))}, bytes(8), id="negative size"),
        pytest.param({"a": entry(shape=(2.0,))}, bytes(8), id="size is a float"),
        pytest.param({"a": entry(shape=(True, 2))}, bytes(8), id="size is a boolean"),
        pytest.param({"a": {**entry(), "data_offsets": [0]}}, bytes(8), id="one offset"),
        pytest.param({"a": entry(-8, 0)}, bytes(8), id="negative offset"),
        pytest.param({"a": entry(8, 0)}, bytes(8), id="end before begin"),
        pytest.param({"a": entry(0, 4)}, bytes(4), id="too few bytes for the shape"),
        pytest.param({"a": entry(shape=(2**40, 2**40))}, bytes(8), id="shape overflows"),
        pytest.param({"a": entry(), "b": entry(4, 12)}, bytes(12), id="overlap"),
        pytest.param({"a": entry(), "b": entry()}, bytes(8), id="same bytes twice"),
        pytest.param({"a": entry(), "b": entry(12, 20)}, bytes(20), id="hole"),
        pytest.param({"a": entry(4, 12)}, bytes(12), id="hole at the beginning"),
        pytest.param({"a": entry()}, bytes(7), id="truncated"),
        pytest.param({"a": entry()}, bytes(9), id="trailing byte"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, header: Any, data: bytes) -> None:
    path = write(tmp_path / "bad.safetensors", header, data)
    size = path.stat().st_size
    with pytest.raises(CheckpointError, match=f"^{path}: not a whole safetensors file: .*, at {size} bytes"):
        read_safetensors(path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw[:5],
        lambda raw: raw[:20],
        lambda raw: (2**63).to_bytes(8, "little") + raw[8:],
        lambda raw: (200_000_000).to_bytes(8, "little") + raw[8:],
    ],
)
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path / "bad.safetensors", {"a": entry()}, bytes(8))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_safetensors(path)

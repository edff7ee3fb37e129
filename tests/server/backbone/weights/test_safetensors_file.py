"""The safetensors reader against the reference writer, and against files that are not what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dinov3_server.backbone.weights.safetensors_file import read_safetensors
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
    for padding in range(4):  # one of them puts `b` at every remainder
        data = b"\0\0" + values.numpy().tobytes()
        read = read_safetensors(write(tmp_path / f"{padding}.safetensors", header + b" " * padding, data))
        assert torch.equal(read["b"], values)


@pytest.mark.parametrize(
    ("header", "data", "told"),
    [
        (b"{", b"", "not JSON"),
        (b"\xff\xfe", b"", "not JSON"),
        (b"[1]", b"", "not a JSON object"),
        (b'{"a": 1, "a": 2}', b"", "a name occurs twice"),
        (b"[" * 100_000, b"", "not JSON"),
        ({"a": 3}, b"", "entry 'a' is not a dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "entry 'a' is not"),
        ({"a": entry(dtype="I64", shape=(1,))}, bytes(8), "'a' has dtype 'I64'; only F32, F16, BF16"),
        ({"a": entry(dtype=["F32"])}, bytes(8), "has dtype"),
        ({"a": entry(shape="2")}, bytes(8), "not a list of sizes"),
        ({"a": entry(shape=(-2,))}, bytes(8), "not a list of sizes"),
        ({"a": entry(shape=(2.0,))}, bytes(8), "not a list of sizes"),
        ({"a": entry(shape=(True, 2))}, bytes(8), "not a list of sizes"),
        ({"a": {**entry(), "data_offsets": [0]}}, bytes(8), "not a begin and an end"),
        ({"a": entry(-8, 0)}, bytes(8), "not a begin and an end"),
        ({"a": entry(8, 0)}, bytes(8), "takes 8 bytes, but its data_offsets .8, 0. span -8"),
        ({"a": entry(0, 4)}, bytes(4), "takes 8 bytes"),
        ({"a": entry(shape=(2**40, 2**40))}, bytes(8), "span 8"),
        ({"a": entry(), "b": entry(4, 12)}, bytes(12), "'b' begins at byte 4 .* overlaps 'a'"),
        ({"a": entry(), "b": entry()}, bytes(8), "overlaps 'a'"),
        ({"a": entry(), "b": entry(12, 20)}, bytes(20), "'b' begins at byte 12 .* leaves a hole after 'a'"),
        ({"a": entry(4, 12)}, bytes(12), "leaves a hole after the header"),
        ({"a": entry()}, bytes(7), "describes 8 bytes of tensors and the file has 7: it is truncated"),
        ({"a": entry()}, bytes(9), "describes 8 bytes of tensors and the file has 9$"),
    ],
)
def test_a_file_that_is_not_what_it_says(tmp_path: Path, header: Any, data: bytes, told: str) -> None:
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=told) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw[:5],
        lambda raw: raw[:20],
        lambda raw: (2**63).to_bytes(8, "little") + raw[8:],
        lambda raw: (200_000_000).to_bytes(8, "little") + raw[8:],
    ],
)
def test_a_header_that_is_longer_than_the_file(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path / "bad.safetensors", {"a": entry()}, bytes(8))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"too short|header would be"):
        read_safetensors(path)

"""Projections from files: accepted contents, and fingerprints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dinov3_server.backbone.runners.projections import read_projections
from dinov3_server.errors import CheckpointError

WIDTHS = (96, 384, 384)
MATRIX = np.random.default_rng(0).standard_normal((8, 384))


def npy(folder: Path, array: Any, name: str = "p.npy") -> str:
    np.save(folder / name, array)
    return str(folder / name)


def safetensors(folder: Path, **tensors: torch.Tensor) -> str:
    save_file(tensors, folder / "p.safetensors")
    return str(folder / "p.safetensors")


def fingerprint(path: str) -> str:
    [projection] = read_projections([("p", path)], WIDTHS)
    return projection.fingerprint


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_npy_matrix_of_any_float_dtype(dtype: str, order: Any, tmp_path: Path) -> None:
    matrix = np.array(MATRIX, dtype, order=order)
    [(projection, linear_map)] = read_projections([("p", npy(tmp_path, matrix))], WIDTHS).items()
    assert (projection.name, projection.input_channels, projection.output_channels) == ("p", 384, 8)
    x = torch.randn(2, 5, 384)
    expected = x @ torch.from_numpy(matrix.astype(np.float32)).T
    torch.testing.assert_close(linear_map(x), expected, rtol=0, atol=1e-4)


def test_a_safetensors_weight_and_bias(tmp_path: Path) -> None:
    weight, bias = torch.randn(8, 96), torch.randn(8)
    path = safetensors(tmp_path, weight=weight.bfloat16(), bias=bias)
    [(projection, linear_map)] = read_projections([("p", path)], WIDTHS).items()
    assert (projection.name, projection.input_channels, projection.output_channels) == ("p", 96, 8)
    Path(path).write_bytes(b"")  # the file is not read again
    x = torch.randn(3, 96)
    torch.testing.assert_close(linear_map(x), x @ weight.bfloat16().float().T + bias, rtol=0, atol=1e-4)


def test_the_fingerprint_depends_on_the_values_only(tmp_path: Path) -> None:
    matrix = MATRIX.astype(np.float32)
    weight = torch.from_numpy(matrix)
    same = {
        fingerprint(npy(tmp_path, matrix)),
        fingerprint(npy(tmp_path, matrix.astype("f8"), "other.npy")),
        fingerprint(safetensors(tmp_path, weight=weight)),
        fingerprint(safetensors(tmp_path, weight=weight, bias=torch.zeros(8))),
    }
    assert len(same) == 1
    turned = np.ascontiguousarray(matrix[::-1])
    others = {
        fingerprint(npy(tmp_path, turned)),
        fingerprint(npy(tmp_path, matrix.reshape(32, 96))),
        fingerprint(safetensors(tmp_path, weight=weight, bias=torch.ones(8))),
    }
    assert len(others | same) == 4


BAD = {
    "transposed": (MATRIX.T, r"matrix \[384, 8\].* it is transposed, \[D, K\]. Save its transpose .* \[8, 384\]"),
    "of no layer": (MATRIX[:, :100], r"no layer of the model has 100 channels; D may be 96 or 384$"),
    "a vector": (MATRIX[0], r"has the shape \[384\]; it must be a matrix \[K, D\]"),
    "of integers": (MATRIX.astype(int), "holds int64; it must hold floats"),
    "complex": (MATRIX.astype(complex), "holds complex128"),
    "objects": (np.array([{}]), r"not a readable \.npy file"),
    "not finite": (np.where(MATRIX > 1, np.nan, MATRIX), "NaN or infinity"),
    "too large for float32": (MATRIX * 1e300, "overflow in float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    array, message = BAD[name]
    path = npy(tmp_path, array)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_projections([("p64", path)], WIDTHS)
    assert str(caught.value).startswith(f"the projection 'p64' in {path}")


@pytest.mark.parametrize("raw", [b"", b"\x93NUMPY", b"PK\x03\x04", b"no array at all"])
def test_a_file_that_is_not_npy_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.npy").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"p.npy is not a readable .npy file"):
        read_projections([("p", str(tmp_path / "p.npy"))], WIDTHS)


def test_a_truncated_npy_is_refused(tmp_path: Path) -> None:
    path = Path(npy(tmp_path, MATRIX))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"not a readable \.npy file"):
        read_projections([("p", str(path))], WIDTHS)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"linear.weight": torch.zeros(8, 384)}, "holds linear.weight; it must hold weight .* optionally bias"),
        ({"weight": torch.zeros(8, 384), "mean": torch.zeros(384)}, "holds mean, weight; "),
        (
            {"weight": torch.zeros(8, 384), "bias": torch.zeros(384)},
            r"bias of shape \[384\]; it must be \[8\]",
        ),
        ({"weight": torch.zeros(384, 8)}, "transposed"),
    ],
)
def test_bad_tensors_are_refused(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_projections([("p", safetensors(tmp_path, **tensors))], WIDTHS)

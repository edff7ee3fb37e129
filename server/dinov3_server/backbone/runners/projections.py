"""Reads projections, named linear maps of the channels of patches, from files (the setting `projections`).

A file is `.npy` with a matrix [K, D] (the shape of torch.nn.Linear.weight and of scikit-learn's components_), or
`.safetensors` with `weight` [K, D] and, optionally, `bias` [K]: D channels in, K channels out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinov3_server.backbone.runners.postprocessing import LinearMap
from dinov3_server.backbone.weights.fingerprint import digest
from dinov3_server.backbone.weights.tensor_files import check_dtypes, read_safetensors
from dinov3_server.errors import CheckpointError
from dinov3_server.models.interface import Projection


def read_projections(files: Iterable[tuple[str, str]], widths: Sequence[int]) -> dict[Projection, LinearMap]:
    """Read the named `files`, in float32 on the CPU; `widths` are the channels of the model's layers.

    Raises CheckpointError, naming the file, for a projection that fits no layer.
    """
    return dict(_read(name, Path(path), sorted(set(widths))) for name, path in files)


def _read(name: str, path: Path, widths: Sequence[int]) -> tuple[Projection, LinearMap]:
    what = f"the projection {name!r} in {path}"
    tensors = _safetensors(what, path) if path.suffix == ".safetensors" else {"weight": _npy(what, path)}
    weight = tensors["weight"].to(torch.float32)
    if weight.dim() != 2 or not weight.numel():
        raise CheckpointError(f"{what} has the shape {[*weight.shape]}; it must be a matrix [K, D], D channels to K")
    outputs, inputs = weight.shape
    if inputs not in widths:
        fits = " or ".join(map(str, widths))
        transposed = (
            f": it is transposed, [D, K]. Save its transpose (`.T`), [{inputs}, {outputs}]" if outputs in widths else ""
        )
        raise CheckpointError(
            f"{what} is a matrix {[outputs, inputs]}, [K, D], and no layer of the model has {inputs} channels; "
            f"D may be {fits}{transposed}"
        )
    bias = tensors["bias"].to(torch.float32) if "bias" in tensors else torch.zeros(outputs)
    if bias.shape != (outputs,):
        raise CheckpointError(
            f"{what} has a bias of shape {[*bias.shape]}; it must be [{outputs}] for the weight {[outputs, inputs]}"
        )
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise CheckpointError(f"{what} holds NaN or infinity, or values that overflow in float32")
    identity = hashlib.sha256(f"projection {digest(weight)} {digest(bias)}".encode()).hexdigest()[:32]
    return Projection(name, inputs, outputs, identity), LinearMap(weight.contiguous(), bias.contiguous())


def _npy(what: str, path: Path) -> Tensor:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{what} is not a readable .npy file: {error}") from None
    if array.dtype.kind != "f":
        raise CheckpointError(f"{what} holds {array.dtype}; it must hold floats")
    with np.errstate(over="ignore"):  # reported as infinite by the caller
        return torch.from_numpy(np.array(array, np.float32, order="C"))


def _safetensors(what: str, path: Path) -> dict[str, Tensor]:
    tensors = read_safetensors(path)
    if not {"weight"} <= set(tensors) <= {"weight", "bias"}:
        found = ", ".join(sorted(tensors)[:5]) or "nothing"
        raise CheckpointError(
            f"{what} holds {found}; it must hold weight [K, D], optionally bias [K], and nothing else"
        )
    check_dtypes(path, tensors)
    return {name: tensor.clone() for name, tensor in tensors.items()}  # copied, so no longer mapped from the file

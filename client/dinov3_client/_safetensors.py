"""Writes and reads safetensors files (https://github.com/huggingface/safetensors, "Format").

A file is the length of the header in eight bytes, little-endian; the header, JSON with the dtype, shape and offsets of
each tensor; and the tensors, row-major and little-endian, without gaps. The header is padded with spaces, so that the
data begin at a multiple of 64 bytes, as Arrow recommends. Tensors whose sizes are multiples of larger powers of two
come first, so that each of a multiple of 64 bytes begins at one, and each of the others at a multiple of its item.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dinov3_client import _files
from dinov3_client._dtypes import Array

ALIGNMENT = 64

_NAMES = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.int64): "I64",
    np.dtype(np.int32): "I32",
    np.dtype(np.int16): "I16",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def write(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write `path` atomically, replacing an older file."""
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with _files.atomic_path(path) as draft, draft.open("wb") as file:
        file.write(header(specs, metadata))
        for name in stored_order(specs):
            # As bytes: bfloat16 arrays do not support the buffer protocol.
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def header(tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the beginning of a file; the tensors follow in `stored_order`."""
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in stored_order(tensors):
        dtype, shape = tensors[name]
        if name == "__metadata__" or dtype not in _NAMES:
            raise ValueError(f"tensor {name!r} of {dtype}: safetensors does not support this name or dtype")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        described[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def stored_order(tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> list[str]:
    """Return the names in the order in which their tensors are stored."""

    def alignment(name: str) -> int:
        dtype, shape = tensors[name]
        nbytes = math.prod(shape) * dtype.itemsize
        return min(nbytes & -nbytes, ALIGNMENT) or ALIGNMENT  # an empty tensor moves no other

    return sorted(tensors, key=lambda name: (-alignment(name), name))


def parse(memory: Array) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the tensors of a file's bytes [N] uint8, as views, and its metadata.

    Tensors are copied only if they are not aligned to their items. Raises ValueError, KeyError, TypeError,
    AttributeError and RecursionError for a damaged file.
    """
    begin = 8 + int.from_bytes(memory[:8].tobytes(), "little")
    described = json.loads(memory[8:begin].tobytes())
    metadata = described.pop("__metadata__", {})
    return {name: _view(memory[begin:], **entry) for name, entry in described.items()}, metadata


def _view(data: Array, dtype: str, shape: list[int], data_offsets: list[int]) -> Array:
    begin, end = data_offsets
    kind = _DTYPES[dtype]
    if not 0 <= begin <= end <= len(data) or end - begin != math.prod(shape) * kind.itemsize:
        raise ValueError(f"a tensor of {dtype} {shape} at bytes {begin} to {end} of {len(data)}")
    return np.require(data[begin:end].view(kind).reshape(shape), requirements="A")

"""Read files of named tensors: `.pth`, safetensors in one or several shards, folders of `torch.distributed.checkpoint`.

The format of a file is detected from its content, not from its name. No code in a file is run.
"""

from __future__ import annotations

import argparse
import codecs
import pathlib
import pickle
import types
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dinov3_server.backbone.weights.distributed import METADATA, DistributedTensors
from dinov3_server.errors import CheckpointError
from dinov3_server.models.weight_files import (
    INDEX,
    SINGLE,
    SNIFFED_BYTES,
    enumerate_some,
    is_json,
    is_web_page,
    read_weight_map,
)

# What training scripts save beside the weights: arguments, paths, and numbers of numpy (its versions 1 and 2).
_NUMBER: Any = np.float64(0).__reduce__()[0]
_DATA: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    types.SimpleNamespace,
    (pathlib.PosixPath, "pathlib.PosixPath"),
    (pathlib.PosixPath, "pathlib._local.PosixPath"),  # of Python 3.13
    (_NUMBER, "numpy.core.multiarray.scalar"),
    (_NUMBER, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float16", "float32", "float64")),
    codecs.encode,
]
_DEEPEST = 8  # levels of dictionaries
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """Map the named tensors of a file, of an index and its shards, or of a folder with either of them, into memory.

    Those in dictionaries of dictionaries, as training saves them, have dotted names: `teacher.backbone.cls_token`. The
    tensors of a `torch.distributed.checkpoint` are read when they are looked up. Raises CheckpointError for anything
    else.
    """
    if path.name == METADATA or path.suffix == ".distcp":
        raise CheckpointError(f"{path}: is a part of a checkpoint of torch.distributed; give its folder, {path.parent}")
    if (path / METADATA).exists():
        return DistributedTensors(path)
    if path.is_dir():
        path = _in_folder(path)
    head = _head(path)
    return _read_sharded(path) if is_json(head) else _read_file(path, head)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Map every tensor of a safetensors file into memory, privately: writing to a tensor does not change the file.

    Raises CheckpointError for a damaged file: the library checks that the tensors cover it without holes or overlaps.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file: damaged or truncated, at {path.stat().st_size} bytes ({error})"
        ) from None


def check_dtypes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for tensors that are not float32, bfloat16 or float16."""
    if wrong := [
        f"{key} ({str(t.dtype).removeprefix('torch.')})" for key, t in tensors.items() if t.dtype not in _DTYPES
    ]:
        raise CheckpointError(f"{path}: tensors that are not float32, bfloat16 or float16: {enumerate_some(wrong)}")


def _in_folder(folder: Path) -> Path:
    found = [folder / name for name in (SINGLE, INDEX) if (folder / name).exists()]
    if len(found) > 1:
        raise CheckpointError(f"{folder}: holds both {SINGLE} and {INDEX}; give the path of one of them")
    if not found:
        try:
            others = enumerate_some(sorted(entry.name for entry in folder.iterdir()))
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from None
        raise CheckpointError(
            f"{folder}: is a folder without {SINGLE} or {INDEX}; it holds {others or 'nothing'}. If one of these is "
            "the weights file, give its own path"
        )
    return found[0]


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(SNIFFED_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if not head:
        raise CheckpointError(f"{path}: the file is empty; an earlier download may have been interrupted")
    return head


def _read_file(path: Path, head: bytes) -> dict[str, Tensor]:
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _read_pth(path, zipped=head.startswith(b"PK"))
    if head[8:9] == b"{":
        return read_safetensors(path)
    raise CheckpointError(f"{path}: {_what_instead(head)}")


def _what_instead(head: bytes) -> str:
    if is_web_page(head):
        return (
            "is a web page, not weights: the server's answer to a refused request was saved (an expired signed URL, a "
            "license that was not accepted)"
        )
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not weights: fetch the file itself with `git lfs pull`"
    if is_json(head):
        return "is JSON, not weights"
    return "is neither a PyTorch file (.pth) nor safetensors; it may be damaged or truncated"


def _read_sharded(index: Path) -> dict[str, Tensor]:
    weight_map = read_weight_map(index)
    shards = sorted(set(weight_map.values()))
    if absent := [name for name in shards if not (index.parent / name).exists()]:
        raise CheckpointError(
            f"{index}: {len(absent)} of its {len(shards)} files are missing beside it: {enumerate_some(absent)}; "
            "fetch them into the same folder"
        )
    tensors: dict[str, Tensor] = {}
    for name in shards:
        shard = index.parent / name
        held = _read_file(shard, _head(shard))
        listed = {key for key, file in weight_map.items() if file == name}
        if lacking := sorted(listed - held.keys()):
            raise CheckpointError(f"{shard}: lacks tensors that {index.name} says are in it: {enumerate_some(lacking)}")
        if extra := sorted(held.keys() - listed):
            raise CheckpointError(
                f"{shard}: holds tensors that {index.name} says are not in it: {enumerate_some(extra)}"
            )
        tensors |= held
    return tensors


def _read_pth(path: Path, *, zipped: bool) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            # torch warns of pickle protocols that it may not support, and raises if it does not.
            warnings.simplefilter("ignore")
            with torch.serialization.safe_globals(_DATA):
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        # torch's own message is left out: it advises weights_only=False, which would run the code.
        raise CheckpointError(
            f"{path}: refused: it holds Python objects other than tensors{_other_classes(path)}, and loading those "
            "could run code; export the state dict alone"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or truncated, at {path.stat().st_size} bytes ({str(error).splitlines()[0]})"
        ) from None
    tensors: dict[str, Tensor] = {}
    if isinstance(loaded, dict):
        _flatten(path, loaded, "", tensors)
    if loaded and not tensors:
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__} and not a dictionary of named tensors")
    return tensors


def _flatten(path: Path, loaded: Mapping[object, object], prefix: str, tensors: dict[str, Tensor]) -> None:
    """Add the tensors of nested dictionaries to `tensors`, by their dotted names."""
    for key, value in loaded.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor) and isinstance(key, str):
            if name in tensors:
                raise CheckpointError(f"{path}: holds two tensors named {name!r}")
            tensors[name] = value
        elif isinstance(value, dict) and isinstance(key, str) and prefix.count(".") < _DEEPEST:
            _flatten(path, value, f"{name}.", tensors)


def _other_classes(path: Path) -> str:
    """Name the classes in a `.pth` that are not read, as words of a message."""
    try:
        with torch.serialization.safe_globals(_DATA):
            return f" ({enumerate_some(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))})"
    except Exception:  # an older format
        return ""

"""Files of named tensors: `.pth`, safetensors, and safetensors in several shards with an index.

What a file is, is told from its content and not from its name. Nothing in a file is run. The format of an index
(https://huggingface.co/docs/huggingface_hub/package_reference/serialization): a JSON object whose `weight_map` has the
name of each tensor and that of the file, beside the index, in which it is. Its `metadata.total_size` is not compared:
writers count the memory that tensors were views of, and each shard's own header already accounts for every byte.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3_server.backbone.weights.safetensors_file import parse_json, read_safetensors
from dinov3_server.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NAMED = 8  # things of one kind that a message names before it only counts
_MAX_INDEX = 100_000_000  # bytes; ViT-7B's has some 50,000


def enumerate_some(items: Iterable[str]) -> str:
    """The first few of `items`, and how many more there are."""
    named = list(items)
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return ", ".join(named[:_NAMED]) + more


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, of an index and its shards, or of a folder that has either, mapped into memory.

    Raises CheckpointError for what is neither.
    """
    if path.is_dir():
        path = _in_folder(path)
    head = _head(path)
    return _read_sharded(path) if _is_json(head) else _read_file(path, head)


def _in_folder(folder: Path) -> Path:
    found = [folder / name for name in (SINGLE, INDEX) if (folder / name).exists()]
    if len(found) > 1:
        raise CheckpointError(f"{folder}: holds both {SINGLE} and {INDEX}; name the one that is meant")
    if not found:
        try:
            others = enumerate_some(sorted(entry.name for entry in folder.iterdir()))
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from None
        raise CheckpointError(
            f"{folder}: is a folder without {SINGLE} or {INDEX}; it holds {others or 'nothing'}. Name the file itself, "
            "if one of these is it"
        )
    return found[0]


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if not head:
        raise CheckpointError(f"{path}: the file is empty; an earlier download may have been interrupted")
    return head


def _is_json(head: bytes) -> bool:
    """A safetensors file may begin with a brace too, in the length of its header, but then with zeros after it."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and b"\0" not in head[:8]


def _read_file(path: Path, head: bytes) -> dict[str, Tensor]:
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _read_pth(path, zipped=head.startswith(b"PK"))
    if head[8:9] == b"{":
        return read_safetensors(path)
    raise CheckpointError(f"{path}: {_what_instead(head)}")


def _what_instead(head: bytes) -> str:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<error")):
        return (
            "is a web page, not weights: what was downloaded is the server's answer to a request that it refused "
            "(an expired signed URL, a licence that was not accepted)"
        )
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not weights: fetch the file itself with `git lfs pull`"
    if _is_json(head):
        return "is JSON, not weights"
    return "is neither a PyTorch file (.pth) nor safetensors; it may be damaged or truncated"


def _read_sharded(index: Path) -> dict[str, Tensor]:
    weight_map = _weight_map(index)
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
        wanted = {key for key, file in weight_map.items() if file == name}
        if lacking := sorted(wanted - held.keys()):
            raise CheckpointError(f"{shard}: lacks tensors that {index.name} says are in it: {enumerate_some(lacking)}")
        if extra := sorted(held.keys() - wanted):
            raise CheckpointError(
                f"{shard}: holds tensors that {index.name} says are not in it: {enumerate_some(extra)}"
            )
        tensors |= held
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """The index's name of a file for each name of a tensor."""
    if index.stat().st_size > _MAX_INDEX:
        raise CheckpointError(f"{index}: {index.stat().st_size} bytes of JSON, too many for an index of shards")
    parsed: Any
    try:
        parsed = parse_json(index.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{index}: an index of shards that is not JSON, or truncated: {error}") from None
    if not isinstance(parsed, dict) or "weight_map" not in parsed:
        raise CheckpointError(f"{index}: is JSON, not weights, and no index of shards either: it has no weight_map")
    weight_map = parsed["weight_map"]
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: the weight_map is not an object that names a file for each tensor")
    if bad := [repr(name) for name in weight_map.values() if not _is_plain(name)]:
        raise CheckpointError(
            f"{index}: the weight_map names {enumerate_some(dict.fromkeys(bad))}; only plain names of files in the "
            "index's own folder are read"
        )
    return weight_map


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\")


def _read_pth(path: Path, *, zipped: bool) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            # Of pickle protocols that it may not support, which it then says by an exception.
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        # torch's own message is left out: it advises weights_only=False, which would run the code.
        raise CheckpointError(
            f"{path}: refused: it holds Python objects other than tensors, and loading those could run code; export "
            "the state dict alone"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or truncated, at {path.stat().st_size} bytes ({str(error).splitlines()[0]})"
        ) from None
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__} and not a dictionary of named tensors")
    if others := [key for key, value in loaded.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(
            f"{path}: holds {enumerate_some(others)} beside or instead of tensors, as a training checkpoint does; "
            "export the backbone's state dict alone"
        )
    return loaded

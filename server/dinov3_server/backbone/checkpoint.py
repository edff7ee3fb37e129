"""Weights files: read, checked key by key, brought into the canonical layout.

Read are the official `.pth` files and transformers' `model.safetensors`, told apart by what is in them and not by
their names. Nothing is taken on trust: a missing, extra or misshapen key is an error that names it.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dinov3_server.backbone.layouts import PERIODS, Entry, Layout, layout_of
from dinov3_server.backbone.registry import DATASETS, VARIANTS, Dataset, VitVariant
from dinov3_server.backbone.rope import default_periods
from dinov3_server.backbone.safetensors_file import read_safetensors
from dinov3_server.errors import CheckpointError

logger = logging.getLogger(__name__)

_NAMED = 8  # problems of one kind that a message names before it only counts
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights: canonical tensors as the file stores them (mapped, not read), and [d/4] fp32 RoPE periods."""

    variant: VitVariant
    dataset: Dataset
    tensors: Mapping[str, Tensor]
    periods: Tensor


def load_checkpoint(path: Path, variant: VitVariant) -> Checkpoint:
    """The weights of `variant` in the file at `path`.

    Raises CheckpointError, saying what the file is instead, for anything but a whole, matching checkpoint.
    """
    stored = read_tensors(path)
    if other := _another_kind(stored):
        raise CheckpointError(f"{path}: {other}")
    layout = layout_of(stored, variant)
    if layout is None:
        raise CheckpointError(
            f"{path}: holds no DINOv3 vision transformer; its keys are {_enumerate(stored) or 'none'}"
        )
    tensors: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        if layout.spelling(key) in tensors:
            raise CheckpointError(f"{path}: both spellings of {layout.spelling(key)!r} are present")
        tensors[layout.spelling(key)] = tensor
    entries = layout.entries(variant)
    if problems := _problems(tensors, entries):
        raise CheckpointError(
            f"{path} does not hold {variant.name} in the {layout.name} layout: {'; '.join(problems)}."
            f"{_looks_like(tensors, layout)}"
        )
    _check_values(path, tensors, entries)
    canonical = {
        name: part
        for key, entry in entries.items()
        if entry.parts and key in tensors
        for name, part in zip(entry.parts, tensors[key].chunk(len(entry.parts)), strict=True)
        if name is not None
    }
    periods = canonical.pop(PERIODS, None)
    if periods is None:
        periods = default_periods(variant.head_dim, variant.rope_base)
    return Checkpoint(variant, _dataset(path, variant, tensors), canonical, periods.float())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a `.pth` or safetensors file, mapped into memory.

    Raises CheckpointError for what is neither.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if not size:
        raise CheckpointError(f"{path}: the file is empty; an earlier download may have been interrupted")
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
    if text.startswith(b"{"):
        return "is JSON, not weights; of a model in several shards no index is read, only a single file"
    return "is neither a PyTorch file (.pth) nor safetensors; it may be damaged or truncated"


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
            f"{path}: holds {_enumerate(others)} beside or instead of tensors, as a training checkpoint does; "
            "export the backbone's state dict alone"
        )
    return loaded


def _another_kind(tensors: Mapping[str, Tensor]) -> str | None:
    """What the tensors are of, where they are known to be of something else."""
    if any(key.startswith(("downsample_layers.", "stages.")) for key in tensors):
        return "holds a ConvNeXt, which this version does not serve"
    if "reg_token" in tensors:
        return "is in timm's layout, which this version does not read; use the official or transformers' file"
    return None


def _problems(tensors: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> list[str]:
    """What keeps `tensors` from being exactly `entries`, a phrase a kind."""
    missing = [f"{key} {_shape(e.shape)}" for key, e in entries.items() if e.required and key not in tensors]
    extra = [f"{key} {_shape(tensor.shape)}" for key, tensor in tensors.items() if key not in entries]
    misshapen = [
        f"{key} {_shape(tensor.shape)} instead of {_shape(entries[key].shape)}"
        for key, tensor in tensors.items()
        if key in entries and tensor.shape != entries[key].shape
    ]
    kinds = (("missing", missing), ("unexpected", extra), ("of another shape", misshapen))
    return [f"{len(found)} {kind}: {_enumerate(found)}" for kind, found in kinds if found]


def _looks_like(tensors: Mapping[str, Tensor], layout: Layout) -> str:
    for variant in VARIANTS.values():
        if not _problems(tensors, layout.entries(variant)):
            return f" It looks like {variant.name}."
    return ""


def _check_values(path: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> None:
    """What shapes do not show: dtypes, and the masks of the qkv biases."""
    if wrong := [
        f"{key} ({str(t.dtype).removeprefix('torch.')})" for key, t in tensors.items() if t.dtype not in _DTYPES
    ]:
        raise CheckpointError(f"{path}: tensors that are not float32, bfloat16 or float16: {_enumerate(wrong)}")
    masked = [key for key, entry in entries.items() if entry.is_bias_mask]
    wrong = [key for key in masked if not _masks_keys(tensors[key])]
    if wrong:
        raise CheckpointError(
            f"{path}: a bias_mask must be 1 for queries and values and 0 for keys; these are not (a model saved "
            f"before its weights were initialised has NaN there): {_enumerate(wrong)}"
        )


def _masks_keys(mask: Tensor) -> bool:
    q, k, v = mask.chunk(3)
    return bool((q == 1).all() and (k == 0).all() and (v == 1).all())


def _dataset(path: Path, variant: VitVariant, tensors: Mapping[str, Tensor]) -> Dataset:
    """The dataset that the weights were trained on, which sets the normalisation of their input.

    Every published file or folder says it in its name. Where neither does, a ViT-L with a `local_cls_norm` is the one
    of SAT-493M (that of LVD-1689M has none), and any other is taken for LVD-1689M's.
    """
    names: Iterable[str] = reversed(path.absolute().parts)
    for name in names:
        for dataset in DATASETS.values():
            if dataset.name in name.lower() and dataset.name in variant.hashes:
                return dataset
    is_sat = variant.name == "dinov3_vitl16" and "local_cls_norm.weight" in tensors
    assumed = DATASETS["sat493m" if is_sat else "lvd1689m"]
    if len(variant.hashes) > 1:
        logger.warning(
            "%s does not say which dataset it was trained on (%s); %s is assumed, and its mean and std are used",
            path,
            " or ".join(variant.hashes),
            assumed.name,
        )
    return assumed


def _shape(shape: Iterable[int]) -> str:
    return f"({', '.join(map(str, shape))})"


def _enumerate(items: Iterable[str]) -> str:
    named = list(items)
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return ", ".join(named[:_NAMED]) + more

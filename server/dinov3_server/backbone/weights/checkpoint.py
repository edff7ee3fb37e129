"""Reads weights, checks them key by key, and brings them into canonical tensors.

It reads the official `.pth` files and transformers' and timm's `model.safetensors`, also in shards, and recognizes them
by their content, not by their names. A missing, extra or misshapen key is an error that names it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dinov3_server.backbone.weights.tensor_files import read_tensors
from dinov3_server.errors import CheckpointError, ConfigError
from dinov3_server.families.registry import VARIANTS
from dinov3_server.models.variant import DATASETS, Dataset, FileTensor, Variant
from dinov3_server.models.weight_files import enumerate_some
from dinov3_server.nn.model import Model

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights: canonical tensors as the file stores them (mapped, not read), and the variant's constants."""

    variant: Variant
    dataset: Dataset
    tensors: Mapping[str, Tensor]
    official: Mapping[str, Tensor] | None = None  # the file's own tensors, if it is in Meta's format

    def build(self, *, dtype: torch.dtype, device: torch.device) -> Model:
        """Build our implementation of the variant with these weights."""
        return self.variant.build(self.tensors, self.dataset, dtype=dtype, device=device)


def load_checkpoint(path: Path, variant: Variant, dataset: str | None = None) -> Checkpoint:
    """Load the weights of `variant` at `path`: a file, the index of shards, or a folder that has either.

    `dataset` is what they were trained on; without it, that is guessed from names. Raises CheckpointError, with what
    was found instead, for anything but a whole, matching checkpoint; and ConfigError for a dataset that `variant` was
    not trained on.
    """
    given = None if dataset is None else _given(dataset, variant)
    stored = read_tensors(path)
    key_map = variant.key_map_for(stored)
    if key_map is None:
        raise CheckpointError(
            f"{path}: holds nothing of {variant.name}; its keys are {enumerate_some(stored) or 'none'}."
            f"{_looks_like(stored)}"
        )
    tensors: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        name = key_map.normalize_key(key)
        if name in tensors:
            raise CheckpointError(f"{path}: both spellings of {name!r} are present")
        tensors[name] = tensor
    if problems := _problems(tensors, key_map.entries):
        raise CheckpointError(
            f"{path} does not hold {variant.name} in the {key_map.name} layout: {'; '.join(problems)}."
            f"{_looks_like(stored)}"
        )
    _check_values(path, tensors, key_map.entries)
    canonical = {
        name: part
        for key, entry in key_map.entries.items()
        if entry.parts and key in tensors
        for name, part in zip(entry.parts, tensors[key].chunk(len(entry.parts)), strict=True)
        if name is not None
    }
    constants = variant.constants()
    for name in constants.keys() & canonical.keys():
        constants[name] = canonical[name].float()
    for name, shape in variant.canonical_shapes().items():
        if name not in canonical:
            canonical[name] = torch.zeros(shape)
    official = tensors if key_map.name == "official" else None
    return Checkpoint(variant, given or _dataset(path, variant, tensors), canonical | constants, official)


def _problems(tensors: Mapping[str, Tensor], entries: Mapping[str, FileTensor]) -> list[str]:
    """Return how `tensors` differ from `entries`: one phrase for each kind of difference."""
    missing = [f"{key} {_shape(e.shape)}" for key, e in entries.items() if e.required and key not in tensors]
    extra = [f"{key} {_shape(tensor.shape)}" for key, tensor in tensors.items() if key not in entries]
    misshapen = [
        f"{key} {_shape(tensor.shape)} instead of {_shape(entries[key].shape)}"
        for key, tensor in tensors.items()
        if key in entries and tensor.shape != entries[key].shape
    ]
    kinds = (("missing", missing), ("unexpected", extra), ("of another shape", misshapen))
    return [f"{len(found)} {kind}: {enumerate_some(found)}" for kind, found in kinds if found]


def _looks_like(stored: Mapping[str, Tensor]) -> str:
    for variant in VARIANTS.values():
        for key_map in variant.key_maps():
            if not _problems({key_map.normalize_key(key): tensor for key, tensor in stored.items()}, key_map.entries):
                return f" It looks like {variant.name}."
    return ""


def _check_values(path: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, FileTensor]) -> None:
    """Check what shapes do not show: dtypes, the masks of the qkv biases, and tensors that have two names."""
    if wrong := [
        f"{key} ({str(t.dtype).removeprefix('torch.')})" for key, t in tensors.items() if t.dtype not in _DTYPES
    ]:
        raise CheckpointError(f"{path}: tensors that are not float32, bfloat16 or float16: {enumerate_some(wrong)}")
    masked = [key for key, entry in entries.items() if entry.is_bias_mask]
    wrong = [key for key in masked if not _masks_keys(tensors[key])]
    if wrong:
        raise CheckpointError(
            f"{path}: a bias_mask must be 1 for queries and values and 0 for keys; these are not (a model saved "
            f"before its weights were initialized has NaN there): {enumerate_some(wrong)}"
        )
    for key, entry in entries.items():
        if entry.same_as and key in tensors and not torch.equal(tensors[key], tensors[entry.same_as]):
            raise CheckpointError(f"{path}: {key} and {entry.same_as} are two names of one tensor, and differ")


def _masks_keys(mask: Tensor) -> bool:
    q, k, v = mask.chunk(3)
    return bool((q == 1).all() and (k == 0).all() and (v == 1).all())


def _given(name: str, variant: Variant) -> Dataset:
    for dataset in DATASETS.values():
        if dataset.name == name and dataset.name in variant.hashes:
            return dataset
    raise ConfigError(
        f"dataset {name!r}: {variant.name} was not trained on it; its weights are of {' and of '.join(variant.hashes)}"
    )


def _dataset(path: Path, variant: Variant, tensors: Mapping[str, Tensor]) -> Dataset:
    """Return the dataset that the weights were trained on, which determines the normalization of their input.

    Every published file or folder has it in its name. Without it, a ViT-L with a `local_cls_norm` is the one of
    SAT-493M (that of LVD-1689M has none), and anything else is assumed to be LVD-1689M's.
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

"""Reads weights, checks them key by key, and brings them into canonical tensors.

It reads the official `.pth` files and transformers' and timm's `model.safetensors`, also in shards, and what training
saves in either layout; it recognizes them by their content, not by their names. A missing, extra or misshapen key is an
error that names it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dinov3_server.backbone.weights.distributed import DistributedTensors
from dinov3_server.backbone.weights.selection import Backbone, adapters, find_backbones, looks_like, preferred
from dinov3_server.backbone.weights.tensor_files import check_dtypes, read_tensors
from dinov3_server.errors import CheckpointError, ConfigError
from dinov3_server.models.variant import DATASETS, Dataset, FileTensor, Shape, Variant
from dinov3_server.models.weight_files import enumerate_some
from dinov3_server.nn.model import Model

logger = logging.getLogger(__name__)


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

    They may be a part of a training state (selection.py); the log says what was taken and what was left out. `dataset`
    is what they were trained on; without it, that is guessed from names. Raises CheckpointError, with what was found
    instead, for anything but a whole, matching backbone; and ConfigError for a dataset that `variant` was not trained
    on.
    """
    given = None if dataset is None else _given(dataset, variant)
    stored = read_tensors(path)
    backbone = _backbone(path, variant, stored)
    variant, entries = backbone.variant, backbone.key_map.entries
    tensors = {name: stored[key] for name, key in backbone.keys.items()}
    _check_values(path, tensors, entries)
    canonical = {
        name: part
        for key, entry in entries.items()
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
    official = tensors if backbone.key_map.name == "official" else None
    return Checkpoint(variant, given or _dataset(path, variant, tensors), canonical | constants, official)


def _backbone(path: Path, variant: Variant, stored: Mapping[str, Tensor]) -> Backbone:
    """Find the tensors of `variant`. Raises CheckpointError if they are not there, not whole, or there twice."""
    shapes = stored.shapes if isinstance(stored, DistributedTensors) else {k: tuple(t.shape) for k, t in stored.items()}
    places = find_backbones(variant, shapes)
    whole = preferred([place for place in places if not place.problems])
    if not whole:
        raise CheckpointError(f"{path}{_why_not(variant, shapes, places)}")
    found = whole[0]
    for other in whole[1:]:
        # One module may have two names, as in Lightning's; but two models must not be confused.
        if found.keys.keys() != other.keys.keys() or not all(
            torch.equal(stored[key], stored[other.keys[name]]) for name, key in found.keys.items()
        ):
            raise CheckpointError(
                f"{path}: holds {variant.name} {len(whole)} times, and it does not say which one to serve: under "
                f"{enumerate_some(repr(place.prefix) for place in whole)}. Export the state dict of one of them alone"
            )
    left_out = found.left_out(shapes)
    if found.prefix or left_out:
        logger.info(
            "%s: taken are the %d tensors %s; left out: %s",
            path,
            len(found.keys),
            f"under {found.prefix!r}" if found.prefix else f"of {variant.name}",
            left_out or "nothing",
        )
    if found.key_map.name == "official":
        for note in found.variant.assumptions(found.keys):
            logger.info("%s: %s", path, note)
    return found


def _why_not(variant: Variant, shapes: Mapping[str, Shape], places: Sequence[Backbone]) -> str:
    """Say what a file holds instead of `variant`, in words that follow the file's name."""
    seems = looks_like(shapes)
    looks = f" It looks like {seems.name}." if seems else ""
    if names := adapters(shapes):
        return (
            ": holds weights of an adapter (PEFT, LoRA) that are not merged into the model's: "
            f"{enumerate_some(names)}. Merge them with `model.merge_and_unload()`, then save its `state_dict()`"
        )
    if not places:
        return f": holds nothing of {variant.name}; its keys are {enumerate_some(shapes) or 'none'}.{looks}"
    nearest = places[0]
    under = f" (under {nearest.prefix!r})" if nearest.prefix else ""
    layout = f"in the {nearest.key_map.name} layout{under}"
    return f" does not hold {variant.name} {layout}: {'; '.join(nearest.problems)}.{looks}"


def _check_values(path: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, FileTensor]) -> None:
    """Check what shapes do not show: dtypes, the masks of the qkv biases, and tensors that have two names."""
    check_dtypes(path, tensors)
    masked = [key for key, entry in entries.items() if entry.is_bias_mask]
    wrong = [key for key in masked if key in tensors and not _masks_keys(tensors[key])]
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

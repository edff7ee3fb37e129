"""Model variants: dimensions, datasets, official files and tensor names. Imports no torch."""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from dinov3_server.models.key_map import KeyMap, Shape

DatasetName = Literal["lvd1689m", "sat493m"]


@dataclass(frozen=True)
class Dataset:
    """A training dataset, and the per-channel RGB mean and std that normalize the input of models trained on it."""

    name: DatasetName
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


DATASETS: Mapping[DatasetName, Dataset] = MappingProxyType(
    {
        "lvd1689m": Dataset("lvd1689m", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        "sat493m": Dataset("sat493m", mean=(0.430, 0.411, 0.296), std=(0.213, 0.156, 0.143)),
    }
)


@dataclass(frozen=True, kw_only=True)
class Variant(abc.ABC):
    """A model variant. Each family (a folder of `families/`) has a subclass with its own dimensions.

    Height and width of inputs are multiples of `patch_size`, which is also the stride of the last layer's patches;
    `depth` is the number of layers that can be requested. `hashes` maps each dataset with an official file to the first
    8 hex digits of that file's sha256.
    """

    name: str
    embed_dim: int
    depth: int
    patch_size: int
    registers: int
    norm_eps: float
    parameters: int
    hashes: Mapping[DatasetName, str]

    @property
    def layer_dims(self) -> tuple[int, ...]:
        """Channels of each layer's tokens."""
        return (self.embed_dim,) * self.depth

    @property
    def layer_strides(self) -> tuple[int, ...]:
        """Input pixels per patch of each layer, in height and in width."""
        return (self.patch_size,) * self.depth

    def official_file(self, dataset: DatasetName) -> str:
        """Return the file name under which Meta publishes the weights."""
        return f"{self.name}_pretrain_{dataset}-{self.hashes[dataset]}.pth"

    @property
    @abc.abstractmethod
    def architecture(self) -> str:
        """A short description for people: family and inner dimensions."""

    @abc.abstractmethod
    def canonical_shapes(self) -> dict[str, Shape]:
        """Return name and shape of every canonical tensor, in a fixed order."""

    @abc.abstractmethod
    def key_maps(self) -> tuple[KeyMap, ...]:
        """Return the key map of every format that a checkpoint file may have."""

    def key_map_for(self, keys: Collection[str]) -> KeyMap | None:
        """Return the key map with the most of `keys`, the first of several; None if none has any."""

        def matches(key_map: KeyMap) -> int:
            return len({key_map.normalize_key(key) for key in keys} & key_map.entries.keys())

        best = max(self.key_maps(), key=matches)
        return best if matches(best) else None


def known_hashes(hashes: Mapping[str, str]) -> Mapping[DatasetName, str]:
    """Return the given hashes in the order of DATASETS."""
    return MappingProxyType({name: hashes[name] for name in DATASETS if name in hashes})

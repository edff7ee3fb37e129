"""What is known of a model before its weights are read: dimensions, datasets, official files. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

DatasetName = Literal["lvd1689m", "sat493m"]


@dataclass(frozen=True)
class Dataset:
    """What a checkpoint was trained on, and the per-channel RGB statistics that its input is normalised with."""

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
class Variant:
    """What the service knows of any model.

    Height and width of its inputs are multiples of `patch_size`, which is also the stride of its last layer's patches;
    `depth` is how many layers can be asked for. `hashes` has, for each dataset with an official file, the first 8 hex
    digits of its sha256.
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
        """Pixels of the input, in height and in width, to a patch of each layer."""
        return (self.patch_size,) * self.depth

    def official_file(self, dataset: DatasetName) -> str:
        """The name under which Meta publishes the weights."""
        return f"{self.name}_pretrain_{dataset}-{self.hashes[dataset]}.pth"


def known_hashes(hashes: Mapping[str, str]) -> Mapping[DatasetName, str]:
    """Return the hashes of the datasets that there are, in their order."""
    return MappingProxyType({name: hashes[name] for name in DATASETS if name in hashes})

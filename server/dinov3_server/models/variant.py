"""Model variants: dimensions, datasets, official files, and how the keys of a file map to canonical tensor names.

Imports no torch.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dinov3_server.nn.model import Model

DatasetName = Literal["lvd1689m", "sat493m"]
Shape = tuple[int, ...]


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


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a file: its shape, and the canonical names of its equal parts along the first axis.

    A part named None, like a tensor without parts, is checked and left out. `is_bias_mask` marks the mask of a fused
    qkv bias, and `same_as` names the tensor that this one must equal; those values are checked too.
    """

    shape: Shape
    parts: tuple[str | None, ...] = ()
    required: bool = True
    is_bias_mask: bool = False
    same_as: str | None = None


@dataclass(frozen=True)
class KeyMap:
    """The tensors of a variant's checkpoint in one format (Meta's, transformers', timm's), by key.

    `normalize_key` maps alternative spellings of a key to the one in `entries`. A canonical tensor that no entry has is
    a bias of zeros, which the format does not store.
    """

    name: str
    entries: Mapping[str, FileTensor]
    normalize_key: Callable[[str], str] = str


@dataclass(frozen=True, kw_only=True)
class Variant(abc.ABC):
    """A model variant. Each family (a folder of `families/`) has a subclass with its own dimensions.

    Height and width of inputs are multiples of `patch_size`, which is also the stride of the last layer's patches;
    `depth` is the number of layers that can be requested. `hashes` maps each dataset with an official file to the first
    8 hex digits of that file's sha256. `repositories` are those on Hugging Face with the official weights, `{dataset}`
    standing for the dataset: Meta's own, which needs a token and Meta's consent, then an open one with a conversion.
    """

    name: str
    embed_dim: int
    depth: int
    patch_size: int
    registers: int
    norm_eps: float
    parameters: int
    hashes: Mapping[DatasetName, str]
    repositories: tuple[str, ...] = ()

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

    def constants(self) -> dict[str, Tensor]:
        """Return further canonical tensors: constants of the architecture, which only some formats of files store."""
        return {}

    @abc.abstractmethod
    def build(
        self, tensors: Mapping[str, Tensor], dataset: Dataset, *, dtype: torch.dtype, device: torch.device
    ) -> Model:
        """Build our implementation with canonical `tensors`, those of `constants` included."""

    @abc.abstractmethod
    def key_maps(self) -> tuple[KeyMap, ...]:
        """Return the key map of every format that a checkpoint file may have."""

    def as_trained(self, names: Collection[str]) -> Variant:
        """Return this variant with what Meta's training code can vary, as the tensors of a file in its format show."""
        return self

    def training_settings(self) -> dict[str, object]:
        """Return the settings of Meta's training code in which this variant differs from the published one."""
        return {}

    def assumptions(self, names: Collection[str]) -> list[str]:
        """Return what the tensors of a file in Meta's format leave open, and what is assumed, for the log."""
        return []


def known_hashes(hashes: Mapping[str, str]) -> Mapping[DatasetName, str]:
    """Return the given hashes in the order of DATASETS."""
    return {name: hashes[name] for name in DATASETS if name in hashes}

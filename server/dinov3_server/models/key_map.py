"""State-dict key maps: how a checkpoint file's keys map to canonical tensor names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


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

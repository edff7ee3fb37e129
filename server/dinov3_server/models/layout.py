"""What a file of a model holds, in one way of naming: the words that `vit_layouts.py` and `convnext_layouts.py` use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its shape, and the canonical names of its equal parts along the first axis.

    A part called None, like an entry without parts, is checked and left out. `is_bias_mask` marks the mask of a
    fused qkv bias, and `same_as` names the tensor that this one must equal; those values are checked too.
    """

    shape: Shape
    parts: tuple[str | None, ...] = ()
    required: bool = True
    is_bias_mask: bool = False
    same_as: str | None = None


@dataclass(frozen=True)
class Layout:
    """One way of naming a variant's tensors. `spelling` maps alternative spellings of a key to the one in `entries`.

    A canonical tensor that no entry has is a bias of zeros, which the layout does not store.
    """

    name: str
    entries: Mapping[str, Entry]
    spelling: Callable[[str], str] = str

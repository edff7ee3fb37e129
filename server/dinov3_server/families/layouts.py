"""The names and shapes of a model's tensors, of either family: canonical, and in the layout that a file has."""

from __future__ import annotations

from collections.abc import Iterable

from dinov3_server.families.dinov3_convnext import layouts as convnext_layouts
from dinov3_server.families.dinov3_convnext.variants import ConvNextVariant
from dinov3_server.families.dinov3_vit import layouts as vit_layouts
from dinov3_server.families.dinov3_vit.variants import VitVariant
from dinov3_server.models.layout import Layout, Shape
from dinov3_server.models.variant import Variant


def canonical_shapes(variant: Variant) -> dict[str, Shape]:
    """Name and shape of every canonical tensor, in a fixed order."""
    match variant:
        case VitVariant():
            return vit_layouts.canonical_shapes(variant)
        case ConvNextVariant():
            return convnext_layouts.canonical_shapes(variant)
    raise TypeError(f"{variant.name} is of no known family")


def layouts(variant: Variant) -> tuple[Layout, ...]:
    """Every layout that a file of `variant` may have."""
    match variant:
        case VitVariant():
            return vit_layouts.layouts(variant)
        case ConvNextVariant():
            return convnext_layouts.layouts(variant)
    raise TypeError(f"{variant.name} is of no known family")


def layout_of(keys: Iterable[str], variant: Variant) -> Layout | None:
    """The layout of `variant` that names the most of `keys`, the first of several; None where none names any."""

    def named(layout: Layout) -> int:
        return len({layout.spelling(key) for key in keys} & layout.entries.keys())

    best = max(layouts(variant), key=named)
    return best if named(best) else None

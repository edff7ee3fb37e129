"""The preprocessing presets: their names, sizes and filters, for client and server."""

from __future__ import annotations

from typing import Literal, NamedTuple

PresetName = Literal["dinov3", "hf", "none"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
FitMethod = Literal["stretch", "crop", "pad"]


class Preset(NamedTuple):
    """How an image is resized to the model's input, unless the request gives a size or interpolation of its own."""

    name: PresetName
    size: tuple[int, int] | None
    """(height, width) in pixels; None keeps the pixels as they are."""
    interpolation: Interpolation


PRESETS = (
    Preset("dinov3", (256, 256), "bilinear"),
    Preset("hf", (224, 224), "bilinear"),
    Preset("none", None, "bilinear"),
)
"""The first is the default. What each is for: `enum Preset` in feature_service.proto."""

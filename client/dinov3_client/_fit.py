"""How pictures are fitted to the model's input, and colors."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from PIL import ImageColor

from dinov3_client._checks import check_choice, check_count
from dinov3_serving.images import Color
from dinov3_serving.presets import FitMethod
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.enums import FIT_METHODS

ColorLike = str | tuple[int, int, int]
"""(red, green, blue), 0 to 255 each, or a name or number that Pillow knows: "white", "#7c7468"."""


@dataclass(frozen=True)
class Fit:
    """How a picture is brought to the size of the model's input if their aspect ratios differ.

    Pixel for pixel it equals what torchvision's Resize, CenterCrop and Pad make of PIL images (docs/preprocessing.md).

    Raises ValueError or TypeError for impossible values.
    """

    method: FitMethod = "stretch"
    """"stretch": the aspect ratio is not kept. "crop": resize until the picture covers the input, and crop its center.
    "pad": resize until the picture fits into the input, and add borders of one color."""
    pad_color: ColorLike | None = None
    """Of the borders of "pad". None: black."""
    resize_shorter: int | None = None
    """For "crop": pixels of the shorter side after resizing, at least the longer side of the input; 256 with an input
    of 224 is the usual transform of classifiers. None: as few as cover the input."""

    def __post_init__(self) -> None:
        message(self)


def message(fit: Fit | FitMethod) -> pb.Fit:
    """Return a fit as it is sent. Raises ValueError or TypeError for impossible values."""
    if not isinstance(fit, Fit):
        check_choice("fit", fit, FIT_METHODS)
        return pb.Fit(method=FIT_METHODS[fit])
    check_choice("fit's method", fit.method, FIT_METHODS)
    sent = pb.Fit(method=FIT_METHODS[fit.method])
    if fit.pad_color is not None:
        if fit.method != "pad":
            raise ValueError(f'pad_color is given for fit {fit.method!r}; only "pad" has borders')
        sent.pad_color.CopyFrom(color_message("pad_color", fit.pad_color))
    if fit.resize_shorter is not None:
        if fit.method != "crop":
            raise ValueError(f'resize_shorter is given for fit {fit.method!r}; only "crop" resizes the shorter side')
        sent.resize_shorter = check_count("resize_shorter", fit.resize_shorter, 1, "pixels")
    return sent


def color_message(name: str, given: ColorLike) -> pb.Color:
    """Return a color as it is sent. Raises ValueError, naming `name`, if it is none."""
    color = read_color(name, given)
    return pb.Color(red=color.red, green=color.green, blue=color.blue)


def read_color(name: str, given: ColorLike) -> Color:
    """Return a color. Raises ValueError, naming `name`, if it is none."""
    try:
        color = Color(*map(operator.index, ImageColor.getrgb(given) if isinstance(given, str) else given))
    except (TypeError, ValueError):
        color = Color(-1, -1, -1)
    if not 0 <= min(color) <= max(color) <= 255:
        raise ValueError(
            f"{name} is {given!r}; it must be (red, green, blue), 0 to 255 each, or text such as 'white', '#7c7468'"
        )
    return color

"""The picture of `dinov3-client pca`: each photo beside its map, in columns of pairs, with its name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

TILE = 320  # longest side of a photo, in pixels
GAP = 8  # between a photo and its map
MARGIN = 24
LABEL = 16  # font size
BACKGROUND, INK, FAINT = (250, 250, 250), (30, 30, 30), (120, 120, 120)


class Pair(NamedTuple):
    """A photo (at most TILE in size: see `thumbnail`) and its map, one pixel a patch."""

    name: str
    photo: Image.Image
    map: Image.Image


def thumbnail(photo: Image.Image) -> Image.Image:
    """`photo` in RGB, its longest side TILE, its aspect kept."""
    scale = TILE / max(photo.size)
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    return photo.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def draw(pairs: Sequence[Pair], caption: str) -> Image.Image:
    """All pairs, about as wide as high, with `caption` below. Maps are stretched to the aspect of their photos."""
    columns = max(1, round(math.sqrt(len(pairs) / 2)))
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    heights = [max(pair.photo.height for pair in row) for row in rows]
    label_height = LABEL + 10
    width = MARGIN + columns * (2 * TILE + GAP + MARGIN)
    height = MARGIN + sum(each + label_height + MARGIN for each in heights) + label_height
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(LABEL)
    top = MARGIN
    for row, row_height in zip(rows, heights, strict=True):
        for column, pair in enumerate(row):
            left = MARGIN + column * (2 * TILE + GAP + MARGIN)
            pen.text((left, top), _fitting(pair.name, 2 * TILE + GAP, pen, font), INK, font)
            sheet.paste(pair.photo, (left, top + label_height))
            # A patch stays a visible square: smoothing would show detail that the features do not have.
            enlarged = pair.map.resize(pair.photo.size, Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + pair.photo.width + GAP, top + label_height))
        top += row_height + label_height + MARGIN
    pen.text((MARGIN, top), _fitting(caption, width - 2 * MARGIN, pen, font), FAINT, font)
    return sheet


def _fitting(
    text: str, width: int, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    """`text`, its beginning cut off where it is too long (the end of a path says more)."""
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(f"...{text}", font) > width:
        text = text[1:]
    return f"...{text}"

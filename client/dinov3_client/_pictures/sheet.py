"""Draws the sheets of `dinov3-client pca` and `similarity`: pairs of a photo and its map, in columns, with names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dinov3_client._pictures.colormap import magma

PAIRS = 24  # on a sheet
TILE = 320  # longest side of a photo, in pixels
GAP = 8  # between a photo and its map
MARGIN = 24
LABEL = 16  # font size
HEADING, LINE = LABEL + 10, LABEL + 6  # heights: of a name with the room below it, of a line of text
BAR = 14  # height of a legend's
MIN_COLUMN = 400  # width: for the name of a tall photo, and for the caption
RING = 9  # radius of a marked point's
BACKGROUND, INK, FAINT = (250, 250, 250), (30, 30, 30), (120, 120, 120)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Pair(NamedTuple):
    """A photo of at most TILE pixels (see `thumbnail`) and its map, one pixel per patch."""

    name: str
    photo: Image.Image
    map: Image.Image
    point: tuple[float, float] | None = None
    """A point to mark in both: fractions of width and height."""


class Legend(NamedTuple):
    """The scale of the maps' colors: `ticks` from the lowest value shown to the highest."""

    title: str
    ticks: Sequence[float]


def thumbnail(photo: Image.Image) -> Image.Image:
    """Return `photo` (RGB) resized to TILE on its longest side, with its aspect ratio kept."""
    scale = TILE / max(photo.size)
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    return photo.resize(size, Image.Resampling.LANCZOS)


def sheets(pairs: Iterable[Pair], caption: str, legend: Legend | None = None) -> Iterator[Image.Image]:
    """Yield sheets of PAIRS pairs each. Only one sheet is in memory at a time."""
    left = iter(pairs)
    while some := list(islice(left, PAIRS)):
        yield draw(some, caption, legend)


def draw(pairs: Sequence[Pair], caption: str, legend: Legend | None = None) -> Image.Image:
    """Draw one sheet, roughly square, with legend and `caption` below. Maps are stretched to their photos."""
    columns = max(1, round(math.sqrt(len(pairs) / 2)))
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    widths = [
        max(MIN_COLUMN, *(2 * pair.photo.width + GAP for pair in pairs[column::columns])) for column in range(columns)
    ]
    heights = [max(pair.photo.height for pair in row) for row in rows]
    font = ImageFont.load_default(LABEL)
    inner = sum(widths) + (columns - 1) * MARGIN
    lines = _wrapped(caption, inner, font)
    below = (HEADING + BAR + LINE + MARGIN if legend else 0) + len(lines) * LINE
    height = MARGIN + sum(HEADING + each + MARGIN for each in heights) + below + MARGIN - (LINE - LABEL)
    sheet = Image.new("RGB", (inner + 2 * MARGIN, height), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, row_height in zip(rows, heights, strict=True):
        left = MARGIN
        for pair, width in zip(row, widths, strict=False):
            pen.text((left, top), _fitting(pair.name, width, font), INK, font)
            _paste(pair, sheet, left, top + HEADING)
            left += width + MARGIN
        top += HEADING + row_height + MARGIN
    if legend:
        _draw_legend(legend, sheet, top, min(inner, 2 * TILE + GAP), font)
        top += HEADING + BAR + LINE + MARGIN
    for line in lines:
        pen.text((MARGIN, top), line, FAINT, font)
        top += LINE
    return sheet


def _paste(pair: Pair, sheet: Image.Image, left: int, top: int) -> None:
    # NEAREST keeps patches visible: smoothing would suggest detail that the features do not have.
    enlarged = pair.map.resize(pair.photo.size, Image.Resampling.NEAREST)
    for picture, at in ((pair.photo, left), (enlarged, left + pair.photo.width + GAP)):
        sheet.paste(picture, (at, top))
        if pair.point is not None:
            x, y = pair.point
            _ring(sheet, at + round(x * picture.width - 0.5), top + round(y * picture.height - 0.5))


def _ring(sheet: Image.Image, x: int, y: int) -> None:
    """Draw a white ring between two dark ones, visible on any background; drawn larger and shrunk for smooth edges."""
    fine, side = 4, 2 * (RING + 3) + 1
    middle = side * fine / 2
    for color, outer, inner in ((INK, RING + 2, RING - 2), (BACKGROUND, RING + 1, RING - 1)):
        mask = Image.new("L", (side * fine, side * fine))
        pen = ImageDraw.Draw(mask)
        for radius, value in ((outer * fine, 255), (inner * fine, 0)):
            pen.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=value)
        mask = mask.resize((side, side), Image.Resampling.BOX)
        sheet.paste(color, (x - side // 2, y - side // 2), mask)


def _draw_legend(legend: Legend, sheet: Image.Image, top: int, width: int, font: Font) -> None:
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, top), legend.title, INK, font)
    bar = Image.fromarray(magma(np.linspace(0, 1, width))[None]).resize((width, BAR))
    sheet.paste(bar, (MARGIN, top + HEADING))
    low, high = legend.ticks[0], legend.ticks[-1]
    for tick in legend.ticks:
        text = f"{tick:g}"
        at = MARGIN + (tick - low) / (high - low) * (width - 1)
        length = font.getlength(text)
        # Keep the outermost labels within the bar.
        start = min(max(at - length / 2, MARGIN), MARGIN + width - length)
        pen.line((at, top + HEADING + BAR, at, top + HEADING + BAR + 3), INK)
        pen.text((start, top + HEADING + BAR + 3), text, INK, font)


def _fitting(text: str, width: int, font: Font) -> str:
    """Return `text`, its beginning cut off if it is too long (the end of a path says more)."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"


def _wrapped(text: str, width: int, font: Font) -> list[str]:
    """Return lines that fit, broken at spaces; the beginning of a word that is too long is cut off."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(_fitting(word, width, font))
    return lines

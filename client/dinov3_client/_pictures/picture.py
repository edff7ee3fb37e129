"""The sheets of `dinov3-client pca` and `similarity`: each photo beside its map, in columns of pairs, with its name."""

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
LEAST_COLUMN = 400  # width: a tall photo's name needs some, and so does the caption
RING = 9  # radius of a marked point's
BACKGROUND, INK, FAINT = (250, 250, 250), (30, 30, 30), (120, 120, 120)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Pair(NamedTuple):
    """A photo (at most TILE in size: see `thumbnail`) and its map, one pixel a patch."""

    name: str
    photo: Image.Image
    map: Image.Image
    point: tuple[float, float] | None = None
    """To be marked in both: fractions of width and height."""


class Legend(NamedTuple):
    """What the colours of the maps mean: `ticks` from the lowest value shown to the highest."""

    title: str
    ticks: Sequence[float]


def thumbnail(photo: Image.Image) -> Image.Image:
    """`photo` (RGB), its longest side TILE, its aspect kept."""
    scale = TILE / max(photo.size)
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    return photo.resize(size, Image.Resampling.LANCZOS)


def sheets(pairs: Iterable[Pair], caption: str, legend: Legend | None = None) -> Iterator[Image.Image]:
    """All pairs, PAIRS on a sheet. Holds one sheet at a time."""
    left = iter(pairs)
    while some := list(islice(left, PAIRS)):
        yield draw(some, caption, legend)


def draw(pairs: Sequence[Pair], caption: str, legend: Legend | None = None) -> Image.Image:
    """One sheet, about as wide as high, with the legend and `caption` below.

    Maps are stretched to the aspect of their photos.
    """
    columns = max(1, round(math.sqrt(len(pairs) / 2)))
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    widths = [
        max(LEAST_COLUMN, *(2 * pair.photo.width + GAP for pair in pairs[column::columns])) for column in range(columns)
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
    # A patch stays a visible square: smoothing would show detail that the features do not have.
    enlarged = pair.map.resize(pair.photo.size, Image.Resampling.NEAREST)
    for picture, at in ((pair.photo, left), (enlarged, left + pair.photo.width + GAP)):
        sheet.paste(picture, (at, top))
        if pair.point is not None:
            x, y = pair.point
            _ring(sheet, at + round(x * picture.width - 0.5), top + round(y * picture.height - 0.5))


def _ring(sheet: Image.Image, x: int, y: int) -> None:
    """White between two dark edges, so that it shows on anything; drawn larger and shrunk, for smooth edges."""
    fine, side = 4, 2 * (RING + 3) + 1
    middle = side * fine / 2
    for colour, outer, inner in ((INK, RING + 2, RING - 2), (BACKGROUND, RING + 1, RING - 1)):
        mask = Image.new("L", (side * fine, side * fine))
        pen = ImageDraw.Draw(mask)
        for radius, value in ((outer * fine, 255), (inner * fine, 0)):
            pen.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=value)
        mask = mask.resize((side, side), Image.Resampling.BOX)
        sheet.paste(colour, (x - side // 2, y - side // 2), mask)


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
        # The outermost stay within the bar.
        start = min(max(at - length / 2, MARGIN), MARGIN + width - length)
        pen.line((at, top + HEADING + BAR, at, top + HEADING + BAR + 3), INK)
        pen.text((start, top + HEADING + BAR + 3), text, INK, font)


def _fitting(text: str, width: int, font: Font) -> str:
    """`text`, its beginning cut off where it is too long (the end of a path says more)."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"


def _wrapped(text: str, width: int, font: Font) -> list[str]:
    """Lines that fit, broken at spaces; a word that alone is too long loses its beginning."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(_fitting(word, width, font))
    return lines

"""`dinov3-client similarity`: draw the similarity of all patches to one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov3_client._errors import Dinov3Error
from dinov3_client._pictures import sheet
from dinov3_client._pictures.colormap import magma, ticks
from dinov3_client._pictures.sheet import Legend, Pair
from dinov3_client._pictures.similarity import Point, cosines, patch_at, read_point
from dinov3_client.bulk.images import ImageRef
from dinov3_client.cli.common import FailureLog, UsageError, connect, get_model, iter_images, print_line
from dinov3_client.cli.pictures import PatchExtractor, Photo, PhotoPatches, add_picture_flags, model_label, save

# The least range of the colors: smaller differences of cosines are rounding noise.
LEAST_RANGE = 1e-3


def add(commands: Any, server: argparse.ArgumentParser) -> None:
    similarity = commands.add_parser(
        "similarity",
        parents=[server],
        help="draw the similarity of all patches to one patch of an image",
        description="Draws the image, with the point marked, beside a map of the cosines of each patch with the patch "
        f"at that point; then other images with theirs. All maps share one scale. At most {sheet.PAIRS} images.",
    )
    similarity.add_argument("image", metavar="IMAGE", help="image file: JPEG, PNG, WebP, BMP, TIFF, GIF or AVIF")
    similarity.add_argument(
        "--at",
        type=_point,
        required=True,
        metavar="X,Y",
        help="the point, from the upper left corner: in pixels, whole numbers (320,200), or in fractions of width and "
        "height, with a decimal point (0.5,0.3); with --exif, of the upright image",
    )
    similarity.add_argument(
        "--other",
        nargs="+",
        action="extend",
        default=[],
        metavar="SOURCE",
        help="more images to compare with that patch: files and folders, globs, tar shards",
    )
    add_picture_flags(similarity)
    similarity.set_defaults(command=_similarity)


class _Map(NamedTuple):
    """A photo and the cosines of its patches."""

    photo: Photo
    cosines: NDArray[np.float64]
    """[rows, columns]"""


def _similarity(args: argparse.Namespace) -> int:
    failures = FailureLog()
    with connect(args) as client:
        model = get_model(client)
        show = PatchExtractor(args, client, model, failures)
        first = next(show([ImageRef(args.image, args.image, None, Path(args.image).stem)]), None)
        if first is None:
            raise Dinov3Error(f"without {args.image} there is nothing to compare with")
        place = _place(args.at, first.photo)
        others = show(chain.from_iterable(iter_images(args.other, failures)))
        maps = list(_maps(first, place, others))
    least = min(each.cosines.min() for each in maps)
    scale = ticks(min(least, 1.0 - LEAST_RANGE), 1.0)
    pairs = (
        Pair(
            each.photo.name,
            each.photo.thumbnail,
            Image.fromarray(magma((each.cosines - scale[0]) / (scale[-1] - scale[0]))),
            place if index == 0 else None,
        )
        for index, each in enumerate(maps)
    )
    caption = f"{model_label(model, show.layer)}; one scale for all images, least cosine {least:.3g}"
    [path] = save(args.output, pairs, len(maps), caption, Legend("Cosine with the patch in the ring", scale))
    print_line(f"{path}: {len(maps)} of {len(maps) + failures.count} images, cosines from {least:.3g}")
    return 1 if failures.count else 0


def _maps(first: PhotoPatches, place: tuple[float, float], others: Iterator[PhotoPatches]) -> Iterator[_Map]:
    row, column = patch_at(place, first.grid)
    token = first.tokens.reshape(*first.grid, -1)[row, column]
    for count, shown in enumerate(chain([first], others), 1):
        if count > sheet.PAIRS:
            raise UsageError(f"a picture holds {sheet.PAIRS} images; give at most {sheet.PAIRS - 1} to --other")
        yield _Map(shown.photo, cosines(token, shown.tokens).reshape(shown.grid))


def _place(at: Point, photo: Photo) -> tuple[float, float]:
    try:
        return at.within(*photo.size)
    except ValueError as error:
        raise UsageError(f"--at lies outside {photo.source}: {error}") from None


def _point(text: str) -> Point:
    try:
        return read_point(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

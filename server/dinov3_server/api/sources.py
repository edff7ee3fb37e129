"""The images of a request as sources of pixels: what each costs, and how its rows get into the arena."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from dinov3_server.images.cost import Cost, cost_of, transform_cost
from dinov3_server.images.decode import File
from dinov3_server.images.preprocess import transform_into, transform_pixels_into
from dinov3_serving.images import RowSpec, check_crops
from dinov3_serving.v1.images import ImageReader, Pixels, RequestedImage, check_floats


class Source(NamedTuple):
    """One image of a request, and how to write its rows.

    Attributes:
        write: takes the ranges of the arena for the pixels of `rows` and fills them, one row per step, in any thread.
            Raises InvalidInput if the image is invalid. None if it is known to be.
        cost: returns the cost of `write`, with the same errors. None if `write` only checks and copies pixels, which
            takes about 0.1 ms per megabyte, and a third of a millisecond if they are flipped.
        file: the image file, for decode processes: they are used instead of `write` if the cost is not plain.
        rows_with_size: returns `rows` with their shapes, given the (height, width) of the picture in the file. None if
            no shape depends on it.
    """

    image: int
    rows: tuple[RowSpec, ...]
    write: Callable[[Sequence[memoryview]], Generator[None, None, None]] | None
    cost: Callable[[], Cost] | None = None
    file: File | None = None
    rows_with_size: Callable[[tuple[int, int]], tuple[RowSpec, ...]] | None = None


def source_of(image: RequestedImage, reader: ImageReader, max_pixels: int) -> Source:
    """Return the source of an image that `reader` has read."""
    if image.content is None:
        return Source(image.index, image.rows, write=None)
    if isinstance(image.content, Pixels):
        return _pixel_source(image, image.content)
    file, rows = File(image.content, max_pixels, *reader.decoding), image.rows

    def cost() -> Cost:
        return cost_of(file).with_transforms([row.transform for row in rows])

    def write(outs: Sequence[memoryview]) -> Generator[None, None, None]:
        picture = file.decode()
        check_crops(rows, (picture.height, picture.width))
        for row, out in zip(rows, outs, strict=True):
            transform_into(picture, row.transform, out)
            yield

    complete = None if all(row.shape for row in rows) else partial(reader.complete_rows, rows)
    return Source(image.index, rows, write, cost, file, complete)


def _pixel_source(image: RequestedImage, pixels: Pixels) -> Source:
    rows = image.rows
    if pixels.format == "float32":
        return Source(image.index, rows, partial(_write_floats, pixels, f"{image.field}.data"))
    size = pixels.height, pixels.width
    resized = any(row.transform.changes_size(*size) for row in rows)
    cost = partial(transform_cost, *size, [row.transform for row in rows]) if resized else None
    return Source(image.index, rows, partial(_write_pixels, pixels, rows), cost)


def _write_pixels(pixels: Pixels, rows: Sequence[RowSpec], outs: Sequence[memoryview]) -> Generator[None, None, None]:
    picture = np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width, 3)
    for row, out in zip(rows, outs, strict=True):
        transform_pixels_into(picture, row.transform, out)
        yield


def _write_floats(pixels: Pixels, field: str, outs: Sequence[memoryview]) -> Generator[None, None, None]:
    check_floats(pixels.data, field)
    for out in outs:
        out[:] = pixels.data
        yield

"""Check the images of an ExtractRequest: which rows each one has, and how their pixels get into the arena."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np

from dinov3_server.api.outputs import enum_of
from dinov3_server.api.pixels import Pixels, copy_floats, read_pixels
from dinov3_server.api.status import without_traceback
from dinov3_server.api.wire import BytesResolver
from dinov3_server.config.settings import Settings
from dinov3_server.errors import InvalidInput, ServingError
from dinov3_server.images.cost import Cost, transform_cost
from dinov3_server.images.file import File
from dinov3_server.images.preprocess import (
    Box,
    Transform,
    check_box,
    check_size,
    transform,
    transform_into,
    transform_pixels_into,
)
from dinov3_server.models.interface import ModelInfo, PixelFormat, PixelShape
from dinov3_serving.presets import Interpolation
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.enums import INTERPOLATIONS, PRESETS

_PRESETS = {number: name for name, number in PRESETS.items()}
_INTERPOLATIONS: dict[pb.Interpolation, Interpolation | None] = {
    pb.INTERPOLATION_UNSPECIFIED: None,
    **{number: name for name, number in INTERPOLATIONS.items()},
}


class RowSpec(NamedTuple):
    """The input of one row of features: a whole image, or one of its views.

    `field` is its protobuf path, for errors. `shape` is None if it depends on the header of a file; if the image fails
    before the header is read, the answer has no such row.
    """

    view: int
    field: str
    transform: Transform
    shape: PixelShape | None


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


class SourceReader:
    """Reads the images of a request into `sources`, and errors of single images into `failures`, by index."""

    def __init__(
        self, preprocessing: pb.Preprocessing, resolve_bytes: BytesResolver, model: ModelInfo, settings: Settings
    ) -> None:
        self.sources: list[Source] = []
        self.failures: dict[int, ServingError] = {}
        self._resolve_bytes = resolve_bytes
        self._settings = settings
        self._exif = preprocessing.apply_exif_orientation
        self._input_shape = partial(_input_shape, model, settings.max_batch_tokens)
        size = preprocessing.size
        self._size = (size.height, size.width) if preprocessing.HasField("size") else None
        self._transform = transform(
            enum_of(pb.Preset, _PRESETS, preprocessing.preset or pb.PRESET_DINOV3, "preprocessing.preset"),
            self._size,
            enum_of(pb.Interpolation, _INTERPOLATIONS, preprocessing.interpolation, "preprocessing.interpolation"),
        )
        # The shape of every file, uint8 tensor and view without a size of its own.
        self._shape: PixelShape | None = None
        if self._transform.size:
            field = "preprocessing.size" if self._size else "preprocessing.preset"
            self._shape = self._input_shape(*self._transform.size, "uint8", field)

    def read_list(self, images: Sequence[pb.Image]) -> None:
        views = any(image.views for image in images)
        self._check_count(sum(map(count_rows, images)), "images", " (each view counts as one)" if views else "")
        for index, image in enumerate(images):
            self.sources.append(self._read_image(index, image))

    def read_packed(self, tensor: pb.Tensor) -> None:
        self._check_count(tensor.shape[0] if len(tensor.shape) == 4 else 1, "pixels.shape")
        pixels = read_pixels(tensor, self._resolve_bytes(tensor.data), "pixels", packed=True)
        rows = (self._whole_row("pixels", pixels),)
        each = memoryview(pixels.data)
        nbytes = len(each) // pixels.images
        for index in range(pixels.images):
            one = pixels._replace(data=each[index * nbytes : (index + 1) * nbytes])
            self.sources.append(_pixel_source(index, "pixels", one, rows))

    def _check_count(self, count: int, field: str, note: str = "") -> None:
        limit = self._settings.max_images_per_request
        if not 1 <= count <= limit:
            raise InvalidInput(f"{count} images in one request{note}; allowed are 1 to {limit}", field=field)

    @contextmanager
    def _record_failure(self, index: int) -> Iterator[None]:
        """Store an InvalidInput as the failure of one image, unless it has failed already."""
        try:
            yield
        except InvalidInput as error:
            self.failures.setdefault(index, without_traceback(error))

    def _read_image(self, index: int, image: pb.Image) -> Source:
        field = f"images[{index}]"
        source = image.WhichOneof("source")
        rows = tuple(RowSpec(view, field, self._transform, None) for view in range(count_rows(image)))
        pixels: Pixels | None = None
        with self._record_failure(index):
            if source is None:
                raise InvalidInput("the image is empty: set encoded (an image file) or pixels (a tensor)", field=field)
            if source == "pixels":
                pixels = read_pixels(image.pixels, self._resolve_bytes(image.pixels.data), f"{field}.pixels")
        if image.pixels.dtype == pb.DATA_TYPE_FLOAT32:  # has its own input size; if that is invalid, it has no row
            with self._record_failure(index):
                if image.views:
                    raise InvalidInput(
                        "float pixels cannot have views, as they are never resized: send uint8 pixels or an image file",
                        field=f"{field}.views",
                    )
                if pixels:
                    rows = (self._whole_row(f"{field}.pixels", pixels),)
        elif image.views:
            rows = tuple(self._view_row(index, row, view, pixels) for row, view in zip(rows, image.views, strict=True))
        else:
            with self._record_failure(index):
                rows = (self._whole_row(f"{field}.{source}" if source else field, pixels),)
        if index in self.failures:
            return Source(index, rows, write=None)
        if pixels:
            return _pixel_source(index, f"{field}.pixels", pixels, rows)
        return self._file_source(index, f"{field}.encoded", self._resolve_bytes(image.encoded), rows)

    def _whole_row(self, field: str, pixels: Pixels | None) -> RowSpec:
        """Return the row of an image without views. `pixels` is None for a file."""
        shape = self._shape
        if pixels and pixels.format == "float32":
            if self._size and self._size != (pixels.height, pixels.width):
                raise InvalidInput(
                    f"float pixels are never resized: these are {pixels.height}x{pixels.width}, preprocessing.size is "
                    f"{self._size[0]}x{self._size[1]}; leave it out or send uint8 pixels",
                    field=f"{field}.shape",
                )
            shape = None
        if pixels and not shape:
            shape = self._input_shape(pixels.height, pixels.width, pixels.format, f"{field}.shape")
        return RowSpec(0, field, self._transform, shape)

    def _view_row(self, index: int, row: RowSpec, view: pb.View, pixels: Pixels | None) -> RowSpec:
        """Return `row` with the options of `view`; without a shape if its size is invalid."""
        row = row._replace(field=f"{row.field}.views[{row.view}]")
        box, view_size = view.crop, view.size
        crop = Box(box.top, box.left, box.height, box.width) if view.HasField("crop") else None
        size = (view_size.height, view_size.width) if view.HasField("size") else None
        picture = (pixels.height, pixels.width) if pixels else None
        transform = self._transform
        with self._record_failure(index):
            row = row._replace(shape=self._view_shape(row.field, size, crop, picture))
            if crop:
                check_box(crop, picture, f"{row.field}.crop")
            filter = enum_of(pb.Interpolation, _INTERPOLATIONS, view.interpolation, f"{row.field}.interpolation")
            transform = Transform(size or transform.size, filter or transform.interpolation, crop, view.horizontal_flip)
        return row._replace(transform=transform)

    def _view_shape(
        self, field: str, size: tuple[int, int] | None, crop: Box | None, picture: tuple[int, int] | None
    ) -> PixelShape | None:
        """Return the shape of a view; None if it is the whole picture of a file in its own size."""
        if size:
            return self._input_shape(*size, "uint8", f"{field}.size")
        if self._shape:
            return self._shape
        if crop:
            check_box(crop, None, f"{field}.crop")
            return self._input_shape(crop.height, crop.width, "uint8", f"{field}.crop")
        return self._input_shape(*picture, "uint8", field) if picture else None

    def _file_source(self, index: int, field: str, data: bytes | memoryview, rows: tuple[RowSpec, ...]) -> Source:
        file = File(data, self._settings.max_image_pixels, self._exif, field)
        shape_of = self._input_shape

        def cost() -> Cost:
            return file.cost().with_transforms([row.transform for row in rows])

        def write(outs: Sequence[memoryview]) -> Generator[None, None, None]:
            image = file.decode()
            for row in rows:
                if row.transform.crop:
                    check_box(row.transform.crop, (image.height, image.width), f"{row.field}.crop")
            for row, out in zip(rows, outs, strict=True):
                transform_into(image, row.transform, out)
                yield

        def rows_with_size(size: tuple[int, int]) -> tuple[RowSpec, ...]:
            return tuple(row if row.shape else row._replace(shape=shape_of(*size, "uint8", row.field)) for row in rows)

        return Source(index, rows, write, cost, file, None if all(row.shape for row in rows) else rows_with_size)


def count_rows(image: pb.Image) -> int:
    """Return the number of rows of an image: one for each view, or one for the whole."""
    return len(image.views) or 1


def _pixel_source(index: int, field: str, pixels: Pixels, rows: tuple[RowSpec, ...]) -> Source:
    if pixels.format == "float32":
        return Source(index, rows, partial(_write_floats, pixels, f"{field}.data"))
    size = pixels.height, pixels.width
    resized = any(row.transform.resizes(*size) for row in rows)
    cost = partial(transform_cost, *size, [row.transform for row in rows]) if resized else None
    return Source(index, rows, partial(_write_pixels, pixels, rows), cost)


def _write_pixels(pixels: Pixels, rows: Sequence[RowSpec], outs: Sequence[memoryview]) -> Generator[None, None, None]:
    picture = np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width, 3)
    for row, out in zip(rows, outs, strict=True):
        transform_pixels_into(picture, row.transform, out)
        yield


def _write_floats(pixels: Pixels, field: str, outs: Sequence[memoryview]) -> Generator[None, None, None]:
    for out in outs:
        copy_floats(pixels.data, field, out)
        yield


def _input_shape(
    model: ModelInfo, max_tokens: int, height: int, width: int, format: PixelFormat, field: str
) -> PixelShape:
    """Return the shape of an input. Raises InvalidInput, naming `field`, if the model or a batch cannot take it."""
    check_size(height, width, model.patch_size, field)
    shape = PixelShape(height, width, format)
    tokens = model.tokens(shape)
    if tokens > max_tokens:
        raise InvalidInput(
            f"an image of {height}x{width} is {tokens} tokens (CLS, registers and patches); allowed are {max_tokens} "
            "(--max-batch-tokens): send a smaller image",
            field=field,
        )
    return shape

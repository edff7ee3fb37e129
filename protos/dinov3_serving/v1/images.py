"""Read the images of an ExtractRequest: which rows of features each one has, and its pixels or file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from dinov3_serving.errors import InvalidInput, ServingError, without_traceback
from dinov3_serving.framing import BytesResolver
from dinov3_serving.images import (
    Box,
    Color,
    Decoding,
    Fit,
    PixelFormat,
    PixelShape,
    RowSpec,
    Transform,
    check_box,
    check_size,
)
from dinov3_serving.model import ModelDescription
from dinov3_serving.presets import PRESETS, FitMethod, Interpolation, Preset
from dinov3_serving.v1 import enums
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.enums import enum_of

LARGEST_FLOAT = 1000.0
"""Limit of normalized pixels, which lie within about -3 to 3. The squares of larger ones may be infinite."""
_MOST_AXES = 8  # in an error message
_PIXEL_FORMATS = {number: name for name, number in enums.PIXEL_FORMATS.items()}
_INTERPOLATIONS: dict[pb.Interpolation, Interpolation | None] = {
    pb.INTERPOLATION_UNSPECIFIED: None,
    **{number: name for name, number in enums.INTERPOLATIONS.items()},
}
_FIT_METHODS: dict[pb.FitMethod, FitMethod] = {
    pb.FIT_METHOD_UNSPECIFIED: "stretch",
    **{number: name for name, number in enums.FIT_METHODS.items()},
}


class Pixels(NamedTuple):
    """The pixels of `images` images of one size: [H, W, 3] uint8 each, or [3, H, W] float32."""

    format: PixelFormat
    images: int
    height: int
    width: int
    data: bytes | memoryview


class RequestedImage(NamedTuple):
    """One image of a request, and the rows of features that it has.

    `content` is its pixels, or the bytes of its file; None if the image is invalid. `field` is its protobuf path.
    """

    index: int
    field: str
    rows: tuple[RowSpec, ...]
    content: Pixels | bytes | memoryview | None


class ImageReader:
    """Reads the images of a request into `images`, and the errors of single images into `failures`, by index.

    `decoding` has the options for its files.

    max_images: the most images, or views of them, in a request. max_tokens: the most tokens of one image.
    """

    def __init__(
        self,
        request: pb.ExtractRequest,
        model: ModelDescription,
        *,
        max_images: int,
        max_tokens: int,
        resolve_bytes: BytesResolver = bytes,
        presets: Sequence[Preset] = PRESETS,
    ) -> None:
        """Read `request`. Raises InvalidInput if it is wrong as a whole."""
        self.images: list[RequestedImage] = []
        self.failures: dict[int, ServingError] = {}
        self._model = model
        self._max_images = max_images
        self._max_tokens = max_tokens
        self._resolve_bytes = resolve_bytes
        preprocessing, given = request.preprocessing, request.preprocessing.size
        self._size = (given.height, given.width) if preprocessing.HasField("size") else None
        known = {enums.PRESETS[preset.name]: preset for preset in presets}
        preset = enum_of(pb.Preset, known, preprocessing.preset or pb.PRESET_DINOV3, "preprocessing.preset")
        filter = enum_of(pb.Interpolation, _INTERPOLATIONS, preprocessing.interpolation, "preprocessing.interpolation")
        color = preprocessing.background
        self.decoding = Decoding(
            preprocessing.apply_exif_orientation,
            read_color(color, "preprocessing.background") if preprocessing.HasField("background") else None,
            preprocessing.allow_truncated,
        )
        fit, size = read_fit(preprocessing.fit, "preprocessing.fit"), self._size or preset.size
        check_fit(fit, size, "preprocessing.fit")
        self._transform = Transform(size, filter or preset.interpolation, fit=fit)
        # The shape of every file, uint8 tensor and view without a size of its own.
        self._shape: PixelShape | None = None
        if self._transform.size:
            field = "preprocessing.size" if self._size else "preprocessing.preset"
            self._shape = self._input_shape(*self._transform.size, "uint8", field)
        if bool(request.images) == request.HasField("pixels"):
            found = "both images and pixels are" if request.images else "neither images nor pixels is"
            raise InvalidInput(f"{found} set: send one of them", field="images")
        if request.images:
            self._read_list(request.images)
        else:
            self._read_packed(request.pixels)

    def complete_rows(self, rows: Sequence[RowSpec], picture: tuple[int, int]) -> tuple[RowSpec, ...]:
        """Return rows of a file with their shapes, given its picture's (height, width). Raises InvalidInput."""
        return tuple(
            row if row.shape else row._replace(shape=self._input_shape(*picture, "uint8", row.field)) for row in rows
        )

    @contextmanager
    def record_failure(self, index: int) -> Iterator[None]:
        """Store an InvalidInput as the failure of one image, unless it has failed already."""
        try:
            yield
        except InvalidInput as error:
            self.failures.setdefault(index, without_traceback(error))

    def _read_list(self, images: Sequence[pb.Image]) -> None:
        views = any(image.views for image in images)
        self._check_count(sum(map(count_rows, images)), "images", " (each view counts as one)" if views else "")
        for index, image in enumerate(images):
            self.images.append(self._read_image(index, image))

    def _read_packed(self, tensor: pb.Tensor) -> None:
        self._check_count(tensor.shape[0] if len(tensor.shape) == 4 else 1, "pixels.shape")
        pixels = read_pixels(tensor, self._resolve_bytes(tensor.data), "pixels", packed=True)
        rows = (self._whole_row("pixels", pixels),)
        each = memoryview(pixels.data)
        nbytes = len(each) // pixels.images
        for index in range(pixels.images):
            one = pixels._replace(data=each[index * nbytes : (index + 1) * nbytes])
            self.images.append(RequestedImage(index, "pixels", rows, one))

    def _check_count(self, count: int, field: str, note: str = "") -> None:
        if not 1 <= count <= self._max_images:
            raise InvalidInput(f"{count} images in one request{note}; allowed are 1 to {self._max_images}", field=field)

    def _read_image(self, index: int, image: pb.Image) -> RequestedImage:
        field = f"images[{index}]"
        source = image.WhichOneof("source")
        rows = tuple(RowSpec(view, field, self._transform, None) for view in range(count_rows(image)))
        pixels: Pixels | None = None
        with self.record_failure(index):
            if source is None:
                raise InvalidInput("the image is empty: set encoded (an image file) or pixels (a tensor)", field=field)
            if source == "pixels":
                pixels = read_pixels(image.pixels, self._resolve_bytes(image.pixels.data), f"{field}.pixels")
        if image.pixels.dtype == pb.DATA_TYPE_FLOAT32:  # has its own input size; if that is invalid, it has no row
            with self.record_failure(index):
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
            with self.record_failure(index):
                rows = (self._whole_row(f"{field}.{source}" if source else field, pixels),)
        if index in self.failures:
            return RequestedImage(index, field, rows, None)
        return RequestedImage(index, f"{field}.{source}", rows, pixels or self._resolve_bytes(image.encoded))

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
            if self._transform.fit.method != "stretch":
                raise InvalidInput(
                    f"float pixels are never resized: leave out preprocessing.fit ({self._transform.fit.method}), or "
                    "send uint8 pixels",
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
        with self.record_failure(index):
            row = row._replace(shape=self._view_shape(row.field, size, crop, picture))
            if crop:
                check_box(crop, picture, f"{row.field}.crop")
            filter = enum_of(pb.Interpolation, _INTERPOLATIONS, view.interpolation, f"{row.field}.interpolation")
            fit, fit_field = transform.fit, "preprocessing.fit"
            if view.HasField("fit"):
                fit, fit_field = read_fit(view.fit, f"{row.field}.fit"), f"{row.field}.fit"
            check_fit(fit, size or transform.size, fit_field)
            transform = Transform(
                size or transform.size, filter or transform.interpolation, crop, view.horizontal_flip, fit
            )
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

    def _input_shape(self, height: int, width: int, format: PixelFormat, field: str) -> PixelShape:
        """Return the shape of an input. Raises InvalidInput if the model or a batch cannot take it."""
        check_size(height, width, self._model.patch_size, field)
        tokens = self._model.tokens((height, width))
        if tokens > self._max_tokens:
            raise InvalidInput(
                f"an image of {height}x{width} is {tokens} tokens (CLS, registers and patches); allowed are "
                f"{self._max_tokens} (--max-batch-tokens): send a smaller image",
                field=field,
            )
        return PixelShape(height, width, format)


def count_rows(image: pb.Image) -> int:
    """Return the number of rows of an image: one for each view, or one for the whole."""
    return len(image.views) or 1


def read_color(color: pb.Color, field: str) -> Color:
    """Return a color. Raises InvalidInput, naming `field`, for numbers over 255."""
    found = Color(color.red, color.green, color.blue)
    if max(found) > 255:
        raise InvalidInput(f"the color {tuple(found)} (red, green, blue) has a number over 255", field=field)
    return found


def read_fit(fit: pb.Fit, field: str) -> Fit:
    """Return a fit. Raises InvalidInput, naming `field` or one below it, for options that its method does not have."""
    method = enum_of(pb.FitMethod, _FIT_METHODS, fit.method, f"{field}.method")
    if fit.HasField("pad_color") and method != "pad":
        raise InvalidInput(
            f"pad_color is set for {method}: only FIT_METHOD_PAD has borders", field=f"{field}.pad_color"
        )
    if fit.resize_shorter and method != "crop":
        raise InvalidInput(
            f"resize_shorter is {fit.resize_shorter} for {method}: only FIT_METHOD_CROP resizes the shorter side",
            field=f"{field}.resize_shorter",
        )
    return Fit(method, read_color(fit.pad_color, f"{field}.pad_color"), fit.resize_shorter)


def check_fit(fit: Fit, size: tuple[int, int] | None, field: str) -> None:
    """Raise InvalidInput, naming `field` or one below it, unless a picture can be fitted to an input of `size`."""
    if size is None and fit.method != "stretch":
        raise InvalidInput(
            f"{fit.method} needs the size of the model's input: set a size, or another preset than PRESET_NONE",
            field=f"{field}.method",
        )
    if size and 0 < fit.resize_shorter < max(size):
        raise InvalidInput(
            f"resize_shorter is {fit.resize_shorter}, less than the input of {size[0]}x{size[1]} (height x width): "
            f"allowed are {max(size)} and more, or 0 to just cover the input",
            field=f"{field}.resize_shorter",
        )


def read_pixels(tensor: pb.Tensor, data: bytes | memoryview, field: str, packed: bool = False) -> Pixels:
    """Return the pixels of `tensor`, whose content is `data`: of one image, or of N `packed` ones.

    Raises InvalidInput if dtype, shape and length do not match.
    """
    layouts = ("[N, H, W, 3]", "[N, 3, H, W]") if packed else ("[H, W, 3]", "[3, H, W]")
    allowed = f"allowed are DATA_TYPE_UINT8 as {layouts[0]} and DATA_TYPE_FLOAT32 as {layouts[1]}"
    if tensor.dtype not in _PIXEL_FORMATS:
        known = tensor.dtype in pb.DataType.values()
        given = pb.DataType.Name(tensor.dtype) if known else str(tensor.dtype)
        raise InvalidInput(f"pixels cannot be {given}; {allowed}", field=f"{field}.dtype")
    format = _PIXEL_FORMATS[tensor.dtype]
    channels_last = format == "uint8"
    axes = list(tensor.shape[:_MOST_AXES])
    if len(tensor.shape) != 3 + packed or axes[packed + 2 * channels_last] != 3 or min(axes) < 1:
        raise InvalidInput(
            f"{pb.DataType.Name(tensor.dtype)} pixels of shape {axes}; {allowed}", field=f"{field}.shape"
        )
    images, *image = axes if packed else (1, *axes)
    height, width = image[:2] if channels_last else image[1:]
    expected = images * PixelShape(height, width, format).nbytes
    if len(data) != expected:
        raise InvalidInput(
            f"{format} pixels of shape {axes} are {expected} bytes; {len(data)} were sent", field=f"{field}.data"
        )
    return Pixels(format, images, height, width, data)


def check_floats(data: bytes | memoryview, field: str) -> None:
    """Raise InvalidInput, naming `field`, for float32 pixels that are NaN or beyond LARGEST_FLOAT."""
    values = np.frombuffer(data, "<f4")
    if not (values.min() >= -LARGEST_FLOAT and values.max() <= LARGEST_FLOAT):  # false for NaN too
        wrong = values.size - np.count_nonzero(np.abs(values) <= LARGEST_FLOAT)
        raise InvalidInput(
            f"{wrong} of {values.size} pixel values are NaN or beyond {LARGEST_FLOAT:g}; float pixels are normalized "
            "by the model's mean and std, which leaves them within about -3 to 3",
            field=field,
        )

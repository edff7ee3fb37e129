"""Reads the images and views of a request with Pillow."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from dinov3_client._model import Model
from dinov3_client.testing._failure import Failure, invalid
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.enums import INTERPOLATIONS, PIXEL_DTYPES, PRESETS

Array = NDArray[Any]
Size = tuple[int, int]
"""(height, width) in pixels."""

_FILTERS = {
    pb.INTERPOLATION_UNSPECIFIED: None,
    **{number: Image.Resampling[name.upper()] for name, number in INTERPOLATIONS.items()},
}
_PIXELS = {number: np.dtype(name) for name, number in PIXEL_DTYPES.items()}
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")

E = TypeVar("E", bound=int)
T = TypeVar("T")


class FeatureRow(NamedTuple):
    """One row of features: of a view of an image, or of the whole image (`view` 0)."""

    image: int
    view: int
    size: Size
    pixels: Array | None
    """uint8 [H, W, 3] or float32 [3, H, W]; None of an image that failed."""


class _ViewSpec(NamedTuple):
    """A requested view, or the whole picture. `size` is None while it is unknown, or if it is invalid."""

    view: int
    field: str
    size: Size | None
    crop: pb.Box | None
    filter: Image.Resampling
    flip: bool


def enum_of(names: EnumTypeWrapper, allowed: Mapping[E, T], value: E, field: str) -> T:
    """Return `allowed[value]` of an enum's value. Raises Failure."""
    if value in allowed:
        return allowed[value]
    given = names.Name(value) if value in names.values() else str(value)
    raise invalid(
        f"{field.rpartition('.')[2]} is {given}; allowed are {', '.join(names.Name(one) for one in allowed)}", field
    )


class RequestReader:
    """Reads the images of one request into `rows`, and the errors of some into `failures`.

    Raises Failure for errors of the whole request.
    """

    def __init__(self, preprocessing: pb.Preprocessing, model: Model) -> None:
        self.failures: dict[int, Failure] = {}
        self.rows: list[FeatureRow] = []
        self._patch = model.patch_size
        self._other_tokens = 1 + model.register_tokens
        self._limits = model.limits
        self._exif = preprocessing.apply_exif_orientation
        presets = {PRESETS[preset.name]: preset for preset in model.presets}
        preset = enum_of(pb.Preset, presets, preprocessing.preset or pb.PRESET_DINOV3, "preprocessing.preset")
        default = Image.Resampling[preset.interpolation.upper()]
        self._size = preset.size
        self._filter = _filter(preprocessing.interpolation, "preprocessing.interpolation", default)
        self._given: Size | None = None
        if preprocessing.HasField("size"):
            self._given = self._size = preprocessing.size.height, preprocessing.size.width
        if self._size:
            self._checked(self._size, "preprocessing.size" if self._given else "preprocessing.preset")

    def read(self, request: pb.ExtractRequest) -> None:
        if bool(request.images) == request.HasField("pixels"):
            given = "both images and pixels are" if request.images else "neither images nor pixels is"
            raise invalid(f"{given} set: send one of them", "images")
        if request.images:
            self._check_count(sum(max(1, len(image.views)) for image in request.images), "images")
            for index, image in enumerate(request.images):
                self._read_image(index, image)
            return
        shape = request.pixels.shape
        self._check_count(shape[0] if len(shape) == 4 else 1, "pixels.shape")
        for index, pixels in enumerate(_array(request.pixels, "pixels", axes=4)):
            if pixels.dtype == np.float32:
                self._read_floats(index, "pixels", pixels)
            else:
                size = self._size or self._checked(pixels.shape[:2], "pixels.shape")
                self._read_picture(index, [_ViewSpec(0, "pixels", size, None, self._filter, False)], pixels)

    def _read_image(self, index: int, image: pb.Image) -> None:
        field = f"images[{index}]"
        pixels: Array | None = None
        with self._failing(index):
            if image.WhichOneof("source") is None:
                raise invalid("the image is empty: set encoded (an image file) or pixels (a tensor)", field)
            if image.HasField("pixels"):
                pixels = _array(image.pixels, f"{field}.pixels", axes=3)
        if image.pixels.dtype == pb.DATA_TYPE_FLOAT32:
            with self._failing(index):
                if image.views:
                    raise invalid("float pixels have no views: they are the model's input already", f"{field}.views")
            if pixels is not None and index not in self.failures:
                with self._failing(index):
                    self._read_floats(index, f"{field}.pixels", pixels)
            return
        if image.views:
            specs = [self._part(index, f"{field}.views[{v}]", v, view, pixels) for v, view in enumerate(image.views)]
        else:
            field += f".{image.WhichOneof('source')}"
            size = self._size
            with self._failing(index):
                if size is None and pixels is not None:
                    size = self._checked(pixels.shape[:2], f"{field}.shape")
            specs = [_ViewSpec(0, field, size, None, self._filter, False)]
        self._read_picture(index, specs, image.encoded if pixels is None else pixels)

    def _part(self, index: int, field: str, number: int, view: pb.View, pixels: Array | None) -> _ViewSpec:
        crop = view.crop if view.HasField("crop") else None
        size, filter = None, self._filter
        with self._failing(index):
            if view.HasField("size"):
                size = self._checked((view.size.height, view.size.width), f"{field}.size")
            elif self._size:
                size = self._size
            elif crop:
                _check_crop(crop, None, f"{field}.crop")
                size = self._checked((crop.height, crop.width), f"{field}.crop")
            elif pixels is not None:
                size = self._checked(pixels.shape[:2], field)
            if crop:
                _check_crop(crop, pixels, f"{field}.crop")
            filter = _filter(view.interpolation, f"{field}.interpolation", self._filter)
        return _ViewSpec(number, field, size, crop, filter, view.horizontal_flip)

    def _read_picture(self, index: int, specs: list[_ViewSpec], picture: Array | bytes) -> None:
        """Add a row for each of `specs` of a file or pixels; without pixels if the image failed or fails now."""
        done: dict[int, Array] = {}
        if index not in self.failures:
            with self._failing(index):
                pixels = self._decoded(index, picture) if isinstance(picture, bytes) else picture
                for at, spec in enumerate(specs):
                    specs[at] = spec._replace(size=spec.size or self._checked(pixels.shape[:2], spec.field))
                for spec in specs:
                    if spec.crop:
                        _check_crop(spec.crop, pixels, f"{spec.field}.crop")
                done = {spec.view: _view(pixels, spec) for spec in specs}
        self.rows += [FeatureRow(index, spec.view, spec.size, done.get(spec.view)) for spec in specs if spec.size]

    def _read_floats(self, index: int, field: str, pixels: Array) -> None:
        size = pixels.shape[1], pixels.shape[2]
        if self._given and self._given != size:
            raise invalid(f"float pixels are never resized: these are {_by(size)}", f"{field}.shape")
        self._checked(size, f"{field}.shape")
        with self._failing(index):
            if not (np.abs(pixels) <= 1000).all():
                raise invalid("pixel values are NaN or beyond 1000", f"{field}.data")
        self.rows.append(FeatureRow(index, 0, size, None if index in self.failures else pixels))

    def _decoded(self, index: int, data: bytes) -> Array:
        field = f"images[{index}].encoded"
        try:
            picture: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
            pixels, most = picture.height * picture.width, self._limits.max_image_pixels
            if pixels > most:
                raise invalid(f"the image has {pixels} pixels, allowed are {most}", field)
            if self._exif:
                picture = ImageOps.exif_transpose(picture)
            return np.asarray(picture.convert("RGB"))
        except Failure:
            raise
        except UnidentifiedImageError:  # its message contains a memory address
            raise invalid(f"the file of {len(data)} bytes is of no known format", field) from None
        except Exception as error:  # Pillow raises many kinds of errors for broken files
            raise invalid(f"the file of {len(data)} bytes cannot be decoded: {error}", field) from None

    @contextmanager
    def _failing(self, index: int) -> Iterator[None]:
        """Make a Failure that of the image alone; its first one counts."""
        try:
            yield
        except Failure as failure:
            self.failures.setdefault(index, failure)

    def _check_count(self, count: int, field: str) -> None:
        most = self._limits.max_images_per_request
        if not 1 <= count <= most:
            raise invalid(f"{count} images in one request; allowed are 1 to {most}", field)

    def _checked(self, size: tuple[int, ...], field: str) -> Size:
        height, width = size
        patch, most = self._patch, self._limits.max_image_tokens
        if min(size) < 1 or height % patch or width % patch:
            raise invalid(f"{_by(size)} pixels: both must be positive multiples of the patch size, {patch}", field)
        tokens = self._other_tokens + height // patch * (width // patch)
        if tokens > most:
            raise invalid(f"an image of {_by(size)} is {tokens} tokens; allowed are {most}", field)
        return height, width


def _view(pixels: Array, spec: _ViewSpec) -> Array:
    """Crop, then resize, then flip."""
    image = Image.fromarray(pixels)
    if spec.crop:
        top, left = spec.crop.top, spec.crop.left
        image = image.crop((left, top, left + spec.crop.width, top + spec.crop.height))
    assert spec.size is not None
    height, width = spec.size
    if image.size != (width, height):
        image = image.resize((width, height), spec.filter)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if spec.flip else image)


def _check_crop(crop: pb.Box, pixels: Array | None, field: str) -> None:
    """Raise Failure unless the crop is not empty and, if the picture is known, lies within it."""
    given = f"the crop of {crop.height}x{crop.width} at top {crop.top}, left {crop.left}"
    if not (crop.height and crop.width):
        raise invalid(f"{given} has no pixels", field)
    if pixels is not None and (crop.top + crop.height > pixels.shape[0] or crop.left + crop.width > pixels.shape[1]):
        raise invalid(f"{given} reaches beyond the picture of {_by(pixels.shape[:2])}", field)


def _filter(interpolation: pb.Interpolation, field: str, default: Image.Resampling) -> Image.Resampling:
    given = enum_of(pb.Interpolation, _FILTERS, interpolation, field)
    return default if given is None else given


def _array(tensor: pb.Tensor, field: str, axes: int) -> Array:
    """Return the pixels of one image (3 axes) or of N packed ones (4)."""
    allowed = "allowed are uint8 [H, W, 3] and float32 [3, H, W]" + (", packed [N, ...]" if axes == 4 else "")
    if tensor.dtype not in _PIXELS:
        raise invalid(f"pixels cannot be of the dtype {tensor.dtype}; {allowed}", f"{field}.dtype")
    dtype, shape = _PIXELS[tensor.dtype], tuple(tensor.shape)
    channels = -1 if dtype == np.uint8 else -3
    if len(shape) != axes or min(shape) < 1 or shape[channels] != 3:
        raise invalid(f"{dtype} pixels of shape {list(shape)}; {allowed}", f"{field}.shape")
    nbytes = int(np.prod(shape)) * dtype.itemsize
    if len(tensor.data) != nbytes:
        raise invalid(
            f"{dtype} pixels of shape {list(shape)} are {nbytes} bytes; {len(tensor.data)} were sent", f"{field}.data"
        )
    return np.frombuffer(tensor.data, dtype).reshape(shape)


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"

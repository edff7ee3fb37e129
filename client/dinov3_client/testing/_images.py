"""Images and views of a request to the model's pixels, by Pillow."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dinov3_client._model import Model
from dinov3_client.testing._failure import Failure, invalid
from dinov3_serving.v1 import feature_service_pb2 as pb

Array = NDArray[Any]
Size = tuple[int, int]
"""(height, width) in pixels."""

_PRESETS: dict[int, Size | None] = {
    pb.PRESET_UNSPECIFIED: (256, 256),
    pb.PRESET_DINOV3: (256, 256),
    pb.PRESET_HF: (224, 224),
    pb.PRESET_NONE: None,
}
_FILTERS: dict[int, Image.Resampling | None] = {
    pb.INTERPOLATION_UNSPECIFIED: None,
    pb.INTERPOLATION_NEAREST: Image.Resampling.NEAREST,
    pb.INTERPOLATION_BILINEAR: Image.Resampling.BILINEAR,
    pb.INTERPOLATION_BICUBIC: Image.Resampling.BICUBIC,
    pb.INTERPOLATION_LANCZOS: Image.Resampling.LANCZOS,
}
_PIXELS: dict[int, type[np.generic]] = {pb.DATA_TYPE_UINT8: np.uint8, pb.DATA_TYPE_FLOAT32: np.float32}
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")

T = TypeVar("T")


class Row(NamedTuple):
    """One row of features to be: of a view of an image, or of the whole of it (`view` 0)."""

    image: int
    view: int
    size: Size
    pixels: Array | None
    """uint8 [H, W, 3] or float32 [3, H, W]; None of an image that failed."""


def enum_of(names: EnumTypeWrapper, allowed: Mapping[int, T], value: int, field: str) -> T:
    if value in allowed:
        return allowed[value]
    given = names.Name(value) if value in names.values() else str(value)
    raise invalid(
        f"{field.rpartition('.')[2]} is {given}; allowed are {', '.join(names.Name(one) for one in allowed)}", field
    )


class Reader:
    """Reads the images of one request. Raises Failure for what is wrong with the request as a whole."""

    def __init__(self, preprocessing: pb.Preprocessing, model: Model) -> None:
        self._model = model
        self._size = enum_of(pb.Preset, _PRESETS, preprocessing.preset, "preprocessing.preset")
        self._given: Size | None = None
        if preprocessing.HasField("size"):
            self._given = self._size = preprocessing.size.height, preprocessing.size.width
        self._filter = _filter(preprocessing.interpolation, "preprocessing.interpolation")
        self._exif = preprocessing.apply_exif_orientation
        if self._size:
            self._check_size(self._size, "preprocessing.size" if self._given else "preprocessing.preset")
        self.failures: dict[int, Failure] = {}
        self.rows: list[Row] = []

    def read(self, request: pb.ExtractRequest) -> None:
        if bool(request.images) == request.HasField("pixels"):
            given = "both images and pixels are" if request.images else "neither images nor pixels is"
            raise invalid(f"{given} set: send one of them", "images")
        if request.HasField("pixels"):
            shape = request.pixels.shape
            self._check_count(shape[0] if len(shape) == 4 else 1, "pixels.shape")
            for index, pixels in enumerate(_array(request.pixels, "pixels", axes=4)):
                self.rows += self._views(index, "pixels", pixels, ())
            return
        self._check_count(sum(max(1, len(image.views)) for image in request.images), "images")
        for index, image in enumerate(request.images):
            try:
                self.rows += list(self._image(index, image))
            except Failure as failure:
                self.failures[index] = failure
                self.rows += self._empty_rows(index, image)

    def _image(self, index: int, image: pb.Image) -> Iterator[Row]:
        field = f"images[{index}]"
        match image.WhichOneof("source"):
            case "encoded":
                field, pixels = f"{field}.encoded", self._decoded(image.encoded, f"{field}.encoded")
            case "pixels":
                field, pixels = f"{field}.pixels", _array(image.pixels, f"{field}.pixels", axes=3)
            case _:
                raise invalid("the image is empty: set encoded (an image file) or pixels (a tensor)", field)
        if image.views and pixels.dtype != np.uint8:
            raise invalid("float pixels have no views: they are the model's input already", f"images[{index}].views")
        return self._views(index, field, pixels, image.views)

    def _views(self, index: int, field: str, pixels: Array, views: Any) -> Iterator[Row]:
        """`field` is that of the whole picture."""
        if pixels.dtype != np.uint8:
            own = pixels.shape[1], pixels.shape[2]
            if self._given and self._given != own:
                raise invalid(f"float pixels are never resized: these are {_by(own)}", f"{field}.shape")
            self._check_size(own, f"{field}.shape")
            if not np.isfinite(pixels).all():
                raise invalid("pixel values are NaN or infinite", f"{field}.data")
            yield Row(index, 0, own, pixels)
            return
        picture = Image.fromarray(pixels)
        if not views:
            yield self._row(index, 0, picture, self._size, self._filter, field)
        for number, view in enumerate(views):
            at = f"images[{index}].views[{number}]"
            part = picture.crop(_corners(view.crop, picture, f"{at}.crop")) if view.HasField("crop") else picture
            size = (view.size.height, view.size.width) if view.HasField("size") else self._size
            filter = _filter(view.interpolation, f"{at}.interpolation", self._filter)
            row = self._row(index, number, part, size, filter, f"{at}.size" if view.HasField("size") else at)
            yield row._replace(pixels=row.pixels[:, ::-1]) if view.horizontal_flip and row.pixels is not None else row

    def _row(
        self, index: int, view: int, picture: Image.Image, size: Size | None, filter: Image.Resampling, field: str
    ) -> Row:
        size = size or (picture.height, picture.width)
        self._check_size(size, field)
        if picture.size != size[::-1]:
            picture = picture.resize(size[::-1], filter)
        return Row(index, view, size, np.asarray(picture))

    def _empty_rows(self, index: int, image: pb.Image) -> Iterator[Row]:
        """Of a failed image: a row for each of its views whose size is known all the same."""
        if image.pixels.dtype == pb.DATA_TYPE_FLOAT32:
            return
        for number, view in enumerate(image.views or [pb.View()]):
            size = (view.size.height, view.size.width) if view.HasField("size") else self._size
            if size:
                try:
                    self._check_size(size, "")
                except Failure:
                    continue
                yield Row(index, number, size, None)

    def _decoded(self, data: bytes, field: str) -> Array:
        try:
            picture: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
            pixels, most = picture.height * picture.width, self._model.limits.max_image_pixels
            if pixels > most:
                raise invalid(f"the image has {pixels} pixels, allowed are {most}", field)
            if self._exif:
                picture = ImageOps.exif_transpose(picture)
            return np.asarray(picture.convert("RGB"))
        except Failure:
            raise
        except Exception as error:  # whatever Pillow raises on a file is the fault of that file
            raise invalid(f"the file of {len(data)} bytes cannot be decoded: {error}", field) from None

    def _check_count(self, count: int, field: str) -> None:
        most = self._model.limits.max_images_per_request
        if not 1 <= count <= most:
            raise invalid(f"{count} images in one request; allowed are 1 to {most}", field)

    def _check_size(self, size: Size, field: str) -> None:
        patch, most = self._model.patch_size, self._model.limits.max_image_tokens
        if min(size) < 1 or size[0] % patch or size[1] % patch:
            raise invalid(f"{_by(size)} pixels: both must be positive multiples of the patch size, {patch}", field)
        tokens = 1 + self._model.register_tokens + size[0] // patch * (size[1] // patch)
        if tokens > most:
            raise invalid(f"an image of {_by(size)} is {tokens} tokens; allowed are {most}", field)


def _filter(interpolation: int, field: str, default: Image.Resampling = Image.Resampling.BILINEAR) -> Image.Resampling:
    given = enum_of(pb.Interpolation, _FILTERS, interpolation, field)
    return default if given is None else given


def _corners(crop: pb.Box, picture: Image.Image, field: str) -> tuple[int, int, int, int]:
    """As Pillow's crop takes them."""
    bottom, right = crop.top + crop.height, crop.left + crop.width
    if not (crop.height and crop.width and bottom <= picture.height and right <= picture.width):
        raise invalid(
            f"the crop of {crop.height}x{crop.width} pixels at top {crop.top}, left {crop.left} is empty or leaves the "
            f"picture of {picture.height}x{picture.width}",
            field,
        )
    return crop.left, crop.top, right, bottom


def _array(tensor: pb.Tensor, field: str, axes: int) -> Array:
    """The pixels of one image (3 axes) or of N packed ones (4)."""
    allowed = "allowed are uint8 [H, W, 3] and float32 [3, H, W]" + (", packed [N, ...]" if axes == 4 else "")
    if tensor.dtype not in _PIXELS:
        raise invalid(f"pixels cannot be of the dtype {tensor.dtype}; {allowed}", f"{field}.dtype")
    dtype, shape = np.dtype(_PIXELS[tensor.dtype]), tuple(tensor.shape)
    channels = -1 if dtype == np.uint8 else -3
    if len(shape) != axes or min(shape) < 1 or shape[channels] != 3:
        raise invalid(f"{dtype} pixels of shape {list(shape)}; {allowed}", f"{field}.shape")
    nbytes = int(np.prod(shape)) * dtype.itemsize
    if len(tensor.data) != nbytes:
        raise invalid(
            f"{dtype} pixels of shape {list(shape)} are {nbytes} bytes; {len(tensor.data)} were sent", f"{field}.data"
        )
    return np.frombuffer(tensor.data, dtype).reshape(shape)


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"

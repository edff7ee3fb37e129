"""An ExtractRequest, checked: which features it wants, and how each of its images becomes pixels in an arena."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from dinov3_server.api.outputs import enum_of, read_outputs
from dinov3_server.api.status import kept
from dinov3_server.backbone import registry
from dinov3_server.backbone.interface import FeatureSpec, ModelInfo, PixelFormat, PixelShape
from dinov3_server.config import Settings
from dinov3_server.errors import ConfigError, InvalidInput, ModelMismatch, ServingError
from dinov3_server.images.decode import decode, probe
from dinov3_server.images.preprocess import check_size, resize_into, resize_pixels_into, transform
from dinov3_serving.v1 import feature_service_pb2 as pb

_PRESETS = {pb.PRESET_DINOV3: "dinov3", pb.PRESET_HF: "hf", pb.PRESET_NONE: "none"}
_INTERPOLATIONS = {
    pb.INTERPOLATION_UNSPECIFIED: None,
    pb.INTERPOLATION_NEAREST: "nearest",
    pb.INTERPOLATION_BILINEAR: "bilinear",
    pb.INTERPOLATION_BICUBIC: "bicubic",
    pb.INTERPOLATION_LANCZOS: "lanczos",
}
_IS_BULK = {pb.PRIORITY_INTERACTIVE: False, pb.PRIORITY_BULK: True}
_PIXEL_FORMATS: dict[pb.DataType, PixelFormat] = {pb.DATA_TYPE_UINT8: "uint8", pb.DATA_TYPE_FLOAT32: "float32"}
_MOST_AXES = 8  # that an error message shows

AnyMessage = TypeVar("AnyMessage", bound=Message)


class Source(NamedTuple):
    """One image on its way to a row of a block.

    `write` fills the row's pixels in the arena, from any thread; it raises InvalidInput where the image is at fault.
    None: the image failed already, and its row is there to stay zero. `quick` says that all it does is to copy, and to
    check what it copies: about a tenth of a millisecond a megabyte. Where only the file's header tells the input
    size, `shape` is None and `measure` reads it, with the same errors.
    """

    image: int
    field: str
    shape: PixelShape | None
    write: Callable[[memoryview], None] | None
    measure: Callable[[], PixelShape] | None = None
    quick: bool = False


@dataclass
class Query:
    """What is to be computed for one request. `failures` is by image; see `Source` for what has a row all the same."""

    spec: FeatureSpec
    bulk: bool
    sources: list[Source]
    failures: dict[int, ServingError]

    @property
    def unmeasured(self) -> bool:
        return any(source.measure for source in self.sources)

    def measure(self) -> None:
        """Read the headers of files whose size counts. Takes up to a millisecond a file."""
        measured = []
        for source in self.sources:
            try:
                measured.append(source._replace(shape=source.measure()) if source.measure else source)
            except InvalidInput as error:
                self.failures[source.image] = kept(error)
        self.sources = measured

    def by_shape(self) -> dict[PixelShape, list[Source]]:
        """Shapes in order of first use, each with its images, ascending."""
        groups: dict[PixelShape, list[Source]] = {}
        for source in self.sources:
            assert source.shape is not None, "not measured"
            groups.setdefault(source.shape, []).append(source)
        return groups


def parse(message: type[AnyMessage], data: bytes) -> AnyMessage:
    try:
        return message.FromString(data)
    except DecodeError:
        raise InvalidInput(f"the {len(data)} bytes that were sent are no {message.DESCRIPTOR.full_name}") from None


def count_images(request: pb.ExtractRequest) -> int:
    """How many images a request brings, by its own account; 0 where that makes no sense."""
    shape = request.pixels.shape
    return len(request.images) or (max(shape[0], 0) if len(shape) == 4 else 0)


def read_request(request: pb.ExtractRequest, model: ModelInfo, settings: Settings) -> Query:
    """Raises ModelMismatch, or InvalidInput where the request as a whole is at fault."""
    _check_pins(request, model)
    spec = read_outputs(request.outputs, model)
    bulk = enum_of(pb.Priority, _IS_BULK, request.priority or pb.PRIORITY_INTERACTIVE, "priority")
    reader = _ImageReader(request.preprocessing, model, settings)
    if bool(request.images) == request.HasField("pixels"):
        given = "both images and pixels are" if request.images else "neither images nor pixels is"
        raise InvalidInput(f"{given} set: send one of them", field="images")
    if request.images:
        reader.read_list(request.images)
    else:
        reader.read_packed(request.pixels)
    return Query(spec, bulk, reader.sources, reader.failures)


def _check_pins(request: pb.ExtractRequest, model: ModelInfo) -> None:
    if request.model and _canonical(request.model) != model.name:
        raise ModelMismatch(f"this server serves the model {model.name!r}; the request asks for {request.model!r}")
    if request.fingerprint and request.fingerprint != model.fingerprint:
        raise ModelMismatch(
            f"this server serves the fingerprint {model.fingerprint!r}; the request asks for {request.fingerprint!r}"
        )


def _canonical(name: str) -> str:
    """The registry's name of a model: a pin may say `vits16` as `--model` may."""
    try:
        return registry.lookup(name).name
    except ConfigError:
        return name


class _ImageReader:
    """Collects the sources of a request's images."""

    def __init__(self, preprocessing: pb.Preprocessing, model: ModelInfo, settings: Settings) -> None:
        self.sources: list[Source] = []
        self.failures: dict[int, ServingError] = {}
        self._model = model
        self._settings = settings
        given = preprocessing.size
        self._size = (given.height, given.width) if preprocessing.HasField("size") else None
        self._transform = transform(
            enum_of(pb.Preset, _PRESETS, preprocessing.preset or pb.PRESET_DINOV3, "preprocessing.preset"),
            self._size,
            enum_of(pb.Interpolation, _INTERPOLATIONS, preprocessing.interpolation, "preprocessing.interpolation"),
            preprocessing.apply_exif_orientation,
        )
        # Of every file and every uint8 tensor, unless each has its own.
        self._shape: PixelShape | None = None
        if self._transform.size:
            field = "preprocessing.size" if self._size else "preprocessing.preset"
            self._shape = self._input_shape(*self._transform.size, "uint8", field)

    def read_list(self, images: Sequence[pb.Image]) -> None:
        self._check_count(len(images), "images")
        for index, image in enumerate(images):
            try:
                self.sources.append(self._read_image(index, image))
            except InvalidInput as error:
                self.failures[index] = kept(error)
                # A float tensor is its own input size, and this one is of no use.
                if self._shape and image.pixels.dtype != pb.DATA_TYPE_FLOAT32:
                    self.sources.append(Source(index, "", self._shape, write=None))

    def read_packed(self, tensor: pb.Tensor) -> None:
        self._check_count(tensor.shape[0] if len(tensor.shape) == 4 else 1, "pixels.shape")
        pixels = _read_tensor(tensor, "pixels", packed=True)
        each = memoryview(pixels.data)
        nbytes = len(each) // pixels.images
        for index in range(pixels.images):
            one = pixels._replace(data=each[index * nbytes : (index + 1) * nbytes])
            self.sources.append(self._pixel_source(index, "pixels", one))

    def _check_count(self, count: int, field: str) -> None:
        most = self._settings.max_images_per_request
        if not 1 <= count <= most:
            raise InvalidInput(f"{count} images in one request; allowed are 1 to {most}", field=field)

    def _read_image(self, index: int, image: pb.Image) -> Source:
        field = f"images[{index}]"
        source = image.WhichOneof("source")
        if source == "pixels":
            return self._pixel_source(index, f"{field}.pixels", _read_tensor(image.pixels, f"{field}.pixels"))
        if source == "encoded":
            return self._file_source(index, f"{field}.encoded", image.encoded)
        raise InvalidInput("the image is empty: set encoded (an image file) or pixels (a tensor)", field=field)

    def _file_source(self, index: int, field: str, data: bytes) -> Source:
        how = self._transform
        most, exif = self._settings.max_image_pixels, how.apply_exif_orientation

        def write(out: memoryview) -> None:
            with _at(field):
                resize_into(decode(data, max_pixels=most, apply_exif_orientation=exif), how, out)

        def measure() -> PixelShape:
            with _at(field):
                size = probe(data, max_pixels=most, apply_exif_orientation=exif)
                return self._input_shape(*size, "uint8", field)

        return Source(index, field, self._shape, write, None if self._shape else measure)

    def _pixel_source(self, index: int, field: str, pixels: _Pixels) -> Source:
        height, width = pixels.height, pixels.width
        if pixels.format == "uint8":
            shape = self._shape or self._input_shape(height, width, "uint8", f"{field}.shape")
            write = partial(resize_pixels_into, pixels.data, height, width, self._transform)
            return Source(index, field, shape, write, quick=(height, width) == (shape.height, shape.width))
        if self._size and self._size != (height, width):
            raise InvalidInput(
                f"float pixels are never resized: these are {height}x{width}, preprocessing.size is "
                f"{self._size[0]}x{self._size[1]}; leave it out or send uint8 pixels",
                field=f"{field}.shape",
            )
        shape = self._input_shape(height, width, "float32", f"{field}.shape")
        return Source(index, field, shape, partial(_write_floats, pixels.data, f"{field}.data"), quick=True)

    def _input_shape(self, height: int, width: int, format: PixelFormat, field: str) -> PixelShape:
        """Raises InvalidInput, naming `field`, for what the model or a batch cannot take."""
        check_size(height, width, self._model.patch_size, field)
        shape = PixelShape(height, width, format)
        tokens, most = self._model.tokens(shape), self._settings.max_batch_tokens
        if tokens > most:
            raise InvalidInput(
                f"an image of {height}x{width} is {tokens} tokens (CLS, registers and patches); allowed are {most} "
                "(--max-batch-tokens): send it smaller",
                field=field,
            )
        return shape


class _Pixels(NamedTuple):
    format: PixelFormat
    images: int
    height: int
    width: int
    data: bytes | memoryview


def _read_tensor(tensor: pb.Tensor, field: str, packed: bool = False) -> _Pixels:
    """The pixels of `tensor`, of one image or of N packed ones. Raises InvalidInput unless it is exactly that."""
    layouts = ("[N, H, W, 3]", "[N, 3, H, W]") if packed else ("[H, W, 3]", "[3, H, W]")
    allowed = f"allowed are DATA_TYPE_UINT8 as {layouts[0]} and DATA_TYPE_FLOAT32 as {layouts[1]}"
    if tensor.dtype not in _PIXEL_FORMATS:
        known = tensor.dtype in pb.DataType.values()
        given = pb.DataType.Name(tensor.dtype) if known else str(tensor.dtype)
        raise InvalidInput(f"pixels cannot be {given}; {allowed}", field=f"{field}.dtype")
    format = _PIXEL_FORMATS[tensor.dtype]
    channels_last = format == "uint8"
    axes = list(tensor.shape[:_MOST_AXES])
    images, *image = axes if packed else (1, *axes)
    if len(tensor.shape) != 3 + packed or image[2 if channels_last else 0] != 3 or min(axes) < 1:
        raise InvalidInput(
            f"{pb.DataType.Name(tensor.dtype)} pixels of shape {axes}; {allowed}", field=f"{field}.shape"
        )
    height, width = image[:2] if channels_last else image[1:]
    data, expected = tensor.data, images * PixelShape(height, width, format).nbytes
    if len(data) != expected:
        raise InvalidInput(
            f"{format} pixels of shape {axes} are {expected} bytes; {len(data)} were sent", field=f"{field}.data"
        )
    return _Pixels(format, images, height, width, data)


def _write_floats(data: bytes | memoryview, field: str, out: memoryview) -> None:
    values = np.frombuffer(data, "<f4")
    finite = int(np.count_nonzero(np.isfinite(values)))
    if finite < values.size:
        raise InvalidInput(f"{values.size - finite} of {values.size} pixel values are NaN or infinite", field=field)
    out[:] = data


@contextmanager
def _at(field: str) -> Iterator[None]:
    """Errors of the images' own code learn which field of the request they are about."""
    try:
        yield
    except InvalidInput as error:
        error.field = error.field or field
        raise

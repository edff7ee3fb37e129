"""The images of a call: what `extract` accepts, and how it is loaded to be sent."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import grpc
import numpy as np
from PIL import Image, ImageOps

from dinov3_client import _views
from dinov3_client._dtypes import Array
from dinov3_client._errors import FieldViolation, InvalidRequest, StatusError
from dinov3_client._request import OnError
from dinov3_client._views import View
from dinov3_serving.images import Decoding
from dinov3_serving.pillow import over, truncated_files
from dinov3_serving.v1 import feature_service_pb2 as pb

if TYPE_CHECKING:
    from torch import Tensor


class BinaryFile(Protocol):
    """An object with a `read` that returns bytes, such as `open(path, "rb")`."""

    def read(self) -> bytes: ...


PictureLike: TypeAlias = (
    "bytes | bytearray | memoryview | str | os.PathLike[str] | BinaryFile | Image.Image | Array | Tensor"
)


@dataclass(unsafe_hash=True)  # not frozen: Lightning copies the data classes in a batch field by field
class ImageViews:
    """A picture that is sent and decoded once, and views of it: one row of features for each view."""

    image: PictureLike
    """Encoded bytes, a path, a file object, a PIL image, a uint8 array [H, W, 3] (RGB) or a uint8 tensor."""
    views: Sequence[View]
    """At least one."""

    def __post_init__(self) -> None:
        if not isinstance(self.views, Sequence) or not all(isinstance(view, View) for view in self.views):
            raise TypeError(f"views is {self.views!r}; it must be a sequence of View")
        if not self.views:
            raise ValueError("views is empty; give at least one, or the image itself for one row of all of it")


ImageLike: TypeAlias = "PictureLike | ImageViews"

_ALLOWED = (
    "allowed are encoded bytes, a path, a file object, a PIL image, a uint8 array [H, W, 3] (RGB), a float32 array "
    "[3, H, W] (normalized by the model's mean and std), a tensor of torch and ImageViews"
)
# protobuf refuses longer messages; the rest is for the request around the image.
_MAX_NBYTES = 2**31 - 2**20
_MAX_LABEL, _MAX_KEY = 200, 40  # characters of a name in a message
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")


class LoadedImage(NamedTuple):
    """An image as it is sent: the bytes of a file, or pixels (uint8 [H, W, 3] or float32 [3, H, W])."""

    data: bytes | Array
    label: str | None = None
    """The path of its file, for messages."""
    views: tuple[pb.View, ...] = ()
    error: StatusError | None = None
    """Why it is not sent; `data` is empty then."""
    loaded_nbytes: int = 0
    """The memory that loading it took: 0 for an image that the caller holds anyway."""

    @property
    def nbytes(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else self.data.nbytes

    @property
    def rows(self) -> int:
        """Number of rows of features."""
        return max(1, len(self.views))

    def pixel_size(self) -> tuple[int, int] | None:
        """Return (height, width) from the file's header or the array; None if the header cannot be read."""
        if isinstance(self.data, bytes):
            try:
                with Image.open(io.BytesIO(self.data)) as image:
                    return image.height, image.width
            except Exception:  # Pillow raises many kinds; the server will report what is wrong
                return None
        height, width = self.data.shape[:2] if self.data.dtype == np.uint8 else self.data.shape[1:]
        return height, width

    def failed(self, index: int, error: OSError | ValueError) -> LoadedImage:
        """Return image `index` of a call with the `error` for which it is not sent."""
        message = str(error.strerror or error) if isinstance(error, OSError) else str(error)
        field = FieldViolation(f"images[{index}]", message)
        failure = InvalidRequest(message, code=grpc.StatusCode.INVALID_ARGUMENT, violations=(field,))
        failure.__cause__ = error.with_traceback(None)  # whose frames would hold pixels
        return LoadedImage(b"", self.label, self.views, failure.of_image(index, self.label))


def as_list(batch: ImageLike | Iterable[ImageLike]) -> ImageLike | Iterable[ImageLike]:
    """Return `batch`, as a list if it is an iterator.

    Some iterators, such as itertools.groupby's groups, are empty once the next batch was read.
    """
    return list(batch) if isinstance(batch, Iterator) and not _is_file(batch) else batch


def load(
    images: ImageLike | Iterable[ImageLike], decoding: Decoding, on_error: OnError = "raise"
) -> Iterator[LoadedImage]:
    """Load the images of a call one by one, reading files.

    decoding: applied to PIL images here, as their pixels no longer carry EXIF and alpha.
    on_error: "return" yields images that cannot be read with their errors; "raise" raises OSError or ValueError.
    """
    several = _several(images)
    streamed = isinstance(several, Iterator)
    index = -1
    for index, image in enumerate(several):
        empty = LoadedImage(b"", _label(image), _views_of(image))
        try:
            loaded = _load_one(image, index, decoding)
            if loaded.nbytes > _MAX_NBYTES:
                raise ValueError(f"images[{index}] has {loaded.nbytes} bytes; at most {_MAX_NBYTES} can be sent")
        except (OSError, ValueError) as error:
            if on_error == "raise":
                raise
            loaded = empty.failed(index, error)
        held = not streamed and isinstance(image, bytes | np.ndarray)
        yield loaded._replace(label=empty.label, loaded_nbytes=0 if held else loaded.nbytes)
    if index < 0:
        raise ValueError("images is empty; give at least one")


def _several(images: Any) -> Iterable[ImageLike]:
    """Return the images of a call as an iterable."""
    if isinstance(images, np.ndarray) and images.dtype.kind in "OUT":  # of paths, for example a column of a table
        return images.ravel().tolist()
    if isinstance(images, np.ndarray):
        return [images] if images.ndim == 3 else _unpack(images)
    if _is_tensor(images):
        return [images] if images.ndim != 4 else images
    if isinstance(images, bytes | bytearray | memoryview | str | os.PathLike | Image.Image | ImageViews):
        return [images]
    if _is_file(images):
        return [images]
    if _is_mapping(images):
        raise TypeError(_mapping_text("images", images))
    if isinstance(images, Iterable):
        return images
    raise TypeError(f"images is a {type(images).__name__}; {_ALLOWED}, or a sequence of these")


def _unpack(images: Array) -> Iterable[Array]:
    if images.ndim != 4:
        raise ValueError(
            f"images is an array of {_described(images)}; allowed are uint8 [H, W, 3] or [N, H, W, 3] and "
            "float32 [3, H, W] or [N, 3, H, W], and arrays of paths"
        )
    return images


def _load_one(image: Any, index: int, decoding: Decoding) -> LoadedImage:
    if isinstance(image, bytes | bytearray | memoryview):
        return LoadedImage(bytes(image))
    if isinstance(image, str) and _URL.match(image):
        raise ValueError(_url_text(image, index))
    if isinstance(image, str | os.PathLike):
        return LoadedImage(_read_path(image))
    if isinstance(image, Image.Image):
        image = np.asarray(_rgb(image, index, decoding))
    elif _is_tensor(image):
        image = _of_tensor(image, index)
    if isinstance(image, np.ndarray):
        _check(image, index)
        return LoadedImage(image)
    if isinstance(image, ImageViews):
        return _load_views(image, index, decoding)
    if _is_file(image):
        return LoadedImage(_read_file(image, index))
    if _is_mapping(image):
        raise TypeError(_mapping_text(f"images[{index}]", image))
    raise TypeError(f"images[{index}] is a {type(image).__name__}; {_ALLOWED}")


def _label(image: Any) -> str | None:
    """Return the path of an image's file, if it is known."""
    if isinstance(image, ImageViews):
        return _label(image.image)
    if isinstance(image, str | os.PathLike):
        label: Any = os.fspath(image)
    else:
        label = getattr(image, "filename" if isinstance(image, Image.Image) else "name", None)
    if isinstance(label, bytes):
        label = os.fsdecode(label)
    if not isinstance(label, str) or not label:  # the name of a file that was opened by its descriptor is a number
        return None
    return label if len(label) <= _MAX_LABEL else f"{label[:_MAX_LABEL]}..."


def _views_of(image: Any) -> tuple[pb.View, ...]:
    return tuple(map(_views.message, image.views)) if isinstance(image, ImageViews) else ()


def _load_views(image: ImageViews, index: int, decoding: Decoding) -> LoadedImage:
    if isinstance(image.image, ImageViews):
        raise TypeError(f"images[{index}] is ImageViews of ImageViews; give the picture, and all views of it together")
    source = _load_one(image.image, index, decoding)
    if isinstance(source.data, np.ndarray) and source.data.dtype == np.float32:
        raise ValueError(
            f"images[{index}] has views of a float32 array: normalized pixels are never cropped, resized or "
            "flipped; give views of the picture (a file, a PIL image, a uint8 array), or the pixels of each "
            "view as an image of its own"
        )
    return source._replace(views=_views_of(image))


def _read_path(path: str | os.PathLike[str]) -> bytes:
    with Path(path).open("rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > _MAX_NBYTES:
            raise ValueError(f"{os.fspath(path)} has {nbytes} bytes; at most {_MAX_NBYTES} can be sent")
        return file.read()


def _read_file(file: Any, index: int) -> bytes:
    """Return the rest of an open file, from its position."""
    data = file.read()
    if isinstance(data, str):
        raise TypeError(f"images[{index}] is a file that was opened as text; open it with mode 'rb'")
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"images[{index}] is a {type(file).__name__}, whose read() returns {type(data).__name__}")
    if not data:
        raise ValueError(
            f"images[{index}] is a file object with nothing left to read: files are read from their position; "
            "file.seek(0) returns to the beginning"
        )
    return bytes(data)


def _rgb(image: Image.Image, index: int, decoding: Decoding) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"images[{index}] is a PIL image of mode {image.mode}, which has no 8-bit values; "
            "scale it to 0..255 and convert it to RGB, or send the file itself"
        )
    try:
        with truncated_files(decoding.allow_truncated):
            image.load()
        turned = ImageOps.exif_transpose(image) if decoding.apply_exif_orientation else image
        if "transparency" in turned.info:  # Pillow warns when such an image is converted to RGB directly
            turned = turned.convert("RGBA")
        return over(turned, decoding.background).convert("RGB")
    except Exception as error:  # Pillow reads the file only now, and raises many kinds of errors for broken ones
        name = _label(image)
        raise OSError(f"images[{index}]{f' ({name})' if name else ''} cannot be decoded: {error}") from error


def _of_tensor(tensor: Any, index: int) -> Array:
    """Return the pixels of a torch tensor in one of the two layouts."""
    shape = tuple(tensor.shape)
    is_float = tensor.is_floating_point()
    dtype = str(tensor.dtype).removeprefix("torch.")
    given = f"images[{index}] is a tensor of {dtype} [{', '.join(map(str, shape))}]"
    if len(shape) != 3 or 0 in shape or not (is_float or dtype == "uint8"):
        raise ValueError(
            f"{given}; allowed are uint8 (RGB) and floating point (normalized by the model's mean and std), "
            "[3, H, W] or [H, W, 3]"
        )
    first, last = shape[0] == 3, shape[2] == 3
    if first == last:
        why = "both sides could be the channels; give a numpy array" if first else "neither side has 3 channels"
        raise ValueError(f"{given}: {why}; allowed are [3, H, W] and [H, W, 3]")
    tensor = tensor.detach().cpu()
    pixels: Array = (tensor.float() if is_float else tensor).numpy()
    if is_float:
        return pixels if first else pixels.transpose(2, 0, 1)
    return pixels.transpose(1, 2, 0) if first else pixels


def _is_tensor(given: Any) -> bool:
    """Return whether `given` is a tensor of torch, which is not imported for this."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(given, torch.Tensor)


def _is_file(given: Any) -> bool:
    return not isinstance(given, Image.Image) and callable(getattr(given, "read", None))


def _is_mapping(given: Any) -> bool:
    """Return whether `given` is iterated by its keys: a dict, a batch of a data set, a table of pandas."""
    return hasattr(given, "keys") and hasattr(given, "__getitem__")


def _mapping_text(name: str, given: Any) -> str:
    keys = [str(key)[:_MAX_KEY] for key in given.keys()]  # noqa: SIM118  # a table has keys and iterates otherwise
    shown = f"{', '.join(map(repr, keys[:5]))}{', ...' if len(keys) > 5 else ''}"
    return f"{name} is a {type(given).__name__} with the keys {shown}; give the images that it holds: {_example(keys)}"


def _example(keys: list[str]) -> str:
    likely = next(
        (key for key in keys if key in ("bytes", "image", "images", "img", "jpg", "pixel_values", "path")), ""
    )
    return f"batch[{(likely or (keys[0] if keys else 'image'))!r}]"


def _url_text(url: str, index: int) -> str:
    given = f"images[{index}] is the URL {url[:80]!r}{'...' if len(url) > 80 else ''}"
    if url.startswith("data:"):
        return f"{given}; give the bytes that it encodes (base64.b64decode of what follows the comma)"
    if url.startswith("file:"):
        return f"{given}; give the path alone"
    return (
        f"{given}, which this client does not fetch; give its bytes (requests.get(url).content) or a file object "
        "(urllib.request.urlopen(url), fsspec.open(url, 'rb').open())"
    )


def _check(image: Array, index: int) -> None:
    """Raise ValueError unless dtype and shape are one of the two layouts; a layout is never guessed."""
    channels = {np.dtype(np.uint8): 2, np.dtype(np.float32): 0}.get(image.dtype)
    if channels is None or image.ndim != 3 or image.shape[channels] != 3 or 0 in image.shape:
        raise ValueError(
            f"images[{index}] is an array of {_described(image)}; allowed are uint8 [H, W, 3] (RGB) and "
            "float32 [3, H, W] (normalized by the model's mean and std)"
        )


def _described(image: Array) -> str:
    order = "" if image.dtype.isnative else " of foreign byte order"
    return f"{image.dtype.name}{order} [{', '.join(map(str, image.shape))}]"

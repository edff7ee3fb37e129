"""Shared by `pca` and `similarity`: photos, their patch features, and saving of sheets."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dinov3_client import _files
from dinov3_client._client import Client
from dinov3_client._dtypes import Array
from dinov3_client._errors import InvalidRequest, MessageTooLarge
from dinov3_client._model import Model
from dinov3_client._pictures import sheet
from dinov3_client._pictures.sheet import Legend, Pair
from dinov3_client._request import Layer
from dinov3_client.bulk.images import ImageRef
from dinov3_client.cli import common
from dinov3_client.cli.common import FailureLog, UsageError, image_size, layer_numbers
from dinov3_serving.images import Decoding
from dinov3_serving.pillow import over, truncated_files

# A finer grid than the preset's 16 x 16: with 32 patches a side, shapes are visible.
SIDE = 512


class Photo(NamedTuple):
    """An image file and its thumbnail."""

    source: str
    """Its location, for messages."""
    name: str
    """The title on the sheet: of a photo in a folder, relative to that."""
    data: bytes
    """The contents of the file."""
    size: tuple[int, int]
    """(width, height); of the upright picture with --exif."""
    thumbnail: Image.Image


class PhotoPatches(NamedTuple):
    """A photo and its patch features."""

    photo: Photo
    tokens: Array
    """[P, D], row-major."""
    grid: tuple[int, int]


class PatchExtractor:
    """Requests patch features as the flags describe. Photos differ in input size, so each gets a request of its own."""

    def __init__(self, args: argparse.Namespace, client: Client, model: Model, failures: FailureLog) -> None:
        self._decoding = Decoding(args.exif, args.background, args.allow_truncated)
        self._size: int | tuple[int, int] = args.size
        self._client = client
        self._patch = model.patch_size
        self._failures = failures
        self.layer: int | None = None if args.layer is None else layer_numbers((args.layer,), model)[0]
        sides = (self._size,) if isinstance(self._size, int) else self._size
        for side in sides:
            if side % self._patch:
                below = side // self._patch * self._patch
                nearest = f"{below} and {below + self._patch} are" if below else f"{self._patch} is"
                raise UsageError(f"--size: {side} is no multiple of the model's patch size, {self._patch}; {nearest}")
        # The server enforces its own limit (`max_image_pixels`).
        Image.MAX_IMAGE_PIXELS = None

    def __call__(self, items: Iterable[ImageRef]) -> Iterator[PhotoPatches]:
        """Yield the photos with their features, in order; log photos that fail."""
        for item in items:
            photo = self._photo(item)
            shown = photo and self._ask(photo)
            if shown:
                yield shown

    def _photo(self, item: ImageRef) -> Photo | None:
        try:
            data = item.read()
        except OSError as error:
            self._failures(item.source, error.strerror or str(error))
            return None
        try:
            picture = _rgb(Image.open(io.BytesIO(data)), self._decoding)
        except UnidentifiedImageError:
            self._failures(item.source, f"not an image: {len(data)} bytes")
        except Exception as error:  # decoders raise many kinds of errors for broken files
            self._failures(item.source, f"cannot be decoded: {error or type(error).__name__}")
        else:
            ending = Path(item.path).suffix if item.span is None else ""
            return Photo(item.source, f"{item.stem}{ending}", data, picture.size, sheet.thumbnail(picture))
        return None

    def _ask(self, photo: Photo) -> PhotoPatches | None:
        try:
            answer = self._client.extract(
                [photo.data],
                ("patches",) if self.layer is None else (),
                size=input_size_for(self._size, photo.size, self._patch),
                layers=() if self.layer is None else Layer(self.layer, "patches"),
                exif=self._decoding.apply_exif_orientation,
                background=self._decoding.background,
                allow_truncated=self._decoding.allow_truncated,
                priority="bulk",
                on_error="return",
            )
        except (InvalidRequest, MessageTooLarge) as error:  # the request contains this photo alone
            self._failures(photo.source, error.message)
            return None
        if answer.errors:
            self._failures(photo.source, answer.errors[0].message)
            return None
        features = answer[0] if self.layer is None else answer[0].layers[self.layer]
        assert features.patches is not None, "asked for"
        return PhotoPatches(photo, features.patches, features.grid)


def add_picture_flags(parser: argparse.ArgumentParser) -> None:
    """Add --output, --exif, --size and --layer."""
    parser.add_argument("-o", "--output", type=_picture_file, required=True, metavar="FILE", help="such as map.png")
    common.add_picture_flags(parser)
    parser.add_argument(
        "--size",
        type=_picture_size,
        default=SIDE,
        metavar="N|HxW",
        help="size of the model's input in pixels, multiples of its patch size: the longer side (the other follows "
        "from the photo's aspect ratio), or both sides (default: %(default)s)",
    )
    parser.add_argument(
        "--layer",
        type=int,
        metavar="I",
        help="show the patches of this layer (default: the last); a ConvNeXt's earlier layers have finer grids",
    )


def input_size_for(size: int | tuple[int, int], photo: tuple[int, int], patch: int) -> tuple[int, int]:
    """Return (height, width) of the model's input for a photo of (width, height).

    A number is the longer side; the other side is the multiple of `patch` nearest to the photo's aspect ratio, so that
    a patch covers roughly a square of the photo.
    """
    if not isinstance(size, int):
        return size
    width, height = photo
    other = max(patch, round(size * min(photo) / max(photo) / patch) * patch)
    return (other, size) if width >= height else (size, other)


def save(output: Path, pairs: Iterable[Pair], count: int, caption: str, legend: Legend | None = None) -> list[Path]:
    """Draw `count` pairs to `output` or, on several sheets, to STEM-1.png, STEM-2.png, ...; return the paths."""
    written: list[Path] = []
    pages = -(-count // sheet.PAIRS)
    for page, drawn in enumerate(sheet.sheets(pairs, caption, legend), 1):
        path = output if pages == 1 else output.with_stem(f"{output.stem}-{page:0{len(str(pages))}}")
        with _files.atomic_path(path) as draft, draft.open("wb") as file:
            drawn.save(file, Image.registered_extensions()[path.suffix.lower()])
        written.append(path)
    return written


def model_label(model: Model, layer: int | None) -> str:
    """Return the model and layer for a caption."""
    weights = " (random weights)" if model.random_weights else ""
    return f"{model.name}{weights}{'' if layer is None else f', layer {layer}'}"


def _rgb(photo: Image.Image, decoding: Decoding) -> Image.Image:
    """Convert to RGB as the server does (docs/preprocessing.md)."""
    with truncated_files(decoding.allow_truncated):
        photo.load()
    if decoding.apply_exif_orientation:
        photo = ImageOps.exif_transpose(photo)
    # convert() alone would clip these modes to white and black.
    if photo.mode.startswith("I"):
        photo = Image.fromarray((np.asarray(photo).clip(0, 0xFFFF) // 256).astype(np.uint8))
    elif photo.mode == "F":
        photo = Image.fromarray(np.round(np.asarray(photo).clip(0, 1) * 255).astype(np.uint8))
    return over(photo, decoding.background).convert("RGB")


def _picture_file(text: str) -> Path:
    path = Path(text)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise argparse.ArgumentTypeError(f"{text}: its extension is not of a writable image format, such as .png")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}")
    return path


def _picture_size(text: str) -> Any:
    height, width = image_size(text)
    return (height, width) if "x" in text.lower() else height

"""`dinov3-client pca`: draw patch features as colors."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from itertools import chain
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from dinov3_client._dtypes import Array
from dinov3_client._errors import Dinov3Error
from dinov3_client._pictures.pca import NOISE, Moments, Palette
from dinov3_client._pictures.sheet import Pair
from dinov3_client.cli.common import FailureLog, connect, get_model, iter_images, print_line
from dinov3_client.cli.pictures import PatchExtractor, PhotoPatches, add_picture_flags, model_label, save

# The most patches to take percentiles of; of more, an even sample is used.
SAMPLE = 1 << 20


def add(commands: Any, server: argparse.ArgumentParser) -> None:
    pca = commands.add_parser(
        "pca",
        parents=[server],
        help="draw patch features as colors",
        description="Draws each image beside its patch features: the first three principal components, of all images "
        "together, as red, green and blue. A sheet holds 24 images; more become FILE-1.png, FILE-2.png, ..., of one "
        "basis and one scale. While it runs, a temporary file beside FILE holds the features.",
    )
    pca.add_argument("sources", nargs="+", metavar="SOURCE", help="files and folders of images, globs, tar shards")
    add_picture_flags(pca)
    pca.set_defaults(command=_pca)


def _pca(args: argparse.Namespace) -> int:
    failures = FailureLog()
    with connect(args) as client, tempfile.TemporaryFile(dir=args.output.parent) as file:
        model = get_model(client)
        show = PatchExtractor(args, client, model, failures)
        store = _Store(file)
        moments = Moments(model.layer_dims[-1 if show.layer is None else show.layer])
        for shown in show(chain.from_iterable(iter_images(args.sources, failures))):
            store.add(shown)
            moments.add(shown.tokens)
        if not moments.count:
            raise Dinov3Error("no image left to draw")
        components = moments.components(3)
        every = -(-moments.count // SAMPLE)
        sample = np.concatenate([components.project(tokens[::every]) for _, tokens, _ in store])
        palette = Palette(components, sample, NOISE * moments.root_mean_square)
        pairs = (
            Pair(entry.name, thumbnail, Image.fromarray(palette(tokens).reshape(*entry.grid, 3)))
            for entry, tokens, thumbnail in store
        )
        share = components.variances.sum() / components.total_variance if components.total_variance else 1.0
        caption = (
            f"{model_label(model, show.layer)}: principal components 1-3 of the patches as red, green and blue; "
            f"{share:.0%} of the variance"
        )
        written = save(args.output, pairs, len(store), caption)
    paths = str(written[0]) if len(written) == 1 else f"{written[0]} to {written[-1]}"
    print_line(f"{paths}: {len(store)} of {len(store) + failures.count} images")
    return 1 if failures.count else 0


class _Entry(NamedTuple):
    """The place of one image in the file."""

    name: str
    grid: tuple[int, int]
    offset: int
    """Of the features in the file; the pixels of the thumbnail follow."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    thumbnail: tuple[int, int]
    """Width and height."""


class _Store:
    """Keeps features and thumbnails in a file: colors need the features of all images."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._entries: list[_Entry] = []

    def add(self, shown: PhotoPatches) -> None:
        tokens, thumbnail = shown.tokens, shown.photo.thumbnail
        self._entries.append(
            _Entry(shown.photo.name, shown.grid, self._file.tell(), tokens.shape, tokens.dtype, thumbnail.size)
        )
        self._file.write(tokens.tobytes() + thumbnail.tobytes())

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[_Entry, Array, Image.Image]]:
        """Yield each image's entry, features [P, D] and thumbnail."""
        for entry in self._entries:
            self._file.seek(entry.offset)
            width, height = entry.thumbnail
            tokens = np.frombuffer(self._file.read(math.prod(entry.shape) * entry.dtype.itemsize), entry.dtype)
            pixels = self._file.read(width * height * 3)
            yield entry, tokens.reshape(entry.shape), Image.frombytes("RGB", entry.thumbnail, pixels)

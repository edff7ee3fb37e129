"""Files in and files out: what the commands have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dinov3_client._client import Client
from dinov3_client._dtypes import FeatureDtype, numpy_of
from dinov3_client._features import Features, ImageFeatures
from dinov3_client._model import Model
from dinov3_client._request import Preset, TokenKind

# Of one request: enough to fill batches, little enough to hold a few of in memory.
CHUNK_IMAGES = 32
CHUNK_BYTES = 32 << 20
# Left free in a message for what is not pixels or features.
SLACK_BYTES = 64 << 10

_PRESET_SIDES: dict[str, int] = {"dinov3": 256, "hf": 224}

Failed = Callable[[Path, str], None]
"""Told of each image that gets no features, and why."""


@dataclass(frozen=True)
class Options:
    """Of `extract`, for every image of a command. `layers` are 0 .. depth - 1."""

    outputs: tuple[TokenKind, ...]
    preset: Preset
    size: tuple[int, int] | None
    dtype: FeatureDtype
    layers: tuple[int, ...]
    exif: bool


class Extracted(NamedTuple):
    path: Path
    data: bytes
    features: ImageFeatures
    answer: Features


def extract(
    client: Client, model: Model, paths: Sequence[Path], options: Options, failed: Failed
) -> Iterator[Extracted]:
    """The features of each file that has them, in order, in requests that stay below the server's limits."""
    most_bytes = min(CHUNK_BYTES, model.limits.max_message_bytes - SLACK_BYTES)
    most_images = max(1, min(CHUNK_IMAGES, model.limits.max_images_per_request, _images_in(most_bytes, model, options)))
    for chunk in _chunks(paths, most_images, most_bytes, model.limits.max_message_bytes - SLACK_BYTES, failed):
        answer = client.extract(
            [data for _, data in chunk],
            options.outputs,
            preset=options.preset,
            size=options.size,
            dtype=options.dtype,
            layers=options.layers,
            exif=options.exif,
            priority="bulk",
            on_error="return",
        )
        for (path, data), features in zip(chunk, answer, strict=True):
            if features.error is None:
                yield Extracted(path, data, features, answer)
            else:
                failed(path, features.error.message)


def _images_in(most_bytes: int, model: Model, options: Options) -> int:
    """How many images' features fit `most_bytes`: 1 where only the files themselves tell their size."""
    side = _PRESET_SIDES.get(options.preset)
    height, width = options.size or (side, side)
    if height is None or width is None:
        return 1
    values = 0
    for layer in (-1, *options.layers):
        stride = model.layer_strides[layer]
        tokens = {"cls": 1, "patches": (height // stride) * (width // stride), "registers": model.register_tokens}
        values += sum(tokens[kind] for kind in options.outputs) * model.layer_dims[layer]
    return most_bytes // max(1, values * numpy_of(options.dtype).itemsize)


def _chunks(
    paths: Sequence[Path], most_images: int, most_bytes: int, limit: int, failed: Failed
) -> Iterator[list[tuple[Path, bytes]]]:
    """Files of at most `most_bytes` together, or one of more, up to `limit`."""
    chunk: list[tuple[Path, bytes]] = []
    size = 0
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError as error:
            failed(path, error.strerror or str(error))
            continue
        if len(data) > limit:
            failed(path, f"{len(data)} bytes are over the server's limit of {limit} for the files of a request")
            continue
        if chunk and (len(chunk) == most_images or size + len(data) > most_bytes):
            yield chunk
            chunk, size = [], 0
        chunk.append((path, data))
        size += len(data)
    if chunk:
        yield chunk


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the name `path` when all is written: no half a file ever has that name."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)

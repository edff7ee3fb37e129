"""A client without a server: features of bytes by a formula, failures by what the bytes print_line."""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest

from dinov3_client import Client, Unavailable
from dinov3_client.bulk import extraction, sources
from dinov3_client.bulk.manifest import Totals
from dinov3_client.bulk.rows import ExtractionOptions
from dinov3_client.testing import MODEL

Array = np.ndarray[Any, Any]


def contents(index: int, *, size: tuple[int, int] = (32, 32)) -> bytes:
    """A file that the stub has features for."""
    return f"{size[0]}x{size[1]} number {index}".encode() + bytes(index % 7)


def broken(index: int) -> bytes:
    return f"broken {index}".encode()


def values(data: bytes, kind: str, layer: int | None = None, dtype: str = "float16") -> Array:
    """cls [6], patches [P, 6], registers [2, 6]; of layers likewise."""
    height, width = input_size(data)
    shape = {"cls": (6,), "patches": (height * width // 256, 6), "registers": (2, 6)}[kind]
    seed = int.from_bytes(hashlib.sha256(data + f"{kind}{layer}".encode()).digest()[:8], "little")
    found = np.random.default_rng(seed).normal(size=shape)
    return found.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else "float32" if dtype == "int8" else dtype)


def input_size(data: bytes) -> tuple[int, int]:
    found = re.match(rb"(\d+)x(\d+) ", data)
    assert found is not None
    return int(found[1]), int(found[2])


class StubClient:
    """`extract_many` as the client has it. `stop` ends it with that error instead of the batch of that number."""

    def __init__(self, fingerprint: str = MODEL.fingerprint, stop: tuple[int, BaseException] | None = None) -> None:
        self.fingerprint = fingerprint
        self.stop = stop
        self.batches: list[list[bytes]] = []
        self.options: dict[str, Any] = {}

    def extract_many(
        self, batches: Iterable[list[bytes]], outputs: Sequence[str], *, in_flight: int, **options: Any
    ) -> Iterator[Any]:
        self.options = {"outputs": outputs, "in_flight": in_flight, **options}
        waiting: deque[list[bytes]] = deque()
        for batch in batches:
            if self.stop is not None and len(self.batches) == self.stop[0]:
                raise self.stop[1]
            self.batches.append(batch)
            waiting.append(batch)
            if len(waiting) == in_flight:
                yield self._features(waiting.popleft())
        while waiting:
            yield self._features(waiting.popleft())

    def _features(self, batch: list[bytes]) -> Any:
        images = [SimpleNamespace() if data.startswith(b"broken") else self._image(data) for data in batch]
        errors = {
            index: SimpleNamespace(message=f"not an image: {data.decode()}")
            for index, data in enumerate(batch)
            if data.startswith(b"broken")
        }
        return _Features(images, errors, self.fingerprint)

    def _image(self, data: bytes) -> SimpleNamespace:
        def of(layer: int | None) -> SimpleNamespace:
            arrays = {
                kind: values(data, kind, layer, self.options["dtype"]) for kind in ("cls", "patches", "registers")
            }
            height, width = input_size(data)
            return SimpleNamespace(**arrays, grid=(height // 16, width // 16))

        image = of(None)
        image.input_size = input_size(data)
        image.layers = {layer: of(layer) for layer in self.options["layers"]}
        return image


class _Features(list[Any]):
    def __init__(self, images: list[Any], errors: dict[int, Any], fingerprint: str) -> None:
        super().__init__(images)
        self.errors = errors
        self.fingerprint = fingerprint
        self.images = list(range(len(images)))

    def at_size(self, size: tuple[int, int]) -> _Features:
        indices = [index for index, image in enumerate(self) if getattr(image, "input_size", None) == size]
        alike = _Features([self[index] for index in indices], {}, self.fingerprint)
        alike.images = indices
        return alike

    def quantized(self, kind: str, layer: int | None = None) -> tuple[Array, Array]:
        """int8 values, and float32 scales [N] or [N, tokens]."""
        exact = np.stack([getattr(image if layer is None else image.layers[layer], kind) for image in self])
        scales = np.float32(np.abs(exact).max(-1) / 127)
        return np.round(exact / scales[..., np.newaxis]).astype(np.int8), scales


class ProgressListener:
    def __init__(self) -> None:
        self.begun: tuple[int, int] | None = None
        self.advanced = 0
        self.failures: list[tuple[str, str]] = []

    def begin(self, done: int, total: int) -> None:
        self.begun = (done, total)

    def advance(self, images: int) -> None:
        self.advanced += images

    def failed(self, image: str, reason: str) -> None:
        self.failures.append((image, reason))


def run(
    given: str | Path | sources.Images,
    out: Path,
    options: ExtractionOptions | None = None,
    *,
    client: StubClient | None = None,
    progress: ProgressListener | None = None,
    batch_images: int = 4,
    shard: tuple[int, int] | None = None,
) -> Totals:
    images = given if isinstance(given, sources.Images) else sources.find_images([str(given)])
    return extraction.extract(
        cast(Client, client or StubClient()),
        MODEL,
        images,
        out,
        options or ExtractionOptions(shard_rows=5),
        in_flight=2,
        batch_images=batch_images,
        priority="bulk",
        progress=progress or ProgressListener(),
        shard=shard,
    )


def tree(folder: Path) -> dict[str, bytes]:
    """All files below, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def failed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "failed.jsonl").read_text().splitlines()]


def stopped(source: Path, out: Path, options: ExtractionOptions | None = None) -> None:
    with pytest.raises(Unavailable):
        run(source, out, options, client=StubClient(stop=(6, Unavailable("gone"))), batch_images=2)

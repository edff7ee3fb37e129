"""Keeps the results that are in no shard yet in `partial.bin`, so that a run that is killed loses no answer.

Results are appended as they arrive, and are on the disk a few seconds later. A record is the SHA-256 of its body, the
body's length in eight bytes, little-endian, and the body: a safetensors file with the arrays of a row (none of a
failure) and, as JSON in its metadata, the rest. What follows the first damaged record does not count. A commit empties
the file; after a crash between the two it begins with results that are committed already.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dinov3_client import _safetensors
from dinov3_client._dtypes import Array
from dinov3_client.bulk import durable
from dinov3_client.bulk.rows import Failure, Row

PARTIAL = "partial.bin"
SYNC_SECONDS = 2.0

Result = Row | Failure

_DIGEST_BYTES, _LENGTH_BYTES = 32, 8


class Partial:
    """The file `partial.bin` of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / PARTIAL
        self._synced = time.monotonic()
        self._length: int | None = None
        """Bytes that count; None of no file."""

    def read(self, first: int) -> list[Result]:
        """Return the results of the images from index `first` on, as far as they follow each other without damage."""
        data = durable.read(self._path)
        self._length = None if data is None else 0
        found: list[Result] = []
        expected = None
        for result, end in _results(data or b""):
            if result.index != (min(result.index, first) if expected is None else expected):
                break
            expected = result.index + 1
            if result.index >= first:
                found.append(result)
                self._length = end
        return found

    def cut(self) -> None:
        """Remove what `read` did not return from the end of the file."""
        if self._length is not None:
            durable.truncate(self._path, self._length)

    def append(self, results: Iterable[Result]) -> None:
        """Append results: they survive the process at once, and a power failure after SYNC_SECONDS."""
        now = time.monotonic()
        sync = now - self._synced >= SYNC_SECONDS
        data = b"".join(_record(result) for result in results)
        durable.append(self._path, data, sync=sync)
        self._length = (self._length or 0) + len(data)
        if sync:
            durable.sync_folder(self._folder)  # its name, if it is new
            self._synced = now

    def clear(self) -> None:
        """Empty the file: its results are committed."""
        if self._length:
            durable.truncate(self._path, 0)
            self._length = 0

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
        self._length = None


def _record(result: Result) -> bytes:
    arrays = dict(result.arrays) if isinstance(result, Row) else {}
    described: dict[str, Any] = {name: getattr(result, name) for name in result.__slots__}
    if arrays:
        described["arrays"] = list(arrays)  # their order
    specs = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    parts = [_safetensors.header(specs, {"result": json.dumps(described)})]
    parts += [arrays[name].tobytes() for name in _safetensors.stored_order(specs)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return b"".join([digest.digest(), sum(map(len, parts)).to_bytes(_LENGTH_BYTES, "little"), *parts])


def _results(data: bytes) -> Iterator[tuple[Result, int]]:
    """Yield the results of undamaged records, with the end of the record of each."""
    place = 0
    while True:
        body = place + _DIGEST_BYTES + _LENGTH_BYTES
        end = body + int.from_bytes(data[body - _LENGTH_BYTES : body], "little")
        if (
            end > len(data)
            or hashlib.sha256(memoryview(data)[body:end]).digest() != data[place : place + _DIGEST_BYTES]
        ):
            return
        yield _parsed(np.frombuffer(data, np.uint8, end - body, body)), end
        place = end


def _parsed(body: Array) -> Result:
    arrays, metadata = _safetensors.parse(body)
    described: dict[str, Any] = json.loads(metadata["result"])
    if "reason" in described:
        return Failure(**described)
    described["input_size"] = tuple(described["input_size"])
    described["grids"] = {name: tuple(grid) for name, grid in described["grids"].items()}
    described["arrays"] = {name: arrays[name] for name in described["arrays"]}
    return Row(**described)

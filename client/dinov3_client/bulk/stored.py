"""Reads the results of an extraction back, in the order of their source."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from dinov3_client._dtypes import Array
from dinov3_client.bulk import manifest, parquet
from dinov3_client.bulk.errors import ExtractionError
from dinov3_client.bulk.manifest import Line
from dinov3_client.bulk.partial import Result
from dinov3_client.bulk.rows import ExtractionOptions, Failure, Format, Row
from dinov3_client.bulk.shards import NPZ_LABELS, check_shard, map_shard, npz_stem, tensor_name

_ShardReader = Callable[[Path, list[Line], Line], Iterator[Row]]


def results(folder: Path) -> Iterator[Result]:
    """Yield the rows and failures of an extraction, with rows as views of mapped shards where possible.

    Raises ExtractionError, also if it is damaged, and OSError.
    """
    header, lines, _ = manifest.read(folder)
    options = ExtractionOptions.of_header(header["options"])
    readers: dict[Format, _ShardReader] = {
        "safetensors": partial(_safetensors, options),
        "parquet": _parquet,
        "npz": _npz,
    }
    try:
        found: list[Iterator[Result]] = [_rows(folder, lines, readers[options.format]), _failures(folder)]
        yield from heapq.merge(*found, key=lambda result: result.index)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ExtractionError(
            f"{folder} is damaged ({error!r}); restore it, or extract its images into another folder"
        ) from None


def _rows(folder: Path, lines: Iterable[Line], read: _ShardReader) -> Iterator[Row]:
    """Yield the rows, shard by shard: those of a shard come before its commit."""
    waiting: list[Line] = []
    for line in lines:
        if manifest.is_row(line):
            waiting.append(line)
        else:
            if waiting:
                yield from read(folder, waiting, line)
            waiting = []


def _failures(folder: Path) -> Iterator[Failure]:
    path = folder / manifest.FAILED
    if path.exists():
        with path.open("rb") as file:
            for text in file:
                yield Failure(**json.loads(text))


def _safetensors(options: ExtractionOptions, folder: Path, lines: list[Line], commit: Line) -> Iterator[Row]:
    check_shard(folder, commit)
    tensors = map_shard(folder / commit["shard"])
    sizes = {size: _grids(entry) for size, entry in commit["sizes"].items()}
    for line in lines:
        size = line.get("size", next(iter(sizes)))
        prefix = tensor_name("", size if options.mixed else None)
        arrays = {
            name.removeprefix(prefix): tensor[line["row"], ...]
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        yield _row(line, _pair(size.split("x")), sizes[size], arrays)


def _parquet(folder: Path, lines: list[Line], commit: Line) -> Iterator[Row]:
    check_shard(folder, commit)
    for line, stored in zip(lines, parquet.read(folder / commit["shard"]), strict=True):
        yield _row(line, *stored)


def _npz(folder: Path, lines: list[Line], commit: Line) -> Iterator[Row]:
    for line in lines:
        with np.load(folder / line["shard"]) as file:
            found = {name: file[name] for name in file.files}
        labels = {name: str(found.pop(name)) for name in NPZ_LABELS}
        input_size = _pair(found.pop("input_size"))
        grids = {name: _pair(found.pop(name)) for name in tuple(found) if name.endswith("grid")}
        yield _row(line, input_size, grids, found, labels["source"], npz_stem(line["shard"]))


def _row(
    line: Line,
    input_size: tuple[int, int],
    grids: dict[str, tuple[int, int]],
    arrays: dict[str, Array],
    source: str = "",
    stem: str = "",
) -> Row:
    """Return a row; only those of npz files have a source and a stem."""
    return Row(line["id"], line["index"], source, stem, line["sha256"], input_size, grids, arrays)


def _grids(entry: Line) -> dict[str, tuple[int, int]]:
    return {name: _pair(grid) for name, grid in entry.items() if name != "rows"}


def _pair(values: Iterable[object]) -> tuple[int, int]:
    first, second = (int(value) for value in values)  # type: ignore[call-overload]
    return first, second

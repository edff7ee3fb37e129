"""Writes rows to files (shards of safetensors or Parquet, or one npz per image) and maps shards."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dinov3_client import _safetensors
from dinov3_client._dtypes import Array
from dinov3_client.bulk import durable, parquet
from dinov3_client.bulk.errors import ExtractionError, SourceError
from dinov3_client.bulk.images import Images
from dinov3_client.bulk.manifest import FAILED, LOCK, MANIFEST, Line
from dinov3_client.bulk.partial import PARTIAL
from dinov3_client.bulk.rows import ExtractionOptions, Format, Row

SHARD_BYTES = 256 << 20
"""The most bytes of features in a shard, unless a single row has more."""
NPZ_ROWS = 64
"""npz files per commit."""
NPZ_LABELS = ("preset", "fit", "exif", "source", "model", "weights", "fingerprint")
"""The texts in an npz file."""

# Linux's limits for a name and, less room for the temporary name, for a path.
_NAME_BYTES, _PATH_BYTES = 255, 4000


class Shards:
    """Writes rows to the files of a folder."""

    def __init__(self, folder: Path, options: ExtractionOptions, labels: Mapping[str, str]) -> None:
        self._folder = folder
        self._options = options
        self._labels = labels
        """Stored in each file: the model's name, weights and fingerprint."""
        if options.format == "parquet":
            parquet.check_installed()
        self.most_rows = NPZ_ROWS if options.format == "npz" else options.shard_rows

    def write(self, number: int, rows: Sequence[Row]) -> tuple[list[Line], Line]:
        """Write rows durably; return the manifest line of each, and the entry of the shard in the commit."""
        write = {"safetensors": self._safetensors, "parquet": self._parquet, "npz": self._npz}
        return write[self._options.format](number, rows)

    def discard(self, number: int) -> None:
        """Remove the shard of this number, which a killed run may have written without committing it."""
        for path in (self._folder / shard_name(number, self._options.format), self._folder / durable.DRAFT):
            path.unlink(missing_ok=True)

    def _safetensors(self, number: int, rows: Sequence[Row]) -> tuple[list[Line], Line]:
        name = shard_name(number, "safetensors")
        groups: dict[str, list[Row]] = {}
        lines = []
        for row in rows:
            size = size_name(row.input_size)
            group = groups.setdefault(size, [])
            lines.append(_line(row, name, len(group)) | ({"size": size} if self._options.mixed else {}))
            group.append(row)
        tensors = {
            tensor_name(key, size if self._options.mixed else None): [row.arrays[key] for row in group]
            for size, group in groups.items()
            for key in group[0].arrays
        }
        written = durable.create(self._folder / name, _buffers(tensors, self._labels))
        durable.sync_folder(self._folder)
        sizes = {size: {"rows": len(group), **group[0].grids} for size, group in groups.items()}
        return lines, {"shard": name, "bytes": written, "sizes": sizes}

    def _parquet(self, number: int, rows: Sequence[Row]) -> tuple[list[Line], Line]:
        name = shard_name(number, "parquet")
        written = durable.create(self._folder / name, [parquet.encode(rows, self._options, self._labels)])
        durable.sync_folder(self._folder)
        return [_line(row, name, place) for place, row in enumerate(rows)], {"shard": name, "bytes": written}

    def _npz(self, number: int, rows: Sequence[Row]) -> tuple[list[Line], Line]:
        lines = []
        for row in rows:
            name = npz_name(row.stem)
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.parent.resolve().is_relative_to(self._folder.resolve()):
                raise ExtractionError(
                    f"{path.parent} is, or lies below, a link that leads out of {self._folder}; remove it"
                )
            file = io.BytesIO()
            np.savez(file, **self._npz_contents(row))  # type: ignore[arg-type]  # its allow_pickle is not meant
            durable.create(path, [file.getbuffer()])
            lines.append(_line(row, name, 0))
        for folder in {(self._folder / line["shard"]).parent for line in lines}:
            durable.sync_folder(folder)
        return lines, {}

    def _npz_contents(self, row: Row) -> dict[str, Array]:
        """Return the contents of an npz; text is in arrays of no dimensions: `str(file["model"])`."""
        labels = {
            "preset": self._options.preset,
            "exif": self._options.exif,
            "fit": self._options.fit.method,
            "source": row.source,
            **self._labels,
        }
        return {
            **row.arrays,
            **{name: np.array(grid) for name, grid in row.grids.items()},
            "input_size": np.array(row.input_size),
            **{name: np.array(value) for name, value in labels.items()},
        }


def shard_name(number: int, form: Format) -> str:
    return f"features-{number:05}.{form}"


def size_name(size: tuple[int, int]) -> str:
    """Return HEIGHTxWIDTH, in pixels of the model's input."""
    return f"{size[0]}x{size[1]}"


def tensor_name(key: str, size: str | None) -> str:
    """Return the name of a tensor in a shard: with the input size in front if there may be several."""
    return key if size is None else f"{size}/{key}"


def npz_name(stem: str) -> str:
    return f"{stem}.npz"


def npz_stem(name: str) -> str:
    return name.removesuffix(".npz")


def check_npz_names(images: Images, folder: Path) -> None:
    """Raise SourceError unless each image can have an npz file of its own in `folder`."""
    owners: dict[str, int] = {}
    for index, item in enumerate(images):
        name = npz_name(item.stem)
        parts = name.split("/")
        longest = max(len(os.fsencode(part)) for part in parts)
        if {"", "..", "."} & set(parts) or "\0" in name:
            raise SourceError(f"{item.id} cannot have an npz file, which would be {name}; use --format safetensors")
        if longest > _NAME_BYTES or len(os.fsencode(folder / name)) > _PATH_BYTES:
            raise SourceError(
                f"{item.id} cannot have an npz file: a name of {longest} bytes in a path of "
                f"{len(os.fsencode(folder / name))} is longer than the limits of {_NAME_BYTES} and {_PATH_BYTES}; "
                "use --format safetensors"
            )
        if name in owners:
            raise SourceError(
                f"{images[owners[name]].source} and {item.source} would both become {name}; give images of equal names "
                "to runs with an --out of their own, or use --format safetensors"
            )
        owners[name] = index
    taken = owners.keys() | {MANIFEST, FAILED, LOCK, PARTIAL}
    for name, index in owners.items():
        for end in (place for place, letter in enumerate(name) if letter == "/"):
            if name[:end] in taken:
                raise SourceError(
                    f"{images[index].id} cannot have an npz file: {name[:end]} would be both a folder and a file; use "
                    "--format safetensors"
                )


def map_shard(path: Path) -> dict[str, Array]:
    """Map a shard into memory and return its tensors as read-only views. Raises OSError and ExtractionError."""
    try:
        return _safetensors.parse(np.memmap(path, np.uint8, "r"))[0]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ExtractionError(f"{path} is damaged ({error}); extract its images again, into another folder") from None


def check_shard(folder: Path, commit: Line) -> None:
    """Raise ExtractionError unless the shard of a commit is there, with the length that was written."""
    path = folder / commit["shard"]
    if path.parent != folder:
        raise ValueError(f"a shard in another folder: {path}")
    found = path.stat().st_size if path.exists() else None
    if found != commit["bytes"]:
        raise ExtractionError(
            f"{path} {'is missing' if found is None else f'has {found:,} bytes'}, and was written with "
            f"{commit['bytes']:,}; restore it, or extract into another folder"
        )


def _line(row: Row, shard: str, place: int) -> Line:
    return {"id": row.id, "index": row.index, "shard": shard, "row": place, "sha256": row.sha256}


def _buffers(tensors: Mapping[str, Sequence[Array]], metadata: Mapping[str, str]) -> Iterator[bytes | Array]:
    """Yield the bytes of a file in pieces; tensors [R, ...] are given by their R rows."""
    specs = {name: (rows[0].dtype, (len(rows), *rows[0].shape)) for name, rows in tensors.items()}
    yield _safetensors.header(specs, metadata)
    for name in _safetensors.stored_order(specs):
        for row in tensors[name]:
            # As bytes: bfloat16 arrays do not support the buffer protocol.
            yield np.ascontiguousarray(row).reshape(-1).view(np.uint8)

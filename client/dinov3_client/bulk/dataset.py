"""Reads the output of `dinov3-client extract`, for training."""

from __future__ import annotations

import operator
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np

from dinov3_client._dtypes import Array
from dinov3_client.bulk import manifest
from dinov3_client.bulk.errors import ExtractionError
from dinov3_client.bulk.manifest import Line
from dinov3_client.bulk.rows import SCALES
from dinov3_client.bulk.shards import check_shard, map_shard, tensor_name

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    MapDataset = Dataset[Any]
else:  # which is all that torch's DataLoader wants, and does not import torch
    MapDataset = object


class FeatureDataset(MapDataset):
    """The features of an extraction by index or image id: a map-style dataset for torch's DataLoader.

        dataset = FeatureDataset("features")
        dataset[0]["cls"], dataset["n01440764/10026.jpg"]["patches"]  # [D], [P, D]
        loader = DataLoader(dataset, batch_size=256, shuffle=True, num_workers=4)

    Failed images are left out; the others are in the order of their source. An item is a dict of the extracted
    features (D channels, P patches, G registers):

        id                            str
        cls, patches, registers       [D], [P, D], [G, D]: float16 and float32 as stored; bfloat16, and int8 times
                                      its scales, as float32. Copies, which may be written to.
        layerI_cls, layerI_patches    the same of each layer I
        grid, layerI_grid             [2] int64: rows and columns of the patches
        input_size                    [2] int64: height and width of the model's input in pixels

    Torch's default collation needs items of one input size; for several, write a collation of your own or use cls
    alone. Each process maps a shard into memory when it first uses it: a dataset can be forked and pickled at any time.
    It takes about 26 bytes per image besides the ids.

    unfinished: accept an extraction that is not complete, with the images committed so far.

    Raises ExtractionError for a missing, unfinished or damaged extraction, or one of other files than safetensors.
    """

    def __init__(self, folder: str | os.PathLike[str], *, unfinished: bool = False) -> None:
        self.folder = Path(folder).absolute()
        self.header, lines, complete = manifest.read(self.folder)
        """The first line of the manifest: model, weights, fingerprint, options, source."""
        form = self.header["options"]["format"]
        if form != "safetensors":
            reader = {"npz": "numpy.load", "parquet": "pyarrow, polars and DuckDB"}.get(form, "another version")
            raise ExtractionError(f"{self.folder} holds {form} files: {reader} can read them, FeatureDataset cannot")
        self._shards: list[str] = []
        self._grids: dict[str, dict[str, tuple[int, int]]] = {}
        """By input size: grid, layerI_grid."""
        self._mixed = self.header["options"]["preset"] == "none" and self.header["options"]["size"] is None
        try:
            self._load(lines)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, StopIteration) as error:
            raise ExtractionError(
                f"{self.folder / manifest.MANIFEST} is damaged ({error!r}); restore it, or extract into another folder"
            ) from None
        if not complete and not unfinished:
            raise ExtractionError(
                f"{self.folder} is unfinished: {len(self):,} of {len(manifest.span(self.header)):,} images have "
                "features; run the same `dinov3-client extract` again to finish it, or use what is there with "
                "FeatureDataset(..., unfinished=True)"
            )
        self._sizes = list(self._grids)
        self._opened: dict[int, dict[str, Array]] = {}
        self._indices: dict[str, int] | None = None

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model, and of the projection if one was used, as in `Features.fingerprint`."""
        return str(self.header["fingerprint"])

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, key: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, key: SupportsIndex | str | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(key, slice):
            return [self[index] for index in range(len(self))[key]]
        index = self.index(key) if isinstance(key, str) else self._index(key)
        size = self._sizes[self._places[index]["size"]]
        stored = self.raw(index)
        return {
            "id": self.id(index),
            **{name: _usable(value, stored.get(name + SCALES)) for name, value in stored.items() if SCALES not in name},
            **{name: np.array(grid, np.int64) for name, grid in self._grids[size].items()},
            "input_size": np.array(size.split("x"), np.int64),
        }

    def raw(self, key: SupportsIndex | str) -> dict[str, Array]:
        """Return the arrays of one image as stored: read-only views of the shard, without a copy.

        bfloat16 is that of ml_dtypes. int8 arrays come with their scales, such as `cls_scales` [] and
        `patches_scales` [P]: feature = value * scale.
        """
        place = self._places[self.index(key) if isinstance(key, str) else self._index(key)]
        size = self._sizes[place["size"]]
        prefix = tensor_name("", size if self._mixed else None)
        row = int(place["row"])
        return {
            name.removeprefix(prefix): array[row, ...]
            for name, array in self._shard(int(place["shard"])).items()
            if name.startswith(prefix)
        }

    def id(self, index: SupportsIndex) -> str:
        """Return the id of an image."""
        place = self._index(index)
        begin = int(self._id_ends[place - 1]) if place else 0
        return self._id_bytes[begin : self._id_ends[place]].tobytes().decode("utf-8", "surrogateescape")

    def ids(self) -> Sequence[str]:
        """Return all ids, in order, as a sequence that reads each when it is used."""
        return _Ids(self)

    def index(self, image: str) -> int:
        """Return the index of an image id. Raises KeyError. The first call in a process builds a lookup table."""
        if self._indices is None:
            self._indices = {each: index for index, each in enumerate(self.ids())}
        try:
            return self._indices[image]
        except KeyError:
            raise KeyError(f"{self.folder} has no features of {image!r}") from None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_opened": {}, "_indices": None}

    def __repr__(self) -> str:
        return f"<FeatureDataset of {len(self):,} images in {self.folder}: {self.header['model']}>"

    def _index(self, index: SupportsIndex) -> int:
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"index {place} of {len(self)} images")
        return place % len(self)

    def _shard(self, number: int) -> dict[str, Array]:
        if number not in self._opened:
            self._opened[number] = map_shard(self.folder / self._shards[number])
        return self._opened[number]

    def _load(self, lines: Iterable[Line]) -> None:
        """Load the manifest into arrays, not lists: forked workers that only read them share their memory."""
        names, ends = bytearray(), array("q")
        shards, rows, sizes = array("i"), array("i"), array("i")
        waiting: list[Line] = []
        for line in lines:
            if manifest.is_row(line):
                waiting.append(line)
                continue
            if waiting:
                self._check(line)
                numbers = {size: list(self._grids).index(size) for size in line["sizes"]}
            for row in waiting:
                size = row.get("size", next(iter(numbers)))
                if not 0 <= row["row"] < line["sizes"][size]["rows"]:
                    raise ValueError(f"row {row['row']} of {line['sizes'][size]['rows']}")
                names += row["id"].encode("utf-8", "surrogateescape")
                ends.append(len(names))
                shards.append(len(self._shards) - 1)
                rows.append(row["row"])
                sizes.append(numbers[size])
            waiting.clear()
        self._id_bytes = np.frombuffer(bytes(names), np.uint8)
        self._id_ends = np.array(ends, np.int64)
        self._places = np.zeros(len(ends), [("shard", np.int32), ("row", np.int32), ("size", np.int32)])
        self._places["shard"], self._places["row"], self._places["size"] = shards, rows, sizes

    def _check(self, commit: Line) -> None:
        """Check that the shard of a commit exists and is complete, and note its input sizes."""
        check_shard(self.folder, commit)
        self._shards.append(commit["shard"])
        for size, entry in commit["sizes"].items():
            grids = {name: (int(grid[0]), int(grid[1])) for name, grid in entry.items() if name != "rows"}
            self._grids.setdefault(size, grids)


class _Ids(Sequence[str]):
    """The ids of a dataset: as a list they would take memory in each worker of a DataLoader."""

    def __init__(self, dataset: FeatureDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._dataset.id(each) for each in range(len(self))[index]]
        return self._dataset.id(index)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"<{len(self):,} ids: {shown}{', ...' if len(self) > 3 else ''}>"


def _usable(stored: Array, scales: Array | None) -> Array:
    """Return a writable copy in a dtype that torch accepts."""
    if scales is not None:
        return stored.astype(np.float32) * scales[..., np.newaxis]
    return np.array(stored, np.float32 if stored.dtype.name == "bfloat16" else None)

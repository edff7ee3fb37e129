"""Reads the folders that `torch.distributed.checkpoint` writes: `.metadata`, and tensors in `*.distcp` files.

torch's own reader unpickles `.metadata`, which could run code. Here every class in it becomes an inert record, so no
code in a checkpoint is run. Each tensor is an entry of `torch.save` in a part of a file, in one or more chunks.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3_server.errors import CheckpointError
from dinov3_server.models.variant import Shape
from dinov3_server.models.weight_files import is_plain_name

METADATA = ".metadata"
_CONVERT = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"


class DistributedTensors(Mapping[str, Tensor]):
    """The tensors of a folder, each read when it is looked up: a training state holds many more than the backbone's.

    Raises CheckpointError, also on a look-up.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            with (folder / METADATA).open("rb") as file:
                metadata = _Unpickler(file).load()
            described: Mapping[Any, Any] = metadata.state_dict_metadata
            self.shapes: dict[str, Shape] = {
                str(key): tuple(map(int, each.size)) for key, each in described.items() if hasattr(each, "size")
            }
            self._chunks: dict[str, list[tuple[Shape, _Record]]] = {key: [] for key in self.shapes}
            for index, stored in metadata.storage_data.items():
                if index.fqn in self._chunks:
                    self._chunks[index.fqn].append((tuple(map(int, index.offset)), stored))
        except OSError as error:
            raise CheckpointError(f"{folder / METADATA}: cannot be read: {error.strerror}") from None
        except Exception as error:  # unpickling raises almost anything
            raise CheckpointError(
                f"{folder / METADATA}: damaged, or not of a checkpoint of torch.distributed ({type(error).__name__})"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, key: str) -> Tensor:
        shape, chunks = self.shapes[key], self._chunks[key]
        pieces = [(offset, self._read(key, stored)) for offset, stored in chunks]
        if len(pieces) == 1 and pieces[0][1].shape == shape:
            return pieces[0][1]
        if not pieces or sum(piece.numel() for _, piece in pieces) != torch.Size(shape).numel():
            raise CheckpointError(f"{self._folder}: the chunks of {key} do not make up its shape {shape}")
        whole = torch.full(shape, torch.nan, dtype=pieces[0][1].dtype)
        for offset, piece in pieces:
            place = whole
            for axis, (start, size) in enumerate(zip(offset, piece.shape, strict=True)):
                if not 0 <= start <= start + size <= shape[axis]:
                    raise CheckpointError(f"{self._folder}: a chunk of {key} is outside its shape {shape}")
                place = place.narrow(axis, start, size)
            place.copy_(piece)
        return whole

    def _read(self, key: str, stored: _Record) -> Tensor:
        """Read one chunk."""
        name = stored.relative_path
        if not is_plain_name(name):
            raise CheckpointError(f"{self._folder}: {METADATA} says that {key} is in {name!r}, outside of the folder")
        if getattr(stored, "transform_descriptors", None):
            raise CheckpointError(
                f"{self._folder}: {key} is compressed; on a machine of your own `{_CONVERT} {self._folder} FILE` makes "
                "a file that can be served"
            )
        path = self._folder / name
        try:
            with path.open("rb") as file:
                file.seek(stored.offset)
                piece = torch.load(io.BytesIO(file.read(stored.length)), map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: is missing; {METADATA} says that {key} is in it") from None
        except Exception as error:
            problem = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{path}: {key} cannot be read: damaged or truncated ({problem})") from None
        if not isinstance(piece, Tensor):
            raise CheckpointError(f"{path}: {key} is a {type(piece).__name__} and not a tensor")
        return piece.detach()


class _Record:
    """Takes the place of any object in a pickle: keeps its attributes, and does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class _Unpickler(pickle.Unpickler):
    """Unpickles data without importing anything."""

    def find_class(self, module: str, name: str) -> type:
        return tuple if (module, name) == ("torch", "Size") else _Record

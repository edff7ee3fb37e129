"""A strict reader of the safetensors format.

The format (https://github.com/huggingface/safetensors#format): 8 bytes, the little-endian length N of the header;
N bytes of JSON, `{"name": {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}, "__metadata__": {...}}`; then
the tensors' little-endian bytes, which cover the rest of the file without holes or overlaps.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3_server.errors import CheckpointError

_MAX_HEADER = 100_000_000  # the reference implementation's own bound
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file, mapped into memory, not read.

    Raises CheckpointError for a file that is not exactly what the format says, or has a dtype other than F32, F16
    and BF16.
    """
    with path.open("rb") as file:
        # A private mapping: torch wants writable memory, and nothing written would reach the file.
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if len(memory) < 8:
        raise CheckpointError(f"{path}: {len(memory)} bytes, too short for a safetensors file")
    size = int.from_bytes(memory[:8], "little")
    if size > min(_MAX_HEADER, len(memory) - 8):
        raise CheckpointError(
            f"{path}: not a safetensors file, or truncated: its header would be {size} bytes long, "
            f"and the file has {len(memory)} bytes (a header may have {_MAX_HEADER})"
        )
    start = 8 + size
    spans = {}
    for name, entry in _parse_header(path, memory[8:start]).items():
        spans[name] = _span(path, name, entry)
    _check_cover(path, spans, len(memory) - start)
    return {name: _tensor(memory, dtype, shape, start + begin) for name, (dtype, shape, begin, _) in spans.items()}


_Span = tuple[torch.dtype, tuple[int, ...], int, int]


def parse_json(raw: bytes) -> Any:
    """Raises ValueError for what is not JSON in UTF-8, or has a name twice in one object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: the safetensors header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _span(path: Path, name: str, entry: Any) -> _Span:
    """The dtype, shape, begin and end that a header entry states, once they agree."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: the safetensors header's entry {name!r} is not a dtype, shape and data_offsets")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{path}: {name!r} has dtype {entry['dtype']!r}; only {', '.join(_DTYPES)} are read")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise CheckpointError(f"{path}: {name!r} has shape {shape!r}, which is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(f"{path}: {name!r} has data_offsets {offsets!r}, which are not a begin and an end")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{path}: {name!r} of shape {shape} and dtype {entry['dtype']} takes {math.prod(shape) * dtype.itemsize} "
            f"bytes, but its data_offsets {offsets} span {end - begin}"
        )
    return dtype, tuple(shape), begin, end


def _check_cover(path: Path, spans: dict[str, _Span], size: int) -> None:
    """That the tensors cover the `size` bytes of data once."""
    position, previous = 0, "the header"
    for name, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != position:
            what = "overlaps" if begin < position else "leaves a hole after"
            raise CheckpointError(f"{path}: {name!r} begins at byte {begin} of the data and {what} {previous}")
        position, previous = end, repr(name)
    if position != size:
        raise CheckpointError(
            f"{path}: the header describes {position} bytes of tensors and the file has {size}"
            + (": it is truncated" if size < position else "")
        )


def _tensor(memory: mmap.mmap, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    if offset % dtype.itemsize:  # allowed by the format; copied, as tensors are aligned
        return torch.frombuffer(bytearray(memory[offset : offset + count * dtype.itemsize]), dtype=dtype).view(shape)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)

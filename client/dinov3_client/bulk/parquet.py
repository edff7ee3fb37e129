"""Writes rows to Parquet files and reads them back, with pyarrow.

A column has one value per row: `id`, `index`, `sha256`, `input_size`, the grids, and each array of the row as nested
lists of fixed sizes; of images of several sizes, the list over the patches has any length. pyarrow stores its schema in
the file, so that the sizes are known to its readers; the format itself has lists only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dinov3_client._dtypes import Array
from dinov3_client.bulk.errors import ExtractionError
from dinov3_client.bulk.rows import SCALES, ExtractionOptions, Row

_TEXTS = ("id", "index", "sha256")


def check_installed() -> None:
    """Raise ExtractionError without pyarrow."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ExtractionError(
            f"--format parquet needs pyarrow ({error}): pip install 'dinov3-serving[parquet]'"
        ) from None


def encode(rows: Sequence[Row], options: ExtractionOptions, labels: Mapping[str, str]) -> Any:
    """Return a file as a buffer. The metadata have the labels and, as JSON, the options."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = rows[0]
    columns = {
        "id": pa.array([printable_id(row.id) for row in rows], pa.string()),
        "index": pa.array([row.index for row in rows], pa.int64()),
        "sha256": pa.array([row.sha256 for row in rows], pa.string()),
        "input_size": _lists([np.array(row.input_size) for row in rows]),
        **{name: _lists([np.array(row.grids[name]) for row in rows]) for name in first.grids},
        **{name: _lists([row.arrays[name] for row in rows], ragged=_ragged(name, options)) for name in first.arrays},
    }
    table = pa.table(columns).replace_schema_metadata({**labels, "options": json.dumps(asdict(options))})
    sink = pa.BufferOutputStream()
    # Features hardly become smaller, and no two values are likely to be equal.
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=list(_TEXTS))
    return sink.getvalue()


def read(path: Path) -> Iterator[tuple[tuple[int, int], dict[str, tuple[int, int]], dict[str, Array]]]:
    """Yield input size, grids and arrays of each row of a file. Raises ValueError for a damaged one."""
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        table = pq.read_table(file)
    columns = {name: _arrays(table[name]) for name in table.column_names if name not in _TEXTS}
    pairs = [name for name in columns if name == "input_size" or name.endswith("grid")]
    for place in range(table.num_rows):
        row = {name: column[place] for name, column in columns.items()}
        sizes = {name: (int(row[name][0]), int(row[name][1])) for name in pairs}
        yield sizes.pop("input_size"), sizes, {name: array for name, array in row.items() if name not in pairs}


def printable_id(name: str) -> str:
    """Return an id as text that UTF-8 has: bytes of a file's name that are no text appear as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _ragged(name: str, options: ExtractionOptions) -> bool:
    """Return whether rows may have different numbers of tokens of this kind."""
    return options.mixed and name.removesuffix(SCALES).endswith("patches")


def _lists(arrays: Sequence[Array], *, ragged: bool = False) -> Any:
    """Return a column of arrays [..., C] as nested lists."""
    import pyarrow as pa

    shape = arrays[0].shape
    column = pa.array(np.concatenate([array.reshape(-1) for array in arrays]))
    if not shape:
        return column
    for size in reversed(shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    if ragged or not shape[0]:  # Arrow cannot count fixed-size lists of nothing
        ends = np.cumsum([0, *(len(array) for array in arrays)])
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), column)
    return pa.FixedSizeListArray.from_arrays(column, shape[0])


def _arrays(column: Any) -> Sequence[Array]:
    """Return the arrays of a column of `_lists`."""
    import pyarrow as pa

    values = column.combine_chunks()
    offsets = None
    if pa.types.is_list(values.type):
        offsets, values = values.offsets.to_numpy(), values.values
    shape = []
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
    flat: Array = values.to_numpy(zero_copy_only=False).reshape(-1, *shape)
    places = range(len(flat)) if offsets is None else map(slice, offsets[:-1], offsets[1:])
    return [flat[place, ...] for place in places]

"""Write features of photos to Parquet, and read them with pyarrow, polars and DuckDB:
`python examples/parquet_tables.py PHOTOS OUT`

The server is DINOV3_TARGET (default localhost:50051).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq

from dinov3_client import Client
from dinov3_client.cli import main as dinov3_client

TARGET = os.environ.get("DINOV3_TARGET") or "localhost:50051"


def main(photos: str, out: str) -> None:
    folder = Path(out, "tables")
    assert dinov3_client(["extract", photos, "--out", str(folder), "--format", "parquet", "--target", TARGET]) == 0
    files = f"{folder}/*.parquet"  # not the folder: the manifest lies there too

    features = pl.read_parquet(files)
    patches = features["patches"].to_numpy()  # [N, P, D]

    table = pq.read_table(sorted(map(str, folder.glob("*.parquet")))[0])
    cls = table["cls"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)  # [R, D], without a copy
    fingerprint = table.schema.metadata[b"fingerprint"].decode()

    [nearest] = duckdb.sql(f"""
        select b.id, list_cosine_similarity(a.cls, b.cls) as similarity
        from '{files}' a, '{files}' b where a.index = 0 and b.index > 0 order by similarity desc limit 1
    """).fetchall()

    with Client(TARGET) as client:
        expected = client.extract([Path(photos, name) for name in features["id"]], dtype="float16")
        assert fingerprint == expected.fingerprint
    np.testing.assert_allclose(patches, expected.patches, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(cls, expected.cls[: len(cls)], rtol=1e-2, atol=1e-2)
    unit = expected.cls.astype(np.float64) / np.linalg.norm(expected.cls.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(nearest[1], (unit[1:] @ unit[0]).max(), rtol=1e-2)
    print(f"{len(features)} photos, patches {patches.shape}; nearest to {features['id'][0]}: {nearest[0]}")


if __name__ == "__main__":
    main(*sys.argv[1:])

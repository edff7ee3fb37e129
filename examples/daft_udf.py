"""Add CLS features to a Daft DataFrame of photos: `python examples/daft_udf.py FOLDER`

The server is DINOV3_TARGET (default localhost:50051).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import daft
import numpy as np
from daft import DataType

from dinov3_client import Client

TARGET = os.environ.get("DINOV3_TARGET") or "localhost:50051"


def dinov3(target: str) -> object:
    """Return an instance of a Daft class: its method `cls` returns the CLS tokens of a column of image files."""
    with Client(target) as client:
        dims = client.wait_ready(60).embed_dim

    @daft.cls(max_concurrency=4)  # instances, each with one request in flight
    class Dinov3:
        def __init__(self) -> None:
            self.client = Client(target, deadline=600)  # retries while the server is full or restarts

        @daft.method.batch(return_dtype=DataType.embedding(DataType.float32(), dims), batch_size=32)
        def cls(self, images: daft.Series) -> list[np.ndarray]:
            features = self.client.extract(images.to_pylist(), "cls", dtype="float32", priority="bulk")
            return list(features.cls)

    return Dinov3()


def main(folder: str) -> None:
    photos = daft.from_glob_path(f"{folder}/*.jpg").select("path")
    photos = photos.with_column("cls", dinov3(TARGET).cls(photos["path"].download()))

    rows = photos.sort("path").to_pydict()
    files = sorted(Path(folder).glob("*.jpg"))
    with Client(TARGET) as client:
        expected = client.extract(files, "cls", dtype="float32").cls
    assert [Path(path).name for path in rows["path"]] == [file.name for file in files]
    np.testing.assert_allclose(np.stack(rows["cls"]), expected, rtol=1e-3, atol=1e-3)
    print(f"{len(files)} photos, cls {np.stack(rows['cls']).shape}")


if __name__ == "__main__":
    main(sys.argv[1])

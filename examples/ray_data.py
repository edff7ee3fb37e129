"""Add CLS features to a Ray Dataset of photos: `python examples/ray_data.py FOLDER`

The server is DINOV3_TARGET (default localhost:50051), the cluster RAY_ADDRESS; without it, one of two nodes is started
on this machine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import ray
from ray.cluster_utils import Cluster

from dinov3_client import AsyncClient, Client

TARGET = os.environ.get("DINOV3_TARGET") or "localhost:50051"


class Extract:
    """Adds `cls` [B, D] float16 to batches whose column `bytes` has image files."""

    def __init__(self, target: str) -> None:
        self.client = AsyncClient(target, deadline=600)  # retries while the server is full or restarts

    # Ray runs several calls of an async method at once, so that several requests are in flight.
    async def __call__(self, batch: dict[str, np.ndarray]) -> AsyncIterator[dict[str, np.ndarray]]:
        features = await self.client.extract(list(batch.pop("bytes")), "cls", priority="bulk")
        yield batch | {"cls": features.cls}


def with_cls(dataset: ray.data.Dataset, target: str, actors: int, batch_size: int = 32) -> ray.data.Dataset:
    return dataset.map_batches(
        Extract,
        fn_constructor_args=[target],
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
    )


def two_nodes() -> Cluster:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    return cluster


def main(folder: str) -> None:
    cluster = None if os.environ.get("RAY_ADDRESS") else two_nodes()
    ray.init(cluster and cluster.address)
    rows = with_cls(ray.data.read_binary_files(folder, include_paths=True), TARGET, actors=2, batch_size=8).take_all()

    cls = {Path(row["path"]).name: row["cls"] for row in rows}
    files = sorted(Path(folder).glob("*.jpg"))
    with Client(TARGET) as client:
        expected = client.extract(files, "cls").cls
    assert len(rows) == len(files)
    np.testing.assert_allclose(np.stack([cls[file.name] for file in files]), expected, rtol=1e-2, atol=1e-2)
    print(f"{len(rows)} photos, cls {expected.shape}")
    ray.shutdown()
    if cluster is not None:
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])

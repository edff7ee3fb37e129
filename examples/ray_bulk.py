"""Write features of a data set with all nodes of a Ray cluster: `python examples/ray_bulk.py FOLDER OUT [PARTS]`

Each part is an extraction of its own (docs/bulk.md), and resumes where it was stopped: when Ray runs it again on
another node, and when this program is run again. FOLDER and OUT are on storage that all nodes share. The server is
DINOV3_TARGET (default localhost:50051), the cluster RAY_ADDRESS; without it, one of two nodes is started here.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import ray
from ray.cluster_utils import Cluster

from dinov3_client import Client, FeatureDataset
from dinov3_client.cli import main as dinov3_client

TARGET = os.environ.get("DINOV3_TARGET") or "localhost:50051"


# Runs again if its node is lost (max_retries), and if the server was away for too long (retry_exceptions).
@ray.remote(num_cpus=1, scheduling_strategy="SPREAD", max_retries=5, retry_exceptions=True)
def extract(photos: Sequence[str], out: str, flags: Sequence[str]) -> int:
    """Extract one part, or what is left of it. Returns the number of photos that have features."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
        listed.write("\n".join(photos))
        listed.flush()
        dinov3_client(["extract", "--list", listed.name, "--out", out, "--target", TARGET, *flags])
    return len(FeatureDataset(out))  # raises ExtractionError if the part is not complete


def extract_all(photos: Sequence[str], out: str, parts: int, *flags: str) -> list[str]:
    """Extract `parts` parts of about equal size. Returns their folders, in the order of the photos."""
    folders = [f"{out}/part-{part:05}" for part in range(parts)]
    bounds = pairwise(len(photos) * part // parts for part in range(parts + 1))
    ray.get([extract.remote(photos[a:b], folder, flags) for (a, b), folder in zip(bounds, folders, strict=True)])
    return folders


def two_nodes() -> Cluster:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    return cluster


def main(folder: str, out: str, parts: int = 4) -> None:
    cluster = None if os.environ.get("RAY_ADDRESS") else two_nodes()
    ray.init(cluster and cluster.address)
    photos = sorted(str(path.resolve()) for path in Path(folder).glob("*.jpg"))
    folders = extract_all(photos, str(Path(out).resolve()), parts, "--outputs", "cls")

    datasets = [FeatureDataset(folder) for folder in folders]  # torch.utils.data.ConcatDataset makes one of them
    assert [id for dataset in datasets for id in dataset.ids()] == photos
    cls = np.stack([dataset[index]["cls"] for dataset in datasets for index in range(len(dataset))])
    with Client(TARGET) as client:
        np.testing.assert_allclose(cls, client.extract(photos, "cls").cls, rtol=1e-2, atol=1e-2)
    print(f"{len(cls)} photos in {parts} parts, cls {cls.shape}")
    ray.shutdown()
    if cluster is not None:
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))

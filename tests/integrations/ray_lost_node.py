"""Lose a node of the cluster in the middle of examples/ray_bulk.py: `python ray_lost_node.py FOLDER OUT`.

examples/ must be on PYTHONPATH, for Ray's processes too.

Its part goes on at another node from its last commit: no row is written twice, and the data set is complete.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import ray
from ray.cluster_utils import Cluster
from ray_bulk import TARGET, extract_all

from dinov3_client import Client, FeatureDataset

FLAGS = ("--outputs", "cls", "--shard-rows", "1", "--batch-size", "1", "--in-flight", "1")


def commits(part: Path) -> list[int]:
    """Return the number of rows at each commit of a part."""
    manifest = part / "manifest.jsonl"
    lines = manifest.read_text().splitlines() if manifest.exists() else []
    return [json.loads(line)["committed"]["rows"] for line in lines if line.startswith('{"committed"')]


def main(folder: str, out: str) -> None:
    photos = sorted(str(path.resolve()) for path in Path(folder).glob("*.jpg"))
    # The first part runs on the node that is lost: the head gets no part before it is.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    lost = cluster.add_node(num_cpus=1)
    ray.init(cluster.address)
    folders: list[str] = []
    run = threading.Thread(target=lambda: folders.extend(extract_all(photos, out, 2, *FLAGS)))
    run.start()
    part = Path(out) / "part-00000"
    while len(commits(part)) < 2:  # in another process, which says nothing to this one
        assert run.is_alive()
        time.sleep(0.05)
    cluster.remove_node(lost, allow_graceful=False)
    kept = commits(part)
    assert len(kept) < len(photos) // 2 - 1, "the part was complete before the node was lost"
    print(f"lost the node after {len(kept)} of {len(photos) // 2} photos")
    cluster.add_node(num_cpus=1)
    run.join()

    datasets = [FeatureDataset(folder) for folder in folders]
    assert [id for dataset in datasets for id in dataset.ids()] == photos
    assert commits(part)[: len(kept)] == kept
    cls = np.stack([dataset[index]["cls"] for dataset in datasets for index in range(len(dataset))])
    with Client(TARGET) as client:
        np.testing.assert_allclose(cls, client.extract(photos, "cls").cls, rtol=1e-2, atol=1e-2)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])

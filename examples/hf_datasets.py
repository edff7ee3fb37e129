"""Add CLS features to a Hugging Face dataset of photos and save it: `python examples/hf_datasets.py FOLDER OUT`

The server is DINOV3_TARGET (default localhost:50051).
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value, load_dataset, load_from_disk

from dinov3_client import Client

TARGET = os.environ.get("DINOV3_TARGET") or "localhost:50051"


@cache
def client_of(target: str, fingerprint: str) -> Client:
    """Return this process's client. It retries while the server is full or restarts, and accepts one model only."""
    return Client(target, fingerprint=fingerprint, deadline=600)


def add_cls(batch: dict[str, list], target: str, fingerprint: str) -> dict[str, np.ndarray]:
    # With decode=False an image is its file: {"bytes": ..., "path": ...}. The server decodes it.
    images = [image["bytes"] or image["path"] for image in batch["image"]]
    return {"cls": client_of(target, fingerprint).extract(images, "cls", priority="bulk").cls}


def with_cls(dataset: Dataset) -> Dataset:
    with Client(TARGET) as client:
        model = client.wait_ready(60)
    dataset = dataset.cast_column("image", Image(decode=False))
    features = Features({**dataset.features, "cls": List(Value("float16"), length=model.embed_dim)})
    dataset = dataset.map(
        add_cls,
        # `map` keeps its results by a hash of the function and of these arguments: another model is computed again.
        fn_kwargs={"target": TARGET, "fingerprint": model.fingerprint},
        batched=True,
        batch_size=32,
        num_proc=2,  # each process has one request in flight
        features=features,
    )
    return dataset.cast_column("image", Image())


def main(folder: str, out: str) -> None:
    dataset = with_cls(load_dataset("imagefolder", data_dir=folder, split="train"))
    dataset.save_to_disk(out)

    dataset = load_from_disk(out).with_format("numpy", columns=["cls"])
    files = sorted(Path(folder).glob("*.jpg"))
    with Client(TARGET) as client:
        expected = client.extract(files, "cls").cls
    cls = dataset["cls"][:]  # stored as float16; this format reads every float as float32
    np.testing.assert_allclose(cls, expected, rtol=1e-2, atol=1e-2)
    print(f"{len(files)} photos, cls {cls.shape}")


if __name__ == "__main__":
    main(*sys.argv[1:])

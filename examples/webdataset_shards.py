"""Write CLS features beside the photos of webdataset shards:
`python examples/webdataset_shards.py 'photos-{000000..000099}.tar' OUT`

Each sample of OUT/features-*.tar has the key of its photo and `cls.npy` [D]. The server is DINOV3_TARGET (default
localhost:50051).
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import webdataset as wds

from dinov3_client import Client

TARGET = os.environ.get("DINOV3_TARGET") or "localhost:50051"


def with_cls(client: Client, shards: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (key, cls) of each photo, in the order of the shards. The server decodes the files."""
    batches = wds.WebDataset(shards, shardshuffle=False).to_tuple("__key__", "jpg;jpeg;png;webp").batched(32)
    keys, files = itertools.tee(batches)  # extract_many reads at most `in_flight` batches ahead
    answers = client.extract_many((list(batch[1]) for batch in files), "cls", in_flight=4, priority="bulk")
    for batch, features in zip(keys, answers, strict=True):
        yield from zip(batch[0], features.cls, strict=True)


def main(shards: str, out: str) -> None:
    with Client(TARGET, deadline=600) as client:  # retries while the server is full or restarts
        with wds.ShardWriter(f"{out}/features-%06d.tar", maxcount=10_000) as writer:
            for key, cls in with_cls(client, shards):
                writer.write({"__key__": key, "cls.npy": cls})

        written = sorted(map(str, Path(out).glob("features-*.tar")))
        features = list(wds.WebDataset(written, shardshuffle=False).decode().to_tuple("__key__", "cls.npy"))
        photos = list(wds.WebDataset(shards, shardshuffle=False).to_tuple("__key__", "jpg"))
        expected = client.extract([file for _, file in photos], "cls").cls
    assert [key for key, _ in features] == [key for key, _ in photos]
    cls = np.stack([cls for _, cls in features])
    np.testing.assert_allclose(cls, expected, rtol=1e-2, atol=1e-2)
    print(f"{len(features)} photos, cls {cls.shape}")


if __name__ == "__main__":
    main(*sys.argv[1:])

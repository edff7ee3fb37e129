"""Features of whole data sets in files, written by `dinov3-client extract` and read by `FeatureDataset`.

    sources.py      lists the images: their order and ids
    images.py       the images themselves, and where each is
    lists.py        reads lists of images
    tars.py         lists the images of tar files
    remote.py       reads files at URLs
    left_out.py     counts what is not extracted
    reading.py      reads their bytes ahead, in threads
    rows.py         turns features into named arrays, one set per image
    shards.py       writes shards and npz files
    parquet.py      Parquet files, with pyarrow
    partial.py      keeps the rows of the unfinished shard
    manifest.py     records what is done, so that a killed extraction can resume
    extraction.py   runs an extraction
    stored.py       reads rows back
    merging.py      merges the shards of several machines
    dataset.py      FeatureDataset

File formats, and their state after a crash: docs/bulk.md.
"""

from dinov3_client.bulk.dataset import FeatureDataset
from dinov3_client.bulk.errors import ExtractionError

__all__ = ["ExtractionError", "FeatureDataset"]

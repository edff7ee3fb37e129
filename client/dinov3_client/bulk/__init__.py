"""Features of whole data sets in files: what `dinov3-client extract` writes and `FeatureDataset` reads.

    sources.py      which images, in which order, under which ids
    reading.py      their bytes, read ahead by a few threads
    rows.py         answers as named arrays, one set an image
    shards.py       rows in safetensors shards or npz files
    manifest.py     what is done: the manifest, and where an extraction that was killed goes on
    extraction.py   all of it: images in, shards and manifest out
    dataset.py      FeatureDataset

The files' formats, and what a crash leaves of them: docs/bulk.md.
"""

from dinov3_client.bulk.dataset import FeatureDataset
from dinov3_client.bulk.errors import ExtractionError

__all__ = ["ExtractionError", "FeatureDataset"]

"""What the examples read: photos, and shards of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import skimage
from PIL import Image

PHOTOS = 24
"""Their patches in one answer have more than 4 MB, gRPC's own limit."""
SHARDS = 2


def write_photos(folder: Path) -> list[Path]:
    """Write PHOTOS different JPEG files of several shapes, parts of scikit-image's photos; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data = Path(skimage.__file__).parent / "data"
    sources = [Image.open(data / name).convert("RGB") for name in ("astronaut.png", "chelsea.png", "coffee.png")]
    paths = []
    for number in range(PHOTOS):
        photo = sources[number % len(sources)]
        left, top = 11 * number % (photo.width - 200), 7 * number % (photo.height - 200)
        path = folder / f"photo-{number:03}.jpg"
        photo.crop((left, top, left + 200, top + 150 + 2 * number)).save(path, quality=90)
        paths.append(path)
    return paths


def write_shards(photos: list[Path], folder: Path) -> str:
    """Write the photos as SHARDS webdataset shards; return their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"photos-{shard:06}.tar", "w") as tar:
            for photo in photos[shard::SHARDS]:
                content = photo.read_bytes()
                member = tarfile.TarInfo(photo.name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(folder / f"photos-{{000000..{SHARDS - 1:06}}}.tar")

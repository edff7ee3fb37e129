"""The endings of the names of images and tar shards."""

from __future__ import annotations

import os

EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "gif", "avif", "heic", "heif")
"""Extensions of images in folders and tar shards."""

TAR = ".tar"
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

_ENDINGS = tuple(f".{extension}" for extension in EXTENSIONS)


def is_image(name: str) -> bool:
    """Return whether a name ends as that of an image."""
    return name.lower().endswith(_ENDINGS)


def is_tar(name: str) -> bool:
    """Return whether a name ends as that of an uncompressed tar shard."""
    return name.lower().endswith(TAR)


def without_ending(name: str) -> str:
    """Return a name without the ending of an image; other endings stay."""
    return os.path.splitext(name)[0] if is_image(name) else name  # noqa: PTH122

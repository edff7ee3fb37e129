"""Use weights that other programs have fetched into the user's Hugging Face cache (HF_HUB_CACHE, HF_HOME).

Files are hard-linked into our cache folder, or copied to another disk: the folder stays complete by itself, so it can
be copied to another machine, and nothing is written into the user's cache.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from dinov3_server.provision.download import Expected, download
from dinov3_server.provision.hub_api import Repository
from dinov3_server.provision.manifest import sha256_of

log = logging.getLogger(__name__)

_SHA256 = re.compile("[0-9a-f]{64}")


def locate(repository: Repository, name: str) -> Path | None:
    """Return the path of a cached file, .../snapshots/COMMIT/NAME. Opens no connection."""
    from huggingface_hub import constants, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(
            repository.name, name, cache_dir=constants.HF_HUB_CACHE, revision=repository.revision
        )
    except (OSError, ValueError):  # a folder that cannot be read, or a name that the library refuses
        return None
    return Path(found) if isinstance(found, str) else None


def expected(cached: Path) -> Expected:
    """Return the sha256 that the hub gave for a cached file: the cache names the blobs of large files by it."""
    blob = cached.resolve().name
    return Expected(sha256=blob if _SHA256.fullmatch(blob) else None)


def take(
    repository: Repository, target: Path, expected: Expected, on_progress: Callable[[str], None] | None
) -> str | None:
    """Link or copy the file called `target.name` from the cache to `target`, and return its sha256.

    Returns None if the cache lacks it, or (with a warning) has it damaged: the library itself checks sizes only.
    """
    cached = locate(repository, target.name)
    if cached is None:
        return None
    blob = cached.resolve()
    sha256 = sha256_of(blob, on_progress)
    if expected.sha256 not in (None, sha256):
        log.warning("%s is not used: it has the sha256 %s and should have %s", cached, sha256, expected.sha256)
        return None
    try:
        target.hardlink_to(blob)
    except OSError:  # another disk, or another user's file
        return download(blob.as_uri(), target, Expected(sha256=sha256), on_progress=on_progress)
    log.info("%s is linked from the Hugging Face cache, %s", target, cached)
    return sha256

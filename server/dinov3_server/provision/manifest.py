"""Check weights files against manifests: `FILE.manifest.json` has a file's source, size and sha256.

A file with the size and modification time of its manifest counts as unchanged and is not read. Any other is hashed:
then its manifest is renewed, or the file is refused. No weights file is changed or deleted here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from dinov3_server.errors import CheckpointError, StorageError
from dinov3_server.provision.progress import Progress
from dinov3_server.storage import storage_errors, write_atomic

log = logging.getLogger(__name__)

HashSource = Literal["registry", "hub", "nothing"]

SUFFIX = ".manifest.json"
_CHUNK = 2**22


@dataclass(frozen=True)
class Manifest:
    """The JSON object in a manifest file."""

    source: str  # a URL without its query, hf://OWNER/REPO@COMMIT, or "put there by hand"
    size: int  # bytes
    sha256: str  # 64 hex digits
    time: str  # of writing: RFC 3339, UTC
    mtime_ns: int  # the file's modification time, nanoseconds since 1970
    checked_against: HashSource  # where the expected sha256 came from


@dataclass(frozen=True)
class ExpectedHash:
    """The prefixes that a file's sha256 may begin with (none: not known), and where they come from."""

    source: str = "put there by hand"  # of the file, for its first manifest
    hash_source: HashSource = "nothing"
    prefixes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckOptions:
    """How files are checked.

    `full` hashes unchanged files too; error messages name `fetch_command`; `on_progress` gets a short text at times.
    """

    fetch_command: str
    full: bool = False
    on_progress: Callable[[str], None] | None = None


def read(file: Path) -> Manifest | None:
    """Return the manifest of `file`; None if there is none or, with a warning, if it cannot be read."""
    path = _beside(file)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s cannot be read (%s); the file is hashed instead", path, error.strerror)
        return None
    try:
        return _parse(json.loads(data))
    except (ValueError, RecursionError):
        log.warning("%s is not a manifest; the file is hashed instead", path)
        return None


def write(file: Path, source: str, sha256: str, hash_source: HashSource) -> None:
    """Write the manifest of `file` as it is now. Raises StorageError."""
    with storage_errors(file):
        status = file.stat()
    _write(file, Manifest(source, status.st_size, sha256, _now(), status.st_mtime_ns, hash_source))


def check(file: Path, expected: ExpectedHash, options: CheckOptions) -> Manifest:
    """Check that `file`, which exists, is what `expected` and its manifest say; return its manifest.

    `expected` outweighs the manifest. A missing or outdated manifest is written; failing to is only a warning, so that
    read-only disks work. Raises CheckpointError for a file that is not as expected, and StorageError for one that
    cannot be read.
    """
    known = read(file)
    with storage_errors(file):
        status = file.stat()
    unchanged = known is not None and (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns)
    as_expected = known is not None and (not expected.prefixes or known.sha256.startswith(expected.prefixes))
    if known and unchanged and as_expected and not options.full:
        return known
    if known and known.size != status.st_size and not expected.prefixes:
        raise CheckpointError(
            f"{file} has {status.st_size:,} bytes, and its manifest of {known.time} says {known.size:,}. "
            f"{_what_to_do(file, options)}"
        )
    found = sha256_of(file, options.on_progress)
    if expected.prefixes:
        if not found.startswith(expected.prefixes):
            said = " or ".join(expected.prefixes)
            raise CheckpointError(
                f"{file} has {status.st_size:,} bytes with the sha256 {found}, and the {expected.hash_source} says "
                f"that it begins with {said}. {_what_to_do(file, options)}"
            )
    elif known and known.sha256 != found:
        raise CheckpointError(
            f"{file} has the sha256 {found}, and its manifest of {known.time} says {known.sha256}. "
            f"{_what_to_do(file, options)}"
        )
    if known and unchanged and known.sha256 == found:
        return known
    source = known.source if known else expected.source
    hash_source = expected.hash_source if expected.prefixes or known is None else known.checked_against
    renewed = Manifest(source, status.st_size, found, _now(), status.st_mtime_ns, hash_source)
    try:
        _write(file, renewed)
    except StorageError as error:
        log.warning("the manifest cannot be written, so %s is hashed at every start: %s", file.name, error)
    return renewed


def sha256_of(file: Path, on_progress: Callable[[str], None] | None = None) -> str:
    """Return the sha256 of `file`, 64 hex digits. Logs and reports progress."""
    digest, done = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_CHUNK))
    with (
        storage_errors(file),
        file.open("rb", buffering=0) as stream,
        Progress(file.name, on_progress, time.monotonic) as progress,
    ):
        size = file.stat().st_size
        progress.start(0, size, "checking")
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            progress.at(done, size)
    return digest.hexdigest()


def _what_to_do(file: Path, options: CheckOptions) -> str:
    quoted = shlex.quote(str(file))
    return (
        "It is damaged, or another file of that name; it is neither used nor changed. Move it away "
        f"(`mv {quoted} {quoted}.bad`) and fetch it again: `{options.fetch_command}`"
    )


def _beside(file: Path) -> Path:
    return file.with_name(file.name + SUFFIX)


def _write(file: Path, manifest: Manifest) -> None:
    write_atomic(_beside(file), json.dumps(asdict(manifest), indent=2).encode() + b"\n")


def _parse(value: object) -> Manifest:
    """Parse what `_write` writes. Raises ValueError for anything else."""
    types = {field.name: int if field.type == "int" else str for field in fields(Manifest)}
    if not isinstance(value, dict) or {name: type(each) for name, each in value.items()} != types:
        raise ValueError
    manifest = Manifest(**value)
    if manifest.checked_against not in get_args(HashSource) or len(manifest.sha256) != 64:
        raise ValueError
    return manifest


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

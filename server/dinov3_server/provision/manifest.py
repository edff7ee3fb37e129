"""What is known of a weights file, kept beside it in `FILE.manifest.json`: where it came from, its size and sha256.

A file whose size and modification time are those of its manifest is taken to be unchanged and is not read. Any other is
hashed, and either its manifest is renewed or it is refused. No file is ever changed or deleted here.
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
from dinov3_server.storage import storage_errors, write_whole

log = logging.getLogger(__name__)

Authority = Literal["registry", "hub", "nothing"]

SUFFIX = ".manifest.json"
_CHUNK = 2**22


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest file: a JSON object with these keys."""

    source: str  # a URL without its query, hf://OWNER/REPO@COMMIT, or "put there by hand"
    size: int  # bytes
    sha256: str  # 64 hex digits
    time: str  # when this was written: RFC 3339, UTC
    mtime_ns: int  # the file's modification time, nanoseconds since 1970
    checked_against: Authority  # who else knew the sha256


@dataclass(frozen=True)
class Promise:
    """What somebody else says of a file: the digits that its sha256 may begin with (none where nobody knows them)."""

    source: str = "put there by hand"
    authority: Authority = "nothing"
    digits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Care:
    """How files are checked at this start.

    `full` hashes each, changed or not; `report` is told of long work; `again` is the command that fetches anew.
    """

    again: str
    full: bool = False
    report: Callable[[str], None] | None = None


def read(file: Path) -> Manifest | None:
    """The manifest of `file`; None where there is none, or (with a warning) none that can be read."""
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
        log.warning("%s is no manifest; the file is hashed instead", path)
        return None


def write(file: Path, source: str, sha256: str, authority: Authority) -> None:
    """Write the manifest of `file` as it lies there now. Raises StorageError."""
    with storage_errors(file):
        status = file.stat()
    _write(file, Manifest(source, status.st_size, sha256, _now(), status.st_mtime_ns, authority))


def check(file: Path, promise: Promise, care: Care) -> Manifest:
    """That `file`, which exists, is what `promise` and its manifest say; what is known of it now.

    Where both say something, `promise` is believed. A manifest that is missing or no longer right is written anew; one
    that cannot be written is only a warning, so a read-only disk serves. Raises CheckpointError for a file that is not
    what it should be, and StorageError for one that cannot be read.
    """
    known = read(file)
    with storage_errors(file):
        status = file.stat()
    unchanged = known is not None and (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns)
    if known and unchanged and not care.full and (not promise.digits or known.sha256.startswith(promise.digits)):
        return known
    if known and known.size != status.st_size and not promise.digits:
        raise CheckpointError(
            f"{file} has {status.st_size:,} bytes, and its manifest of {known.time} says {known.size:,}. "
            f"{_what_to_do(file, care)}"
        )
    found = sha256_of(file, care.report)
    if promise.digits:
        if not found.startswith(promise.digits):
            said = " or ".join(promise.digits)
            raise CheckpointError(
                f"{file} has {status.st_size:,} bytes with the sha256 {found}, and the {promise.authority} says that "
                f"it begins with {said}. {_what_to_do(file, care)}"
            )
    elif known and known.sha256 != found:
        raise CheckpointError(
            f"{file} has the sha256 {found}, and its manifest of {known.time} says {known.sha256}. "
            f"{_what_to_do(file, care)}"
        )
    if known and unchanged and known.sha256 == found:
        return known
    source = known.source if known else promise.source
    authority = promise.authority if promise.digits or known is None else known.checked_against
    renewed = Manifest(source, status.st_size, found, _now(), status.st_mtime_ns, authority)
    try:
        _write(file, renewed)
    except StorageError as error:
        log.warning("the manifest cannot be written, so %s is hashed at every start: %s", file.name, error)
    return renewed


def sha256_of(file: Path, report: Callable[[str], None] | None = None) -> str:
    """The sha256 of `file`, 64 hex digits. For large files, log and `report` hear how far it is."""
    digest, done = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_CHUNK))
    with (
        storage_errors(file),
        file.open("rb", buffering=0) as stream,
        Progress(file.name, report, time.monotonic) as progress,
    ):
        size = file.stat().st_size
        progress.start(0, size, "checking")
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            progress.at(done, size)
    return digest.hexdigest()


def _what_to_do(file: Path, care: Care) -> str:
    quoted = shlex.quote(str(file))
    return (
        "It is damaged, or another file of that name; it is not used, and it is left as it is. Move it away "
        f"(`mv {quoted} {quoted}.bad`) and fetch it anew: `{care.again}`"
    )


def _beside(file: Path) -> Path:
    return file.with_name(file.name + SUFFIX)


def _write(file: Path, manifest: Manifest) -> None:
    write_whole(_beside(file), json.dumps(asdict(manifest), indent=2).encode() + b"\n")


def _parse(value: object) -> Manifest:
    """Raises ValueError for anything but what `_write` writes."""
    if not isinstance(value, dict) or set(value) != {field.name for field in fields(Manifest)}:
        raise ValueError
    manifest = Manifest(**value)
    texts = (manifest.source, manifest.sha256, manifest.time)
    numbers = (manifest.size, manifest.mtime_ns)
    if not all(type(text) is str for text in texts) or not all(type(number) is int for number in numbers):
        raise ValueError
    if manifest.checked_against not in get_args(Authority) or len(manifest.sha256) != 64:
        raise ValueError
    return manifest


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

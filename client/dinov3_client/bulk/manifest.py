"""What is done of an extraction: `manifest.jsonl` and `failed.jsonl` of its folder.

The manifest is lines of JSON. The first is the header, {"manifest": 1, ...}: what determines ids, rows and values. Then
come the rows, {"id", "index", "shard", "row", "sha256"}, with a *commit* after those of each shard, {"committed": ...};
when all images are done it is {"complete": ...}. What stands after the last commit does not count.

The order of a commit: the shard's file is on the disk under its name, then the failures since the last commit, then its
rows and the commit itself. So whatever a crash leaves behind the last commit, the next run cuts off and does again. It
does the same again, because rows are numbered in the order of the images and nothing else decides where shards end. No
line has a time in it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov3_client.bulk import durable
from dinov3_client.bulk.errors import ExtractionError

MANIFEST, FAILED, LOCK = "manifest.jsonl", "failed.jsonl", ".lock"
SCHEMA = 1

_HEADER, _COMMITTED, _COMPLETE = "manifest", "committed", "complete"

Line = dict[str, Any]


@dataclass(frozen=True)
class Totals:
    """What is committed."""

    images: int = 0
    """Of the source, from its beginning: with features or failed."""
    rows: int = 0
    failed: int = 0
    shards: int = 0


@dataclass(frozen=True)
class _Found:
    """A manifest as a run finds it."""

    header: Line | None
    totals: Totals
    complete: bool
    length: int
    """Bytes up to the end of the last commit, or of the header."""
    witnesses: tuple[Line, ...]
    """The first and the last row."""


class Journal:
    """A folder's manifest, to add to. Made by `opened`."""

    def __init__(self, folder: Path, totals: Totals, complete: bool, witnesses: Sequence[Line]) -> None:
        self.folder = folder
        self.totals = totals
        self.complete = complete
        self.witnesses = tuple(witnesses)
        """Rows that a run before this one committed, the first and the last."""

    def commit(
        self, images: int, rows: Sequence[Line], failures: Sequence[Line], shard: Line | None, *, complete: bool = False
    ) -> None:
        """Make durable what came of the images up to (not with) `images`. The shard's file must be it already.

        `shard` is what the commit says of it; None where no row came.
        """
        if failures:
            durable.append(self.folder / FAILED, _lines(failures))
        before = self.totals
        self.totals = Totals(
            images, before.rows + len(rows), before.failed + len(failures), before.shards + (shard is not None)
        )
        self.complete = complete
        commit = {_COMPLETE if complete else _COMMITTED: vars(self.totals), **(shard or {})}
        durable.append(self.folder / MANIFEST, _lines([*rows, commit]))


@contextmanager
def opened(folder: Path, header: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of the extraction that `header` describes, begun or gone on with, for this process alone.

    Raises ExtractionError where the folder holds another extraction or is in use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        wanted: Line = {_HEADER: SCHEMA, **json.loads(json.dumps(header))}
        found = _read(folder / MANIFEST)
        if found.totals.images:
            assert found.header is not None, "commits follow a header"
            _check_same(folder, found, wanted)
            durable.truncate(folder / MANIFEST, found.length)
            _cut_failures(folder / FAILED, found.totals.failed)
        else:  # nothing that would be lost: other options are welcome
            _begin(folder, wanted, found)
        yield Journal(folder, found.totals, found.complete, found.witnesses)


def read(folder: Path) -> tuple[Line, Iterator[Line], bool]:
    """The header, all committed rows and commits in their order, and whether all images are done.

    Raises ExtractionError where there is no manifest or a damaged one.
    """
    path = folder / MANIFEST
    found = _read(path)
    if found.header is None:
        raise ExtractionError(f"{folder} holds no features of `dinov3-client extract`: there is no {MANIFEST}")
    return found.header, _rows(path, found.length), found.complete


def is_row(line: Line) -> bool:
    return "id" in line


def _rows(path: Path, length: int) -> Iterator[Line]:
    with path.open("rb") as file:
        end = len(file.readline())
        for text in file:
            end += len(text)
            if end > length:
                return
            try:
                yield json.loads(text)
            except ValueError:
                raise _damaged(path) from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = durable.open_file(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExtractionError(
                f"{folder} is in use: another process is extracting into it; wait for it, or give another --out"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _begin(folder: Path, header: Line, found: _Found) -> None:
    if found.header is None and any(folder.glob("features-*.safetensors")):
        raise ExtractionError(
            f"{folder} holds features but no {MANIFEST}, without which nobody knows of what; give another --out, or "
            "remove them"
        )
    _cut_failures(folder / FAILED, 0)
    durable.create(folder / MANIFEST, [_lines([header])])
    durable.sync_folder(folder)


def _read(path: Path) -> _Found:
    """Reads commits as JSON, and rows not at all: there may be many millions."""
    header, last, length, end = None, None, 0, 0
    first_row, row, committed_row = b"", b"", b""
    starts = tuple(f'{{"{name}":'.encode() for name in (_COMMITTED, _COMPLETE))
    if path.exists():
        with path.open("rb") as file:
            for number, text in enumerate(file):
                end += len(text)
                if number == 0:
                    header, length = _header(path, text), end
                elif not text.endswith(b"\n"):
                    break
                elif text.startswith(starts):
                    last, length, committed_row = text, end, row
                else:
                    first_row, row = first_row or text, text
    if last is None:
        return _Found(header, Totals(), False, length, ())
    try:
        commit = json.loads(last)
        totals = Totals(**(commit.get(_COMMITTED) or commit[_COMPLETE]))
        witnesses = tuple(json.loads(each) for each in (first_row, committed_row) if totals.rows)
    except (ValueError, TypeError, KeyError):
        raise _damaged(path) from None
    return _Found(header, totals, _COMPLETE in commit, length, witnesses)


def _header(path: Path, text: bytes) -> Line:
    try:
        header: Line = json.loads(text)
        schema = header[_HEADER]
    except (ValueError, TypeError, KeyError):
        raise ExtractionError(f"{path} is no manifest of `dinov3-client extract`; give another --out") from None
    if schema != SCHEMA:
        raise ExtractionError(
            f"{path} is of schema {schema}, and this dinov3-client knows {SCHEMA}: use the one that began it"
        )
    return header


def _check_same(folder: Path, found: _Found, wanted: Line) -> None:
    assert found.header is not None
    there, now = _flat(found.header), _flat(wanted)
    differences = [
        f"{name} is {json.dumps(there.get(name))} there and {json.dumps(now.get(name))} now"
        for name in dict.fromkeys((*now, *there))
        if there.get(name) != now.get(name) and name not in ("model", "weights")  # names; the fingerprint decides
    ]
    if not differences:
        return
    if any(name.startswith("source.") for name in differences):
        differences.append("(source: the number of images and a hash of their ids)")
    models = [f"{header['model']} ({header['weights']})" for header in (found.header, wanted)]
    if models[0] != models[1]:
        differences.append(f"the model was {models[0]} and is {models[1]}")
    raise ExtractionError(
        f"{folder} holds another extraction ({found.totals.images:,} images done): {'; '.join(differences)}. "
        "To go on with it, give the same images and options and a server with the same model; for these, another --out"
    )


def _flat(header: Line) -> Line:
    flat: Line = {}
    for name, value in header.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            flat[name] = value
    return {name.removeprefix("options."): value for name, value in flat.items()}


def _cut_failures(path: Path, count: int) -> None:
    """Leave the committed ones."""
    length = lines = 0
    if path.exists():
        with path.open("rb") as file:
            for text in file:
                if lines == count or not text.endswith(b"\n"):
                    break
                lines, length = lines + 1, length + len(text)
    if lines < count:
        raise ExtractionError(
            f"{path} has lost lines: the manifest tells of {count} failed images, and it names {lines}"
        )
    if os.path.lexists(path):
        durable.truncate(path, length)


def _lines(lines: Sequence[Line]) -> bytes:
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()


def _damaged(path: Path) -> ExtractionError:
    return ExtractionError(f"{path} is damaged; restore it, or extract into another folder")

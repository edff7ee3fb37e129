"""Records the progress of an extraction in `manifest.jsonl`, `failed.jsonl` and `partial.bin` of its folder.

The manifest is lines of JSON. The first is the header, {"manifest": 1, ...}: all that determines ids, rows and values.
Then come rows, {"id", "index", "shard", "row", "sha256"}, and after those of each shard a *commit*, {"committed": ...},
or {"complete": ...} when all images are done. Lines after the last commit do not count.

A commit is written in this order: the shard's file under its name, the failures since the last commit, the rows, the
commit itself. Results between two commits are kept in `partial.bin` (see partial.py), which is gone at the end. After a
crash the next run truncates the files to the last commit, takes what `partial.bin` holds, and repeats the rest. The
result is the same, because rows are numbered in the order of the images and nothing else decides where shards end. No
line contains a time.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dinov3_client.bulk import durable
from dinov3_client.bulk.errors import ExtractionError, FolderInUse
from dinov3_client.bulk.partial import Partial, Result
from dinov3_client.bulk.rows import Failure

MANIFEST, FAILED, LOCK = "manifest.jsonl", "failed.jsonl", ".lock"
SCHEMA = 1

_HEADER, _COMMITTED, _COMPLETE = "manifest", "committed", "complete"

Line = dict[str, Any]


@dataclass(frozen=True)
class Totals:
    """What was committed."""

    images: int = 0
    """Images from the beginning of the source, or of this shard of it: with features or failed."""
    rows: int = 0
    failed: int = 0
    shards: int = 0


@dataclass(frozen=True)
class _ManifestState:
    """The state of a manifest at the start of a run."""

    header: Line | None
    totals: Totals
    complete: bool
    length: int
    """Bytes up to the end of the last commit or, without one, of the header."""
    sample_rows: tuple[Line, ...]
    """The first and the last committed row."""


class Journal:
    """The manifest of a folder, open for appending. Made by `open_journal`."""

    def __init__(self, folder: Path, found: _ManifestState, partial: Partial, kept: Sequence[Result]) -> None:
        self.folder = folder
        self.totals = found.totals
        self.complete = found.complete
        self.sample_rows = found.sample_rows
        """The first and the last row that earlier runs committed."""
        self.kept = tuple(kept)
        """What earlier runs received after their last commit."""
        self._partial = partial

    def keep(self, results: Sequence[Result]) -> None:
        """Keep the results that follow those kept or committed so far, until the next commit."""
        if results:
            self._partial.append(results)

    def commit(
        self,
        images: int,
        rows: Sequence[Line],
        failures: Sequence[Failure],
        shard: Line | None,
        *,
        complete: bool = False,
    ) -> None:
        """Record the results of the images before index `images`, durably. The shard's file must be durable already.

        `shard` is the entry of the shard in the commit; None if there are no rows.
        """
        if failures:
            durable.append(self.folder / FAILED, _lines([asdict(failure) for failure in failures]))
        before = self.totals
        self.totals = Totals(
            images, before.rows + len(rows), before.failed + len(failures), before.shards + (shard is not None)
        )
        self.complete = complete
        commit = {_COMPLETE if complete else _COMMITTED: vars(self.totals), **(shard or {})}
        durable.append(self.folder / MANIFEST, _lines([*rows, commit]))
        if complete:
            self._partial.remove()
        else:
            self._partial.clear()


@contextmanager
def open_journal(folder: Path, header: Mapping[str, Any]) -> Iterator[Journal]:
    """Lock a folder and open the journal of the extraction that `header` describes, new or resumed.

    Raises ExtractionError if the folder holds another extraction or is in use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        wanted: Line = {_HEADER: SCHEMA, **json.loads(json.dumps(header))}
        found = _read(folder / MANIFEST)
        partial = Partial(folder)
        kept = []
        if found.header is not None and not found.complete:
            kept = partial.read(span(found.header).start + found.totals.images)
        done = found.totals.images + len(kept)
        if done or found.complete:
            assert found.header is not None, "commits follow a header"
            _check_same(folder, found.header, wanted, done)
            durable.truncate(folder / MANIFEST, found.length)
            _cut_failures(folder / FAILED, found.totals.failed)
            partial.cut()
        else:  # nothing to lose: begin anew, with whatever options
            partial.remove()
            _begin(folder, wanted, found)
        if found.complete:
            partial.remove()
        yield Journal(folder, found, partial, kept)


def read(folder: Path) -> tuple[Line, Iterator[Line], bool]:
    """Return the header, all committed rows and commits in order, and whether all images are done.

    Raises ExtractionError if the manifest is missing or damaged.
    """
    path = folder / MANIFEST
    found = _read(path)
    if found.header is None:
        raise ExtractionError(f"{folder} holds no features of `dinov3-client extract`: there is no {MANIFEST}")
    return found.header, _rows(path, found.length), found.complete


def span(header: Line) -> range:
    """Return the indices of the images of an extraction: all of the source, or those of its shard "I/N"."""
    images = header["source"]["images"]
    number, count = map(int, header["source"].get("shard", "1/1").split("/"))
    return range((number - 1) * images // count, number * images // count)


def is_row(line: Line) -> bool:
    """Return whether a line is a row, not a commit."""
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
            raise FolderInUse(
                f"{folder} is in use: another process is extracting into it; wait for it, or give another --out"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _begin(folder: Path, header: Line, found: _ManifestState) -> None:
    if found.header is None and any(folder.glob("features-*.*")):
        raise ExtractionError(
            f"{folder} holds features but no {MANIFEST} to say of what; give another --out, or remove them"
        )
    _cut_failures(folder / FAILED, 0)
    durable.create(folder / MANIFEST, [_lines([header])])
    durable.sync_folder(folder)


def _read(path: Path) -> _ManifestState:
    """Read the state of a manifest. Rows are not parsed: there may be many millions."""
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
        return _ManifestState(header, Totals(), False, length, ())
    try:
        commit = json.loads(last)
        totals = Totals(**(commit.get(_COMMITTED) or commit[_COMPLETE]))
        sample_rows = tuple(json.loads(each) for each in (first_row, committed_row) if totals.rows)
    except (ValueError, TypeError, KeyError):
        raise _damaged(path) from None
    return _ManifestState(header, totals, _COMPLETE in commit, length, sample_rows)


def _header(path: Path, text: bytes) -> Line:
    try:
        header: Line = json.loads(text)
        schema = header[_HEADER]
        if schema == SCHEMA:
            span(header)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
        raise ExtractionError(f"{path} is no manifest of `dinov3-client extract`; give another --out") from None
    if schema != SCHEMA:
        raise ExtractionError(
            f"{path} has schema {schema}, but this dinov3-client knows {SCHEMA}: use the version that began it"
        )
    return header


def differences(there: Line, now: Line) -> dict[str, tuple[str, str]]:
    """Return by name what differs between two headers, except labels, as JSON."""
    one, other = _flat(there), _flat(now)
    return {
        name: (json.dumps(one.get(name)), json.dumps(other.get(name)))
        for name in dict.fromkeys((*other, *one))
        if one.get(name) != other.get(name) and name not in ("model", "weights")  # labels: the fingerprint decides
    }


def _check_same(folder: Path, header: Line, wanted: Line, done: int) -> None:
    different = [f"{name} is {one} there and {other} now" for name, (one, other) in differences(header, wanted).items()]
    if not different:
        return
    if any(name.startswith(("source.images", "source.sha256")) for name in different):
        different.append("(source: the number of images and a hash of their ids)")
    models = [f"{header['model']} ({header['weights']})" for header in (header, wanted)]
    if models[0] != models[1]:
        different.append(f"the model was {models[0]} and is {models[1]}")
    raise ExtractionError(
        f"{folder} holds another extraction ({done:,} images done): {'; '.join(different)}. "
        "To resume it, give the same images and options and a server with the same model; for these, give another --out"
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
    """Truncate the failures to the `count` committed ones."""
    length = lines = 0
    if path.exists():
        with path.open("rb") as file:
            for text in file:
                if lines == count or not text.endswith(b"\n"):
                    break
                lines, length = lines + 1, length + len(text)
    if lines < count:
        raise ExtractionError(f"{path} has lost lines: the manifest counts {count} failed images, and it names {lines}")
    if os.path.lexists(path):
        durable.truncate(path, length)


def _lines(lines: Sequence[Line]) -> bytes:
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()


def _damaged(path: Path) -> ExtractionError:
    return ExtractionError(f"{path} is damaged; restore it, or extract into another folder")

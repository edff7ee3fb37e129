"""Runs an extraction: images to shards and a manifest."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from dinov3_client._client import Client
from dinov3_client._errors import ModelMismatch
from dinov3_client._features import Features
from dinov3_client._model import Model
from dinov3_client._request import Priority
from dinov3_client.bulk import manifest
from dinov3_client.bulk.errors import ExtractionError
from dinov3_client.bulk.manifest import Journal, Line, Totals
from dinov3_client.bulk.reading import ImageEntry, ImageReader
from dinov3_client.bulk.rows import ExtractionOptions, Row, rows
from dinov3_client.bulk.shards import SHARD_BYTES, Shards, check_npz_names
from dinov3_client.bulk.sources import Images

# Left free in a request for all but the image.
SLACK_BYTES = 64 << 10


class ProgressListener(Protocol):
    """Receives the progress of an extraction."""

    def begin(self, done: int, total: int) -> None:
        """Start at `done` of `total` images, which earlier runs finished."""

    def advance(self, images: int) -> None:
        """Count `images` more as finished, failed ones included."""

    def failed(self, image: str, reason: str) -> None:
        """Report that the image of this id has no features."""


def extract(
    client: Client,
    model: Model,
    images: Images,
    folder: Path,
    options: ExtractionOptions,
    *,
    in_flight: int,
    batch_images: int,
    priority: Priority,
    progress: ProgressListener,
) -> Totals:
    """Write the features of all images to `folder`, resuming where the last run with these arguments stopped.

    `model` is the client's; a response of another model ends the run. At most `in_flight` batches of at most
    `batch_images` are sent or waiting to be written. However a run ends, the next one resumes at the last commit.

    Raises Dinov3Error (ExtractionError if the folder holds another extraction), SourceError and OSError.
    """
    if options.format == "npz":
        check_npz_names(images, folder)
    fingerprint = _fingerprint(model, options.projection)
    header: Line = {
        "model": model.name,
        "weights": model.weights,
        "fingerprint": fingerprint,
        "options": asdict(options),
        "source": {"images": len(images), "sha256": images.digest()},
    }
    labels = {"model": model.name, "weights": model.weights, "fingerprint": fingerprint}
    most_bytes = model.limits.max_message_bytes - SLACK_BYTES
    with manifest.open_journal(folder, header) as journal:
        if not journal.complete:
            _check_unchanged(journal, images)
        progress.begin(journal.totals.images, len(images))
        if journal.complete:
            return journal.totals
        writer = _Writer(journal, Shards(folder, options, labels), options, progress)
        with ImageReader(images, journal.totals.images, most_bytes=most_bytes, batch_images=batch_images) as reader:
            answers = client.extract_many(
                reader.batches(),
                in_flight=in_flight,
                priority=priority,
                on_error="return",
                **options.extract_arguments(),
            )
            with closing(answers):
                for features in answers:
                    if features.fingerprint != fingerprint:
                        raise ModelMismatch(
                            f"the server now serves another model: its fingerprint is {features.fingerprint}, and "
                            f"the extraction began with {fingerprint}"
                        )
                    reader.fit(writer.take(reader.sent.popleft(), features))
            writer.finish(reader.rest)
        return journal.totals


class _Writer:
    """Collects rows and commits them shard by shard. Its decisions depend on the sequence of rows alone."""

    def __init__(
        self, journal: Journal, shards: Shards, options: ExtractionOptions, progress: ProgressListener
    ) -> None:
        self._journal = journal
        self._shards = shards
        self._options = options
        self._watch = progress
        self._images = journal.totals.images
        self._rows: list[Row] = []
        self._nbytes = 0
        self._failures: list[Line] = []
        shards.discard(journal.totals.shards)

    def take(self, entries: list[ImageEntry], features: Features) -> int:
        """Add the features of a batch, and return the bytes of its largest row."""
        sent = [entry for entry in entries if not entry.reason]
        found = {row.entry.index: row for row in rows(sent, features, self._options)}
        reasons = {sent[image].index: error.message for image, error in features.errors.items()}
        for entry in entries:
            row = found.get(entry.index)
            if row is None:
                self._fail(entry, entry.reason or reasons[entry.index])
            else:
                self._add(row)
        self._watch.advance(len(entries))
        return max((row.nbytes for row in found.values()), default=0)

    def finish(self, rest: list[ImageEntry]) -> None:
        for entry in rest:
            self._fail(entry, entry.reason)
        self._watch.advance(len(rest))
        self._commit(complete=True)

    def _add(self, row: Row) -> None:
        nbytes = row.nbytes
        if self._rows and self._nbytes + nbytes > SHARD_BYTES:
            self._commit()
        self._rows.append(row)
        self._nbytes += nbytes
        self._images += 1
        if len(self._rows) == self._shards.most_rows:
            self._commit()

    def _fail(self, entry: ImageEntry, reason: str) -> None:
        self._failures.append(
            {"id": entry.item.id, "index": entry.index, "source": entry.item.source, "reason": reason}
        )
        self._images += 1
        self._watch.failed(entry.item.id, reason)

    def _commit(self, *, complete: bool = False) -> None:
        lines: list[Line] = []
        shard: Line | None = None
        if self._rows:
            lines, shard = self._shards.write(self._journal.totals.shards, self._rows)
        self._journal.commit(self._images, lines, self._failures, shard, complete=complete)
        self._rows, self._nbytes, self._failures = [], 0, []


def _fingerprint(model: Model, projection: str | None) -> str:
    """Return the fingerprint that answers must have."""
    if projection is None:
        return model.fingerprint
    known = {each.name: each.fingerprint for each in model.projections}
    if projection not in known:
        raise ExtractionError(
            f"the server has no projection {projection!r}; it has {', '.join(sorted(known)) or 'none at all'}"
        )
    return f"{model.fingerprint}+{known[projection]}"


def _check_unchanged(journal: Journal, images: Images) -> None:
    """Raise ExtractionError unless the first and the last finished image are still the same files.

    Ids alone would not distinguish another data set with the same names.
    """
    for line in journal.sample_rows:
        item = images[line["index"]]
        try:
            same = hashlib.sha256(item.read()).hexdigest() == line["sha256"]
        except OSError as error:
            raise ExtractionError(
                f"{item.source}, whose features are in {journal.folder}, cannot be read any more "
                f"({error.strerror or error}); restore it, or extract into another folder"
            ) from None
        if not same:
            raise ExtractionError(
                f"{item.source} is not the file that it was when its features were extracted into {journal.folder}; "
                "restore it, or extract into another folder"
            )

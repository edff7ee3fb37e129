"""Runs an extraction: images to shards and a manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
from dinov3_client.bulk.images import Images
from dinov3_client.bulk.manifest import Journal, Line, Totals
from dinov3_client.bulk.partial import Result
from dinov3_client.bulk.reading import ImageEntry, ImageReader
from dinov3_client.bulk.rows import ExtractionOptions, Failure, Row, rows
from dinov3_client.bulk.shards import SHARD_BYTES, Shards, check_npz_names

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
    shard: tuple[int, int] | None = None,
) -> Totals:
    """Write the features of all images to `folder`, resuming where the last run with these arguments stopped.

    `model` is the client's; a response of another model ends the run. At most `in_flight` batches of at most
    `batch_images` are sent or waiting to be written. However a run ends, the next one resumes after the last answer.
    `shard` is (I, N): only the I-th of N parts of about equal size, counted from 1.

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
    if shard is not None:
        header["source"]["shard"] = f"{shard[0]}/{shard[1]}"
    span = manifest.span(header)
    labels = {"model": model.name, "weights": model.weights, "fingerprint": fingerprint}
    most_bytes = model.limits.max_message_bytes - SLACK_BYTES
    shards = Shards(folder, options, labels)
    with manifest.open_journal(folder, header) as journal:
        if journal.complete:
            progress.begin(len(span), len(span))
            return journal.totals
        _check_unchanged(journal, images)
        writer = Writer(journal, shards)
        progress.begin(writer.images, len(span))
        with ImageReader(images, span[writer.images :], most_bytes=most_bytes, batch_images=batch_images) as reader:
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
                    results = _results(reader.sent.popleft(), features, options)
                    reader.fit(max((result.nbytes for result in results if isinstance(result, Row)), default=0))
                    writer.take(results)
                    _report(results, progress)
            rest = [_failure(entry, entry.reason) for entry in reader.rest]
            writer.finish(rest)
            _report(rest, progress)
        return journal.totals


def _results(entries: Sequence[ImageEntry], features: Features, options: ExtractionOptions) -> list[Result]:
    """Return the results of a batch, in the order of its entries."""
    sent = [entry for entry in entries if not entry.reason]
    found = {row.index: row for row in rows(sent, features, options)}
    reasons = {sent[image].index: error.message for image, error in features.errors.items()}
    return [found.get(entry.index) or _failure(entry, entry.reason or reasons[entry.index]) for entry in entries]


def _failure(entry: ImageEntry, reason: str) -> Failure:
    return Failure(entry.item.id, entry.index, entry.item.source, reason)


def _report(results: Sequence[Result], progress: ProgressListener) -> None:
    for result in results:
        if isinstance(result, Failure):
            progress.failed(result.id, result.reason)
    progress.advance(len(results))


class Writer:
    """Collects results and commits them shard by shard. Its decisions depend on the sequence of results alone."""

    def __init__(self, journal: Journal, shards: Shards) -> None:
        self._journal = journal
        self._shards = shards
        self._pending: list[Result] = []
        """Results since the last commit."""
        self._kept = 0
        """How many of them the journal keeps."""
        self._rows = self._nbytes = 0
        shards.discard(journal.totals.shards)
        before = journal.totals
        for result in journal.kept:
            self.add(result)
        if journal.totals == before:  # as always, unless the run that kept them ended shards elsewhere
            self._kept = len(self._pending)

    @property
    def images(self) -> int:
        """Images done, of the beginning of the source."""
        return self._journal.totals.images + len(self._pending)

    def take(self, results: Sequence[Result]) -> None:
        """Add the results that follow the last ones, and keep them until they are committed."""
        for result in results:
            self.add(result)
        self._journal.keep(self._pending[self._kept :])
        self._kept = len(self._pending)

    def finish(self, rest: Sequence[Result]) -> None:
        """Add the last results, and complete the extraction."""
        for result in rest:
            self.add(result)
        self._commit(complete=True)

    def add(self, result: Result) -> None:
        """Add a result: it counts once its shard is full."""
        if isinstance(result, Row):
            if self._rows and self._nbytes + result.nbytes > SHARD_BYTES:
                self._commit()
            self._rows += 1
            self._nbytes += result.nbytes
        self._pending.append(result)
        if self._rows == self._shards.most_rows:
            self._commit()

    def _commit(self, *, complete: bool = False) -> None:
        rows = [result for result in self._pending if isinstance(result, Row)]
        failures = [result for result in self._pending if isinstance(result, Failure)]
        lines: list[Line] = []
        shard: Line | None = None
        if rows:
            lines, shard = self._shards.write(self._journal.totals.shards, rows)
        self._journal.commit(self.images, lines, failures, shard, complete=complete)
        self._pending = []
        self._rows = self._nbytes = self._kept = 0


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
    kept = [(row.index, row.sha256) for row in journal.kept if isinstance(row, Row)]
    finished = [(line["index"], line["sha256"]) for line in journal.sample_rows] + kept
    for index, sha256 in dict.fromkeys(finished[:1] + finished[-1:]):
        item = images[index]
        try:
            same = hashlib.sha256(item.read()).hexdigest() == sha256
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

"""Merges the shards of an extraction that several machines wrote (`--shard I/N`) into one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from dinov3_client.bulk import manifest, stored
from dinov3_client.bulk.errors import ExtractionError
from dinov3_client.bulk.extraction import ProgressListener, Writer
from dinov3_client.bulk.manifest import Line, Totals
from dinov3_client.bulk.rows import ExtractionOptions
from dinov3_client.bulk.shards import Shards


def merge(parts: Sequence[Path], folder: Path, progress: ProgressListener) -> Totals:
    """Write the rows and failures of all shards to `folder`, as one run without shards would have written them.

    A merge that was stopped resumes. Raises ExtractionError if `parts` are not all shards of one extraction, or
    `folder` holds another one, and OSError.
    """
    ordered, header = _check(parts)
    options = ExtractionOptions.of_header(header["options"])
    labels = {name: header[name] for name in ("model", "weights", "fingerprint")}
    shards = Shards(folder, options, labels)
    with manifest.open_journal(folder, header) as journal:
        total = len(manifest.span(header))
        progress.begin(journal.totals.images, total)
        if journal.complete:
            return journal.totals
        writer = Writer(journal, shards)
        done = expected = writer.images
        for result in chain.from_iterable(map(stored.results, ordered)):
            if result.index < done:
                continue
            if result.index != expected:
                raise ExtractionError(f"the shards have no result of the image of index {expected}; restore them")
            writer.add(result)
            progress.advance(1)
            expected += 1
        if expected != total:
            raise ExtractionError(f"the shards have results of {expected:,} images of {total:,}; restore them")
        writer.finish([])
        return journal.totals


def _check(parts: Sequence[Path]) -> tuple[list[Path], Line]:
    """Return the folders in the order of their images, and the header of the whole."""
    found: dict[int, Path] = {}
    whole: Line = {}
    for part in parts:
        header, _, complete = manifest.read(part)
        shard = header["source"].pop("shard", None)
        if shard is None:
            raise ExtractionError(f"{part} is no shard: its extraction had no --shard I/N")
        if not complete:
            raise ExtractionError(f"{part}, shard {shard}, is unfinished: run its `dinov3-client extract` again first")
        number, count = map(int, shard.split("/"))
        whole = whole or header | {"count": count}
        different = manifest.differences(whole, header | {"count": count})
        if different:
            listed = "; ".join(f"{name} is {one} and {other}" for name, (one, other) in different.items())
            listed = listed.replace("count is", "N of --shard I/N is")
            raise ExtractionError(f"{parts[0]} and {part} are no shards of one extraction: {listed}")
        if number in found:
            raise ExtractionError(f"{found[number]} and {part} are both shard {shard}: give each once")
        found[number] = part
    count = whole.pop("count")
    if missing := [f"{number}/{count}" for number in range(1, count + 1) if number not in found]:
        raise ExtractionError(
            f"shard{'s' if len(missing) > 1 else ''} {', '.join(missing)} missing: give the folders of all {count}"
        )
    return [found[number] for number in sorted(found)], whole

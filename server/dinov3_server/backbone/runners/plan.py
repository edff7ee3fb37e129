"""How the rows of a batch lie in the arenas: in runs that one copy moves. Imports no torch.

The rows of one request lie side by side, so that most batches are a few runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from dinov3_server.models.interface import Batch, FeatureSpec, ModelInfo, Output, Wanted


@dataclass(slots=True)
class PixelRun:
    """Rows `first` to `first + count` of a batch, one behind the other at byte `offset` of an arena."""

    arena: int
    offset: int
    first: int
    count: int


@dataclass(slots=True)
class FeatureRun:
    """Rows `first` to `first + count` of a batch that want the same, each section's rows one behind the other.

    `offsets` are the first row's, one for each section of `spec`.
    """

    arena: int
    offsets: tuple[int, ...]
    spec: FeatureSpec
    first: int
    count: int


def wanted_outputs(batch: Batch) -> list[Output]:
    """Every output that some row wants, once."""
    return list(dict.fromkeys(output for row in batch.rows for output in row.spec.outputs))


def wanted_features(batch: Batch) -> tuple[Wanted, ...]:
    """Everything that some row wants, once, in an order that does not depend on the rows'."""
    wanted = {spec.wanted(output) for spec in {row.spec for row in batch.rows} for output in spec.outputs}
    return tuple(sorted(wanted, key=repr))


def pixel_runs(batch: Batch) -> list[PixelRun]:
    """All rows, in order."""
    runs: list[PixelRun] = []
    for index, row in enumerate(batch.rows):
        last = runs[-1] if runs else None
        if last and last.arena == row.arena and row.pixels == last.offset + last.count * batch.shape.nbytes:
            last.count += 1
        else:
            runs.append(PixelRun(row.arena, row.pixels, index, 1))
    return runs


def feature_runs(batch: Batch, info: ModelInfo) -> list[FeatureRun]:
    """All rows, in order."""
    runs: list[FeatureRun] = []
    strides: dict[FeatureSpec, tuple[int, ...]] = {}
    for index, row in enumerate(batch.rows):
        spec = row.spec
        if spec not in strides:
            strides[spec] = tuple(section.nbytes for section in info.sections(spec, batch.shape))
        last = runs[-1] if runs else None
        if (
            last
            and last.arena == row.arena
            and last.spec == spec
            and all(
                offset == start + last.count * stride
                for offset, start, stride in zip(row.sections, last.offsets, strides[spec], strict=True)
            )
        ):
            last.count += 1
        else:
            runs.append(FeatureRun(row.arena, row.sections, spec, index, 1))
    return runs

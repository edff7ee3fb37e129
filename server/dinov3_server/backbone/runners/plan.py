"""Groups the rows of a batch into runs that are contiguous in an arena and can be copied at once. Imports no torch.

The rows of one request are contiguous, so most batches are a few runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from dinov3_server.models.interface import Batch, FeatureSpec, ModelInfo, Output, OutputSpec


@dataclass(slots=True)
class PixelRun:
    """Rows `first` to `first + count` of a batch whose pixels are contiguous, at byte `offset` of an arena."""

    arena: int
    offset: int
    first: int
    count: int


@dataclass(slots=True)
class FeatureRun:
    """Rows `first` to `first + count` of a batch with one spec, whose output buffers are contiguous in an arena.

    `offsets` are those of the first row, one for each output buffer of `spec`.
    """

    arena: int
    offsets: tuple[int, ...]
    spec: FeatureSpec
    first: int
    count: int


def batch_outputs(batch: Batch) -> list[Output]:
    """Return the distinct outputs of all rows."""
    return list(dict.fromkeys(output for row in batch.rows for output in row.spec.outputs))


def batch_output_specs(batch: Batch) -> tuple[OutputSpec, ...]:
    """Return the distinct output specs of all rows, in an order that does not depend on the order of the rows."""
    outputs = {spec.output_spec(output) for spec in {row.spec for row in batch.rows} for output in spec.outputs}
    return tuple(sorted(outputs, key=repr))


def pixel_runs(batch: Batch) -> list[PixelRun]:
    """Return the runs of contiguous pixels, in the order of the rows."""
    runs: list[PixelRun] = []
    for index, row in enumerate(batch.rows):
        last = runs[-1] if runs else None
        if last and last.arena == row.arena and row.pixel_offset == last.offset + last.count * batch.shape.nbytes:
            last.count += 1
        else:
            runs.append(PixelRun(row.arena, row.pixel_offset, index, 1))
    return runs


def feature_runs(batch: Batch, info: ModelInfo) -> list[FeatureRun]:
    """Return the runs of contiguous output buffers, in the order of the rows."""
    runs: list[FeatureRun] = []
    strides: dict[FeatureSpec, tuple[int, ...]] = {}
    for index, row in enumerate(batch.rows):
        spec = row.spec
        if spec not in strides:
            strides[spec] = tuple(buffer.nbytes for buffer in info.output_buffers(spec, batch.shape))
        last = runs[-1] if runs else None
        if (
            last
            and last.arena == row.arena
            and last.spec == spec
            and all(
                offset == start + last.count * stride
                for offset, start, stride in zip(row.output_offsets, last.offsets, strides[spec], strict=True)
            )
        ):
            last.count += 1
        else:
            runs.append(FeatureRun(row.arena, row.output_offsets, spec, index, 1))
    return runs

"""Groups the rows of a batch into runs that are contiguous in an arena and can be copied at once. Imports no torch.

The rows of one request are contiguous, so most batches are a few runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from dinov3_server.models.interface import Batch, FeatureSpec, ModelInfo, Output, OutputSpec, Row


@dataclass(slots=True)
class Run:
    """Rows `first` to `first + count` of a batch, whose pixels or output buffers are contiguous in an arena.

    `arena`, `offsets` (one for each buffer) and `spec` are those of the first row.
    """

    arena: int
    offsets: tuple[int, ...]
    spec: FeatureSpec
    first: int
    count: int = 1

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)

    def is_continued_by(self, row: Row, offsets: tuple[int, ...], strides: tuple[int, ...]) -> bool:
        """Return whether the buffers of `row` follow, `strides` being the bytes of each buffer of a row."""
        ends = [start + self.count * stride for start, stride in zip(self.offsets, strides, strict=True)]
        return row.arena == self.arena and list(offsets) == ends


def batch_outputs(batch: Batch) -> list[Output]:
    """Return the distinct outputs of all rows."""
    return list(dict.fromkeys(output for row in batch.rows for output in row.spec.outputs))


def batch_output_specs(batch: Batch) -> tuple[OutputSpec, ...]:
    """Return the distinct output specs of all rows, in an order that does not depend on the order of the rows."""
    outputs = {spec.output_spec(output) for spec in {row.spec for row in batch.rows} for output in spec.outputs}
    return tuple(sorted(outputs, key=repr))


def pixel_runs(batch: Batch) -> list[Run]:
    """Return the runs of contiguous pixels, in the order of the rows."""
    runs: list[Run] = []
    for index, row in enumerate(batch.rows):
        offsets = (row.pixel_offset,)
        if runs and runs[-1].is_continued_by(row, offsets, (batch.shape.nbytes,)):
            runs[-1].count += 1
        else:
            runs.append(Run(row.arena, offsets, row.spec, index))
    return runs


def feature_runs(batch: Batch, info: ModelInfo) -> list[Run]:
    """Return the runs of contiguous output buffers of one spec, in the order of the rows."""
    runs: list[Run] = []
    strides = {
        spec: tuple(buffer.nbytes for buffer in info.output_buffers(spec, batch.shape))
        for spec in {row.spec for row in batch.rows}
    }
    for index, row in enumerate(batch.rows):
        last = runs[-1] if runs else None
        if last and last.spec == row.spec and last.is_continued_by(row, row.output_offsets, strides[row.spec]):
            last.count += 1
        else:
            runs.append(Run(row.arena, row.output_offsets, row.spec, index))
    return runs

"""The CPU runner: computes one batch at a time, reading from and writing to the arenas directly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from dinov3_server.backbone.runners.base import TorchRunner, finite_rows
from dinov3_server.backbone.runners.plan import Run, batch_outputs, feature_runs, pixel_runs
from dinov3_server.malloc import give_back_freed_memory
from dinov3_server.models.interface import Batch, BatchResult, LaunchedBatch, Output, OutputBuffer, PixelShape

# Batches between two returns of freed memory. A return takes up to 15 ms, and the next batch faults its pages in again.
RETURN_EVERY = 64


# Floats of one output that are pooled, projected and quantized at a time.
_FLOATS = 1 << 23


class _Run:
    """Rows of a batch, their buffers in the arena by output, and whether what was pooled is finite, [n] bool each."""

    def __init__(self, rows: Run, buffers: Sequence[OutputBuffer], in_arena: Sequence[Tensor]) -> None:
        self.rows = rows
        self.finite: list[Tensor] = []
        self.buffers: dict[Output, list[Tensor]] = {}
        for buffer, tensor in zip(buffers, in_arena, strict=True):
            self.buffers.setdefault(buffer.output, []).append(tensor)

    def finite_rows(self) -> list[bool]:
        """Return whether all features of each row are finite."""
        written = finite_rows(list(chain.from_iterable(self.buffers.values())))
        return torch.stack([written, *self.finite]).all(dim=0).tolist()


class CpuRunner(TorchRunner):
    """A `Runner` that does all work in `finish`: preparing ahead would take cores from the running batch."""

    pipeline_depth = 1
    _batches = 0

    def launch(self, batch: Batch) -> LaunchedBatch:
        return batch

    def finish(self, launched: LaunchedBatch) -> BatchResult:
        batch = cast(Batch, launched)
        self._batches += 1
        if self._batches % RETURN_EVERY == 0:
            give_back_freed_memory()
        return self._guarded(lambda: self._run(batch))

    def memory(self) -> dict[str, int]:
        return {}

    def _settle(self) -> None:
        pass  # nothing is pending on the CPU after a call has returned

    @torch.inference_mode()
    def _run(self, batch: Batch) -> BatchResult:
        started = time.perf_counter()
        pixels = self._gather(batch)
        gathered = time.perf_counter()
        runs = [
            _Run(run, self.info.output_buffers(run.spec, batch.shape), self._features_in_arena(run, batch.shape))
            for run in feature_runs(batch, self.info)
        ]
        copy_out = 0.0
        # Each output is written when it is computed: all layers of all rows would take more than the weights.
        for output, values in self.model.features(pixels, batch_outputs(batch)):
            computed = time.perf_counter()
            self._write(output, values, [run for run in runs if output in run.rows.spec.outputs], batch.shape)
            copy_out += time.perf_counter() - computed
        computed = time.perf_counter()
        finite = [finite for run in runs for finite in run.finite_rows()]
        written = time.perf_counter()
        copy_out += written - computed
        return BatchResult(
            finite=tuple(finite),
            copy_in=gathered - started,
            forward=written - gathered - copy_out,
            copy_out=copy_out,
        )

    def _write(self, output: Output, values: Tensor, runs: Sequence[_Run], shape: PixelShape) -> None:
        """Write the buffers of one output. Rows share the steps of postprocessing, unless that takes much memory."""
        sizes = {run.rows.spec.output_spec(output): run.buffers[output][0][0].numel() for run in runs}
        shared = self._postprocessing({output: values}, shape)
        is_small = len(values) * sum(sizes.values()) <= _FLOATS
        for run in runs:
            spec, end = run.rows.spec.output_spec(output), run.rows.first + run.rows.count
            step = run.rows.count if is_small else max(1, _FLOATS // sizes[spec])
            for first in range(run.rows.first, end, step):
                rows = slice(first, min(first + step, end))
                if is_small:
                    computed = [buffer[rows] for buffer in shared.buffers(spec)]
                else:
                    computed = self._postprocessing({output: values[rows]}, shape).buffers(spec)
                for source, target in zip(computed, run.buffers[output], strict=True):
                    target[rows.start - run.rows.first : rows.stop - run.rows.first].copy_(source)
            for unpooled in shared.before_pooling(spec):
                run.finite.append(finite_rows([unpooled[run.rows.first : end]]))

    def _gather(self, batch: Batch) -> Tensor:
        """Return the batch's pixels: a view of the arena if they are contiguous there, else a copy."""
        parts = [self._pixels_in_arena(run, batch.shape) for run in pixel_runs(batch)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

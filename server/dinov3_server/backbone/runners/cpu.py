"""The CPU runner: computes one batch at a time, reading from and writing to the arenas directly."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from dinov3_server.backbone.runners.base import TorchRunner, finite_rows
from dinov3_server.backbone.runners.plan import batch_outputs, feature_runs, pixel_runs
from dinov3_server.malloc import give_back_freed_memory
from dinov3_server.models.interface import Batch, BatchResult, LaunchedBatch

# Batches between two returns of freed memory. A return takes up to 15 ms, and the next batch faults its pages in again.
RETURN_EVERY = 64


@dataclass(frozen=True, slots=True)
class _Launched:
    batch: Batch


class CpuRunner(TorchRunner):
    """A `Runner` that does all work in `finish`: preparing ahead would take cores from the running batch."""

    pipeline_depth = 1
    _batches = 0

    def launch(self, batch: Batch) -> LaunchedBatch:
        return _Launched(batch)

    def finish(self, launched: LaunchedBatch) -> BatchResult:
        batch = cast(_Launched, launched).batch
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
        features = self._model(pixels, batch_outputs(batch))
        computed = time.perf_counter()
        postprocessing = self._postprocessing(features, batch.shape)
        finite: list[bool] = []
        for run in feature_runs(batch, self.info):
            rows = slice(run.first, run.first + run.count)
            specs = [run.spec.output_spec(output) for output in run.spec.outputs]
            computed_buffers = chain.from_iterable(map(postprocessing.buffers, specs))
            in_arena = self._features_in_arena(run, batch.shape)
            for source, target in zip(computed_buffers, in_arena, strict=True):
                target.copy_(source[rows])
            unpooled = (values[rows] for spec in specs for values in postprocessing.before_pooling(spec))
            finite += finite_rows([*in_arena, *unpooled]).tolist()
        written = time.perf_counter()
        return BatchResult(
            finite=tuple(finite),
            copy_in=gathered - started,
            forward=computed - gathered,
            copy_out=written - computed,
        )

    def _gather(self, batch: Batch) -> Tensor:
        """Return the batch's pixels: a view of the arena if they are contiguous there, else a copy."""
        runs = pixel_runs(batch)
        parts = [self._pixels_in_arena(run.arena, run.offset, run.count, batch.shape) for run in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

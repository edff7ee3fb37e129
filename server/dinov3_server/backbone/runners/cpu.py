"""The model on the CPU: one batch at a time, straight from the arenas and into them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dinov3_server.backbone.runners.base import TorchRunner, finite_rows
from dinov3_server.backbone.runners.plan import feature_runs, pixel_runs, wanted_outputs
from dinov3_server.malloc import give_back_freed_memory
from dinov3_server.models.interface import Batch, Finished, Launched

# Batches from one return of freed memory to the next. A return costs up to 15 ms, and faults in the next batch.
RETURN_EVERY = 64


@dataclass(frozen=True, slots=True)
class _Launched:
    batch: Batch


class CpuRunner(TorchRunner):
    """Preparing ahead would take the cores from the batch that runs: all the work is in `finish`."""

    pipeline_depth = 1
    _batches = 0

    def launch(self, batch: Batch) -> Launched:
        return _Launched(batch)

    def finish(self, launched: Launched) -> Finished:
        batch = cast(_Launched, launched).batch
        self._batches += 1
        if self._batches % RETURN_EVERY == 0:
            give_back_freed_memory()
        return self._guarded(lambda: self._run(batch))

    def memory(self) -> dict[str, int]:
        return {}

    def _settle(self) -> None:
        pass  # the CPU has nothing under way when a call returns, and freed memory is free

    @torch.inference_mode()
    def _run(self, batch: Batch) -> Finished:
        started = time.perf_counter()
        pixels = self._gather(batch)
        gathered = time.perf_counter()
        features = self._model(pixels, wanted_outputs(batch))
        computed = time.perf_counter()
        sent = self._postprocessing(features, batch.shape)
        finite: list[bool] = []
        for run in feature_runs(batch, self.info):
            rows = slice(run.first, run.first + run.count)
            wanted = [run.spec.wanted(output) for output in run.spec.outputs]
            places = self._features_in_arena(run, batch.shape)
            for section, place in zip((s for each in wanted for s in sent.sections(each)), places, strict=True):
                place.copy_(section[rows])
            finite += finite_rows([*places, *(u[rows] for each in wanted for u in sent.unseen(each))]).tolist()
        written = time.perf_counter()
        return Finished(
            finite=tuple(finite),
            copy_in=gathered - started,
            forward=computed - gathered,
            copy_out=written - computed,
        )

    def _gather(self, batch: Batch) -> Tensor:
        """The batch's pixels; in place, where they lie side by side."""
        runs = pixel_runs(batch)
        parts = [self._pixels_in_arena(run.arena, run.offset, run.count, batch.shape) for run in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

"""Run batches on the device: the worker's loop launches them, and the device thread waits for them to finish.

The device thread only waits for launched batches, in order (`Runner.finish`). So the loop reads messages while the
device computes and, on CUDA, launches the copy of the next batch.
"""

from __future__ import annotations

import os
import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dinov3_server.engine.scheduler import BatchRow
from dinov3_server.models.interface import Batch, BatchResult, LaunchedBatch, Row, Runner


@dataclass(eq=False)
class RunningBatch:
    """A batch from its launch to its results. `outcome` is set when it has left the device."""

    rows: list[BatchRow]
    launched_at: float
    launched: LaunchedBatch | None = None
    outcome: BatchResult | Exception | None = None


class Device:
    """The batches that are on the device.

    All methods but `work` must be called on the worker's loop. `fileno` becomes readable when a batch has left the
    device.
    """

    def __init__(self, runner: Runner, arena_row: Callable[[BatchRow], Row]) -> None:
        self._runner = runner
        self._arena_row = arena_row
        self.running: deque[RunningBatch] = deque()
        self._todo: queue.SimpleQueue[RunningBatch | None] = queue.SimpleQueue()
        self._done: deque[RunningBatch] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._wake

    @property
    def has_room(self) -> bool:
        """Whether another batch may be launched. A quarantined row has the device to itself."""
        if self.running and self.running[0].rows[0].job.quarantined:
            return False
        return len(self.running) < self._runner.pipeline_depth

    def launch(self, rows: list[BatchRow]) -> None:
        """Launch a batch of `rows`, all of one shape."""
        batch = RunningBatch(rows, time.monotonic())
        self.running.append(batch)
        try:
            batch.launched = self._runner.launch(
                Batch(rows[0].job.payload.block.shape, tuple(map(self._arena_row, rows)))
            )
        except Exception as error:
            batch.outcome = error
        self._todo.put(batch)  # also if it failed: batches are collected in the order of their launch

    def collect(self) -> list[RunningBatch]:
        """Return the batches that have left the device since the last call, in the order of their launch."""
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return []
        batches = []
        while self._done:
            batches.append(self._done.popleft())
            self.running.popleft()
        return batches

    def stop(self) -> None:
        """Let `work` return when all launched batches are finished."""
        self._todo.put(None)

    def close(self) -> None:
        os.close(self._wake)

    def work(self) -> None:
        """Finish batches in the order of their launch, until `stop`; called on the device thread."""
        while (batch := self._todo.get()) is not None:
            if batch.launched is not None:
                try:
                    batch.outcome = self._runner.finish(batch.launched)
                except Exception as error:
                    batch.outcome = error
                batch.launched = None
            self._done.append(batch)
            os.eventfd_write(self._wake, 1)
            del batch  # or the last batch, and the memory that it refers to, would stay until the next one

"""Batches on their way through the device: launched by the worker's loop, finished by a thread of their own.

The device thread does nothing but wait for launched batches in order (`Runner.finish`), so that submits
and cancels are read while the device works and, on CUDA, the next batch is copied in meanwhile.
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
class Running:
    """A batch from its launch to its results. `outcome` is set once it has left the device."""

    rows: list[BatchRow]
    since: float
    launched: LaunchedBatch | None = None
    outcome: BatchResult | Exception | None = None


class Device:
    """The device thread and what is on it. All methods belong to the worker's loop.

    `fileno` becomes readable when a batch has left the device.
    """

    def __init__(self, runner: Runner, arena_row: Callable[[BatchRow], Row]) -> None:
        self._runner = runner
        self._arena_row = arena_row
        self.running: deque[Running] = deque()
        self._todo: queue.SimpleQueue[Running | None] = queue.SimpleQueue()
        self._done: deque[Running] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._wake

    @property
    def has_room(self) -> bool:
        """Whether another batch may be launched. A suspect has the device for itself."""
        if self.running and self.running[0].rows[0].job.solo:
            return False
        return len(self.running) < self._runner.pipeline_depth

    def launch(self, rows: list[BatchRow]) -> None:
        batch = Running(rows, time.monotonic())
        self.running.append(batch)
        try:
            batch.launched = self._runner.launch(
                Batch(rows[0].job.payload.block.shape, tuple(map(self._arena_row, rows)))
            )
        except Exception as error:
            batch.outcome = error
        self._todo.put(batch)  # failed ones too: batches are collected in the order of their launch

    def collect(self) -> list[Running]:
        """The batches that have left the device since the last call, in the order of their launch."""
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
        """Let `work` return once it is through with what was launched."""
        self._todo.put(None)

    def close(self) -> None:
        os.close(self._wake)

    def work(self) -> None:
        """Finish batches in the order of their launch until `stop`. Belongs to the device thread."""
        while (batch := self._todo.get()) is not None:
            if batch.launched is not None:
                try:
                    batch.outcome = self._runner.finish(batch.launched)
                except Exception as error:
                    batch.outcome = error
                batch.launched = None
            self._done.append(batch)
            os.eventfd_write(self._wake, 1)
            del batch  # or the last batch, and the memory it refers to, would live until the next one

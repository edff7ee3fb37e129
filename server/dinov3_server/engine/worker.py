"""Schedule the jobs of all frontends on one device: the worker's loop.

The loop makes all decisions. One iteration reads the channels, settles the batches that left the device, drops the jobs
that have expired, announces and launches the next batches, and flushes the channels.
"""

from __future__ import annotations

import logging
import os
import selectors
import threading
import time
from collections import deque
from typing import Literal

from dinov3_server.config.settings import Settings
from dinov3_server.engine.attacher import Attacher
from dinov3_server.engine.channel import Channel, ChannelClosed
from dinov3_server.engine.device import Device, RunningBatch
from dinov3_server.engine.frontend_connection import FrontendConnection
from dinov3_server.engine.frontends import Frontends
from dinov3_server.engine.messages import (
    SNAPSHOT_SECONDS,
    Attach,
    Cancel,
    Connected,
    Drain,
    ExitReason,
    Hello,
    MetricsSnapshot,
    Reached,
    Submit,
)
from dinov3_server.engine.pace import BatchTime, Pace
from dinov3_server.engine.scheduler import BatchRow, Limits, Scheduler
from dinov3_server.metrics import Metrics
from dinov3_server.models.interface import BatchResult, DeviceLost, DeviceOutOfMemory, Row, Runner

log = logging.getLogger(__name__)

# Exit status of a worker whose device is unusable in this process.
DEVICE_LOST = 70
# How long a worker that is told to stop waits for an arena that is being attached.
ATTACHER_SECONDS = 1.0


class Worker:
    """Drives `runner` for all frontends.

    `control` is the channel to the supervisor, which sends `Connected` for each frontend, and `Drain` to end.
    """

    def __init__(self, runner: Runner, settings: Settings, control: Channel, metrics: Metrics) -> None:
        self._runner = runner
        self._control = control
        self._metrics = metrics
        self._batch_timeout = settings.batch_timeout_seconds
        self._pace = Pace()
        self._scheduler = Scheduler(
            Limits(settings.max_batch_images, settings.max_batch_tokens, settings.max_queue_delay_seconds), self._pace
        )
        self._device = Device(runner, self._arena_row)
        self._retry: deque[list[BatchRow]] = deque()  # of failed batches; they run before new rows
        self._frontends = Frontends()
        self._connection_count = 0
        self._stopping = False
        self._reached: set[str] = set()
        self._error: Exception | None = None  # what ended the loop
        self._next_snapshot = 0.0
        self._busy_since = 0.0
        self._head_since = 0.0  # since when the device has worked on its first batch
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ, self._read_control)
        self._selector.register(self._device, selectors.EVENT_READ, self._settle_finished)
        self._attacher = Attacher(runner)
        self._selector.register(self._attacher, selectors.EVENT_READ, self._send_hellos)

    def run(self) -> None:
        """Run until told to stop. Must be called on the thread that built the runner; it becomes the device thread.

        That matters on the CPU. libgomp keeps a team of threads for every thread that has computed; with two teams it
        counts more threads than cores and lets them sleep at every barrier.
        """
        loop = threading.Thread(target=self._loop, name="loop", daemon=True)
        loop.start()
        self._device.work()
        loop.join()
        if self._error is not None:
            raise self._error
        self._metrics.queue_images.set(0)
        self._next_snapshot = 0.0
        self._report(time.monotonic())
        self._control.flush_within(1.0)
        for frontend in list(self._frontends.by_key.values()):
            self._remove(frontend)
        self._selector.close()
        self._device.close()
        if self._attacher.close(ATTACHER_SECONDS):
            self._runner.close()

    def _loop(self) -> None:
        try:
            while not (self._stopping and not self._device.running):
                self._iterate()
        except Exception as error:
            self._error = error
        finally:
            self._device.stop()

    def _iterate(self) -> None:
        for key, _ in self._selector.select(self._timeout(time.monotonic())):
            key.data()
        now = time.monotonic()
        self._expire(now)
        self._launch(now)
        self._exit_if_hung(now)
        self._report(now)
        self._flush()

    # --- reading ---------------------------------------------------------------------------------

    def _read_control(self) -> None:
        try:
            for message, fds in self._control.receive():
                match message:
                    case Connected():
                        self._connect(fds[0])
                    case Drain():
                        self._stopping = True
        except ChannelClosed:
            self._stopping = True  # the supervisor has died, and the frontends die with it
            self._selector.unregister(self._control)

    def _connect(self, fd: int) -> None:
        frontend = FrontendConnection(self._connection_count, fd)
        self._connection_count += 1
        self._frontends.by_key[frontend.key] = frontend
        self._selector.register(frontend.channel, selectors.EVENT_READ, lambda: self._read(frontend))

    def _send_hellos(self) -> None:
        """Send Hello to the frontends whose arenas are attached now; until then they use other workers."""
        for frontend in self._attacher.collect():
            self._reach("attached")
            log.debug("frontend %d is attached", frontend.key)
            if not frontend.gone:
                frontend.attached = True
                frontend.channel.send(Hello(self._runner.info))

    def _read(self, frontend: FrontendConnection) -> None:
        try:
            while messages := frontend.channel.receive():
                for message, fds in messages:
                    match message:
                        case Submit(block=block):
                            job = frontend.submit(message, self._runner.info.tokens(block.shape))
                            self._scheduler.add(job, time.monotonic())
                        case Cancel(index):
                            frontend.cancel(index)
                            if rows := tuple(self._scheduler.cancel((frontend.key, index))):
                                frontend.drop(index, rows, "cancelled")
                        case Attach(nbytes):
                            self._attacher.attach(frontend, fds[0], nbytes)
        except ChannelClosed:
            self._on_closed(frontend)

    def _on_closed(self, frontend: FrontendConnection) -> None:
        """Drop the rows of a frontend that has died. Its arena stays mapped while a batch writes to it."""
        frontend.gone = True
        self._selector.unregister(frontend.channel)
        self._scheduler.remove_frontend(frontend.key)
        if not frontend.running:
            self._remove(frontend)

    def _remove(self, frontend: FrontendConnection) -> None:
        del self._frontends.by_key[frontend.key]
        frontend.channel.close()
        self._attacher.detach(frontend)

    # --- deciding --------------------------------------------------------------------------------

    def _timeout(self, now: float) -> float | None:
        moments = [self._next_snapshot]
        if (wakeup := self._scheduler.wakeup(now)) is not None:
            moments.append(wakeup)
        return max(0.0, min(moments) - now)

    def _expire(self, now: float) -> None:
        for job, rows in self._scheduler.expire(now):
            key, index = job.key
            assert job.deadline is not None
            self._frontends.by_key[key].drop(index, tuple(rows), "expired" if job.deadline <= now else "late")

    def _launch(self, now: float) -> None:
        while self._device.has_room and not self._stopping:
            rows = self._next_retry(now) or self._next_new(now)
            if rows is None:
                return
            if rows[0].job.quarantined and self._device.running:
                self._retry.appendleft(rows)  # a quarantined row runs alone
                return
            if not self._device.running:
                self._busy_since = self._head_since = now
            self._reach("batch")
            self._frontends.announce(rows)
            self._device.launch(rows)
            if len(self._frontends.by_key) > 1:
                self._frontends.send_load(now)

    def _next_new(self, now: float) -> list[BatchRow] | None:
        rows = self._scheduler.next_batch(now)
        for row in rows or ():
            self._frontends.by_key[row.job.key[0]].start(row.job.payload, 1)
            waited = now - row.job.enqueued
            self._metrics.queue_seconds.observe(waited)
            self._metrics.stage_seconds.observe(waited, "queue")
        return rows

    def _next_retry(self, now: float) -> list[BatchRow] | None:
        """Return rows of a failed batch to run again, and drop those that are no longer wanted."""
        while self._retry:
            wanted = []
            for row in self._retry.popleft():
                key, index = row.job.key
                frontend = self._frontends.by_key[key]
                reason = frontend.drop_reason(row, now)
                if reason is None:
                    wanted.append(row)
                    continue
                if not frontend.gone:
                    frontend.drop(index, (row.row,), reason, started=True)
                self._count_done(row)
            if wanted:
                return wanted
        return None

    def _reach(self, step: Literal["attached", "batch"]) -> None:
        """Report a step to the supervisor, once and at once: it arrives even if this process is killed right after."""
        if step not in self._reached:
            self._reached.add(step)
            self._control.send(Reached(step))
            self._control.flush()

    def _arena_row(self, row: BatchRow) -> Row:
        block = row.job.payload.block
        return Row(row.job.key[0], block.row_pixel_offset(row.row), block.row_output_offsets(row.row), block.spec)

    def _exit_if_hung(self, now: float) -> None:
        if self._device.running and now - self._head_since > self._batch_timeout:
            self._exit(f"a batch has been on the device for over {self._batch_timeout:g} s")

    def _exit(self, reason: str) -> None:
        """End this process at once, after flushing its messages: rows that are finished must not become suspects."""
        log.critical("%s; this process is replaced", reason)
        self._control.send(ExitReason(reason[:300]))
        self._flush()
        os._exit(DEVICE_LOST)

    # --- settling --------------------------------------------------------------------------------

    def _settle_finished(self) -> None:
        for batch in self._device.collect():
            self._settle(batch)

    def _settle(self, batch: RunningBatch) -> None:
        now = time.monotonic()
        # If there was a batch before it, the device has worked on this one only since that one ended.
        seconds = now - max(batch.launched_at, self._head_since)
        self._head_since = now
        # Counted for each batch, as a busy device may never become idle.
        self._metrics.device_busy_seconds.inc(self._runner.info.device, value=now - self._busy_since)
        self._busy_since = now
        rows = batch.rows
        match batch.outcome:
            case BatchResult() as finished:
                self._learn(rows, seconds, now)
                self._metrics.batch_images.observe(len(rows))
                self._metrics.batch_tokens.observe(len(rows) * rows[0].job.tokens)
                for stage in ("copy_in", "forward", "copy_out"):
                    self._metrics.stage_seconds.observe(getattr(finished, stage), stage)
                reason = "the features of this image are not finite: they hold NaN or infinity"
                failed = {i: reason for i, finite in enumerate(finished.finite) if not finite}
                self._answer_batch(batch, failed, now)
            case DeviceLost() as error:
                self._exit(f"the device is lost: {error}")
            case DeviceOutOfMemory() as error if len(rows) > 1:
                half = -(-len(rows) // 2)  # rounded up, so that the ceiling is not lowered more than needed
                log.warning(
                    "%d images of %s do not fit the device (%s); at most %d from now on",
                    len(rows),
                    rows[0].job.shape,
                    error,
                    half,
                )
                self._scheduler.limit_shape(rows[0].job.shape, half)
                self._retry.extend((rows[:half], rows[half:]))
            case Exception() as error if len(rows) > 1:
                log.error("a batch of %d images failed; its halves are run separately", len(rows), exc_info=error)
                half = len(rows) // 2
                self._retry.extend((rows[:half], rows[half:]))
            case DeviceOutOfMemory() as error:
                self._answer_batch(
                    batch, {0: f"the device has too little memory for an image of this size: {error}"}, now
                )
            case Exception() as error:
                log.error("an image failed alone", exc_info=error)
                self._answer_batch(batch, {0: "the model failed on this image"}, now)

    def _learn(self, rows: list[BatchRow], seconds: float, now: float) -> None:
        """Learn the pace from a finished batch, and count its rows that ended after their deadline."""
        job = rows[0].job
        self._frontends.last_batch = batch = BatchTime(job.shape, job.tokens, len(rows), seconds)
        self._pace.observe(batch, now)
        late = sum(row.job.deadline is not None and row.job.deadline < now for row in rows)
        if late:
            self._metrics.late_images.inc(value=late)
            self._metrics.late_device_seconds.inc(self._runner.info.device, value=seconds * late / len(rows))

    def _answer_batch(self, batch: RunningBatch, failed: dict[int, str], now: float) -> None:
        self._frontends.answer(batch, failed, now)
        for row in batch.rows:
            self._count_done(row)

    def _count_done(self, row: BatchRow) -> None:
        """Count a started row as answered; the last one of a dead frontend releases its arena."""
        frontend = self._frontends.by_key[row.job.key[0]]
        frontend.running -= 1
        if frontend.gone and not frontend.running:
            self._remove(frontend)

    # --- sending ---------------------------------------------------------------------------------

    def _flush(self) -> None:
        self._control.flush()
        for frontend in self._frontends.by_key.values():
            if not frontend.gone:
                flushed = frontend.channel.flush()
                events = selectors.EVENT_READ | (0 if flushed else selectors.EVENT_WRITE)
                key = self._selector.get_key(frontend.channel)
                if key.events != events:
                    self._selector.modify(frontend.channel, events, key.data)

    def _report(self, now: float) -> None:
        if now < self._next_snapshot:
            return
        self._next_snapshot = now + SNAPSHOT_SECONDS
        self._metrics.queue_images.set(self._scheduler.queued_images)
        for kind, nbytes in self._runner.memory().items():
            self._metrics.device_memory_bytes.set(nbytes, self._runner.info.device, kind)
        if self._control.flush():  # do not pile messages up if the supervisor does not read
            self._control.send(MetricsSnapshot(self._metrics.snapshot()))
        # Results carry the load too, but only to frontends that have jobs here.
        self._frontends.send_load(now, at_least_every=0.0)

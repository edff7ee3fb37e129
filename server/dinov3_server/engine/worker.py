"""The process that holds the model on one device: its loop.

The loop owns everything that is said and decided. One turn of it: read the channels, settle the
batches that left the device, drop what has expired, announce and launch what comes next, say it all.
"""

from __future__ import annotations

import importlib
import logging
import os
import selectors
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Literal

from dinov3_server.config.settings import Settings
from dinov3_server.engine.attacher import Attacher
from dinov3_server.engine.channel import Channel, ChannelClosed
from dinov3_server.engine.device import Device, Running
from dinov3_server.engine.messages import (
    SNAPSHOT_SECONDS,
    Attach,
    Backlog,
    Cancel,
    Connected,
    Drain,
    ExitReason,
    Hello,
    Load,
    MetricsSnapshot,
    PartResult,
    PartRows,
    Reached,
    Ready,
    Results,
    Started,
    StartWorker,
    Submit,
)
from dinov3_server.engine.pace import BatchTime, Pace
from dinov3_server.engine.peer import Frontend
from dinov3_server.engine.scheduler import BatchRow, Limits, Scheduler
from dinov3_server.images.preprocess import PREPROCESSING_ID
from dinov3_server.metrics import Metrics
from dinov3_server.models.interface import BatchResult, DeviceLost, DeviceOutOfMemory, PixelShape, Row, Runner

log = logging.getLogger(__name__)

# How often a frontend is told of the others' load, in seconds, while that changes.
TELL_SECONDS = 0.02
# Exit status of a worker whose device is beyond repair in this process.
DEVICE_LOST = 70
# How long a worker that was told to stop waits for an arena that is being attached.
ATTACHER_SECONDS = 1.0


class Worker:
    """Drives `runner` for all frontends until told to stop.

    `control` is the channel to the supervisor, which sends `Connected` for a frontend, and `Drain`.
    """

    def __init__(self, runner: Runner, settings: Settings, control: Channel, metrics: Metrics) -> None:
        self._runner = runner
        self._control = control
        self._metrics = metrics
        self._batch_timeout = settings.batch_timeout_seconds
        self._pace = Pace()
        self._last_batch: BatchTime | None = None
        self._scheduler = Scheduler(
            Limits(settings.max_batch_images, settings.max_batch_tokens, settings.max_queue_delay_seconds), self._pace
        )
        self._device = Device(runner, self._arena_row)
        self._retry: deque[list[BatchRow]] = deque()  # what is left of failed batches, before anything new
        self._frontends: dict[int, Frontend] = {}  # by key
        self._connected = 0
        self._stopping = False
        self._reached: set[str] = set()
        self._error: Exception | None = None  # what ended the loop
        self._next_snapshot = 0.0
        self._busy_since = 0.0
        self._head_since = 0.0  # when the batch that the device works on became the first there
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ, self._read_control)
        self._selector.register(self._device, selectors.EVENT_READ, self._settle_finished)
        self._attacher = Attacher(runner)
        self._selector.register(self._attacher, selectors.EVENT_READ, self._welcome_attached)

    def run(self) -> None:
        """Return when told to stop. To be called on the thread that built the runner: it works on the device.

        On the CPU that matters much. libgomp keeps a team of threads for every thread that has
        computed; with two teams it counts more threads than cores and lets them sleep at every barrier.
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
        for frontend in list(self._frontends.values()):
            self._forget(frontend)
        self._selector.close()
        self._device.close()
        if self._attacher.close(ATTACHER_SECONDS):
            self._runner.close()

    def _loop(self) -> None:
        try:
            while not (self._stopping and not self._device.running):
                self._turn()
        except Exception as error:
            self._error = error
        finally:
            self._device.stop()

    def _turn(self) -> None:
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
            self._stopping = True  # the supervisor is gone, and with it everybody who could ask
            self._selector.unregister(self._control)

    def _connect(self, fd: int) -> None:
        frontend = Frontend(self._connected, fd)
        self._connected += 1
        self._frontends[frontend.key] = frontend
        self._selector.register(frontend.channel, selectors.EVENT_READ, lambda: self._read(frontend))

    def _welcome_attached(self) -> None:
        """Let the frontends submit whose arenas are attached now; they gave their work to other workers so far."""
        for frontend in self._attacher.collect():
            self._reach("attached")
            log.debug("frontend %d is attached", frontend.key)
            if not frontend.gone:
                frontend.attached = True
                frontend.channel.send(Hello(self._runner.info))

    def _read(self, frontend: Frontend) -> None:
        try:
            while messages := frontend.channel.receive():
                for message, fds in messages:
                    match message:
                        case Submit(block=block):
                            job = frontend.submit(message, self._runner.info.tokens(block.shape))
                            self._scheduler.add(job, time.monotonic())
                        case Cancel(part):
                            frontend.cancel(part)
                            if rows := tuple(self._scheduler.cancel((frontend.key, part))):
                                frontend.drop(part, rows, "cancelled")
                        case Attach(nbytes):
                            self._attacher.attach(frontend, fds[0], nbytes)
        except ChannelClosed:
            self._lose(frontend)

    def _lose(self, frontend: Frontend) -> None:
        """The frontend is gone: drop its rows; its arena stays mapped while a batch still writes to it."""
        frontend.gone = True
        self._selector.unregister(frontend.channel)
        self._scheduler.remove_frontend(frontend.key)
        if not frontend.running:
            self._forget(frontend)

    def _forget(self, frontend: Frontend) -> None:
        del self._frontends[frontend.key]
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
            key, part = job.key
            assert job.deadline is not None
            self._frontends[key].drop(part, tuple(rows), "expired" if job.deadline <= now else "late")

    def _launch(self, now: float) -> None:
        while self._device.has_room and not self._stopping:
            rows = self._next_retry(now) or self._next_new(now)
            if rows is None:
                return
            if rows[0].job.solo and self._device.running:
                self._retry.appendleft(rows)  # a suspect runs alone
                return
            if not self._device.running:
                self._busy_since = self._head_since = now
            self._announce(rows)
            self._device.launch(rows)
            self._tell_load(now)

    def _next_new(self, now: float) -> list[BatchRow] | None:
        rows = self._scheduler.next_batch(now)
        for row in rows or ():
            self._frontends[row.job.key[0]].start(row.job.payload, 1)
            waited = now - row.job.enqueued
            self._metrics.queue_seconds.observe(waited)
            self._metrics.stage_seconds.observe(waited, "queue")
        return rows

    def _next_retry(self, now: float) -> list[BatchRow] | None:
        """Rows of a failed batch that are to be run again, less those that nobody waits for any more."""
        while self._retry:
            wanted = []
            for row in self._retry.popleft():
                key, part = row.job.key
                frontend = self._frontends[key]
                reason = frontend.given_up(row, now)
                if reason is None:
                    wanted.append(row)
                    continue
                if not frontend.gone:
                    frontend.drop(part, (row.row,), reason, started=True)
                self._left(row)
            if wanted:
                return wanted
        return None

    def _announce(self, rows: list[BatchRow]) -> None:
        """Tell the frontends, before the device sees them: if this process dies now, it may be for these rows."""
        by_part: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            by_part[row.job.key[0]][row.job.key[1]].append(row.row)
        self._reach("batch")
        for key, parts in by_part.items():
            frontend = self._frontends[key]
            frontend.channel.send(Started(tuple(PartRows(part, tuple(of)) for part, of in parts.items())))
            # Not waited for: a frontend that does not read must not hold up the others. Should this batch kill the
            # process before the message is out, its rows count as queued, and it takes one crash more.
            frontend.channel.flush()

    def _reach(self, step: Literal["attached", "batch"]) -> None:
        """Tell the supervisor, once: what is written here it reads, even if this process is killed in the next line."""
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
        """End this process at once; what it has still to say is said, or finished rows would be suspects."""
        log.critical("%s; this process is replaced", reason)
        self._control.send(ExitReason(reason[:300]))
        self._flush()
        os._exit(DEVICE_LOST)

    # --- settling --------------------------------------------------------------------------------

    def _settle_finished(self) -> None:
        for batch in self._device.collect():
            self._settle(batch)

    def _settle(self, batch: Running) -> None:
        now = time.monotonic()
        # With a batch ahead, the device has worked on this one only since it was through with the one before.
        seconds = now - max(batch.since, self._head_since)
        self._head_since = now
        # Batch by batch, not when the device falls idle: one that always has a batch ahead never does.
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
                reason = "the model gave features that are not finite for this image"
                failed = {i: reason for i, finite in enumerate(finished.finite) if not finite}
                self._answer(batch, failed, now)
            case DeviceLost() as error:
                self._exit(f"the device is lost: {error}")
            case DeviceOutOfMemory() as error if len(rows) > 1:
                half = -(-len(rows) // 2)  # rounded up: the ceiling is not lowered further than it must be
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
                log.error("a batch of %d images failed; its halves are run apart", len(rows), exc_info=error)
                half = len(rows) // 2
                self._retry.extend((rows[:half], rows[half:]))
            case DeviceOutOfMemory() as error:
                self._answer(batch, {0: f"the device has not enough memory for one image of this size: {error}"}, now)
            case Exception() as error:
                log.error("an image failed alone", exc_info=error)
                self._answer(batch, {0: "the model failed on this image"}, now)

    def _learn(self, rows: list[BatchRow], seconds: float, now: float) -> None:
        """Note how long the device took, and which of it came too late."""
        job = rows[0].job
        self._last_batch = BatchTime(job.shape, job.tokens, len(rows), seconds)
        self._pace.observe(self._last_batch, now)
        late = sum(row.job.deadline is not None and row.job.deadline < now for row in rows)
        if late:
            self._metrics.late_images.inc(value=late)
            self._metrics.late_device_seconds.inc(self._runner.info.device, value=seconds * late / len(rows))

    def _answer(self, batch: Running, failed: dict[int, str], now: float) -> None:
        by_part: dict[tuple[int, int], list[int]] = defaultdict(list)
        for position, row in enumerate(batch.rows):
            by_part[row.job.key].append(position)
        results: dict[int, list[PartResult]] = defaultdict(list)
        for (key, index), positions in by_part.items():
            job = batch.rows[positions[0]].job
            results[key].append(
                PartResult(
                    part=index,
                    rows=tuple(batch.rows[p].row for p in positions),
                    failed={batch.rows[p].row: failed[p] for p in positions if p in failed},
                    queue_seconds=batch.since - job.enqueued,
                    inference_seconds=now - batch.since,
                    batch_images=len(batch.rows),
                )
            )
            self._frontends[key].answered(index, len(positions))
        for key, parts in results.items():
            frontend = self._frontends[key]
            if not frontend.gone:
                frontend.told = now
                frontend.channel.send(Results(tuple(parts), self._others(frontend), self._last_batch))
        for row in batch.rows:
            self._left(row)

    def _left(self, row: BatchRow) -> None:
        frontend = self._frontends[row.job.key[0]]
        frontend.running -= 1
        if frontend.gone and not frontend.running:
            self._forget(frontend)

    # --- saying ----------------------------------------------------------------------------------

    def _others(self, frontend: Frontend) -> Load:
        """What the other frontends have here."""
        loads = [other.load for other in self._frontends.values() if other is not frontend]
        return Load(*map(sum, zip(*loads, strict=True))) if loads else Load()

    def _tell_load(self, now: float) -> None:
        """Tell frontends that share this device what the others wait for, as it changes."""
        if len(self._frontends) < 2:
            return
        for frontend in self._frontends.values():
            heard = frontend.attached and not frontend.gone
            if heard and now - frontend.told >= TELL_SECONDS and frontend.channel.flush():
                frontend.told = now
                frontend.channel.send(Backlog(self._others(frontend), self._last_batch))

    def _flush(self) -> None:
        self._control.flush()
        for frontend in self._frontends.values():
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
        if self._control.flush():  # to a peer that does not read nothing is piled up
            self._control.send(MetricsSnapshot(self._metrics.snapshot()))
        # Results tell it too, but only to a frontend that has something here, not to one that stays away.
        for frontend in self._frontends.values():
            if frontend.attached and not frontend.gone and frontend.channel.flush():
                frontend.channel.send(Backlog(self._others(frontend), self._last_batch))


def serve(start: StartWorker, control: Channel) -> None:
    """The worker process: load the model, tell the supervisor, drive it until told to stop."""
    settings = start.settings
    module, _, function = start.runner.partition(":")
    build: Callable[..., Runner] = getattr(importlib.import_module(module), function)
    runner = build(
        settings.model,
        start.provisioned.weights,
        dtype=settings.dtype,
        device=start.device,
        threads=settings.threads,
        preprocessing=PREPROCESSING_ID,
        warm_up=[PixelShape(height, width, "uint8") for height, width in settings.warm_up_sizes],
        dataset=settings.dataset,
        backbone=settings.backbone,
        provisioned=start.provisioned,
        parity_folder=str(settings.cache_folder / "parity") if settings.parity_check else None,
        projections=settings.projections,
    )
    metrics = Metrics()
    info = runner.info
    metrics.model_info.set(1, info.name, info.weights, info.fingerprint, info.dtype, info.device)
    for step, seconds in runner.load_seconds.items():
        metrics.model_load_seconds.set(seconds, step)
    for proof in info.parity_check.outputs:
        if proof.dtype == info.dtype:
            metrics.parity_cosine.set(proof.least_cosine, proof.output)
    log.log(logging.INFO if info.parity_check.verified else logging.WARNING, "parity check: %s", info.parity_check)
    control.send(Ready(info))
    control.flush()
    Worker(runner, settings, control, metrics).run()

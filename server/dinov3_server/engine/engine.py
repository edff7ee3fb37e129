"""Admit requests and have their rows computed by the workers, also when a worker dies. The frontend's side.

A request holds a *reservation*: places in the queue and a range of the arena, taken before anything is decoded. Its
rows go to workers in *jobs*. The range is freed only when the request has released it and every row that was given to
a worker is answered, or that worker has been reaped. So a cancelled request whose batch is on the device keeps its
range until then, or its features would overwrite the next request.

When a worker dies, rows that were only queued are submitted again. Rows that were announced as going to the device are
*suspects*: they are submitted again in quarantine, each to run in a batch of its own. A row fails only if a worker dies
while it runs that row alone; a single SIGKILL does not count, as it may come from outside. So a poisonous image costs
two workers, or three if they die of SIGKILL, and costs the other images of its batch only time.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence

from dinov3_server.config.settings import Settings
from dinov3_server.engine.admission import Admission, Reservation, retry_in
from dinov3_server.engine.arena import Arena
from dinov3_server.engine.block import Block
from dinov3_server.engine.channel import Channel, ChannelClosed
from dinov3_server.engine.forecast import SPREAD_IMAGES, Demand, Forecast, predict
from dinov3_server.engine.messages import (
    Attach,
    Cancel,
    Dropped,
    Hello,
    JobResult,
    LoadReport,
    Results,
    Started,
    total_load,
)
from dinov3_server.engine.pace import Pace
from dinov3_server.engine.shares import ANONYMOUS
from dinov3_server.engine.worker_connection import BlockResult, Run, SubmittedJob, WorkerConnection
from dinov3_server.errors import DeadlineExceeded, InternalError, Overloaded, Unavailable
from dinov3_server.metrics import Metrics
from dinov3_server.models.interface import ModelInfo, PixelShape

log = logging.getLogger(__name__)


class Engine:
    """All workers, as one frontend sees them. All methods must be called in the frontend's event loop."""

    def __init__(self, arena: Arena, settings: Settings, metrics: Metrics, frontends: int = 1) -> None:
        """Make an engine without workers. `frontends` is the number of frontends, including this one."""
        self.admission = Admission(arena, settings.max_queue_images, settings.max_wait_seconds, metrics)
        self.model: ModelInfo | None = None
        self.on_model: Callable[[], None] = lambda: None  # called whenever a worker becomes ready
        self._settings = settings
        self._other_frontends = frontends - 1
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._channels: dict[int, Channel] = {}  # by worker index, from the connection on
        self._blocked: set[Channel] = set()  # with bytes that their socket has not taken yet
        self._workers: dict[int, WorkerConnection] = {}  # by worker index, from Hello on
        self._paces: dict[int, Pace] = {}  # by worker index: a successor has the same device
        self._job_count = 0
        self._unassigned: list[SubmittedJob] = []  # while no worker is ready; in the order of their requests
        self._expected: dict[int, float] = {}  # by index of a dead worker: when its successor is expected

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(worker.info.device for _, worker in sorted(self._workers.items()))

    # --- requests --------------------------------------------------------------------------------

    def reserve(self, demand: Demand, deadline: float | None) -> Reservation:
        """Admit a request and return its reservation.

        Raises:
            Unavailable: no worker has been ready yet, or none is expected before the deadline.
            InvalidInput, Overloaded: as `Admission.reserve`.
        """
        if self.model is None:
            raise Unavailable("the model is still being loaded", reason="starting")
        self._check_worker(deadline)
        return self.admission.reserve(demand, deadline, self.forecast)

    def refuse_early(self, demand: Demand, deadline: float | None) -> None:
        """Raise Overloaded if `demand`, which is less than the real one, cannot end in time. Cheap.

        Does nothing unless the last request was refused for time. So most requests are refused before they are read
        while there is the least CPU time for reading them.
        """
        if self.admission.overloaded:
            self.admission.check_time(demand, deadline, self.forecast)

    def forecast(self, demand: Demand, quick: bool = False) -> Forecast:
        """Predict how long `demand` will take if it is admitted now. A `quick` forecast may overestimate the wait."""
        now = time.monotonic()
        others = total_load(worker.load(now) for worker in self._workers.values())
        queued = self.admission.queued
        ahead = queued.most_ahead(others)
        if ahead and not quick:
            ahead = queued.ahead(demand, others, self._other_frontends)
        paces = [worker.pace for worker in self._workers.values()] or list(self._paces.values()) or [Pace()]
        settings = self._settings
        full = min(settings.max_batch_images * demand.tokens // demand.images, settings.max_batch_tokens)
        return predict(demand, ahead, paces, full, self._seconds_to_worker(now), now)

    def update_gauges(self) -> None:
        """Set the gauges of the arena and of the expected wait."""
        self.admission.update_gauges()
        if self.model is not None:
            size = self._settings.warm_up_sizes[0] if self._settings.warm_up_sizes else (224, 224)
            tokens = self.model.tokens(PixelShape(*size, "uint8"))
            expected = self.forecast(Demand(images=1, nbytes=0, tokens=tokens, caller=ANONYMOUS, bulk=False))
            self._metrics.expected_wait_seconds.set(expected.wait)

    async def run(
        self, reservation: Reservation, block: Block, rows: Sequence[int], deadline: float | None, bulk: bool
    ) -> BlockResult:
        """Compute the features of `rows` of `block`, whose pixels are in the range of the reservation.

        `deadline` is in seconds of time.monotonic(). Cancelling this coroutine cancels the rows.

        Raises:
            DeadlineExceeded: the deadline passed first.
            Overloaded: the rows cannot end before the deadline, and were not started.
            Unavailable: no worker is ready, and none is expected before the deadline.
        """
        run = Run(block, reservation, deadline, bulk, time.monotonic(), self._loop.create_future(), set(rows))
        if not rows:
            return BlockResult({}, run.enqueued, ())
        self._check_worker(deadline)
        for chunk in self._spread(list(rows)):
            self._assign(self._new_job(run, chunk, quarantined=False))
        timer = None if deadline is None else self._loop.call_at(deadline, self._expire, run)
        try:
            await run.done
        finally:
            if timer is not None:
                timer.cancel()
            if run.unanswered:
                self._abandon(run)
                if not run.done.cancelled():
                    run.done.exception()  # mark it as retrieved, also if this coroutine was cancelled just then
        return BlockResult(run.failed, run.enqueued, run.batches)

    def _seconds_to_worker(self, now: float) -> float:
        """Return the seconds until a worker is expected to be ready; 0 while one is."""
        return 0.0 if self._workers else max(0.0, min(self._expected.values(), default=now) - now)

    def _check_worker(self, deadline: float | None) -> None:
        """Raise Unavailable if no worker is expected before the deadline."""
        now = time.monotonic()
        wait = self._seconds_to_worker(now)
        if deadline is not None and wait and deadline < now + wait:
            wait = max(0.1, wait)
            raise Unavailable(
                f"no worker is running; one is expected in {wait:.1f} s", reason="no_worker", retry_after=wait
            )

    def _spread(self, rows: list[int]) -> list[list[int]]:
        """Split rows into jobs, so that a large request is computed by several workers if there are any."""
        if len(self._workers) < 2:
            return [rows]
        return [rows[i : i + SPREAD_IMAGES] for i in range(0, len(rows), SPREAD_IMAGES)]

    def _new_job(self, run: Run, rows: Sequence[int], quarantined: bool) -> SubmittedJob:
        self._job_count += 1
        return SubmittedJob(self._job_count, run, set(rows), quarantined)

    def _assign(self, job: SubmittedJob) -> None:
        """Submit the job to the worker with the fewest tokens to compute, or keep it until a worker is ready."""
        if not self._workers:
            self._unassigned.append(job)
            return
        worker = min(self._workers.values(), key=lambda candidate: candidate.own_tokens + candidate.others.tokens)
        worker.submit(job)
        self._flush(worker.channel)

    def _expire(self, run: Run) -> None:
        """Fail a run whose deadline has passed, saying where it waited."""
        if run.ended:
            return
        jobs = self._jobs_of(run)
        if any(job.worker is None for job in jobs):
            where = "waiting for a worker to restart"
        elif any(job.started for job in jobs):
            where = "on the device"
        else:
            where = "waiting for the device"
        waited = time.monotonic() - run.enqueued
        error = DeadlineExceeded(f"the deadline passed after {waited:.3f} s in the engine, {where}")
        run.done.set_exception(error)

    def _abandon(self, run: Run) -> None:
        """Cancel the rows of a run that are not answered, as their results are no longer wanted."""
        for job in self._jobs_of(run):
            if job.worker is None:
                self._unassigned.remove(job)
                reason = "expired" if run.done.done() and not run.done.cancelled() else "cancelled"
                self._metrics.images.inc(reason, value=len(job.rows))
            else:
                job.worker.channel.send(Cancel(job.index))
                self._flush(job.worker.channel)

    def _jobs_of(self, run: Run) -> list[SubmittedJob]:
        jobs = [job for worker in self._workers.values() for job in worker.jobs.values() if job.run is run]
        return jobs + [job for job in self._unassigned if job.run is run]

    # --- workers ---------------------------------------------------------------------------------

    def connect(self, index: int, fd: int) -> None:
        """Send the arena to worker `index` over the channel `fd`. The worker is used once its Hello arrives.

        Raises:
            OSError: this process has no descriptor left for the channel; the worker sees it closed.
        """
        if fd < 0:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        channel = Channel(socket.socket(fileno=fd))
        if index in self._channels:  # requested twice
            channel.close()
            return
        try:
            channel.send(Attach(self.admission.arena.nbytes), [self.admission.arena.fd])
        except OSError:
            channel.close()
            raise
        self._channels[index] = channel
        self._loop.add_reader(channel.fileno(), self._read, index, channel)
        self._flush(channel)

    def worker_gone(self, index: int, restart_seconds: float, killed: bool = False) -> None:
        """Take back the rows of worker `index`, which the supervisor has reaped, and submit them anew.

        A successor is expected in `restart_seconds`. `killed`: the worker died of SIGKILL, which may have come from
        outside, so a single such death does not show that a row caused it.
        """
        self._expected[index] = time.monotonic() + restart_seconds
        channel = self._channels.pop(index, None)
        if channel is None:
            return  # it died before it was ready, or before it was connected to this frontend
        self._read(index, channel)  # messages that it sent before it died
        self._loop.remove_reader(channel.fileno())
        self._stop_writing(channel)
        channel.close()
        worker = self._workers.pop(index, None)
        if worker is None:
            return
        for job in worker.jobs.values():
            job.run.reservation.drop_references(len(job.rows))
        # In the order of their requests, queued rows before suspects.
        jobs = sorted(worker.jobs.values(), key=lambda job: (job.run.enqueued, job.index))
        suspects = []
        for job in jobs:
            if job.run.ended:
                continue
            queued = job.rows - job.started
            if job.quarantined and job.started and (job.killed or not killed):
                self._fail_started(job)
            elif job.started:
                suspect = self._new_job(job.run, sorted(job.started), quarantined=True)
                suspect.killed = job.quarantined
                suspects.append(suspect)
            if queued:
                self._assign(self._new_job(job.run, sorted(queued), job.quarantined))
        for suspect in suspects:
            self._assign(suspect)

    def _fail_started(self, job: SubmittedJob) -> None:
        """Fail the row of a quarantined job that was on the device when the worker died."""
        for row in job.started:
            error = InternalError("worker processes died while they computed this image, the last one alone with it")
            log.error("image %d of a request killed a worker alone (error id %s)", row, error.error_id)
            job.run.failed[row] = error
        job.run.resolve(tuple(job.started))

    def _read(self, index: int, channel: Channel) -> None:
        """Handle the messages of a worker that have arrived."""
        try:
            for message, _ in channel.receive():
                match message:
                    case Results(jobs, others, batch):
                        worker = self._workers[index]
                        worker.update_load(others, batch)
                        for result in jobs:
                            self._on_result(worker, result)
                    case Started(jobs):
                        for job, rows in jobs:
                            self._workers[index].start(job, rows)
                    case Dropped(job, rows, reason):
                        self._on_dropped(self._workers[index], job, rows, reason)
                    case LoadReport(others, batch):
                        self._workers[index].update_load(others, batch)
                    case Hello(info):
                        self._on_hello(index, channel, info)
        except ChannelClosed:
            # The process is dying, but it may access the arena until it has been reaped.
            self._loop.remove_reader(channel.fileno())
            self._stop_writing(channel)

    def _on_hello(self, index: int, channel: Channel, info: ModelInfo) -> None:
        self.model = info
        self._expected.pop(index, None)
        self._workers[index] = WorkerConnection(channel, info, self._paces.setdefault(index, Pace()))
        unassigned, self._unassigned = self._unassigned, []
        for job in unassigned:
            self._assign(job)
        self.on_model()

    def _on_dropped(self, worker: WorkerConnection, index: int, rows: Sequence[int], reason: str) -> None:
        job = worker.answer(index, rows)
        run = job.run
        run.reservation.dequeue(job.tokens * len(rows))
        if reason == "late" and not run.ended:
            expected = self.forecast(run.reservation.demand)
            left = max(0.0, (run.deadline or 0.0) - time.monotonic())
            error = Overloaded(
                f"after {time.monotonic() - run.enqueued:.2f} s of waiting, {left:.2f} s are left before the deadline "
                "and computing takes longer: send fewer requests at once, or allow more time",
                reason="late",
                retry_after=retry_in(expected.wait),
            )
            run.done.set_exception(error)
        elif reason != "late":
            self._metrics.images.inc(reason, value=len(rows))
            if not run.ended:
                self._expire(run)  # the worker saw the deadline pass a moment before this process does

    def _on_result(self, worker: WorkerConnection, result: JobResult) -> None:
        run = worker.answer(result.job, result.rows).run
        for row, message in result.failed.items():
            error = InternalError(message)
            log.error("image %d of a request: %s", row, error)
            run.failed[row] = error
        run.batches.append(result)
        run.resolve(result.rows)

    def _flush(self, channel: Channel) -> None:
        """Write what the socket takes now, and the rest as soon as it takes more."""
        if not channel.flush():
            self._blocked.add(channel)
            self._loop.add_writer(channel.fileno(), self._flush, channel)
        elif channel in self._blocked:
            self._stop_writing(channel)

    def _stop_writing(self, channel: Channel) -> None:
        self._blocked.discard(channel)
        self._loop.remove_writer(channel.fileno())

    def close(self) -> None:
        for channel in self._channels.values():
            self._loop.remove_reader(channel.fileno())
            self._stop_writing(channel)
            channel.close()
        self.admission.arena.close()

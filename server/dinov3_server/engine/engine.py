"""The frontend's side of the engine: admission, submitting rows to workers, and what happens when one dies.

A request holds a *reservation*: slots in the queue and a range of the arena, both taken before anything is
decoded. Its rows go to workers in *parts*. A range is freed only when the request has released it and
every row that a worker was given is answered or that worker is reaped: a cancelled call whose batch is
running keeps its range until then, or the next request would be written over.

When a worker dies, rows that were only queued are submitted again. Rows that it had announced as going
to the device are suspects and run again each in a batch of its own; one that kills a worker all alone
fails. That costs a poisonous image two workers, and its neighbours nothing but time.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dinov3_server.config.settings import Settings
from dinov3_server.engine.admission import Admission, Reservation, retry_in
from dinov3_server.engine.arena import Arena
from dinov3_server.engine.block import Block
from dinov3_server.engine.channel import Channel, ChannelClosed
from dinov3_server.engine.forecast import SPREAD_IMAGES, Demand, Forecast, predict
from dinov3_server.engine.messages import (
    NO_LOAD,
    Attach,
    Backlog,
    Cancel,
    Dropped,
    Hello,
    Load,
    PartResult,
    Results,
    Started,
    Submit,
)
from dinov3_server.engine.pace import BatchTime, Pace
from dinov3_server.engine.shares import ANONYMOUS
from dinov3_server.errors import DeadlineExceeded, InternalError, Overloaded, ServingError, Unavailable
from dinov3_server.metrics import Metrics
from dinov3_server.models.interface import ModelInfo, PixelShape

log = logging.getLogger(__name__)


class BlockResult(NamedTuple):
    """What became of the rows of a block. `failed` maps a row to its error; the others have features."""

    failed: dict[int, ServingError]
    queue_seconds: float
    inference_seconds: float
    batch_images: int
    batches: int


@dataclass(eq=False)
class _Call:
    """One `run`: rows of a block that somebody waits for."""

    block: Block
    reservation: Reservation
    deadline: float | None
    bulk: bool
    enqueued: float
    done: asyncio.Future[None]
    waiting: set[int]
    failed: dict[int, ServingError] = field(default_factory=dict)
    queue_seconds: float = 0.0
    inference_seconds: float = 0.0
    batch_images: int = 0
    batches: int = 0

    def resolve(self, rows: Sequence[int]) -> None:
        self.waiting.difference_update(rows)
        if not self.waiting and not self.done.done():
            self.done.set_result(None)

    @property
    def over(self) -> bool:
        """Nobody waits any more: it was answered, it was cancelled, or its time is up."""
        return self.done.done()


@dataclass(eq=False)
class _Part:
    """Rows of a call that one worker has, or (`worker` None) that wait for one."""

    index: int
    call: _Call
    rows: set[int]
    solo: bool = False
    killed: bool = False  # a worker was killed by SIGKILL while it ran this part alone
    worker: _Worker | None = None
    tokens: int = 0  # of a row, once a worker has it
    started: set[int] = field(default_factory=set)


@dataclass(eq=False)
class _Worker:
    """A worker that has introduced itself."""

    channel: Channel
    info: ModelInfo
    pace: Pace
    parts: dict[int, _Part] = field(default_factory=dict)
    own_tokens: int = 0
    running_tokens: int = 0  # of our own, on the device
    others: Load = NO_LOAD  # as last heard

    @property
    def backlog(self) -> int:
        return self.own_tokens + self.others.tokens

    def hear(self, others: Load, batch: BatchTime | None) -> None:
        self.others = others
        if batch is not None:
            self.pace.observe(batch, time.monotonic())


class Engine:
    """All the workers, as one frontend sees them. Lives in the frontend's event loop."""

    def __init__(self, arena: Arena, settings: Settings, metrics: Metrics, frontends: int = 1) -> None:
        """`frontends` is how many there are, this one among them."""
        self.admission = Admission(arena, settings.max_queue_images, settings.max_wait_seconds, metrics)
        self.model: ModelInfo | None = None
        self.on_model: Callable[[], None] = lambda: None  # called whenever a worker has introduced itself
        self._settings = settings
        self._other_frontends = frontends - 1
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._channels: dict[int, Channel] = {}  # by worker index, from the connection on
        self._blocked: set[Channel] = set()  # with bytes that their socket has not taken yet
        self._workers: dict[int, _Worker] = {}  # by worker index, from Hello on
        self._paces: dict[int, Pace] = {}  # by worker index; a successor has the same device
        self._parts_made = 0
        self._homeless: list[_Part] = []  # no worker lives; in the order of their requests
        self._expected: dict[int, float] = {}  # by index of a dead worker: when its successor is expected

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(worker.info.device for _, worker in sorted(self._workers.items()))

    # --- requests --------------------------------------------------------------------------------

    def reserve(self, demand: Demand, deadline: float | None) -> Reservation:
        """Take room for a request; see `Admission.reserve`. Raises Unavailable before the first worker."""
        if self.model is None:
            raise Unavailable("the model is still being loaded", reason="starting")
        self._check_worker(deadline)
        return self.admission.reserve(demand, deadline, self.forecast)

    def check_time(self, demand: Demand, deadline: float | None) -> None:
        """While requests are refused, raise Overloaded where `demand`, an estimate from below, would be too.

        So most are refused before they are read, when the cores have the least time for it.
        """
        if self.admission.overloaded:
            self.admission.check_time(demand, deadline, self.forecast)

    def forecast(self, demand: Demand, quick: bool = False) -> Forecast:
        """Predict how long `demand` will take if it is admitted now; `quick` may tell a longer wait than there is."""
        now = time.monotonic()
        running = interactive = bulk = 0
        for worker in self._workers.values():
            running += worker.others.running + worker.running_tokens
            interactive += worker.others.interactive
            bulk += worker.others.bulk
        others = Load(running, interactive, bulk)
        waiting = self.admission.waiting
        ahead = waiting.most_ahead(others)
        if ahead and not quick:
            ahead = waiting.ahead(demand, others, self._other_frontends)
        paces = [worker.pace for worker in self._workers.values()] or list(self._paces.values()) or [Pace()]
        settings = self._settings
        full = min(settings.max_batch_images * demand.tokens // demand.images, settings.max_batch_tokens)
        return predict(demand, ahead, paces, full, self._back_in(now), now)

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
        """Compute features of `rows` of `block`, whose pixels lie in the reservation's range.

        `deadline` is in CLOCK_MONOTONIC seconds. Cancelling the caller cancels the rows.

        Raises:
            DeadlineExceeded: the deadline passed first.
            Overloaded: the rows cannot end before the deadline, and were not started.
            Unavailable: no worker lives, and none is expected before the deadline.
        """
        call = _Call(block, reservation, deadline, bulk, time.monotonic(), self._loop.create_future(), set(rows))
        if not rows:
            return BlockResult({}, 0.0, 0.0, 0, 0)
        self._check_worker(deadline)
        for chunk in self._spread(list(rows)):
            self._place(self._new_part(call, chunk, solo=False))
        timer = None if deadline is None else self._loop.call_at(deadline, self._expire, call)
        try:
            await call.done
        finally:
            if timer is not None:
                timer.cancel()
            if call.waiting:
                self._abandon(call)
                if not call.done.cancelled():
                    call.done.exception()  # seen, also where the caller was cancelled at the same moment
        return BlockResult(call.failed, call.queue_seconds, call.inference_seconds, call.batch_images, call.batches)

    def _back_in(self, now: float) -> float:
        """Return the seconds until a worker is expected to live; 0 while one does."""
        return 0.0 if self._workers else max(0.0, min(self._expected.values(), default=now) - now)

    def _check_worker(self, deadline: float | None) -> None:
        """Raise Unavailable where no worker is expected before the deadline."""
        now = time.monotonic()
        wait = self._back_in(now)
        if deadline is not None and wait and deadline < now + wait:
            wait = max(0.1, wait)
            raise Unavailable(f"no worker lives; one is expected in {wait:.1f} s", reason="no_worker", retry_after=wait)

    def _spread(self, rows: list[int]) -> list[list[int]]:
        if len(self._workers) < 2:
            return [rows]
        return [rows[i : i + SPREAD_IMAGES] for i in range(0, len(rows), SPREAD_IMAGES)]

    def _new_part(self, call: _Call, rows: Sequence[int], solo: bool) -> _Part:
        self._parts_made += 1
        return _Part(self._parts_made, call, set(rows), solo)

    def _place(self, part: _Part) -> None:
        """Give the part to the worker with the least to do, or keep it until one lives."""
        if not self._workers:
            self._homeless.append(part)
            return
        worker = min(self._workers.values(), key=lambda candidate: candidate.backlog)
        call = part.call
        part.worker = worker
        worker.parts[part.index] = part
        part.tokens = worker.info.tokens(call.block.shape)
        worker.own_tokens += part.tokens * len(part.rows)
        call.reservation.hold(len(part.rows))
        worker.channel.send(
            Submit(
                part=part.index,
                block=call.block,
                rows=tuple(sorted(part.rows)),
                enqueued=call.enqueued,
                deadline=call.deadline,
                bulk=call.bulk,
                solo=part.solo,
                caller=call.reservation.demand.caller,
            )
        )
        self._flush(worker.channel)

    def _expire(self, call: _Call) -> None:
        if call.over:
            return
        parts = self._parts_of(call)
        if any(part.worker is None for part in parts):
            where = "waiting for a worker to come back"
        elif any(part.started for part in parts):
            where = "on the device"
        else:
            where = "waiting for the device"
        waited = time.monotonic() - call.enqueued
        error = DeadlineExceeded(f"the deadline passed after {waited:.3f} s in the engine, {where}")
        call.done.set_exception(error)

    def _abandon(self, call: _Call) -> None:
        """Nobody waits for the call any more: have its rows dropped, as far as they have not run."""
        for part in self._parts_of(call):
            if part.worker is None:
                self._homeless.remove(part)
                reason = "expired" if call.done.done() and not call.done.cancelled() else "cancelled"
                self._metrics.images.inc(reason, value=len(part.rows))
            else:
                part.worker.channel.send(Cancel(part.index))
                self._flush(part.worker.channel)

    def _parts_of(self, call: _Call) -> list[_Part]:
        parts = [part for worker in self._workers.values() for part in worker.parts.values() if part.call is call]
        return parts + [part for part in self._homeless if part.call is call]

    # --- workers ---------------------------------------------------------------------------------

    def connect(self, index: int, fd: int) -> None:
        """The supervisor connects worker `index`: hand it the arena and wait for its Hello.

        Raises:
            OSError: this process has no descriptor left for the channel; the worker sees it closed.
        """
        if fd < 0:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        channel = Channel(socket.socket(fileno=fd))
        if index in self._channels:  # asked for again, and connected meanwhile
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

    def worker_gone(self, index: int, back_in: float, killed: bool = False) -> None:
        """Take back the rows of worker `index`, which the supervisor has reaped, and place them anew.

        `killed`: by SIGKILL, which may have come from outside. One such death does not show that a row caused it.
        """
        self._expected[index] = time.monotonic() + back_in
        channel = self._channels.pop(index, None)
        if channel is None:
            return  # it died before it was ready, or before it was connected with this frontend
        self._read(index, channel)  # what it had said before it died
        self._loop.remove_reader(channel.fileno())
        self._stop_writing(channel)
        channel.close()
        worker = self._workers.pop(index, None)
        if worker is None:
            return
        for part in worker.parts.values():
            part.call.reservation.let_go(len(part.rows))
        # In the order of their requests, the untouched ones before the suspects.
        parts = sorted(worker.parts.values(), key=lambda part: (part.call.enqueued, part.index))
        suspects = []
        for part in parts:
            if part.call.over:
                continue
            untouched = part.rows - part.started
            if part.solo and part.started and (part.killed or not killed):
                self._blame(part)
            elif part.started:
                suspect = self._new_part(part.call, sorted(part.started), solo=True)
                suspect.killed = part.solo
                suspects.append(suspect)
            if untouched:
                self._place(self._new_part(part.call, sorted(untouched), part.solo))
        for part in suspects:
            self._place(part)

    def _blame(self, part: _Part) -> None:
        for row in part.started:
            error = InternalError("worker processes died while they computed this image, the last one alone with it")
            log.error("image %d of a request killed a worker alone (error id %s)", row, error.error_id)
            part.call.failed[row] = error
        part.call.resolve(tuple(part.started))

    def _read(self, index: int, channel: Channel) -> None:
        try:
            for message, _ in channel.receive():
                match message:
                    case Results(parts, others, batch):
                        worker = self._workers[index]
                        worker.hear(others, batch)
                        for result in parts:
                            self._take(worker, result)
                    case Started(parts):
                        for index_of_part, rows in parts:
                            self._start(self._workers[index], index_of_part, rows)
                    case Dropped(part_index, rows, reason):
                        self._drop(self._workers[index], part_index, rows, reason)
                    case Backlog(others, batch):
                        self._workers[index].hear(others, batch)
                    case Hello(info):
                        self._hello(index, channel, info)
        except ChannelClosed:
            # The process is dying; only once it is reaped is the arena out of its reach.
            self._loop.remove_reader(channel.fileno())
            self._stop_writing(channel)

    def _hello(self, index: int, channel: Channel, info: ModelInfo) -> None:
        self.model = info
        self._expected.pop(index, None)
        self._workers[index] = _Worker(channel, info, self._paces.setdefault(index, Pace()))
        homeless, self._homeless = self._homeless, []
        for part in homeless:
            self._place(part)
        self.on_model()

    def _start(self, worker: _Worker, index: int, rows: Sequence[int]) -> None:
        part = worker.parts[index]
        before = len(part.started)
        part.started.update(rows)
        worker.running_tokens += part.tokens * (len(part.started) - before)
        part.call.reservation.stop_waiting(part.tokens * len(rows))

    def _drop(self, worker: _Worker, index: int, rows: Sequence[int], reason: str) -> None:
        """The worker has dropped rows: they were cancelled, or their time is up, or will be before they could end."""
        part = self._answered(worker, index, rows)
        part.call.reservation.stop_waiting(part.tokens * len(rows))
        call = part.call
        if reason == "late" and not call.over:
            expected = self.forecast(call.reservation.demand)
            left = max(0.0, (call.deadline or 0.0) - time.monotonic())
            error = Overloaded(
                f"after {time.monotonic() - call.enqueued:.2f} s of waiting, {left:.2f} s are left before the deadline "
                "and computing takes longer: send fewer requests at once, or allow more time",
                reason="late",
                retry_after=retry_in(expected.wait),
            )
            call.done.set_exception(error)
        elif reason != "late":
            self._metrics.images.inc(reason, value=len(rows))
            if not call.over:
                self._expire(call)  # its deadline passed in the worker a moment before it does here

    def _take(self, worker: _Worker, result: PartResult) -> None:
        part = self._answered(worker, result.part, result.rows)
        call = part.call
        for row, message in result.failed.items():
            error = InternalError(message)
            log.error("image %d of a request: %s", row, error)
            call.failed[row] = error
        call.queue_seconds = max(call.queue_seconds, result.queue_seconds)
        call.inference_seconds += result.inference_seconds
        call.batch_images = max(call.batch_images, result.batch_images)
        call.batches += 1
        call.resolve(result.rows)

    def _answered(self, worker: _Worker, index: int, rows: Sequence[int]) -> _Part:
        part = worker.parts[index]
        before = len(part.started)
        part.rows.difference_update(rows)
        part.started.difference_update(rows)
        worker.own_tokens -= part.tokens * len(rows)
        worker.running_tokens -= part.tokens * (before - len(part.started))
        if not part.rows:
            del worker.parts[index]
        part.call.reservation.let_go(len(rows))
        return part

    def _flush(self, channel: Channel) -> None:
        """Write now, and the rest when the socket takes it."""
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

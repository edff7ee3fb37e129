"""Decide which rows run next on a worker. Pure: no device, no threads, no clock; calls are given the time.

A *shape queue* holds the jobs whose rows may share a batch: those of one pixel shape. A quarantined job, whose rows run
in batches of their own, has a queue to itself. A batch takes as many rows as its queue has and the budget allows, so
that interleaved shapes do not split batches: a backlog drains in the fewest possible batches.

Which queue is next, and the order of its rows:

- Three batches of four go by *urgency*: interactive before bulk, then the caller that received the least of the device
  (`shares.py`), then the job with fewer rows, then the older one. A short request overtakes any number of long ones;
  requests of similar size run one after the other. (Row by row in turn, all of them would end late and at the same
  time, and the device would idle while their callers prepare the next.)
- Every fourth batch goes by the callers' *shares* alone, and to the oldest job of its caller. So bulk keeps a quarter
  of the device however much interactive work arrives, and a long job is not starved by short ones of the same caller.

A batch is filled in portions, and shares are counted after each: a caller with a thousand queued rows and one with a
single row get into the same batch.

A row starts only if it is predicted to end before its deadline (`pace.py`); otherwise its job is dropped and returned
by `expire`: its caller sees `late`, or `expired` if the deadline has passed. Rows with short deadlines may arrive while
a batch runs: therefore no batch takes longer than a quarter of the shortest recent deadline, as long as the device
stays efficient.

If rows of a shape arrive slowly, batches are far from full; `max_queue_delay_seconds` helps if that costs more than the
wait. Adding a job costs O(log jobs), a batch O(queues * callers + its jobs * log jobs).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dinov3_server.engine.pace import Pace
from dinov3_server.engine.shares import ANONYMOUS, Caller, Shares

JobKey = tuple[int, int]  # (frontend, number of the job)

# One of this many batches goes by shares alone. 4 leaves three quarters of the device to urgent rows, which wait for at
# most one such batch.
SHARE_TURN = 4
# The number of portions in which a batch is filled if several callers have rows for it.
PORTIONS = 8
# The fraction of the shortest recent deadline that a batch may take, and for how many seconds a deadline is recent.
DEADLINE_FRACTION = 0.25
DEADLINE_MEMORY = 10.0
# Dead heap entries beyond twice the live ones that are tolerated before a clean-up.
SLACK = 16


class Limits(NamedTuple):
    """Limits of one batch. A batch that is not full waits up to `max_queue_delay_seconds` for more rows."""

    max_batch_images: int
    max_batch_tokens: int
    max_queue_delay_seconds: float


@dataclass(slots=True)
class Job:
    """Rows of one request, all of one pixel shape. Times are in seconds of time.monotonic()."""

    key: JobKey
    shape: Hashable  # rows of different shapes never share a batch
    tokens: int  # per row; the same for all jobs of a shape
    rows: tuple[int, ...]  # indices in the request's block, ascending
    enqueued: float  # set by the frontend; a job submitted again after a crash keeps it
    deadline: float | None
    bulk: bool  # of lower priority
    quarantined: bool = False  # each row runs in a batch of its own: it may have killed a worker
    payload: Any = None  # not read by the scheduler
    caller: Caller = ANONYMOUS


class BatchRow(NamedTuple):
    """A row of a batch."""

    job: Job
    row: int


@dataclass(slots=True, eq=False)
class _Entry:
    """A queued job, of which `taken` rows have left the queue."""

    job: Job
    taken: int = 0

    @property
    def remaining(self) -> int:
        return len(self.job.rows) - self.taken

    @property
    def live(self) -> bool:
        return self.taken < len(self.job.rows)


# Lowest first. The last item is a serial number, so that no two are equal.
Rank = tuple[float, ...]


class _Heap:
    """Entries by rank. The first one is live, as `prune` is called whenever an entry has ended."""

    def __init__(self) -> None:
        self._items: list[tuple[Rank, _Entry]] = []

    def __bool__(self) -> bool:
        return bool(self._items)

    def push(self, rank: Rank, entry: _Entry) -> None:
        heapq.heappush(self._items, (rank, entry))

    @property
    def rank(self) -> Rank:
        """The rank of the first entry."""
        return self._items[0][0]

    @property
    def first(self) -> _Entry:
        return self._items[0][1]

    def prune(self, live: int) -> None:
        """Remove dead entries from the top, and all of them if they far outnumber the `live` ones."""
        if len(self._items) > 2 * live + SLACK:
            self._items = [item for item in self._items if item[1].live]
            heapq.heapify(self._items)
        while self._items and not self.first.live:
            heapq.heappop(self._items)


@dataclass(slots=True)
class _CallerQueue:
    """The jobs of one caller in a shape queue."""

    caller: Caller
    jobs: int = 0
    by_urgency: _Heap = field(default_factory=_Heap)
    by_age: _Heap = field(default_factory=_Heap)


@dataclass(slots=True)
class _ShapeQueue:
    """Jobs whose rows may share a batch. Exists only while it has any."""

    shape: Hashable
    tokens: int
    quarantined: bool
    images: int = 0
    callers: dict[Caller, _CallerQueue] = field(default_factory=dict)

    @property
    def oldest(self) -> float:
        """When the oldest job was enqueued."""
        return min(caller_queue.by_age.rank[0] for caller_queue in self.callers.values())


def _queue_key(job: Job) -> Hashable:
    """Return what identifies the shape queue of a job."""
    return (job.shape, job.key if job.quarantined else None)


class Scheduler:
    """The queue of one worker. `now` is in seconds of time.monotonic() and never decreases between calls."""

    def __init__(self, limits: Limits, pace: Pace | None = None) -> None:
        self._limits = limits
        self._pace = pace or Pace()
        self._shares = Shares()
        self._ceilings: dict[Hashable, int] = {}
        self._jobs: dict[JobKey, _Entry] = {}
        self._queues: dict[Hashable, _ShapeQueue] = {}
        self._deadlines = _Heap()
        self._expired: dict[JobKey, tuple[Job, tuple[int, ...]]] = {}  # not yet reported
        self._shortest = (math.inf, -math.inf)  # the shortest recent deadline in seconds, and when it was seen
        self._serial = 0
        self._batches = 0
        self._images = 0

    @property
    def queued_images(self) -> int:
        return self._images

    def add(self, job: Job, now: float) -> None:
        """Queue a job.

        Raises:
            ValueError: its key is queued already, it has no rows, one of its rows exceeds the token budget, or its
                tokens differ from those of its shape. Requests with any of these are refused before they get here.
        """
        if job.key in self._jobs or job.key in self._expired:
            raise ValueError(f"job {job.key} is queued already")
        if not job.rows:
            raise ValueError(f"job {job.key} has no rows")
        if job.tokens > self._limits.max_batch_tokens:
            raise ValueError(
                f"job {job.key}: a row of {job.tokens} tokens never fits a batch "
                f"of at most {self._limits.max_batch_tokens}"
            )
        key = _queue_key(job)
        queue = self._queues.get(key) or _ShapeQueue(job.shape, job.tokens, job.quarantined)
        if job.tokens != queue.tokens:
            raise ValueError(f"job {job.key}: {job.tokens} tokens a row, but {job.shape} has {queue.tokens}")
        self._queues[key] = queue
        caller_queue = queue.callers.get(job.caller)
        if caller_queue is None:
            caller_queue = queue.callers[job.caller] = _CallerQueue(job.caller)
        self._jobs[job.key] = entry = _Entry(job)
        self._shares.enter(job.caller)
        # A frontend may have read its clock after the worker read `now`.
        self._serial += 1
        enqueued, serial = min(job.enqueued, now), self._serial
        # Sizes are compared as powers of two: 60 rows count as 64.
        size = (len(job.rows) - 1).bit_length()
        caller_queue.by_urgency.push((job.bulk, size, enqueued, serial), entry)
        caller_queue.by_age.push((enqueued, serial), entry)
        caller_queue.jobs += 1
        if job.deadline is not None:
            self._deadlines.push((job.deadline, serial), entry)
            allowed = job.deadline - enqueued
            if allowed <= self._shortest_deadline(now):
                self._shortest = allowed, now
        queue.images += len(job.rows)
        self._images += len(job.rows)

    def cancel(self, key: JobKey) -> tuple[int, ...]:
        """Drop a job, and return its rows that were still queued; none if the key is unknown."""
        if key in self._expired:
            return self._expired.pop(key)[1]
        return self._drop(self._jobs[key]) if key in self._jobs else ()

    def remove_frontend(self, frontend: int) -> None:
        """Drop all jobs of a frontend that died, without reporting them."""
        for key in [key for key in (*self._jobs, *self._expired) if key[0] == frontend]:
            self.cancel(key)

    def expire(self, now: float) -> list[tuple[Job, tuple[int, ...]]]:
        """Drop the jobs that cannot end before their deadline. Returns each once, with its rows still queued."""
        self._drop_expired(now)
        expired, self._expired = self._expired, {}
        return list(expired.values())

    def limit_shape(self, shape: Hashable, max_images: int) -> None:
        """Limit later batches of `shape` to `max_images`, as more did not fit the device's memory.

        A ceiling is only lowered: a batch that was launched earlier may report a higher one later.
        """
        if max_images < 1:
            raise ValueError(f"a ceiling of {max_images} images would never run {shape}; at least 1")
        self._ceilings[shape] = min(max_images, self._ceilings.get(shape, max_images))

    def next_batch(self, now: float) -> list[BatchRow] | None:
        """Take and return the rows to run next: of one shape, within the limits, and predicted to end in time.

        Returns None if no row is ready. Jobs that cannot end in time are dropped, and reported by `expire`.
        """
        while (queue := self._next_queue(now)) is not None:
            if batch := self._fill(queue, now):
                self._batches += 1
                return batch
        return None

    def wakeup(self, now: float) -> float | None:
        """Return when to call `next_batch` and `expire` again if no other call comes before; None if never.

        It is `now` if `expire` has something to report.
        """
        self._drop_expired(now)
        if self._expired:
            return now
        times = [time for time in map(self._ready_at, self._queues.values()) if time > now]
        if self._deadlines:
            times.append(max(now, self._latest_start(self._deadlines.first.job, now)))
        return min(times, default=None)

    @property
    def _by_shares(self) -> bool:
        """Whether the next batch goes by shares alone."""
        return self._batches % SHARE_TURN == SHARE_TURN - 1

    def _rank(self, caller_queue: _CallerQueue) -> Rank:
        share = self._shares.rank(caller_queue.caller)
        if self._by_shares:
            return (*share, *caller_queue.by_age.rank)
        bulk, *rest = caller_queue.by_urgency.rank
        return (bulk, *share, *rest)

    def _next_queue(self, now: float) -> _ShapeQueue | None:
        """Return the shape queue of the next batch; None if none is ready."""
        self._drop_expired(now)
        ready = [queue for queue in self._queues.values() if self._ready_at(queue) <= now]
        if len(ready) < 2:
            return ready[0] if ready else None
        return min(ready, key=lambda queue: min(map(self._rank, queue.callers.values())))

    def _fill(self, queue: _ShapeQueue, now: float) -> list[BatchRow]:
        """Take the rows of a batch out of `queue`; none if all of its jobs turn out to be too late."""
        most = self._batch_limit(queue, now)
        trusted = self._pace.trusted(now)
        batch: list[BatchRow] = []
        while len(batch) < most and (callers := queue.callers):
            first = min(callers.values(), key=self._rank) if len(callers) > 1 else next(iter(callers.values()))
            portion = most if len(callers) == 1 else max(1, most // PORTIONS)
            entry = (first.by_age if self._by_shares else first.by_urgency).first
            job = entry.job
            if trusted and job.deadline is not None:
                within = self._pace.rows_within(queue.shape, queue.tokens, job.deadline - now, now)
                if within < 1 or self._remaining_seconds(entry, queue, now) > job.deadline - now:
                    self._expire(entry)
                    continue
                if within <= len(batch):
                    break  # it cannot wait for a batch of this size: it is first in the next one
                most = min(most, within)
            rows = self._take(entry, min(portion, most - len(batch)))
            self._shares.charge(job.caller, len(rows) * queue.tokens)
            batch += [BatchRow(job, row) for row in rows]
            self._remove_if_empty(entry)
        return batch

    def _remaining_seconds(self, entry: _Entry, queue: _ShapeQueue, now: float) -> float:
        """Return the predicted device time of all remaining rows of a job, if it had the device to itself."""
        whole = min(entry.remaining, self._capacity(queue))
        return self._pace.batch_seconds(queue.shape, queue.tokens, whole, now) * entry.remaining / whole

    def _capacity(self, queue: _ShapeQueue) -> int:
        """Return the most rows that a batch of this queue may hold."""
        if queue.quarantined:
            return 1
        images = self._limits.max_batch_images
        return min(images, self._limits.max_batch_tokens // queue.tokens, self._ceilings.get(queue.shape, images))

    def _batch_limit(self, queue: _ShapeQueue, now: float) -> int:
        """Return the most rows that a batch may hold if it starts now, by the capacity and by recent deadlines."""
        capacity = self._capacity(queue)
        shortest = self._shortest_deadline(now)
        if shortest == math.inf or not self._pace.trusted(now):
            return capacity
        within = self._pace.rows_within(queue.shape, queue.tokens, shortest * DEADLINE_FRACTION, now)
        return min(capacity, max(within, self._pace.efficient_rows(queue.shape, queue.tokens, now)))

    def _shortest_deadline(self, now: float) -> float:
        """Return the shortest recent deadline, in seconds from the request's arrival."""
        shortest, seen = self._shortest
        return shortest if now - seen <= DEADLINE_MEMORY else math.inf

    def _ready_at(self, queue: _ShapeQueue) -> float:
        """Return when a batch may start: at once if the queue fills it, else when the oldest row has waited enough."""
        if not self._limits.max_queue_delay_seconds or queue.images >= self._capacity(queue):
            return -math.inf
        return queue.oldest + self._limits.max_queue_delay_seconds

    def _latest_start(self, job: Job, now: float) -> float:
        """Return when a row of a job with a deadline must start to end in time; if unknown, the deadline itself."""
        assert job.deadline is not None
        if not self._pace.trusted(now):
            return job.deadline
        return job.deadline - self._pace.batch_seconds(job.shape, job.tokens, 1, now)

    def _drop_expired(self, now: float) -> None:
        while self._deadlines and self._latest_start(self._deadlines.first.job, now) <= now:
            self._expire(self._deadlines.first)

    def _expire(self, entry: _Entry) -> None:
        self._expired[entry.job.key] = entry.job, self._drop(entry)

    def _drop(self, entry: _Entry) -> tuple[int, ...]:
        rows = self._take(entry, entry.remaining)
        self._remove_if_empty(entry)
        return rows

    def _take(self, entry: _Entry, most: int) -> tuple[int, ...]:
        """Take up to `most` rows of a job out of the queue. `_remove_if_empty` must be called after it."""
        job = entry.job
        rows = job.rows[entry.taken : entry.taken + most]
        entry.taken += len(rows)
        self._queues[_queue_key(job)].images -= len(rows)
        self._images -= len(rows)
        return rows

    def _remove_if_empty(self, entry: _Entry) -> None:
        """Remove a job that has no rows left."""
        if entry.live:
            return
        job, key = entry.job, _queue_key(entry.job)
        queue = self._queues[key]
        caller_queue = queue.callers[job.caller]
        del self._jobs[job.key]
        self._shares.leave(job.caller)
        self._deadlines.prune(len(self._jobs))
        caller_queue.jobs -= 1
        caller_queue.by_urgency.prune(caller_queue.jobs)
        caller_queue.by_age.prune(caller_queue.jobs)
        if not caller_queue.jobs:
            del queue.callers[job.caller]
            if not queue.callers:
                del self._queues[key]

"""Decide which rows run next. Pure: no device, no threads, no clock; every call that needs the time is given it.

A *lane* holds the queued jobs whose rows may share a batch: those of one pixel shape, or one solo job alone. A batch
takes as many rows as its lane has and the budget allows, so that interleaved shapes do not break batches up: a backlog
drains in the fewest batches there can be.

The lane that leads, and the order of its rows:

- Three batches of four go by *urgency*: interactive before bulk, then the caller that had the least of the device
  (`shares.py`), then the job with fewer rows, then the older one. A short request overtakes long ones, however many of
  them wait; requests of like size run one after the other (not row by row in turn, which would finish all of them late
  and at once, and leave the device idle while their callers prepare the next).
- Every fourth goes by the callers' *shares* alone, and to the oldest job of its caller. So bulk keeps a quarter of the
  device whatever interactive work arrives, and a long job is not starved by its own caller's short ones.

A batch is filled in portions, with the shares counted after each: a caller with a thousand rows waiting and one with a
single row get into the same batch.

A row never starts that is not predicted to end before its deadline (`pace.py`): the job is set aside and reported as
expired, and its room is free. So that a batch does not hold up rows with short deadlines that arrive while it runs,
none takes longer than a quarter of the shortest deadline seen lately, as far as the device stays efficient.

A shape that only trickles leads batches that are far from full; `max_queue_delay_seconds` helps where that costs more
than the wait. Adding costs O(log jobs); a batch O(lanes * callers + its jobs * log jobs).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dinov3_server.engine.pace import Pace
from dinov3_server.engine.shares import ANONYMOUS, Caller, Shares

JobKey = tuple[int, int]  # (frontend, job id)

# Every how many batches one goes by shares alone. 4 leaves the urgent three quarters of the device, and
# makes an urgent row wait for one batch that is not its own, never two.
SHARE_TURN = 4
# Portions in which a batch is filled where several callers have rows for it.
PORTIONS = 8
# The part of the shortest deadline seen lately that a batch may take, and how long "lately" is, in seconds.
DEADLINE_PART = 0.25
DEADLINE_MEMORY = 10.0
# Stale heap entries that are not worth a clean-up, however few live ones there are.
SLACK = 16


class Limits(NamedTuple):
    """Limits of one batch. A batch that is not full is held back for more rows for up to `max_queue_delay_seconds`."""

    max_batch_images: int
    max_batch_tokens: int
    max_queue_delay_seconds: float


@dataclass(slots=True)
class Job:
    """The rows of one request that have one pixel shape. Times are in monotonic seconds."""

    key: JobKey
    shape: Hashable  # rows of different shapes never share a batch
    tokens: int  # of one row; the same for every job of a shape
    rows: tuple[int, ...]  # indices of the rows still to be computed, ascending
    enqueued: float  # set by the frontend; a job submitted again after a crash keeps it
    deadline: float | None
    bulk: bool  # gives way to jobs that are not
    solo: bool = False  # each row runs in a batch of its own: it may have killed a worker
    payload: Any = None  # the caller's; never looked at here
    caller: Caller = ANONYMOUS


class BatchRow(NamedTuple):
    job: Job
    row: int


@dataclass(slots=True, eq=False)
class _Entry:
    """A job in the queue; `taken` of its rows have left it."""

    job: Job
    taken: int = 0

    @property
    def left(self) -> int:
        return len(self.job.rows) - self.taken

    @property
    def live(self) -> bool:
        return self.taken < len(self.job.rows)


# Lowest first. The last item is the entry's own serial number, so that no two are equal.
Rank = tuple[float, ...]


class _Heap:
    """Entries by rank, the first one always live. Whatever ends an entry calls `settle`."""

    def __init__(self) -> None:
        self._items: list[tuple[Rank, _Entry]] = []

    def __bool__(self) -> bool:
        return bool(self._items)

    def push(self, rank: Rank, entry: _Entry) -> None:
        heapq.heappush(self._items, (rank, entry))

    @property
    def rank(self) -> Rank:
        """Of the first entry."""
        return self._items[0][0]

    @property
    def first(self) -> _Entry:
        return self._items[0][1]

    def settle(self, live: int) -> None:
        """Drop dead entries from the top, and all of them once they outnumber the `live` ones."""
        if len(self._items) > 2 * live + SLACK:
            self._items = [item for item in self._items if item[1].live]
            heapq.heapify(self._items)
        while self._items and not self.first.live:
            heapq.heappop(self._items)


@dataclass(slots=True)
class _Queue:
    """The jobs of one caller in one lane."""

    caller: Caller
    jobs: int = 0
    by_urgency: _Heap = field(default_factory=_Heap)
    by_age: _Heap = field(default_factory=_Heap)


@dataclass(slots=True)
class _Lane:
    """Jobs whose rows may share a batch. Lives only while it has any."""

    shape: Hashable
    tokens: int
    solo: bool
    images: int = 0
    queues: dict[Caller, _Queue] = field(default_factory=dict)

    @property
    def oldest(self) -> float:
        """When its oldest job was enqueued."""
        return min(queue.by_age.rank[0] for queue in self.queues.values())


def _lane_key(job: Job) -> Hashable:
    return (job.shape, job.key if job.solo else None)


class Scheduler:
    """The queue of one worker. `now` is in monotonic seconds and never goes back from one call to the next."""

    def __init__(self, limits: Limits, pace: Pace | None = None) -> None:
        self._limits = limits
        self._pace = pace or Pace()
        self._shares = Shares()
        self._ceilings: dict[Hashable, int] = {}
        self._jobs: dict[JobKey, _Entry] = {}
        self._lanes: dict[Hashable, _Lane] = {}
        self._deadlines = _Heap()
        self._expired: dict[JobKey, tuple[Job, tuple[int, ...]]] = {}  # not yet reported
        self._shortest = (math.inf, -math.inf)  # the shortest deadline seen lately in seconds, and when
        self._serial = 0
        self._batches = 0
        self._images = 0

    @property
    def queued_images(self) -> int:
        return self._images

    def add(self, job: Job, now: float) -> None:
        """Queue a job.

        Raises:
            ValueError: its key is queued already, it has no rows, one of its rows is over the token budget, or
                its tokens differ from those of its shape. Admission lets none of these through.
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
        key = _lane_key(job)
        lane = self._lanes.get(key) or _Lane(job.shape, job.tokens, job.solo)
        if job.tokens != lane.tokens:
            raise ValueError(f"job {job.key}: {job.tokens} tokens a row, but {job.shape} has {lane.tokens}")
        self._lanes[key] = lane
        queue = lane.queues.get(job.caller)
        if queue is None:
            queue = lane.queues[job.caller] = _Queue(job.caller)
        self._jobs[job.key] = entry = _Entry(job)
        self._shares.enter(job.caller)
        # A frontend may have read its clock after the caller read `now`.
        self._serial += 1
        enqueued, serial = min(job.enqueued, now), self._serial
        # Sizes count in powers of two: 60 rows are no shorter than 64.
        size = (len(job.rows) - 1).bit_length()
        queue.by_urgency.push((job.bulk, size, enqueued, serial), entry)
        queue.by_age.push((enqueued, serial), entry)
        queue.jobs += 1
        if job.deadline is not None:
            self._deadlines.push((job.deadline, serial), entry)
            allowed = job.deadline - enqueued
            if allowed <= self._shortest_deadline(now):
                self._shortest = allowed, now
        lane.images += len(job.rows)
        self._images += len(job.rows)

    def cancel(self, key: JobKey) -> tuple[int, ...]:
        """Drop a job. Returns the rows that were still queued and now never run; none where the key is unknown."""
        if key in self._expired:
            return self._expired.pop(key)[1]
        return self._drop(self._jobs[key]) if key in self._jobs else ()

    def remove_frontend(self, frontend: int) -> None:
        """Drop every job of a frontend that died; nobody is left to be told of their rows."""
        for key in [key for key in (*self._jobs, *self._expired) if key[0] == frontend]:
            self.cancel(key)

    def expire(self, now: float) -> list[tuple[Job, tuple[int, ...]]]:
        """Drop the jobs that cannot end before their deadline. Returns each once, with the rows still queued."""
        self._set_expired_aside(now)
        expired, self._expired = self._expired, {}
        return list(expired.values())

    def limit_shape(self, shape: Hashable, max_images: int) -> None:
        """Let later batches of `shape` hold `max_images` at most: more did not fit the device's memory.

        A ceiling is only ever lowered, as a batch launched before it was known may report a higher one after.
        """
        if max_images < 1:
            raise ValueError(f"a ceiling of {max_images} images would never run {shape}; at least 1")
        self._ceilings[shape] = min(max_images, self._ceilings.get(shape, max_images))

    def next_batch(self, now: float) -> list[BatchRow] | None:
        """Take the rows to run next: of one shape, within the limits, all of them predicted to end in time.

        Returns None where no row is ready. Jobs that cannot end in time are set aside for `expire`.
        """
        while (lane := self._leader(now)) is not None:
            if batch := self._fill(lane, now):
                self._batches += 1
                return batch
        return None

    def wakeup(self, now: float) -> float | None:
        """Return when `next_batch` or `expire` may next answer otherwise with no other call between; None: never.

        `now` itself where `expire` has something to report.
        """
        self._set_expired_aside(now)
        if self._expired:
            return now
        times = [time for time in map(self._ready_at, self._lanes.values()) if time > now]
        if self._deadlines:
            times.append(max(now, self._latest_start(self._deadlines.first.job, now)))
        return min(times, default=None)

    @property
    def _by_shares(self) -> bool:
        """Whether the next batch goes by shares alone."""
        return self._batches % SHARE_TURN == SHARE_TURN - 1

    def _rank(self, queue: _Queue) -> Rank:
        share = self._shares.rank(queue.caller)
        if self._by_shares:
            return (*share, *queue.by_age.rank)
        bulk, *rest = queue.by_urgency.rank
        return (bulk, *share, *rest)

    def _leader(self, now: float) -> _Lane | None:
        """Return the lane of the next batch."""
        self._set_expired_aside(now)
        ready = [lane for lane in self._lanes.values() if self._ready_at(lane) <= now]
        if len(ready) < 2:
            return ready[0] if ready else None
        return min(ready, key=lambda lane: min(map(self._rank, lane.queues.values())))

    def _fill(self, lane: _Lane, now: float) -> list[BatchRow]:
        """Take the rows of a batch out of `lane`; none where all of its jobs turn out to be too late."""
        most = self._rows_of_batch(lane, now)
        trusted = self._pace.trusted(now)
        batch: list[BatchRow] = []
        while len(batch) < most and lane.queues:
            queue = (
                min(lane.queues.values(), key=self._rank) if len(lane.queues) > 1 else next(iter(lane.queues.values()))
            )
            portion = most if len(lane.queues) == 1 else max(1, most // PORTIONS)
            entry = (queue.by_age if self._by_shares else queue.by_urgency).first
            job = entry.job
            if trusted and job.deadline is not None:
                within = self._pace.rows_within(lane.shape, lane.tokens, job.deadline - now, now)
                if within < 1 or self._seconds_left(entry, lane, now) > job.deadline - now:
                    self._set_aside(entry)
                    continue
                if within <= len(batch):
                    break  # it would have to wait for more rows than it can: it leads the next batch
                most = min(most, within)
            rows = self._take(entry, min(portion, most - len(batch)))
            self._shares.charge(job.caller, len(rows) * lane.tokens)
            batch += [BatchRow(job, row) for row in rows]
            self._settle(entry)
        return batch

    def _seconds_left(self, entry: _Entry, lane: _Lane, now: float) -> float:
        """Predict the device time of all rows that a job has left, if it has the device to itself."""
        whole = min(entry.left, self._capacity(lane))
        return self._pace.batch_seconds(lane.shape, lane.tokens, whole, now) * entry.left / whole

    def _capacity(self, lane: _Lane) -> int:
        """Return the most rows that a batch of this lane may hold."""
        if lane.solo:
            return 1
        images = self._limits.max_batch_images
        return min(images, self._limits.max_batch_tokens // lane.tokens, self._ceilings.get(lane.shape, images))

    def _rows_of_batch(self, lane: _Lane, now: float) -> int:
        """Return the most rows of a batch that starts now: its time is bounded by the deadlines seen lately."""
        capacity = self._capacity(lane)
        shortest = self._shortest_deadline(now)
        if shortest == math.inf or not self._pace.trusted(now):
            return capacity
        within = self._pace.rows_within(lane.shape, lane.tokens, shortest * DEADLINE_PART, now)
        return min(capacity, max(within, self._pace.efficient_rows(lane.shape, lane.tokens, now)))

    def _shortest_deadline(self, now: float) -> float:
        shortest, seen = self._shortest
        return shortest if now - seen <= DEADLINE_MEMORY else math.inf

    def _ready_at(self, lane: _Lane) -> float:
        """Return when the lane may lead a batch: at once where it fills one, else when its oldest row waited enough."""
        if not self._limits.max_queue_delay_seconds or lane.images >= self._capacity(lane):
            return -math.inf
        return lane.oldest + self._limits.max_queue_delay_seconds

    def _latest_start(self, job: Job, now: float) -> float:
        """Return when a row of a job with a deadline must start to end in time; the deadline where that is unknown."""
        assert job.deadline is not None
        if not self._pace.trusted(now):
            return job.deadline
        return job.deadline - self._pace.batch_seconds(job.shape, job.tokens, 1, now)

    def _set_expired_aside(self, now: float) -> None:
        while self._deadlines and self._latest_start(self._deadlines.first.job, now) <= now:
            self._set_aside(self._deadlines.first)

    def _set_aside(self, entry: _Entry) -> None:
        self._expired[entry.job.key] = entry.job, self._drop(entry)

    def _drop(self, entry: _Entry) -> tuple[int, ...]:
        rows = self._take(entry, entry.left)
        self._settle(entry)
        return rows

    def _take(self, entry: _Entry, most: int) -> tuple[int, ...]:
        """Take up to `most` rows of a job out of the queue; `_settle` follows."""
        job = entry.job
        rows = job.rows[entry.taken : entry.taken + most]
        entry.taken += len(rows)
        self._lanes[_lane_key(job)].images -= len(rows)
        self._images -= len(rows)
        return rows

    def _settle(self, entry: _Entry) -> None:
        """Take a job that has no rows left out of the queue."""
        if entry.live:
            return
        job, key = entry.job, _lane_key(entry.job)
        lane = self._lanes[key]
        queue = lane.queues[job.caller]
        del self._jobs[job.key]
        self._shares.leave(job.caller)
        self._deadlines.settle(len(self._jobs))
        queue.jobs -= 1
        queue.by_urgency.settle(queue.jobs)
        queue.by_age.settle(queue.jobs)
        if not queue.jobs:
            del lane.queues[job.caller]
            if not lane.queues:
                del self._lanes[key]

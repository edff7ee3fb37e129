"""Which rows run next. Pure: no device, no threads, no clock; every call that needs the time is given it.

A *lane* holds the queued jobs whose rows may share a batch: those of one pixel shape, or one solo job
alone. A batch takes as many rows as its lane has and the budget allows, so that interleaved shapes do not
break batches up: a backlog drains in the fewest batches there can be.

Which lane leads, and which of its rows go first:

- Three batches of four go by *urgency*: interactive before bulk, then the job with fewer rows, then the
  older. A short request overtakes long ones, however many of them wait; requests of like size run one after
  the other (not row by row in turn, which would finish all of them late and at once, and leave the device
  idle while their callers prepare the next).
- Every fourth goes by *age* alone. So the oldest job leads a quarter of the batches whatever keeps
  arriving, be it bulk or a thousand rows long, and a job is through after at most four times the batches
  that it and what is older than it fill.

One virtual clock, ranking row k at `tokens handed out on arrival + k * spacing`, would starve nobody either; but
once a backlog exceeds the spacing it decays to first in, first out, and a single image waits for all of it.

A shape that only trickles leads batches that are far from full; `max_queue_delay` is the remedy where that
costs more than the wait. Adding costs O(log jobs); a batch O(lanes + its jobs * log jobs).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

JobKey = tuple[int, int]  # (frontend, job id)

# Every how many batches one goes to the oldest job. 4 leaves the urgent three quarters of the device, and
# makes an urgent row wait for one batch that is not its own, never two.
AGE_TURN = 4

# Stale heap entries that are not worth a clean-up, however few live ones there are.
SLACK = 16


class Limits(NamedTuple):
    """Of one batch. `max_queue_delay` is how long, in seconds, a batch that is not full is held back for more rows."""

    max_batch_images: int
    max_batch_tokens: int
    max_queue_delay: float


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


class BatchRow(NamedTuple):
    job: Job
    row: int


@dataclass(slots=True, eq=False)
class _Entry:
    """A job in the queue; `taken` of its rows have left it."""

    job: Job
    taken: int = 0

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
        """Drops dead entries from the top, and all of them once they outnumber the `live` ones."""
        if len(self._items) > 2 * live + SLACK:
            self._items = [item for item in self._items if item[1].live]
            heapq.heapify(self._items)
        while self._items and not self.first.live:
            heapq.heappop(self._items)


@dataclass(slots=True)
class _Lane:
    """Jobs whose rows may share a batch. Lives only while it has any."""

    shape: Hashable
    tokens: int
    solo: bool
    jobs: int = 0
    images: int = 0
    by_urgency: _Heap = field(default_factory=_Heap)
    by_age: _Heap = field(default_factory=_Heap)


def _lane_key(job: Job) -> Hashable:
    return (job.shape, job.key if job.solo else None)


class Scheduler:
    """The queue of one worker. `now` is in monotonic seconds and never goes back from one call to the next."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._ceilings: dict[Hashable, int] = {}
        self._jobs: dict[JobKey, _Entry] = {}
        self._lanes: dict[Hashable, _Lane] = {}
        self._deadlines = _Heap()
        self._expired: dict[JobKey, tuple[Job, tuple[int, ...]]] = {}  # not yet reported
        self._serial = 0
        self._batches = 0
        self._images = 0

    @property
    def queued_images(self) -> int:
        return self._images

    def add(self, job: Job, now: float) -> None:
        """Queues a job.

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
        self._jobs[job.key] = entry = _Entry(job)
        # A frontend may have read its clock after the caller read `now`.
        self._serial += 1
        enqueued, serial = min(job.enqueued, now), self._serial
        # Sizes count in powers of two: 60 rows are no shorter than 64.
        size = (len(job.rows) - 1).bit_length()
        lane.by_urgency.push((job.bulk, size, enqueued, serial), entry)
        lane.by_age.push((enqueued, serial), entry)
        if job.deadline is not None:
            self._deadlines.push((job.deadline, serial), entry)
        lane.jobs += 1
        lane.images += len(job.rows)
        self._images += len(job.rows)

    def cancel(self, key: JobKey) -> tuple[int, ...]:
        """Drops a job. Returns the rows that were still queued and now never run; none where the key is unknown."""
        if key in self._expired:
            return self._expired.pop(key)[1]
        return self._drop(self._jobs[key]) if key in self._jobs else ()

    def remove_frontend(self, frontend: int) -> None:
        """Drops every job of a frontend that died; nobody is left to be told of their rows."""
        for key in [key for key in (*self._jobs, *self._expired) if key[0] == frontend]:
            self.cancel(key)

    def expire(self, now: float) -> list[tuple[Job, tuple[int, ...]]]:
        """Drops the jobs whose deadline is `now` or earlier. Returns each once, with the rows still queued."""
        self._set_expired_aside(now)
        expired, self._expired = self._expired, {}
        return list(expired.values())

    def limit_shape(self, shape: Hashable, max_images: int) -> None:
        """Lets later batches of `shape` hold `max_images` at most: more did not fit the device's memory.

        A ceiling is only ever lowered, as a batch launched before it was known may report a higher one after.
        """
        if max_images < 1:
            raise ValueError(f"a ceiling of {max_images} images would never run {shape}; at least 1")
        self._ceilings[shape] = min(max_images, self._ceilings.get(shape, max_images))

    def next_batch(self, now: float) -> list[BatchRow] | None:
        """Takes the rows to run next: of one shape, within the limits, none expired. None where none is ready."""
        if (leader := self._leader(now)) is None:
            return None
        lane, order = leader
        self._batches += 1
        batch: list[BatchRow] = []
        capacity = self._capacity(lane)
        while len(batch) < capacity and order:
            job = order.first.job
            batch += [BatchRow(job, row) for row in self._take(order.first, capacity - len(batch))]
        return batch

    def wakeup(self, now: float) -> float | None:
        """When `next_batch` or `expire` may next answer otherwise with no other call between; None: never.

        `now` itself where `expire` has something to report.
        """
        self._set_expired_aside(now)
        if self._expired:
            return now
        times = [time for time in map(self._ready_at, self._lanes.values()) if time > now]
        if self._deadlines:
            times.append(self._deadlines.rank[0])
        return min(times, default=None)

    def _leader(self, now: float) -> tuple[_Lane, _Heap] | None:
        """The lane that the next batch is of, and the order in which it takes its jobs."""
        self._set_expired_aside(now)
        ready = [lane for lane in self._lanes.values() if self._ready_at(lane) <= now]
        if not ready:
            return None
        if self._batches % AGE_TURN == AGE_TURN - 1:
            oldest = min(ready, key=lambda lane: lane.by_age.rank)
            return oldest, oldest.by_age
        urgent = min(ready, key=lambda lane: lane.by_urgency.rank)
        return urgent, urgent.by_urgency

    def _capacity(self, lane: _Lane) -> int:
        """Most rows of a batch of this lane."""
        if lane.solo:
            return 1
        images = self._limits.max_batch_images
        return min(images, self._limits.max_batch_tokens // lane.tokens, self._ceilings.get(lane.shape, images))

    def _ready_at(self, lane: _Lane) -> float:
        """When the lane may lead a batch: at once where it fills one, else when its oldest row has waited enough."""
        if lane.images >= self._capacity(lane):
            return -math.inf
        return lane.by_age.rank[0] + self._limits.max_queue_delay

    def _set_expired_aside(self, now: float) -> None:
        while self._deadlines and self._deadlines.rank[0] <= now:
            entry = self._deadlines.first
            self._expired[entry.job.key] = entry.job, self._drop(entry)

    def _drop(self, entry: _Entry) -> tuple[int, ...]:
        return self._take(entry, len(entry.job.rows))

    def _take(self, entry: _Entry, most: int) -> tuple[int, ...]:
        """Takes up to `most` rows of a job out of the queue, and the job with its last one."""
        job = entry.job
        lane = self._lanes[_lane_key(job)]
        rows = job.rows[entry.taken : entry.taken + most]
        entry.taken += len(rows)
        lane.images -= len(rows)
        self._images -= len(rows)
        if not entry.live:
            del self._jobs[job.key]
            self._deadlines.settle(len(self._jobs))
            lane.jobs -= 1
            lane.by_urgency.settle(lane.jobs)
            lane.by_age.settle(lane.jobs)
            if not lane.jobs:
                del self._lanes[_lane_key(job)]
        return rows

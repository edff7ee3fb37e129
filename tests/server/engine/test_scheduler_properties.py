"""Properties of the scheduler that hold for any input. Time is a number that the tests advance."""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dinov3_server.engine.scheduler import SHARE_TURN, BatchRow, Job, JobKey, Limits, Scheduler

# The same examples on every run, however slow the machine.
FIXED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
)

TOKENS = {"small": 1, "middle": 3, "large": 8}
shapes = st.sampled_from(sorted(TOKENS))
# Quarters are exact in binary: sums of them compare equal when they should.
seconds = st.integers(0, 12).map(lambda quarters: quarters / 4)


def make(number: int, rows: int, shape: str = "small", enqueued: float = 0.0, bulk: bool = False) -> Job:
    return Job((0, number), shape, TOKENS[shape], tuple(range(rows)), enqueued, None, bulk)


def capacity(limits: Limits, shape: str) -> int:
    return min(limits.max_batch_images, limits.max_batch_tokens // TOKENS[shape])


def drain(scheduler: Scheduler, now: float) -> Iterable[list[BatchRow]]:
    return iter(lambda: scheduler.next_batch(now), None)


@st.composite
def limits_without_delay(draw: st.DrawFn) -> Limits:
    return Limits(draw(st.integers(1, 8)), draw(st.integers(max(TOKENS.values()), 40)), 0.0)


class Lifecycle(RuleBasedStateMachine):
    """A scheduler beside a simple model of it: the rows that each job has left, without order and heaps."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.jobs: dict[JobKey, Job] = {}
        self.left: dict[JobKey, list[int]] = {}
        self.expired: set[JobKey] = set()
        self.ceilings: dict[Hashable, int] = {}
        self.submitted: Counter[tuple[JobKey, int]] = Counter()
        self.ended: Counter[tuple[JobKey, int]] = Counter()

    @initialize(images=st.integers(1, 6), tokens=st.integers(8, 30), delay=st.sampled_from([0.0, 0.0, 0.5, 2.0]))
    def start(self, images: int, tokens: int, delay: float) -> None:
        self.limits = Limits(images, tokens, delay)
        self.scheduler = Scheduler(self.limits)

    # --- the model

    def queue_key(self, job: Job) -> Hashable:
        return job.key if job.quarantined else job.shape

    def queues(self) -> dict[Hashable, list[Job]]:
        """Runnable jobs that may share a batch."""
        queues = defaultdict(list)
        for key, job in self.jobs.items():
            if key not in self.expired:
                queues[self.queue_key(job)].append(job)
        return queues

    def rows(self, jobs: Iterable[Job]) -> int:
        return sum(len(self.left[job.key]) for job in jobs)

    def capacity(self, job: Job) -> int:
        if job.quarantined:
            return 1
        most = min(self.limits.max_batch_images, self.limits.max_batch_tokens // job.tokens)
        return min(most, self.ceilings.get(job.shape, most))

    def ready_at(self, jobs: list[Job]) -> float:
        if self.rows(jobs) >= self.capacity(jobs[0]):
            return 0.0
        return min(job.enqueued for job in jobs) + self.limits.max_queue_delay_seconds

    def pass_deadlines(self) -> None:
        """Mark expired jobs, as every call of the scheduler that is given the time does."""
        for key, job in self.jobs.items():
            if job.deadline is not None and job.deadline <= self.now:
                self.expired.add(key)

    def end(self, key: JobKey, rows: Iterable[int]) -> None:
        for row in rows:
            self.ended[key, row] += 1
            self.left[key].remove(row)
        if not self.left[key]:
            del self.jobs[key], self.left[key]
            self.expired.discard(key)

    # --- events

    @rule(
        key=st.tuples(st.integers(0, 2), st.integers(0, 9)),
        shape=shapes,
        first=st.integers(0, 3),
        rows=st.integers(1, 9),
        age=seconds,
        time_left=st.none() | seconds,
        bulk=st.booleans(),
        quarantined=st.sampled_from([False, False, False, True]),
    )
    def add(
        self,
        key: JobKey,
        shape: str,
        first: int,
        rows: int,
        age: float,
        time_left: float | None,
        bulk: bool,
        quarantined: bool,
    ) -> None:
        deadline = None if time_left is None else self.now + time_left
        indices = tuple(range(first, first + rows))
        job = Job(key, shape, TOKENS[shape], indices, self.now - age, deadline, bulk, quarantined)
        try:
            self.scheduler.add(job, self.now)
        except ValueError:
            assert key in self.jobs
            return
        assert key not in self.jobs
        self.jobs[key], self.left[key] = job, list(indices)
        self.submitted.update((key, row) for row in indices)

    @rule(after=seconds)
    def wait(self, after: float) -> None:
        self.now += after

    @rule(key=st.tuples(st.integers(0, 2), st.integers(0, 9)))
    def cancel(self, key: JobKey) -> None:
        dropped = self.scheduler.cancel(key)
        assert list(dropped) == self.left.get(key, [])
        if dropped:
            self.end(key, dropped)

    @rule(frontend=st.integers(0, 2))
    def lose_frontend(self, frontend: int) -> None:
        self.scheduler.remove_frontend(frontend)
        for key in [key for key in self.jobs if key[0] == frontend]:
            self.end(key, tuple(self.left[key]))

    @rule(shape=shapes, images=st.integers(1, 6))
    def run_out_of_memory(self, shape: str, images: int) -> None:
        self.scheduler.limit_shape(shape, images)
        self.ceilings[shape] = min(images, self.ceilings.get(shape, images))

    @rule()
    def expire(self) -> None:
        self.pass_deadlines()
        reported = self.scheduler.expire(self.now)
        assert {job.key for job, _ in reported} == self.expired
        assert len(reported) == len(self.expired)
        for job, rows in reported:
            assert job is self.jobs[job.key]
            assert list(rows) == self.left[job.key]
            self.end(job.key, rows)

    @rule()
    def run(self) -> None:
        self.take_batch()

    def take_batch(self) -> bool:
        """Check the next batch against the model. Returns False if there was none."""
        self.pass_deadlines()
        queues = self.queues()
        ready = {name for name, jobs in queues.items() if self.ready_at(jobs) <= self.now}
        batch = self.scheduler.next_batch(self.now)
        if batch is None:
            assert not ready  # work-conserving: all rows that are left wait for more
            return False
        leader = batch[0].job
        assert {self.queue_key(job) for job, _ in batch} == {self.queue_key(leader)}
        assert {job.shape for job, _ in batch} == {leader.shape}
        assert self.queue_key(leader) in ready
        assert sum(job.tokens for job, _ in batch) <= self.limits.max_batch_tokens
        # Neither over the budget nor short of it while rows of the shape are left.
        assert len(batch) == min(self.capacity(leader), self.rows(queues[self.queue_key(leader)]))
        by_job = defaultdict(list)
        for job, row in batch:
            assert job is self.jobs[job.key]
            assert job.key not in self.expired
            by_job[job.key].append(row)
        for key, rows in by_job.items():
            assert rows == self.left[key][: len(rows)]
            self.end(key, rows)
        return True

    @rule()
    def sleep_until_wakeup(self) -> None:
        """Check that nothing changes before the time that `wakeup` returns, and that something does then."""
        self.expire()
        while self.take_batch():
            pass
        wakeup = self.scheduler.wakeup(self.now)
        if wakeup is None:
            assert not self.jobs
            return
        assert wakeup > self.now
        just_before = copy.deepcopy(self.scheduler)
        assert just_before.next_batch(math.nextafter(wakeup, 0)) is None
        assert just_before.expire(math.nextafter(wakeup, 0)) == []
        then = copy.deepcopy(self.scheduler)
        assert then.expire(wakeup) or then.next_batch(wakeup)
        self.now = wakeup

    @rule()
    def wakeup(self) -> None:
        """Check that `wakeup` returns the next deadline or the end of a wait for more rows, whichever is first."""
        self.pass_deadlines()
        times = [job.deadline for job in self.jobs.values() if job.deadline is not None]
        times += [at for at in map(self.ready_at, self.queues().values()) if at > self.now]
        expected = self.now if self.expired else min(times, default=None)
        assert self.scheduler.wakeup(self.now) == expected

    @invariant()
    @precondition(lambda self: hasattr(self, "scheduler"))
    def counts(self) -> None:
        queued = [job for jobs in self.queues().values() for job in jobs]
        assert self.scheduler.queued_images == self.rows(queued)

    def teardown(self) -> None:
        """Check that every submitted row has ended exactly once."""
        if not hasattr(self, "scheduler"):
            return
        self.now += self.limits.max_queue_delay_seconds
        self.expire()
        while self.jobs:
            assert self.take_batch()
        assert self.ended == self.submitted
        assert self.scheduler.wakeup(self.now) is None
        assert self.scheduler.queued_images == 0


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(FIXED, max_examples=300, stateful_step_count=40)

sizes = st.tuples(shapes, st.integers(1, 20), st.booleans())
"""(shape, rows, bulk) of a job"""


@FIXED
@given(limits=limits_without_delay(), backlog=st.lists(sizes, max_size=25))
def test_a_backlog_of_mixed_shapes_drains_in_the_fewest_batches(
    limits: Limits, backlog: list[tuple[str, int, bool]]
) -> None:
    scheduler = Scheduler(limits)
    rows: Counter[str] = Counter()
    for number, (shape, count, bulk) in enumerate(backlog):
        scheduler.add(make(number, count, shape, enqueued=number, bulk=bulk), now=100.0)
        rows[shape] += count
    batches = sum(1 for _ in drain(scheduler, 100.0))
    assert batches == sum(math.ceil(count / capacity(limits, shape)) for shape, count in rows.items())


@FIXED
@given(
    limits=limits_without_delay(),
    older=st.lists(sizes, max_size=8),
    subject=st.tuples(shapes, st.integers(1, 40), st.booleans()),
    phase=st.integers(0, SHARE_TURN - 1),
    arrivals=st.lists(st.lists(st.tuples(shapes, st.integers(1, 8)), min_size=1, max_size=12), min_size=1, max_size=4),
)
def test_no_job_starves_under_later_arrivals(
    limits: Limits,
    older: list[tuple[str, int, bool]],
    subject: tuple[str, int, bool],
    phase: int,
    arrivals: list[list[tuple[str, int]]],
) -> None:
    """Before every batch more interactive jobs arrive than it can take. Even so, a job ends within SHARE_TURN times the
    number of batches that it and the older jobs fill, shape by shape."""
    scheduler = Scheduler(limits)
    for _ in range(phase):
        scheduler.add(make(0, 1), now=0.0)
        scheduler.next_batch(0.0)
    rows: Counter[str] = Counter()
    for number, (shape, count, bulk) in enumerate([*older, subject]):
        scheduler.add(make(number, count, shape, enqueued=number, bulk=bulk), now=100.0)
        rows[shape] += count
    last = len(older)
    allowed = SHARE_TURN * sum(math.ceil(count / capacity(limits, shape)) for shape, count in rows.items())
    left, number = subject[1], 1000
    for step in range(allowed):
        now = 100.0 + step
        for shape, count in arrivals[step % len(arrivals)]:
            scheduler.add(make(number, count, shape, enqueued=now), now)
            number += 1
        batch = scheduler.next_batch(now)
        assert batch is not None
        left -= sum(row.job.key[1] == last for row in batch)
        if not left:
            return
    raise AssertionError(f"{left} rows of the job are left after {allowed} batches")


@FIXED
@given(
    limits=limits_without_delay(),
    backlog=st.lists(st.tuples(shapes, st.integers(2, 300), st.booleans()), min_size=1, max_size=20),
    shape=shapes,
    before=st.integers(0, 9),
)
def test_a_single_image_is_in_the_next_two_batches_behind_any_larger_or_bulk_jobs(
    limits: Limits, backlog: list[tuple[str, int, bool]], shape: str, before: int
) -> None:
    scheduler = Scheduler(limits)
    for number, (large, count, bulk) in enumerate(backlog):
        scheduler.add(make(number, count, large, enqueued=number, bulk=bulk), now=100.0)
    for _ in range(before):
        scheduler.next_batch(100.0)
    scheduler.add(make(999, 1, shape, enqueued=100.0), now=100.0)
    batches = [scheduler.next_batch(100.0) or [] for _ in range(2)]
    assert [(row.job.key[1], row.row) for batch in batches for row in batch].count((999, 0)) == 1


@FIXED
@given(
    limits=limits_without_delay(),
    rows=st.integers(1, 12),
    bulk=st.booleans(),
    times=st.lists(st.integers(0, 9), min_size=2, max_size=12),
)
def test_equal_jobs_run_in_order_of_age_even_if_they_arrive_out_of_order(
    limits: Limits, rows: int, bulk: bool, times: list[int]
) -> None:
    scheduler = Scheduler(limits)
    for number, enqueued in enumerate(times):
        scheduler.add(make(number, rows, enqueued=enqueued, bulk=bulk), now=100.0)
    order = [(row.job.key[1], row.row) for batch in drain(scheduler, 100.0) for row in batch]
    by_age = sorted(range(len(times)), key=lambda number: times[number])
    assert order == [(number, row) for number in by_age for row in range(rows)]


@FIXED
@given(
    limits=limits_without_delay(),
    interactive=st.lists(st.tuples(shapes, st.integers(1, 20)), min_size=1, max_size=12),
    bulk=st.lists(st.tuples(shapes, st.integers(1, 20)), min_size=1, max_size=12),
)
def test_older_bulk_gets_a_quarter_of_the_batches_and_the_free_room_of_the_others(
    limits: Limits, interactive: list[tuple[str, int]], bulk: list[tuple[str, int]]
) -> None:
    scheduler = Scheduler(limits)
    waiting: Counter[str] = Counter()
    for number, (shape, count) in enumerate(bulk):
        scheduler.add(make(number, count, shape, enqueued=number, bulk=True), now=1000.0)
    for number, (shape, count) in enumerate(interactive):
        scheduler.add(make(500 + number, count, shape, enqueued=500 + number), now=1000.0)
        waiting[shape] += count
    for turn, batch in enumerate(drain(scheduler, 1000.0)):
        shape = str(batch[0].job.shape)
        urgent = sum(not row.job.bulk for row in batch)
        if turn % SHARE_TURN != SHARE_TURN - 1 and waiting.total():
            assert urgent == min(waiting[shape], capacity(limits, shape)) > 0
        waiting[shape] -= urgent

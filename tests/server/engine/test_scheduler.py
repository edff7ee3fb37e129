"""The scheduler by example. Times are plain numbers; no clock is read."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

from dinov3_server.engine.scheduler import SHARE_TURN, SLACK, BatchRow, Job, Limits, Scheduler

LIMITS = Limits(max_batch_images=4, max_batch_tokens=100, max_queue_delay_seconds=0.0)
NOW = 1000.0


def job(
    number: int,
    rows: int = 1,
    *,
    frontend: int = 0,
    shape: str = "a",
    tokens: int = 10,
    enqueued: float = NOW,
    deadline: float | None = None,
    bulk: bool = False,
    quarantined: bool = False,
    payload: Any = None,
) -> Job:
    return Job((frontend, number), shape, tokens, tuple(range(rows)), enqueued, deadline, bulk, quarantined, payload)


def filled(*jobs: Job, limits: Limits = LIMITS) -> Scheduler:
    scheduler = Scheduler(limits)
    for each in jobs:
        scheduler.add(each, NOW)
    return scheduler


def numbers(batch: list[BatchRow] | None) -> list[tuple[int, int]] | None:
    """Return (job number, row) of each row of a batch."""
    return None if batch is None else [(row.job.key[1], row.row) for row in batch]


def drained(scheduler: Scheduler, now: float = NOW) -> list[list[int]]:
    """Take all batches, and return the job numbers of each."""
    batches = iter(lambda: scheduler.next_batch(now), None)
    return [[row.job.key[1] for row in batch] for batch in batches]


def test_an_empty_queue_has_no_batch_and_no_wakeup() -> None:
    scheduler = filled()
    assert scheduler.next_batch(NOW) is None
    assert scheduler.expire(NOW) == []
    assert scheduler.wakeup(NOW) is None


def test_a_batch_takes_the_queued_rows_at_once() -> None:
    scheduler = filled(job(1, 2), job(2))
    assert numbers(scheduler.next_batch(NOW)) == [(2, 0), (1, 0), (1, 1)]
    assert scheduler.next_batch(NOW) is None


def test_rows_keep_their_submitted_indices() -> None:
    resubmitted = job(7)
    resubmitted.rows = (3, 8, 9, 21, 40)
    scheduler = filled(resubmitted)
    assert numbers(scheduler.next_batch(NOW)) == [(7, 3), (7, 8), (7, 9), (7, 21)]
    assert scheduler.cancel((0, 7)) == (40,)


def test_the_token_budget_limits_a_batch() -> None:
    scheduler = filled(job(1, 5, shape="large", tokens=40), limits=Limits(4, 100, 0.0))
    assert drained(scheduler) == [[1, 1], [1, 1], [1]]


def test_a_row_may_fill_the_token_budget_but_not_exceed_it() -> None:
    scheduler = filled(job(1, 2, tokens=100))
    assert drained(scheduler) == [[1], [1]]
    with pytest.raises(ValueError, match="101 tokens never fits a batch of at most 100"):
        scheduler.add(job(2, tokens=101), NOW)
    assert scheduler.queued_images == 0
    assert scheduler.next_batch(NOW) is None


def test_a_key_is_queued_once_and_free_again_when_its_job_has_ended() -> None:
    scheduler = filled(job(1, 5), job(2, deadline=NOW + 1))
    with pytest.raises(ValueError, match="queued already"):
        scheduler.add(job(1), NOW)
    assert drained(scheduler) == [[2, 1, 1, 1], [1, 1]]
    scheduler.add(job(1), NOW)
    assert drained(scheduler) == [[1]]


def test_an_expired_key_is_in_use_until_it_is_reported() -> None:
    scheduler = filled(job(1, deadline=NOW))
    assert scheduler.next_batch(NOW) is None
    with pytest.raises(ValueError, match="queued already"):
        scheduler.add(job(1), NOW)
    assert len(scheduler.expire(NOW)) == 1
    scheduler.add(job(1), NOW)


def test_a_job_without_rows_or_with_other_tokens_than_its_shape_is_refused() -> None:
    scheduler = filled(job(1))
    with pytest.raises(ValueError, match="no rows"):
        scheduler.add(job(2, rows=0), NOW)
    with pytest.raises(ValueError, match="11 tokens a row, but a has 10"):
        scheduler.add(job(3, tokens=11), NOW)
    assert drained(scheduler) == [[1]]


def test_interactive_goes_before_bulk_and_bulk_fills_the_rest_of_a_batch() -> None:
    scheduler = filled(job(1, 2, bulk=True, enqueued=NOW - 9), job(2, 3))
    assert drained(scheduler) == [[2, 2, 2, 1], [1]]


def test_bulk_gets_every_fourth_batch_beside_endless_interactive_work() -> None:
    for shape in ("a", "b"):
        scheduler = filled(job(0, 1000, bulk=True, shape=shape, enqueued=NOW - 9), *(job(n, 4) for n in range(1, 99)))
        bulk = [batch == [0] * 4 for batch in drained(scheduler)[: 3 * SHARE_TURN]]
        assert bulk == [False, False, False, True] * 3


def test_a_short_job_overtakes_long_ones_and_similar_sizes_run_one_after_the_other() -> None:
    long = [job(n, 8, enqueued=NOW - 10 + n) for n in range(6)]
    scheduler = filled(*long, limits=LIMITS._replace(max_batch_images=8))
    assert numbers(scheduler.next_batch(NOW)) == [(0, row) for row in range(8)]
    assert numbers(scheduler.next_batch(NOW)) == [(1, row) for row in range(8)]
    scheduler.add(job(9), NOW)
    assert numbers(scheduler.next_batch(NOW)) == [(9, 0), *((2, row) for row in range(7))]


def test_sizes_within_a_power_of_two_count_as_equal() -> None:
    assert drained(filled(job(1, 8, enqueued=NOW - 2), job(2, 5, enqueued=NOW - 1)))[0] == [1] * 4
    assert drained(filled(job(1, 8, enqueued=NOW - 2), job(2, 4, enqueued=NOW - 1)))[0] == [2] * 4


def test_a_resubmitted_job_keeps_its_place() -> None:
    scheduler = filled(job(1, 4, enqueued=NOW - 1), job(2, 4, enqueued=NOW - 3), job(3, 4, enqueued=NOW - 2))
    assert drained(scheduler) == [[2] * 4, [3] * 4, [1] * 4]


def test_equal_enqueue_times_run_in_order_of_arrival() -> None:
    scheduler = filled(*(job(n) for n in (3, 1, 2, 9, 5, 4)))
    assert drained(scheduler) == [[3, 1, 2, 9], [5, 4]]


def test_an_enqueue_time_ahead_of_now_does_not_delay() -> None:
    # All processes share CLOCK_MONOTONIC, but a frontend may read it after the worker read `now`.
    scheduler = filled(job(1, enqueued=NOW + 0.001))
    assert drained(scheduler) == [[1]]


def test_interleaved_shapes_do_not_split_batches() -> None:
    jobs = [job(n, shape="ab"[n % 2]) for n in range(16)]
    assert drained(filled(*jobs)) == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]


def test_quarantined_rows_run_alone() -> None:
    scheduler = filled(job(1, 2, quarantined=True), job(2, quarantined=True), job(3, 3))
    assert sorted(drained(scheduler)) == [[1], [1], [2], [3, 3, 3]]


def test_cancelled_rows_are_returned_and_never_run() -> None:
    scheduler = filled(job(1, 6), job(2, 2, enqueued=NOW - 1))
    assert numbers(scheduler.next_batch(NOW)) == [(2, 0), (2, 1), (1, 0), (1, 1)]
    assert scheduler.cancel((0, 1)) == (2, 3, 4, 5)
    assert scheduler.cancel((0, 1)) == ()
    assert scheduler.cancel((0, 2)) == ()  # all its rows have left the queue
    assert scheduler.cancel((5, 1)) == ()
    assert scheduler.next_batch(NOW) is None


def test_expired_rows_are_reported_once_in_any_order_of_calls() -> None:
    for peek in (True, False):
        doomed = job(1, 6, deadline=NOW + 2)
        scheduler = filled(doomed, job(2, 7))
        assert scheduler.wakeup(NOW) == NOW + 2
        assert numbers(scheduler.next_batch(NOW + 1)) == [(1, n) for n in range(4)]
        if peek:
            assert drained(scheduler, NOW + 2) == [[2] * 4, [2] * 3]
            assert scheduler.wakeup(NOW + 2) == NOW + 2
        assert scheduler.expire(NOW + 2) == [(doomed, (4, 5))]
        assert scheduler.expire(NOW + 2) == []
        assert scheduler.wakeup(NOW + 2) is None


def test_an_expired_job_can_still_be_cancelled_before_it_is_reported() -> None:
    scheduler = filled(job(1, 2, deadline=NOW))
    assert scheduler.next_batch(NOW) is None
    assert scheduler.cancel((0, 1)) == (0, 1)
    assert scheduler.expire(NOW) == []


def test_removing_a_frontend_drops_only_its_jobs() -> None:
    scheduler = filled(
        job(1, frontend=1), job(2, frontend=2), job(3, frontend=1, deadline=NOW), job(4, frontend=2, deadline=NOW)
    )
    assert scheduler.wakeup(NOW) == NOW  # which has dropped the expired jobs
    scheduler.remove_frontend(1)
    assert scheduler.queued_images == 1
    assert [expired.key for expired, _ in scheduler.expire(NOW)] == [(2, 4)]
    assert drained(scheduler) == [[2]]


def test_a_shape_that_ran_out_of_memory_gets_a_ceiling() -> None:
    scheduler = filled(job(1, 5, shape="a"), job(2, 5, shape="b"))
    scheduler.limit_shape("a", 2)
    scheduler.limit_shape("a", 3)  # reported later by a larger batch that was launched earlier
    assert sorted(drained(scheduler)) == [[1], [1, 1], [1, 1], [2], [2] * 4]
    with pytest.raises(ValueError, match="at least 1"):
        scheduler.limit_shape("a", 0)


def test_a_batch_waits_for_more_rows_only_while_it_is_not_full() -> None:
    scheduler = filled(job(1, 3, enqueued=NOW - 1), limits=LIMITS._replace(max_queue_delay_seconds=5.0))
    assert scheduler.next_batch(NOW) is None
    assert scheduler.wakeup(NOW) == NOW + 4
    scheduler.add(job(2), NOW + 1)
    assert numbers(scheduler.next_batch(NOW + 1)) == [(2, 0), (1, 0), (1, 1), (1, 2)]
    scheduler.add(job(3, 3, enqueued=NOW + 1), NOW + 1)
    scheduler.limit_shape("a", 3)
    assert drained(scheduler, NOW + 1) == [[3] * 3]


def test_a_shape_that_waits_for_more_rows_does_not_delay_another() -> None:
    scheduler = filled(
        job(1, 2, shape="held"), job(2, 4, shape="full", bulk=True), limits=LIMITS._replace(max_queue_delay_seconds=5.0)
    )
    assert drained(scheduler, NOW) == [[2] * 4]
    assert scheduler.wakeup(NOW) == NOW + 5
    assert scheduler.next_batch(NOW + 4.5) is None
    assert drained(scheduler, NOW + 5) == [[1, 1]]


def test_the_oldest_row_ends_the_wait_even_if_a_more_urgent_one_is_young() -> None:
    scheduler = filled(
        job(1, 2, bulk=True, enqueued=NOW - 5), job(2), limits=LIMITS._replace(max_queue_delay_seconds=5.0)
    )
    assert numbers(scheduler.next_batch(NOW)) == [(2, 0), (1, 0), (1, 1)]


def test_quarantined_rows_and_rows_at_the_token_budget_do_not_wait() -> None:
    limits = LIMITS._replace(max_queue_delay_seconds=5.0)
    assert drained(filled(job(1, quarantined=True), limits=limits)) == [[1]]
    assert drained(filled(job(1, tokens=60), limits=limits)) == [[1]]


def test_the_queue_is_counted_in_images() -> None:
    scheduler = filled(job(1, 3), job(2, 5, shape="b", tokens=20), job(3, 2, shape="b", tokens=20, deadline=NOW + 1))
    assert scheduler.queued_images == 10
    scheduler.next_batch(NOW)
    assert scheduler.queued_images == 6
    scheduler.cancel((0, 1))
    scheduler.expire(NOW + 1)
    assert scheduler.queued_images == 3
    drained(scheduler)
    assert scheduler.queued_images == 0


class Payload:
    pass


@pytest.mark.parametrize("end", ["cancel", "run", "expire", "remove"])
def test_ended_jobs_are_freed_while_an_old_one_stays(end: str) -> None:
    """The old job is at the top of the heaps by age and by deadline; ended ones behind it must not stay in them."""
    scheduler = filled(job(0, 10_000, bulk=True, enqueued=0.0, deadline=NOW + 1))
    alive: weakref.WeakSet[Payload] = weakref.WeakSet()
    most = 0
    for n in range(1, 2001):
        payload = Payload()
        alive.add(payload)
        deadline = NOW if end == "expire" else NOW + 2
        scheduler.add(job(n, frontend=1, deadline=deadline, payload=payload), NOW)
        del payload
        match end:
            case "cancel":
                assert scheduler.cancel((1, n)) == (0,)
            case "run":
                assert scheduler.next_batch(NOW) is not None
            case "expire":
                assert len(scheduler.expire(NOW)) == 1
            case "remove":
                scheduler.remove_frontend(1)
        most = max(most, len(alive))
    # At most two jobs are queued at a time: the old one, and one that a batch by shares left for the next.
    assert most <= 2 * (2 * 2 + SLACK)
    assert scheduler.expire(NOW + 1)[0][0].key == (0, 0)
    drained(scheduler)
    assert len(alive) == 0

"""Admission and scheduler together under overload, on simulated time: how many requests are answered in time."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from dinov3_server.engine.forecast import Demand, QueuedTokens, predict
from dinov3_server.engine.messages import NO_LOAD
from dinov3_server.engine.pace import BatchTime, Pace
from dinov3_server.engine.scheduler import Job, Limits, Scheduler
from dinov3_server.engine.shares import Caller

TOKENS = 201
LIMITS = Limits(32, 16384, 0.0)
Arrival = tuple[float, int, float | None, Caller, bool]  # when, images, deadline in seconds, caller, bulk


@dataclass
class Outcome:
    """Images by outcome. `latencies` is by caller, in seconds; `busy` is device time in seconds."""

    offered: int = 0
    good: int = 0
    refused: int = 0
    dropped: int = 0
    late: int = 0
    busy: float = 0.0
    late_busy: float = 0.0
    latencies: dict[Caller, list[float]] = field(default_factory=dict)
    refusals: dict[Caller, int] = field(default_factory=dict)


def simulate(
    arrivals: Iterator[Arrival],
    seconds_of: Callable[[int, float], float],
    again: Callable[[Arrival, float], Arrival | None] = lambda arrival, now: None,
) -> Outcome:
    """Simulate a device that takes `seconds_of(rows, now)` for a batch, with `arrivals` in order of time.

    `again` returns the next request of a closed loop, given an arrival that has been answered or refused.
    """
    pace, waiting, outcome = Pace(), QueuedTokens(), Outcome()
    scheduler = Scheduler(LIMITS, pace)
    coming: list[tuple[float, int, Arrival]] = []
    numbers = iter(range(10**9))
    demands: dict[int, tuple[Demand, Arrival, int]] = {}
    running: tuple[float, float, list[int], list[Job]] | None = None
    running_tokens = 0
    now = 0.0

    def push(arrival: Arrival | None) -> None:
        if arrival is not None:
            heapq.heappush(coming, (arrival[0], next(numbers), arrival))

    def ended(arrival: Arrival, at: float) -> None:
        push(again(arrival, at))

    push(next(arrivals, None))
    while coming or running or scheduler.queued_images:
        times = [coming[0][0]] if coming else []
        if running:
            times.append(running[1])
        wakeup = scheduler.wakeup(now)
        if wakeup is not None:
            times.append(wakeup)
        now = max(now, min(times))
        while coming and coming[0][0] <= now:
            _, _, arrival = heapq.heappop(coming)
            push(next(arrivals, None))
            at, images, allowed, caller, bulk = arrival
            demand = Demand(images, 0, images * TOKENS, caller, bulk)
            outcome.offered += images
            left = pace.tokens_left(running_tokens, running[0], now) if running else 0
            ahead = waiting.ahead(demand, NO_LOAD._replace(running=left), 0)
            expected = predict(demand, ahead, [pace], 32 * TOKENS, 0.0, now)
            if allowed is not None and not expected.ends_within(allowed):
                outcome.refused += images
                outcome.refusals[caller] = outcome.refusals.get(caller, 0) + 1
                ended(arrival, now + max(expected.wait, 0.05))
                continue
            number = next(numbers)
            demands[number] = demand, arrival, images
            waiting.add(demand, demand.tokens)
            deadline = None if allowed is None else at + allowed
            scheduler.add(Job((0, number), "s", TOKENS, tuple(range(images)), at, deadline, bulk, caller=caller), now)
        if running and running[1] <= now:
            since, end, keys, jobs = running
            pace.observe(BatchTime("s", TOKENS, len(keys), end - since), end)
            outcome.busy += end - since
            late = sum(job.deadline is not None and job.deadline < end for job in jobs)
            outcome.late += late
            outcome.late_busy += (end - since) * late / len(jobs)
            for key, job in zip(keys, jobs, strict=True):
                demand, arrival, left = demands[key]
                demands[key] = demand, arrival, left - 1
                if left == 1:
                    del demands[key]
                    if job.deadline is None or job.deadline >= end:
                        outcome.good += demand.images
                    outcome.latencies.setdefault(demand.caller, []).append(end - arrival[0])
                    ended(arrival, end)
            running, running_tokens = None, 0
        for job, rows in scheduler.expire(now):
            demand, arrival, _ = demands.pop(job.key[1])
            waiting.add(demand, -len(rows) * TOKENS)
            outcome.dropped += demand.images
            ended(arrival, now)
        if running is None and (batch := scheduler.next_batch(now)):
            for row in batch:
                waiting.add(demands[row.job.key[1]][0], -TOKENS)
            keys = [row.job.key[1] for row in batch]
            running = now, now + seconds_of(len(batch), now), keys, [row.job for row in batch]
            running_tokens = len(batch) * TOKENS
    return outcome


def poisson(rate: float, seconds: float, deadlines: tuple[float, ...], seed: int) -> Iterator[Arrival]:
    """Yield single images of one caller, on average `rate` per second."""
    chance = random.Random(seed)
    now = 0.0
    while (now := now + chance.expovariate(rate)) < seconds:
        yield now, 1, chance.choice(deadlines), Caller("a", "1"), False


def cpu(rows: int, now: float) -> float:
    """Return the time of a batch of ViT-B on two cores, nearly proportional to its rows."""
    return 0.005 + 0.085 * rows


def gpu(rows: int, now: float) -> float:
    """Return the time of a batch on a device with a large fixed part, where full batches matter."""
    return 0.005 + 0.0002 * rows


@pytest.mark.parametrize("deadlines", [(2.0,), (10.0,), (2.0, 10.0)])
@pytest.mark.parametrize("load", [0.5, 1.0, 2.0, 5.0])
def test_goodput_is_near_the_offered_load_or_the_capacity(load: float, deadlines: tuple[float, ...]) -> None:
    capacity = 32 / cpu(32, 0)
    seconds = 120.0
    outcome = simulate(poisson(load * capacity, seconds, deadlines, seed=1), cpu)
    goodput = outcome.good / seconds
    if load < 1:
        assert goodput >= 0.97 * outcome.offered / seconds
    else:
        assert goodput >= 0.9 * capacity
    assert outcome.late_busy <= 0.02 * outcome.busy


@pytest.mark.parametrize("deadline", [0.1, 2.0])
@pytest.mark.parametrize("load", [1.0, 3.0])
def test_full_batches_are_kept_where_they_matter(load: float, deadline: float) -> None:
    capacity = 32 / gpu(32, 0)
    seconds = 3.0
    outcome = simulate(poisson(load * capacity, seconds, (deadline,), seed=2), gpu)
    assert outcome.good / seconds >= 0.9 * capacity
    assert outcome.late_busy <= 0.02 * outcome.busy


def test_goodput_on_a_device_that_becomes_four_times_slower_and_recovers() -> None:
    def seconds_of(rows: int, now: float) -> float:
        return cpu(rows, now) * (4 if 40 <= now < 80 else 1)

    fast = 32 / cpu(32, 0)
    outcome = simulate(poisson(2 * fast, 120.0, (2.0,), seed=3), seconds_of)
    assert outcome.good >= 0.85 * fast * (80 + 40 / 4)
    assert outcome.late_busy <= 0.04 * outcome.busy


def test_goodput_with_batches_of_varying_time() -> None:
    chance = random.Random(4)
    capacity = 32 / cpu(32, 0)
    outcome = simulate(
        poisson(2 * capacity, 120.0, (2.0,), seed=4), lambda rows, now: cpu(rows, now) * chance.uniform(0.85, 1.15)
    )
    assert outcome.good / 120 >= 0.88 * capacity
    assert outcome.late_busy <= 0.02 * outcome.busy


def noisy(rows: int, now: float, chance: random.Random) -> float:
    """Return the time of a batch on a device beside neighbors: exponential noise with a mean of 40 %."""
    return cpu(rows, now) * (1 + chance.expovariate(2.5)) / 1.4


def unsteady(rows: int, now: float, chance: random.Random) -> float:
    """Return the time of a batch on a device whose speed changes by a factor of 2.5 every 3 s."""
    return cpu(rows, now) * (1.43 if int(now / 3) % 2 else 0.57)


@pytest.mark.parametrize("device", [noisy, unsteady])
@pytest.mark.parametrize("load", [1.0, 2.0, 5.0])
def test_little_device_time_is_late_beside_neighbors(
    load: float, device: Callable[[int, float, random.Random], float]
) -> None:
    chance = random.Random(6)
    capacity = 32 / cpu(32, 0)
    outcome = simulate(poisson(load * capacity, 120.0, (2.0,), seed=6), lambda rows, now: device(rows, now, chance))
    assert outcome.good / 120 >= 0.85 * capacity
    assert outcome.late_busy <= 0.02 * outcome.busy


@pytest.mark.parametrize("bulk", [True, False])
def test_a_small_caller_is_served_quickly_beside_a_hog(bulk: bool) -> None:
    """A hog keeps four requests of 256 images in flight; another caller sends single images one after the other."""
    hog, small = Caller("address", "1"), Caller("address", "2")
    end = 400.0

    def again(arrival: Arrival, now: float) -> Arrival | None:
        return None if now > end else (now + 0.001, *arrival[1:])

    arrivals = iter([(0.0, 256, None, hog, bulk)] * 4 + [(1.0, 1, 60.0, small, False)])
    outcome = simulate(arrivals, cpu, again)
    full = cpu(32, 0)
    latencies = sorted(outcome.latencies[small])
    assert small not in outcome.refusals
    assert latencies[math.ceil(0.99 * len(latencies)) - 1] <= cpu(1, 0) + 3 * full
    rows_of_hog = 256 * len(outcome.latencies[hog])
    assert rows_of_hog >= 0.85 * end * 32 / full


def test_a_large_request_is_answered_beside_a_flood_of_small_ones() -> None:
    large, small = Caller("a", "1"), Caller("b", "1")
    capacity = 32 / cpu(32, 0)
    flood = [
        (at, images, deadline, small, bulk)
        for at, images, deadline, _, bulk in poisson(2 * capacity, 60.0, (2.0,), seed=5)
    ]
    arrivals = iter(sorted([*flood, (10.0, 128, 60.0, large, False)]))
    outcome = simulate(arrivals, cpu)
    # Its share is half of the device.
    assert outcome.latencies[large][0] <= 2.3 * 128 / capacity

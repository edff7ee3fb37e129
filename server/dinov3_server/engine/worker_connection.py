"""A worker as a frontend sees it: the jobs that it was given, and how busy it is.

A *run* is one call of `Engine.run`. Its rows go to workers in *jobs*: all in one, or spread over several workers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dinov3_server.engine.admission import Reservation
from dinov3_server.engine.block import Block
from dinov3_server.engine.channel import Channel
from dinov3_server.engine.messages import NO_LOAD, JobResult, Load, Submit
from dinov3_server.engine.pace import BatchTime, Pace
from dinov3_server.errors import ServingError
from dinov3_server.models.interface import ModelInfo


class BlockResult(NamedTuple):
    """Result of a run, from the time `enqueued` of time.monotonic() on.

    `failed` maps rows to their errors; the features of the others are in the arena. `batches` has a result for each
    batch that had rows of the run, in the order in which they ended.
    """

    failed: dict[int, ServingError]
    enqueued: float
    batches: Sequence[JobResult]


@dataclass(eq=False)
class Run:
    """Rows of a block that a request waits for. `done` is set once all of them are answered, or the run has failed."""

    block: Block
    reservation: Reservation
    deadline: float | None
    bulk: bool
    enqueued: float
    done: asyncio.Future[None]
    unanswered: set[int]
    failed: dict[int, ServingError] = field(default_factory=dict)
    batches: list[JobResult] = field(default_factory=list)

    def resolve(self, rows: Sequence[int]) -> None:
        """Count `rows` as answered."""
        self.unanswered.difference_update(rows)
        if not self.unanswered and not self.done.done():
            self.done.set_result(None)

    @property
    def ended(self) -> bool:
        """Whether its results are no longer wanted: it was answered, it failed, or it was cancelled."""
        return self.done.done()


@dataclass(eq=False)
class SubmittedJob:
    """Rows of a run that one worker computes or, while `worker` is None, that wait for a worker to be ready."""

    index: int
    run: Run
    rows: set[int]  # not answered yet
    quarantined: bool = False
    worker: WorkerConnection | None = None
    tokens: int = 0  # per row; known once a worker has the job
    started: set[int] = field(default_factory=set)
    killed: bool = False  # a worker was killed by SIGKILL while it ran this job alone


@dataclass(eq=False)
class WorkerConnection:
    """A worker that has attached the frontend's arena (`Hello`)."""

    channel: Channel
    info: ModelInfo
    pace: Pace
    jobs: dict[int, SubmittedJob] = field(default_factory=dict)
    own_tokens: int = 0  # of this frontend, unanswered
    running_tokens: int = 0  # of those, on the device
    running_since: float = 0.0  # since when the device has computed the first of them, in seconds of time.monotonic()
    others: Load = NO_LOAD  # of the other frontends, as last reported

    def submit(self, job: SubmittedJob) -> None:
        """Send a job to the worker; the caller flushes the channel."""
        run = job.run
        job.worker = self
        self.jobs[job.index] = job
        job.tokens = self.info.tokens(run.block.shape)
        self.own_tokens += job.tokens * len(job.rows)
        run.reservation.add_references(len(job.rows))
        self.channel.send(
            Submit(
                job=job.index,
                block=run.block,
                rows=tuple(sorted(job.rows)),
                enqueued=run.enqueued,
                deadline=run.deadline,
                bulk=run.bulk,
                quarantined=job.quarantined,
                caller=run.reservation.demand.caller,
            )
        )

    def start(self, index: int, rows: Sequence[int]) -> None:
        """Note that rows of a job are about to reach the device."""
        job = self.jobs[index]
        if not self.running_tokens:
            self.running_since = time.monotonic()
        before = len(job.started)
        job.started.update(rows)
        self.running_tokens += job.tokens * (len(job.started) - before)
        job.run.reservation.dequeue(job.tokens * len(rows))

    def answer(self, index: int, rows: Sequence[int]) -> SubmittedJob:
        """Note that rows of a job are answered, and return the job."""
        job = self.jobs[index]
        before = len(job.started)
        job.rows.difference_update(rows)
        job.started.difference_update(rows)
        self.own_tokens -= job.tokens * len(rows)
        self.running_tokens -= job.tokens * (before - len(job.started))
        if not job.rows:
            del self.jobs[index]
        job.run.reservation.drop_references(len(rows))
        return job

    def load(self, now: float) -> Load:
        """Return the load of the other frontends, with the tokens of this one that are left on the device."""
        left = self.pace.tokens_left(self.running_tokens, self.running_since, now)
        return self.others._replace(running=self.others.running + left)

    def update_load(self, others: Load, batch: BatchTime | None) -> None:
        """Take in what the worker reported."""
        now = time.monotonic()
        self.others = others
        if batch is not None:
            self.pace.observe(batch, now)
            self.running_since = now

"""A frontend as a worker sees it: the jobs that it submitted, and its arena."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Literal

from dinov3_server.engine.arena import ArenaMapping
from dinov3_server.engine.block import Block
from dinov3_server.engine.channel import Channel
from dinov3_server.engine.messages import Dropped, Load, Submit
from dinov3_server.engine.pace import BatchTime
from dinov3_server.engine.scheduler import BatchRow, Job


@dataclass(eq=False)
class OpenJob:
    """A submitted job until all of its rows are answered; the payload of the scheduler's `Job`."""

    block: Block
    tokens: int  # per row
    unanswered: int
    bulk: bool
    cancelled: bool = False


class FrontendConnection:
    """The channel to a frontend, and the counts of its rows.

    `key` identifies it to the scheduler and the runner; a frontend that was restarted has a new one. `mapping` is its
    arena while it is attached to the runner; only the attacher uses it.
    """

    def __init__(self, key: int, fd: int) -> None:
        self.key = key
        self.channel = Channel(socket.socket(fileno=fd))
        self.mapping: ArenaMapping | None = None
        self.attached = False  # and Hello has been sent, which is the first message
        self.gone = False
        self.load_sent_at = 0.0
        self.batch_sent: BatchTime | None = None  # the last one that this frontend was sent
        self.running = 0  # rows of batches that are on the device, or are to be run again
        # Tokens that are not answered.
        self._running_tokens = self._interactive_tokens = self._bulk_tokens = 0
        self._jobs: dict[int, OpenJob] = {}

    def submit(self, submit: Submit, tokens: int) -> Job:
        """Return the scheduler's job for a submitted one, whose rows have `tokens` tokens each."""
        job = self._jobs[submit.job] = OpenJob(submit.block, tokens, len(submit.rows), submit.bulk)
        self._enqueue(job, len(submit.rows))
        return Job(
            key=(self.key, submit.job),
            shape=submit.block.shape,
            tokens=tokens,
            rows=submit.rows,
            enqueued=submit.enqueued,
            deadline=submit.deadline,
            bulk=submit.bulk,
            quarantined=submit.quarantined,
            payload=job,
            caller=submit.caller,
        )

    def start(self, job: OpenJob, rows: int) -> None:
        """Count rows that leave the queue for the device."""
        self.running += rows
        self._enqueue(job, -rows)
        self._running_tokens += rows * job.tokens

    def cancel(self, index: int) -> None:
        """Mark a job as cancelled, unless it has been answered in the meantime."""
        if job := self._jobs.get(index):
            job.cancelled = True

    def drop(
        self, index: int, rows: tuple[int, ...], reason: Literal["cancelled", "expired", "late"], started: bool = False
    ) -> None:
        """Answer rows that will not be computed. `started`: they had left the queue, for a batch that failed."""
        self.answered(index, len(rows), started)
        self.channel.send(Dropped(index, rows, reason))

    def answered(self, index: int, rows: int, started: bool = True) -> None:
        """Count rows as answered."""
        job = self._jobs[index]
        if started:
            self._running_tokens -= rows * job.tokens
        else:
            self._enqueue(job, -rows)
        job.unanswered -= rows
        if not job.unanswered:
            del self._jobs[index]

    @property
    def load(self) -> Load:
        return Load(self._running_tokens, self._interactive_tokens, self._bulk_tokens)

    def _enqueue(self, job: OpenJob, rows: int) -> None:
        """Count rows as queued; if negative, as not queued any more."""
        if job.bulk:
            self._bulk_tokens += rows * job.tokens
        else:
            self._interactive_tokens += rows * job.tokens

    def drop_reason(self, row: BatchRow, now: float) -> Literal["cancelled", "expired"] | None:
        """Return why a row need not be computed any more, or None if it is still wanted."""
        job: OpenJob = row.job.payload
        if job.cancelled or self.gone:
            return "cancelled"
        return "expired" if row.job.deadline is not None and row.job.deadline <= now else None

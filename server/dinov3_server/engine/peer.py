"""A frontend as a worker sees it: what it has submitted, what of that is unanswered, and where its arena is."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Literal

from dinov3_server.engine.arena import ArenaMapping
from dinov3_server.engine.block import Block
from dinov3_server.engine.channel import Channel
from dinov3_server.engine.messages import Dropped, Load, Submit
from dinov3_server.engine.scheduler import BatchRow, Job


@dataclass(eq=False)
class Part:
    """A submitted part until all of its rows are answered; the payload of its job."""

    block: Block
    tokens: int  # a row
    unanswered: int
    bulk: bool
    cancelled: bool = False


class Frontend:
    """`key` is its name to the scheduler and the runner. A frontend that was restarted is another one.

    `mapping` is the attacher's: its arena, while the runner knows it.
    """

    def __init__(self, key: int, fd: int) -> None:
        self.key = key
        self.channel = Channel(socket.socket(fileno=fd))
        self.mapping: ArenaMapping | None = None
        self.attached = False  # and told so: nothing else is said to it before
        self.gone = False
        # Tokens that were submitted and are unanswered.
        self._running = self._interactive = self._bulk = 0
        self.told = 0.0  # when it was last told of the others' load
        self.running = 0  # rows in batches on the device, or waiting to be run again
        self._parts: dict[int, Part] = {}

    def submit(self, submit: Submit, tokens: int) -> Job:
        """The job of a new part, whose rows are `tokens` each."""
        part = self._parts[submit.part] = Part(submit.block, tokens, len(submit.rows), submit.bulk)
        self._wait(part, len(submit.rows))
        return Job(
            key=(self.key, submit.part),
            shape=submit.block.shape,
            tokens=tokens,
            rows=submit.rows,
            enqueued=submit.enqueued,
            deadline=submit.deadline,
            bulk=submit.bulk,
            solo=submit.solo,
            payload=part,
            caller=submit.caller,
        )

    def start(self, part: Part, rows: int) -> None:
        """Count rows that leave the queue for the device."""
        self.running += rows
        self._wait(part, -rows)
        self._running += rows * part.tokens

    def cancel(self, index: int) -> None:
        """Nobody waits for this part any more; it may have been answered in the meantime."""
        if part := self._parts.get(index):
            part.cancelled = True

    def drop(
        self, index: int, rows: tuple[int, ...], reason: Literal["cancelled", "expired", "late"], started: bool = False
    ) -> None:
        """Tell it that these rows have no features. `started`: they had left the queue, for a batch that failed."""
        self.answered(index, len(rows), started)
        self.channel.send(Dropped(index, rows, reason))

    def answered(self, index: int, rows: int, started: bool = True) -> None:
        """Count rows that it has been told of."""
        part = self._parts[index]
        if started:
            self._running -= rows * part.tokens
        else:
            self._wait(part, -rows)
        part.unanswered -= rows
        if not part.unanswered:
            del self._parts[index]

    @property
    def load(self) -> Load:
        return Load(self._running, self._interactive, self._bulk)

    def _wait(self, part: Part, rows: int) -> None:
        """Count rows that wait from now on, or, where negative, no longer."""
        if part.bulk:
            self._bulk += rows * part.tokens
        else:
            self._interactive += rows * part.tokens

    def given_up(self, row: BatchRow, now: float) -> Literal["cancelled", "expired"] | None:
        """Why it does not wait for this row any more; None while it does."""
        part: Part = row.job.payload
        if part.cancelled or self.gone:
            return "cancelled"
        return "expired" if row.job.deadline is not None and row.job.deadline <= now else None

"""A frontend as a worker sees it: what it has submitted, what of that is unanswered, and where its arena is."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Literal

from dinov3_server.engine.arena import ArenaMapping
from dinov3_server.engine.block import Block
from dinov3_server.engine.channel import Channel
from dinov3_server.engine.messages import Dropped, Submit
from dinov3_server.engine.scheduler import BatchRow, Job


@dataclass(eq=False)
class Part:
    """A submitted part until all of its rows are answered; the payload of its job."""

    block: Block
    tokens: int  # a row
    unanswered: int
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
        self.tokens = 0  # submitted and unanswered
        self.running = 0  # rows in batches on the device, or waiting to be run again
        self._parts: dict[int, Part] = {}

    def submit(self, submit: Submit, tokens: int) -> Job:
        """The job of a new part, whose rows are `tokens` each."""
        part = self._parts[submit.part] = Part(submit.block, tokens, len(submit.rows))
        self.tokens += tokens * len(submit.rows)
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
        )

    def cancel(self, index: int) -> None:
        """Nobody waits for this part any more; it may have been answered in the meantime."""
        if part := self._parts.get(index):
            part.cancelled = True

    def drop(self, index: int, rows: tuple[int, ...], reason: Literal["cancelled", "expired"]) -> None:
        """Tell it that these rows never reached the device."""
        self.answered(index, len(rows))
        self.channel.send(Dropped(index, rows, reason))

    def answered(self, index: int, rows: int) -> None:
        part = self._parts[index]
        self.tokens -= rows * part.tokens
        part.unanswered -= rows
        if not part.unanswered:
            del self._parts[index]

    def given_up(self, row: BatchRow, now: float) -> Literal["cancelled", "expired"] | None:
        """Why it does not wait for this row any more; None while it does."""
        part: Part = row.job.payload
        if part.cancelled or self.gone:
            return "cancelled"
        return "expired" if row.job.deadline is not None and row.job.deadline <= now else None

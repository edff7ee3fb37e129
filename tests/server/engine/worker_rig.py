"""A worker on a thread, a runner that the test controls batch by batch, and fake frontends."""

from __future__ import annotations

import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dinov3_server.config.settings import Settings
from dinov3_server.engine.arena import PAGE, Arena
from dinov3_server.engine.block import Block
from dinov3_server.engine.channel import Channel, pair
from dinov3_server.engine.messages import Attach, Connected, Drain, Dropped, Hello, LoadReport, Results, Submit
from dinov3_server.engine.pace import BatchTime
from dinov3_server.engine.worker import Worker
from dinov3_server.metrics import Metrics
from dinov3_server.models.interface import Batch, BatchResult, FeatureSpec, Output, PixelShape
from tests.support.numpy_runner import NumpyRunner, _Launched, expected
from tests.support.waiting import LIMIT

SHAPE = PixelShape(32, 48, "uint8")
SPEC = FeatureSpec((Output("cls"), Output("patches"), Output("patches", 0)), "float32")
Outcome = Exception | None


class SteppedRunner(NumpyRunner):
    """A runner that, while `stepping`, takes the outcome of each batch from `steps`, which the test fills."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__("cpu")
        self.pipeline_depth = depth
        self.stepping = False
        self.batches: list[Batch] = []
        self.steps: queue.Queue[Outcome] = queue.Queue()
        self.failing: Callable[[Batch], Outcome] = lambda batch: None
        self.launching: Callable[[Batch], None] = lambda batch: None
        self.attaching: Callable[[], object] = lambda: None
        self.detaching: Callable[[], object] = lambda: None
        self.in_flight: list[Batch] = []
        self.together: list[set[int]] = []  # pixel offsets of all rows on the device, at each launch

    def attach(self, arena: int, memory: memoryview) -> None:
        self.attaching()
        super().attach(arena, memory)

    def detach(self, arena: int) -> None:
        self.detaching()
        super().detach(arena)

    def launch(self, batch: Batch) -> _Launched:
        self.launching(batch)
        self.batches.append(batch)
        self.in_flight.append(batch)
        self.together.append({row.pixel_offset for one in self.in_flight for row in one.rows})
        return super().launch(batch)

    def finish(self, launched: _Launched) -> BatchResult:
        outcome = self.steps.get(timeout=LIMIT) if self.stepping else None
        outcome = outcome or self.failing(launched.batch)
        self.in_flight.remove(launched.batch)
        if outcome is not None:
            raise outcome
        return super().finish(launched)

    @property
    def arenas(self) -> int:
        return len(self._arenas)


class FakeFrontend:
    def __init__(self, control: Channel, buffer: int | None = None, attached: bool = True) -> None:
        ours, theirs = pair()
        if buffer is not None:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        control.send(Connected(0), [theirs.fileno()])
        control.flush()
        theirs.close()
        self.channel = Channel(ours)
        self.arena = Arena(128 * PAGE)
        self.send(Attach(self.arena.nbytes), [self.arena.fd])
        self.received: list[Any] = []
        self.backlog: int | None = None  # tokens of the others, as last reported
        self.reports = 0
        self.batches: list[BatchTime] = []  # as reported, alone or with results
        self.job_count = 0
        self.images: dict[int, np.ndarray[Any, np.dtype[np.uint8]]] = {}
        if attached:
            self.receive_hello()

    def receive_hello(self) -> None:
        """Wait until the worker has attached the arena."""
        assert self.receive() == Hello(NumpyRunner("cpu").info)

    def send(self, message: object, fds: tuple[int, ...] | list[int] = ()) -> None:
        self.channel.send(message, fds)
        assert self.channel.flush_within(LIMIT)

    def receive(self) -> Any:
        end = time.monotonic() + LIMIT
        while not self.received:
            assert time.monotonic() < end, "the worker sent nothing"
            select.select([self.channel], [], [], 1.0)
            self.read()
        return self.received.pop(0)

    def read(self) -> None:
        """Take the messages that have arrived."""
        for message, _ in self.channel.receive():
            if isinstance(message, LoadReport | Results) and message.batch is not None:
                self.batches.append(message.batch)
            if isinstance(message, LoadReport):
                self.reports += 1
                self.backlog = message.others.tokens
            else:
                self.received.append(message)

    def submit(
        self, images: int, quarantined: bool = False, deadline: float | None = None, shape: PixelShape = SHAPE
    ) -> Submit:
        size = Block.plan(NumpyRunner("cpu").info, shape, images, SPEC).end
        offset = self.arena.allocate(size)
        assert offset is not None
        block = Block.plan(NumpyRunner("cpu").info, shape, images, SPEC, offset)
        self.job_count += 1
        pixels = np.random.default_rng(self.job_count).integers(
            0, 250, (images, shape.height, shape.width, 3), np.uint8
        )
        self.images[self.job_count] = pixels
        self.arena.memory[block.pixel_offset : block.pixel_offset + pixels.nbytes] = pixels.tobytes()
        submit = Submit(self.job_count, block, tuple(range(images)), time.monotonic(), deadline, False, quarantined)
        self.send(submit)
        return submit

    def check(self, submit: Submit, rows: tuple[int, ...]) -> None:
        """Check that the features of `rows` are those of their own pixels."""
        for row in rows:
            starts = submit.block.row_output_offsets(row)
            for output, start, stride in zip(SPEC.outputs, starts, submit.block.strides, strict=True):
                got = np.frombuffer(bytes(self.arena.memory[start : start + stride]), np.float32)
                assert np.array_equal(got, expected(self.images[submit.job][row], output).ravel())

    def answers(self, *submits: Submit) -> dict[tuple[int, int], str]:
        """Wait for the answers to all rows of `submits`: "ok", "failed: ..." or "dropped: ..." by (job, row)."""
        answers: dict[tuple[int, int], str] = {}
        wanted = {(submit.job, row) for submit in submits for row in submit.rows}
        while set(answers) != wanted:
            new: dict[tuple[int, int], str] = {}
            match self.receive():
                case Results(results):
                    for result in results:
                        for row in result.rows:
                            new[result.job, row] = f"failed: {result.failed[row]}" if row in result.failed else "ok"
                case Dropped(job, rows, reason):
                    new = {(job, row): f"dropped: {reason}" for row in rows}
            assert not set(new) & set(answers), "a row was answered twice"
            assert set(new) <= wanted
            answers |= new
        for submit in submits:
            self.check(submit, tuple(row for row in submit.rows if answers[submit.job, row] == "ok"))
        return answers

    def close(self) -> None:
        self.channel.close()
        self.arena.close()


class RunningWorker:
    """A worker on a thread."""

    def __init__(self, runner: SteppedRunner, settings: Settings) -> None:
        ours, theirs = pair()
        self.runner, self.control = runner, Channel(ours)
        self.metrics = Metrics()
        worker = Worker(runner, settings, Channel(theirs), self.metrics)
        self.thread = threading.Thread(target=worker.run)
        self.thread.start()
        self.frontends: list[FakeFrontend] = []
        self._theirs = worker._control

    def frontend(self, buffer: int | None = None, attached: bool = True) -> FakeFrontend:
        """Connect a frontend with a socket buffer of `buffer` bytes, and wait for its Hello if `attached`."""
        self.frontends.append(FakeFrontend(self.control, buffer, attached))
        return self.frontends[-1]

    def close(self) -> None:
        self.runner.stepping = False
        for _ in range(100):
            self.runner.steps.put(None)
        self.control.send(Drain(0.0))
        self.control.flush()
        self.thread.join(LIMIT)
        assert not self.thread.is_alive()
        for frontend in self.frontends:
            frontend.close()
        self.control.close()
        self._theirs.close()

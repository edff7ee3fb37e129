"""The worker's loop on a thread, with a runner that the test steps and a frontend that the test plays."""

from __future__ import annotations

import queue
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from dinov3_server.backbone.interface import (
    Batch,
    DeviceLost,
    DeviceOutOfMemory,
    FeatureSpec,
    Finished,
    Output,
    PixelShape,
)
from dinov3_server.config import Settings
from dinov3_server.engine import worker as worker_module
from dinov3_server.engine.arena import PAGE, Arena
from dinov3_server.engine.block import Block
from dinov3_server.engine.channel import Channel, pair
from dinov3_server.engine.messages import (
    Attach,
    Cancel,
    Connected,
    Drain,
    Dropped,
    Hello,
    PartRows,
    Results,
    Started,
    Submit,
)
from dinov3_server.engine.worker import Worker
from dinov3_server.metrics import Metrics
from tests.support.numpy_runner import NumpyRunner, _Launched, expected
from tests.support.waiting import LIMIT, until

SHAPE = PixelShape(32, 48, "uint8")
SPEC = FeatureSpec((Output("cls"), Output("patches")), "float32")
Outcome = Exception | None


class SteppedRunner(NumpyRunner):
    """Every batch waits in `finish` until the test says how it goes on, while `stepping`."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__("cpu")
        self.pipeline_depth = depth
        self.stepping = False
        self.batches: list[Batch] = []
        self.steps: queue.Queue[Outcome] = queue.Queue()
        self.failing: Callable[[Batch], Outcome] = lambda batch: None
        self.in_flight: list[Batch] = []
        self.together: list[set[int]] = []  # pixel offsets of all rows on the device, at each launch

    def launch(self, batch: Batch) -> _Launched:
        self.batches.append(batch)
        self.in_flight.append(batch)
        self.together.append({row.pixels for one in self.in_flight for row in one.rows})
        return super().launch(batch)

    def finish(self, launched: _Launched) -> Finished:
        outcome = self.steps.get(timeout=LIMIT) if self.stepping else None
        outcome = outcome or self.failing(launched.batch)
        self.in_flight.remove(launched.batch)
        if outcome is not None:
            raise outcome
        return super().finish(launched)

    @property
    def arenas(self) -> int:
        return len(self._arenas)


class PlayedFrontend:
    def __init__(self, control: Channel) -> None:
        ours, theirs = pair()
        control.send(Connected(0), [theirs.fileno()])
        control.flush()
        theirs.close()
        self.channel = Channel(ours)
        self.arena = Arena(64 * PAGE)
        self.say(Attach(self.arena.nbytes), [self.arena.fd])
        self.heard: list[Any] = []
        assert self.hear() == Hello(NumpyRunner("cpu").info)
        self.parts = 0
        self.images: dict[int, np.ndarray[Any, np.dtype[np.uint8]]] = {}

    def say(self, message: object, fds: tuple[int, ...] | list[int] = ()) -> None:
        self.channel.send(message, fds)
        assert self.channel.flush_within(LIMIT)

    def hear(self) -> Any:
        end = time.monotonic() + LIMIT
        while not self.heard:
            assert time.monotonic() < end, "the worker says nothing"
            select.select([self.channel], [], [], 1.0)
            self.heard += [message for message, _ in self.channel.receive()]
        return self.heard.pop(0)

    def submit(
        self, images: int, solo: bool = False, deadline: float | None = None, shape: PixelShape = SHAPE
    ) -> Submit:
        size = Block.plan(NumpyRunner("cpu").info, shape, images, SPEC).end
        offset = self.arena.allocate(size)
        assert offset is not None
        block = Block.plan(NumpyRunner("cpu").info, shape, images, SPEC, offset)
        self.parts += 1
        pixels = np.random.default_rng(self.parts).integers(0, 250, (images, shape.height, shape.width, 3), np.uint8)
        self.images[self.parts] = pixels
        self.arena.memory[block.pixels : block.pixels + pixels.nbytes] = pixels.tobytes()
        submit = Submit(self.parts, block, tuple(range(images)), time.monotonic(), deadline, False, solo)
        self.say(submit)
        return submit

    def check(self, submit: Submit, rows: tuple[int, ...]) -> None:
        """The features of `rows` are those of their own pixels."""
        for row in rows:
            starts = submit.block.row_outputs(row)
            for output, start, stride in zip(SPEC.outputs, starts, submit.block.strides, strict=True):
                got = np.frombuffer(bytes(self.arena.memory[start : start + stride]), np.float32)
                assert np.array_equal(got, expected(self.images[submit.part][row], output).ravel())

    def answers(self, *submits: Submit) -> dict[tuple[int, int], str]:
        """Hear until every row of `submits` is answered: "ok", "failed: ..." or "dropped: ..." by (part, row)."""
        answers: dict[tuple[int, int], str] = {}
        wanted = {(submit.part, row) for submit in submits for row in submit.rows}
        while set(answers) != wanted:
            new: dict[tuple[int, int], str] = {}
            match self.hear():
                case Results(parts):
                    for part in parts:
                        for row in part.rows:
                            new[part.part, row] = f"failed: {part.failed[row]}" if row in part.failed else "ok"
                case Dropped(part, rows, reason):
                    new = {(part, row): f"dropped: {reason}" for row in rows}
            assert not set(new) & set(answers), "a row was answered twice"
            assert set(new) <= wanted
            answers |= new
        for submit in submits:
            self.check(submit, tuple(row for row in submit.rows if answers[submit.part, row] == "ok"))
        return answers

    def close(self) -> None:
        self.channel.close()
        self.arena.close()


class Running:
    """A worker on a thread."""

    def __init__(self, runner: SteppedRunner, settings: Settings) -> None:
        ours, theirs = pair()
        self.runner, self.control = runner, Channel(ours)
        worker = Worker(runner, settings, Channel(theirs), Metrics())
        self.thread = threading.Thread(target=worker.run)
        self.thread.start()
        self.frontends: list[PlayedFrontend] = []
        self._theirs = worker._control

    def frontend(self) -> PlayedFrontend:
        self.frontends.append(PlayedFrontend(self.control))
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


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Running]]:
    """Ends its workers before what the test has patched is put back."""
    running: list[Running] = []

    def start(depth: int = 1, **settings: Any) -> Running:
        running.append(Running(SteppedRunner(depth), Settings(**settings)))
        return running[-1]

    yield start
    for one in running:
        one.close()


def test_a_batch_is_announced_before_it_runs_and_answered_after(start):
    running = start()
    running.runner.stepping = True
    frontend = running.frontend()
    submit = frontend.submit(3)
    assert frontend.hear() == Started((PartRows(submit.part, (0, 1, 2)),))
    assert frontend.heard == []
    running.runner.steps.put(None)
    assert set(frontend.answers(submit).values()) == {"ok"}


def test_while_the_device_is_busy_the_next_batch_grows(start):
    running = start()
    running.runner.stepping = True
    frontend = running.frontend()
    submits = [frontend.submit(1)]
    until(lambda: running.runner.batches)
    submits += [frontend.submit(2) for _ in range(5)]
    for _ in range(2):
        running.runner.steps.put(None)
    frontend.answers(*submits)
    assert [len(batch.rows) for batch in running.runner.batches] == [1, 10]


def test_two_batches_are_on_a_device_that_prepares_ahead_and_no_more(start):
    running = start(depth=2)
    running.runner.stepping = True
    frontend = running.frontend()
    submits = []
    for expected_batches in (1, 2):
        submits.append(frontend.submit(1))
        until(lambda count=expected_batches: len(running.runner.batches) == count)
    submits += [frontend.submit(1), frontend.submit(1)]
    for _ in range(3):
        running.runner.steps.put(None)
    frontend.answers(*submits)
    assert [len(batch.rows) for batch in running.runner.batches] == [1, 1, 2]


def test_a_suspect_has_the_device_for_itself(start):
    running = start(depth=2)
    running.runner.stepping = True
    frontend = running.frontend()
    normal = [frontend.submit(1) for _ in range(3)]
    suspect = frontend.submit(2, solo=True)
    after = [frontend.submit(1) for _ in range(3)]
    for _ in range(10):
        running.runner.steps.put(None)
    assert set(frontend.answers(*normal, suspect, *after).values()) == {"ok"}
    alone = {suspect.block.row_pixels(row) for row in suspect.rows}
    with_suspect = [together for together in running.runner.together if together & alone]
    assert with_suspect == [{pixels} for pixels in sorted(alone)]


def test_a_batch_that_runs_out_of_memory_is_halved_and_the_shapes_ceiling_remembered(start):
    running = start()
    running.runner.failing = lambda batch: DeviceOutOfMemory("scripted") if len(batch.rows) > 3 else None
    frontend = running.frontend()
    first = frontend.submit(10)
    assert set(frontend.answers(first).values()) == {"ok"}
    sizes = [len(batch.rows) for batch in running.runner.batches]
    assert sizes[0] == 10
    second = frontend.submit(10)
    assert set(frontend.answers(second).values()) == {"ok"}
    assert max(len(batch.rows) for batch in running.runner.batches[len(sizes) :]) <= 3


def test_an_image_too_large_for_the_device_alone_fails_alone(start):
    running = start()
    running.runner.failing = lambda batch: (
        DeviceOutOfMemory("scripted") if batch.shape != SHAPE or len(batch.rows) > 1 else None
    )
    frontend = running.frontend()
    large, small = frontend.submit(1, shape=PixelShape(64, 64, "uint8")), frontend.submit(1)
    answers = frontend.answers(large, small)
    assert "memory" in answers[large.part, 0]
    assert answers[small.part, 0] == "ok"


def test_a_batch_that_fails_is_bisected_so_that_one_poisoned_row_fails_alone(start):
    running = start()
    running.runner.stepping = True
    frontend = running.frontend()
    submit = frontend.submit(7)
    poison = submit.block.row_pixels(4)
    running.runner.failing = lambda batch: (
        RuntimeError("scripted") if any(row.pixels == poison for row in batch.rows) else None
    )
    other = frontend.submit(7)
    for _ in range(20):
        running.runner.steps.put(None)
    answers = frontend.answers(submit, other)
    assert [key for key, answer in answers.items() if answer != "ok"] == [(submit.part, 4)]


def test_cancelled_and_expired_rows_never_reach_the_device(start):
    running = start()
    running.runner.stepping = True
    frontend = running.frontend()
    busy = frontend.submit(1)
    until(lambda: running.runner.batches)
    cancelled, kept = frontend.submit(2), frontend.submit(1)
    expired = frontend.submit(2, deadline=time.monotonic() + 0.02)
    frontend.say(Cancel(cancelled.part))
    answers = {**frontend.answers(cancelled), **frontend.answers(expired)}  # while the device is busy
    assert set(answers.values()) == {"dropped: cancelled", "dropped: expired"}
    for _ in range(2):
        running.runner.steps.put(None)
    frontend.answers(busy, kept)
    assert [len(batch.rows) for batch in running.runner.batches] == [1, 1]


def test_rows_of_a_failed_batch_that_nobody_waits_for_any_more_are_not_run_again(start):
    running = start()
    running.runner.stepping = True
    frontend = running.frontend()
    gone, kept = frontend.submit(1), None
    until(lambda: running.runner.batches)
    gone2, kept = frontend.submit(2), frontend.submit(2)
    running.runner.steps.put(None)
    until(lambda: len(running.runner.batches) == 2)
    frontend.say(Cancel(gone2.part))
    barrier = frontend.submit(1)  # submitted after the cancel: once it is queued, the cancel was read
    running.runner.steps.put(RuntimeError("scripted"))
    for _ in range(8):
        running.runner.steps.put(None)
    answers = frontend.answers(gone, gone2, kept, barrier)
    rows_after = [row.pixels for batch in running.runner.batches[2:] for row in batch.rows]
    ran_again = {gone2.block.row_pixels(row) for row in gone2.rows} & set(rows_after)
    dropped = {row for row in gone2.rows if answers[gone2.part, row] == "dropped: cancelled"}
    assert ran_again == {gone2.block.row_pixels(row) for row in gone2.rows if row not in dropped}
    assert all(answers[kept.part, row] == "ok" for row in kept.rows)
    assert dropped == set(gone2.rows)


def test_a_frontend_that_dies_loses_its_rows_and_its_arena_once_no_batch_uses_it(start):
    running = start()
    running.runner.stepping = True
    dying, living = running.frontend(), running.frontend()
    first = dying.submit(1)
    until(lambda: running.runner.batches)
    dying.submit(3)
    kept = living.submit(2)
    assert dying.hear() == Started((PartRows(first.part, (0,)),))
    dying.channel.close()
    running.frontends.remove(dying)
    assert running.runner.arenas == 2
    for _ in range(2):
        running.runner.steps.put(None)
    assert set(living.answers(kept).values()) == {"ok"}
    until(lambda: running.runner.arenas == 1)
    assert [len(batch.rows) for batch in running.runner.batches] == [1, 2]
    dying.arena.close()


@pytest.mark.parametrize("how", ["lost", "hung"])
def test_a_lost_or_hung_device_ends_the_process(start, monkeypatch, how):
    exits: list[int] = []
    ended = threading.Event()

    def fake_exit(status: int) -> None:
        exits.append(status)
        running.runner.stepping = False
        running.runner.steps.put(None)
        ended.set()

    monkeypatch.setattr(worker_module.os, "_exit", fake_exit)
    running = start(batch_timeout_seconds=0.05 if how == "hung" else 60.0)
    running.runner.stepping = how == "hung"
    running.runner.failing = lambda batch: DeviceLost("scripted") if how == "lost" else None
    running.frontend().submit(1)
    assert ended.wait(LIMIT)
    assert exits[0] == worker_module.DEVICE_LOST

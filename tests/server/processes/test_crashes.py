"""Processes killed under load: no request is lost, no features are mixed up, and nothing is left behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from dinov3_client import Client
from dinov3_server.models.interface import Output
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.support.numpy_runner import BLOCK, DIE, KILL, REACHED, expected
from tests.support.server import Server
from tests.support.waiting import LIMIT, until

SIZES = ((32, 32), (32, 48), (64, 32))


def photo(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 250, (height, width, 3), np.uint8)


def check(features: Any, images: list[NDArray[np.uint8]], layers: Sequence[int] = ()) -> None:
    """Check that every image has the features of its own pixels, also of these `layers`."""
    assert len(features) == len(images)
    for one, image in zip(features, images, strict=True):
        np.testing.assert_array_equal(one.cls, expected(image, Output("cls")))
        np.testing.assert_array_equal(one.patches, expected(image, Output("patches")))
        assert list(one.layers) == list(layers)
        for layer in layers:
            np.testing.assert_array_equal(one.layers[layer].patches, expected(image, Output("patches", layer)))


def ask(client: Client, seed: int) -> None:
    """Send a request of one to four images of one size, and check its answer."""
    height, width = SIZES[seed % len(SIZES)]
    images = [photo(seed * 10 + i, height, width) for i in range(1 + seed % 4)]
    check(client.extract(images, preset="none", dtype="float32", layers=0), images, layers=[0])


def call(channel: grpc.Channel, image: NDArray[np.uint8]) -> Any:
    """Send an image without a client, which would retry. Return the call, a future."""
    extract = channel.unary_unary(
        "/dinov3_serving.v1.FeatureService/Extract",
        request_serializer=pb.ExtractRequest.SerializeToString,
        response_deserializer=pb.ExtractResponse.FromString,
    )
    tensor = pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=[1, *image.shape], data=image.tobytes())
    return extract.future(
        pb.ExtractRequest(pixels=tensor, preprocessing=pb.Preprocessing(preset=pb.PRESET_NONE)), timeout=LIMIT
    )


@contextmanager
def held_call(server: Server, gate: Path) -> Iterator[Any]:
    """Yield a call that is on the device and stays there until `gate`, the server's TEST_GATE_FILE, exists."""
    image = photo(1, 32, 32)
    image[0, 0] = BLOCK
    with grpc.insecure_channel(server.grpc) as channel:
        held = call(channel, image)
        until(Path(f"{gate}{REACHED}").exists)
        yield held


class Load:
    """Threads that send requests and check the answers until the end of the block. `answered` counts the answers."""

    def __init__(self, server: Server, threads: int = 4, ask: Callable[[Client, int], None] = ask) -> None:
        self.answered = 0
        self._server, self._ask, self._threads = server, ask, threads
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(self._threads)
        self._done = [self._pool.submit(self._run, first) for first in range(self._threads)]
        return self

    def _run(self, seed: int) -> None:
        with self._server.client() as client:
            while not self._stop.is_set():
                self._ask(client, seed)
                seed += self._threads
                with self._lock:
                    self.answered += 1

    def more(self, count: int = 20) -> None:
        """Wait until `count` more requests are answered."""
        goal = self.answered + count
        until(lambda: self.answered >= goal or any(one.done() for one in self._done))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for one in self._done:
            one.result()


def descriptors(process: psutil.Process) -> int:
    return process.num_fds()


def test_no_request_is_lost_when_the_worker_is_killed_repeatedly_under_load() -> None:
    with Server("--frontends", "2") as server:
        supervisor = psutil.Process(server.process.pid)
        with Load(server) as load:
            load.more()
            before = descriptors(supervisor), [descriptors(frontend) for frontend in server.children("frontend")]
            for _ in range(3):
                (worker,) = server.children("worker")
                worker.kill()
                until(lambda dead=worker.pid: [w for w in server.children("worker") if w.pid != dead])
                load.more()
        until(lambda: server.metric("dinov3_worker_restarts_total", device="cpu") == 3)
        # The successor's channels replaced those of the dead worker: no descriptors have accumulated.
        until(lambda: descriptors(supervisor) <= before[0] + 1, "descriptors of the supervisor")
        after = [descriptors(frontend) for frontend in server.children("frontend")]
        assert all(now <= then + 2 for now, then in zip(after, before[1], strict=True))
        until(lambda: server.metric("dinov3_arena_bytes", state="used") == 0, "memory of the arenas")


def ask_for_many(client: Client, seed: int) -> None:
    """Send a request that is split over the workers, and check its answer."""
    images = [photo(seed * 100 + i, 32, 32) for i in range(80)]
    check(client.extract(images, preset="none", dtype="float32", layers=0), images, layers=[0])


def test_when_one_of_two_workers_is_killed_the_other_serves() -> None:
    with Server("--frontends", "2", "--devices", "cpu,cpu") as server:
        with Load(server, threads=2), Load(server, threads=2, ask=ask_for_many) as load:
            for turn in range(3):
                load.more(4)
                workers = server.children("worker")
                workers[turn % len(workers)].kill()
            load.more(4)
            until(lambda: len(server.children("worker")) == 2)
        until(lambda: server.metric("dinov3_worker_restarts_total", device="cpu") == 3)
        until(lambda: server.metric("dinov3_arena_bytes", state="used") == 0, "memory of the arenas")


@pytest.mark.parametrize("role", ["worker", "frontend"])
def test_a_stuck_process_is_killed_and_replaced(role: str) -> None:
    """A stopped process can neither end a hung batch nor close its connections."""
    with Server(TEST_SILENT_SECONDS="2.5") as server, server.client() as client:
        stuck = server.children(role)[0]
        stuck.suspend()
        ask(client, 1)  # after a worker's death it is submitted again, after a frontend's the client retries
        assert not stuck.is_running()
        assert [line for line in server.log if f"{role}-0 has sent nothing" in line]


@pytest.mark.parametrize(("order", "workers"), [(DIE, 2), (KILL, 3)], ids=["exit", "SIGKILL"])
def test_an_image_that_ends_its_worker_fails_alone(order: tuple[int, int, int], workers: int) -> None:
    with Server() as server, server.client() as client:
        poison = photo(1, 32, 32)
        poison[0, 0] = order
        with Load(server) as load:
            load.more(4)
            images = [photo(2, 32, 32), poison, photo(3, 32, 32)]
            features = client.extract(images, preset="none", dtype="float32", on_error="return")
            load.more(4)
        assert list(features.errors) == [1]
        assert "died" in str(features.errors[1])
        assert not features.cls[1].any(), "a failed image has zeros, not the arena's earlier content"
        for i in (0, 2):
            np.testing.assert_array_equal(features.cls[i], expected(images[i], Output("cls")))
        assert server.metric("dinov3_worker_restarts_total", device="cpu") == workers


def test_cancelled_calls_do_not_change_the_answers_of_others() -> None:
    """Calls are cancelled at random moments while others, checked bit by bit, share batches and arenas with them."""
    with Server("--frontends", "2") as server, grpc.insecure_channel(server.grpc) as channel:
        cancelled = 0

        def cancel(seed: int) -> bool:
            pending = call(channel, photo(seed, 32, 32))
            for _ in range(seed % 50):
                if pending.done():
                    break
            return bool(pending.cancel())

        with Load(server) as load:
            for seed in range(400):
                cancelled += cancel(seed)
            load.more()
        assert cancelled > 50
        until(lambda: server.metric("dinov3_arena_bytes", state="used") == 0, "ranges of cancelled calls are freed")


def test_the_memory_of_a_cancelled_call_is_not_reused_while_it_is_on_the_device(tmp_path: Path) -> None:
    """The batch of a cancelled call still runs, so its range of the arena is not given to the next request."""
    gate = tmp_path / "gate"
    with Server("--arena-bytes", "1MiB", TEST_GATE_FILE=str(gate)) as server, server.client() as client:
        with held_call(server, gate) as held:
            held.cancel()
            until(lambda: server.metric("dinov3_requests_total", method="Extract", code="CANCELLED") == 1)
            used = server.metric("dinov3_arena_bytes", state="used")
            assert used > 0
            with ThreadPoolExecutor() as pool:
                neighbors = [pool.submit(ask, client, seed) for seed in range(1, 5)]  # into the rest of a small arena
                until(lambda: server.metric("dinov3_arena_bytes", state="used") > used)
                gate.touch()
                for neighbor in neighbors:
                    neighbor.result()
        until(lambda: server.metric("dinov3_arena_bytes", state="used") == 0)
        ask(client, 1)


def test_when_a_frontend_is_killed_the_others_serve_and_it_is_replaced() -> None:
    with Server("--frontends", "2") as server:
        with Load(server) as load:  # the client retries the calls whose connections died
            load.more()
            before = descriptors(server.children("worker")[0])
            victim = server.children("frontend")[0]
            victim.kill()
            load.more()
            until(lambda: len([f for f in server.children("frontend") if f.pid != victim.pid]) == 2)
            load.more()
        (worker,) = server.children("worker")
        maps = Path(f"/proc/{worker.pid}/maps")
        # memfds have no name: mapped nowhere, their memory is gone.
        until(lambda: maps.read_text().count("dinov3-arena") == 2, "unmap the dead one's arena, map its successor's")
        assert descriptors(worker) <= before


def test_children_die_with_a_killed_supervisor() -> None:
    server = Server()
    server.signal(signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL

"""The whole service on a CUDA device: features, page-locked arenas, and recovery by a new worker."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from tests.support.server import Server  # noqa: E402
from tests.support.waiting import until  # noqa: E402

pytestmark = pytest.mark.gpu

SIZES = ((224, 224), (256, 256), (256, 384))


def photo(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*SIZES[seed % len(SIZES)], 3), np.uint8)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float((np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min())


def test_a_worker_killed_on_the_device_loses_no_request_and_changes_no_feature() -> None:
    """Batches have any size that forms: features do not depend on other rows."""
    with Server(
        "--devices", "cuda:0", "--frontends", "2", "--arena-bytes", "256MiB", module="dinov3_server.cli", limit=240
    ) as server:
        with server.client() as client:
            assert client.model().devices == ("cuda:0",)
            alone = {seed: client.extract(photo(seed), preset="none", dtype="float32") for seed in range(12)}
            assert server.metric("dinov3_device_memory_bytes", kind="allocated") > 0
        stop, answered = threading.Event(), []

        def ask(first: int) -> None:
            seed = first
            with server.client(deadline=120) as client:
                while not stop.is_set():
                    seeds = [(seed + i) % len(alone) for i in range(3)]
                    features = client.extract([photo(s) for s in seeds], preset="none", dtype="float32")
                    for one, s in zip(features, seeds, strict=True):
                        assert cosine(one.patches, alone[s].patches[0]) > 0.999
                        assert cosine(one.cls, alone[s].cls[0]) > 0.999
                    answered.append(seed)
                    seed += 1

        with ThreadPoolExecutor(8) as pool:
            callers = [pool.submit(ask, first) for first in range(8)]
            try:
                for _ in range(2):
                    goal = len(answered) + 50
                    until(lambda goal=goal: len(answered) >= goal or any(c.done() for c in callers), limit=120)
                    server.children("worker")[0].kill()
                goal = len(answered) + 50
                until(lambda: len(answered) >= goal or any(c.done() for c in callers), limit=240)
            finally:
                stop.set()
            for caller in callers:
                caller.result()
        until(lambda: server.metric("dinov3_worker_restarts_total", device="cuda:0") == 2)
        until(lambda: server.metric("dinov3_arena_bytes", state="used") == 0)


def test_a_batch_that_does_not_fit_is_halved_until_it_does() -> None:
    """Only the log mentions it: 24 images of 512 px in one request, on a device with room for some."""
    images = np.random.default_rng(0).integers(0, 255, (24, 512, 512, 3), np.uint8)
    with Server(
        *("--devices", "cuda:0", "--frontends", "1", "--arena-bytes", "256MiB"),
        *("--max-batch-images", "24", "--max-batch-tokens", "65536"),
        limit=240,
        TEST_RUNNER="tests.gpu.capped:build",
        TEST_DEVICE_BYTES=str(150 << 20),  # the hidden values of 24 images take as much before and after their GELU
    ) as server:
        with server.client(deadline=120) as client:
            together = client.extract(images, preset="none", dtype="float32")
            for i in (0, 11, 23):
                alone = client.extract(images[i], preset="none", dtype="float32")
                assert cosine(together.patches[i], alone.patches[0]) > 0.999
                assert cosine(together.cls[i], alone.cls[0]) > 0.999
        assert any("24 images of" in line and "do not fit the device" in line for line in server.log)
        assert server.metric("dinov3_worker_restarts_total", device="cuda:0") == 0


def test_arenas_are_page_locked_and_counted_out_when_a_frontend_dies() -> None:
    """A new frontend has its own arena; the worker continues."""
    with Server("--devices", "cuda:0", "--frontends", "1", module="dinov3_server.cli", limit=240) as server:
        with server.client() as client:
            before = client.extract(photo(0), preset="none", dtype="float32")
        (worker,) = server.children("worker")
        for _ in range(2):
            (frontend,) = server.children("frontend")
            frontend.kill()
            until(lambda dead=frontend: [c.pid for c in server.children("frontend")] not in ([], [dead.pid]), limit=60)
            with server.client(deadline=60) as client:
                after = client.extract(photo(0), preset="none", dtype="float32")
            assert cosine(before.patches, after.patches) > 0.999
        assert [child.pid for child in server.children("worker")] == [worker.pid]

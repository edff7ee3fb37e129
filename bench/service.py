"""The service beside the model alone, on the same cores: closed loops of one 224x224 uint8 image a request, CLS and
bfloat16 patches back, 1, 8 and 32 in flight. The load generator (our client, a thread a caller) shares these cores.

`bare` is our runner in a loop of batches of the size that the service formed on average, measured right after.
"""

from __future__ import annotations

import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil

from bench.bare import our_batch
from dinov3_client import Client
from dinov3_server.backbone.runner import build

SECONDS = 15.0
IN_FLIGHT = (1, 8, 32)


def measure(model: str, dtype: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "dinov3_server.cli", "serve", "--port", "0", "--http-port", "0"]
    server = subprocess.Popen(
        [*command, "--model", model, "--weights", "random:0", "--dtype", dtype], stdout=subprocess.PIPE, text=True
    )
    runner = build(model, "random:0", dtype=dtype, device="cpu")
    try:
        assert server.stdout is not None
        ready = re.fullmatch(r"ready grpc=(\S+) http=\S+\n", server.stdout.readline())
        assert ready is not None, "the server did not start"
        rows = []
        for in_flight in IN_FLIGHT:
            row = {"model": model, "dtype": dtype, "in_flight": in_flight} | closed_loop(
                ready[1], in_flight, server.pid
            )
            images = max(1, round(row["mean_batch"]))
            row["bare_images_per_second"] = images_per_second(our_batch(runner, 224, images), images)
            row["of_bare"] = round(row["images_per_second"] / row["bare_images_per_second"], 3)
            print(row, flush=True)
            rows.append(row)
        return rows
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def closed_loop(target: str, in_flight: int, supervisor: int) -> dict[str, Any]:
    image = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    latencies: list[float] = []
    batches: list[int] = []
    lock, stop = threading.Lock(), threading.Event()

    def caller(client: Client) -> None:
        while not stop.is_set():
            since = time.perf_counter()
            features = client.extract(image, preset="none", dtype="bfloat16")
            elapsed = time.perf_counter() - since
            with lock:
                latencies.append(elapsed)
                batches.append(features.timings.batch_images)

    with Client(target) as client, ThreadPoolExecutor(in_flight) as pool:
        callers = [pool.submit(caller, client) for _ in range(in_flight)]
        stop.wait(3.0)  # warm-up
        with lock:
            latencies.clear()
            batches.clear()
        cpu, since = cpu_seconds(supervisor), time.perf_counter()
        stop.wait(SECONDS)
        elapsed = time.perf_counter() - since
        with lock:
            done, ordered, formed = len(latencies), sorted(latencies), list(batches)
        used = {role: seconds - cpu[role] for role, seconds in cpu_seconds(supervisor).items()}
        stop.set()
        for one in callers:
            one.result()
    return {
        "images_per_second": round(done / elapsed, 2),
        "p50_ms": round(ordered[len(ordered) // 2] * 1e3, 1),
        "p99_ms": round(ordered[int(len(ordered) * 0.99)] * 1e3, 1),
        "mean_batch": round(statistics.mean(formed), 1),  # as an image sees it
        "cpu_ms_per_image": {role: round(seconds / done * 1e3, 2) for role, seconds in used.items()},
    }


def cpu_seconds(supervisor: int) -> dict[str, float]:
    """User and system time of the server's processes, by role."""
    seconds = {"supervisor": sum(psutil.Process(supervisor).cpu_times()[:2]), "frontend": 0.0, "worker": 0.0}
    for child in psutil.Process(supervisor).children():
        role = next(role for role in ("frontend", "worker") if role in child.cmdline())
        seconds[role] += sum(child.cpu_times()[:2])
    return seconds


def images_per_second(work: Callable[[], None], images: int) -> float:
    work()
    times = []
    end = time.perf_counter() + SECONDS / 2
    while time.perf_counter() < end or len(times) < 5:
        since = time.perf_counter()
        work()
        times.append(time.perf_counter() - since)
    return round(images / statistics.median(times), 2)

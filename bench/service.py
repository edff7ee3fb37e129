"""The service beside the model alone, on the same cores: closed loops of one 224x224 uint8 image a request, CLS and
bfloat16 patches back, 1, 8 and 32 in flight. The load generator (our client, a thread a caller) shares these cores.

`bare` is our runner in a loop of batches of the size that the service formed on average, measured right after.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.bare import our_batch
from bench.load import closed_loop
from bench.record import table
from bench.server import Server, serving
from dinov3_client import Client
from dinov3_server.backbone.runner import build

SECONDS = 15.0
IN_FLIGHT = (1, 8, 32)
FLAGS = ("--model", "vits16", "--weights", "random:0")


def measure() -> dict[str, Any]:
    runner = build("vits16", "random:0", dtype="auto", device="cpu")
    rows = []
    with serving(*FLAGS) as server, Client(server.grpc) as client:
        for in_flight in IN_FLIGHT:
            row = {"in_flight": in_flight} | one_image_requests(server, client, in_flight)
            images = max(1, round(row["mean_batch"]))
            row["bare_images_per_second"] = images_per_second(our_batch(runner, 224, images), images)
            row["of_bare"] = round(row["images_per_second"] / row["bare_images_per_second"], 3)
            print(row, flush=True)
            rows.append(row)
    return {"rows": rows}


def show(result: dict[str, Any]) -> str:
    return table(result["rows"], "in_flight", "images_per_second", "p50_ms", "p99_ms", "mean_batch", "of_bare")


def one_image_requests(server: Server, client: Client, in_flight: int) -> dict[str, Any]:
    image = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    cpu: list[dict[str, float]] = []

    def call() -> int:
        return client.extract(image, preset="none", dtype="bfloat16").timings.batch_images

    def read_cpu() -> None:
        cpu.append(server.cpu_seconds())

    load = closed_loop([call] * in_flight, SECONDS, begin=read_cpu, end=read_cpu)
    before, after = cpu
    return {
        **load.figures(),
        "mean_batch": round(statistics.mean(load.answers), 1),  # as an image sees it
        "cpu_ms_per_image": {role: round((after[role] - before[role]) / len(load.answers) * 1e3, 2) for role in after},
    }


def images_per_second(work: Callable[[], None], images: int) -> float:
    work()
    times: list[float] = []
    end = time.perf_counter() + SECONDS / 2
    while time.perf_counter() < end or len(times) < 5:
        since = time.perf_counter()
        work()
        times.append(time.perf_counter() - since)
    return round(images / statistics.median(times), 2)

"""The growth of each process's memory over many requests.

Two runs, with 32 requests of our client in flight over one connection: 20,000 requests to ViT-S/16 (`dtype auto`,
seeded random weights), and 60,000 to a runner that answers instantly (bench/instant.py), which leaves the data path. Of
20 requests, 16 are one uint8 image of 112x112, one is 224x224, one is four images of 112x112, one a JPEG of 640x480
resized to 112x112, and one a damaged JPEG, whose error is the answer; CLS and bfloat16 patches back.

After each twentieth of the requests, with none in flight, the memory of every process is read: `private` is anonymous
memory (RssAnon of /proc/PID/status), which no other process has; `shared` are the pages of the arena that it has
touched (RssShmem), which frontend and worker share. `client` is the load generator, this process. `growth` is in bytes
per request, from a tenth of the requests to the end; `last_half` is the same from half of them on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bench.preprocessing import jpeg_640x480, photos
from bench.record import table
from bench.server import memory_of, serving
from dinov3_client import Client

FLAGS = ("--model", "vits16", "--weights", "random:0")
RUNS = (("vits16", "dinov3_server", 20_000), ("instant", "bench.instant", 60_000))
IN_FLIGHT = 32
SAMPLES = 20


def measure() -> dict[str, Any]:
    return {"runs": [{"runner": runner, **run(module, requests)} for runner, module, requests in RUNS]}


def show(result: dict[str, Any]) -> str:
    rows = [{"runner": each["runner"], **process} for each in result["runs"] for process in each["processes"]]
    return table(
        rows, "runner", "process", "private_mib", "growth_mib", "growth", "last_half", "shared_mib", "shared_growth_mib"
    )


def run(module: str, requests: int) -> dict[str, Any]:
    samples: list[dict[str, dict[str, int]]] = []
    each = requests // SAMPLES
    with (
        serving(*FLAGS, module=module) as server,
        Client(server.grpc) as client,
        ThreadPoolExecutor(IN_FLIGHT) as pool,
    ):
        request = _mixture(client)
        for _ in range(SAMPLES):
            if not all(pool.map(request, range(each))):
                raise RuntimeError("a valid image failed, or a damaged one did not")
            samples.append({**server.memory(), "client": memory_of(os.getpid())})
    processes = [_growth(name, [sample[name] for sample in samples], each) for name in samples[0]]
    for process in processes:
        print(process, flush=True)
    return {"requests": requests, "processes": processes, "samples": samples}


def _growth(process: str, samples: Sequence[dict[str, int]], each: int) -> dict[str, Any]:
    first, half, last = samples[SAMPLES // 10 - 1], samples[SAMPLES // 2 - 1], samples[-1]
    return {
        "process": process,
        "private_mib": round(last["private"] / 2**20, 1),
        "growth_mib": round((last["private"] - first["private"]) / 2**20, 2),
        "growth": round((last["private"] - first["private"]) / (each * SAMPLES * 0.9), 1),
        "last_half": round((last["private"] - half["private"]) / (each * SAMPLES * 0.5), 1),
        "shared_mib": round(last["shared"] / 2**20, 1),
        "shared_growth_mib": round((last["shared"] - first["shared"]) / 2**20, 2),
    }


def _mixture(client: Client) -> Callable[[int], bool]:
    generator = np.random.default_rng(0)
    jpeg = jpeg_640x480(photos())
    damaged = jpeg[: len(jpeg) // 10]
    small, large, four = (
        generator.integers(0, 256, (images, size, size, 3), np.uint8) for images, size in ((1, 112), (1, 224), (4, 112))
    )

    def request(index: int) -> bool:
        """Send a request, and return whether its answer is as expected."""
        match index % 20:
            case 0:
                features = client.extract(large, preset="none", dtype="bfloat16")
            case 5:
                features = client.extract(four, preset="none", dtype="bfloat16")
            case 10:
                features = client.extract(jpeg, size=112, dtype="bfloat16")
            case 15:
                features = client.extract(damaged, size=112, dtype="bfloat16", on_error="return")
                return bool(features.errors)
            case _:
                features = client.extract(small, preset="none", dtype="bfloat16")
        return not features.errors

    return request

"""Memory of the worker's runner under random shapes, as in multi-scale training, and the cost of bounding it.

10,000 requests to ViT-S/16 (seeded random weights), one per batch: 1 to 8 images (uniform), with sides of 16 to 320
pixels in steps of 16, small sides more often (uniform in the logarithm); CLS and patches in float32, float16
or bfloat16.

Two runners, each in a separate process. `bounded` answers all requests; `unbounded` takes turns with it for every fifth
block of 50 requests:
- `bounded`: as the server starts a worker on a CPU (`worker_environment` in host.py), returning freed memory.
- `unbounded`: with the default caches of torch and oneDNN, of 1024 primitives, and without returning memory.

`bounded_mib` and `unbounded_mib`: the most anonymous memory of the process (RssAnon of /proc/PID/status, read after
each request) in this tenth of the requests. `rate`: images/s of bounded over unbounded, the median over the tenth's
blocks that both answered; `cpu`: CPU time of unbounded over that of bounded, likewise, which depends less on other
processes on the same cores. In the row `all`, memory is the most and the ratios are the medians over all such blocks.
"""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import numpy as np

from bench.record import table
from bench.server import memory_of
from dinov3_server.host import worker_environment
from dinov3_server.models.interface import Batch, FeatureDtype, FeatureSpec, Output, PixelShape, Row, Runner

REQUESTS, PARTS, BLOCK, PAIRED = 10_000, 10, 50, 5
MOST_IMAGES, MOST_STEPS, STEP = 8, 20, 16
DTYPES: tuple[FeatureDtype, ...] = ("float32", "float16", "bfloat16")
UNBOUNDED = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
_PIXELS = MOST_IMAGES * (MOST_STEPS * STEP) ** 2 * 3
_FEATURES = MOST_IMAGES * (MOST_STEPS**2 + 1) * 384 * 4 + MOST_IMAGES * 2 * 64  # each section at a multiple of 64


@dataclass(frozen=True)
class Block:
    """The result of the same requests, one after another, to one runner."""

    seconds: float
    cpu_seconds: float
    private: int  # bytes, the most


Run = Callable[[int, int], Block]


def measure() -> dict[str, Any]:
    rows = []
    for dtype in ("float32", "bfloat16"):
        with runner_process(dtype, bounded=True) as bounded, runner_process(dtype, bounded=False) as unbounded:
            blocks: list[tuple[Block, Block | None]] = []
            for number in range(REQUESTS // BLOCK):
                paired = number % PAIRED == 0
                turn = [unbounded, bounded] if number % 2 else [bounded, unbounded]
                done = {run: run(number * BLOCK, (number + 1) * BLOCK) for run in turn if paired or run is bounded}
                blocks.append((done[bounded], done.get(unbounded)))
                if len(blocks) % (REQUESTS // BLOCK // PARTS) == 0:
                    part = blocks[-(REQUESTS // BLOCK // PARTS) :]
                    rows.append({"dtype": dtype, "requests": (number + 1) * BLOCK, **summary(part)})
                    print(rows[-1], flush=True)
            rows.append({"dtype": dtype, "requests": "all", **summary(blocks)})
    return {"rows": rows}


def show(result: dict[str, Any]) -> str:
    return table(result["rows"], "dtype", "requests", "bounded_mib", "unbounded_mib", "rate", "cpu")


def summary(blocks: Sequence[tuple[Block, Block | None]]) -> dict[str, float]:
    """Return the figures of blocks of requests to the bounded runner, and to the unbounded one, if it had them."""
    pairs = [(bounded, unbounded) for bounded, unbounded in blocks if unbounded is not None]
    return {
        "bounded_mib": round(max(bounded.private for bounded, _ in blocks) / 2**20, 1),
        "unbounded_mib": round(max(unbounded.private for _, unbounded in pairs) / 2**20, 1),
        "rate": round(statistics.median(unbounded.seconds / bounded.seconds for bounded, unbounded in pairs), 3),
        "cpu": round(statistics.median(unbounded.cpu_seconds / bounded.cpu_seconds for bounded, unbounded in pairs), 3),
    }


@contextmanager
def runner_process(dtype: str, bounded: bool) -> Iterator[Run]:
    """Yield `run(first, last)`, which sends the requests of these numbers to a runner in a separate process."""
    with ProcessPoolExecutor(1, get_context("spawn"), _build, (dtype, bounded)) as pool:
        # The process starts at its first task, with the environment of that moment.
        with patch.dict(os.environ, worker_environment(os.environ) if bounded else worker_environment(UNBOUNDED)):
            pool.submit(os.getpid).result()
        yield lambda first, last: pool.submit(_run, first, last).result()


def request(number: int) -> tuple[int, PixelShape, FeatureDtype]:
    """Return the number of images of a request, their shape, and the dtype of its features."""
    generator = np.random.default_rng(number)
    images = int(generator.integers(1, MOST_IMAGES, endpoint=True))
    height, width = (STEP * int(2**power) for power in generator.uniform(0, np.log2(MOST_STEPS + 1), 2))
    return images, PixelShape(height, width, "uint8"), DTYPES[generator.integers(len(DTYPES))]


def _build(dtype: str, bounded: bool) -> None:
    global _runner
    from dinov3_server.backbone.runner import build
    from dinov3_server.backbone.runners import cpu as cpu_runner

    if not bounded:
        cpu_runner.RETURN_EVERY = 2**63
    _runner = build("vits16", "random:0", dtype=dtype, device="cpu")
    arena = mmap.mmap(-1, _PIXELS + _FEATURES)
    arena.write(np.random.default_rng(0).integers(0, 256, _PIXELS, np.uint8).tobytes())
    _runner.attach(0, memoryview(arena))


_runner: Runner


def _run(first: int, last: int) -> Block:
    batches = [_batch(*request(number)) for number in range(first, last)]
    private = 0
    started, cpu_started = time.perf_counter(), time.process_time()
    for batch in batches:
        _runner.finish(_runner.launch(batch))
        private = max(private, memory_of(os.getpid())["private"])
    return Block(time.perf_counter() - started, time.process_time() - cpu_started, private)


def _batch(images: int, shape: PixelShape, dtype: FeatureDtype) -> Batch:
    spec = FeatureSpec((Output("cls"), Output("patches")), dtype)
    sizes = [-(-section.nbytes // 64) * 64 for section in _runner.info.output_buffers(spec, shape)]
    rows = []
    end = _PIXELS
    for image in range(images):
        places = (end, end + sizes[0])
        end += sum(sizes)
        rows.append(Row(0, image * shape.nbytes, places, spec))
    return Batch(shape, tuple(rows))

"""The rate, in bytes, at which one client process receives patch tensors from a server that answers instantly.

Answers are the patches of 32 images of a ViT-B/16 at 224 px in bfloat16 (9.6 MB), prepared by a separate server process
(bench/premade.py). A request is 32 small JPEG files (224x224, `request_bytes` together); in the row
`pixels in`, 32 images of uint8 pixels (4.8 MB). GB/s count only the bytes of the tensors, in one direction. IN_FLIGHT
requests are in flight all the time, in every row; client and server share the machine's cores.

In all rows, one thread checks the shape and dtype of every answer, and compares one number in each page of 4096 bytes
with the sent one:

- extract_many: `Client.extract_many`. `AsyncClient.extract_many` is the asynchronous one; `.torch()` is the first with
  each answer converted to writable torch tensors.
- naive: the generated stub with protobuf messages, a new one for each call, and `np.frombuffer(tensor.data, ...)` of
the
  answer; futures, one connection, no retries and no checks.
- bare: grpcio alone, one connection: prepared bytes out, bytes in, no message is parsed; `of_bare` is the ratio to it.
  `bare, tuned` is the same in a process whose malloc keeps freed memory.

The rows run one after the other in one process (`tuned` in a separate one), in another order each round, ROUNDS times;
ratios are taken within a round, and medians over rounds are reported. `client_cores` is the client's CPU time over the
measured time.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import multiprocessing
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import grpc
import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench import premade
from bench.echo import METHOD, OPTIONS
from bench.record import table
from bench.requests import encoded, random_pixels
from bench.server import ready_process
from dinov3_client import AsyncClient, Client, ExtractOptions
from dinov3_server.malloc import keep_freed_memory
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.feature_service_pb2_grpc import FeatureServiceStub

IMAGES = 32
IN_FLIGHT = 4
ROUNDS = 5
SECONDS = 3.0
WARM_UP = 0.5
GOAL = 1.2
"""GB/s of extract_many."""
OPTIONS_OF_CALLS: ExtractOptions = {"preset": "hf", "dtype": "bfloat16"}
PAGE = 4096 // 2
"""bfloat16 numbers in a page."""


class Run(NamedTuple):
    """The number of answers in the measured time, and the client's CPU time in it."""

    answers: int
    seconds: float
    cpu_seconds: float

    @property
    def gb_per_second(self) -> float:
        return self.answers * sent().nbytes / self.seconds / 1e9


class Meter:
    """Count answers for `seconds` from the first one after `warm_up`. `answered` returns whether to go on."""

    def __init__(self, seconds: float, warm_up: float) -> None:
        self._from = time.perf_counter() + warm_up
        self._seconds = seconds
        self._begin: tuple[float, float] | None = None
        self._answers = 0
        self.run: Run | None = None

    def answered(self) -> bool:
        now, cpu = time.perf_counter(), time.process_time()
        if self._begin is None:
            if now >= self._from:
                self._begin = now, cpu
            return True
        self._answers += 1
        begun, used = self._begin
        if now < begun + self._seconds:
            return True
        self.run = Run(self._answers, now - begun, cpu - used)
        return False


def measure() -> dict[str, Any]:
    rounds: list[dict[str, Run]] = []
    with server() as address:
        ways = list(WAYS)
        for number in range(ROUNDS):
            shuffled = random.Random(number).sample(ways, len(ways))
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as one:
                measured = {way: one.submit(run, way, address, SECONDS, WARM_UP).result() for way in shuffled}
            done = {way: measured[way] for way in ways}
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), keep_freed_memory) as tuned:
                done["bare, tuned"] = tuned.submit(run, "bare", address, SECONDS, WARM_UP).result()
            rounds.append(done)
            print({way: round(one.gb_per_second, 2) for way, one in done.items()}, flush=True)
    rows = [figures(way, rounds) for way in rounds[0]]
    return {"answer_bytes": sent().nbytes, "request_bytes": sum(map(len, files())), "goal": GOAL, "rows": rows}


def figures(way: str, rounds: list[dict[str, Run]]) -> dict[str, Any]:
    mine = [done[way] for done in rounds]

    def ratio(other: str) -> float:
        pairs = ((one.gb_per_second, done[other].gb_per_second) for one, done in zip(mine, rounds, strict=True))
        return round(statistics.median(ours / theirs for ours, theirs in pairs), 3)

    return {
        "row": way,
        "gb_per_second": round(statistics.median(one.gb_per_second for one in mine), 3),
        "least": round(min(one.gb_per_second for one in mine), 3),
        "most": round(max(one.gb_per_second for one in mine), 3),
        "of_bare": ratio("bare"),
        "of_naive": ratio("naive"),
        "client_cores": round(statistics.median(one.cpu_seconds / one.seconds for one in mine), 2),
    }


def show(result: dict[str, Any]) -> str:
    columns = ("row", "gb_per_second", "least", "most", "of_bare", "of_naive", "client_cores")
    return f"goal of extract_many: {result['goal']} GB/s\n" + table(result["rows"], *columns)


def run(way: str, address: str, seconds: float, warm_up: float) -> Run:
    meter = Meter(seconds, warm_up)
    WAYS[way](address, meter)
    assert meter.run is not None, f"{way} ended before the measured time"
    return meter.run


def extract_many(address: str, meter: Meter, pixels: bool = False, torch: bool = False) -> None:
    images = uint8_pixels() if pixels else files()
    with Client(address) as client:
        answers = client.extract_many(itertools.repeat(images), "patches", in_flight=IN_FLIGHT, **OPTIONS_OF_CALLS)
        for features in answers:
            if torch:
                check_tensor(features.torch().patches)
            else:
                check(features.patches)
            if not meter.answered():
                break
        answers.close()


def asynchronous(address: str, meter: Meter) -> None:
    async def receive() -> None:
        async with AsyncClient(address) as client:
            batches = itertools.repeat(files())
            answers = client.extract_many(batches, "patches", in_flight=IN_FLIGHT, **OPTIONS_OF_CALLS)
            async for features in answers:
                check(features.patches)
                if not meter.answered():
                    break
            await answers.aclose()

    asyncio.run(receive())


def naive(address: str, meter: Meter) -> None:
    with grpc.insecure_channel(address, OPTIONS) as channel:
        extract: Any = FeatureServiceStub(channel).Extract  # type: ignore[no-untyped-call]
        for answer in in_flight(lambda: extract.future(message())):
            tensor = answer.blocks[0].patches
            check(np.frombuffer(tensor.data, ml_dtypes.bfloat16).reshape(tuple(tensor.shape)))
            if not meter.answered():
                break


def bare(address: str, meter: Meter) -> None:
    ready, nbytes = message().SerializeToString(), sent().nbytes
    with grpc.insecure_channel(address, OPTIONS) as channel:
        call: Any = channel.unary_unary(METHOD)
        for answer in in_flight(lambda: call.future(ready)):
            start = answer.index(head())  # the tensor's bytes within the message
            check(np.frombuffer(answer, ml_dtypes.bfloat16, nbytes // 2, start).reshape(sent().shape))
            if not meter.answered():
                break


def in_flight(send: Callable[[], Any]) -> Iterator[Any]:
    """Yield answers in the order of their requests, with IN_FLIGHT requests in flight."""
    calls = deque(send() for _ in range(IN_FLIGHT))
    try:
        while True:
            answer = calls.popleft().result()
            calls.append(send())
            yield answer
    finally:
        for call in calls:
            call.cancel()


WAYS: dict[str, Callable[[str, Meter], None]] = {
    "extract_many": extract_many,
    "extract_many, pixels in": functools.partial(extract_many, pixels=True),
    "extract_many, .torch()": functools.partial(extract_many, torch=True),
    "AsyncClient.extract_many": asynchronous,
    "naive": naive,
    "bare": bare,
}


def check(patches: NDArray[Any] | None) -> None:
    assert patches is not None
    assert (patches.shape, patches.dtype) == (sent().shape, ml_dtypes.bfloat16)
    assert np.array_equal(patches.view(np.uint16).reshape(-1)[::PAGE], in_pages())


def check_tensor(patches: Any) -> None:
    import torch

    assert (tuple(patches.shape), patches.dtype) == (sent().shape, torch.bfloat16)
    assert np.array_equal(patches.view(torch.uint16).numpy().reshape(-1)[::PAGE], in_pages())


@cache
def sent() -> NDArray[np.uint16]:
    return premade.patches(IMAGES)


@cache
def in_pages() -> NDArray[np.uint16]:
    return sent().reshape(-1)[::PAGE].copy()


@cache
def head() -> bytes:
    return sent().tobytes()[:512]


@cache
def files() -> list[bytes]:
    """Return IMAGES JPEG files of 224x224."""
    coarse = np.random.default_rng(0).integers(0, 256, (IMAGES, 28, 28, 3), np.uint8)
    images = (Image.fromarray(each).resize((224, 224), Image.Resampling.BICUBIC) for each in coarse)
    return [encoded(image, "JPEG", quality=90) for image in images]


@cache
def uint8_pixels() -> NDArray[np.uint8]:
    return random_pixels(IMAGES, 224)


def message() -> pb.ExtractRequest:
    return pb.ExtractRequest(
        images=[pb.Image(encoded=file) for file in files()],
        preprocessing=pb.Preprocessing(preset=pb.PRESET_HF),
        outputs=pb.Outputs(patches=True, dtype=pb.DATA_TYPE_BFLOAT16),
    )


@contextmanager
def server() -> Iterator[str]:
    """Run a server that answers instantly (bench/premade.py), and yield its address."""
    with ready_process([sys.executable, "-m", "bench.premade", str(IMAGES)], r"ready grpc=(\S+)") as (_, ready):
        yield ready[1]

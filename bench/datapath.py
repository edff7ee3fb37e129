"""The cost of the service around a model: a runner that answers instantly, beside a bare grpcio echo of the same bytes.

Ours is the whole server, with one frontend and one worker: requests are parsed and checked, their pixels copied into
the arena, their rows submitted to the worker and scheduled there, and an answer is built from the arena (ViT-B/16,
bfloat16). Only the model is missing: the runner (bench/instant.py) neither reads pixels nor writes features, and
reports them as finite. The echo (bench/echo.py) is one grpc.aio server in one process that takes the same request as
bytes, does not look at it, and answers as many bytes as ours, one copy of existing bytes. `of_echo` is our rate over
its rate; `of_tuned_echo` that over an echo whose malloc keeps freed memory, as our frontends' does.

One load generator (bench/flood.py) for all, in a separate process: a closed loop of bytes over one connection,
`in_flight` requests of 224x224 uint8 images. GB/s count the bytes of both directions. `generator_cores` is the CPU that
it uses while it calls ours: near 1 it would be the bottleneck. `frontend_ms`, `worker_ms` and `echo_ms` are CPU time
per request. The servers are called in turn, ROUNDS times; all figures and ratios are medians over the rounds.

Two frontends are compared with one in the same way, over CHANNELS connections, which the kernel spreads over them.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

from bench.flood import Flood, flood
from bench.record import table
from bench.requests import pixels_request, random_pixels
from bench.server import ready_process, serving
from dinov3_serving.v1 import feature_service_pb2 as pb

ROUNDS = 3
SECONDS = 2.5
WARM_UP = 0.5
CHANNELS = 8
FLAGS = ("--model", "vitb16", "--weights", "random:0")


class Case(NamedTuple):
    name: str
    images: int
    patches: bool
    in_flight: int

    def request(self) -> bytes:
        return pixels_request(random_pixels(self.images, 224), pb.Outputs(cls=True, patches=self.patches))


CASES = (
    Case("1 image, CLS and patches", 1, True, 32),
    Case("32 images, CLS and patches", 32, True, 8),
    Case("1 image, CLS", 1, False, 32),
)


class Target(NamedTuple):
    """A server to call, and the CPU seconds that it has used so far, by role."""

    address: str
    cpu_seconds: Callable[[], dict[str, float]]


class Measured(NamedTuple):
    load: Flood
    cpu_ms: dict[str, float]  # per request, by role


def measure() -> dict[str, Any]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as generator, our_server(frontends=1) as one:
        rows = [beside_echo(generator, one, case) for case in CASES]
        with our_server(frontends=2) as two:
            frontends = [two_frontends(generator, one, two, case) for case in CASES]
    return {"rows": rows, "frontends": frontends}


def show(result: dict[str, Any]) -> str:
    beside = table(
        result["rows"],
        "case", "requests_per_second", "gb_per_second", "echo_gb_per_second", "of_echo", "of_tuned_echo",
        "frontend_ms", "worker_ms", "echo_ms", "generator_cores",
    )  # fmt: skip
    frontends = table(result["frontends"], "case", "one_gb_per_second", "two_gb_per_second", "two_of_one")
    return f"{beside}\n\n{frontends}"


def beside_echo(generator: ProcessPoolExecutor, ours: Target, case: Case) -> dict[str, Any]:
    request = case.request()
    answer_nbytes = generator.submit(flood, ours.address, request, 1, 0.1, 0.1, 1).result().answer_nbytes
    with echo(answer_nbytes) as bare, echo(answer_nbytes, "tuned") as tuned:
        mine, echoed, tuned_echoed = in_turn(generator, case, request, channels=1, targets=(ours, bare, tuned))
    nbytes = len(request) + answer_nbytes
    row = {
        "case": case.name,
        "in_flight": case.in_flight,
        "request_bytes": len(request),
        "answer_bytes": answer_nbytes,
        "requests_per_second": round(median(rates(mine)), 1),
        "echo_requests_per_second": round(median(rates(echoed)), 1),
        "tuned_echo_requests_per_second": round(median(rates(tuned_echoed)), 1),
        "gb_per_second": round(median(rates(mine)) * nbytes / 1e9, 3),
        "echo_gb_per_second": round(median(rates(echoed)) * nbytes / 1e9, 3),
        "of_echo": ratio(mine, echoed),
        "of_tuned_echo": ratio(mine, tuned_echoed),
        "frontend_ms": round(median([one.cpu_ms["frontend"] for one in mine]), 3),
        "worker_ms": round(median([one.cpu_ms["worker"] for one in mine]), 3),
        "echo_ms": round(median([one.cpu_ms["echo"] for one in echoed]), 3),
        "generator_cores": round(median([one.load.cpu_seconds / one.load.seconds for one in mine]), 2),
    }
    print(row, flush=True)
    return row


def two_frontends(generator: ProcessPoolExecutor, one: Target, two: Target, case: Case) -> dict[str, Any]:
    request = case.request()
    single, double = in_turn(generator, case, request, CHANNELS, targets=(one, two))
    nbytes = len(request) + single[0].load.answer_nbytes
    row = {
        "case": case.name,
        "one_gb_per_second": round(median(rates(single)) * nbytes / 1e9, 3),
        "two_gb_per_second": round(median(rates(double)) * nbytes / 1e9, 3),
        "two_of_one": ratio(double, single),
    }
    print(row, flush=True)
    return row


def in_turn(
    generator: ProcessPoolExecutor, case: Case, request: bytes, channels: int, targets: tuple[Target, ...]
) -> tuple[list[Measured], ...]:
    """Measure the targets in turn, ROUNDS times. Return the results of each target."""
    measured: tuple[list[Measured], ...] = tuple([] for _ in targets)
    for _ in range(ROUNDS):
        for target, its in zip(targets, measured, strict=True):
            before = target.cpu_seconds()
            load = generator.submit(flood, target.address, request, case.in_flight, SECONDS, WARM_UP, channels).result()
            after = target.cpu_seconds()
            its.append(Measured(load, {role: (after[role] - before[role]) / load.answered * 1e3 for role in after}))
    return measured


def rates(measured: list[Measured]) -> list[float]:
    return [one.load.requests / one.load.seconds for one in measured]


def ratio(ours: list[Measured], theirs: list[Measured]) -> float:
    return round(median([mine / other for mine, other in zip(rates(ours), rates(theirs), strict=True)]), 3)


def median(values: list[float]) -> float:
    return statistics.median(values)


@contextmanager
def our_server(frontends: int) -> Iterator[Target]:
    with serving(*FLAGS, "--frontends", str(frontends), module="bench.instant") as server:
        yield Target(server.grpc, server.cpu_seconds)


@contextmanager
def echo(answer_nbytes: int, *flags: str) -> Iterator[Target]:
    command = [sys.executable, "-m", "bench.echo", str(answer_nbytes), *flags]
    with ready_process(command, r"ready grpc=(\S+)") as (process, ready):
        yield Target(ready[1], lambda: {"echo": sum(process.cpu_times()[:2])})

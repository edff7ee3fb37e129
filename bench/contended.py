"""The service beside other processes on the same cores: a busy one, and a second server. ViT-S/16, float32.

Seeded random weights. Each server gets a closed loop of two requests of 32 images of 64x64 or 224x224, CLS back; the
load generator (our client) runs on the same cores. A round measures each case once, in turn; rates are images/s between
a server's first and last answer, and every ratio is the median over ROUNDS of ratios within a round.

- `idle`: the rate of a server beside the load generator alone.
- `busy`: the rate beside one other process in a busy loop, over `idle`. Of two cores a fair share is about a half.
- `two_servers`: the rate of the slower of two servers under load at the same time, over `idle` of the first.
- `of_spinning`: `idle` over the rate of a server whose threads spin as long as libgomp's default
  (GOMP_SPINCOUNT=300000): the cost of shorter spinning on otherwise idle cores.
- `spinning_busy`: `busy` of that server.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from bench.record import table
from bench.requests import random_pixels
from bench.server import ready_process, serving
from dinov3_client import Client

FLAGS = ("--model", "vits16", "--weights", "random:0", "--dtype", "float32", "--warm-up-sizes", "64x64,224x224")
SPINNING = {"GOMP_SPINCOUNT": "300000"}
SECONDS = {64: 3.0, 224: 5.0}  # of one case, by size; longer until there are ANSWERS answers
ANSWERS = 4
IMAGES = 32
IN_FLIGHT = 2
ROUNDS = 2


def measure() -> dict[str, Any]:
    with ExitStack() as stack:
        ours, second, spinning = (
            stack.enter_context(Client(stack.enter_context(serving(*FLAGS, environ=environ)).grpc))
            for environ in ({}, {}, SPINNING)
        )
        return {"rows": [_row(size, ours, second, spinning) for size in SECONDS]}


def show(result: dict[str, Any]) -> str:
    return table(result["rows"], "size", "idle", "busy", "two_servers", "of_spinning", "spinning_busy")


def _row(size: int, ours: Client, second: Client, spinning: Client) -> dict[str, Any]:
    pixels = random_pixels(IMAGES, size)

    def request(client: Client) -> Callable[[], object]:
        return lambda: client.extract(pixels, ("cls",), preset="none")

    def rates(*clients: Client) -> list[float]:
        return rates_of([request(client) for client in clients], SECONDS[size])

    for client in (ours, second, spinning):
        request(client)()
    rounds = []
    for turn in range(ROUNDS):
        one: dict[str, float] = {}
        for name, client in (("idle", ours), ("spinning", spinning))[:: -1 if turn % 2 else 1]:
            (one[name],) = rates(client)
        with busy_process():
            (one["busy"],) = rates(ours)
            (one["spinning_busy"],) = rates(spinning)
        one["slower"] = min(rates(ours, second))
        rounds.append(one)
    row = {"size": size, **summary(rounds)}
    print(row, flush=True)
    return row


def summary(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the figures of one size from the rates of each round."""

    def ratio(above: str, below: str) -> float:
        return round(statistics.median(one[above] / one[below] for one in rounds), 3)

    return {
        "idle": round(statistics.median(one["idle"] for one in rounds), 2),
        "busy": ratio("busy", "idle"),
        "two_servers": ratio("slower", "idle"),
        "of_spinning": ratio("idle", "spinning"),
        "spinning_busy": ratio("spinning_busy", "spinning"),
        "rounds": [{name: round(value, 2) for name, value in one.items()} for one in rounds],
    }


def rates_of(calls: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Return the images/s of each server while all are under load; `calls` make one request to each."""
    ends: list[list[float]] = [[] for _ in calls]
    stop = threading.Event()

    def loop(server: int) -> None:
        try:
            while not stop.is_set():
                calls[server]()
                ends[server].append(time.perf_counter())
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(IN_FLIGHT * len(calls)) as pool:
        running = [pool.submit(loop, server) for server in range(len(calls)) for _ in range(IN_FLIGHT)]
        stop.wait(seconds)
        while min(len(each) for each in ends) < ANSWERS and not stop.wait(0.05):
            pass
        measured = [sorted(each) for each in ends]  # later answers have the cores to themselves
        stop.set()
        for one in running:
            one.result()
    return [rate(each) for each in measured]


def rate(ends: Sequence[float]) -> float:
    """Return the images/s from the times of the answers, ascending."""
    return (len(ends) - 1) * IMAGES / (ends[-1] - ends[0])


@contextmanager
def busy_process() -> Iterator[None]:
    """Run a process that keeps a core busy until the end of the block."""
    with ready_process([sys.executable, "-c", "print('busy', flush=True)\nwhile True: pass"], "busy"):
        yield

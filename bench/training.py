"""The duration of the steps of a training loop that gets its teacher's features from the service.

The student's step is an idle wait, as if on another GPU, of half the service's time for a batch, of that time, and of
twice that. The service is a real one on this machine's CPU (ViT-S/16, `dtype auto`, seeded random weights); batches are
8 prepared images of 224x224 uint8 pixels, CLS and bfloat16 patches come back (151 KB per image). Loop and service share
the cores.

- `service_ms`: the time of a batch when the service does nothing else: a closed loop of requests of one batch, as many
  in flight as with_features has, just before each loop.
- with_features: `dinov3_client.torch.with_features`, PREFETCH batches ahead. naive: a call for the batch,
  then the student's step.
- `step_ms`: from the end of a step to that of the next, mean over STEPS steps after the first SKIPPED ones.
  `over_ideal` is `step_ms` over the larger of the student's step and the service's time (goal: 1.05 for with_features).
- `wait_share`: the share of the measured time in which the loop waited for features.

ROUNDS rounds of all cases, the two loops in turn; medians over rounds, ratios taken in each.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.load import closed_loop
from bench.record import table
from bench.server import serving
from dinov3_client import Client, ExtractOptions, Features
from dinov3_client.torch import with_features

MODEL = "vits16"
FLAGS = ("--model", MODEL, "--weights", "random:0", "--warm-up-sizes", "224x224")
IMAGES = 8
PREFETCH = 2
STUDENT = {"half": 0.5, "equal": 1.0, "double": 2.0}
"""The student's step by name, in multiples of the service time."""
ROUNDS = 3
STEPS = 40
SKIPPED = 6
SERVICE_SECONDS = 8.0
WARM_UP = 1.0
GOAL = 1.05

Pixels = NDArray[np.uint8]
OPTIONS: ExtractOptions = {"preset": "none", "dtype": "bfloat16"}


class Steps(NamedTuple):
    """Seconds per step, and the part of them spent waiting for features."""

    seconds: float
    waited: float


class Round(NamedTuple):
    service: float
    steps: dict[str, Steps]


def measure() -> dict[str, Any]:
    with serving(*FLAGS) as server, Client(server.grpc) as client:
        service = service_seconds(client, SERVICE_SECONDS)
        students = {name: factor * service for name, factor in STUDENT.items()}
        rounds: list[dict[str, Round]] = []
        for _ in range(ROUNDS):
            rounds.append({name: one_round(client, student) for name, student in students.items()})
            print({name: one.steps for name, one in rounds[-1].items()}, flush=True)
    rows = [row(name, students[name], loop, [one[name] for one in rounds]) for name in students for loop in LOOPS]
    return {"images": IMAGES, "goal": GOAL, "rows": rows}


def show(result: dict[str, Any]) -> str:
    columns = ("student", "loop", "student_ms", "service_ms", "step_ms", "over_ideal", "worst", "wait_share")
    return f"goal of with_features: {result['goal']} over ideal\n" + table(result["rows"], *columns)


def one_round(client: Client, student: float) -> Round:
    service = service_seconds(client, SERVICE_SECONDS)
    return Round(service, {name: steps(loop(client), student) for name, loop in LOOPS.items()})


def row(name: str, student: float, loop: str, rounds: list[Round]) -> dict[str, Any]:
    ratios = [one.steps[loop].seconds / max(student, one.service) for one in rounds]
    return {
        "student": name,
        "loop": loop,
        "student_ms": round(student * 1e3, 1),
        "service_ms": round(statistics.median(one.service for one in rounds) * 1e3, 1),
        "step_ms": round(statistics.median(one.steps[loop].seconds for one in rounds) * 1e3, 1),
        "over_ideal": round(statistics.median(ratios), 3),
        "worst": round(max(ratios), 3),
        "wait_share": round(statistics.median(one.steps[loop].waited / one.steps[loop].seconds for one in rounds), 3),
    }


def service_seconds(client: Client, seconds: float) -> float:
    """Return the service's time for a batch."""
    batch = next(batches())

    def call() -> None:
        client.extract(batch, **OPTIONS)

    load = closed_loop([call] * (PREFETCH + 1), seconds, WARM_UP)
    return load.seconds / len(load.latencies)


def overlapped(client: Client) -> Generator[Features, None, None]:
    loader = with_features(batches(), client, to_request=lambda batch: batch, prefetch=PREFETCH, **OPTIONS)
    for _, features in loader:
        yield features


def sequential(client: Client) -> Generator[Features, None, None]:
    for batch in batches():
        yield client.extract(batch, **OPTIONS)


LOOPS: dict[str, Callable[[Client], Generator[Features, None, None]]] = {
    "with_features": overlapped,
    "naive": sequential,
}


def steps(features: Iterator[object], student: float) -> Steps:
    """Run SKIPPED steps as a warm-up, then measure STEPS."""
    waited = 0.0
    begin = time.perf_counter()
    for step in range(SKIPPED + STEPS):
        if step == SKIPPED:
            begin, waited = time.perf_counter(), 0.0
        asked = time.perf_counter()
        next(features)
        waited += time.perf_counter() - asked
        time.sleep(student)
    return Steps((time.perf_counter() - begin) / STEPS, waited / STEPS)


def batches() -> Iterator[Pixels]:
    generator = np.random.default_rng(0)
    ready = [generator.integers(0, 256, (IMAGES, 224, 224, 3), np.uint8) for _ in range(4)]
    return itertools.cycle(ready)

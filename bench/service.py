"""The service beside the model alone, on the same cores. ViT-S/16, `dtype auto`, seeded random weights, one worker.

Closed loops; the load generator (our client, a thread a caller) is a process on the same cores. Of each case:

- ROUNDS rounds of the service and of `bare`, in turn; rates and differences are medians over rounds, latencies are of
  all rounds together. `bare` is our runner in a loop in a separate process: it replays batches of the sizes that the
  service formed in the round before, 224x224 pixels in and CLS and bfloat16 patches out, regardless of the requests.
  The other of the two is idle meanwhile.
- `of_bare`: images a second of the service over those of bare. `over_bare_ms`: the service's p50 less bare's median
  batch (if a request is a batch). `cpu_over_bare_ms`: CPU time per image of frontends and workers, less bare's. CPU
  times are of whole rounds, from idle to idle, and so are `stage_ms` (sums of dinov3_stage_seconds per image; `queue`
  is waiting) and `device_batch`.
- `mean_batch` is the batch size averaged over images; `device_batch` that averaged over batches.

`raw`: uint8 pixels of 224x224, CLS and bfloat16 patches back (151 KB an image). `jpeg`: a photo of 640x480, resized to
224x224 by the preset hf. `cls`: as raw, CLS alone back.

`mixed`: 32 requests in flight, each caller sends 224, 256 and 512 px in turn; for comparison each size alone, 32 in
flight. With n_i images of size i answered in the mixed run's time T, and rate_i images a second of size i alone in the
same round, `of_single` is (sum of n_i / rate_i) / T: 1 where mixing costs nothing.

`frontends`: raw, 32 in flight over 16 connections, with 1, 2 and 4 frontends, each a separate server that is idle while
another is measured; `shares` are the shares of images that each frontend has answered, `of_one` the rate over that of
one frontend in the same round.

`memory`, of the processes of the server that all cases but `frontends` ran on, at its end, in MiB: `private` (RssAnon),
`shared` (RssShmem: touched pages of the arena, which frontend and worker share), `peak` (VmHWM: both and mapped files).
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil

from bench.bare_process import Bare, Replay, bare_process
from bench.load import Load, closed_loop
from bench.preprocessing import jpeg_640x480, photos
from bench.record import table
from bench.requests import random_pixels
from bench.server import Server, serving
from dinov3_client import Client, Features

MODEL, WEIGHTS = "vits16", "random:0"
FLAGS = ("--model", MODEL, "--weights", WEIGHTS, "--warm-up-sizes", "224x224,256x256,512x512")
ROUNDS = 3
WARM_UP = 1.0
SECONDS = 5.0
BARE_SECONDS = 3.5
MIXED_SIZES = (224, 256, 512)
MIXED_SECONDS = 13.0
FRONTENDS = (1, 2, 4)

Request = Callable[[Client], Features]


class Answer(NamedTuple):
    size: int
    images: int
    batch_images: int
    frontend: int


@dataclass(frozen=True)
class Round:
    """One closed loop. All fields but `load` cover all of its calls, from idle to idle."""

    load: Load
    answers: list[Answer]
    device_batches: int
    cpu_seconds: dict[str, float]  # by role
    stage_seconds: dict[str, float]  # by stage

    @property
    def images(self) -> int:
        return sum(answer.images for answer in self.answers)

    @property
    def images_per_second(self) -> float:
        images: int = sum(answer.images for answer in self.load.answers)
        return images / self.load.seconds

    def batches(self) -> list[int]:
        """Return the sizes of the batches that the device ran, in random order."""
        images: Counter[int] = Counter()
        for answer in self.answers:
            images[answer.batch_images] += answer.images
        sizes = [size for size, count in sorted(images.items()) for _ in range(max(1, round(count / size)))]
        random.Random(0).shuffle(sizes)
        return sizes


def measure() -> dict[str, Any]:
    data = jpeg_640x480(photos())
    jpeg: Request = lambda client: client.extract(data, preset="hf", dtype="bfloat16")  # noqa: E731
    cases: list[tuple[str, Request, int]] = [
        *(("raw", raw(224), in_flight) for in_flight in (1, 8, 32)),
        *(("raw, 32 a request", raw(224, images=32), in_flight) for in_flight in (1, 2)),
        *((f"jpeg, {len(data)} bytes", jpeg, in_flight) for in_flight in (1, 8, 32)),
        ("cls", raw(224, patches=False), 32),
    ]
    with serving(*FLAGS) as server, Client(server.grpc) as client:
        with bare_process(MODEL, WEIGHTS) as replay:
            rows = [compare_with_bare(server, client, replay, *case) for case in cases]
        mixed = mixed_sizes(server, client)
        memory = [
            {"process": process, **{kind: round(nbytes / 2**20, 1) for kind, nbytes in kinds.items()}}
            for process, kinds in server.memory().items()
        ]
    return {"rows": rows, "mixed": mixed, "frontends": several_frontends(), "memory": memory}


def show(result: dict[str, Any]) -> str:
    columns = (
        "requests", "in_flight", "images_per_second", "p50_ms", "p99_ms", "mean_batch", "device_batch",
        "of_bare", "over_bare_ms", "cpu_over_bare_ms",
    )  # fmt: skip
    return "\n\n".join(
        (
            table([{"over_bare_ms": "", **row} for row in result["rows"]], *columns),
            table(
                [*result["mixed"]["single"], {"size": "mixed", **result["mixed"]}],
                *("size", "images_per_second", "p50_ms", "p99_ms", "device_batch"),
            )
            + f"\nmixed: {result['mixed']['of_single']} of the token-weighted rate of single sizes",
            table(result["frontends"], "frontends", "images_per_second", "p50_ms", "p99_ms", "of_one"),
            table(result["memory"], "process", "private", "shared", "peak"),
        )
    )


def raw(size: int, images: int = 1, *, patches: bool = True) -> Request:
    pixels = random_pixels(images, size)
    if patches:
        return lambda client: client.extract(pixels, ("cls", "patches"), preset="none", dtype="bfloat16")
    return lambda client: client.extract(pixels, ("cls",), preset="none", dtype="bfloat16")


def closed_round(
    server: Server, clients: Sequence[Client], requests: Sequence[Request], in_flight: int, seconds: float
) -> Round:
    """Run a closed loop. Callers are spread over `clients`; each makes the `requests` in turn, each starting one
    later."""
    answers: list[Answer] = []
    generator = psutil.Process()

    def caller(index: int) -> Callable[[], Answer]:
        client, turns = clients[index % len(clients)], itertools.count(index)

        def call() -> Answer:
            features = requests[next(turns) % len(requests)](client)
            answer = Answer(features.input_size[0], len(features), features.timings.batch_images, features.frontend)
            answers.append(answer)
            return answer

        return call

    def cpu_seconds() -> dict[str, float]:
        return {**server.cpu_seconds(), "load": sum(generator.cpu_times()[:2])}

    metrics, cpu = server.metrics(), cpu_seconds()
    load = closed_loop([caller(i) for i in range(in_flight)], seconds, WARM_UP)
    cpu = {role: value - cpu[role] for role, value in cpu_seconds().items()}
    grown = _metrics_since(server, metrics, sum(answer.images for answer in answers))
    stages = ("decode", "queue", "copy_in", "forward", "copy_out", "respond")
    return Round(
        load,
        answers,
        device_batches=round(grown["dinov3_batch_images_count",]),
        cpu_seconds=cpu,
        stage_seconds={stage: grown["dinov3_stage_seconds_sum", stage] for stage in stages},
    )


def _metrics_since(server: Server, before: dict[tuple[str, ...], float], images: int) -> dict[tuple[str, ...], float]:
    """Return the growth of each metric, once frontend and worker have reported all `images`."""
    end = time.monotonic() + 5
    while True:
        grown = {key: value - before.get(key, 0.0) for key, value in server.metrics().items()}
        if grown["dinov3_batch_images_sum",] == images == grown.get(("dinov3_images_total", "ok")):
            return grown
        assert time.monotonic() < end, f"/metrics does not report the {images} answered images"
        time.sleep(0.05)


def compare_with_bare(
    server: Server, client: Client, replay: Replay, name: str, request: Request, in_flight: int
) -> dict[str, Any]:
    rounds: list[tuple[Round, Bare]] = []
    for _ in range(ROUNDS):
        served = closed_round(server, [client], [request], in_flight, SECONDS)
        rounds.append((served, replay(224, served.batches(), BARE_SECONDS)))
    served_rounds = [served for served, _ in rounds]
    images = sum(served.images for served in served_rounds)
    row = {
        "requests": name,
        "in_flight": in_flight,
        **_figures(served_rounds),
        "bare_images_per_second": round(statistics.median(bare.images_per_second for _, bare in rounds), 2),
        "of_bare": _median(served.images_per_second / bare.images_per_second for served, bare in rounds),
        "cpu_ms_per_image": {
            role: round(sum(served.cpu_seconds[role] for served in served_rounds) / images * 1e3, 3)
            for role in served_rounds[0].cpu_seconds
        },
        "bare_cpu_ms_per_image": _median(bare.cpu_seconds / bare.images * 1e3 for _, bare in rounds),
        "cpu_over_bare_ms": _median(
            (
                (served.cpu_seconds["frontend"] + served.cpu_seconds["worker"]) / served.images
                - bare.cpu_seconds / bare.images
            )
            * 1e3
            for served, bare in rounds
        ),
        "stage_ms": {
            stage: round(sum(served.stage_seconds[stage] for served in served_rounds) / images * 1e3, 3)
            for stage in served_rounds[0].stage_seconds
        },
    }
    if in_flight == 1:  # a request is a batch
        row |= {
            "bare_batch_ms": _median(statistics.median(bare.seconds) * 1e3 for _, bare in rounds),
            "over_bare_ms": _median(
                (served.load.percentile(50) - statistics.median(bare.seconds)) * 1e3 for served, bare in rounds
            ),
        }
    print(row, flush=True)
    return row


def mixed_sizes(server: Server, client: Client) -> dict[str, Any]:
    requests = {size: raw(size) for size in MIXED_SIZES}
    rounds: list[tuple[Round, dict[int, Round]]] = []
    for _ in range(ROUNDS):
        alone = {size: closed_round(server, [client], [requests[size]], 32, SECONDS + size / 128) for size in requests}
        rounds.append((closed_round(server, [client], list(requests.values()), 32, MIXED_SECONDS), alone))
    ratios = []
    for mixed, alone in rounds:
        answered = Counter(answer.size for answer in mixed.load.answers)
        expected = sum(count / alone[size].images_per_second for size, count in answered.items())
        ratios.append(expected / mixed.load.seconds)
    result = {
        **_figures([mixed for mixed, _ in rounds]),
        "single": [{"size": size, **_figures([alone[size] for _, alone in rounds])} for size in requests],
        "of_single": _median(ratios),
        "of_single_by_round": [round(ratio, 3) for ratio in ratios],
    }
    print(result, flush=True)
    return result


def several_frontends() -> list[dict[str, Any]]:
    with ExitStack() as stack:
        servers = {
            count: stack.enter_context(serving(*FLAGS, "--frontends", str(count), "--arena-bytes", str(2**27)))
            for count in FRONTENDS
        }
        clients = {
            count: [stack.enter_context(Client(server.grpc)) for _ in range(16)] for count, server in servers.items()
        }
        rounds: list[dict[int, Round]] = [
            {count: closed_round(server, clients[count], [raw(224)], 32, SECONDS) for count, server in servers.items()}
            for _ in range(ROUNDS)
        ]
    rows = []
    for count in FRONTENDS:
        own = [each[count] for each in rounds]
        shares = Counter(answer.frontend for one in own for answer in one.answers)
        rows.append(
            {
                "frontends": count,
                **_figures(own),
                "of_one": _median(each[count].images_per_second / each[1].images_per_second for each in rounds),
                "shares": [round(shares[index] / shares.total(), 3) for index in range(count)],
            }
        )
        print(rows[-1], flush=True)
    return rows


def _figures(rounds: Sequence[Round]) -> dict[str, Any]:
    """Return the figures of all rounds of a case: the median rate, latencies of all calls, and batch sizes."""
    latencies = sorted(itertools.chain.from_iterable(one.load.latencies for one in rounds))
    answers = [answer for one in rounds for answer in one.answers]
    images = sum(one.images for one in rounds)
    together = Load(sum(one.load.seconds for one in rounds), latencies, answers)
    return {
        "calls": len(latencies),
        "images_per_second": _median(one.images_per_second for one in rounds),
        "p50_ms": round(together.percentile(50) * 1e3, 2),
        "p99_ms": round(together.percentile(99) * 1e3, 2),
        "rounds": [round(one.images_per_second, 2) for one in rounds],
        "mean_batch": round(sum(answer.batch_images * answer.images for answer in answers) / images, 1),
        "device_batch": round(images / sum(one.device_batches for one in rounds), 1),
    }


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)

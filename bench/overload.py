"""The service beyond its capacity: goodput, time to refuse, a small caller beside a large one, our client's retries.

`open`: an open loop (bench/open_loop.py) of requests of one JPEG, at Poisson times drawn from a fixed seed, each with a
deadline; the load generator runs on the server's cores. `capacity` is the rate of a closed loop of such requests
without deadlines, the better of one before and one after the open loops of that server. Requests are counted that were
sent in the measured time, after a warm-up that is as long as the deadline. Columns:

- `load`: the offered rate over the capacity. `of_capacity`: images answered before their deadline, over the capacity;
  `of_offered`: over the offered ones. `of_left`: over what the capacity is without the CPU time that the generator and
  the frontends used in the measured time beyond what they use for as many answers in the closed loop.
- `generator`: CPU time of the generator in the measured time, over the time of all cores.
- From the server's metrics, from the first request to the last answer: `refused_ms`, the 50th and 99th percentile of
  the time from a request's arrival at its handler to its refusal (dinov3_refusal_seconds: the upper bound of its
  bucket); `lag_ms`, the 99.9th of the delay of the frontends' event loops, likewise; `late`, device time of images
  that ended after their deadline, over all device time; `busy`, device time over wall time; `mean_batch`.
- `expired`: requests whose caller saw its own deadline instead of an answer.

`mixed` sizes are 224, 256 and 512 px in turn. `frontends` is how many share the one worker.

`hog`: closed loops at a ViT-S server: `hog` keeps four requests of 256 images of 224x224 in flight, another caller one
request of one image. `p99_ms` is that caller's latency beside the hog, `idle_p99_ms` alone; `full_batch_ms` is the time
of 32 images at the hog's rate; `bound_ms` is idle_p99_ms and three full batches. `hog_of_alone`: the rate of the hog
over its rate without the small caller. `refused`: requests of either in that time.

`client`: our own client, whose threads ask for one image at a time with a deadline of 2 s: as many as would keep five
times the capacity waiting, 512 at most. `attempts`: calls that the server has seen, over calls that threads made.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import psutil

from bench.open_loop import Generator, Usage
from bench.preprocessing import MAX_PIXELS, photos
from bench.record import table
from bench.requests import encoded, random_pixels
from bench.server import Server, quantile_ms, serving
from dinov3_client import Client, Overloaded
from dinov3_client import DeadlineExceeded as ClientDeadline
from dinov3_server.images.decode import File
from dinov3_serving.v1 import feature_service_pb2 as pb

MODELS = {"vitb16": "float32", "vits16": "bfloat16"}
LOADS = (0.5, 1.0, 2.0, 5.0)
DEADLINES = (2.0, 10.0)
SIZES = {"224": (224,), "mixed": (224, 256, 512)}
SECONDS = {"vitb16": 20.0, "vits16": 12.0}
HOG_REQUESTS, HOG_IMAGES = 4, 256
HOG_SECONDS = 20.0
CLIENT_SECONDS = 10.0
CORES = psutil.cpu_count() or 1
METRICS_AGE = 2.0  # seconds to wait before /metrics is read, which is up to a second old
REFUSED, REQUESTS = "dinov3_refused_requests_total", "dinov3_requests_total"

Metrics = dict[tuple[str, ...], float]


def measure() -> dict[str, Any]:
    opened = []
    for model in MODELS:
        opened += _open_loops(model, "224", DEADLINES, frontends=1)
    opened += _open_loops("vits16", "mixed", DEADLINES[:1], frontends=1)
    opened += _open_loops("vits16", "224", DEADLINES[:1], frontends=2)
    return {"open": opened, "hog": [_hog(bulk) for bulk in (True, False)], "client": _client()}


def show(result: dict[str, Any]) -> str:
    columns = (
        "case", "load", "capacity", "of_capacity", "of_offered", "of_left", "refused_ms", "lag_ms", "late", "busy",
        "mean_batch", "expired", "generator",
    )  # fmt: skip
    hog = ("hog", "p99_ms", "idle_p99_ms", "full_batch_ms", "bound_ms", "refused", "hog_of_alone")
    client = ("threads", "asked", "answered", "attempts", "error")
    return "\n\n".join(
        (table(result["open"], *columns), table(result["hog"], *hog), table([result["client"]], *client))
    )


def _flags(model: str, frontends: int = 1) -> list[str]:
    sizes = "224x224,256x256,512x512"
    return [
        *("--model", model, "--weights", "random:0", "--dtype", MODELS[model], "--warm-up-sizes", sizes),
        *("--frontends", str(frontends), "--arena-bytes", str(2**28)),
    ]


def _requests(sizes: Sequence[int]) -> list[bytes]:
    """Return a request for the CLS token of one JPEG, a crop of a photo, for each size."""
    photo = File(photos()["motorcycle_left.png"], MAX_PIXELS).decode()
    crop = photo.crop((0, 0, 512, 512))
    return [
        pb.ExtractRequest(
            images=[pb.Image(encoded=encoded(crop.resize((size, size)), "JPEG", quality=90))],
            preprocessing=pb.Preprocessing(preset=pb.PRESET_NONE),
            outputs=pb.Outputs(cls=True),
        ).SerializeToString()
        for size in sizes
    ]


def _open_loops(model: str, sizes: str, deadlines: Sequence[float], frontends: int) -> list[dict[str, Any]]:
    with serving(*_flags(model, frontends)) as server:
        return asyncio.run(_open_loops_at(server, model, sizes, deadlines, frontends))


async def _open_loops_at(
    server: Server, model: str, sizes: str, deadlines: Sequence[float], frontends: int
) -> list[dict[str, Any]]:
    generator = Generator(server.grpc, _requests(SIZES[sizes]), lambda: server.cpu_seconds()["frontend"])
    seconds = SECONDS[model]
    loops: list[dict[str, Any]] = []
    rate, closed = await generator.closed(seconds, warm_up=3.0)
    await asyncio.sleep(METRICS_AGE)
    for deadline in deadlines:
        for load in LOADS:
            metrics, begun = server.metrics(), time.perf_counter()
            sent = await generator.open(load * rate, deadline, seconds, seed=len(loops))
            elapsed = time.perf_counter() - begun
            await asyncio.sleep(METRICS_AGE)
            counted = _counted(metrics, server.metrics(), elapsed)
            loops.append({"model": model, "deadline": deadline, "sent": sent, "counted": counted})
    again, _ = await generator.closed(seconds, warm_up=3.0)
    await generator.close()
    return [_row(loop, closed, max(rate, again), sizes, frontends) for loop in loops]


def _row(loop: dict[str, Any], closed: Usage, capacity: float, sizes: str, frontends: int) -> dict[str, Any]:
    sent, counted = loop["sent"], loop["counted"]
    good = sent.codes[grpc.StatusCode.OK] / sent.seconds
    usage = sent.usage
    cores = usage.seconds * CORES  # CPU seconds of all cores in the measured time
    for_answers = (closed.generator + closed.frontends) * usage.answered / closed.answered
    extra = max(0.0, usage.generator + usage.frontends - for_answers)
    row = {
        "case": f"{loop['model']}, {sizes} px, {loop['deadline']:g} s, {frontends} frontend{'s' * (frontends > 1)}",
        "load": round(sent.offered / sent.seconds / capacity, 2),
        "capacity": round(capacity, 2),
        "of_capacity": round(good / capacity, 3),
        "of_offered": round(good * sent.seconds / sent.offered, 3),
        "of_left": round(good / (capacity * (1 - extra / cores)), 3),
        **counted,
        "expired": sent.codes[grpc.StatusCode.DEADLINE_EXCEEDED],
        "generator": round(usage.generator / cores, 3),
        "codes": {code.name: count for code, count in sent.codes.items()},
    }
    print(row, flush=True)
    return row


def _counted(before: Metrics, after: Metrics, seconds: float) -> dict[str, Any]:
    """Return what the server's metrics counted in an open loop that took `seconds` to its last answer."""
    grown = {key: value - before.get(key, 0.0) for key, value in after.items()}
    busy = _total(grown, "dinov3_device_busy_seconds_total")
    batches = _total(grown, "dinov3_batch_images_count")
    return {
        "refused_ms": [quantile_ms(grown, "dinov3_refusal_seconds", part) for part in (0.5, 0.99)],
        "lag_ms": quantile_ms(grown, "dinov3_event_loop_lag_seconds", 0.999),
        "late": round(_total(grown, "dinov3_late_device_seconds_total") / max(busy, 1e-9), 4),
        "busy": round(busy / seconds, 3),
        "mean_batch": round(_total(grown, "dinov3_batch_images_sum") / max(batches, 1), 1),
    }


def _total(metrics: Metrics, name: str) -> float:
    return sum(value for (found, *_), value in metrics.items() if found == name)


def _hog(bulk: bool) -> dict[str, Any]:
    pixels = random_pixels(HOG_IMAGES, 224)
    with serving(*_flags("vits16")) as server, Client(server.grpc, deadline=600) as ours, Client(server.grpc) as other:
        over = threading.Event()
        refused = 0

        def hog() -> list[float]:
            ends = []
            while not over.is_set():
                ours.extract(pixels, ("cls",), preset="none", priority="bulk" if bulk else "interactive")
                ends.append(time.perf_counter())
            return ends

        def small(seconds: float) -> list[float]:
            nonlocal refused
            latencies, end = [], time.perf_counter() + seconds
            before = _total(server.metrics(), REFUSED)
            while (since := time.perf_counter()) < end:
                other.extract(pixels[:1], ("cls",), preset="none")
                latencies.append(time.perf_counter() - since)
            time.sleep(METRICS_AGE)
            refused = int(_total(server.metrics(), REFUSED) - before)
            return latencies

        def beside(seconds: float, with_small: bool) -> tuple[float, list[float]]:
            over.clear()
            with ThreadPoolExecutor(HOG_REQUESTS) as pool:
                running = [pool.submit(hog) for _ in range(HOG_REQUESTS)]
                time.sleep(3.0)
                if with_small:
                    latencies = small(seconds)
                else:
                    time.sleep(seconds)
                    latencies = []
                over.set()
                ends = sorted(end for one in running for end in one.result())
            return HOG_IMAGES * (len(ends) - 1) / (ends[-1] - ends[0]), latencies

        idle = small(5.0)
        alone, _ = beside(HOG_SECONDS / 2, with_small=False)
        rate, latencies = beside(HOG_SECONDS, with_small=True)
        again, _ = beside(HOG_SECONDS / 2, with_small=False)
    alone = statistics.mean((alone, again))
    row: dict[str, Any] = {
        "hog": "bulk" if bulk else "interactive",
        "requests": len(latencies),
        "p99_ms": _p99(latencies),
        "idle_p99_ms": _p99(idle),
        "full_batch_ms": round(32 / alone * 1e3, 1),
        "refused": refused,
        "hog_of_alone": round(rate / alone, 3),
    }
    row["bound_ms"] = round(row["idle_p99_ms"] + 3 * row["full_batch_ms"], 1)
    print(row, flush=True)
    return row


def _p99(latencies: list[float]) -> float:
    return round(sorted(latencies)[int(len(latencies) * 0.99)] * 1e3, 1)


def _client() -> dict[str, Any]:
    (request,) = _requests((224,))
    image = bytes(pb.ExtractRequest.FromString(request).images[0].encoded)
    with serving(*_flags("vits16")) as server, Client(server.grpc, deadline=2.0) as client:
        capacity = asyncio.run(_capacity(server, request))
        threads = int(5 * capacity * 2)  # each waits for 2 s at most: five times the capacity in all
        threads = min(threads, 512)
        over = threading.Event()
        answers: Counter[str] = Counter()
        last_error = ""

        def caller() -> None:
            nonlocal last_error
            while not over.is_set():
                try:
                    client.extract(image, ("cls",), preset="none")
                    answers["answered"] += 1
                except (Overloaded, ClientDeadline) as error:
                    answers[type(error).__name__] += 1
                    last_error = str(error)

        before = _total(server.metrics(), REQUESTS)
        with ThreadPoolExecutor(threads) as pool:
            running = [pool.submit(caller) for _ in range(threads)]
            time.sleep(CLIENT_SECONDS)
            over.set()
            for one in running:
                one.result()
        time.sleep(METRICS_AGE)
        calls = _total(server.metrics(), REQUESTS) - before
    row: dict[str, Any] = {
        "threads": threads,
        "capacity": round(capacity, 2),
        "asked": answers.total(),
        "answered": answers["answered"],
        "answered_per_second": round(answers["answered"] / CLIENT_SECONDS, 2),
        "outcomes": dict(answers),
        "attempts": round(calls / answers.total(), 3),
        "error": last_error,
    }
    print(row, flush=True)
    return row


async def _capacity(server: Server, request: bytes) -> float:
    generator = Generator(server.grpc, [request], lambda: 0.0)
    rate, _ = await generator.closed(5.0, warm_up=2.0)
    await generator.close()
    return rate

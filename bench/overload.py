"""The service beyond its capacity: goodput, time to refuse, a small caller beside a hog, our client.

`open`: an open loop of requests of one JPEG, at Poisson times drawn from a fixed seed, each with a deadline; the load
generator (raw gRPC calls of one asyncio process, over CONNECTIONS connections, no retries) runs on the same cores.
`capacity` is the rate of a closed loop of IN_FLIGHT such requests without deadlines, the better of one before and one
after the open loops of that server. Figures are of what was sent in the measured time, after a warm-up that is as long
as the deadline. Of each row:

- `load`: what is offered, over the capacity. `of_capacity`: images answered before their deadline over the capacity;
  `of_offered`: over what was offered. `of_left`: over what the capacity is without the CPU time that the generator and
  the frontends took beyond what they take for as many answers in the closed loop.
- `refused_ms`: 50th and 99th percentile of the time from a request's arrival at its handler to its refusal
  (dinov3_refusal_seconds: the upper bound of its bucket). `late`: device time of images that ended after their
  deadline, over all device time. `expired`: requests of which the caller saw its own deadline instead of an answer.
- `generator`: CPU time of the generator over the time of all cores.

`mixed` sizes are 224, 256 and 512 px in turn. `frontends` is how many share the one worker.

`hog`: closed loops at a ViT-S server: `hog` keeps four requests of 256 images of 224x224 under way, another caller one
request of one image. `p99_ms` of that caller beside the hog, `idle_p99_ms` alone; `full_batch_ms` is the time of 32
images at the hog's rate; `bound_ms` is idle_p99_ms and three full batches. `hog_of_alone`: the rate of the hog over its
rate without the small caller. `refused`: requests of either in that time.

`client`: our own client, whose threads ask for one image at a time with a deadline of 2 s: as many as would keep five
times the capacity waiting, 512 at most. `attempts`: calls that the server has seen, over those that threads made.
"""

from __future__ import annotations

import asyncio
import io
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import psutil

from bench.load import whole_batches
from bench.preprocessing import MAX_PIXELS, photos
from bench.record import table
from bench.server import Server, serving
from dinov3_client import Client, Overloaded
from dinov3_client import DeadlineExceeded as ClientDeadline
from dinov3_server.images.decode import decode
from dinov3_serving.v1 import feature_service_pb2 as pb

METHOD = "/dinov3_serving.v1.FeatureService/Extract"
MODELS = {"vitb16": "float32", "vits16": "bfloat16"}
LOADS = (0.5, 1.0, 2.0, 5.0)
DEADLINES = (2.0, 10.0)
SIZES = {"224": (224,), "mixed": (224, 256, 512)}
SECONDS = {"vitb16": 20.0, "vits16": 12.0}
CONNECTIONS = 4
IN_FLIGHT = 64
HOG_REQUESTS, HOG_IMAGES = 4, 256
HOG_SECONDS = 20.0
CLIENT_SECONDS = 10.0
CORES = psutil.cpu_count() or 1

Codes = Counter[grpc.StatusCode]


@dataclass
class Sent:
    """An open loop's requests of the measured time, by status."""

    seconds: float
    codes: Codes = field(default_factory=Counter)

    @property
    def offered(self) -> int:
        return self.codes.total()


class Generator:
    """Raw calls on several connections. Requests go out in turn."""

    def __init__(self, address: str, requests: Sequence[bytes]) -> None:
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
        self._channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(CONNECTIONS)]
        self._calls: list[Any] = [channel.unary_unary(METHOD) for channel in self._channels]
        self._requests = requests
        self._sent = 0

    async def call(self, deadline: float | None) -> grpc.StatusCode:
        self._sent += 1
        call = self._calls[self._sent % CONNECTIONS](self._requests[self._sent % len(self._requests)], timeout=deadline)
        try:
            await call
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    async def closed(self, seconds: float, warm_up: float) -> float:
        """Return the images a second of IN_FLIGHT requests, each followed by the next one."""
        ends: list[float] = []
        over = False

        async def caller() -> None:
            while not over:
                code = await self.call(None)
                assert code is grpc.StatusCode.OK, code
                ends.append(time.perf_counter())

        callers = [asyncio.create_task(caller()) for _ in range(IN_FLIGHT)]
        await asyncio.sleep(warm_up)
        ends.clear()
        await asyncio.sleep(seconds)
        measured = list(ends)
        over = True
        await asyncio.gather(*callers)
        first, last = whole_batches(measured)
        return (last - first) / (measured[last] - measured[first])

    async def open(self, rate: float, deadline: float, seconds: float, seed: int) -> Sent:
        """Send `rate` requests a second, of which those count that are sent after the first `deadline` seconds."""
        chance, sent, running = random.Random(seed), Sent(seconds), set[asyncio.Task[None]]()

        async def one(counts: bool) -> None:
            code = await self.call(deadline)
            if counts:
                sent.codes[code] += 1

        since, at = time.perf_counter(), 0.0
        while (at := at + chance.expovariate(rate)) < deadline + seconds:
            ahead = since + at - time.perf_counter()
            await asyncio.sleep(max(0.0, ahead))
            task = asyncio.create_task(one(at >= deadline))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
        return sent

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


def measure() -> dict[str, Any]:
    opened = []
    for model in MODELS:
        opened += _open_loops(model, "224", DEADLINES, frontends=1)
    opened += _open_loops("vits16", "mixed", DEADLINES[:1], frontends=1)
    opened += _open_loops("vits16", "224", DEADLINES[:1], frontends=2)
    return {"open": opened, "hog": [_hog(bulk) for bulk in (True, False)], "client": _client()}


def show(result: dict[str, Any]) -> str:
    columns = (
        "case", "load", "capacity", "of_capacity", "of_offered", "of_left", "refused_ms", "late", "busy", "mean_batch",
        "expired", "generator",
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
    """One JPEG each, a crop of a photo; CLS back."""
    photo = decode(photos()["motorcycle_left.png"], max_pixels=MAX_PIXELS, apply_exif_orientation=False)
    messages = []
    for size in sizes:
        file = io.BytesIO()
        photo.crop((0, 0, 512, 512)).resize((size, size)).save(file, "JPEG", quality=90)
        messages.append(
            pb.ExtractRequest(
                images=[pb.Image(encoded=file.getvalue())],
                preprocessing=pb.Preprocessing(preset=pb.PRESET_NONE),
                outputs=pb.Outputs(cls=True),
            ).SerializeToString()
        )
    return messages


def _open_loops(model: str, sizes: str, deadlines: Sequence[float], frontends: int) -> list[dict[str, Any]]:
    with serving(*_flags(model, frontends)) as server:
        return asyncio.run(_open_loops_at(server, model, sizes, deadlines, frontends))


async def _open_loops_at(
    server: Server, model: str, sizes: str, deadlines: Sequence[float], frontends: int
) -> list[dict[str, Any]]:
    generator = Generator(server.grpc, _requests(SIZES[sizes]))
    seconds = SECONDS[model]
    rows: list[dict[str, Any]] = []
    before = _Use(server)
    rate = await generator.closed(seconds, warm_up=3.0)
    closed = before.until_now()
    for deadline in deadlines:
        for load in LOADS:
            use = _Use(server)
            sent = await generator.open(load * rate, deadline, seconds, seed=len(rows))
            await asyncio.sleep(2.0)  # /metrics is up to a second old
            rows.append({"model": model, "load": load, "deadline": deadline, "sent": sent, "use": use.until_now()})
    capacity = max(rate, await generator.closed(seconds, warm_up=3.0))
    await generator.close()
    return [_row(row, closed, capacity, sizes, frontends) for row in rows]


def _row(row: dict[str, Any], closed: dict[str, Any], capacity: float, sizes: str, frontends: int) -> dict[str, Any]:
    sent, use = row["sent"], row["use"]
    good = sent.codes[grpc.StatusCode.OK] / sent.seconds
    # CPU of generator and frontends beyond what they take for the same answers in the closed loop, of all cores.
    beside = use["beside"] - closed["beside"] * use["images"] / closed["images"]
    left = capacity * (1 - max(0.0, beside) / (use["seconds"] * CORES))
    shown = {
        "case": f"{row['model']}, {sizes} px, {row['deadline']:g} s, {frontends} frontend{'s' * (frontends > 1)}",
        "load": round(sent.offered / sent.seconds / capacity, 2),
        "capacity": round(capacity, 2),
        "of_capacity": round(good / capacity, 3),
        "of_offered": round(good * sent.seconds / sent.offered, 3),
        "of_left": round(good / left, 3),
        "refused_ms": use["refused_ms"],
        "late": round(use["late"] / max(use["busy"], 1e-9), 4),
        "busy": round(use["busy"] / use["seconds"], 3),
        "mean_batch": round(use["computed"] / max(use["batches"], 1), 1),
        "expired": sent.codes[grpc.StatusCode.DEADLINE_EXCEEDED],
        "generator": round(use["generator"] / (use["seconds"] * CORES), 3),
        "codes": {code.name: count for code, count in sent.codes.items()},
    }
    print(shown, flush=True)
    return shown


class _Use:
    """What the server and this process took from the construction on."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._before = self._now()

    def _now(self) -> dict[str, Any]:
        generator = sum(psutil.Process().cpu_times()[:2])
        return {
            "metrics": self._server.metrics(),
            "time": time.perf_counter(),
            "generator": generator,
            "beside": generator + self._server.cpu_seconds()["frontend"],
        }

    def until_now(self) -> dict[str, Any]:
        before, now = self._before, self._now()
        grown = {key: value - before["metrics"].get(key, 0.0) for key, value in now["metrics"].items()}

        def total(name: str) -> float:
            amount: float = sum(value for (found, *_), value in grown.items() if found == name)
            return amount

        return {
            "seconds": now["time"] - before["time"],
            "generator": now["generator"] - before["generator"],
            "beside": now["beside"] - before["beside"],
            "images": grown.get(("dinov3_images_total", "ok"), 0.0),
            "late": total("dinov3_late_device_seconds_total"),
            "busy": total("dinov3_device_busy_seconds_total"),
            "computed": total("dinov3_batch_images_sum"),
            "batches": total("dinov3_batch_images_count"),
            "requests": total("dinov3_requests_total"),
            "refused_ms": [_quantile(grown, part) for part in (0.5, 0.99)],
        }


def _quantile(grown: dict[tuple[str, ...], float], part: float) -> float | None:
    """In ms; None where nothing was refused."""
    buckets = sorted(
        (float(key[1]), value) for key, value in grown.items() if key[0] == "dinov3_refusal_seconds_bucket"
    )
    if not buckets or not buckets[-1][1]:
        return None
    bounds = (bound for bound, value in buckets if value >= part * buckets[-1][1])
    return next(bounds) * 1e3


def _hog(bulk: bool) -> dict[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 256, (HOG_IMAGES, 224, 224, 3), np.uint8)
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
            before = _refused(server)
            while (since := time.perf_counter()) < end:
                other.extract(pixels[:1], ("cls",), preset="none")
                latencies.append(time.perf_counter() - since)
            time.sleep(2.0)  # /metrics is up to a second old
            refused = int(_refused(server) - before)
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


def _refused(server: Server) -> float:
    return sum(value for (name, *_), value in server.metrics().items() if name == "dinov3_refused_requests_total")


def _client() -> dict[str, Any]:
    (request,) = _requests((224,))
    image = bytes(pb.ExtractRequest.FromString(request).images[0].encoded)
    with serving(*_flags("vits16")) as server, Client(server.grpc, deadline=2.0) as client:
        capacity = asyncio.run(_capacity(server, request))
        threads = int(5 * capacity * 2)  # each waits for 2 s at most: five times the capacity in all
        threads = min(threads, 512)
        over = threading.Event()
        answers: Counter[str] = Counter()
        told = ""

        def caller() -> None:
            nonlocal told
            while not over.is_set():
                try:
                    client.extract(image, ("cls",), preset="none")
                    answers["answered"] += 1
                except (Overloaded, ClientDeadline) as error:
                    answers[type(error).__name__] += 1
                    told = str(error)

        use = _Use(server)
        with ThreadPoolExecutor(threads) as pool:
            running = [pool.submit(caller) for _ in range(threads)]
            time.sleep(CLIENT_SECONDS)
            over.set()
            for one in running:
                one.result()
        time.sleep(2.0)
        calls = use.until_now()["requests"]
    row: dict[str, Any] = {
        "threads": threads,
        "capacity": round(capacity, 2),
        "asked": answers.total(),
        "answered": answers["answered"],
        "answered_per_second": round(answers["answered"] / CLIENT_SECONDS, 2),
        "outcomes": dict(answers),
        "attempts": round(calls / answers.total(), 3),
        "error": told,
    }
    print(row, flush=True)
    return row


async def _capacity(server: Server, request: bytes) -> float:
    generator = Generator(server.grpc, [request])
    rate = await generator.closed(5.0, warm_up=2.0)
    await generator.close()
    return rate

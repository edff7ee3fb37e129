"""The metrics of the service, declared once, and how processes' numbers become one page.

Every process counts in a `Metrics` of its own and sends snapshots of it to the supervisor, whose `Aggregate` merges
them and writes the Prometheus text format. prometheus_client's own multiprocess mode is not used: its gauges outlive
their process, it has no Info, and an observation costs several times as much.

Label names and values are few and fixed: none may hold what a request brought.
"""

from __future__ import annotations

import secrets
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from prometheus_client.core import Metric

Labels = tuple[str, ...]
# Of a counter or gauge: its value. Of a histogram: the sum, then the count of each bucket (not cumulative), the last
# of which has no upper bound.
Numbers = tuple[float, ...]

SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
IMAGES_BUCKETS = tuple(float(2**power) for power in range(10))  # 1 .. 512
TOKENS_BUCKETS = tuple(float(2**power) for power in range(8, 18))  # 256 .. 131072


class Spec(NamedTuple):
    """One metric. `merge` makes one gauge of the same one in several processes."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Labels = ()
    buckets: tuple[float, ...] = ()
    merge: Callable[[Iterable[float]], float] = sum


REQUESTS = Spec("dinov3_requests_total", "counter", "Calls answered, by gRPC method and status.", ("method", "code"))
REQUEST_SECONDS = Spec(
    "dinov3_request_seconds", "histogram", "Time from a call's arrival to its answer.", ("method",), SECONDS_BUCKETS
)
IMAGES = Spec("dinov3_images_total", "counter", "Images, by what became of them.", ("outcome",))
STAGE_SECONDS = Spec(
    "dinov3_stage_seconds",
    "histogram",
    "Time in each stage: decode (of an image), queue (an image's wait for its batch), copy_in, forward, copy_out (of a "
    "batch) and respond (building an answer).",
    ("stage",),
    SECONDS_BUCKETS,
)
BATCH_IMAGES = Spec("dinov3_batch_images", "histogram", "Images in each batch that ran.", (), IMAGES_BUCKETS)
BATCH_TOKENS = Spec("dinov3_batch_tokens", "histogram", "Tokens in each batch that ran.", (), TOKENS_BUCKETS)
QUEUE_IMAGES = Spec("dinov3_queue_images", "gauge", "Images that wait for a device.")
QUEUE_SECONDS = Spec(
    "dinov3_queue_seconds", "histogram", "Time from an image's admission to its batch's start.", (), SECONDS_BUCKETS
)
REJECTED = Spec("dinov3_rejected_total", "counter", "Requests refused at admission, by reason.", ("reason",))
ARENA_BYTES = Spec("dinov3_arena_bytes", "gauge", "Shared memory of the frontends, by state.", ("state",))
DEVICE_MEMORY_BYTES = Spec(
    "dinov3_device_memory_bytes", "gauge", "Memory that a worker holds on its device, by kind.", ("device", "kind")
)
DEVICE_BUSY_SECONDS = Spec(
    "dinov3_device_busy_seconds_total", "counter", "Time in which a device had a batch to run.", ("device",)
)
WORKER_RESTARTS = Spec("dinov3_worker_restarts_total", "counter", "Workers started again after a death.", ("device",))
MODEL_INFO = Spec(
    "dinov3_model_info",
    "gauge",
    "1 for each model that is served.",
    ("model", "weights", "fingerprint", "dtype", "device"),
    merge=max,
)
MODEL_LOAD_SECONDS = Spec(
    "dinov3_model_load_seconds", "gauge", "Time that each step of the last model load took.", ("step",), merge=max
)
CERTIFICATE_COSINE = Spec(
    "dinov3_certificate_cosine",
    "gauge",
    "Least cosine between served features and the reference's, by output.",
    ("output",),
    merge=min,
)

SPECS: tuple[Spec, ...] = (
    REQUESTS,
    REQUEST_SECONDS,
    IMAGES,
    STAGE_SECONDS,
    BATCH_IMAGES,
    BATCH_TOKENS,
    QUEUE_IMAGES,
    QUEUE_SECONDS,
    REJECTED,
    ARENA_BYTES,
    DEVICE_MEMORY_BYTES,
    DEVICE_BUSY_SECONDS,
    WORKER_RESTARTS,
    MODEL_INFO,
    MODEL_LOAD_SECONDS,
    CERTIFICATE_COSINE,
)


class Snapshot(NamedTuple):
    """The numbers of one process at one time; small, and picklable.

    `instance` differs between any two `Metrics`, so that a restarted process is known by its first snapshot.
    """

    instance: str
    series: dict[str, dict[Labels, Numbers]]


class _Instrument:
    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._lock = threading.Lock()

    def _check(self, labels: Labels) -> None:
        """On a series' first use only: it costs nothing afterwards."""
        if len(labels) != len(self._spec.labels):
            raise TypeError(f"{self._spec.name} has the labels {self._spec.labels}, got {labels}")


class Counter(_Instrument):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        # Series without labels exist from the start: a rate over a first increment would miss it.
        self._values: dict[Labels, float] = {} if spec.labels else {(): 0.0}

    def inc(self, *labels: str, value: float = 1.0) -> None:
        with self._lock:
            if labels not in self._values:
                self._check(labels)
                self._values[labels] = value
            else:
                self._values[labels] += value

    def snapshot(self) -> dict[Labels, Numbers]:
        with self._lock:
            return {labels: (value,) for labels, value in self._values.items()}


class Gauge(_Instrument):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._values: dict[Labels, float] = {}

    def set(self, value: float, *labels: str) -> None:
        with self._lock:
            if labels not in self._values:
                self._check(labels)
            self._values[labels] = value

    def snapshot(self) -> dict[Labels, Numbers]:
        with self._lock:
            return {labels: (value,) for labels, value in self._values.items()}


class Histogram(_Instrument):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._buckets = spec.buckets
        self._zero = [0.0] * (1 + len(spec.buckets) + 1)
        self._series: dict[Labels, list[float]] = {} if spec.labels else {(): list(self._zero)}

    def observe(self, value: float, *labels: str) -> None:
        with self._lock:
            numbers = self._series.get(labels)
            if numbers is None:
                self._check(labels)
                numbers = self._series[labels] = list(self._zero)
            numbers[0] += value
            numbers[1 + bisect_left(self._buckets, value)] += 1.0

    def snapshot(self) -> dict[Labels, Numbers]:
        with self._lock:
            return {labels: tuple(numbers) for labels, numbers in self._series.items()}


class Metrics:
    """The metrics of one process. Every method of every instrument may be called from any thread."""

    def __init__(self) -> None:
        self.requests = Counter(REQUESTS)
        self.request_seconds = Histogram(REQUEST_SECONDS)
        self.images = Counter(IMAGES)
        self.stage_seconds = Histogram(STAGE_SECONDS)
        self.batch_images = Histogram(BATCH_IMAGES)
        self.batch_tokens = Histogram(BATCH_TOKENS)
        self.queue_images = Gauge(QUEUE_IMAGES)
        self.queue_seconds = Histogram(QUEUE_SECONDS)
        self.rejected = Counter(REJECTED)
        self.arena_bytes = Gauge(ARENA_BYTES)
        self.device_memory_bytes = Gauge(DEVICE_MEMORY_BYTES)
        self.device_busy_seconds = Counter(DEVICE_BUSY_SECONDS)
        self.worker_restarts = Counter(WORKER_RESTARTS)
        self.model_info = Gauge(MODEL_INFO)
        self.model_load_seconds = Gauge(MODEL_LOAD_SECONDS)
        self.certificate_cosine = Gauge(CERTIFICATE_COSINE)
        self._instance = secrets.token_hex(8)
        self._instruments: dict[str, Counter | Gauge | Histogram] = {
            instrument._spec.name: instrument
            for instrument in vars(self).values()
            if isinstance(instrument, Counter | Gauge | Histogram)
        }

    def snapshot(self) -> Snapshot:
        """Each instrument is consistent in itself; together they may be microseconds apart."""
        return Snapshot(self._instance, {name: one.snapshot() for name, one in self._instruments.items()})


class Aggregate:
    """The numbers of all processes, living and dead. Methods may be called from any thread.

    Counters and histograms are summed over every process there ever was, so they never go down; a gauge is merged
    over the living ones.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._living: dict[str, Snapshot] = {}
        self._dead: dict[str, dict[Labels, Numbers]] = {spec.name: {} for spec in SPECS if spec.kind != "gauge"}
        self._dead_instances: set[str] = set()

    def update(self, child: str, snapshot: Snapshot) -> None:
        """Take the newest numbers of `child`.

        If they are those of another process than before, the one before is retired; a late snapshot of a retired
        process is ignored.
        """
        with self._lock:
            if snapshot.instance in self._dead_instances:
                return
            before = self._living.get(child)
            if before is not None and before.instance != snapshot.instance:
                self._retire(before)
            self._living[child] = snapshot

    def retire(self, child: str) -> None:
        """`child` is dead: keep its counters and histograms, drop its gauges."""
        with self._lock:
            before = self._living.pop(child, None)
            if before is not None:
                self._retire(before)

    def render(self) -> bytes:
        """The page of /metrics, in the Prometheus text format 0.0.4."""
        from prometheus_client import CollectorRegistry, generate_latest

        # Imported here and built anew: only the supervisor needs prometheus_client, once a scrape.
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """The protocol of prometheus_client's collectors."""
        with self._lock:
            merged = {spec: self._merge(spec) for spec in SPECS}
        for spec, series in merged.items():
            yield _family(spec, series)

    def _retire(self, snapshot: Snapshot) -> None:
        self._dead_instances.add(snapshot.instance)
        for name, dead in self._dead.items():
            for labels, numbers in snapshot.series[name].items():
                dead[labels] = tuple(map(sum, zip(dead[labels], numbers, strict=True))) if labels in dead else numbers

    def _merge(self, spec: Spec) -> dict[Labels, Numbers]:
        parts: dict[Labels, list[Numbers]] = {labels: [n] for labels, n in self._dead.get(spec.name, {}).items()}
        for snapshot in self._living.values():
            for labels, numbers in snapshot.series[spec.name].items():
                parts.setdefault(labels, []).append(numbers)
        return {labels: tuple(map(spec.merge, zip(*each, strict=True))) for labels, each in parts.items()}


def _family(spec: Spec, series: dict[Labels, Numbers]) -> Metric:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    if spec.kind == "histogram":
        bounds = [*(f"{bound:g}" for bound in spec.buckets), "+Inf"]
        histogram = HistogramMetricFamily(spec.name, spec.help, labels=spec.labels)
        for labels, (total, *counts) in series.items():
            cumulative = [sum(counts[: index + 1]) for index in range(len(counts))]
            histogram.add_metric(labels, list(zip(bounds, cumulative, strict=True)), total)
        return histogram
    family = (CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily)(
        spec.name, spec.help, labels=spec.labels
    )
    for labels, (value,) in series.items():
        family.add_metric(labels, value)
    return family

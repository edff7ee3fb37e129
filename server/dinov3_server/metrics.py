"""Declare every metric of the service once, and merge the numbers of all processes into one page.

Every process counts in its own `Metrics` and sends snapshots to the supervisor, whose `Aggregate` merges them and
writes the Prometheus text format. prometheus_client's own multiprocess mode is not used: its gauges outlive their
process, it has no Info, and an observation costs several times as much.

Label names and values are few and fixed: no value may come from a request.
"""

from __future__ import annotations

import secrets
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from prometheus_client.core import Metric

Labels = tuple[str, ...]
# Counter or gauge: the value. Histogram: the sum, then the count of each bucket (not cumulative); the last bucket has
# no upper bound.
Numbers = tuple[float, ...]

SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
IMAGES_BUCKETS = tuple(float(2**power) for power in range(10))  # 1 .. 512
TOKENS_BUCKETS = tuple(float(2**power) for power in range(8, 18))  # 256 .. 131072

# The values of labels that are known beforehand; tests/server/test_metrics.py compares them with the code.
METHODS = ("Extract", "ExtractStream", "GetModel")
CODES = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "INTERNAL",
    "UNAVAILABLE",
    "UNAUTHENTICATED",
)
OUTCOMES = ("ok", "invalid", "refused", "failed", "expired", "cancelled")
STAGES = ("decode", "queue", "copy_in", "forward", "copy_out", "respond")
OVERLOADED = (
    "queue",
    "share",
    "bulk",
    "arena",
    "wait",
    "deadline",
    "late",
    "receiving",
    "messages_bytes",
    "pictures_bytes",
    "answers_bytes",
)
UNAVAILABLE = ("unavailable", "starting", "draining", "no_worker", "decoder")


Kind = Literal["counter", "gauge", "histogram"]


class Spec(NamedTuple):
    """The declaration of one metric. `merge` combines the values of one series over several living processes.

    The series of `begin` are on the page from the start, with 0, so that `rate` sees their first increase.
    """

    name: str
    kind: Kind
    help: str
    labels: Labels
    buckets: tuple[float, ...] = ()
    merge: Callable[[Iterable[float]], float] = sum
    begin: tuple[Labels, ...] = ()

    @property
    def zero(self) -> Numbers:
        """The numbers of a series without an observation."""
        return (0.0,) * (1 + len(self.buckets) + 1 if self.kind == "histogram" else 1)


class Snapshot(NamedTuple):
    """The numbers of one process at one time; small, and picklable.

    `instance` is unique to each `Metrics`, so the first snapshot of a restarted process shows that it is a new one.
    """

    instance: str
    series: dict[str, dict[Labels, Numbers]]


class Instrument:
    """The series of one metric, by label values. Methods may be called from any thread."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._lock = threading.Lock()
        self._series: dict[Labels, list[float]] = {}

    def _start(self, labels: Labels) -> list[float]:
        if len(labels) != len(self.spec.labels):
            raise TypeError(f"{self.spec.name} has the labels {self.spec.labels}, got {labels}")
        return self._series.setdefault(labels, list(self.spec.zero))

    def snapshot(self) -> dict[Labels, Numbers]:
        with self._lock:
            return {labels: tuple(numbers) for labels, numbers in self._series.items()}


class Counter(Instrument):
    """A sum that only grows. Its name ends in `_total`.

    `labels` has the values of each label, and all their combinations begin at 0. Values that are known at run time only
    are empty here; `inc` by 0 begins their series.
    """

    def __init__(self, name: str, help: str, /, **labels: Labels) -> None:
        super().__init__(Spec(name, "counter", help, tuple(labels), begin=tuple(product(*labels.values()))))

    def inc(self, *labels: str, value: float = 1.0) -> None:
        with self._lock:
            numbers = self._series.get(labels) or self._start(labels)
            numbers[0] += value


class Gauge(Instrument):
    """A value that is set. `merge` combines the values of several living processes."""

    def __init__(self, name: str, help: str, *labels: str, merge: Callable[[Iterable[float]], float] = sum) -> None:
        super().__init__(Spec(name, "gauge", help, labels, merge=merge))

    def set(self, value: float, *labels: str) -> None:
        with self._lock:
            numbers = self._series.get(labels) or self._start(labels)
            numbers[0] = value

    def add(self, value: float, *labels: str) -> None:
        with self._lock:
            numbers = self._series.get(labels) or self._start(labels)
            numbers[0] += value


class Histogram(Instrument):
    """Counts of observations in buckets: inclusive upper bounds, ascending. `labels` are as those of Counter."""

    def __init__(self, name: str, help: str, buckets: tuple[float, ...], /, **labels: Labels) -> None:
        super().__init__(Spec(name, "histogram", help, tuple(labels), buckets, begin=tuple(product(*labels.values()))))

    def observe(self, value: float, *labels: str) -> None:
        with self._lock:
            numbers = self._series.get(labels) or self._start(labels)
            numbers[0] += value
            numbers[1 + bisect_left(self.spec.buckets, value)] += 1.0


class Metrics:
    """The metrics of one process. Every metric is declared here."""

    def __init__(self) -> None:
        # max: all processes of a server run the same packages.
        self.build_info = Gauge(
            "dinov3_build_info",
            "1, with the versions of this server, Python and torch as labels.",
            "version",
            "python",
            "torch",
            merge=max,
        )
        self.requests = Counter(
            "dinov3_requests_total", "Calls answered, by gRPC method and status.", method=METHODS, code=CODES
        )
        self.request_seconds = Histogram(
            "dinov3_request_seconds",
            "Time from the arrival of a call to its answer.",
            SECONDS_BUCKETS,
            method=METHODS,
        )
        self.requests_in_flight = Gauge(
            "dinov3_requests_in_flight",
            "Requests that are being received, computed or answered; each message of a stream is one.",
            "method",
        )
        self.request_bytes = Counter(
            "dinov3_request_bytes_total", "Bytes of the request messages received, by method.", method=METHODS
        )
        self.response_bytes = Counter(
            "dinov3_response_bytes_total", "Bytes of the response messages sent, by method.", method=METHODS
        )
        self.images = Counter("dinov3_images_total", "Images (each view counts as one), by outcome.", outcome=OUTCOMES)
        self.stage_seconds = Histogram(
            "dinov3_stage_seconds",
            "Time in each stage: decode (of an image, with all its views), queue (an image's wait for its batch), "
            "copy_in, forward and copy_out (of a batch), respond (building an answer).",
            SECONDS_BUCKETS,
            stage=STAGES,
        )
        self.batch_images = Histogram("dinov3_batch_images", "Images in each batch that ran.", IMAGES_BUCKETS)
        self.batch_tokens = Histogram("dinov3_batch_tokens", "Tokens in each batch that ran.", TOKENS_BUCKETS)
        self.queue_images = Gauge("dinov3_queue_images", "Images waiting for a device.")
        self.images_in_flight = Gauge(
            "dinov3_images_in_flight", "Images that the frontends hold: being decoded, waiting, running or answered."
        )
        self.queue_capacity_images = Gauge(
            "dinov3_queue_capacity_images",
            "Most images that the frontends hold (max_queue_images of each); further requests are refused.",
        )
        self.queue_seconds = Histogram(
            "dinov3_queue_seconds",
            "Time from the admission of an image to the start of its batch.",
            SECONDS_BUCKETS,
        )
        self.refused_requests = Counter(
            "dinov3_refused_requests_total",
            "Requests answered with RESOURCE_EXHAUSTED or UNAVAILABLE, by reason.",
            reason=OVERLOADED + UNAVAILABLE,
        )
        self.refused_images = Counter(
            "dinov3_refused_images_total", "Images of requests refused because of load, by reason.", reason=OVERLOADED
        )
        self.refusal_seconds = Histogram(
            "dinov3_refusal_seconds",
            "Time from the arrival of a request to its refusal because of load; not of requests dropped later.",
            SECONDS_BUCKETS,
        )
        # Of several frontends, the longest wait is the one to know about.
        self.expected_wait_seconds = Gauge(
            "dinov3_expected_wait_seconds",
            "Expected wait for a device of a new interactive request of one image.",
            merge=max,
        )
        self.late_images = Counter(
            "dinov3_late_images_total", "Images that were computed but finished after their deadline."
        )
        self.late_device_seconds = Counter(
            "dinov3_late_device_seconds_total", "Device time of images that finished after their deadline.", device=()
        )
        self.arena_bytes = Gauge("dinov3_arena_bytes", "Shared memory of the frontends, by state.", "state")
        self.frontend_bytes = Gauge(
            "dinov3_frontend_bytes", "Memory of the frontends that requests hold beside the arena, by use.", "use"
        )
        self.event_loop_lag_seconds = Histogram(
            "dinov3_event_loop_lag_seconds",
            "Delay of a frontend's event loop, sampled 40 times a second; all its requests wait as long.",
            LAG_BUCKETS,
        )
        self.device_memory_bytes = Gauge(
            "dinov3_device_memory_bytes", "Memory that a worker holds on its device, by kind.", "device", "kind"
        )
        self.device_busy_seconds = Counter(
            "dinov3_device_busy_seconds_total", "Time during which a device had a batch to run.", device=()
        )
        self.workers = Gauge(
            "dinov3_workers",
            "Workers by state: serving, starting (or restarting), failed (too many failed starts in a row; retried "
            "every 30 s).",
            "device",
            "state",
        )
        self.worker_restarts = Counter("dinov3_worker_restarts_total", "Restarts of workers that died.", device=())
        # max: several workers with the same model count as one.
        self.model_info = Gauge(
            "dinov3_model_info",
            "1 for each model that is served.",
            "model",
            "weights",
            "fingerprint",
            "dtype",
            "device",
            merge=max,
        )
        # Of several workers, the slowest and the least accurate are the ones to know about.
        self.model_load_seconds = Gauge(
            "dinov3_model_load_seconds", "Time of each step of the last model load.", "step", merge=max
        )
        self.parity_cosine = Gauge(
            "dinov3_parity_cosine",
            "Lowest cosine between served features and those of Meta's code, by output.",
            "output",
            merge=min,
        )
        # Each frontend reads the files itself; the page shows the worst.
        self.tls_expiry_seconds = Gauge(
            "dinov3_tls_expiry_seconds",
            "Time until the TLS certificate of the gRPC port expires; negative once it has expired.",
            merge=min,
        )
        self.reload_failed = Gauge(
            "dinov3_reload_failed",
            "1 while a changed file of this kind (tokens, tls) cannot be used and the old content stays in use.",
            "kind",
            merge=max,
        )
        self._instance = secrets.token_hex(8)

    def instruments(self) -> list[Instrument]:
        return [each for each in vars(self).values() if isinstance(each, Instrument)]

    def snapshot(self) -> Snapshot:
        """Return the current numbers. Each metric is consistent in itself; two may be microseconds apart."""
        return Snapshot(self._instance, {each.spec.name: each.snapshot() for each in self.instruments()})


SPECS: tuple[Spec, ...] = tuple(each.spec for each in Metrics().instruments())


class Aggregate:
    """The merged numbers of all processes, living and dead. Methods may be called from any thread.

    Counters and histograms are summed over all processes there ever were, so they never decrease; gauges are merged
    over the living processes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._living: dict[str, Snapshot] = {}
        self._dead: dict[str, dict[Labels, Numbers]] = {spec.name: {} for spec in SPECS if spec.kind != "gauge"}
        self._dead_instances: set[str] = set()

    def update(self, child: str, snapshot: Snapshot) -> None:
        """Store the newest numbers of `child`.

        If they come from a new process, the previous one is retired; a late snapshot of a retired process is ignored.
        """
        with self._lock:
            if snapshot.instance in self._dead_instances:
                return
            before = self._living.get(child)
            if before is not None and before.instance != snapshot.instance:
                self._retire(before)
            self._living[child] = snapshot

    def retire(self, child: str) -> None:
        """Keep the counters and histograms of a dead `child`, and drop its gauges."""
        with self._lock:
            before = self._living.pop(child, None)
            if before is not None:
                self._retire(before)

    def render(self) -> bytes:
        """Return the page of /metrics, in the Prometheus text format 0.0.4."""
        from prometheus_client import CollectorRegistry, generate_latest

        # Imported here, because only the supervisor needs prometheus_client, once a scrape.
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the merged metrics: the interface of prometheus_client's collectors."""
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
        parts: dict[Labels, list[Numbers]] = {labels: [spec.zero] for labels in spec.begin}
        for labels, numbers in self._dead.get(spec.name, {}).items():
            parts.setdefault(labels, []).append(numbers)
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

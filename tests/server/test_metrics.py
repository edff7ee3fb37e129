"""The instruments, the merging of their snapshots, and the page for Prometheus."""

from __future__ import annotations

import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dinov3_server.api import extraction, interceptors
from dinov3_server.errors import ServingError
from dinov3_server.metrics import (
    CODES,
    METHODS,
    OUTCOMES,
    OVERLOADED,
    SECONDS_BUCKETS,
    SPECS,
    STAGES,
    UNAVAILABLE,
    Aggregate,
    Metrics,
    Snapshot,
)
from tests.server.config.generated import ROOT
from tests.support.waiting import LIMIT

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(page: bytes) -> Samples:
    """Return every sample of a page by name and sorted labels; fail on duplicates."""
    samples: Samples = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in samples
            samples[key] = sample.value
    return samples


def page_of(**children: Metrics) -> Samples:
    aggregate = Aggregate()
    for name, metrics in children.items():
        aggregate.update(name, metrics.snapshot())
    return parsed(aggregate.render())


def everything() -> Metrics:
    """Return metrics with a series of each."""
    metrics = Metrics()
    metrics.build_info.set(1, "0.1.0", "3.11.7", "2.13.0+cpu")
    metrics.requests.inc("Extract", "OK")
    metrics.requests_in_flight.add(1, "Extract")
    metrics.request_bytes.inc("Extract", value=1000)
    metrics.response_bytes.inc("Extract", value=2000)
    metrics.images_in_flight.set(5)
    metrics.queue_capacity_images.set(4096)
    metrics.request_seconds.observe(0.2, "Extract")
    metrics.images.inc("ok", value=3)
    metrics.stage_seconds.observe(0.01, "decode")
    metrics.batch_images.observe(8)
    metrics.batch_tokens.observe(1608)
    metrics.queue_images.set(3)
    metrics.queue_seconds.observe(0.004)
    metrics.refused_requests.inc("queue")
    metrics.refused_images.inc("queue", value=2)
    metrics.refusal_seconds.observe(0.001)
    metrics.expected_wait_seconds.set(0.5)
    metrics.late_images.inc()
    metrics.late_device_seconds.inc("cpu", value=0.1)
    metrics.arena_bytes.set(2**20, "used")
    metrics.frontend_bytes.set(2**19, "messages")
    metrics.device_memory_bytes.set(2**30, "cuda:0", "allocated")
    metrics.device_busy_seconds.inc("cuda:0", value=0.5)
    metrics.workers.set(1, "cuda:0", "serving")
    metrics.worker_restarts.inc("cuda:0")
    metrics.model_info.set(1, "dinov3_vits16", "random:0", "abc", "bfloat16", "cuda:0")
    metrics.model_load_seconds.set(1.5, "read")
    metrics.parity_cosine.set(0.9999, "cls")
    metrics.event_loop_lag_seconds.observe(0.003)
    metrics.tls_expiry_seconds.set(86400)
    metrics.reload_failed.set(0, "tls")
    return metrics


def test_names_and_labels_are_those_of_the_design() -> None:
    assert {spec.name: spec.labels for spec in SPECS} == {
        "dinov3_build_info": ("version", "python", "torch"),
        "dinov3_requests_total": ("method", "code"),
        "dinov3_requests_in_flight": ("method",),
        "dinov3_request_bytes_total": ("method",),
        "dinov3_response_bytes_total": ("method",),
        "dinov3_images_in_flight": (),
        "dinov3_queue_capacity_images": (),
        "dinov3_event_loop_lag_seconds": (),
        "dinov3_request_seconds": ("method",),
        "dinov3_images_total": ("outcome",),
        "dinov3_stage_seconds": ("stage",),
        "dinov3_batch_images": (),
        "dinov3_batch_tokens": (),
        "dinov3_queue_images": (),
        "dinov3_queue_seconds": (),
        "dinov3_refused_requests_total": ("reason",),
        "dinov3_refused_images_total": ("reason",),
        "dinov3_refusal_seconds": (),
        "dinov3_expected_wait_seconds": (),
        "dinov3_late_images_total": (),
        "dinov3_late_device_seconds_total": ("device",),
        "dinov3_arena_bytes": ("state",),
        "dinov3_frontend_bytes": ("use",),
        "dinov3_device_memory_bytes": ("device", "kind"),
        "dinov3_device_busy_seconds_total": ("device",),
        "dinov3_workers": ("device", "state"),
        "dinov3_worker_restarts_total": ("device",),
        "dinov3_model_info": ("model", "weights", "fingerprint", "dtype", "device"),
        "dinov3_model_load_seconds": ("step",),
        "dinov3_parity_cosine": ("output",),
        "dinov3_tls_expiry_seconds": (),
        "dinov3_reload_failed": ("kind",),
    }


def test_every_metric_reaches_the_page_with_its_type_and_help() -> None:
    aggregate = Aggregate()
    aggregate.update("worker-0", everything().snapshot())
    families = {family.name: family for family in text_string_to_metric_families(aggregate.render().decode())}
    for spec in SPECS:
        family = families.pop(spec.name.removesuffix("_total"))
        assert (family.type, family.documentation) == (spec.kind, spec.help)
        assert family.samples
        assert all(set(sample.labels) - {"le"} == set(spec.labels) for sample in family.samples)
    assert not families


def test_counters_gauges_and_info() -> None:
    metrics = everything()
    metrics.requests.inc("Extract", "OK")
    metrics.queue_images.set(1)
    page = page_of(only=metrics)
    assert page["dinov3_requests_total", (("code", "OK"), ("method", "Extract"))] == 2
    assert page["dinov3_images_total", (("outcome", "ok"),)] == 3
    assert page["dinov3_device_busy_seconds_total", (("device", "cuda:0"),)] == 0.5
    assert page["dinov3_queue_images", ()] == 1
    info = {
        "model": "dinov3_vits16",
        "weights": "random:0",
        "fingerprint": "abc",
        "dtype": "bfloat16",
        "device": "cuda:0",
    }
    assert page["dinov3_model_info", tuple(sorted(info.items()))] == 1


def test_histogram_buckets_are_cumulative_and_include_their_bound() -> None:
    metrics = Metrics()
    for value in (0.0, 0.0005, 0.00051, 0.001, 60.0, 60.1, 1e9):
        metrics.request_seconds.observe(value, "Extract")
    page = page_of(only=metrics)
    counts = [
        page["dinov3_request_seconds_bucket", (("le", f"{bound:g}"), ("method", "Extract"))]
        for bound in SECONDS_BUCKETS
    ]
    assert counts == [2, *[4] * (len(counts) - 2), 5]
    assert page["dinov3_request_seconds_bucket", (("le", "+Inf"), ("method", "Extract"))] == 7
    assert page["dinov3_request_seconds_count", (("method", "Extract"),)] == 7
    assert page["dinov3_request_seconds_sum", (("method", "Extract"),)] == pytest.approx(1e9 + 120.10201)


def test_buckets_reach_from_half_a_millisecond_to_a_minute_and_to_the_largest_batches() -> None:
    buckets = {spec.name: spec.buckets for spec in SPECS if spec.kind == "histogram"}
    assert all(list(bounds) == sorted(set(bounds)) for bounds in buckets.values())
    assert (SECONDS_BUCKETS[0], SECONDS_BUCKETS[-1]) == (0.0005, 60.0)
    assert buckets["dinov3_batch_images"] == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    assert buckets["dinov3_batch_tokens"] == tuple(2**power for power in range(8, 18))


def test_histograms_without_labels_start_at_0() -> None:
    page = page_of(only=Metrics())
    assert page["dinov3_batch_images_count", ()] == 0
    assert page["dinov3_queue_seconds_count", ()] == 0


def test_labels_are_escaped() -> None:
    metrics = Metrics()
    metrics.model_info.set(1, "m", 'a "quoted"\\\n name', "f", "float32", "cpu")
    (key,) = [key for key in page_of(only=metrics) if key[0] == "dinov3_model_info"]
    assert ("weights", 'a "quoted"\\\n name') in key[1]


def test_wrong_number_of_labels() -> None:
    metrics = Metrics()
    with pytest.raises(
        TypeError, match=r"dinov3_requests_total has the labels \('method', 'code'\), got \('Extract',\)"
    ):
        metrics.requests.inc("Extract")
    with pytest.raises(TypeError, match="dinov3_queue_images"):
        metrics.queue_images.set(1, "cpu")
    with pytest.raises(TypeError, match="dinov3_stage_seconds"):
        metrics.stage_seconds.observe(1.0)
    assert not metrics.requests.snapshot()


def test_a_snapshot_is_picklable_small_and_immutable() -> None:
    metrics = everything()
    snapshot = metrics.snapshot()
    data = pickle.dumps(snapshot)
    assert len(data) < 4096
    metrics.batch_images.observe(1)
    metrics.images.inc("ok")
    copy = pickle.loads(data)
    assert isinstance(copy, Snapshot)
    assert copy == snapshot != metrics.snapshot()


class Interrupted(float):
    """A number that, while it is added, lets another thread count 10, unless a lock delays that."""

    thread: threading.Thread

    def __radd__(self, other: float) -> float:
        self.thread.start()
        self.thread.join(0.05)  # times out if there is a lock: the thread then ends later
        return float(self) + other


def test_no_count_is_lost_between_threads() -> None:
    metrics = Metrics()
    metrics.images.inc("ok")
    count, observation = Interrupted(100), Interrupted(100)
    count.thread = threading.Thread(target=lambda: metrics.images.inc("ok", value=10))
    observation.thread = threading.Thread(target=lambda: metrics.batch_images.observe(10))
    metrics.images.inc("ok", value=count)
    metrics.batch_images.observe(observation)
    count.thread.join()
    observation.thread.join()
    page = page_of(only=metrics)
    assert page["dinov3_images_total", (("outcome", "ok"),)] == 111
    assert page["dinov3_batch_images_sum", ()] == 110
    assert page["dinov3_batch_images_count", ()] == 2


def test_instruments_do_not_import_prometheus_client() -> None:
    code = (
        "import sys, dinov3_server.metrics as m; m.Metrics().snapshot(); sys.exit('prometheus_client' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=LIMIT, check=False).returncode == 0


# --- several processes -------------------------------------------------------------------------------------------


def test_living_processes_are_merged() -> None:
    first, second = everything(), everything()
    second.model_load_seconds.set(9.0, "read")
    second.parity_cosine.set(0.5, "cls")
    second.device_busy_seconds.inc("cuda:1", value=0.25)
    page = page_of(first=first, second=second)
    assert page["dinov3_images_total", (("outcome", "ok"),)] == 6
    assert page["dinov3_batch_images_bucket", (("le", "8"),)] == 2
    assert page["dinov3_batch_images_bucket", (("le", "4"),)] == 0
    assert page["dinov3_batch_images_sum", ()] == 16
    assert page["dinov3_queue_images", ()] == 6
    assert page["dinov3_arena_bytes", (("state", "used"),)] == 2 * 2**20
    assert page["dinov3_device_busy_seconds_total", (("device", "cuda:0"),)] == 1.0
    assert page["dinov3_device_busy_seconds_total", (("device", "cuda:1"),)] == 0.25
    assert page["dinov3_model_load_seconds", (("step", "read"),)] == 9.0
    assert page["dinov3_parity_cosine", (("output", "cls"),)] == 0.5
    assert [value for (name, _), value in page.items() if name == "dinov3_model_info"] == [1]


def cumulative(page: Samples) -> Samples:
    """Return the samples that may never decrease."""
    return {key: value for key, value in page.items() if re.search("_(total|bucket|count|sum)$", key[0])}


def test_the_counters_of_a_dead_process_are_kept_and_its_gauges_dropped() -> None:
    aggregate = Aggregate()
    aggregate.update("worker-0", everything().snapshot())
    before = parsed(aggregate.render())
    aggregate.retire("worker-0")
    after = parsed(aggregate.render())
    assert after == cumulative(before)
    assert len(after) < len(before)
    aggregate.retire("worker-0")  # already dead, or never alive
    aggregate.retire("worker-7")
    assert parsed(aggregate.render()) == after


@pytest.mark.parametrize("retired", [True, False])
def test_a_restarted_process_adds_to_its_predecessor(retired: bool) -> None:
    aggregate = Aggregate()
    key = "dinov3_images_total", (("outcome", "ok"),)
    expected = 0
    for _ in range(3):
        metrics = Metrics()
        for _ in range(2):
            metrics.images.inc("ok", value=5)
            metrics.queue_images.set(2)
            aggregate.update("worker-0", metrics.snapshot())
            expected += 5
            page = parsed(aggregate.render())
            assert page[key] == expected
            assert page["dinov3_queue_images", ()] == 2
        if retired:
            aggregate.retire("worker-0")
            assert parsed(aggregate.render())[key] == expected


@pytest.mark.parametrize("successor", [True, False])
def test_a_late_snapshot_of_a_dead_process_is_not_counted_twice(successor: bool) -> None:
    aggregate = Aggregate()
    dead = everything()
    aggregate.update("worker-0", dead.snapshot())
    aggregate.retire("worker-0")
    if successor:
        aggregate.update("worker-0", everything().snapshot())
    before = parsed(aggregate.render())
    dead.images.inc("ok")
    aggregate.update("worker-0", dead.snapshot())
    assert parsed(aggregate.render()) == before


# --- series that begin at 0 ---------------------------------------------------------------------------------------


def test_the_page_begins_with_every_counter_and_histogram_at_0() -> None:
    page = parsed(Aggregate().render())
    assert set(page.values()) == {0}
    names = {re.sub("_(bucket|sum|count)$", "", name) for name, _ in page}
    at_run_time = {spec.name for spec in SPECS if spec.kind == "counter" and "device" in spec.labels}
    assert names == {spec.name for spec in SPECS if spec.kind != "gauge"} - at_run_time


def test_every_value_of_a_label_in_the_code_begins_at_0() -> None:
    statuses = {each.status for each in ServingError.__subclasses__()} | {"OK", "CANCELLED", "UNKNOWN"}
    assert set(CODES) == statuses
    assert set(METHODS) == set(interceptors._LABELS.values())
    assert set(OUTCOMES) >= {"ok", *extraction._OUTCOMES.values()}
    sources = "".join(path.read_text() for path in (ROOT / "server").rglob("*.py"))
    reasons = {*re.findall(r'reason="(\w+)"', sources), *re.findall(r'\("(\w+)", "[\w\' ]+ holds?"', sources)}
    quotas = {f"{use}_bytes" for use in ("messages", "pictures", "answers")}
    assert reasons | quotas | {"unavailable"} == set(OVERLOADED + UNAVAILABLE)
    for name, known in [("images", OUTCOMES), ("stage_seconds", STAGES)]:
        used = set(re.findall(rf'_metrics\.{name}\.(?:inc|observe)\([^)]*"(\w+)"', sources))
        assert used
        assert used <= set(known)


# --- checked by Prometheus' own tool ------------------------------------------------------------------------------

promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def run_promtool(*arguments: str, page: bytes = b"") -> None:
    done = subprocess.run(["promtool", *arguments], input=page, capture_output=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stderr) == (0, b""), done.stdout + done.stderr


@promtool
def test_promtool_accepts_the_page() -> None:
    aggregate = Aggregate()
    aggregate.update("worker-0", everything().snapshot())
    run_promtool("check", "metrics", page=aggregate.render())


@promtool
def test_promtool_accepts_the_scrape_configuration() -> None:
    run_promtool("check", "config", str(ROOT / "deploy/prometheus.yml"))


def documented_queries() -> list[str]:
    blocks = re.findall(r"```promql\n(.*?)```", (ROOT / "docs/metrics.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_documented_queries_name_metrics_that_exist() -> None:
    page = {name for name, _ in page_of(only=everything())}
    queries = documented_queries()
    assert len(queries) > 5
    for query in queries:
        names = set(re.findall(r"\bdinov3_\w+", query))
        assert names
        assert names <= page


@promtool
def test_promtool_accepts_the_documented_queries(tmp_path: Path) -> None:
    rules = "".join(f"  - record: q:{n}\n    expr: '{query}'\n" for n, query in enumerate(documented_queries()))
    path = tmp_path / "rules.yml"
    path.write_text("groups:\n- name: documented\n  rules:\n" + rules)
    run_promtool("check", "rules", str(path))

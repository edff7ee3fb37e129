"""The dashboard and the alert rules use metrics that the server has."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dinov3_server.metrics import SPECS
from tests.deploy.files import DEPLOY, ROOT, compose, dashboard, rules, yaml_documents
from tests.support.waiting import LIMIT

# Labels that Prometheus itself adds to every series; on Kubernetes the namespace, too.
SCRAPED = {"job", "instance", "namespace"}
SAMPLES = {
    spec.name + suffix: {*spec.labels, *SCRAPED, *(["le"] if suffix == "_bucket" else [])}
    for spec in SPECS
    for suffix in (("_bucket", "_sum", "_count") if spec.kind == "histogram" else ("",))
}
SOURCES = "".join(path.read_text() for path in (ROOT / "server").rglob("*.py"))


def targets() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel, target


def variable_queries() -> Iterator[str]:
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            query = variable["query"]["query"]
            metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", query).groups()  # type: ignore[union-attr]
            yield f"count by ({label}) ({metric})"


def queries() -> list[str]:
    return [*(target["expr"] for _, target in targets()), *variable_queries(), *(rule["expr"] for rule in rules())]


@pytest.mark.parametrize("query", queries())
def test_query_names_metrics_labels_and_values_that_exist(query: str) -> None:
    names = re.findall(r"\b(dinov3_\w+|up)\b(?:\{(.*?)\})?", query)
    assert names
    known = set(SCRAPED)
    for name, selector in names:
        labels = SCRAPED if name == "up" else SAMPLES[name]
        known |= labels
        for label, value in re.findall(r'(\w+)=~?"([^"]*)"', selector):
            assert label in labels, name
            if label not in SCRAPED and value != "random:.*":
                assert all(f'"{each}"' in SOURCES for each in value.split("|")), f"{label} is never {value}"
    for grouped in re.findall(r"\b(?:by|on) \((.*?)\)", query):
        assert set(grouped.split(", ")) <= known


@pytest.mark.parametrize(
    ("query", "text"),
    [
        *((target["expr"], target["legendFormat"]) for _, target in targets()),
        *((rule["expr"], str(rule["annotations"])) for rule in rules()),
    ],
)
def test_legend_and_annotation_name_labels_that_the_result_has(query: str, text: str) -> None:
    grouped = re.search(r"\b(?:sum|avg|count)(?: by \((.*?)\))? \(?", query)
    if grouped is None:
        has = SCRAPED | SAMPLES.get(re.search(r"\b(dinov3_\w+|up)\b", query)[1], SCRAPED)  # type: ignore[index]
    else:
        has = set((grouped[1] or "").split(", ")) - {"le"}
    used = set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)", text)) - {"le"}
    assert used <= has


def test_every_metric_is_on_the_dashboard() -> None:
    shown = " ".join(target["expr"] for _, target in targets())
    assert [spec.name for spec in SPECS if not re.search(rf"\b{spec.name}(_bucket|_sum|_count)?\b", shown)] == []


def test_dashboard_holds_together() -> None:
    board = dashboard()
    variables = {variable["name"] for variable in board["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$\{?(\w+)", " ".join(target["expr"] for _, target in targets()))) <= variables
    assert all(target["datasource"]["uid"] == "${datasource}" for _, target in targets())

    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_prometheus_scrapes_the_job_that_rules_ask_for() -> None:
    for name in ("prometheus.yml", "prometheus.compose.yml"):
        (config,) = yaml_documents(name)
        assert config["rule_files"] == ["alerts.yml"]
        assert [scrape["job_name"] for scrape in config["scrape_configs"]] == ["dinov3"]
    assert {job for rule in rules() for job in re.findall(r'job="(.*?)"', rule["expr"])} == {"dinov3"}


def test_prometheus_of_compose_finds_the_server() -> None:
    (config,) = yaml_documents("prometheus.compose.yml")
    ((sd,),) = (scrape["dns_sd_configs"] for scrape in config["scrape_configs"])
    (service,) = sd["names"]
    published = [port.split(":")[-1] for port in compose()["services"][service]["ports"]]
    assert str(sd["port"]) in published
    mounted = [volume.split(":")[0] for volume in compose()["services"]["prometheus"]["volumes"]]
    assert [name for name in mounted if name.startswith("./")] == ["./prometheus.compose.yml", "./alerts.yml"]


# --- checks by promtool ------------------------------------------------------------------------------

promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def run_promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_promtool_accepts_configuration_and_rules() -> None:
    run_promtool("check", "config", str(DEPLOY / "prometheus.yml"))
    run_promtool("check", "config", str(DEPLOY / "prometheus.compose.yml"))
    run_promtool("check", "rules", str(DEPLOY / "alerts.yml"))


@promtool
def test_alerts_fire_when_they_should_and_not_before() -> None:
    tests = Path(__file__).with_name("alerts_test.yml")
    cases = [case for test in yaml.safe_load(tests.read_text())["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == {rule["alert"] for rule in rules()}
    run_promtool("test", "rules", str(tests))


@promtool
def test_promtool_parses_every_query_of_the_dashboard(tmp_path: Path) -> None:
    recorded = [
        {"record": f"panel:{index}", "expr": re.sub(r"\$__rate_interval", "1m", query)}
        for index, query in enumerate(queries())
    ]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    run_promtool("check", "rules", str(path))

"""The base and the overlays for Kubernetes agree with the server, the image and each other."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from dinov3_server.config.settings import Settings
from dinov3_server.config.types import size
from dinov3_server.metrics import SPECS
from dinov3_server.processes import supervisor
from tests.deploy.files import (
    DEPLOY,
    dockerfile_env,
    kubernetes,
    kubernetes_environment,
    rules,
    server_container,
    settings_of,
    yaml_documents,
)

DEPLOYMENT = kubernetes("Deployment")
TEMPLATE = DEPLOYMENT["spec"]["template"]
POD = TEMPLATE["spec"]
(CONTAINER,) = POD["containers"]
(PREPARE,) = POD["initContainers"]
LABELS = {"app.kubernetes.io/name": "dinov3-serving"}
HARDWARE = ("cpu", "gpu")
AUTOSCALED = ("gpu-autoscaled", "gpu-autoscaled-hpa")
# Memory of a worker in the container: a model on the CPU, or CUDA's own beside a model on the GPU.
WORKER_BYTES = {"cpu": 1 << 30, "gpu": 4 << 30}

overlay = pytest.mark.parametrize("overlay", HARDWARE)


def document(path: str) -> dict[str, Any]:
    (found,) = yaml_documents(f"kubernetes/{path}")
    return found


def settings(overlay: str) -> Settings:
    return settings_of(kubernetes_environment(overlay))


# --- settings and sizes ------------------------------------------------------------------------------------------


@overlay
def test_environment_is_settings(overlay: str) -> None:
    found = settings(overlay)
    assert (found.weights, found.offline) == ("auto", True)
    assert found.cache_dir == dockerfile_env()["DINOV3_CACHE_DIR"]
    assert found.max_connection_age_seconds > 0
    assert found.drain_seconds + supervisor.DRAIN_SLACK < POD["terminationGracePeriodSeconds"]


@overlay
def test_memory_limit_holds_arenas_and_processes(overlay: str) -> None:
    found, resources = settings(overlay), server_container(overlay)["resources"]
    limit = size(1, 2**50).parse(resources["limits"]["memory"] + "B")
    assert found.frontends, "the automatic choice depends on the node"
    # The formula of docs/deployment.md, Memory.
    frontend = found.arena_bytes + found.frontend_bytes + 2 * found.max_message_bytes + (192 << 20)
    assert found.frontends * frontend + (64 << 20) + WORKER_BYTES[overlay] <= limit
    assert resources["requests"] == resources["limits"]
    assert found.frontends * found.decode_threads == int(resources["limits"]["cpu"])


def test_a_gpu_for_each_replica() -> None:
    assert server_container("gpu")["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in server_container("cpu")["resources"]["limits"]


# --- roll-outs and disruptions -----------------------------------------------------------------------------------


def test_a_roll_out_needs_no_more_than_the_deployment_has() -> None:
    assert DEPLOYMENT["spec"]["replicas"] >= 2  # one serves while the other is replaced
    assert DEPLOYMENT["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    startup = POD["containers"][0]["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] < DEPLOYMENT["spec"]["progressDeadlineSeconds"]


def test_no_volume_is_attached_to_one_node() -> None:
    claims = [
        found
        for path in (DEPLOY / "kubernetes").rglob("*.yaml")
        for found in yaml.safe_load_all(path.read_text())
        if found and found.get("kind") == "PersistentVolumeClaim"
    ]
    assert [claim["spec"]["accessModes"] for claim in claims] == [["ReadWriteMany"]]
    (volume,) = (each for each in POD["volumes"] if each["name"] == "cache")
    assert set(volume["emptyDir"]) == {"sizeLimit"}
    (patch,) = document("components/shared-cache/kustomization.yaml")["patches"]
    (shared,) = yaml.safe_load(patch["patch"])["spec"]["template"]["spec"]["volumes"]
    assert shared == {
        "name": "cache",
        "emptyDir": None,
        "persistentVolumeClaim": {"claimName": claims[0]["metadata"]["name"]},
    }


def test_spread_and_budget_never_block() -> None:
    for constraint in POD["topologySpreadConstraints"]:
        assert constraint["whenUnsatisfiable"] == "ScheduleAnyway"
        assert constraint["labelSelector"]["matchLabels"] == LABELS
    budget = kubernetes("PodDisruptionBudget")["spec"]
    assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")


# --- addresses ---------------------------------------------------------------------------------------------------


def test_ports_are_the_servers() -> None:
    ports = {"grpc": Settings().port, "http": Settings().http_port}
    assert {each["name"]: each["containerPort"] for each in CONTAINER["ports"]} == ports
    assert {each["targetPort"]: each["port"] for each in kubernetes("Service")["spec"]["ports"]} == ports
    assert TEMPLATE["metadata"]["annotations"]["prometheus.io/port"] == str(Settings().http_port)
    policy = kubernetes("NetworkPolicy")["spec"]
    assert [port["port"] for rule in policy["ingress"] for port in rule["ports"]] == list(ports)
    monitor = document("components/pod-monitor/pod-monitor.yaml")["spec"]
    assert [each["port"] for each in monitor["podMetricsEndpoints"]] == ["http"]


def test_probes() -> None:
    assert CONTAINER["startupProbe"]["grpc"] == CONTAINER["readinessProbe"]["grpc"] == {"port": Settings().port}
    assert CONTAINER["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}


def test_everything_selects_the_pods() -> None:
    (labels,) = kubernetes("Kustomization")["labels"]
    assert labels == {"pairs": LABELS, "includeTemplates": True}
    assert kubernetes("Service")["spec"]["clusterIP"] == "None"
    selectors = [
        kubernetes("Service")["spec"]["selector"],
        DEPLOYMENT["spec"]["selector"]["matchLabels"],
        kubernetes("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        kubernetes("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        document("components/pod-monitor/pod-monitor.yaml")["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector == LABELS for selector in selectors)


# --- files, rights, images ---------------------------------------------------------------------------------------


def test_files_that_settings_name_are_mounted() -> None:
    mounts = {each["name"]: each for each in CONTAINER["volumeMounts"]}
    assert set(mounts) == {each["name"] for each in POD["volumes"]}
    assert mounts["token"]["readOnly"]
    assert kubernetes_environment("cpu")["DINOV3_TOKEN_FILE"].startswith(mounts["token"]["mountPath"] + "/")
    assert mounts["cache"]["mountPath"] == dockerfile_env()["DINOV3_CACHE_DIR"]


def test_the_init_container_fetches_what_the_server_then_finds() -> None:
    assert PREPARE["args"] == ["prepare"]
    assert PREPARE["envFrom"][0] == CONTAINER["envFrom"][0]
    assert PREPARE["volumeMounts"] == [each for each in CONTAINER["volumeMounts"] if each["name"] == "cache"]
    # Only the init container has the secret for the download.
    assert [each["secretRef"]["optional"] for each in PREPARE["envFrom"] if "secretRef" in each] == [True]


def test_containers_have_no_rights_that_they_do_not_need() -> None:
    assert POD["securityContext"]["runAsNonRoot"]
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert POD["automountServiceAccountToken"] is False
    assert (
        PREPARE["securityContext"]
        == CONTAINER["securityContext"]
        == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    )


@overlay
def test_the_image_is_named_in_one_place(overlay: str) -> None:
    (image,) = document(f"overlays/{overlay}/kustomization.yaml")["images"]
    assert image["name"] == CONTAINER["image"] == PREPARE["image"]
    assert "image:" not in (DEPLOY / f"kubernetes/overlays/{overlay}/resources.yaml").read_text()
    assert all("images" not in document(f"overlays/{each}/kustomization.yaml") for each in AUTOSCALED)


# --- autoscaling -------------------------------------------------------------------------------------------------


def test_both_autoscalers_have_the_same_limits() -> None:
    keda = document("overlays/gpu-autoscaled/scaled-object.yaml")["spec"]
    hpa = document("overlays/gpu-autoscaled-hpa/horizontal-pod-autoscaler.yaml")["spec"]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
    assert keda["minReplicaCount"] == keda["fallback"]["replicas"] == DEPLOYMENT["spec"]["replicas"]
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    assert [float(trigger["metadata"]["threshold"]) for trigger in keda["triggers"]] == [
        float(metric["pods"]["target"]["averageValue"].removesuffix("m")) / 1000 for metric in hpa["metrics"]
    ]
    assert keda["scaleTargetRef"]["name"] == hpa["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"]


def test_queries_ask_for_metrics_and_labels_that_exist() -> None:
    namespace = document("overlays/gpu-autoscaled/kustomization.yaml")["namespace"]
    assert {document(f"overlays/{each}/kustomization.yaml")["namespace"] for each in (*HARDWARE, *AUTOSCALED)} == {
        namespace
    }
    (endpoint,) = document("components/pod-monitor/pod-monitor.yaml")["spec"]["podMetricsEndpoints"]
    job = endpoint["relabelings"][0]["replacement"]
    assert any(f'job="{job}"' in rule["expr"] for rule in rules())
    names = {spec.name for spec in SPECS}
    for trigger in document("overlays/gpu-autoscaled/scaled-object.yaml")["spec"]["triggers"]:
        query = trigger["metadata"]["query"]
        selector = f'{{job="{job}",namespace="{namespace}"}}'
        assert query.count("dinov3_") == query.count(selector)
        assert {part.split("(")[-1] for part in query.split(selector)[:-1]} <= names
        assert trigger["metadata"]["ignoreNullValues"] == "false"  # no data is a failure, not a load of 0


def test_the_adapter_makes_the_metrics_of_the_autoscaler() -> None:
    custom = document("overlays/gpu-autoscaled-hpa/prometheus-adapter.yaml")["rules"]["custom"]
    hpa = document("overlays/gpu-autoscaled-hpa/horizontal-pod-autoscaler.yaml")["spec"]
    assert [rule["name"]["as"] for rule in custom] == [metric["pods"]["metric"]["name"] for metric in hpa["metrics"]]
    names = {spec.name for spec in SPECS}
    for rule in custom:
        queried = rule["metricsQuery"].replace("{", "(").split("(")
        assert {part for part in queried if part.startswith("dinov3_")} <= names
        assert rule["seriesQuery"].split("{")[0] in names

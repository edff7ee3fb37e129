"""`kubectl kustomize` renders every overlay, and the result fits the schemas of Kubernetes and of the CRDs.

The CRDs are not in this repository. KUBERNETES_CRDS is a folder with those of KEDA (its config/crd/bases) and of the
Prometheus operator (its example/prometheus-operator-crd).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.files import DEPLOY, server_container

HARDWARE = {"cpu": "cpu", "gpu": "gpu", "gpu-autoscaled": "gpu", "gpu-autoscaled-hpa": "gpu"}  # by overlay
BASE = ["ConfigMap", "Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service"]
KINDS = {
    "cpu": BASE,
    "gpu": BASE,
    "gpu-autoscaled": [*BASE, "PodMonitor", "ScaledObject"],
    "gpu-autoscaled-hpa": [*BASE, "HorizontalPodAutoscaler", "PodMonitor"],
}
OLDEST_KUBERNETES = "1.27"

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
overlay = pytest.mark.parametrize("overlay", KINDS)


def render(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the documents of a kustomization by kind. It may not give a warning."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    documents = list(yaml.safe_load_all(done.stdout))
    found = {each["kind"]: each for each in documents}
    assert len(found) == len(documents)
    return found


def overlay_of(tmp_path: Path, **fields: object) -> dict[str, dict[str, Any]]:
    """Render a user's own kustomization on top of a copy of ours."""
    shutil.copytree(DEPLOY / "kubernetes", tmp_path / "kubernetes")
    own = tmp_path / "own"
    own.mkdir()
    (own / "kustomization.yaml").write_text(yaml.safe_dump(fields))
    return render(own)


@overlay
def test_overlay_renders(overlay: str) -> None:
    found = render(DEPLOY / "kubernetes/overlays" / overlay)
    assert sorted(found) == sorted(KINDS[overlay])
    assert {each["metadata"]["namespace"] for each in found.values()} == {"dinov3"}
    spec = found["Deployment"]["spec"]
    (server,), (prepare,) = spec["template"]["spec"]["containers"], spec["template"]["spec"]["initContainers"]
    expected = server_container(HARDWARE[overlay])
    assert server["resources"] == expected["resources"]
    assert {each["name"]: each["value"] for each in server["env"]} == {
        each["name"]: each["value"] for each in expected["env"]
    }
    assert server["image"] == prepare["image"]
    assert server["image"].startswith("registry.example.org/dinov3-serving:")
    assert server["envFrom"][0]["configMapRef"]["name"] == found["ConfigMap"]["metadata"]["name"]
    assert ("replicas" in spec) != ("autoscaled" in overlay)


def test_a_digest_and_a_setting_in_an_overlay_of_ones_own(tmp_path: Path) -> None:
    digest = f"sha256:{'0' * 64}"
    found = overlay_of(
        tmp_path,
        resources=["../kubernetes/overlays/gpu"],
        components=["../kubernetes/components/shared-cache", "../kubernetes/components/pod-monitor"],
        images=[
            {"name": "registry.example.org/dinov3-serving", "newName": "mine.example.org/dinov3", "digest": digest}
        ],
        configMapGenerator=[{"name": "dinov3", "behavior": "merge", "literals": ["DINOV3_MODEL=vitl16"]}],
        namespace="training",
    )
    pod = found["Deployment"]["spec"]["template"]["spec"]
    images = {each["image"] for each in (*pod["containers"], *pod["initContainers"])}
    assert {image.rpartition("@")[2] for image in images} == {digest}
    assert {image.split("@")[0].split(":")[0] for image in images} == {"mine.example.org/dinov3"}
    assert found["ConfigMap"]["data"] == {"DINOV3_MODEL": "vitl16", "DINOV3_LOG_FORMAT": "json"}
    assert pod["volumes"][0] == {"name": "cache", "persistentVolumeClaim": {"claimName": "dinov3-cache"}}
    assert {each["metadata"]["namespace"] for each in found.values()} == {"training"}


@overlay
@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, None])
def test_schemas_of_kubernetes(overlay: str, version: str | None) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    checked = []
    for each in render(DEPLOY / "kubernetes/overlays" / overlay).values():
        if each["kind"] not in ("PodMonitor", "ScaledObject"):
            kubernetes_validate.validate(each, version or kubernetes_validate.latest_version(), strict=True)
            checked.append(each["kind"])
    assert set(BASE) <= set(checked)


def crd_schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the JSON schemas in KUBERNETES_CRDS by apiVersion and kind; a field that they do not name is an error."""
    schemas = {}
    for path in Path(os.environ["KUBERNETES_CRDS"]).rglob("*.yaml"):
        for crd in yaml.safe_load_all(path.read_text()):
            if crd and crd["kind"] == "CustomResourceDefinition":
                for version in crd["spec"]["versions"]:
                    key = f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]
                    schemas[key] = _closed(version["schema"]["openAPIV3Schema"])
    return schemas


def _closed(schema: Any, root: bool = True) -> Any:
    if isinstance(schema, list):
        return [_closed(each, root=False) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value, root=False) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in closed:
        closed.setdefault("additionalProperties", False)
        if root:
            closed["properties"]["metadata"] = {}
    return closed


@pytest.mark.skipif("KUBERNETES_CRDS" not in os.environ, reason="KUBERNETES_CRDS is not set")
@pytest.mark.parametrize("overlay", ["gpu-autoscaled", "gpu-autoscaled-hpa"])
def test_schemas_of_the_crds(overlay: str) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schemas = crd_schemas()
    found = render(DEPLOY / "kubernetes/overlays" / overlay)
    for kind in set(found) & {"PodMonitor", "ScaledObject"}:
        validator = jsonschema.Draft202012Validator(schemas[found[kind]["apiVersion"], kind])
        assert [error.message for error in validator.iter_errors(found[kind])] == []
        found[kind]["spec"]["nonsense"] = 1
        assert [error.message for error in validator.iter_errors(found[kind])]

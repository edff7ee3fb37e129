"""Read the files of deploy/ and the Dockerfile."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from dinov3_server.config.load import load
from dinov3_server.config.settings import Settings
from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"


def yaml_documents(name: str, uncomment: str = "") -> list[dict[str, Any]]:
    """Return the documents of `deploy/NAME`, with the comments that match `uncomment` turned into content."""
    text = (DEPLOY / name).read_text()
    if uncomment:
        text, found = re.subn(rf"^( *)# ({uncomment})", r"\1\2", text, flags=re.MULTILINE)
        assert found, f"{name} has no comment {uncomment!r}"
    return [document for document in yaml.safe_load_all(text) if document]


def kubernetes(kind: str) -> dict[str, Any]:
    """Return the base's document of `kind`."""
    names = (f"kubernetes/base/{path.name}" for path in (DEPLOY / "kubernetes/base").glob("*.yaml"))
    (found,) = (each for name in names for each in yaml_documents(name) if each["kind"] == kind)
    return found


def server_container(overlay: str) -> dict[str, Any]:
    """Return the server's container of the Deployment as the patch of `overlay` (cpu or gpu) completes it."""
    (patch,) = yaml_documents(f"kubernetes/overlays/{overlay}/resources.yaml")
    (base,), (patched,) = (
        document["spec"]["template"]["spec"]["containers"] for document in (kubernetes("Deployment"), patch)
    )
    assert base["name"] == patched["name"]
    return {**base, **patched, "env": base["env"] + patched["env"]}


def kubernetes_environment(overlay: str) -> dict[str, str]:
    """Return the server's environment in `overlay`: the ConfigMap's and its own."""
    (generated,) = kubernetes("Kustomization")["configMapGenerator"]
    container = server_container(overlay)
    assert container["envFrom"] == [{"configMapRef": {"name": generated["name"]}}]
    shared = dict(literal.split("=", 1) for literal in generated["literals"])
    return shared | {each["name"]: each["value"] for each in container["env"]}


def compose(uncomment: str = "") -> dict[str, Any]:
    (found,) = yaml_documents("compose.yaml", uncomment)
    return found


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    return found


def rules() -> list[dict[str, Any]]:
    (document,) = yaml_documents("alerts.yml")
    return [rule for group in document["groups"] for rule in group["rules"]]


def dockerfile() -> list[tuple[str, str]]:
    """Return the instructions in order, as (name, rest), with continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def dockerfile_env() -> dict[str, str]:
    pairs = (pair.partition("=") for name, rest in dockerfile() if name == "ENV" for pair in rest.split())
    return {name: value for name, _, value in pairs}


def settings_of(environment: dict[str, str]) -> Settings:
    """Return the settings as the server in the image reads them, without its files, which are mounted only there."""
    ours = {name: value for name, value in dockerfile_env().items() if name.startswith("DINOV3_")} | environment
    here = {name: __file__ for name in ours if name.endswith("_FILE")}
    return load({}, ours | here)[0]

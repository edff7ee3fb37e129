"""Read the files of deploy/ and the Dockerfile."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"


def yaml_documents(name: str, uncomment: str = "") -> list[dict[str, Any]]:
    """Return the documents of `deploy/NAME`, with the comments that match `uncomment` turned into content."""
    text = (DEPLOY / name).read_text()
    if uncomment:
        text, found = re.subn(rf"^( *)# ({uncomment})", r"\1\2", text, flags=re.MULTILINE)
        assert found, f"{name} has no comment {uncomment!r}"
    return [document for document in yaml.safe_load_all(text) if document]


def kubernetes(kind: str, uncomment: str = "") -> dict[str, Any]:
    (found,) = (each for each in yaml_documents("kubernetes.yaml", uncomment) if each["kind"] == kind)
    return found


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

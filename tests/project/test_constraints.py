"""Environments that are compared with one another hold the same packages."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT

CONSTRAINTS = ROOT / "constraints"


def pins(name: str) -> dict[str, str]:
    lines = (CONSTRAINTS / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("package", ["torch", "transformers", "safetensors", "grpcio"])
def test_the_baseline_pytriton_has_the_same_versions_as_this_server(package: str) -> None:
    assert pins("pytriton.txt")[package] == pins("dev.txt")[package]


# --- constraints/image: what the Dockerfile installs ------------------------------------------------------------------


def locked(name: str) -> dict[str, str]:
    """Return the versions in a file of constraints/image; every requirement must have a hash."""
    text = re.sub(r"\\\n", "", (CONSTRAINTS / "image" / f"{name}.txt").read_text())
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    assert all(
        hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes) for _, *hashes in lines
    )
    versions = dict(line[0].split("==") for line in lines)
    assert len(versions) == len(lines)
    return {canonicalize_name(package): version for package, version in versions.items()}


def needed(requirements: Iterable[str], extra: str = "") -> set[str]:
    """Return the packages that `requirements` name, with all that those need as installed; torch is left out."""
    found: set[str] = set()
    waiting = [(each, extra) for each in requirements]
    seen = set()
    while waiting:
        requirement, extra = Requirement(waiting[-1][0]), waiting.pop()[1]
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for own in ("", *requirement.extras):
            if name not in ("torch", "dinov3-serving") and (name, own) not in seen:
                seen.add((name, own))
                found.add(name)
                waiting += [(each, own) for each in requires(name) or ()]
    return found


def test_the_image_has_everything_that_the_server_needs_in_the_tested_versions() -> None:
    server = locked("server")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["server"]]
    assert set(server) == needed(wanted), "make lock"
    tested = {canonicalize_name(package): version for package, version in pins("dev.txt").items()}
    assert {package: tested[package] for package in server} == server, "make lock"


@pytest.mark.parametrize("name", ["torch-cpu", "torch-cuda"])
def test_the_image_has_everything_that_torch_needs(name: str) -> None:
    torch, server = locked(name), locked("server")
    assert set(torch) >= needed(requires("torch") or ())
    assert all(server.get(package, version) == version for package, version in torch.items())


def test_the_image_for_the_cpu_has_the_tested_torch() -> None:
    assert locked("torch-cpu")["torch"] == pins("dev.txt")["torch"] + "+cpu"
    assert any(package.startswith("nvidia-") for package in locked("torch-cuda"))
    assert not any(package.startswith("nvidia-") for package in locked("torch-cpu"))


def test_the_image_is_built_with_the_pinned_tools() -> None:
    wanted = (CONSTRAINTS / "image/tools.in").read_text().splitlines()
    tools = locked("tools")
    assert {line for line in wanted if not line.startswith("#")} <= set(tools)
    assert tools["hatchling"] == pins("dev.txt")["hatchling"]

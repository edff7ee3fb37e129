"""Environments that are compared with one another hold the same packages."""

from __future__ import annotations

import pytest

from tests.support.paths import ROOT

CONSTRAINTS = ROOT / "constraints"


def pins(name: str) -> dict[str, str]:
    lines = (CONSTRAINTS / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("package", ["torch", "transformers", "safetensors", "grpcio"])
def test_the_baseline_pytriton_has_the_same_versions_as_this_server(package: str) -> None:
    assert pins("pytriton.txt")[package] == pins("dev.txt")[package]

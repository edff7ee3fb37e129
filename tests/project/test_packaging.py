"""Promises about the package and the front door that no other test would notice broken."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from tests.support.paths import ROOT, tracked

PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = PYPROJECT["project"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_license_is_apache_2() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text


def test_image_build_has_the_files_that_the_metadata_names() -> None:
    needed = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}
    (copied,) = re.findall(r"^COPY (pyproject\.toml .*) \./$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert set(copied.split()) == needed


def test_metadata_has_no_placeholders() -> None:
    assert PROJECT["authors"] == [{"name": "The dinov3-serving authors"}]
    for url in PROJECT.get("urls", {}).values():
        assert not re.search(r"example\.(com|org)|localhost|your|todo", url, re.IGNORECASE), url


def test_sdist_holds_the_whole_checkout() -> None:
    include = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert set(include) == {"/" + name.split("/")[0] for name in tracked()}


def test_plain_pytest_runs_in_one_process() -> None:
    """So that `pytest tests/x.py --pdb` works. `make test` runs in parallel."""
    assert "-n" not in PYPROJECT["tool"]["pytest"]["ini_options"]["addopts"].split()
    assert "pytest -n auto" in MAKEFILE


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\btests/[\w./]*\w", MAKEFILE))))
def test_makefile_names_tests_that_exist(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w.-]+(?:/[\w.-]+)+/?)`", CONTRIBUTING))))
def test_contributing_names_files_that_exist(path: str) -> None:
    if path != "build/site":  # `make docs` writes it.
        assert (ROOT / path).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:`|^)make ([a-z-]+)", CONTRIBUTING, re.MULTILINE))))
def test_contributing_names_targets_that_exist(target: str) -> None:
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)


def test_hosted_ci_runs_the_script_that_a_change_must_pass() -> None:
    assert re.search(r"^ +- run: \.ci/run$", (ROOT / ".github/workflows/ci.yml").read_text(), re.MULTILINE)

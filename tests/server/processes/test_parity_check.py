"""The parity check on /metrics, in GetModel and in the log, and its arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.server import Server
from tests.support.waiting import until


def test_a_passed_check_is_in_the_metrics_the_model_and_the_log() -> None:
    with Server(TEST_RUNNER="tests.server.processes.scripted_runners:proven") as server, server.client() as client:
        until(lambda: server.metric("dinov3_parity_cosine", output="cls"))
        assert server.metric("dinov3_parity_cosine", output="cls") == 0.999
        assert server.metric("dinov3_parity_cosine", output="patches") == 0.998
        parity_check = client.model().parity_check
        assert parity_check.verified
        assert [proof.output for proof in parity_check.outputs] == ["cls", "cls", "patches"]
    [line] = [line for line in server.log if "parity check: " in line]
    assert "INFO" in line
    assert "verified against Meta's code at 6876159a on " in line
    assert "cls in float32: cosine 0.999000, relative error 1.0e-03" in line


def test_a_missing_check_is_a_warning() -> None:
    with Server() as server, server.client() as client:
        assert not client.model().parity_check.verified
        assert "dinov3_parity_cosine{" not in server.get("/metrics")[1]
    [line] = [line for line in server.log if "parity check: " in line]
    assert "WARNING" in line
    assert "NOT VERIFIED: no comparison was run" in line


@pytest.mark.parametrize(("flags", "kept"), [((), True), (("--parity-check", "false"), False)])
def test_the_arguments_of_the_runner(tmp_path: Path, flags: tuple[str, ...], kept: bool) -> None:
    report = tmp_path / "arguments"
    with Server(
        "--cache-dir",
        str(tmp_path),
        "--dataset",
        "lvd1689m",
        *flags,
        TEST_RUNNER="tests.server.processes.scripted_runners:reports",
        TEST_REPORT=str(report),
    ):
        pass
    arguments = dict(line.split(" = ") for line in report.read_text().splitlines())
    assert arguments["parity_folder"] == repr(str(tmp_path / "parity") if kept else None)
    assert (arguments["dataset"], arguments["backbone"], arguments["weights"]) == (
        "'lvd1689m'",
        "'native'",
        "'random:0'",
    )
    assert arguments["provisioned"].startswith("Provisioned(weights='random:0'")

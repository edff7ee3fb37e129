"""`make integrations` reports what ran, what failed and what was skipped, and why."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bench.environment import EnvironmentMissing
from tests.integrations import examples
from tests.integrations.driver import Outcome, exit_code, run_all, show
from tests.integrations.examples import Command, Example, Failed, Inputs, Skipped
from tests.support.paths import ROOT
from tests.support.waiting import until

CHECK_TARGET = "import os; assert os.environ['DINOV3_TARGET'] == '127.0.0.1:1'; print('features')"


def inputs(folder: Path) -> Inputs:
    return Inputs("127.0.0.1:1", [folder / "photo.jpg"], "shards", folder)


def python_code(code: str) -> Callable[[Inputs], Command]:
    return lambda inputs: [sys.executable, "-c", code]


def raises(error: Exception) -> Callable[[Inputs], Command]:
    def command(inputs: Inputs) -> Command:
        raise error

    return command


def run(
    folder: Path, command: Callable[[Inputs], Command], check: Callable[[Inputs, str], None], seconds: float
) -> Outcome:
    (outcome,) = run_all([Example("one", "file", "page", command, check)], inputs(folder), seconds)
    return outcome


def accept(inputs: Inputs, printed: str) -> None:
    assert printed == "features\n"


def accept_any(inputs: Inputs, printed: str) -> None:
    pass


def refuse(inputs: Inputs, printed: str) -> None:
    raise Failed("cls differs")


@pytest.mark.parametrize(
    ("command", "check", "result", "why"),
    [
        (python_code("print('features')"), accept, "ok", ""),
        (python_code(CHECK_TARGET), accept, "ok", ""),
        (python_code("print('features')"), refuse, "failed", "cls differs"),
        (python_code("raise SystemExit('no such model')"), accept, "failed", "exit code 1: no such model"),
        (python_code("import os; os._exit(3)"), accept, "failed", "exit code 3: it printed nothing"),
        (raises(Skipped("needs node")), accept, "skipped", "needs node"),
        (raises(EnvironmentMissing("pip failed")), accept, "failed", "not installed: pip failed"),
    ],
)  # fmt: skip
def test_outcomes(
    tmp_path: Path,
    command: Callable[[Inputs], Command],
    check: Callable[[Inputs, str], None],
    result: str,
    why: str,
) -> None:
    outcome = run(tmp_path, command, check, 60)
    assert (outcome.result, outcome.why.removesuffix(f" ({tmp_path / 'one.log'})")) == (result, why)


SLEEP = "import time; time.sleep(600)"


def test_an_example_that_does_not_end_fails(tmp_path: Path) -> None:
    outcome = run(tmp_path, python_code(SLEEP), accept, 0)
    assert outcome.result == "failed"
    assert outcome.why.startswith("still running after 0 s")


def test_nothing_that_an_example_started_is_left(tmp_path: Path) -> None:
    child = f"subprocess.Popen([sys.executable, '-c', '{SLEEP}'])"
    run(tmp_path, python_code(f"import subprocess, sys; print({child}.pid)"), accept_any, 60)
    pid = int((tmp_path / "one.out").read_text())
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_the_table_and_the_exit_code() -> None:
    outcomes = [
        Outcome("node", "skipped", 0.0, "needs node and npm"),
        Outcome("ray-data", "ok", 12.34),
    ]
    assert show(outcomes).splitlines() == [
        "example   result   seconds  why",
        "node      skipped      0.0  needs node and npm",
        "ray-data  ok          12.3",
    ]
    assert exit_code(outcomes) == 0
    assert exit_code([*outcomes, Outcome("daft", "failed", 1.0, "exit code 1")]) == 1


def test_without_node_its_example_is_skipped_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = run(tmp_path, examples.node, accept, 60)
    assert (outcome.result, outcome.why) == ("skipped", examples.NODE_MISSING)


def test_an_unknown_example_is_wrong_usage() -> None:
    command = [sys.executable, "-m", "tests.integrations", "nodes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown example: nodes; allowed: node, raw-stubs" in done.stderr

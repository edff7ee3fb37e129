"""Runs examples one after the other, each within a time, and reports them as a table."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bench.environment import EnvironmentMissing
from tests.integrations.examples import Example, Failed, Inputs, Skipped
from tests.support.paths import ROOT

SECONDS = 600.0
"""The most that an example may run, without what it installs."""


@dataclass(frozen=True)
class Outcome:
    name: str
    result: Literal["ok", "failed", "skipped"]
    seconds: float
    why: str = ""


def run_all(examples: Iterable[Example], inputs: Inputs, seconds: float = SECONDS) -> list[Outcome]:
    outcomes = []
    for example in examples:
        outcomes.append(run_one(example, inputs, seconds))
        print(f"{example.name}: {outcomes[-1].result} {outcomes[-1].why}".rstrip(), flush=True)
    return outcomes


def run_one(example: Example, inputs: Inputs, seconds: float) -> Outcome:
    """Run an example. What it writes to stdout and stderr goes to NAME.out and NAME.log in the folder of `inputs`."""
    folder = inputs.out / example.name
    folder.mkdir()
    log = inputs.out / f"{example.name}.log"
    began = time.monotonic()

    def outcome(result: Literal["ok", "failed", "skipped"], why: str = "") -> Outcome:
        return Outcome(example.name, result, time.monotonic() - began, why)

    try:
        command = example.command(replace(inputs, out=folder))
        began = time.monotonic()
        printed = _run(command, inputs.target, log, seconds)
        example.check(inputs, printed)
    except Skipped as error:
        return outcome("skipped", str(error))
    except EnvironmentMissing as error:
        return outcome("failed", f"not installed: {error}")
    except Failed as error:
        return outcome("failed", f"{error} ({log.relative_to(ROOT) if log.is_relative_to(ROOT) else log})")
    return outcome("ok")


def _run(command: Iterable[str | os.PathLike[str]], target: str, log: Path, seconds: float) -> str:
    """Run a command in a session of its own, and return what it printed. Nothing of it is left running."""
    printed = log.with_suffix(".out")
    with printed.open("wb") as stdout, log.open("wb") as stderr:
        process = subprocess.Popen(
            [os.fspath(part) for part in command],
            cwd=ROOT,
            env={**_environment(), "DINOV3_TARGET": target},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"still running after {seconds:.0f} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        lines = log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        raise Failed(f"exit code {code}: {last}")
    return printed.read_text(errors="replace")


def _environment() -> dict[str, str]:
    """Return the environment without what would put other packages in the way of an example's own."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def show(outcomes: Iterable[Outcome]) -> str:
    rows = [("example", "result", "seconds", "why")]
    rows += [(each.name, each.result, f"{each.seconds:.1f}", each.why) for each in outcomes]
    names, results, seconds = (max(len(row[column]) for row in rows) for column in range(3))
    return "\n".join(f"{a:{names}}  {b:{results}}  {c:>{seconds}}  {d}".rstrip() for a, b, c, d in rows)


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """Return 1 if an example failed. One that was skipped did not."""
    return int(any(each.result == "failed" for each in outcomes))

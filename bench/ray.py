"""The rate of a Ray Data job, beside that of plain `Client.extract_many`, from one server that answers instantly.

Both read the same Parquet files of JPEG files (224x224) and get the CLS token of each image, in batches of 32; the
server (bench/instant.py) decodes the files and does not compute. extract_many has four requests in flight. The Ray job
is the pipeline of examples/ray_data.py with two actors, in blocks of 4 MiB, so that a short job has several. Client,
Ray and server share the machine's cores, and each way has a process of its own in `.venv-ray`.

The ways take turns, ROUNDS times; a way runs one job that is not measured, then one that is. `images_per_second` counts
from the first answer to the last, `seconds` from the start of the job. `of_extract_many` is the ratio within a round;
medians over rounds are reported. Cores are CPU time in the measured time: `driver` is the process that takes the
answers, `workers` are Ray's actors and readers, `daemons` are its raylet, GCS and agents.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.environment import python_of
from bench.record import ROOT, table
from bench.server import serving

WAYS = ("extract_many", "ray")
ROUNDS = 3
GOAL = 0.9
"""The least rate of the Ray job, as a multiple of extract_many's."""


def measure() -> dict[str, Any]:
    python = python_of("ray", "-e", ".")
    rounds: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        serving("--weights", "random:0", "--parity-check", "false", module="bench.instant") as server,
    ):
        run(python, "write", folder)
        for _ in range(ROUNDS):
            # The last line: the first job, in which Ray starts its processes, is not measured.
            done = {way: json.loads(run(python, way, folder, server.grpc).splitlines()[-1]) for way in WAYS}
            rounds.append(done)
            print(done, flush=True)
    return {"goal": GOAL, "rows": [figures(way, rounds) for way in WAYS], "rounds": rounds}


def run(python: Path, *arguments: str) -> str:
    """Run bench/ray_job.py in Ray's environment, and return what it printed."""
    return subprocess.run(
        ["env", f"PYTHONPATH={ROOT / 'examples'}", python, "-m", "bench.ray_job", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=sys.stderr,
        text=True,
        check=True,
    ).stdout


def figures(way: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    def median(values: list[float], digits: int) -> float:
        return round(statistics.median(values), digits)

    mine = [done[way] for done in rounds]
    ratios = [done[way]["images_per_second"] / done["extract_many"]["images_per_second"] for done in rounds]
    return {
        "row": way,
        "images_per_second": median([one["images_per_second"] for one in mine], 1),
        "of_extract_many": median(ratios, 3),
        "least_ratio": round(min(ratios), 3),
        "most_ratio": round(max(ratios), 3),
        "seconds": median([one["seconds"] for one in mine], 2),
        **{f"{role}_cores": median([one["cores"][role] for one in mine], 2) for role in mine[0]["cores"]},
    }


def show(result: dict[str, Any]) -> str:
    return f"goal of the Ray job: {result['goal']} of extract_many\n" + table(result["rows"], *result["rows"][0])

"""The time of a start, step by step, from the supervisor's exec to its `ready` line. ViT-S/16 and ViT-B/16, `dtype
auto`, on the CPU, seeded random weights in a float32 safetensors file of transformers' layout, given by its path;
Meta's code is in the cache folder if DINOV3_UPSTREAM names a copy of its repository.

`fresh`: there is no saved parity check, so the features are compared with Meta's code. `warm`: there is a saved parity
check (without DINOV3_UPSTREAM there is none, and no `fresh`), the file is in the page cache and every module is
compiled (.pyc). `cold`: like `warm`, but the file's pages are dropped (posix_fadvise) and PYTHONPYCACHEPREFIX names an
empty folder, so that every module is compiled again; shared libraries (torch's, gRPC's) stay in the page cache, since
the benchmark maps them, too. All in turn, REPEATS of each; figures are medians over them, in seconds.

The steps follow one another. `supervisor`: until its first log line: interpreter, imports, ports bound. `vendor`
(Meta's checkout is compared with its commit) and `weights` (found). `imports`: the interpreters and imports of the
provisioner and the worker (torch, the backbone), until the worker begins to load; the frontend starts meanwhile, on the
same cores. `read` (the file is checked and mapped), `fingerprint` (every tensor hashed, the first to touch the file's
pages), `upstream` (Meta's code computes the reference images, in a separate process, in float32 and the serving dtype),
`parity_check` (ours does, in both), `build` and `warm_up` (256x256 and 224x224): dinov3_model_load_seconds of /metrics.
`connect`: until the frontend is connected with the worker, when the line is written. `ready`: the sum.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.record import table
from bench.reference import transformers_model
from bench.server import serving
from bench.upstream_repository import served_repository
from dinov3_server.families.dinov3_vit.variants import VITS

MODELS = ("vits16", "vitb16")
REPEATS = 3
PROVISION_STEPS = ("vendor", "weights")
LOAD_STEPS = ("read", "fingerprint", "upstream", "parity_check", "build", "warm_up")


def measure() -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch, "cache")
        flags = ["--cache-dir", str(cache), *_code(Path(scratch))]
        checked = "--parity-check" not in flags
        for model in MODELS:
            weights = Path(scratch, f"{model}.safetensors")
            save_file(transformers_model(VITS[f"dinov3_{model}"], torch.float32).state_dict(), weights)
            given = ("--model", model, "--weights", str(weights), *flags)
            start(given)  # vendors, compiles modules, runs the parity check, and reads all files once
            started: dict[str, list[dict[str, float]]] = {"fresh": [], "warm": [], "cold": []}
            for repeat in range(REPEATS):
                drop_from_page_cache(weights)
                started["cold"].append(start(given, PYTHONPYCACHEPREFIX=str(Path(scratch, f"{model}-{repeat}"))))
                if checked:
                    shutil.rmtree(cache / "parity")
                    started["fresh"].append(start(given))
                started["warm"].append(start(given))
            for state, runs in started.items():
                if runs:
                    steps = {step: round(statistics.median(run[step] for run in runs), 3) for step in runs[0]}
                    rows.append({"model": model, "state": state, "file_bytes": weights.stat().st_size, **steps})
                    print(rows[-1], flush=True)
    return {"parity_check": checked, "rows": rows}


def show(result: dict[str, Any]) -> str:
    steps = ("supervisor", *PROVISION_STEPS, "imports", *LOAD_STEPS, "connect", "ready")
    return table(result["rows"], "model", "state", *steps)


def _code(scratch: Path) -> list[str]:
    """Return the flags for Meta's code."""
    if "DINOV3_UPSTREAM" not in os.environ:
        print("DINOV3_UPSTREAM names no copy of Meta's repository: starts have no parity check", flush=True)
        return ["--parity-check", "false"]
    url, commit = served_repository(scratch)
    return ["--upstream-repo", url, "--upstream-revision", commit]


def start(flags: Sequence[str], **environ: str) -> dict[str, float]:
    """Start a server and return the seconds of each step. `environ` is added to the environment."""
    with tempfile.TemporaryFile() as log:
        began = time.time()
        with serving(*flags, "--log-format", "json", environ=environ, log=log) as server:
            ready = time.time()
            while ("dinov3_model_load_seconds", "warm_up") not in (metrics := server.metrics()):
                time.sleep(0.05)  # until the worker's first snapshot arrives
        log.seek(0)
        lines = [json.loads(line) for line in log]
    # A skipped step has no series.
    steps = {step: metrics.get(("dinov3_model_load_seconds", step), 0.0) for step in (*PROVISION_STEPS, *LOAD_STEPS)}
    bound = _logged(lines, "supervisor", "gRPC on ")
    provisioning = sum(steps[step] for step in PROVISION_STEPS)
    return {
        "supervisor": bound - began,
        "imports": _logged(lines, "worker-0", "load: read took ") - steps["read"] - bound - provisioning,
        **steps,
        "connect": ready - _logged(lines, "worker-0", "load: warm_up took "),
        "ready": ready - began,
    }


def _logged(lines: list[dict[str, str]], process: str, message: str) -> float:
    """Return the time when `process` first logged a line that begins with `message`, in seconds since the epoch."""
    found = next(line for line in lines if line["process"] == process and line["message"].startswith(message))
    return datetime.fromisoformat(found["ts"]).timestamp()


def drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # only pages that are on the disk can be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

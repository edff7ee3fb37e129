"""How long a start takes, step by step: from the supervisor's exec to its `ready` line. ViT-S/16 and ViT-B/16, `dtype
auto`, on the CPU, seeded random weights in a float32 safetensors file of transformers' layout.

`warm`: the file is in the page cache and every module is compiled (.pyc). `cold`: the file's pages are dropped
(posix_fadvise) and PYTHONPYCACHEPREFIX names an empty folder, so that every module is compiled anew; shared libraries
(torch's, gRPC's) stay in the page cache, as the bench maps them too. Both in turn, REPEATS of each; figures are medians
over them, in seconds.

The steps follow one another. `supervisor`: to its first log line: interpreter, imports, ports bound. `worker_imports`:
from there until the worker begins to load: its interpreter, torch, the backbone; the frontend starts meanwhile, on the
same cores. `read` (the file is checked and mapped), `fingerprint` (every tensor hashed, the first to touch the file's
pages), `build` and `warm_up` (256x256 and 224x224): dinov3_model_load_seconds of /metrics. `connect`: until the
frontend knows the worker, which is when the line comes. `ready`: all of it.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.record import table
from bench.reference import transformers_model
from bench.server import serving
from dinov3_server.backbone.registry import VITS

MODELS = ("vits16", "vitb16")
REPEATS = 3
LOAD_STEPS = ("read", "fingerprint", "build", "warm_up")


def measure() -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in MODELS:
            weights = Path(scratch, f"{model}.safetensors")
            save_file(transformers_model(VITS[f"dinov3_{model}"], torch.float32).state_dict(), weights)
            started: dict[str, list[dict[str, float]]] = {"warm": [], "cold": []}
            start(model, weights, {})  # compiles what is not yet, and reads it all once
            for repeat in range(REPEATS):
                drop_from_page_cache(weights)
                empty = {"PYTHONPYCACHEPREFIX": str(Path(scratch, f"{model}-{repeat}"))}
                started["cold"].append(start(model, weights, empty))
                started["warm"].append(start(model, weights, {}))
            for state, runs in started.items():
                steps = {step: round(statistics.median(run[step] for run in runs), 3) for step in runs[0]}
                rows.append({"model": model, "state": state, "file_bytes": weights.stat().st_size, **steps})
                print(rows[-1], flush=True)
    return {"rows": rows}


def show(result: dict[str, Any]) -> str:
    return table(result["rows"], "model", "state", "supervisor", "worker_imports", *LOAD_STEPS, "connect", "ready")


def start(model: str, weights: Path, environ: dict[str, str]) -> dict[str, float]:
    """The seconds of each step of one start. `environ` is added to the environment."""
    with tempfile.TemporaryFile() as log:
        began = time.time()
        flags = ("--model", model, "--weights", str(weights), "--log-format", "json")
        with serving(*flags, environ=environ, log=log) as server:
            ready = time.time()
            while ("dinov3_model_load_seconds", "warm_up") not in (metrics := server.metrics()):
                time.sleep(0.05)  # the worker's first snapshot is on its way
        log.seek(0)
        lines = [json.loads(line) for line in log]
    load = {step: metrics["dinov3_model_load_seconds", step] for step in LOAD_STEPS}
    bound = _logged(lines, "supervisor", "gRPC on ")
    return {
        "supervisor": bound - began,
        "worker_imports": _logged(lines, "worker-0", "load: read took ") - load["read"] - bound,
        **load,
        "connect": ready - _logged(lines, "worker-0", "load: warm_up took "),
        "ready": ready - began,
    }


def _logged(lines: list[dict[str, str]], process: str, message: str) -> float:
    """When `process` first logged a line that begins with `message`, in seconds of the epoch."""
    found = next(line for line in lines if line["process"] == process and line["message"].startswith(message))
    return datetime.fromisoformat(found["ts"]).timestamp()


def drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # only what is on the disk can be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

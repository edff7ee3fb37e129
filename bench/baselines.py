"""Our server beside two baselines, a naive gRPC server and PyTriton, both around transformers' eager DINOv3ViTModel.

ViT-S/16; all three read the same file of seeded random weights and compute in `dtype`, bfloat16 where the CPU has it
natively. A request is one 224x224 uint8 image; CLS and patches come back with two bytes per number: bfloat16 from ours
and from the naive server (float32 if that is `dtype`), float16 from PyTriton, since numpy has no bfloat16.
`pytriton_float32` is the same PyTriton server, called in the usual way: normalized float32 pixels in, float32 features
out. Every forward pass may use all cores, and so may the load generator.

- naive: `grpc.server` with a pool of 10 threads, one forward pass per request, no batching, no lock around the model
  (with one it was slower by a third), so up to 10 passes share the cores. Bytes in and out, no protobuf messages.
- PyTriton: dynamic batching of up to 32 images, otherwise its defaults (queue delay 0, one instance), called through
  its own ModelClient over gRPC (HTTP was as fast), in a separate environment with the same torch and transformers.

All three run all the time and are measured in turn: two rounds of each, with 1, 8 and 32 requests in flight, in closed
loops after a warm-up of 3 seconds, each from a new client process. Ratios are taken within a round; the median over
rounds is reported. `others_cpu` is the CPU that the other servers used meanwhile, in cores.
Before the first measurement, each server's CLS and patches of two images are compared, by cosine, with transformers' in
float32; if they differ the benchmark ends.
"""

from __future__ import annotations

import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from transformers import DINOv3ViTModel

from bench.baseline_servers.call import images
from bench.environment import EnvironmentMissing, python_of
from bench.record import ROOT, table
from bench.reference import transformers_model
from bench.server import serving
from dinov3_server.families.dinov3_vit.variants import VITS
from dinov3_server.host import has_native_bf16

SECONDS = {1: 8.0, 8: 12.0, 32: 14.0}
"""Duration of a measurement, by requests in flight."""
ROUNDS = 2
PYTRITON_INTERPRETER = "/usr/bin/python3"
"""The distribution's: PyTriton's workers load its shared library, and most other builds of Python have none."""
MINIMUM_COSINE = 0.999
"""Between a token computed in bfloat16 and its reference. Tokens of different images stay below 0.4."""

Tokens = NDArray[np.float32]


class WrongFeatures(Exception):
    """A server does not serve the model, so its speed cannot be compared."""


@dataclass(frozen=True)
class Contestant:
    """A running server, and the Python that has its client."""

    name: str
    address: str
    process: psutil.Process
    python: str | Path

    def call(self, dtype: str, *arguments: str) -> str:
        """Run a client process (call.py) and return its output."""
        command = [self.python, "-W", "ignore", "-m", "bench.baseline_servers.call", self.name, self.address, dtype]
        done = subprocess.run([*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout

    def cpu_seconds(self) -> float:
        processes = [self.process, *self.process.children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in processes)


def measure() -> dict[str, Any]:
    dtype = "bfloat16" if has_native_bf16() else "float32"
    result: dict[str, Any] = {"dtype": dtype}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        reference = transformers_model(VITS["dinov3_vits16"], torch.float32)
        reference.save_pretrained(folder)
        flags = ("--model", "vits16", "--weights", str(folder / "model.safetensors"), "--dtype", dtype)
        server = stack.enter_context(serving(*flags, "--parity-check", "false"))
        contestants = [
            Contestant("ours", server.grpc, server.process, sys.executable),
            stack.enter_context(baseline("naive", sys.executable, folder, dtype)),
        ]
        try:
            python = python_of("pytriton", interpreter=PYTRITON_INTERPRETER)
            pytriton = stack.enter_context(baseline("pytriton", python, folder, dtype))
            contestants += [pytriton, replace(pytriton, name="pytriton_float32")]
            result["pytriton_versions"] = versions(python)
        except EnvironmentMissing as error:
            print("without PyTriton:", error, flush=True)
            result["without_pytriton"] = str(error)
        result["min_cosine"] = check(contestants, dtype, expected(reference), folder / "tokens.npy")
        del reference
        result["rows"] = rounds(contestants, dtype)
    result["ratios"] = ratios(result["rows"])
    return result


def show(result: dict[str, Any]) -> str:
    columns = ("in_flight", "round", "server", "images_per_second", "p50_ms", "p99_ms", "others_cpu")
    tables = [table(result["rows"], *columns), table(result["ratios"], *result["ratios"][0])]
    if "without_pytriton" in result:
        tables.append(f"without PyTriton: {result['without_pytriton']}")
    return "\n\n".join(tables)


@contextmanager
def baseline(name: str, python: str | Path, folder: Path, dtype: str) -> Iterator[Contestant]:
    """Start a baseline server and end it after the block. Raises EnvironmentMissing if PyTriton does not start here."""
    log = folder / f"{name}.log"
    command = [python, "-m", f"bench.baseline_servers.{name}", folder, dtype]
    with log.open("w") as file:
        started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        assert started.stdout is not None
        ready = re.fullmatch(r"ready (\S+)\n", started.stdout.readline())
        if ready is None:
            tail = " ".join(log.read_text().splitlines()[-3:])
            error = EnvironmentMissing if name == "pytriton" else RuntimeError
            raise error(f"the server {name} did not start: {tail}")
        yield Contestant(name, ready[1], psutil.Process(started.pid), python)
    finally:
        started.send_signal(signal.SIGTERM)
        started.wait(60)


def expected(model: DINOv3ViTModel) -> Tokens:
    """Return the CLS and patches of `images()`, [2, 1 + P, D]."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (torch.from_numpy(images()) / 255 - mean) / std
    with torch.inference_mode():
        tokens: torch.Tensor = model(pixels.permute(0, 3, 1, 2)).last_hidden_state
    registers = slice(1, 1 + model.config.num_register_tokens)
    return np.delete(tokens.numpy(), registers, axis=1)


def check(contestants: list[Contestant], dtype: str, reference: Tokens, file: Path) -> dict[str, float]:
    """Return the lowest cosine between a token and its reference, by server. Raises WrongFeatures if one is too low."""
    confusion = float(cosine(reference, reference[::-1]).max())
    if confusion >= MINIMUM_COSINE:
        raise WrongFeatures(
            f"the two images are too alike: a token of one has cosine {confusion} with one of the other"
        )
    lowest = {}
    for contestant in contestants:
        contestant.call(dtype, "tokens", str(file))
        lowest[contestant.name] = round(float(cosine(np.load(file), reference).min()), 6)
    print("lowest cosine of a token with transformers' in float32:", lowest, flush=True)
    if wrong := {name: value for name, value in lowest.items() if not value >= MINIMUM_COSINE}:
        raise WrongFeatures(f"not the model's features: {wrong}; the lowest cosine must be {MINIMUM_COSINE} or more")
    return lowest


def cosine(mine: Tokens, theirs: Tokens) -> Tokens:
    """Return the cosine of each token, [2, T], of two [2, T, D]."""
    lengths: Tokens = np.linalg.norm(mine, axis=-1) * np.linalg.norm(theirs, axis=-1)
    products: Tokens = (mine * theirs).sum(axis=-1)
    return products / lengths


def rounds(contestants: list[Contestant], dtype: str) -> list[dict[str, Any]]:
    rows = []
    for in_flight, seconds in SECONDS.items():
        for number in range(1, ROUNDS + 1):
            for contestant in contestants:
                others = {other.process: other for other in contestants if other.process != contestant.process}.values()
                cpu, since = sum(other.cpu_seconds() for other in others), time.perf_counter()
                figures = json.loads(contestant.call(dtype, "load", str(in_flight), str(seconds)))
                cpu, elapsed = sum(other.cpu_seconds() for other in others) - cpu, time.perf_counter() - since
                row = {"in_flight": in_flight, "round": number, "server": contestant.name, **figures}
                rows.append(row | {"others_cpu": round(cpu / elapsed, 3)})
                print(rows[-1], flush=True)
    return rows


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return our images/s and p50 as multiples of each baseline's, by requests in flight; medians over rounds."""
    turns: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        turns.setdefault((row["in_flight"], row["round"]), {})[row["server"]] = row
    found = []
    for in_flight in dict.fromkeys(row["in_flight"] for row in rows):
        for name in dict.fromkeys(row["server"] for row in rows if row["server"] != "ours"):
            pairs = [(turn["ours"], turn[name]) for (level, _), turn in turns.items() if level == in_flight]
            row = {"in_flight": in_flight, "baseline": name}
            for figure in ("images_per_second", "p50_ms"):
                row[f"{figure}_ratio"] = round(
                    statistics.median(our[figure] / their[figure] for our, their in pairs), 3
                )
            found.append(row)
    return found


def versions(python: str | Path) -> dict[str, str]:
    names = ("nvidia-pytriton", "tritonclient", "torch", "transformers", "numpy")
    code = f"from importlib.metadata import version; print(*map(version, {names}))"
    done = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return dict(zip(names, done.stdout.split(), strict=True))

"""`make gpu-bench`, or `python -m bench.gpu`: forward passes and the service on a GPU, in one run of 9 minutes.

peak: the best of some bf16 matrix products of random numbers; other shares are relative to it.
forward: ViT-S, B, L, H+ at 224, 256, 512 pixels: bytes on the device to CLS and patches in bfloat16 on the device, and
the check that they are finite; eager, and as the CUDA graph that the server replays.
pipeline: the server's runner in a loop, two batches in flight, from page-locked memory and back; its stage times.
service: the whole server, closed loops from several processes; raw pixels and JPEG (500x375, quality 90) in, CLS alone
and CLS with patches in bfloat16 back, requests of 1 and of 32 images, 1 to 8 frontends.
baselines: ours eager, as a graph, compiled (Inductor), compiled and as a graph; transformers eager and compiled, from
normalized floats, without conversion and check. In turn, a round of each.
profile: where the time goes, kernel by kernel.

Seeded random weights. A section ends when its time is up, with the rows so far. The record, $OUT/gpu.json or
bench/results/gpu.json, is rewritten after every row.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from bench.gpu.forward import baselines, forward, peak, profile
from bench.gpu.goals import goals
from bench.gpu.pipeline import pipeline
from bench.gpu.plan import Plan, dry, full
from bench.gpu.service import service
from bench.record import RESULTS, metadata, table

Section = Callable[[Plan, Callable[[dict[str, Any]], None]], None]
SECTIONS: dict[str, Section] = {
    "peak": peak,
    "forward": forward,
    "pipeline": pipeline,
    "service": service,
    "baselines": baselines,
    "profile": profile,
}
LIMIT = 520.0  # seconds for everything but imports: the rest of ten minutes is for those and for late ends
CARD = "driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem"  # fields of nvidia-smi
STATE = "clocks.sm,clocks.mem,power.draw,temperature.gpu"  # after each section


class TimeUp(BaseException):
    """The time of a section is up. A BaseException, so that no `except Exception` in the measured code catches it."""


class Record:
    """The result of a run so far, written to disk after every row."""

    def __init__(self, plan: Plan) -> None:
        self._path = Path(os.environ.get("OUT") or RESULTS) / "gpu.json"
        self._path.parent.mkdir(exist_ok=True)
        self._device = plan.device
        self._result: dict[str, Any] = {
            "inside": __doc__,
            "metadata": metadata() | {"device": _device(plan.device)},
            "ended": {},
        }

    def add(self, section: str, row: dict[str, Any]) -> None:
        print(section, json.dumps(row), flush=True)
        self._result.setdefault(section, []).append(row)
        self.write()

    def end(self, section: str, reason: str) -> None:
        print(section, reason, flush=True)
        self._result["ended"][section] = {"how": reason, "nvidia_smi": _nvidia_smi(self._device, STATE)}
        self.write()

    def write(self) -> None:
        self._result["goals"] = goals(self._result)
        self._path.write_text(json.dumps(self._result, indent=1) + "\n")

    def show(self) -> str:
        reached = table(self._result["goals"], "goal", "at_least", "reached")
        return f"{reached}\nrecorded in {self._path}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Measure on a GPU, print, record.")
    parser.add_argument("--device", default="cuda:0", help="'cpu' only tries the script, at the smallest size")
    device = torch.device(parser.parse_args().device)
    plan = dry(device) if device.type == "cpu" else full(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error(f"torch {torch.__version__} sees no CUDA device; --device cpu tries the script without one")
        torch.cuda.set_device(device)
    record = Record(plan)
    signal.signal(signal.SIGALRM, _time_up)
    end = time.monotonic() + LIMIT
    spare = 0.0
    for name, measure in SECTIONS.items():
        began = time.monotonic()
        limit = min(plan.budgets[name] + spare, end - began)
        record.end(name, _run(functools.partial(measure, plan, functools.partial(record.add, name)), limit))
        spare = max(0.0, limit - (time.monotonic() - began))
    print(record.show())


def _run(measure: Callable[[], None], limit: float) -> str:
    """Run a section, and return how it ended. A section that fails or is cut off does not affect the others."""
    if limit <= 0:
        return "no time was left"
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        measure()
    except TimeUp:
        return f"cut off after {limit:.0f} s"
    except Exception:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "complete"


def _time_up(number: int, frame: FrameType | None) -> None:
    raise TimeUp


def _device(device: torch.device) -> dict[str, Any]:
    """Return the description of the device by torch and nvidia-smi."""
    if device.type != "cuda":
        return {"name": "cpu", "dry_run": True}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "nvidia_smi": _nvidia_smi(device, CARD),
    }


def _nvidia_smi(device: torch.device, fields: str) -> dict[str, str] | None:
    """Return fields of nvidia-smi; None if it cannot be run."""
    if device.type != "cuda":
        return None
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={device.index or 0}"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return dict(zip(fields.split(","), output.strip().split(", "), strict=False))


if __name__ == "__main__":
    main()

"""The long jobs of `make chaos`: a bulk run by the client's command, and a training loop."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attack.images import photo
from attack.questions import TOLERANCE, Answer, Question, differs, from_features, relative_error
from attack.traffic import DEADLINE, Traffic
from dinov3_client import Client, Dinov3Error, FeatureDataset
from dinov3_client.bulk import ExtractionError
from dinov3_client.torch import with_features

SIZE = 48, 64
FILES = 600
RUNS = 3
BROKEN = 100
"""One file in this many is not an image."""
CROPS, CROPS_A_BATCH, BATCHES = 64, 8, 25
_COMMAND = (sys.executable, "-c", "import sys; from dinov3_client.cli import main; sys.exit(main())", "extract")


@dataclass(frozen=True)
class Photos:
    """Files by name, some of which are not images, and the features of the others: CLS [D] and patches [P, D]."""

    files: dict[str, bytes]
    truth: dict[str, dict[str, NDArray[np.float32]]]


def draw_photos(rng: random.Random, client: Client, count: int = FILES) -> Photos:
    files = {f"{n:05}.jpg": photo(rng) if (n + 1) % BROKEN else rng.randbytes(50) for n in range(count)}
    truth = {}
    names = list(files)
    for at in range(0, len(names), 32):
        part = names[at : at + 32]
        answer = Question(tuple(files[name] for name in part), SIZE).ask(client)
        for row, name in enumerate(part):
            if row not in answer.failed:
                truth[name] = {kind: tensor[row] for kind, tensor in answer.tensors.items()}
    return Photos(files, truth)


def extract_in_bulk(traffic: Traffic, photos: Photos) -> None:
    """Run `dinov3-client extract` over all files, again and again, and compare what it wrote.

    If a run ends early because the server was away or busy for DEADLINE, the same command goes on: at most RUNS runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "photos")
        source.mkdir()
        for name, data in photos.files.items():
            (source / name).write_bytes(data)
        number = 0
        while not traffic.stop.is_set():
            number += 1
            out = Path(folder, f"features-{number}")
            size = "x".join(map(str, SIZE))
            flags = ("--out", str(out), "--target", traffic.target, "--dtype", "float32", "--size", size)
            command = [*_COMMAND, str(source), *flags, "--deadline", str(DEADLINE), "--shard-rows", "200"]
            for run in range(1, RUNS + 1):
                done = subprocess.run(command, capture_output=True, text=True)
                if finished(out) or run == RUNS or not (reason := refusal(done.stderr)):
                    break
                traffic.outcomes.add("bulk", "refused", f"a run stopped: {reason}")
            judge_bulk(traffic, photos, out, done.returncode, done.stderr)


def finished(out: Path) -> bool:
    """Return whether the extraction in this folder is complete."""
    try:
        FeatureDataset(out)
    except ExtractionError:
        return False
    return True


def refusal(stderr: str) -> str:
    """Return why a run ended early, if the same command may succeed later. Return "" for a fault of the server (its
    errors have an id) or of the client (a traceback)."""
    lines = [line for line in stderr.splitlines() if " keeps what was answered" not in line]
    last = lines[-1] if lines else ""
    prefix = "dinov3-client: "
    return last.removeprefix(prefix) if last.startswith(prefix) and "error id" not in last else ""


def judge_bulk(traffic: Traffic, photos: Photos, out: Path, code: int, stderr: str) -> None:
    """Note the outcome of each file. A complete run has exit code 3 if some files are broken."""
    outcomes, count = traffic.outcomes, len(photos.files)
    broken = sorted(photos.files.keys() - photos.truth.keys())
    if code != (3 if broken else 0) or not finished(out):
        outcomes.add("bulk", "lost", f"a run ended with code {code}: {stderr[-300:]}", count)
        return
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()] if broken else []
    reasons = {line["id"]: line["reason"] for line in failed}
    dataset = FeatureDataset(out)
    written = {name: dataset[name] for name in dataset.ids()}
    for name in photos.files:
        if name in written:
            wrong = _wrong(photos.truth.get(name), written[name])
            outcomes.add("bulk", "wrong" if wrong else "answered", f"{name}: {wrong}")
        elif name in broken and reasons.get(name):
            outcomes.add("bulk", "answered")
        else:
            outcomes.add("bulk", "lost", f"{name}: {reasons.get(name) or 'no features, and no reason'}")


def _wrong(truth: dict[str, NDArray[np.float32]] | None, given: dict[str, Any]) -> str | None:
    if truth is None:
        return "features of a file that is not an image"
    for kind, right in truth.items():
        if given[kind].shape != right.shape:
            return f"{kind} has the shape {given[kind].shape}, not {right.shape}"
        error = relative_error(right[None], given[kind][None])[0]
        if not error <= TOLERANCE:
            return f"{kind} is off by {error:.2g}"
    return None


@dataclass(frozen=True)
class Crops:
    """CROPS images [H, W, 3] of the model's input size, and the answer for all of them."""

    pixels: NDArray[np.uint8]
    truth: Answer


def draw_crops(rng: random.Random, client: Client) -> Crops:
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (CROPS, *SIZE, 3), np.uint8)
    return Crops(pixels, from_features(client.extract(pixels, **Question((), SIZE).options)))


def train(traffic: Traffic, rng: random.Random, client: Client, crops: Crops) -> None:
    """Run epochs of BATCHES batches, whose features are requested ahead, and judge them."""

    def batches() -> Iterator[list[int]]:
        for _ in range(BATCHES):
            if traffic.stop.is_set():
                return
            yield rng.sample(range(CROPS), CROPS_A_BATCH)

    options = Question((), SIZE).options
    while not traffic.stop.is_set():
        epoch = with_features(_Loader(batches), client, to_request=lambda batch: crops.pixels[batch], **options)
        try:
            for batch, features in epoch:
                right = Answer({kind: tensor[batch] for kind, tensor in crops.truth.tensors.items()})
                wrong = differs(right, from_features(features))
                traffic.outcomes.add("training", "wrong" if wrong else "answered", wrong or "")
        except Dinov3Error as error:
            traffic.outcomes.add("training", "lost", f"{type(error).__name__}: {error}")


class _Loader:
    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())

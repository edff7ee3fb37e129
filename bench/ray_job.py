"""Jobs of `python -m bench ray`, in `.venv-ray` with examples/ on PYTHONPATH.

    python -m bench.ray_job write FOLDER            write Parquet files of JPEG files
    python -m bench.ray_job WAY FOLDER TARGET       run two jobs, and print the figures of each as JSON

A job reads the column `bytes` of all files and gets the CLS token of each image: with `Client.extract_many` (WAY is
extract_many) or with the pipeline of examples/ray_data.py (ray).
"""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet as parquet
from PIL import Image

from dinov3_client import Client

FILES, ROWS = 32, 256
BATCH, IN_FLIGHT = 32, 4
JOBS = 2
BLOCK = 4 << 20
"""Bytes of a block, some 250 images: the default of 128 MB would need a far longer job to have several."""


def write(folder: str) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (ROWS, 28, 28, 3), np.uint8)
    column = pyarrow.table({"bytes": [jpeg(pixels) for pixels in coarse]})
    for number in range(FILES):
        parquet.write_table(column, Path(folder) / f"{number:03}.parquet")


def jpeg(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def measured(answers: Iterator[int]) -> dict[str, Any]:
    """Take the numbers of images that are answered; return the rate between the first answer and the last.

    `cores` is the CPU time in the same time: of this process, of Ray's workers (actors and readers), of its daemons.
    """
    began = time.perf_counter()
    next(answers)
    first, before, images = time.perf_counter(), cpu_seconds(), 0
    for count in answers:
        images += count
    last, after = time.perf_counter(), cpu_seconds()
    return {
        "images_per_second": round(images / (last - first), 1),
        "cores": {name: round((after[name] - before[name]) / (last - first), 2) for name in after},
        "seconds": round(last - began, 2),
    }


def extract_many(folder: str, target: str) -> Iterator[int]:
    def batches() -> Iterator[list[bytes]]:
        for file in sorted(Path(folder).glob("*.parquet")):
            for batch in parquet.ParquetFile(file).iter_batches(BATCH, columns=["bytes"]):
                yield batch["bytes"].to_pylist()

    with Client(target) as client:
        for features in client.extract_many(batches(), "cls", in_flight=IN_FLIGHT, priority="bulk"):
            yield len(features)


def ray_job(folder: str, target: str) -> Iterator[int]:
    import ray
    from ray_data import with_cls

    if not ray.is_initialized():
        ray.init("local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = BLOCK
    dataset = ray.data.read_parquet(folder, columns=["bytes"])
    for batch in with_cls(dataset, target, actors=2, batch_size=BATCH).iter_batches(batch_size=None):
        yield len(batch["cls"])


def cpu_seconds() -> dict[str, float]:
    used = {"driver": 0.0, "workers": 0.0, "daemons": 0.0}
    here = psutil.Process()
    for process in [here, *here.children(recursive=True)]:
        try:
            times, command = process.cpu_times(), process.cmdline()
        except psutil.Error:  # it has ended
            continue
        worker = bool(command) and command[0].startswith("ray::")
        used["driver" if process == here else "workers" if worker else "daemons"] += times.user + times.system
    return used


if __name__ == "__main__":
    way, *arguments = sys.argv[1:]
    if way == "write":
        write(*arguments)
    else:
        for _ in range(JOBS):
            print(json.dumps(measured({"extract_many": extract_many, "ray": ray_job}[way](*arguments))), flush=True)

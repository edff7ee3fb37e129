"""PyTriton with dynamic batching of up to 32 images and otherwise its defaults, among them a queue delay of 0: a batch
is the requests that waited while the last one ran.

`python -m bench.baseline_servers.pytriton FOLDER DTYPE` prints `ready grpc://HOST:PORT` and serves until SIGTERM. It
runs in the environment of `environment.py` and offers the model twice. PYTRITON_MODEL takes uint8 pixels, normalizes
them here, and returns float16, since numpy has no bfloat16: as many bytes as ours, the least that PyTriton allows.
PYTRITON_FLOAT32_MODEL takes normalized float32 pixels and returns float32 features, the usual way.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

import numpy as np
import torch
from numpy.typing import NDArray
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from bench.baseline_servers.call import PYTRITON_FLOAT32_MODEL, PYTRITON_MODEL, SIDE
from bench.baseline_servers.model import Model

MAX_BATCH_SIZE = 32


def main(folder: str, dtype: str) -> None:
    # Triton logs to standard output too, which is only for the `ready` line.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model = Model(folder, dtype)

    def extract(pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.float16]]:
        cls, patches = model.features(pixels)
        return {"cls": cls.half().numpy(), "patches": patches.half().numpy()}

    def extract_float32(pixels: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        cls, patches = model.of_normalized(torch.from_numpy(pixels))
        return {"cls": cls.float().numpy(), "patches": patches.float().numpy()}

    http, grpc, metrics = free_ports(3)
    addresses = {"http_address": "127.0.0.1", "grpc_address": "127.0.0.1"}
    config = TritonConfig(http_port=http, grpc_port=grpc, metrics_port=metrics, **addresses)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Triton(config=config) as triton:
        for name, function, pixels, feature in (
            (PYTRITON_MODEL, extract, Tensor(name="pixels", dtype=np.uint8, shape=(SIDE, SIDE, 3)), np.float16),
            (
                PYTRITON_FLOAT32_MODEL,
                extract_float32,
                Tensor(name="pixels", dtype=np.float32, shape=(3, SIDE, SIDE)),
                np.float32,
            ),
        ):
            triton.bind(
                model_name=name,
                infer_func=batch(function),
                inputs=[pixels],
                outputs=[
                    Tensor(name="cls", dtype=feature, shape=(-1,)),
                    Tensor(name="patches", dtype=feature, shape=(-1, -1)),
                ],
                config=ModelConfig(max_batch_size=MAX_BATCH_SIZE),
            )
        triton.run()
        print(f"ready grpc://127.0.0.1:{grpc}", file=stdout, flush=True)
        while True:
            signal.pause()


def free_ports(count: int) -> list[int]:
    """Return ports that are free now: Triton cannot choose them itself."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


if __name__ == "__main__":
    main(*sys.argv[1:])

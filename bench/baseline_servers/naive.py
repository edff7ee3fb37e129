"""A naive gRPC server: `grpc.server` with the tutorial's pool of 10 threads, one forward pass per request, no batching.

`python -m bench.baseline_servers.naive FOLDER DTYPE` prints `ready HOST:PORT` and serves until SIGTERM. Requests and
answers are raw bytes, so that no protobuf message is built on either side.
"""

from __future__ import annotations

import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import torch

from bench.baseline_servers.call import NAIVE_METHOD, SIDE
from bench.baseline_servers.model import Model

THREADS = 10


def main(folder: str, dtype: str) -> None:
    model = Model(folder, dtype)

    def extract(request: bytes, context: grpc.ServicerContext) -> bytes:
        """Turn [224, 224, 3] uint8 into [1 + P, D] in the model's dtype, CLS first."""
        pixels = np.frombuffer(bytearray(request), np.uint8).reshape(1, SIDE, SIDE, 3)
        cls, patches = model.features(pixels)
        tokens = torch.cat([cls[:, None], patches], dim=1)
        return tokens.view(torch.uint8).numpy().tobytes()

    _, service, method = NAIVE_METHOD.split("/")
    server = grpc.server(ThreadPoolExecutor(THREADS))
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {method: grpc.unary_unary_rpc_method_handler(extract)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    signal.signal(signal.SIGTERM, lambda *_: server.stop(None))
    print(f"ready 127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main(*sys.argv[1:])

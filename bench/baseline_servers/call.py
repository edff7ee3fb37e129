"""Call one of the three servers: a new process per measurement, in the environment of the server's own client, with the
same load generator.

    python -m bench.baseline_servers.call SERVER ADDRESS DTYPE tokens FILE.npy
    python -m bench.baseline_servers.call SERVER ADDRESS DTYPE load IN_FLIGHT SECONDS

`tokens` saves the server's answer for `images()`, float32 [2, 1 + P, D], CLS first. `load` prints the figures of a
closed loop of requests of one 224x224 image as one line of JSON.

Ours is called through dinov3_client, whose one connection the callers share; the naive server through one gRPC channel,
also shared; PyTriton through its own ModelClient over gRPC, one per caller. Every answer ends as arrays: of DTYPE from
ours and from the naive server, of float16 from PyTriton, of float32 from `pytriton_float32`, which receives normalized
float32 pixels.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.load import closed_loop

SIDE = 224
NAIVE_METHOD = "/naive.Features/Extract"
PYTRITON_MODEL = "dinov3"
PYTRITON_FLOAT32_MODEL = "dinov3_float32"
PYTRITON_MODELS = {"pytriton": PYTRITON_MODEL, "pytriton_float32": PYTRITON_FLOAT32_MODEL}

Array = NDArray[Any]
Call = Callable[[Array], tuple[Array, Array]]
"""Takes an image from `prepared`, returns CLS [D] and patches [P, D]."""


def main(server: str, address: str, dtype: str, command: str, *arguments: str) -> None:
    if command == "tokens":
        [call] = connect(server, address, dtype, callers=1)
        answers = [call(prepared(server, image)) for image in images()]
        np.save(arguments[0], np.stack([np.vstack(answer).astype(np.float32) for answer in answers]))
    else:
        noise = prepared(server, images()[0])
        callers = [lambda call=call: len(call(noise)) for call in connect(server, address, dtype, int(arguments[0]))]
        print(json.dumps(closed_loop(callers, float(arguments[1])).figures()))


def images() -> NDArray[np.uint8]:
    """Return two images that no model confuses, noise and a color gradient, [2, 224, 224, 3]."""
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    return np.stack([noise, np.stack([rows, columns, SIDE - rows], axis=-1).astype(np.uint8)])


def prepared(server: str, image: NDArray[np.uint8]) -> Array:
    """Return an image [224, 224, 3] in the form that the server takes."""
    if server != "pytriton_float32":
        return image
    normalized = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return np.ascontiguousarray(normalized.astype(np.float32).transpose(2, 0, 1))


def connect(server: str, address: str, dtype: str, callers: int) -> list[Call]:
    if server in PYTRITON_MODELS:
        return [pytriton(address, PYTRITON_MODELS[server]) for _ in range(callers)]
    return [{"ours": ours, "naive": naive}[server](address, dtype)] * callers


def ours(address: str, dtype: str) -> Call:
    from dinov3_client import Client

    client = Client(address)

    def call(image: Array) -> tuple[Array, Array]:
        features = client.extract(image[None], preset="none", dtype=dtype)  # type: ignore[arg-type]
        assert features.cls is not None
        assert features.patches is not None
        return features.cls[0], features.patches[0]

    return call


def naive(address: str, dtype: str) -> Call:
    import grpc
    import ml_dtypes

    extract: grpc.UnaryUnaryMultiCallable[bytes, bytes] = grpc.insecure_channel(address).unary_unary(NAIVE_METHOD)
    numpy_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    tokens = 1 + (SIDE // 16) ** 2

    def call(image: Array) -> tuple[Array, Array]:
        features = np.frombuffer(extract(image.tobytes()), numpy_dtype).reshape(tokens, -1)
        return features[0], features[1:]

    return call


def pytriton(address: str, model: str) -> Call:
    from pytriton.client import ModelClient

    client = ModelClient(address, model)

    def call(image: Array) -> tuple[Array, Array]:
        features = client.infer_sample(pixels=image)
        return features["cls"], features["patches"]

    return call


if __name__ == "__main__":
    main(*sys.argv[1:])

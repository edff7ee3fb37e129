"""The two sides of the data path's comparison answer the same load generator, byte for byte as much."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from bench.datapath import Case, echo
from bench.flood import flood
from bench.server import serving
from dinov3_client import Client

CASE = Case("2 images", images=2, patches=True, in_flight=4)


def test_ours_and_the_echo_answer_the_same_requests() -> None:
    flags = ("--model", "vits16", "--weights", "random:0", "--arena-bytes", "16MiB", "--frontends", "1")
    with ProcessPoolExecutor(1, get_context("spawn")) as generator:

        def load(address: str) -> int:
            done = generator.submit(flood, address, CASE.request(), CASE.in_flight, 0.1, 0.0, 2).result()
            # On a busy machine none may fall into the tenth of a second that counts.
            assert 0 <= done.requests <= done.answered
            assert done.answered > 0
            return done.answer_nbytes

        with serving(*flags, module="bench.instant") as server:
            answer_nbytes = load(server.grpc)
            with Client(server.grpc) as client:
                features = client.extract(np.zeros((2, 224, 224, 3), np.uint8), preset="none", dtype="bfloat16")
        assert features.cls.shape == (2, 384)
        assert features.patches.shape == (2, 196, 384)
        tensors = 2 * (1 + 196) * 384 * 2
        assert tensors < answer_nbytes < tensors + 512
        with echo(answer_nbytes) as target:
            assert load(target.address) == answer_nbytes
            assert target.cpu_seconds()["echo"] > 0

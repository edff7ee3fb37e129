"""A full server refuses requests with the time to wait, and recovers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.processes.test_crashes import ask, check, photo
from tests.support.numpy_runner import BLOCK
from tests.support.server import Server
from tests.support.waiting import LIMIT, until


class Full:
    """A server with a request of `images` on its device, until `open_again`."""

    def __init__(self, server: Server, gate: Path, images: list[np.ndarray]) -> None:
        self.server, self.gate = server, gate
        self._pool = ThreadPoolExecutor(4)
        images[0][0, 0] = BLOCK
        self._held = self._pool.submit(lambda: server.client().extract(images, preset="none", dtype="float32"))
        self._images = images
        until(lambda: server.metric("dinov3_arena_bytes", state="used") > 0)

    def refusal(self, images: list[np.ndarray]) -> tuple[str, float]:
        """Send a request of `images` that is refused. Return the message and the seconds to wait."""
        pixels = pb.Tensor(
            dtype=pb.DATA_TYPE_UINT8, shape=[len(images), *images[0].shape], data=np.stack(images).tobytes()
        )
        request = pb.ExtractRequest(pixels=pixels, preprocessing=pb.Preprocessing(preset=pb.PRESET_NONE))
        with grpc.insecure_channel(self.server.grpc) as channel:
            call = channel.unary_unary(
                "/dinov3_serving.v1.FeatureService/Extract",
                request_serializer=pb.ExtractRequest.SerializeToString,
                response_deserializer=pb.ExtractResponse.FromString,
            )
            with pytest.raises(grpc.RpcError) as refused:
                call(request, timeout=LIMIT)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        (detail,) = rpc_status.from_call(refused.value).details
        retry = error_details_pb2.RetryInfo()
        assert detail.Unpack(retry)
        return refused.value.details(), retry.retry_delay.ToTimedelta().total_seconds()

    def open_again(self, images: list[np.ndarray]) -> None:
        """Let the device go on, and check the answers of the held request and of another one of `images`."""
        client = self.server.client()
        before = self.server.metric("dinov3_refused_requests_total")
        waiting = self._pool.submit(lambda: client.extract(images, preset="none", dtype="float32"))
        until(lambda: self.server.metric("dinov3_refused_requests_total") > before + 1)
        self.gate.touch()
        check(self._held.result(LIMIT), self._images)
        check(waiting.result(LIMIT), images)
        until(lambda: self.server.metric("dinov3_arena_bytes", state="used") == 0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    """A new server for each test: one with a held request has measured that its device is slow."""
    gate = tmp_path / "gate"
    flags = ("--arena-bytes", "1MiB", "--max-queue-images", "8", "--max-images-per-request", "6")
    with Server(*flags, TEST_GATE_FILE=str(gate)) as server:
        yield server, gate


@pytest.mark.parametrize(("held", "wanted", "size", "limit"), [(6, 3, 32, "8"), (3, 2, 256, "1048576")])
def test_a_full_server_refuses_and_recovers(
    server: tuple[Server, Path], held: int, wanted: int, size: int, limit: str
) -> None:
    """The queue is full, or the arena."""
    running, gate = server
    full = Full(running, gate, [photo(seed, size, size) for seed in range(held)])
    images = [photo(seed, size, size) for seed in range(100, 100 + wanted)]
    message, seconds = full.refusal(images)
    assert limit in message
    assert 0 < seconds <= 5
    full.open_again(images)
    with running.client() as client:
        ask(client, 1)

"""A feature server without a model, for tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Self

import grpc
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from dinov3_client._model import Model
from dinov3_client.testing._answer import answer
from dinov3_client.testing._failure import Failure, status_of
from dinov3_client.testing._model import MODEL, message_of
from dinov3_client.testing._projection import GivenProjection, read_projection
from dinov3_serving.errors import ServingError
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.feature_service_pb2_grpc import FeatureServiceServicer, add_FeatureServiceServicer_to_server
from dinov3_serving.v1.request import check_stream_request

_THREADS = 64  # concurrent calls; each waiting call and each stream takes one
ScriptedResult = Failure | Mapping[int, Failure] | None


@dataclass(frozen=True)
class Call:
    """A received call, or a received message of a stream."""

    method: str
    """Extract, ExtractStream or GetModel."""
    message: pb.ExtractRequest | pb.ExtractStreamRequest | pb.GetModelRequest
    metadata: dict[str, str | bytes]
    timeout: float | None
    """Seconds left until its deadline; None without one."""


class FakeServer:
    """A real gRPC server on a free local port. Its features are a formula of the pixels (`expected`).

        with FakeServer() as server, Client(server.target) as client:
            features = client.extract(pixels, preset="none", dtype="float32")
            np.testing.assert_array_equal(features.patches[0], expected(pixels, "patches"))

    It answers like a real server of `model`, within `model.limits`, and refuses invalid requests with the same
    statuses. Files are decoded by Pillow's `convert("RGB")`. The timings in responses are constants.

    model: the model to serve; see `MODEL`. Its `projections` are replaced by those given here. May be set at any time,
        to imitate a restart with another model.
    projections: by name, a weight [K, D] or a pair of a weight [K, D] and a bias [K].
    address: the address to listen on, in gRPC's syntax: HOST:PORT or unix:PATH. credentials: for TLS.

    script: the results of the next messages of Extract and ExtractStream, consumed from the front: None answers
        normally, a Failure fails the whole message, a dictionary fails some of its images.
    model_script: the same for the next calls of GetModel.
    gate: while it is cleared, messages of Extract and ExtractStream are recorded and wait. `stop` releases them.
    delay: seconds to wait before each response of Extract and ExtractStream.
    edit: called with each ExtractResponse before it is sent, to change it.
    calls: all received calls, in order.
    """

    def __init__(
        self,
        model: Model = MODEL,
        *,
        projections: Mapping[str, GivenProjection] | None = None,
        address: str = "127.0.0.1:0",
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self._projections = {name: read_projection(given) for name, given in (projections or {}).items()}
        self.model = model
        self.script: list[ScriptedResult] = []
        self.model_script: list[Failure | None] = []
        self.gate = threading.Event()
        self.gate.set()
        self.delay = 0.0
        self.edit: Callable[[pb.ExtractResponse], object] | None = None
        self.calls: list[Call] = []
        self._address = address
        self._credentials = credentials
        self._arrived = threading.Condition()
        self._running: tuple[grpc.Server, ThreadPoolExecutor] | None = None
        self._stopping = threading.Event()
        self._frontends: dict[str, int] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def model(self) -> Model:
        return self._model

    @model.setter
    def model(self, model: Model) -> None:
        described = tuple(linear.described(name) for name, linear in self._projections.items())
        self._model = replace(model, projections=described)

    @property
    def target(self) -> str:
        """The target for a Client, known after the first start; a restart keeps it."""
        return self._address

    @property
    def requests(self) -> list[pb.ExtractRequest]:
        """All received ExtractRequests, those in streams included."""
        messages = [call.message for call in self.calls]
        requests = [one.request if isinstance(one, pb.ExtractStreamRequest) else one for one in messages]
        return [one for one in requests if isinstance(one, pb.ExtractRequest)]

    def start(self) -> None:
        """Start to listen; after `stop`, at the same address."""
        assert self._running is None, "the server is running already"
        self._stopping.clear()
        threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="fake-server")
        most = self.model.limits.max_message_bytes
        options = (
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", most),
            ("grpc.max_send_message_length", most),
        )
        server = grpc.server(threads, options=options)
        add_FeatureServiceServicer_to_server(_Service(self), server)  # type: ignore[no-untyped-call]
        if self._credentials is None:
            port = server.add_insecure_port(self._address)
        else:
            port = server.add_secure_port(self._address, self._credentials)
        if not self._address.startswith("unix:"):
            self._address = f"{self._address.rpartition(':')[0]}:{port}"
        server.start()
        self._running = server, threads

    def stop(self) -> None:
        """Stop at once and wait for the end of all threads. Calls in flight fail with UNAVAILABLE or CANCELLED."""
        if self._running is None:
            return
        server, threads = self._running
        ended = server.stop(None)
        held = not self.gate.is_set()
        self._stopping.set()
        self.gate.set()
        ended.wait()
        threads.shutdown()
        if held:
            self.gate.clear()
        self._running = None

    def wait_for_calls(self, count: int, method: str = "Extract", timeout: float = 60.0) -> None:
        """Wait until `count` calls of `method` in all have arrived. Raises TimeoutError."""

        def arrived() -> int:
            return sum(call.method == method for call in self.calls)

        with self._arrived:
            if not self._arrived.wait_for(lambda: arrived() >= count, timeout):
                raise TimeoutError(f"{arrived()} calls of {method} have arrived within {timeout} s, not {count}")

    def _arrive(self, method: str, message: Any, context: grpc.ServicerContext) -> ScriptedResult:
        """Record a call and return its scripted result."""
        metadata: dict[str, str | bytes] = dict(context.invocation_metadata())
        call = Call(method, message, metadata, context.time_remaining())
        script: Any = self.model_script if method == "GetModel" else self.script
        with self._arrived:
            self.calls.append(call)
            scripted: ScriptedResult = script.pop(0) if script else None
            self._arrived.notify_all()
        return scripted

    def _extract(
        self, request: pb.ExtractRequest, scripted: ScriptedResult, context: grpc.ServicerContext
    ) -> pb.ExtractResponse:
        self.gate.wait()
        if self.delay:
            self._stopping.wait(self.delay)
        if isinstance(scripted, Failure):
            raise scripted
        response = answer(request, self.model, self._projections, scripted or {})
        response.frontend = self._frontend(context)
        if self.edit is not None:
            self.edit(response)
        return response

    def _frontend(self, context: grpc.ServicerContext) -> int:
        """Return the frontend of a connection; connections are spread evenly over the frontends."""
        with self._arrived:
            return self._frontends.setdefault(context.peer(), len(self._frontends) % self.model.frontends)


class _Service(FeatureServiceServicer):
    """The RPC methods."""

    def __init__(self, server: FakeServer) -> None:
        self._server = server

    def Extract(self, request: pb.ExtractRequest, context: grpc.ServicerContext) -> pb.ExtractResponse:
        scripted = self._server._arrive("Extract", request, context)
        try:
            return self._server._extract(request, scripted, context)
        except (Failure, ServingError) as error:
            _abort(context, error)

    def ExtractStream(
        self, requests: Iterator[pb.ExtractStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ExtractStreamResponse]:
        """Answer in order, which is one of the orders that a real server may choose."""
        for message in requests:
            scripted = self._server._arrive("ExtractStream", message, context)
            answer = pb.ExtractStreamResponse(id=message.id)
            try:
                check_stream_request(message)
                answer.response.CopyFrom(self._server._extract(message.request, scripted, context))
            except (Failure, ServingError) as error:
                answer.error.CopyFrom(status_of(error))
            yield answer

    def GetModel(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> pb.GetModelResponse:
        scripted = self._server._arrive("GetModel", request, context)
        if isinstance(scripted, Failure):
            _abort(context, scripted)
        return message_of(self._server.model, self._server._frontend(context))


def _abort(context: grpc.ServicerContext, error: Failure | ServingError) -> NoReturn:
    status = Status.FromString(status_of(error).SerializeToString())
    context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort_with_status raises")

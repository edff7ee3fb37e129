"""The methods of dinov3_serving.v1.FeatureService, which take and return serialized messages."""

from __future__ import annotations

from dataclasses import dataclass, field

import grpc

from dinov3_server import __version__
from dinov3_server.api.access_log import AccessLog
from dinov3_server.api.budget import RequestMemory
from dinov3_server.api.credentials import BearerTokens
from dinov3_server.api.extraction import Extraction
from dinov3_server.api.interceptors import SERVICE, Context
from dinov3_server.api.peers import caller_of
from dinov3_server.api.receiving import Receiver
from dinov3_server.api.stream import Stream
from dinov3_server.api.tracing import Tracing
from dinov3_server.api.wire import parse
from dinov3_server.config.settings import Settings
from dinov3_server.engine.engine import Engine
from dinov3_server.errors import Unavailable
from dinov3_server.images.formats import DECODED
from dinov3_server.metrics import Metrics
from dinov3_serving.model import Limits
from dinov3_serving.presets import PRESETS
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.model import model_message


@dataclass
class FeatureService:
    """The service. Its methods raise ServingError; `interceptors.CallInterceptor` turns them into statuses."""

    engine: Engine
    extraction: Extraction
    receiver: Receiver
    settings: Settings
    metrics: Metrics
    tokens: BearerTokens | None
    access_log: AccessLog | None
    tracing: Tracing | None
    index: int  # of this frontend, of `frontends`
    frontends: int
    streams: set[Stream] = field(default_factory=set, init=False)  # the open ones
    _is_open: bool = field(default=True, init=False)

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Extract": grpc.unary_unary_rpc_method_handler(self.extract),
                "ExtractStream": grpc.stream_stream_rpc_method_handler(self.extract_stream),
                "GetModel": grpc.unary_unary_rpc_method_handler(self.get_model),
            },
        )

    def refuse_calls(self) -> None:
        """Refuse new calls, and stop reading messages of open streams."""
        self._is_open = False
        for stream in self.streams:
            stream.stop_reading()

    async def extract(
        self, data: bytes, context: Context, deadline: float | None, request_memory: RequestMemory
    ) -> bytes:
        self._check_open()
        request, resolve_bytes = parse(pb.ExtractRequest, data, self.settings.max_images_per_request)
        caller = caller_of(context, by_token=self.tokens is not None)
        extract = self.extraction.extract(request, deadline, caller, request_memory, resolve_bytes=resolve_bytes)
        del data, request, resolve_bytes  # so that the message is freed while the request waits for the device
        return await extract

    async def extract_stream(self, context: Context, call_id: str) -> None:
        self._check_open()
        caller = caller_of(context, by_token=self.tokens is not None)
        stream = Stream(
            context, self.extraction, self.receiver, self.metrics, self.settings, caller, call_id, self.access_log,
            self.tokens, self.tracing,
        )  # fmt: skip
        self.streams.add(stream)
        try:
            await stream.serve()
        finally:
            self.streams.discard(stream)

    async def get_model(
        self, data: bytes, context: Context, deadline: float | None, request_memory: RequestMemory
    ) -> bytes:
        self._check_open()
        parse(pb.GetModelRequest, data, 0)
        model, settings = self.extraction.model, self.settings
        limits = Limits(
            max_message_bytes=settings.max_message_bytes,
            max_images_per_request=settings.max_images_per_request,
            max_image_pixels=settings.max_image_pixels,
            max_image_tokens=settings.max_batch_tokens,
            stream_window=settings.stream_window,
        )
        return model_message(
            model,
            limits,
            devices=self.engine.devices,
            frontends=self.frontends,
            frontend=self.index,
            server_version=__version__,
            presets=PRESETS,
            image_formats=DECODED,
        ).SerializeToString()

    def _check_open(self) -> None:
        if not self._is_open:
            raise Unavailable("the server is shutting down: try again, or call another server", reason="draining")

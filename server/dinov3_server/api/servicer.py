"""The methods of dinov3_serving.v1.FeatureService, which take and return serialized messages."""

from __future__ import annotations

import grpc

from dinov3_server.api.budget import RequestMemory
from dinov3_server.api.caller import caller_of
from dinov3_server.api.credentials import Tokens
from dinov3_server.api.extraction import Extraction
from dinov3_server.api.interceptors import SERVICE, Context
from dinov3_server.api.receiving import Receiver
from dinov3_server.api.stream import Stream
from dinov3_server.api.wire import parse
from dinov3_server.config.settings import Settings
from dinov3_server.engine.engine import Engine
from dinov3_server.errors import Unavailable
from dinov3_server.metrics import Metrics
from dinov3_serving.model import Limits
from dinov3_serving.presets import PRESETS
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.model import model_message


class FeatureService:
    """The service. Its methods raise ServingError; `interceptors.CallInterceptor` turns them into statuses."""

    def __init__(
        self,
        engine: Engine,
        extraction: Extraction,
        receiver: Receiver,
        settings: Settings,
        metrics: Metrics,
        index: int,
        frontends: int,
        version: str,
        tokens: Tokens | None,
    ) -> None:
        self._engine = engine
        self._extraction = extraction
        self._receiver = receiver
        self._settings = settings
        self._metrics = metrics
        self._index = index
        self._frontends = frontends
        self._version = version
        self._tokens = tokens
        self._draining = False
        self._streams: set[Stream] = set()

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Extract": grpc.unary_unary_rpc_method_handler(self.extract),
                "ExtractStream": grpc.stream_stream_rpc_method_handler(self.extract_stream),
                "GetModel": grpc.unary_unary_rpc_method_handler(self.get_model),
            },
        )

    def drain(self) -> None:
        """Refuse new calls, and stop reading messages of open streams."""
        self._draining = True
        for stream in self._streams:
            stream.stop_reading()

    async def extract(
        self, data: bytes, context: Context, deadline: float | None, request_memory: RequestMemory
    ) -> bytes:
        self._check_open()
        request, resolve_bytes = parse(pb.ExtractRequest, data, self._settings.max_images_per_request)
        caller = caller_of(context, by_token=self._tokens is not None)
        extract = self._extraction.extract(request, deadline, caller, request_memory, resolve_bytes=resolve_bytes)
        del data, request, resolve_bytes  # so that the message is freed while the request waits for the device
        return await extract

    async def extract_stream(self, _: object, context: Context) -> None:
        self._check_open()
        caller = caller_of(context, by_token=self._tokens is not None)
        stream = Stream(context, self._extraction, self._receiver, self._metrics, self._settings, caller, self._tokens)
        self._streams.add(stream)
        try:
            await stream.serve()
        finally:
            self._streams.discard(stream)

    async def get_model(
        self, data: bytes, context: Context, deadline: float | None, request_memory: RequestMemory
    ) -> bytes:
        self._check_open()
        parse(pb.GetModelRequest, data, 0)
        model, settings = self._extraction.model, self._settings
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
            devices=self._engine.devices,
            frontends=self._frontends,
            frontend=self._index,
            server_version=self._version,
            presets=PRESETS,
        ).SerializeToString()

    def _check_open(self) -> None:
        if self._draining:
            raise Unavailable("the server is shutting down: try again, or call another server", reason="draining")

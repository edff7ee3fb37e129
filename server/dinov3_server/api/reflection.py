"""Serve gRPC reflection, as v1 and as v1alpha, which older clients use."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection, reflection_pb2

from dinov3_server.api.wire import parse_or_abort

# grpcio-reflection has v1alpha only. v1 is the same file in another package.
_V1ALPHA = reflection.SERVICE_NAME
_V1 = _V1ALPHA.replace("v1alpha", "v1")


class Reflection:
    """The reflection service, which describes `services` and itself."""

    def __init__(self, services: Sequence[str]) -> None:
        _add_v1_to_pool()
        self._servicer = reflection.aio.ReflectionServicer((*services, _V1, _V1ALPHA))

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        method: Any = grpc.stream_stream_rpc_method_handler(
            self._info, response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString
        )
        return tuple(
            grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": method})
            for service in (_V1, _V1ALPHA)
        )

    async def _info(self, messages: AsyncIterable[bytes], context: Any) -> AsyncIterator[Any]:
        async def requests() -> AsyncIterator[Any]:
            async for data in messages:
                yield await parse_or_abort(reflection_pb2.ServerReflectionRequest, data, context)

        async for answer in self._servicer.ServerReflectionInfo(requests(), context):
            yield answer


def _add_v1_to_pool() -> None:
    """Add the file of v1 to the descriptor pool, so that reflection describes itself. A second call does nothing."""
    v1alpha, v1 = FileDescriptorProto(), FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(v1alpha)
    text_format.Parse(text_format.MessageToString(v1alpha).replace("v1alpha", "v1"), v1)
    descriptor_pool.Default().Add(v1)

"""Serve gRPC reflection, as v1 and as v1alpha, which older clients use."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection, reflection_pb2

from dinov3_server.api.wire import parse

# grpcio-reflection has v1alpha only. v1 is the same file in another package.
_V1ALPHA = reflection.SERVICE_NAME
_V1 = _V1ALPHA.replace("v1alpha", "v1")


def reflection_handlers(services: Sequence[str]) -> list[grpc.GenericRpcHandler]:
    """Return the handlers of the reflection service, which describes `services` and itself."""
    _add_v1_to_pool()
    servicer = reflection.aio.ReflectionServicer((*services, _V1, _V1ALPHA))

    async def info(messages: AsyncIterable[bytes], context: Any) -> AsyncIterator[Any]:
        requests = (parse(reflection_pb2.ServerReflectionRequest, data, 0).message async for data in messages)
        async for answer in servicer.ServerReflectionInfo(requests, context):
            yield answer

    method: Any = grpc.stream_stream_rpc_method_handler(
        info, response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString
    )
    return [
        grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": method}) for service in (_V1, _V1ALPHA)
    ]


def _add_v1_to_pool() -> None:
    """Add the file of v1 to the descriptor pool, so that reflection describes itself. A second call does nothing."""
    v1alpha, v1 = FileDescriptorProto(), FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(v1alpha)
    text_format.Parse(text_format.MessageToString(v1alpha).replace("v1alpha", "v1"), v1)
    descriptor_pool.Default().Add(v1)

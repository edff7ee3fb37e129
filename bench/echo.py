"""A bare grpc.aio server: `python -m bench.echo NBYTES [tuned]` takes any bytes and answers NBYTES.

It measures the cost of grpcio itself. Requests arrive as `bytes` and are not looked at; an answer is one copy of
existing bytes (ours is one copy from the arena). One asyncio server, bytes in and out without protobuf, no interceptor.
With `tuned` its malloc keeps freed memory.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping

import grpc

from dinov3_server.malloc import keep_freed_memory

METHOD = "/dinov3_serving.v1.FeatureService/Extract"  # the same as ours, so that one load generator calls both
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


async def serve(answers: Mapping[str, Callable[[], bytes]]) -> None:
    """Serve the methods of the service that `answers` names until the process is ended."""

    def handler(answer: Callable[[], bytes]) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def call(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            return answer()

        return grpc.unary_unary_rpc_method_handler(call)

    server = grpc.aio.server(options=OPTIONS)
    handlers = {name: handler(answer) for name, answer in answers.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(METHOD.split("/")[1], handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"ready grpc=127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    if "tuned" in sys.argv[2:]:
        keep_freed_memory()
    content = memoryview(bytearray(int(sys.argv[1])))
    asyncio.run(serve({"Extract": lambda: bytes(content)}))

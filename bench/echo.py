"""A bare grpc.aio server: `python -m bench.echo NBYTES [tuned]` takes any bytes and answers NBYTES.

What grpcio itself costs, to compare ours with. Requests arrive as `bytes` and are not looked at; an answer is one copy
of bytes that are there already (ours is one copy out of the arena). One asyncio server, bytes in and out without
protobuf, no interceptor. With `tuned` its malloc keeps freed memory.
"""

from __future__ import annotations

import asyncio
import sys

import grpc

from dinov3_server.malloc import keep_freed_memory

METHOD = "/dinov3_serving.v1.FeatureService/Extract"  # ours, so that one load generator calls both
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


async def serve(nbytes: int) -> None:
    answer = memoryview(bytearray(nbytes))

    async def echo(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return bytes(answer)

    _, service, name = METHOD.split("/")
    server = grpc.aio.server(options=OPTIONS)
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {name: grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"ready grpc=127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    if "tuned" in sys.argv[2:]:
        keep_freed_memory()
    asyncio.run(serve(int(sys.argv[1])))

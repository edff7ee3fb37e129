"""The load generator of open loops, against a server that refuses every second request."""

from __future__ import annotations

import grpc

from bench.echo import METHOD
from bench.open_loop import Generator


async def test_an_open_loop_goes_on_when_requests_fail() -> None:
    async def extract(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        if data == b"bad":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        return b""

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(extract)
    service, _, method = METHOD[1:].partition("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    frontend_cpu = iter(range(10))
    generator = Generator(f"127.0.0.1:{port}", [b"good", b"bad"], lambda: float(next(frontend_cpu)))
    warm_up = await generator.open(rate=2000.0, deadline=0.05, seconds=0.0, seed=0)
    assert warm_up.codes == {}
    sent = await generator.open(rate=200.0, deadline=0.01, seconds=0.2, seed=0)
    assert sent.offered > 10
    assert set(sent.codes) <= {
        grpc.StatusCode.OK,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
    assert sent.usage.frontends == 1.0
    assert sent.usage.seconds > 0
    await generator.close()
    await server.stop(None)

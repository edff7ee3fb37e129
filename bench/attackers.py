"""What `bench bombs` throws at a server: each bomb is a coroutine of a Target, and counts its calls by outcome."""

from __future__ import annotations

import asyncio
import gzip
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
from PIL import Image

from attack.images import bomb as picture_bomb
from bench.echo import METHOD as EXTRACT
from bench.http2 import Call, Connection
from bench.requests import encoded, pixels_request, random_pixels
from dinov3_serving.v1 import feature_service_pb2 as pb

MB = 1 << 20
STREAM = "/dinov3_serving.v1.FeatureService/ExtractStream"
WATCH = "/grpc.health.v1.Health/Watch"
TOKEN = {"authorization": "Bearer bomb"}
MAX_MESSAGE_BYTES = 128 * MB
# Connections, or calls over one connection, of a bomb that says no other number.
CALLERS = 40
# Calls of a bomb of many calls. A frontend accepts 4096 connections.
MANY = 4096
# How long a bomb holds open what it has opened.
HOLD_SECONDS = 5.0


@dataclass(frozen=True)
class Target:
    """The addresses HOST:PORT of a server, and the depth of its model."""

    grpc: str
    http: str
    depth: int


Bomb = Callable[[Target], Awaitable[Counter[str]]]


async def _calls(target: Target, requests: Iterable[bytes], connections: int = 4) -> Counter[str]:
    """Send each request in a call of its own, all at once, with gRPC's own client."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(target.grpc, options=options) for _ in range(connections)]

    async def one(index: int, request: bytes) -> str:
        extract: Any = channels[index % connections].unary_unary(EXTRACT)
        code: grpc.StatusCode = await extract(request, metadata=tuple(TOKEN.items()), timeout=60).code()
        return code.name

    codes = Counter(await asyncio.gather(*(one(*numbered) for numbered in enumerate(requests))))
    for channel in channels:
        await channel.close()
    return codes


async def _hold(
    target: Target,
    method: str,
    metadata: Mapping[str, str],
    act: Callable[[Call], Awaitable[None]],
    connections: int = CALLERS,
    calls: int = 1,
    seconds: float = HOLD_SECONDS,
) -> Counter[str]:
    """Make `calls` calls over each connection, `act` on each, hold all open for `seconds`, and count those that were
    ended."""

    async def one() -> Counter[str]:
        try:
            connection = await Connection.open(target.grpc)
        except OSError:
            return Counter({"refused": calls})
        made = []
        for _ in range(calls):
            made.append(connection.call(method, metadata))
            await connection.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.gather(*map(act, made))
        await asyncio.sleep(seconds)
        counts = Counter("ended" if call.ended.is_set() else "held" for call in made)
        await connection.leave()
        return counts

    return sum(await asyncio.gather(*(one() for _ in range(connections))), Counter())


async def _nothing(call: Call) -> None:
    pass


async def _compressed(target: Target, metadata: Mapping[str, str]) -> Counter[str]:
    """Send messages of 130 KB that unpack to 127 MiB."""
    packed = gzip.compress(bytes(127 * MB))
    return await _hold(
        target, EXTRACT, {"grpc-encoding": "gzip", **metadata}, lambda call: call.send(packed, compressed=True)
    )


async def _incomplete(
    target: Target, method: str, metadata: Mapping[str, str], nbytes: int, connections: int = CALLERS, calls: int = 1
) -> Counter[str]:
    """Send messages without their last bytes."""
    sent = bytes(nbytes)
    return await _hold(
        target, method, metadata, lambda call: call.send(sent, announced=MAX_MESSAGE_BYTES), connections, calls
    )


async def _unread(target: Target) -> Counter[str]:
    """Send requests with answers of some 60 MB, and read nothing."""
    request = pixels_request(random_pixels(8, 224), _all_layers(target))
    return await _hold(target, EXTRACT, TOKEN, lambda call: call.send(request), seconds=2 * HOLD_SECONDS)


async def _unread_streams(target: Target) -> Counter[str]:
    """Send 32 messages over each of 8 streams on each of 8 connections, and read no answer (3 MB each)."""

    async def act(call: Call) -> None:
        for number in range(32):
            request = pb.ExtractRequest.FromString(pixels_request(random_pixels(8, 224), _patches()))
            message = pb.ExtractStreamRequest(id=number, request=request)
            await call.send(message.SerializeToString(), last=False)

    return await _hold(target, STREAM, TOKEN, act, connections=8, calls=8)


async def _unread_small(target: Target) -> Counter[str]:
    """Read none of 4096 answers of 0.6 MB."""
    request = pixels_request(random_pixels(1, 16), _pooled(20, 20))
    return await _hold(target, EXTRACT, TOKEN, lambda call: call.send(request), connections=16, calls=MANY // 16)


async def _pictures(target: Target, file: bytes) -> Counter[str]:
    return await _calls(target, [_files([file] * 4)] * CALLERS)


async def _any_pictures(target: Target) -> Counter[str]:
    """Send 400 expensive files, of all formats."""
    drawn = random.Random(0)
    return await _calls(target, [_files([picture_bomb(drawn)]) for _ in range(10 * CALLERS)])


async def _headers(target: Target) -> Counter[str]:
    """Make calls with 8 KB of headers each, and send no message."""
    return await _hold(
        target, EXTRACT, {**TOKEN, "x-filler": "x" * 7500}, _nothing, connections=CALLERS, calls=MANY // CALLERS
    )


async def _resets(target: Target) -> Counter[str]:
    """Make calls, and leave each at once."""

    async def act(call: Call) -> None:
        call.reset()

    return await _hold(target, EXTRACT, TOKEN, act, connections=4, calls=10 * MANY // 4)


async def _watches(target: Target) -> Counter[str]:
    """Watch the server's health, without a token, in many calls over few connections."""
    return await _hold(target, WATCH, {}, lambda call: call.send(b"", last=True), connections=8, calls=10 * MANY // 8)


async def _silent_streams(target: Target) -> Counter[str]:
    """Open many streams, and send nothing."""
    return await _hold(target, STREAM, TOKEN, _nothing, connections=8, calls=10 * MANY // 8)


async def _connections(target: Target) -> Counter[str]:
    """Open as many connections as two frontends accept, with a call on each."""
    return await _hold(target, EXTRACT, TOKEN, lambda call: call.send(b"\n", announced=9), connections=2 * MANY)


async def _http(target: Target) -> Counter[str]:
    """Open connections to the HTTP port, and send half a request."""

    async def one() -> str:
        try:
            reader, writer = await asyncio.open_connection(*target.http.rsplit(":", 1))
            writer.write(b"GET /metrics HTTP/1.1\r\n" + b"x: " + b"y" * 8000)
            await asyncio.wait_for(reader.read(1), HOLD_SECONDS)
            writer.close()
            return "ended"
        except OSError:
            return "ended"
        except TimeoutError:
            return "held"

    return Counter(await asyncio.gather(*(one() for _ in range(1000))))


async def _poolings(target: Target) -> Counter[str]:
    """Request answers of 50 MB from 1.5 KB."""
    return await _calls(target, [pixels_request(random_pixels(2, 16), _pooled(128, 128))] * CALLERS)


async def _many_poolings(target: Target) -> Counter[str]:
    """Request another large pooling in each call, so that a batch has one for each of its rows."""
    grids = [(128 - number // 16, 128 - number % 16) for number in range(2 * CALLERS)]
    pixels = random_pixels(1, 16)
    return await _calls(
        target,
        [pixels_request(pixels, _pooled(*grid, pb.DATA_TYPE_INT8, pb.POOLING_METHOD_BILINEAR)) for grid in grids],
    )


async def _deep_poolings(target: Target) -> Counter[str]:
    """Request large poolings of every layer, in int8."""
    outputs = _all_layers(target, pb.DATA_TYPE_INT8)
    outputs.pooling.CopyFrom(pb.Pooling(grid_height=128, grid_width=128))
    return await _calls(target, [pixels_request(random_pixels(1, 16), outputs)] * CALLERS)


async def _largest_batches(target: Target) -> Counter[str]:
    """Request every layer of 15 images of 512 px, which are a batch of nearly 16,384 tokens."""
    outputs = _all_layers(target, pb.DATA_TYPE_INT8)
    return await _calls(target, [pixels_request(random_pixels(15, 512), outputs)] * 4)


async def _views(target: Target) -> Counter[str]:
    """Send one picture of 64 megapixels with 512 views of it in each request."""
    file = encoded(Image.new("RGB", (8000, 8000)), "JPEG")
    views = [pb.View(crop=pb.Box(height=8000, width=8000), size=pb.Size(height=96, width=96))] * 512
    request = pb.ExtractRequest(images=[pb.Image(encoded=file, views=views)], outputs=pb.Outputs(cls=True))
    return await _calls(target, [request.SerializeToString()] * 8)


def _files(files: list[bytes]) -> bytes:
    return pb.ExtractRequest(images=[pb.Image(encoded=file) for file in files]).SerializeToString()


def _patches() -> pb.Outputs:
    return pb.Outputs(cls=True, patches=True, dtype=pb.DATA_TYPE_FLOAT32)


def _all_layers(target: Target, dtype: pb.DataType = pb.DATA_TYPE_FLOAT32) -> pb.Outputs:
    outputs = pb.Outputs(cls=True, patches=True, dtype=dtype)
    outputs.layers.extend(pb.LayerOutputs(layer=layer, patches=True) for layer in range(target.depth))
    return outputs


def _pooled(
    height: int,
    width: int,
    dtype: pb.DataType = pb.DATA_TYPE_FLOAT32,
    method: pb.PoolingMethod = pb.POOLING_METHOD_AREA,
) -> pb.Outputs:
    outputs = pb.Outputs(patches=True, dtype=dtype)
    outputs.pooling.CopyFrom(pb.Pooling(grid_height=height, grid_width=width, method=method))
    return outputs


async def _together(target: Target) -> Counter[str]:
    """Fill what gRPC holds, the budget of answers and the budget of pictures at the same time."""
    bombs = ("held open, 1 MB in each of 4096", "answers not read", "1-bit PNG, 9,900 x 9,900")
    counts = await asyncio.gather(*(BOMBS[name](target) for name in bombs))
    return sum(counts, Counter[str]())


BOMBS: dict[str, Bomb] = {
    "gzip, no token": lambda target: _compressed(target, {}),
    "held open, no token": lambda target: _incomplete(target, EXTRACT, {}, 100 * MB),
    "gzip": lambda target: _compressed(target, TOKEN),
    "held open": lambda target: _incomplete(target, EXTRACT, TOKEN, 100 * MB),
    "held open, 1 MB in each of 4096": lambda target: _incomplete(target, STREAM, TOKEN, MB, 16, MANY // 16),
    "answers not read": _unread,
    "answers not read, streams": _unread_streams,
    "answers not read, 4096 small ones": _unread_small,
    "held open, not read and pictures": _together,
    "1-bit PNG, 9,900 x 9,900": lambda target: _pictures(target, encoded(Image.new("1", (9900, 9900)), "PNG")),
    "WebP, 9,900 x 9,900": lambda target: _pictures(target, encoded(Image.new("RGB", (9900, 9900)), "WEBP")),
    "expensive files": _any_pictures,
    "views": _views,
    "poolings to 128 x 128": _poolings,
    "80 different poolings": _many_poolings,
    "poolings of every layer": _deep_poolings,
    "largest batches": _largest_batches,
    "90 MB of empty images": lambda target: _calls(target, [b"\n\x00" * (45 * MB)] * CALLERS),
    "90 MB of unknown fields": lambda target: _calls(target, [b"\xf8\x7f\x00" * (30 * MB)] * CALLERS),
    "headers": _headers,
    "resets": _resets,
    "health watched, no token": _watches,
    "silent streams": _silent_streams,
    "connections": _connections,
    "HTTP connections": _http,
}

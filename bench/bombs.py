"""What callers can make the server's memory, beside the formula of docs/deployment.md.

The whole server (default limits, one frontend, a token file, the instant runner of bench/instant.py) meets one bomb
after the other: compressed messages and messages that are held open without a token, the same with one, answers that
are not read, small files that are large pictures, poolings that are large answers, 90 MB of empty images or unknown
fields. The PSS of all its processes is read 20 times a second, from the start of a bomb until 12 s after its end;
`peak_mb` is the most, `after_mb` the last. `lag_ms` is the longest delay of the frontend's event loop, as the upper
bound of its bucket (dinov3_event_loop_lag_seconds). `answers` are by status. The formula leaves the worker out, whose
idle PSS (`worker_mb`) is added to it.
"""

from __future__ import annotations

import asyncio
import gzip
import tempfile
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import psutil
from PIL import Image

from bench.echo import METHOD
from bench.http2 import Caller
from bench.record import table
from bench.requests import encoded, pixels_request, random_pixels
from bench.server import Server, pss, quantile_ms, serving, total_pss
from dinov3_serving.v1 import feature_service_pb2 as pb

MB = 1 << 20
TOKEN = {"authorization": "Bearer secret"}
# The defaults of arena_bytes, frontend_bytes, max_message_bytes; docs/deployment.md has the rest.
ARENA, FRONTEND, MESSAGE, OWN, SUPERVISOR = 512, 1024, 128, 192, 64
FORMULA = ARENA + FRONTEND + 2 * MESSAGE + OWN + SUPERVISOR
CALLERS = 40
# After a bomb: what is held open is held so for this long, and then all is left alone for as long.
HOLD_SECONDS = 6.0
_Bomb = Callable[[str], Awaitable[Counter[str]]]


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        tokens.write_text("secret\n")
        flags = ("--model", "vitb16", "--weights", "random:0", "--frontends", "1", "--token-file", str(tokens))
        with serving(*flags, module="bench.instant") as server:
            worker = sum(pss(process.pid) for process in server.processes()["worker"])
            rows = [_throw(server, name, bomb) for name, bomb in BOMBS.items()]
    formula = FORMULA + worker // MB
    return {"formula_mb": formula, "worker_mb": worker // MB, "peak_mb": max(r["peak_mb"] for r in rows), "rows": rows}


def show(result: dict[str, Any]) -> str:
    head = f"formula {result['formula_mb']} MB, peak {result['peak_mb']} MB"
    return f"{head}\n{table(result['rows'], 'bomb', 'before_mb', 'peak_mb', 'after_mb', 'lag_ms', 'answers')}"


class _Sampler:
    """Measures the PSS of a server's processes 20 times a second."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._end = threading.Event()
        self.first = self.last = self.peak = self._read()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._end.set()
        self._thread.join()

    def _read(self) -> int:
        return total_pss(self._process)

    def _run(self) -> None:
        while not self._end.wait(0.05):
            self.last = self._read()
            self.peak = max(self.peak, self.last)


def _throw(server: Server, name: str, bomb: _Bomb) -> dict[str, Any]:
    async def throw() -> Counter[str]:
        answers = await bomb(server.grpc)
        await asyncio.sleep(2 * HOLD_SECONDS)
        return answers

    sampler, before = _Sampler(server.process), server.metrics()
    answers = asyncio.run(throw())
    sampler.end()
    grown = {key: value - before.get(key, 0.0) for key, value in server.metrics().items()}
    row = {
        "bomb": name,
        "before_mb": sampler.first // MB,
        "peak_mb": sampler.peak // MB,
        "after_mb": sampler.last // MB,
        "lag_ms": quantile_ms(grown, "dinov3_event_loop_lag_seconds", 1.0),
        "answers": " ".join(f"{code}:{count}" for code, count in sorted(answers.items())),
    }
    print(row, flush=True)
    return row


async def _calls(address: str, request: bytes) -> Counter[str]:
    """Make CALLERS calls at once over one connection, with gRPC's own client."""
    async with grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        extract: Any = channel.unary_unary(METHOD)

        async def one() -> str:
            call = extract(request, metadata=tuple(TOKEN.items()), timeout=60)
            code: grpc.StatusCode = await call.code()
            return code.name

        return Counter(await asyncio.gather(*(one() for _ in range(CALLERS))))


async def _hold(address: str, metadata: dict[str, str], seconds: float, *message: Any, **options: Any) -> Counter[str]:
    """Send a message over each of CALLERS connections, hold them open for `seconds`, and count those that were
    ended."""

    async def one() -> str:
        caller = await Caller.call(address, METHOD, metadata)
        await caller.send(*message, **options)
        await asyncio.sleep(seconds)
        ended = caller.status.is_set()
        await caller.leave()
        return "ended" if ended else "held"

    return Counter(await asyncio.gather(*(one() for _ in range(CALLERS))))


async def _compressed(address: str, metadata: dict[str, str]) -> Counter[str]:
    """Send messages of 130 KB that unpack to 127 MiB."""
    bomb = gzip.compress(bytes(127 * MB))
    return await _hold(address, {"grpc-encoding": "gzip", **metadata}, HOLD_SECONDS, bomb, compressed=True)


async def _held_open(address: str, metadata: dict[str, str]) -> Counter[str]:
    """Send messages without their last bytes."""
    return await _hold(address, metadata, HOLD_SECONDS, bytes(100 * MB), announced=MESSAGE * MB)


async def _unread(address: str) -> Counter[str]:
    """Send requests with answers of some 60 MB, and read nothing."""
    outputs = pb.Outputs(cls=True, patches=True, dtype=pb.DATA_TYPE_FLOAT32)
    outputs.layers.extend(pb.LayerOutputs(layer=layer, patches=True) for layer in range(12))
    return await _hold(address, TOKEN, 2 * HOLD_SECONDS, pixels_request(random_pixels(8, 224), outputs))


async def _pictures(address: str, file: bytes) -> Counter[str]:
    request = pb.ExtractRequest(images=[pb.Image(encoded=file)] * 4).SerializeToString()
    return await _calls(address, request)


async def _poolings(address: str) -> Counter[str]:
    outputs = pb.Outputs(patches=True, dtype=pb.DATA_TYPE_FLOAT32)
    outputs.pooling.CopyFrom(pb.Pooling(grid_height=128, grid_width=128))
    return await _calls(address, pixels_request(random_pixels(2, 16), outputs))


BOMBS: dict[str, _Bomb] = {
    "gzip, no token": lambda address: _compressed(address, {}),
    "held open, no token": lambda address: _held_open(address, {}),
    "gzip": lambda address: _compressed(address, TOKEN),
    "held open": lambda address: _held_open(address, TOKEN),
    "answers not read": _unread,
    "1-bit PNG, 9,900 x 9,900": lambda address: _pictures(address, encoded(Image.new("1", (9900, 9900)), "PNG")),
    "WebP, 9,900 x 9,900": lambda address: _pictures(address, encoded(Image.new("RGB", (9900, 9900)), "WEBP")),
    "poolings to 128 x 128": _poolings,
    "90 MB of empty images": lambda address: _calls(address, b"\n\x00" * (45 * MB)),
    "90 MB of unknown fields": lambda address: _calls(address, b"\xf8\x7f\x00" * (30 * MB)),
}

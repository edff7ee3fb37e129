"""The part of HTTP/2 (RFC 9113, 7541) for a misbehaving caller: it sends half a message, or never reads an answer."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Mapping

DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 4, 6, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4  # a setting
_FRAME_BYTES = 16384


class Caller:
    """One connection with one call. Its window for answers is zero bytes, so it receives nothing of an answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._windows = [65535, 65535]  # of the connection, and of the stream
        self._initial = 65535
        self._more = asyncio.Event()
        self.status = asyncio.Event()  # trailers have come, or the connection has ended
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def call(cls, address: str, method: str, metadata: Mapping[str, str]) -> Caller:
        """Connect to HOST:PORT and send the headers of a call."""
        caller = cls(*await asyncio.open_connection(*address.rsplit(":", 1)))
        fields = {
            ":method": "POST", ":scheme": "http", ":path": method, ":authority": "bench", "te": "trailers",
            "content-type": "application/grpc", **metadata,
        }  # fmt: skip
        packed = b"".join(
            b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
            for name, value in fields.items()
        )
        caller._writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        caller._writer.write(_frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0)))
        caller._writer.write(_frame(HEADERS, END_HEADERS, 1, packed))
        return caller

    async def send(self, message: bytes, announced: int = 0, compressed: bool = False) -> None:
        """Send `message`, announced as `announced` bytes (by default its length). Return at its end or that of the
        call."""
        data = struct.pack(">?I", compressed, announced or len(message)) + message
        view, sent = memoryview(data), 0
        while sent < len(data) and not self.status.is_set():
            size = min(*self._windows, _FRAME_BYTES, len(data) - sent)
            if size <= 0:
                self._more.clear()
                await self._more.wait()
                continue
            self._windows = [window - size for window in self._windows]
            last = sent + size == len(data) and not announced
            self._writer.write(_frame(DATA, END_STREAM if last else 0, 1, bytes(view[sent : sent + size])))
            sent += size
            try:
                await self._writer.drain()
            except OSError:
                self.status.set()

    async def leave(self) -> None:
        """Close the connection."""
        self._reading.cancel()
        self._writer.close()

    async def _read(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                frame_type, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
                if frame_type == WINDOW_UPDATE:
                    self._windows[stream] += int.from_bytes(payload, "big")
                elif frame_type == SETTINGS and not flags & ACK:
                    initial = dict(struct.iter_unpack(">HI", payload)).get(INITIAL_WINDOW_SIZE, self._initial)
                    self._windows[1] += initial - self._initial
                    self._initial = initial
                    self._writer.write(_frame(SETTINGS, ACK, 0))
                elif frame_type == PING and not flags & ACK:
                    self._writer.write(_frame(PING, ACK, 0, payload))
                elif frame_type == HEADERS and flags & END_STREAM:
                    self.status.set()
                self._more.set()
        except (OSError, asyncio.IncompleteReadError):
            self.status.set()
            self._more.set()


def _frame(frame_type: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", frame_type, flags, stream) + payload

"""The part of HTTP/2 (RFC 9113, 7541) for a misbehaving caller: it sends half a message, or never reads an answer."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Mapping
from contextlib import suppress

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4  # a setting
_FRAME_BYTES = 16384
_DEFAULT_WINDOW = 65535
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Connection:
    """One connection with any number of calls. Its windows for answers are zero bytes: it receives only headers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._window = self._initial = _DEFAULT_WINDOW
        self._calls: dict[int, Call] = {}
        self.more = asyncio.Event()  # a window may have grown, or a call has ended
        self.ended = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, address: str) -> Connection:
        """Connect to HOST:PORT."""
        connection = cls(*await asyncio.open_connection(*address.rsplit(":", 1)))
        connection.write(_PREFACE + _frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0)))
        return connection

    def call(self, method: str, metadata: Mapping[str, str]) -> Call:
        """Send the headers of a call."""
        fields = {
            ":method": "POST", ":scheme": "http", ":path": method, ":authority": "bench", "te": "trailers",
            "content-type": "application/grpc", **metadata,
        }  # fmt: skip
        packed = b"".join(b"\0" + _string(name) + _string(value) for name, value in fields.items())
        call = Call(self, 2 * len(self._calls) + 1, self._initial)
        self._calls[call.stream] = call
        self.write(_frame(HEADERS, END_HEADERS, call.stream, packed))
        if self.ended.is_set():
            call.ended.set()
        return call

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    async def drain(self) -> None:
        """Wait until the transport takes more."""
        try:
            await self._writer.drain()
        except OSError:
            self._end()

    def take(self, most: int) -> int:
        """Take at most `most` bytes of the connection's window."""
        taken = min(self._window, most)
        self._window -= taken
        return taken

    async def leave(self) -> None:
        """Close the connection."""
        self._reading.cancel()
        self._writer.close()

    async def _read(self) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                self._receive(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
                self.more.set()
        self._end()

    def _receive(self, frame_type: int, flags: int, stream: int, payload: bytes) -> None:
        call = self._calls.get(stream)
        if frame_type == WINDOW_UPDATE and not stream:
            self._window += int.from_bytes(payload, "big")
        elif frame_type == WINDOW_UPDATE and call:
            call.window += int.from_bytes(payload, "big")
        elif frame_type == SETTINGS and not flags & ACK:
            initial = dict(struct.iter_unpack(">HI", payload)).get(INITIAL_WINDOW_SIZE, self._initial)
            for each in self._calls.values():
                each.window += initial - self._initial
            self._initial = initial
            self.write(_frame(SETTINGS, ACK, 0))
        elif frame_type == PING and not flags & ACK:
            self.write(_frame(PING, ACK, 0, payload))
        elif call and (frame_type == RST_STREAM or (frame_type == HEADERS and flags & END_STREAM)):
            call.ended.set()

    def _end(self) -> None:
        self.ended.set()
        for call in self._calls.values():
            call.ended.set()
        self.more.set()


class Call:
    """One call. `ended` is set when its trailers have come, or the connection has ended."""

    def __init__(self, connection: Connection, stream: int, window: int) -> None:
        self._connection = connection
        self.stream = stream
        self.window = window
        self.ended = asyncio.Event()

    async def send(self, message: bytes, announced: int = 0, compressed: bool = False, last: bool = True) -> None:
        """Send `message`, announced as `announced` bytes (by default its length), as the `last` one of the call unless
        it is incomplete. Return at its end or that of the call."""
        data = struct.pack(">?I", compressed, announced or len(message)) + message
        view, sent = memoryview(data), 0
        while sent < len(data) and not self.ended.is_set():
            size = min(self.window, _FRAME_BYTES, len(data) - sent)
            size = self._connection.take(size) if size > 0 else 0
            if not size:
                self._connection.more.clear()
                await self._connection.more.wait()
                continue
            self.window -= size
            ends = last and not announced and sent + size == len(data)
            self._connection.write(
                _frame(DATA, END_STREAM if ends else 0, self.stream, bytes(view[sent : sent + size]))
            )
            sent += size
            await self._connection.drain()

    def reset(self) -> None:
        """End the call, as a caller that leaves."""
        self._connection.write(_frame(RST_STREAM, 0, self.stream, struct.pack(">I", 8)))


def _string(text: str) -> bytes:
    """Return a string literal without Huffman coding (RFC 7541, 5.1 and 5.2)."""
    data, rest = text.encode(), len(text.encode()) - 127
    if rest < 0:
        return bytes([len(data)]) + data
    length = bytearray([127])
    while rest >= 128:
        length.append(rest % 128 + 128)
        rest //= 128
    return bytes([*length, rest]) + data


def _frame(frame_type: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", frame_type, flags, stream) + payload

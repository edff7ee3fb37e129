"""Send control messages, with file descriptors if needed, between the server's own processes.

A frame is `<IH` (length of the body, number of descriptors) and a pickled message; descriptors are passed as SCM_RIGHTS
with the frame's first byte. Pickle is safe here and only here: both ends are processes of one supervisor, over an
unnamed socket pair.

A channel never blocks, so it works with a selector loop (worker, supervisor) and with asyncio (frontend). `send`
queues, `flush` writes what the socket takes: a loop that flushes once per iteration sends all its messages in one
system call.
"""

from __future__ import annotations

import array
import errno
import os
import pickle
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

_HEADER = struct.Struct("<IH")
_READ = 1 << 18
_MAX_FDS = 16
# As an int, because `&` of enumeration members is slow.
_TRUNCATED = int(socket.MSG_CTRUNC)
# Errors of sending that may pass: no room, no memory, too many descriptors in flight.
_TRY_LATER = {errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS}


class ChannelClosed(Exception):
    """The peer has closed its end, and everything that it sent has been received."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets, with buffers that hold the control messages of a long batch."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    return ends


class Channel:
    """One end of a socket pair."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._in = bytearray()
        self._in_fds: deque[int] = deque()
        self._out: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._tail = bytearray()  # frames without descriptors, coalesced until the next flush

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Queue `message`. Descriptors are duplicated, so the caller may close its own at once."""
        body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        frame = _HEADER.pack(len(body), len(fds)) + body
        if fds:
            self._seal()
            self._out.append((memoryview(frame), tuple(os.dup(fd) for fd in fds)))
        else:
            self._tail += frame

    def flush(self) -> bool:
        """Write what the socket takes now, and return whether nothing is left. For a dead peer, discard everything."""
        self._seal()
        while self._out:
            data, fds = self._out[0]
            try:
                if fds:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                    written = self._socket.sendmsg([data], rights)
                    _close(fds)
                else:
                    written = self._socket.send(data)
            except (BrokenPipeError, ConnectionResetError):
                self._discard()  # `receive` reports the end, after the messages that are still unread
                return True
            except OSError as error:
                if error.errno in _TRY_LATER:
                    return False
                raise
            if written == len(data):
                self._out.popleft()
            else:
                self._out[0] = (data[written:], ())
        return True

    def flush_within(self, seconds: float) -> bool:
        """Flush, and wait at most `seconds` for a peer that does not read."""
        limit = time.monotonic() + seconds
        while not self.flush():
            left = limit - time.monotonic()
            if left <= 0:
                return False
            poll = select.poll()
            poll.register(self._socket, select.POLLOUT)
            poll.poll(left * 1000)
        return True

    def receive(self) -> list[tuple[Any, list[int]]]:
        """Return all complete messages that have arrived, each with its descriptors, which the caller must close.

        A descriptor is -1 if this process has reached its limit of open descriptors.

        Raises:
            ChannelClosed: the peer has closed its end and nothing is left to read.
        """
        closed = False
        while not closed:
            try:
                data, rights, flags, _ = self._socket.recvmsg(
                    _READ, socket.CMSG_SPACE(_MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                break
            except ConnectionResetError:
                data, rights, flags = b"", [], 0
            for level, kind, payload in rights:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    received = array.array("i")
                    received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                    self._in_fds.extend(received)
            truncated = flags & _TRUNCATED
            if truncated:  # a read returns at most one frame with descriptors, and each such frame has one
                self._in_fds.append(-1)
            closed = not data
            self._in += data
            if len(data) < _READ and not rights and not truncated:
                break
        messages = self._parse()
        if closed and not messages:
            raise ChannelClosed
        return messages

    def close(self) -> None:
        """Close the socket, and all descriptors that were not sent or not returned."""
        self._socket.close()
        self._discard()
        _close(self._in_fds)
        self._in_fds.clear()

    def _discard(self) -> None:
        for _, fds in self._out:
            _close(fds)
        self._out.clear()

    def _seal(self) -> None:
        """Turn the coalesced frames into one item of the output queue."""
        if self._tail:
            self._out.append((memoryview(bytes(self._tail)), ()))
            self._tail.clear()

    def _parse(self) -> list[tuple[Any, list[int]]]:
        """Take the complete messages out of the input buffer."""
        messages = []
        start = 0
        while len(self._in) - start >= _HEADER.size:
            length, fds = _HEADER.unpack_from(self._in, start)
            end = start + _HEADER.size + length
            if len(self._in) < end:
                break
            with memoryview(self._in) as view:
                message = pickle.loads(view[start + _HEADER.size : end])
            messages.append((message, [self._in_fds.popleft() for _ in range(fds)]))
            start = end
        del self._in[:start]
        return messages


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)

"""A pool of decode processes for a frontend's event loop, for files that are not plain (`images/cost.py`).

Processes start on demand, end when idle, and can be killed at any time. A process decodes and transforms, and its rows
are received directly into their target buffers. After `write` has returned or raised, nothing writes there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from dinov3_server.errors import InvalidInput, Unavailable
from dinov3_server.images import decode_process
from dinov3_server.images.cost import Cost
from dinov3_server.images.decode import File
from dinov3_server.images.decode_process import Job, pack
from dinov3_server.images.formats import describe
from dinov3_server.signals import blocked_in_children
from dinov3_serving.images import RowSpec

log = logging.getLogger(__name__)

# An idle process ends after this time. A new one is ready within 0.2 s.
IDLE_SECONDS = 30.0
# Processor time allowed for each row.
_SECONDS_PER_ROW = 1
_MAX_MESSAGE_BYTES = 1 << 16


class Decoders:
    """A pool of decode processes. Create it in the event loop; hold one of the `most` `slots` around each call."""

    def __init__(self, most: int) -> None:
        self.slots = asyncio.Semaphore(most)
        self._idle: list[tuple[_Process, asyncio.TimerHandle]] = []

    def close(self) -> None:
        """End all processes. Call it when no call is in progress."""
        for process, timer in self._idle:
            timer.cancel()
            process.kill()
            process.reap()
        self._idle.clear()

    async def read_size(self, file: File, cost: Cost) -> tuple[int, int]:
        """Return (height, width) like `decode.read_size`. Raises like `write`."""
        height, width = await self._request(file, cost, [], ())
        return height, width

    async def write(self, file: File, cost: Cost, rows: Sequence[RowSpec], outs: Sequence[memoryview]) -> None:
        """Decode a file and write its `rows` into `outs`.

        Raises InvalidInput for a fault of the file or a row, if decoding takes more memory or time than `cost` allows,
        and if the file crashes the decoder; Unavailable if no process can be started.
        """
        if rows:
            await self._request(file, cost, rows, outs)

    async def _request(self, file: File, cost: Cost, rows: Sequence[RowSpec], outs: Sequence[memoryview]) -> list[int]:
        seconds = cost.seconds + _SECONDS_PER_ROW * len(outs)
        # Without shapes: their pickles are for processes of the engine (engine/messages.py).
        unshaped = [row._replace(shape=None) for row in rows]
        job = Job(file._replace(data=b""), len(file.data), unshaped, cost.nbytes, seconds)
        for last in (False, True):
            process = await self._take()
            try:
                answer = await process.do(job, file.data, outs)
            except (OSError, EOFError):
                code = await process.end()
                if code == -signal.SIGXCPU:
                    raise InvalidInput(
                        f"{describe(file.data)} takes more than {seconds} s of processor time to decode, "
                        "too much for its size"
                    ) from None
                how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                log.warning("a decode process died (%s) while decoding %s", how, describe(file.data))
                if last:  # the first one may have been killed from outside
                    raise InvalidInput(
                        f"{describe(file.data)} cannot be decoded: it crashes decoders ({how})"
                    ) from None
            except BaseException:
                await process.end()
                raise
            else:
                self._put_back(process)
                if "error" in answer:
                    raise InvalidInput(answer["error"], field=answer["field"])
                return list(answer.get("size", ()))
        raise AssertionError("the second attempt returns or raises")

    async def _take(self) -> _Process:
        if self._idle:
            process, timer = self._idle.pop()
            timer.cancel()
            return process
        try:
            process = _Process()
        except OSError as error:  # no descriptors, processes or memory
            raise Unavailable(f"no decode process can be started: {error.strerror}", reason="decoder") from None
        try:
            await process.receive_message()
        except (OSError, EOFError):
            code = await process.end()
            log.error("a decode process ended with status %d before it was ready", code)
            raise Unavailable("no decode process can be started; the log has the cause", reason="decoder") from None
        except BaseException:
            await process.end()
            raise
        return process

    def _put_back(self, process: _Process) -> None:
        def end() -> None:
            self._idle.remove((process, timer))
            process.kill()

        timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, end)
        self._idle.append((process, timer))


class _Process:
    """One decode process and its socket."""

    def __init__(self) -> None:
        """Start the process. Raises OSError."""
        self._loop = asyncio.get_running_loop()
        self._socket, theirs = socket.socketpair()
        with theirs, blocked_in_children():
            try:
                # In the main thread, which runs the event loop: the process dies with the thread that started it.
                self._process = subprocess.Popen(
                    [sys.executable, "-m", decode_process.__name__, str(theirs.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=sys.stderr,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                    # Return large blocks to the system once freed; numpy needs no threads here.
                    env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "OPENBLAS_NUM_THREADS": "1"},
                )
            except BaseException:
                self._socket.close()
                raise
        self._socket.setblocking(False)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self.reap)

    async def do(self, job: Job, data: bytes | memoryview, outs: Sequence[memoryview]) -> dict[str, Any]:
        """Run a job and return the last message of its answer.

        Raises OSError or EOFError if the process has ended or sends anything unexpected.
        """
        await self._loop.sock_sendall(self._socket, pack(pickle.dumps(tuple(job))))
        await self._loop.sock_sendall(self._socket, data)
        answer: dict[str, Any] = {}
        if not outs:
            return await self.receive_message()
        for out in outs:
            answer = await self.receive_message()
            if "error" in answer:
                break
            if answer["row_bytes"] != len(out):
                raise EOFError
            await self._receive(out)
        return answer

    async def receive_message(self) -> dict[str, Any]:
        head = bytearray(4)
        await self._receive(memoryview(head))
        (nbytes,) = struct.unpack("<I", head)
        if nbytes > _MAX_MESSAGE_BYTES:
            raise EOFError
        body = bytearray(nbytes)
        await self._receive(memoryview(body))
        try:
            message: dict[str, Any] = json.loads(body)
        except ValueError:
            raise EOFError from None
        return message

    async def _receive(self, into: memoryview) -> None:
        while into:
            received = await self._loop.sock_recv_into(self._socket, into)
            if not received:
                raise EOFError
            into = into[received:]

    async def end(self) -> int:
        """Kill the process. Return its exit status once the system has freed all that it held."""
        self.kill()
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        self._process.kill()
        self._socket.close()

    def reap(self) -> None:
        """Wait for the end of the killed process."""
        if not self._ended.done():
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._ended.set_result(self._process.wait())

"""One ExtractStream call: messages in, answers out as they complete."""

from __future__ import annotations

import asyncio
import math
import time

import grpc

from dinov3_server.api.convert import parse
from dinov3_server.api.extraction import Extraction
from dinov3_server.api.interceptors import Context, measured
from dinov3_server.api.status import serving_error, status_of
from dinov3_server.errors import InvalidInput, ServingError, Unavailable
from dinov3_server.metrics import Metrics
from dinov3_serving.v1 import feature_service_pb2 as pb

EOF: object = grpc.aio.EOF


class Stream:
    """Reads on only while fewer than `window` messages are unanswered.

    An answer counts as given when the transport has taken it, so a caller that does not read its answers soon finds
    that its messages are not read either.
    """

    def __init__(self, context: Context, extraction: Extraction, metrics: Metrics, window: int) -> None:
        self._context = context
        self._extraction = extraction
        self._metrics = metrics
        self._window = asyncio.Semaphore(window)
        self._unanswered: set[int] = set()
        self._writing = asyncio.Lock()
        self._reader: asyncio.Task[ServingError | None] | None = None
        self._caller_left = False
        remaining = context.time_remaining()
        self._deadline = None if remaining is None else time.monotonic() + remaining

    async def serve(self) -> None:
        """Return when the caller has closed its side and every message is answered.

        Raises InvalidInput after a message that is none, and Unavailable after `stop_reading`, in both cases when
        everything before it is answered.
        """
        async with asyncio.TaskGroup() as group:
            self._reader = group.create_task(self._read(group))
        if self._caller_left:
            return
        if self._reader.cancelled():
            raise Unavailable(
                "the server is shutting down; what it had read is answered, send the rest again", reason="draining"
            )
        error = self._reader.result()
        if error is not None:
            raise error

    def stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.cancel()

    async def _read(self, group: asyncio.TaskGroup) -> ServingError | None:
        while True:
            await self._window.acquire()
            data = await self._context.read()
            if data is EOF:
                return None
            try:
                message = parse(pb.ExtractStreamRequest, data)
            except InvalidInput as error:
                return error
            fresh = message.id not in self._unanswered
            self._unanswered.add(message.id)
            group.create_task(self._answer(message, time.monotonic(), fresh))

    async def _answer(self, message: pb.ExtractStreamRequest, arrived: float, fresh: bool) -> None:
        try:
            answer = await self._extract(message, arrived, fresh)
            async with self._writing:
                if fresh:
                    self._unanswered.discard(message.id)
                await self._context.write(answer)
        except grpc.aio.BaseError:
            # The connection is gone; the cancellation of the whole call is on its way.
            self._caller_left = True
            self.stop_reading()
        finally:
            self._window.release()

    async def _extract(self, message: pb.ExtractStreamRequest, arrived: float, fresh: bool) -> bytes:
        try:
            with measured(self._metrics, "ExtractStream", expired=self._expired):
                if not fresh:
                    raise InvalidInput(
                        f"message {message.id} of this stream is not answered yet: give every message an id of its own",
                        field="id",
                    )
                deadline = self._deadline_of(message.timeout_seconds, arrived)
                if not message.HasField("request"):
                    raise InvalidInput("request is not set", field="request")
                return await self._extraction.extract(message.request, deadline, message.id)
        except Exception as error:
            failed = pb.ExtractStreamResponse(id=message.id, error=status_of(serving_error(error)))
            return failed.SerializeToString()

    def _deadline_of(self, timeout: float, arrived: float) -> float | None:
        if not (math.isfinite(timeout) and timeout >= 0):
            raise InvalidInput(
                f"timeout_seconds is {timeout:g}; allowed are positive numbers, and 0 for the stream's own deadline",
                field="timeout_seconds",
            )
        if not timeout:
            return self._deadline
        own = arrived + timeout
        return own if self._deadline is None else min(own, self._deadline)

    def _expired(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

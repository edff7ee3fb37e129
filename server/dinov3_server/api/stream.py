"""Serve one ExtractStream call: read messages, and answer each when it is complete."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import NamedTuple

import grpc

from dinov3_server.api.access_log import AccessLog
from dinov3_server.api.budget import RequestMemory
from dinov3_server.api.credentials import BearerTokens
from dinov3_server.api.extraction import Extraction
from dinov3_server.api.interceptors import STREAM, Context
from dinov3_server.api.receiving import Receiver, deadline_of
from dinov3_server.api.requests import RequestRecord
from dinov3_server.api.status import serving_error, status_of
from dinov3_server.api.tracing import Tracing
from dinov3_server.api.wire import ParsedMessage, TooManyElements, message_id, parse
from dinov3_server.config.settings import Settings
from dinov3_server.engine.shares import Caller
from dinov3_server.errors import InvalidInput, Overloaded, ServingError, Unauthenticated, Unavailable
from dinov3_server.metrics import Metrics
from dinov3_serving.errors import without_traceback
from dinov3_serving.framing import BytesResolver
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.request import check_stream_request


class _Received(NamedTuple):
    """A message. `has_new_id` if no unanswered message has its id; `error` is set if it cannot be served."""

    message: pb.ExtractStreamRequest
    resolve_bytes: BytesResolver
    request_memory: RequestMemory
    arrived: float
    nbytes: int
    has_new_id: bool
    error: ServingError | None


@dataclass(eq=False)
class Stream:
    """A stream, which is read only while fewer than `stream_window` messages are unanswered.

    A message is answered when the transport has accepted the answer. So if a caller does not read its answers, its
    messages are soon not read either.
    """

    context: Context
    extraction: Extraction
    receiver: Receiver
    metrics: Metrics
    settings: Settings
    caller: Caller
    call_id: str = ""
    access_log: AccessLog | None = None
    tokens: BearerTokens | None = None
    tracing: Tracing | None = None

    def __post_init__(self) -> None:
        self._deadline = deadline_of(self.context)
        self._window = asyncio.Semaphore(self.settings.stream_window)
        self._unanswered: set[int] = set()
        self._writing = asyncio.Lock()
        self._reader: asyncio.Task[ServingError | None] | None = None
        self._caller_left = False

    async def serve(self) -> None:
        """Return when the caller has closed its side and every message is answered.

        Raises, when all earlier messages are answered:
            InvalidInput: a message cannot be parsed.
            Overloaded: there was no memory for a message.
            Unauthenticated: a message came when the token of the call was not valid any more.
            Unavailable: `stop_reading` was called.
        """
        async with asyncio.TaskGroup() as group:
            self._reader = group.create_task(self._read(group))
        if self._caller_left:
            return
        if self._reader.cancelled():
            raise Unavailable(
                "the server is shutting down: messages without an answer were not computed, send them again",
                reason="draining",
            )
        error = self._reader.result()
        if error is not None:
            raise error

    @property
    def is_read(self) -> bool:
        """Whether messages are still read."""
        return self._reader is None or not self._reader.done()

    def stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.cancel()

    async def _read(self, group: asyncio.TaskGroup) -> ServingError | None:
        while True:
            await self._window.acquire()
            try:
                received = await self.receiver.read(self.context, self._deadline, rank=1)
            except Overloaded as error:
                return error
            if received is None:
                return None
            try:
                if self.tokens:
                    self.tokens.check(self.context.invocation_metadata() or ())
                message = self._parse(*received)
            except (Unauthenticated, InvalidInput) as error:
                received[1].release()
                return error
            # As a callback, because a task that is cancelled before its first step runs none of `_answer`.
            group.create_task(self._answer(message)).add_done_callback(message.request_memory.release)
            del received, message  # free them while waiting for the next one

    def _parse(self, data: bytes, request_memory: RequestMemory) -> _Received:
        """Parse a message. Raises InvalidInput if it has no readable id to answer under."""
        error: ServingError | None = None
        try:
            parsed = parse(pb.ExtractStreamRequest, data, self.settings.max_images_per_request)
        except TooManyElements as too_many:
            error = without_traceback(too_many)
            parsed = ParsedMessage(pb.ExtractStreamRequest(id=message_id(data)), bytes)
        has_new_id = parsed.message.id not in self._unanswered
        self._unanswered.add(parsed.message.id)
        return _Received(*parsed, request_memory, time.monotonic(), len(data), has_new_id, error)

    async def _answer(self, received: _Received) -> None:
        message_id, has_new_id, request_memory = received.message.id, received.has_new_id, received.request_memory
        extract = self._extract(received)
        del received  # so that the message is freed while the request waits for the device
        try:
            answer = await extract
            async with self._writing:
                if has_new_id:
                    self._unanswered.discard(message_id)
                request_memory.start_sending(self.context)
                await self.context.write(answer)
        except grpc.aio.BaseError:
            # The connection is gone; gRPC is about to cancel the call.
            self._caller_left = True
            self.stop_reading()
        finally:
            request_memory.release()  # before the next message is read
            self._window.release()

    async def _extract(self, received: _Received) -> bytes:
        message = received.message
        message_id = message.id
        try:
            record = RequestRecord(
                self.metrics, self.access_log, "ExtractStream", self.caller.connection,
                f"{self.call_id}/{message_id}", self._expired,
            )  # fmt: skip
            with record:
                if self.tracing is not None:
                    metadata = self.context.invocation_metadata() or ()
                    record.trace = self.tracing.start(STREAM.lstrip("/"), metadata, record.id)
                record.received(received.nbytes)
                if not received.has_new_id:
                    raise InvalidInput(
                        f"a message with id {message_id} is still unanswered: give each message of a stream its own id",
                        field="id",
                    )
                if received.error is not None:
                    raise received.error
                check_stream_request(message)
                deadline = self._deadline_of(message.timeout_seconds, received.arrived)
                extract = self.extraction.extract(
                    message.request, deadline, self.caller, received.request_memory, message_id, received.resolve_bytes
                )
                del received, message
                answer = await extract
                record.answered(len(answer))
                return answer
        except Exception as error:
            failed = pb.ExtractStreamResponse(id=message_id, error=status_of(serving_error(error)))
            return failed.SerializeToString()

    def _deadline_of(self, timeout: float, arrived: float) -> float | None:
        if not timeout:
            return self._deadline
        own = arrived + timeout
        return own if self._deadline is None else min(own, self._deadline)

    def _expired(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

"""One ExtractStream call: messages in, answers out as they complete."""

from __future__ import annotations

import asyncio
import math
import time
from typing import NamedTuple

import grpc

from dinov3_server.api.budget import RequestMemory
from dinov3_server.api.credentials import Tokens
from dinov3_server.api.extraction import Extraction
from dinov3_server.api.interceptors import SEND_A_TOKEN, Context, RequestMetrics
from dinov3_server.api.receiving import Receiver
from dinov3_server.api.status import serving_error, status_of, without_traceback
from dinov3_server.api.wire import BytesResolver, ParsedMessage, TooManyElements, message_id, parse
from dinov3_server.config.settings import Settings
from dinov3_server.engine.shares import Caller
from dinov3_server.errors import InvalidInput, Overloaded, ServingError, Unauthenticated, Unavailable
from dinov3_server.metrics import Metrics
from dinov3_serving.v1 import feature_service_pb2 as pb


class _Asked(NamedTuple):
    """One message. `fresh` says that no other with its id is unanswered; `error` is why it cannot be served."""

    message: pb.ExtractStreamRequest
    content: BytesResolver
    request_memory: RequestMemory
    arrived: float
    fresh: bool
    error: ServingError | None


class Stream:
    """Reads on only while fewer than `stream_window` messages are unanswered.

    An answer counts as given when the transport has taken it, so a caller that does not read its answers soon finds
    that its messages are not read either.
    """

    def __init__(
        self,
        context: Context,
        extraction: Extraction,
        receiver: Receiver,
        metrics: Metrics,
        settings: Settings,
        caller: Caller,
        tokens: Tokens | None = None,
    ) -> None:
        self._context = context
        self._tokens = tokens
        self._caller = caller
        self._extraction = extraction
        self._receiver = receiver
        self._metrics = metrics
        self._window = asyncio.Semaphore(settings.stream_window)
        self._most_images = settings.max_images_per_request
        self._unanswered: set[int] = set()
        self._writing = asyncio.Lock()
        self._reader: asyncio.Task[ServingError | None] | None = None
        self._caller_left = False
        remaining = context.time_remaining()
        self._deadline = None if remaining is None else time.monotonic() + remaining

    async def serve(self) -> None:
        """Return when the caller has closed its side and every message is answered.

        Raises InvalidInput after a message that is none, Unauthenticated after one that came when the call's token was
        no longer one of `tokens`, and Unavailable after `stop_reading`, in all cases when everything before it is
        answered.
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
            try:
                received = await self._receiver.read(self._context, self._deadline, rank=1)
            except Overloaded as error:
                return error
            if received is None:
                return None
            if self._tokens and (reason := self._tokens.refusal(self._context.invocation_metadata() or ())):
                received[1].release()
                return Unauthenticated(f"{reason} any more: {SEND_A_TOKEN}")
            try:
                asked = self._asked(*received)
            except InvalidInput as error:
                received[1].release()
                return error
            # Not in `_answer` alone: a task that is cancelled before it begins runs nothing of it.
            group.create_task(self._answer(asked)).add_done_callback(asked.request_memory.release)
            del received, asked  # the next one may be long in coming

    def _asked(self, data: bytes, request_memory: RequestMemory) -> _Asked:
        """Raises InvalidInput where `data` are no message, or it cannot be told which one is at fault."""
        error: ServingError | None = None
        try:
            parsed = parse(pb.ExtractStreamRequest, data, self._most_images)
        except TooManyElements as too_many:
            error = without_traceback(too_many)
            parsed = ParsedMessage(pb.ExtractStreamRequest(id=message_id(data)), bytes)
        fresh = parsed.message.id not in self._unanswered
        self._unanswered.add(parsed.message.id)
        return _Asked(*parsed, request_memory, time.monotonic(), fresh, error)

    async def _answer(self, asked: _Asked) -> None:
        message_id, fresh, request_memory = asked.message.id, asked.fresh, asked.request_memory
        extract = self._extract(asked)
        del asked  # what was sent need not wait in memory for the device
        try:
            answer = await extract
            async with self._writing:
                if fresh:
                    self._unanswered.discard(message_id)
                request_memory.start_sending(self._context)
                await self._context.write(answer)
        except grpc.aio.BaseError:
            # The connection is gone; the cancellation of the whole call is on its way.
            self._caller_left = True
            self.stop_reading()
        finally:
            request_memory.release()  # before the window lets the next message in
            self._window.release()

    async def _extract(self, asked: _Asked) -> bytes:
        message = asked.message
        message_id = message.id
        try:
            with RequestMetrics(self._metrics, "ExtractStream", expired=self._expired):
                if not asked.fresh:
                    raise InvalidInput(
                        f"message {message_id} of this stream is not answered yet: give every message an id of its own",
                        field="id",
                    )
                if asked.error is not None:
                    raise asked.error
                deadline = self._deadline_of(message.timeout_seconds, asked.arrived)
                if not message.HasField("request"):
                    raise InvalidInput("request is not set", field="request")
                extract = self._extraction.extract(
                    message.request, deadline, self._caller, asked.request_memory, message_id, asked.content
                )
                del asked, message
                return await extract
        except Exception as error:
            failed = pb.ExtractStreamResponse(id=message_id, error=status_of(serving_error(error)))
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

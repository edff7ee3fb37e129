"""Make the calls of attack/messages.py from several connections, and judge each answer."""

from __future__ import annotations

import asyncio
import random
import re
import socket
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from attack import messages
from attack.messages import Call
from dinov3_serving.v1 import feature_service_pb2 as pb

LONGEST = 60.0
"""Seconds after which a call without its own deadline counts as hung."""
CONNECTIONS = 4
IN_FLIGHT = 24
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]
_WRONG_CODES = {grpc.StatusCode.INTERNAL.value[0], grpc.StatusCode.UNKNOWN.value[0]}
# The details in grpc.aio for a stream that the server ends before all is sent; only the blocking API has its status.
_UNKNOWN_STATUS = "Internal error from Core"
# Answers of the HTTP port. It closes a connection without a request; an answer of HTTP/0.9 has no status.
_HTTP_ANSWERS = {"200", "400", "404", "405", "414", "431", "501", "505", "0.9", "closed"}
_ANSWERS = {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"}


@dataclass(frozen=True)
class Finding:
    """An input whose answer is a fault, and the `reason`."""

    number: int
    call: Call
    reason: str


@dataclass
class Tally:
    """Counts by method and status, and the inputs that are findings."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.counts += other.counts
        self.findings += other.findings


def fault(call: Call, status: str, answers: Sequence[bytes]) -> str | None:
    """Return why this `call` may not end in `status` with these `answers`; None if it may."""
    allowed = set(_ANSWERS)
    if call.method == messages.HTTP:
        allowed = _HTTP_ANSWERS
    elif call.method.startswith("/grpc.health"):
        allowed |= {"NOT_FOUND"}
    elif not call.authorized:
        allowed = {"UNAUTHENTICATED", "RESOURCE_EXHAUSTED"}
    if call.deadline is not None:
        # If the server notices the deadline first, its gRPC resets the stream, which reads as CANCELLED.
        allowed |= {"DEADLINE_EXCEEDED", "CANCELLED"}
    if call.cancel_after is not None:
        allowed.add("CANCELLED")
    if call.method not in (messages.EXTRACT, messages.STREAM, messages.GET_MODEL) or call.compression:
        allowed.add("UNIMPLEMENTED")
    if status not in allowed:
        return status
    wrong = [error for error in _errors_within(call.method, answers) if error.code in _WRONG_CODES]
    return f"{status} with an error of code {wrong[0].code}: {wrong[0].message}" if wrong else None


async def attack(target: str, http: str, seed: int, numbers: Sequence[int], bombs: float) -> Tally:
    """Send the inputs of these numbers, IN_FLIGHT at a time."""
    tally = Tally()
    waiting = iter(numbers)
    channels = [grpc.aio.insecure_channel(target, _OPTIONS) for _ in range(CONNECTIONS)]

    async def send(channel: grpc.aio.Channel) -> None:
        for number in waiting:
            call = messages.call(seed, number, bombs=bombs)
            status, answers, details = await perform(channel, http, call)
            if details == _UNKNOWN_STATUS:
                status, answers, details = await asyncio.to_thread(_perform_blocking, target, call)
            tally.counts[call.name, status] += 1
            reason = fault(call, status, answers)
            if reason is not None:
                tally.findings.append(Finding(number, call, f"{reason}: {details}" if details else reason))

    await asyncio.gather(*(send(channels[i % CONNECTIONS]) for i in range(IN_FLIGHT)))
    for channel in channels:
        await channel.close()
    await asyncio.to_thread(send_garbage, target, random.Random(f"{seed} {numbers[0]} bytes"))
    tally.counts["bytes", "sent"] += 1
    return tally


async def perform(channel: grpc.aio.Channel, http: str, call: Call) -> tuple[str, list[bytes], str]:
    """Make one call. Return its status, the answers before it, and its details; the status is "hung" if neither server
    nor gRPC ends it within LONGEST."""
    if call.method == messages.HTTP:
        return await _ask_http(http, call.messages[0]), [], ""
    metadata = () if call.authorization is None else (("authorization", call.authorization),)
    deadline = LONGEST if call.deadline is None else call.deadline
    loop = asyncio.get_running_loop()
    answers: list[bytes] = []
    rpc: Any
    if call.method in messages.STREAMS:
        rpc = channel.stream_stream(call.method)(_each(call.messages), timeout=deadline, metadata=metadata)
    else:
        unary: Any = channel.unary_unary(call.method)
        rpc = unary(call.messages[0], timeout=deadline, metadata=metadata, compression=call.compression)
    leaving = None if call.cancel_after is None else loop.call_later(call.cancel_after, rpc.cancel)
    try:
        if call.method in messages.STREAMS:
            async for answer in rpc:
                answers.append(answer)
                if call.method == messages.WATCH:  # it never ends by itself
                    rpc.cancel()
                    return "OK", answers, ""
        else:
            answers.append(await rpc)
    except grpc.aio.AioRpcError as error:
        status, details = error.code().name, error.details() or ""
        if status == "DEADLINE_EXCEEDED" and call.deadline is None:
            status = "hung"
        return status, answers, details
    except asyncio.CancelledError:  # gRPC raises it whichever side ended the call
        return "CANCELLED", answers, ""
    finally:
        if leaving is not None:
            leaving.cancel()
    return "OK", answers, ""


def _perform_blocking(target: str, call: Call) -> tuple[str, list[bytes], str]:
    metadata = () if call.authorization is None else (("authorization", call.authorization),)
    answers: list[bytes] = []
    with grpc.insecure_channel(target, _OPTIONS) as channel:
        stream: Any = channel.stream_stream(call.method)
        rpc = stream(iter(call.messages), timeout=LONGEST, metadata=metadata)
        try:
            answers.extend(rpc)
        except grpc.RpcError:
            return rpc.code().name, answers, rpc.details()
    return "OK", answers, ""


async def _ask_http(address: str, request: bytes) -> str:
    """Return the status of the answer; "0.9" for an answer without one, "closed" for none."""
    host, _, port = address.rpartition(":")
    answer = b""
    try:
        async with asyncio.timeout(LONGEST):
            reader, writer = await asyncio.open_connection(host, int(port))
            with suppress(OSError):  # the server closes the connection on a line that is too long, with bytes unread
                writer.write(request)
                writer.write_eof()
                while piece := await reader.read(1 << 16):
                    answer += piece
            writer.close()
    except TimeoutError:
        return "hung"
    except ConnectionRefusedError:
        return "refused"
    status = re.match(rb"HTTP/1\.[01] (\d{3}) ", answer)
    return status[1].decode() if status else "0.9" if answer else "closed"


def send_garbage(target: str, rng: random.Random) -> None:
    """Open a few connections that send no HTTP/2 or invalid HTTP/2, and close them."""
    host, _, port = target.rpartition(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for _ in range(4):
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as connection:
            frames = b"".join(
                rng.choice((0, 4, 8, 2**14, 2**24 - 1)).to_bytes(3, "big") + rng.randbytes(rng.choice((6, 14, 40)))
                for _ in range(rng.choice((0, 1, 20)))
            )
            connection.sendall(rng.choice((b"", b"GET / HTTP/1.1\r\n\r\n", preface, preface, preface[:9])) + frames)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass


async def _each(items: Sequence[bytes]) -> Any:
    for item in items:
        yield item


def _errors_within(method: str, answers: Sequence[bytes]) -> list[pb.Status]:
    """Return the errors of images and of messages of a stream in the answers."""
    errors: list[pb.Status] = []
    for answer in answers if method in (messages.EXTRACT, messages.STREAM) else ():
        try:
            if method == messages.STREAM:
                message = pb.ExtractStreamResponse.FromString(answer)
                errors.append(message.error)
                response = message.response
            else:
                response = pb.ExtractResponse.FromString(answer)
        except DecodeError:
            return [pb.Status(code=min(_WRONG_CODES), message="the answer cannot be parsed")]
        errors += [error.status for error in response.errors]
    return errors

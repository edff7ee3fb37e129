"""The callers of `make chaos`. Each asks questions one after the other until `stop` is set, and records the outcomes.

Callers with our client rely on its retries: any error counts as lost. The raw ones use plain gRPC and do not retry,
except for streams, whose messages are sent again until DEADLINE.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from attack.messages import EXTRACT, STREAM
from attack.outcomes import Outcomes
from attack.questions import Answer, Question, differs, from_features, from_response, passing
from dinov3_client import AsyncClient, Client, Dinov3Error
from dinov3_serving.v1 import feature_service_pb2 as pb

DEADLINE = 120.0
"""Seconds in which a request must be answered despite all disturbances."""
STREAM_MESSAGES = 12
# After a refusal: without a pause a caller would send thousands of requests while no frontend listens.
_PAUSE = 0.2
_CHANNEL = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
]
# The end of a server sometimes looks like CANCELLED to a call that was not cancelled.
_REFUSALS = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED}
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_LEFT = grpc.StatusCode.DEADLINE_EXCEEDED


@dataclass(frozen=True)
class Traffic:
    """The shared state of all callers: the server, questions with their truths, the outcomes, and when to stop."""

    target: str
    known: Sequence[tuple[Question, Answer]]
    outcomes: Outcomes
    stop: threading.Event

    def judge(self, caller: str, truth: Answer, answer: Answer, retried: bool) -> None:
        """Record an answer. It is refused if images found no room or time, or lost if the caller retries by itself."""
        if (why := differs(truth, answer)) is not None:
            self.outcomes.add(caller, "wrong", why)
        elif missed := passing(truth, answer):
            why = f"images failed with {sorted({answer.failed[index] for index in missed})}"
            self.outcomes.add(caller, "lost" if retried else "refused", why)
        else:
            self.outcomes.add(caller, "answered")

    def failed(self, caller: str, error: Any, leaves: bool = False) -> None:
        """Record a failed gRPC call. `leaves` is true for calls with a short deadline or that are cancelled."""
        code, why = error.code(), f"{error.code().name}: {error.details()}"
        if leaves and code in (_LEFT, grpc.StatusCode.CANCELLED):
            self.outcomes.add(caller, "left")
        elif code in _REFUSALS:
            self.outcomes.add(caller, "refused", why)
            self.stop.wait(_PAUSE)
        else:
            self.outcomes.add(caller, "lost", why)

    def blocking(self, rng: random.Random, client: Client) -> None:
        """Ask with a client whose deadline is DEADLINE; threads may share it."""
        while not self.stop.is_set():
            question, truth = rng.choice(self.known)
            try:
                answer = question.ask(client)
            except Dinov3Error as error:
                self.outcomes.add("client", "lost", f"{type(error).__name__}: {error}")
            else:
                self.judge("client", truth, answer, retried=True)

    def awaiting(self, rng: random.Random, tasks: int) -> None:
        """Ask from `tasks` tasks that share one AsyncClient."""

        async def ask(client: AsyncClient) -> None:
            while not self.stop.is_set():
                question, truth = rng.choice(self.known)
                try:
                    answer = from_features(
                        await client.extract(list(question.images), question.kinds, **question.options)
                    )
                except Dinov3Error as error:
                    self.outcomes.add("async client", "lost", f"{type(error).__name__}: {error}")
                else:
                    self.judge("async client", truth, answer, retried=True)

        async def run() -> None:
            async with AsyncClient(self.target, deadline=DEADLINE) as client:
                await asyncio.gather(*(ask(client) for _ in range(tasks)))

        asyncio.run(run())

    def raw(self, rng: random.Random) -> None:
        self._unary("raw", rng, lambda: DEADLINE)

    def impatient(self, rng: random.Random) -> None:
        self._unary("deadlines", rng, lambda: rng.choice((0.02, 0.1, 0.5, 2.0)))

    def _unary(self, caller: str, rng: random.Random, timeout: Callable[[], float]) -> None:
        with grpc.insecure_channel(self.target, _CHANNEL) as channel:
            extract = _extract(channel)
            while not self.stop.is_set():
                question, truth = rng.choice(self.known)
                seconds = timeout()
                try:
                    response = extract(question.request(), timeout=seconds)
                except grpc.RpcError as error:
                    self.failed(caller, error, leaves=seconds < DEADLINE)
                else:
                    self.judge(caller, truth, from_response(response), retried=False)

    def cancelling(self, rng: random.Random) -> None:
        """Cancel every call after some milliseconds, and judge the answers that are faster."""
        with grpc.insecure_channel(self.target, _CHANNEL) as channel:
            extract = _extract(channel)
            while not self.stop.is_set():
                question, truth = rng.choice(self.known)
                call = extract.future(question.request(), timeout=DEADLINE)
                self.stop.wait(rng.choice((0.0, 0.02, 0.1, 0.5)))
                call.cancel()
                try:
                    response = call.result()
                except grpc.FutureCancelledError:
                    self.outcomes.add("cancels", "left")
                except grpc.RpcError as error:
                    self.failed("cancels", error, leaves=True)
                else:
                    self.judge("cancels", truth, from_response(response), retried=False)

    def streaming(self, rng: random.Random) -> None:
        self._stream("stream", rng, 0.0)

    def reading_slowly(self, rng: random.Random) -> None:
        self._stream("slow reader", rng, 0.5)

    def _stream(self, caller: str, rng: random.Random, pause: float) -> None:
        """Run streams of STREAM_MESSAGES messages, with `pause` seconds before each answer is read."""
        with grpc.insecure_channel(self.target, _CHANNEL) as channel:
            while not self.stop.is_set():
                work = {number: rng.choice(self.known) for number in range(STREAM_MESSAGES)}
                until = time.monotonic() + DEADLINE
                while work:
                    self._one_stream(caller, channel, work, until, pause)

    def _one_stream(
        self, caller: str, channel: grpc.Channel, work: dict[int, tuple[Question, Answer]], until: float, pause: float
    ) -> None:
        """Ask for all of `work`, and remove what is answered or lost."""
        method = channel.stream_stream(
            STREAM, pb.ExtractStreamRequest.SerializeToString, pb.ExtractStreamResponse.FromString
        )
        messages = [pb.ExtractStreamRequest(id=number, request=work[number][0].request()) for number in work]
        answered: set[int] = set()
        stream: Any = method(iter(messages), timeout=DEADLINE)
        try:
            for answer in _slowly(stream, pause):
                if answer.id in answered or answer.id not in work:
                    self.outcomes.add(
                        caller,
                        "wrong",
                        f"an answer with the id {answer.id}, which was not asked or is already answered",
                    )
                    continue
                answered.add(answer.id)
                if answer.HasField("response"):
                    self.judge(caller, work.pop(answer.id)[1], from_response(answer.response), retried=False)
                else:
                    self._again(caller, work, [answer.id], until, _CODES[answer.error.code], answer.error.message)
        except grpc.RpcError:
            self._again(caller, work, work.keys() - answered, until, stream.code(), stream.details())
            self.stop.wait(_PAUSE)
            return
        self._again(caller, work, work.keys() - answered, until, grpc.StatusCode.OK, "no answer")

    def _again(
        self, caller: str, work: dict[int, Any], ids: Any, until: float, code: grpc.StatusCode, message: str | None
    ) -> None:
        """Record these messages of `work` as refused, to be sent again, or as lost after the deadline or for other
        codes."""
        refusal = code in _REFUSALS and time.monotonic() < until
        for number in list(ids):
            self.outcomes.add(caller, "refused" if refusal else "lost", f"{code.name}: {message}")
            if not refusal:
                del work[number]


def _extract(channel: grpc.Channel) -> Any:
    return channel.unary_unary(EXTRACT, pb.ExtractRequest.SerializeToString, pb.ExtractResponse.FromString)


def _slowly(answers: Iterator[Any], pause: float) -> Iterator[Any]:
    while True:
        time.sleep(pause)
        try:
            answer = next(answers)
        except StopIteration:
            return
        yield answer

"""The client for asyncio. What it does is in `_session`; here it is awaited."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from dinov3_client import _many, _request
from dinov3_client._errors import ServerError
from dinov3_client._features import Features
from dinov3_client._images import ImageLike
from dinov3_client._model import Model
from dinov3_client._request import ExtractOptions, Options, TokenKind
from dinov3_client._session import Connected
from dinov3_client._transport.flow import Close, Flow, Pause, Rpc, Step, T, Together, Work


class AsyncClient(Connected):
    """`Client` for asyncio: the same arguments, calls and errors, awaited. A task that is cancelled cancels its call.

    It belongs to the event loop of its first call, and is made after forking.
    """

    # For tests, which have no time to wait.
    _sleep: Callable[[float], Awaitable[object]] = staticmethod(asyncio.sleep)

    @staticmethod
    def _dial(target: str, options: Any, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
        if credentials is None:
            return grpc.aio.insecure_channel(target, options)
        return grpc.aio.secure_channel(target, credentials, options)

    async def close(self) -> None:
        """Drops the connections; calls under way end with a ServerError (CANCELLED)."""
        for channel in self._session.close():
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def model(self, *, deadline: float | None = None) -> Model:
        """As `Client.model`."""
        return await self._run(self._session.model(deadline))

    async def wait_ready(self, timeout: float = 60.0) -> Model:  # noqa: ASYNC109  # it tells more than asyncio.timeout
        """As `Client.wait_ready`."""
        return await self._run(self._session.wait_ready(timeout))

    async def extract(
        self,
        images: ImageLike | Iterable[ImageLike],
        outputs: TokenKind | Sequence[TokenKind] = ("cls", "patches"),
        **options: Unpack[ExtractOptions],
    ) -> Features:
        """As `Client.extract`. Images are read and put together in a thread."""
        return await self._run(self._session.extract(images, _request.options(outputs, **options)))

    def extract_many(
        self,
        batches: Iterable[ImageLike | Iterable[ImageLike]] | AsyncIterable[ImageLike | Iterable[ImageLike]],
        outputs: TokenKind | Sequence[TokenKind] = ("cls", "patches"),
        *,
        in_flight: int = 4,
        **options: Unpack[ExtractOptions],
    ) -> AsyncGenerator[Features, None]:
        """As `Client.extract_many`. An iterable that takes time should be an asynchronous one.

        Left early, it is to be closed (`contextlib.aclosing`), which cancels what is in flight.
        """
        source = _aiter(batches)
        return self._many(source, _many.check_in_flight(in_flight), _request.options(outputs, **options))

    async def _many(
        self, batches: AsyncGenerator[ImageLike | Iterable[ImageLike], None], in_flight: int, wanted: Options
    ) -> AsyncGenerator[Features, None]:
        pending: deque[asyncio.Future[Features]] = deque()
        more = True
        try:
            while True:
                while more and len(pending) < in_flight:
                    try:
                        images = _many.held(await anext(batches))
                    except StopAsyncIteration:
                        more = False
                    except Exception as error:
                        more = False
                        pending.append(_failed(error))
                    else:
                        pending.append(asyncio.ensure_future(self._run(self._session.extract(images, wanted))))
                if not pending:
                    return
                features = await pending[0]
                pending.popleft()
                yield features
                del features  # not held while the next ones are waited for
        finally:
            await _cancel(pending)
            await batches.aclose()

    async def _run(self, flow: Flow[T]) -> T:
        outcome: Any = None
        error: BaseException | None = None
        while True:
            try:
                step = flow.send(outcome) if error is None else flow.throw(error)
            except StopIteration as done:
                result: T = done.value
                return result
            outcome = error = None
            try:
                outcome = await self._perform(step)
            except BaseException as raised:  # the flow is where it belongs: it gives its connection back
                error = raised

    async def _perform(self, step: Step) -> Any:
        match step:
            case Rpc():
                return await _call(step)
            case Pause(seconds):
                return await self._sleep(seconds)
            case Work(function):
                return await asyncio.to_thread(function)
            case Together(flows, at_once):
                return await self._together(flows, at_once)
            case Close(channel):
                return await channel.close()

    async def _together(self, flows: Sequence[Flow[T]], at_once: int) -> list[T]:
        places = asyncio.Semaphore(at_once)

        async def one(flow: Flow[T]) -> T:
            async with places:
                return await self._run(flow)

        tasks = [asyncio.ensure_future(one(flow)) for flow in flows]
        try:
            return await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)


async def _call(step: Rpc) -> bytes:
    call = step.channel.unary_unary(step.method)(step.message, timeout=step.timeout, metadata=step.metadata)
    try:
        answer: bytes = await call
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ServerError("the client was closed", code=grpc.StatusCode.CANCELLED) from None
    return answer


async def _cancel(futures: Iterable[asyncio.Future[Any]]) -> None:
    """Returns when all have ended; what they raise is no longer of interest."""
    futures = list(futures)
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)


def _failed(error: Exception) -> asyncio.Future[Any]:
    future = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future


async def _aiter(
    batches: Iterable[ImageLike | Iterable[ImageLike]] | AsyncIterable[ImageLike | Iterable[ImageLike]],
) -> AsyncGenerator[ImageLike | Iterable[ImageLike], None]:
    if isinstance(batches, AsyncIterable):
        async for batch in batches:
            yield batch
    else:
        for batch in batches:
            yield batch

"""The asyncio client. Its logic is in `_session`; it is executed here by awaiting."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from dinov3_client import _request
from dinov3_client._checks import check_count
from dinov3_client._errors import ServerError
from dinov3_client._features import Features
from dinov3_client._images import ImageLike, as_list
from dinov3_client._model import Model
from dinov3_client._request import ExtractOptions, RequestOptions
from dinov3_client._session import BaseClient
from dinov3_client._transport.effects import CloseChannel, Effect, Gather, Offload, Procedure, Rpc, Sleep, T
from dinov3_serving.features import TokenKind


class AsyncClient(BaseClient):
    """`Client` for asyncio: the same arguments, calls and errors, awaited. Cancelling a task cancels its call.

    Each event loop that it is used in, one after the other (`asyncio.run`) or at a time in several threads, has
    connections of its own. Make it after forking.
    """

    # Tests replace it.
    _sleep: Callable[[float], Awaitable[object]] = staticmethod(asyncio.sleep)

    @staticmethod
    def _dial(target: str, options: Any, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
        if credentials is None:
            return grpc.aio.insecure_channel(target, options)
        return grpc.aio.secure_channel(target, credentials, options)

    @staticmethod
    def _find_loop() -> asyncio.AbstractEventLoop | None:
        try:
            return asyncio.get_running_loop()
        except RuntimeError:
            return None

    async def close(self) -> None:
        """Close the connections. Calls in flight fail with a ServerError (CANCELLED)."""
        running = asyncio.get_running_loop()
        for loop, channels in self._session.close():
            for channel in channels:
                if loop is running:
                    await channel.close()
                elif loop.is_running():
                    await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(channel.close(), loop))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def model(self, *, deadline: float | None = None) -> Model:
        """See `Client.model`."""
        return await self._run(self._session.model(deadline))

    async def wait_ready(self, timeout: float = 60.0) -> Model:  # noqa: ASYNC109  # its error says more than asyncio.timeout's
        """See `Client.wait_ready`."""
        return await self._run(self._session.wait_ready(timeout))

    async def extract(
        self,
        images: ImageLike | Iterable[ImageLike],
        outputs: TokenKind | Sequence[TokenKind] = ("cls", "patches"),
        **options: Unpack[ExtractOptions],
    ) -> Features:
        """See `Client.extract`. A thread reads the images and builds the requests."""
        return await self._run(self._session.extract(images, _request.check_options(outputs, **options)))

    def extract_many(
        self,
        batches: Iterable[ImageLike | Iterable[ImageLike]] | AsyncIterable[ImageLike | Iterable[ImageLike]],
        outputs: TokenKind | Sequence[TokenKind] = ("cls", "patches"),
        *,
        in_flight: int = 4,
        **options: Unpack[ExtractOptions],
    ) -> AsyncGenerator[Features, None]:
        """See `Client.extract_many`. Slow `batches` should be an asynchronous iterable.

        Close the generator when leaving it early (`contextlib.aclosing`), which cancels the calls in flight.
        """
        source = _aiter(batches)
        return self._many(
            source, check_count("in_flight", in_flight, 1, "batches"), _request.check_options(outputs, **options)
        )

    async def _many(
        self, batches: AsyncGenerator[ImageLike | Iterable[ImageLike], None], in_flight: int, options: RequestOptions
    ) -> AsyncGenerator[Features, None]:
        pending: deque[asyncio.Future[Features]] = deque()
        more = True
        try:
            while True:
                while more and len(pending) < in_flight:
                    try:
                        images = as_list(await anext(batches))
                    except StopAsyncIteration:
                        more = False
                    except Exception as error:
                        more = False
                        pending.append(_failed(error))
                    else:
                        pending.append(asyncio.ensure_future(self._run(self._session.extract(images, options))))
                if not pending:
                    return
                features = await pending[0]
                pending.popleft()
                yield features
                del features  # do not hold them while waiting for the next
        finally:
            await _cancel(pending)
            await batches.aclose()

    async def _run(self, procedure: Procedure[T]) -> T:
        outcome: Any = None
        error: BaseException | None = None
        while True:
            try:
                effect = procedure.send(outcome) if error is None else procedure.throw(error)
            except StopIteration as done:
                result: T = done.value
                return result
            outcome = error = None
            try:
                outcome = await self._execute(effect)
            except BaseException as raised:  # the procedure must release its connection
                error = raised

    async def _execute(self, effect: Effect) -> Any:
        match effect:
            case Rpc():
                return await _call(effect)
            case Sleep(seconds):
                return await self._sleep(seconds)
            case Offload(function):
                return await asyncio.to_thread(function)
            case Gather(procedures, limit):
                return await self._gather(procedures, limit)
            case CloseChannel(channel):
                return await channel.close()

    async def _gather(self, procedures: Sequence[Procedure[T]], limit: int) -> list[T]:
        places = asyncio.Semaphore(limit)

        async def one(procedure: Procedure[T]) -> T:
            async with places:
                return await self._run(procedure)

        tasks = [asyncio.ensure_future(one(procedure)) for procedure in procedures]
        try:
            return await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)


async def _call(effect: Rpc) -> bytes:
    call = effect.channel.unary_unary(effect.method)(effect.message, timeout=effect.timeout, metadata=effect.metadata)
    try:
        answer: bytes = await call
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ServerError("the client was closed", code=grpc.StatusCode.CANCELLED) from None
    return answer


async def _cancel(futures: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel all, wait until they have ended, and ignore their errors."""
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

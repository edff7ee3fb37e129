"""Both clients behind one blocking interface, so that a test runs with each."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from PIL import Image

from dinov3_client import AsyncClient, Client, Features, Model
from dinov3_client.testing import expected
from tests.support.waiting import LIMIT

if TYPE_CHECKING:
    from tests.client.conftest import FakeClock

EXACT: Any = {"preset": "none", "dtype": "float32"}


class Adapter(Protocol):
    """`many` is `extract_many`; closing it closes that."""

    client: Any

    def __init__(self, target: Any, **arguments: Any) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def model(self, **arguments: Any) -> Model: ...
    def wait_ready(self, timeout: float = 60.0) -> Model: ...
    def extract(self, *given: Any, **arguments: Any) -> Features: ...
    def many(self, batches: Iterable[Any], **arguments: Any) -> Generator[Features, None, None]: ...
    def ruled_by(self, clock: FakeClock) -> None: ...


class Blocking:
    """Client."""

    def __init__(self, target: Any, **arguments: Any) -> None:
        self.client = Client(target, **{"deadline": LIMIT, **arguments})
        self.model = self.client.model
        self.wait_ready = self.client.wait_ready
        self.extract = self.client.extract
        self.close = self.client.close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def many(self, batches: Iterable[Any], **arguments: Any) -> Generator[Features, None, None]:
        with contextlib.closing(self.client.extract_many(batches, **arguments)) as answers:
            yield from answers

    def ruled_by(self, clock: FakeClock) -> None:
        self.client._session.now, self.client._session.rand = clock.now, clock.rand.random
        self.client._sleep = lambda _, seconds: clock.sleep(seconds)


class Awaiting:
    """AsyncClient, with an event loop in a thread of its own."""

    def __init__(self, target: Any, **arguments: Any) -> None:
        self.client = AsyncClient(target, **{"deadline": LIMIT, **arguments})  # First: no thread stays where it raises.
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.model = self._blocking(self.client.model)
        self.wait_ready = self._blocking(self.client.wait_ready)
        self.extract = self._blocking(self.client.extract)
        self.close = self._blocking(self.client.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def many(self, batches: Iterable[Any], **arguments: Any) -> Generator[Features, None, None]:
        answers = self.client.extract_many(batches, **arguments)
        following, close = self._blocking(answers.__anext__), self._blocking(answers.aclose)
        try:
            while True:
                try:
                    features = following()
                except StopAsyncIteration:
                    return
                yield features
        finally:
            close()

    def ruled_by(self, clock: FakeClock) -> None:
        async def sleep(seconds: float) -> None:
            clock.sleep(seconds)

        self.client._session.now, self.client._session.rand = clock.now, clock.rand.random
        self.client._sleep = sleep

    def _blocking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        async def awaited(*given: Any, **arguments: Any) -> Any:
            return await function(*given, **arguments)

        def call(*given: Any, **arguments: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(awaited(*given, **arguments), self.loop).result()

        return call


ADAPTERS: tuple[type[Adapter], ...] = (Blocking, Awaiting)


def photos(count: int, first: int = 0) -> np.ndarray[Any, Any]:
    return np.stack([np.full((32, 48, 3), 7 * (first + index) + 1, np.uint8) for index in range(count)])


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def check(features: Any, images: np.ndarray[Any, Any]) -> None:
    assert len(features) == len(images)
    for index, image in enumerate(images):
        np.testing.assert_array_equal(features.patches[index], expected(image, "patches"))

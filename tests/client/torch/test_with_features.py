"""`with_features`: each batch once, in order, beside its own features; errors, early ends and figures."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from dinov3_client import Client, Features, ImageErrors, ModelMismatch
from dinov3_client.testing import MODEL, Failure, FakeServer, expected
from dinov3_client.torch import with_features
from tests.support.waiting import LIMIT

Images = NDArray[np.uint8]


def batch(index: int) -> Images:
    """One to three images of 32 x 32, other ones for each index."""
    return np.random.default_rng(index).integers(0, 256, (1 + index % 3, 32, 32, 3), np.uint8)


class Numbers:
    """A loader of the batches 0 .. count - 1 that can be iterated again; `read` counts what the epoch has read."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.read = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        self.read = 0
        for index in range(self.count):
            self.read += 1
            yield index


def check(pairs: Iterable[tuple[int, Features]], indices: Iterable[int]) -> None:
    pairs = list(pairs)
    assert [index for index, _ in pairs] == list(indices)
    for index, features in pairs:
        assert features.cls is not None
        np.testing.assert_array_equal(features.cls, [expected(image, "cls") for image in batch(index)])


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, deadline=LIMIT) as client:
        yield client


OPTIONS: Any = {"outputs": "cls", "preset": "none", "dtype": "float32"}


@pytest.mark.parametrize("prefetch", [0, 1, 5, 50])
def test_each_batch_comes_once_in_order_with_its_own_features_in_every_epoch(client: Client, prefetch: int) -> None:
    stream = with_features(Numbers(12), client, to_request=batch, prefetch=prefetch, **OPTIONS)
    assert len(stream) == 12
    for _ in range(2):
        check(stream, range(12))


def test_an_iterator_goes_through_once_and_has_no_length(client: Client) -> None:
    stream = with_features(iter(range(3)), client, to_request=batch, **OPTIONS)
    check(stream, range(3))
    check(stream, [])
    with pytest.raises(TypeError):
        len(stream)


def test_the_loader_is_read_prefetch_batches_ahead_and_their_requests_are_sent(
    server: FakeServer, client: Client
) -> None:
    loader = Numbers(8)
    epoch = iter(with_features(loader, client, to_request=batch, prefetch=2, **OPTIONS))
    assert loader.read == 0
    for done in range(1, 9):
        next(epoch)
        assert loader.read == min(done + 2, 8)
        server.wait_for_calls(min(done + 2, 8))  # though the loop has asked for no more than `done`
    check(epoch, [])


def test_past_batches_and_features_are_not_kept_alive(client: Client) -> None:
    class Batch:
        def __init__(self, index: int) -> None:
            self.index = index
            alive.add(self)

    alive: weakref.WeakSet[Batch] = weakref.WeakSet()
    given: list[weakref.ref[Features]] = []
    loader = map(Batch, range(8))
    for one, features in with_features(loader, client, to_request=lambda one: batch(one.index), prefetch=2, **OPTIONS):
        assert len(alive) == min(3, 8 - one.index)  # this one, and those ahead
        assert not any(reference() for reference in given)
        given.append(weakref.ref(features))


def test_requests_carry_the_options(server: FakeServer, client: Client) -> None:
    (pair,) = with_features([0], client, to_request=batch, outputs=["registers"], preset="hf", dtype="bfloat16")
    assert pair[1].registers is not None
    assert pair[1].registers.dtype == "bfloat16"
    assert pair[1].cls is pair[1].patches is None
    assert pair[1].input_size == (224, 224)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_an_error_of_the_loader_comes_after_the_batches_before_it(client: Client, prefetch: int) -> None:
    def loader() -> Iterator[int]:
        yield from range(5)
        raise OSError("disk gone")

    seen: list[tuple[int, Features]] = []
    with pytest.raises(OSError, match="disk gone"):
        seen.extend(with_features(loader(), client, to_request=batch, prefetch=prefetch, **OPTIONS))
    check(seen, range(5))


@pytest.mark.parametrize("kind", [ZeroDivisionError, StopIteration])
def test_an_error_of_to_request_comes_in_its_batchs_place(client: Client, kind: type[Exception]) -> None:
    def to_request(index: int) -> Images:
        if index == 4:
            raise kind("no fourth")
        return batch(index)

    seen: list[tuple[int, Features]] = []
    # A StopIteration that escapes must not pass for the end of the epoch.
    with pytest.raises(RuntimeError if kind is StopIteration else kind):
        seen.extend(with_features(range(9), client, to_request=to_request, **OPTIONS))
    check(seen, range(4))


def test_an_error_of_a_call_comes_in_its_batchs_place(client: Client) -> None:
    def to_request(index: int) -> list[bytes] | Images:
        return [b"broken"] if index == 4 else batch(index)

    seen: list[tuple[int, Features]] = []
    with pytest.raises(ImageErrors, match="1 of 1 images failed"):
        seen.extend(with_features(range(9), client, to_request=to_request, **OPTIONS))
    check(seen, range(4))
    stream = with_features(range(9), client, to_request=to_request, on_error="return", **OPTIONS)
    assert [list(features.errors) for _, features in stream] == [[]] * 4 + [[0]] + [[]] * 4


def test_calls_that_fail_for_a_while_only_delay(server: FakeServer, client: Client) -> None:
    away = Failure(grpc.StatusCode.UNAVAILABLE, "starting", retry_after=0.01)
    full = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", retry_after=0.01)
    server.script = [away, None, away, full]
    check(with_features(range(6), client, to_request=batch, **OPTIONS), range(6))


def test_another_model_in_the_middle_of_an_epoch_is_an_error(server: FakeServer, client: Client) -> None:
    stream = with_features(range(6), client, to_request=batch, prefetch=0, **OPTIONS)
    epoch = iter(stream)
    seen = [next(epoch)]
    server.model = replace(MODEL, fingerprint="beef")
    with pytest.raises(ModelMismatch, match="fingerprint beef, those of the batches before from f00d"):
        seen.extend(epoch)
    check(seen, [0])
    with pytest.raises(ModelMismatch):
        list(stream)


def test_prefetch_is_checked(client: Client) -> None:
    with pytest.raises(ValueError, match="prefetch is -1; it must be"):
        with_features([0], client, to_request=batch, prefetch=-1)
    with pytest.raises(TypeError, match=r"prefetch is 1\.5; it must be"):
        with_features([0], client, to_request=batch, prefetch=cast(int, 1.5))


def test_options_are_checked_before_an_epoch_begins(client: Client) -> None:
    with pytest.raises(ValueError, match="outputs has 'clss'"):
        with_features([0], client, to_request=batch, outputs=cast(Any, "clss"))
    with pytest.raises(TypeError, match="there is no option 'sizes'"):
        with_features([0], client, to_request=batch, **cast(Any, {"sizes": 224}))


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Answer:
    """As much of Features as is counted."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.nbytes = 1000 * rows
        self.fingerprint = "f00d"

    def __len__(self) -> int:
        return self.rows


class ScriptedClient:
    """Takes `seconds` of the clock for each answer. `open` counts the calls of extract_many that have not ended."""

    def __init__(self, clock: Clock, seconds: float = 0.0) -> None:
        self.clock, self.seconds = clock, seconds
        self.open = 0

    def extract_many(self, batches: Iterable[int], *_: object, in_flight: int, **__: object) -> Iterator[Answer]:
        self.open += 1
        try:
            for rows in batches:
                self.clock.seconds += self.seconds
                yield Answer(rows)
        finally:
            self.open -= 1


def scripted(client: ScriptedClient, loader: Iterable[Any]) -> Any:
    stream: Any = with_features(loader, cast(Client, client), to_request=lambda rows: rows)
    stream._now = client.clock
    return stream


def test_statistics_tell_the_loops_three_times_apart() -> None:
    clock = Clock()

    def loader() -> Iterator[int]:
        for rows in (4, 4, 2):
            clock.seconds += 0.5
            yield rows
        clock.seconds += 0.5

    stream = scripted(ScriptedClient(clock, seconds=1.0), loader())
    assert stream.stats.seconds == stream.stats.wait_share == stream.stats.images_per_second == 0
    for number, _ in enumerate(stream, 1):
        clock.seconds += 4.0
        assert stream.stats.batches == number
    stats = stream.stats
    clock.seconds += 1000  # after the end
    assert (stats.batches, stats.images, stats.bytes) == (3, 10, 10_000)
    assert (stats.load_seconds, stats.wait_seconds, stats.seconds) == (2.0, 3.0, 17.0)
    assert stats.wait_share == 3 / 17
    assert stats.images_per_second == 10 / 17
    assert stats.bytes_per_second == 10_000 / 17
    list(stream)
    assert (stream.stats.batches, stream.stats.wait_seconds) == (0, 0.0)  # of this epoch alone


class Forking:
    """A loader that, as a DataLoader does, forks when its iterator is made."""

    def __init__(self, client: ScriptedClient) -> None:
        self.client = client
        self.forked = 0

    def __iter__(self) -> Iterator[int]:
        assert self.client.open == 0, "forked with calls in flight"
        self.forked += 1
        return iter([1, 1, 1])


def test_a_loop_that_ends_early_leaves_nothing_in_flight() -> None:
    client = ScriptedClient(Clock())
    stream = scripted(client, Forking(client))
    for _ in stream:
        assert client.open == 1
        break
    assert client.open == 0

    def train() -> None:
        for _ in stream:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert client.open == 0


def test_the_loader_forks_before_the_first_call_and_after_the_last() -> None:
    client = ScriptedClient(Clock())
    loader = Forking(client)
    stream = scripted(client, loader)
    first = iter(stream)
    assert loader.forked == 1
    assert client.open == 0
    next(first)
    assert client.open == 1
    second = iter(stream)  # ends the first, which is still held
    assert loader.forked == 2
    assert len(list(second)) == 3
    assert client.open == 0
    with pytest.raises(RuntimeError, match="another epoch"):
        next(first)


def test_an_epoch_inside_of_another_of_the_same_does_not_end_it_as_if_all_batches_had_come(client: Client) -> None:
    stream = with_features(range(4), client, to_request=batch, **OPTIONS)
    outer: list[int] = []

    def train() -> None:
        for index, _ in stream:
            outer.append(index)
            check(stream, range(4))

    with pytest.raises(RuntimeError, match="which ended this one early; for two at a time, make two"):
        train()
    assert outer == [0]
    check(stream, range(4))
    # Two of one client are apart.
    other = with_features(range(3), client, to_request=batch, **OPTIONS)
    for index, _ in stream:
        check(other, range(3))
        outer.append(index)
    assert outer == [0, 0, 1, 2, 3]

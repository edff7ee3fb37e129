"""A training loop's batches, each with its features, while those of the next ones are on their way."""

from __future__ import annotations

import operator
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar, Unpack

import grpc

from dinov3_client import Client, ExtractOptions, Features, ModelMismatch, _request
from dinov3_client._images import ImageLike
from dinov3_client._request import TokenKind

Batch = TypeVar("Batch")


@dataclass
class Statistics:
    """Of one epoch, up to now; seconds are of wall clock."""

    batches: int = 0
    images: int = 0
    """Rows of features: images, or views of images."""
    bytes: int = 0
    """Of the answers."""
    wait_seconds: float = 0.0
    """That the loop waited for features."""
    load_seconds: float = 0.0
    """That the loop waited for its loader and `to_request`."""
    _now: Callable[[], float] = field(default=time.monotonic, repr=False)
    _began: float = field(init=False, repr=False)
    _ended: float | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self._began = self._now()

    @property
    def seconds(self) -> float:
        """Since the epoch began, until its end."""
        return (self._now() if self._ended is None else self._ended) - self._began

    @property
    def wait_share(self) -> float:
        """Share of the epoch's time in which the loop waited for features, 0 to 1."""
        return self._per_second(self.wait_seconds)

    @property
    def images_per_second(self) -> float:
        return self._per_second(self.images)

    @property
    def bytes_per_second(self) -> float:
        return self._per_second(self.bytes)

    def _per_second(self, amount: float) -> float:
        seconds = self.seconds
        return amount / seconds if seconds > 0 else 0.0


class FeatureLoader(Generic[Batch]):
    """What `with_features` makes: an iterable of `(batch, features)`, as often as its loader can be iterated.

    `stats` are the Statistics of the epoch that runs, or ran last. One epoch runs at a time: to begin another one
    cancels the calls of the one before, whose iterator then raises RuntimeError.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        client: Client,
        to_request: Callable[[Batch], ImageLike | Iterable[ImageLike]],
        outputs: TokenKind | Sequence[TokenKind],
        prefetch: int,
        options: ExtractOptions,
    ) -> None:
        self._loader = loader
        self._client = client
        self._to_request = to_request
        self._outputs = outputs
        self._prefetch = prefetch
        self._options = options
        self._now: Callable[[], float] = time.monotonic  # a test's clock
        self._fingerprint = ""  # of the first features
        self._answers: Generator[Features, None, None] | None = None  # of the epoch that runs, or ran last
        self.stats = Statistics(_now=lambda: 0.0)  # of no epoch yet

    def __len__(self) -> int:
        """Batches of an epoch, where the loader knows."""
        return len(self._loader)  # type: ignore[arg-type]  # else TypeError, as of any iterable

    def __iter__(self) -> Iterator[tuple[Batch, Features]]:
        if self._answers is not None:
            self._answers.close()
        # Here a DataLoader forks its workers: after the last call of the epoch before, ahead of the first of this one.
        batches = iter(self._loader)
        self.stats = Statistics(_now=self._now)
        pending: deque[Batch] = deque()
        # One more than `prefetch`: the batch that is waited for.
        requests = self._requests(batches, pending, self.stats)
        self._answers = self._client.extract_many(
            requests, self._outputs, in_flight=self._prefetch + 1, **self._options
        )
        return self._epoch(self._answers, pending, self.stats)

    def _requests(
        self, batches: Iterator[Batch], pending: deque[Batch], stats: Statistics
    ) -> Generator[ImageLike | Iterable[ImageLike], None, None]:
        began = self._now()
        for batch in batches:
            request = self._to_request(batch)
            stats.load_seconds += self._now() - began
            pending.append(batch)
            yield request
            began = self._now()
        stats.load_seconds += self._now() - began

    def _epoch(
        self, answers: Generator[Features, None, None], pending: deque[Batch], stats: Statistics
    ) -> Generator[tuple[Batch, Features], None, None]:
        try:
            while True:
                if self.stats is not stats:  # to end here would pass for the end of the loader
                    raise RuntimeError(
                        "another epoch of this with_features has begun, which ended this one before its last batch; "
                        "for two at a time make two, each of a loader of its own"
                    )
                began, loaded = self._now(), stats.load_seconds
                features = next(answers, None)
                stats.wait_seconds += self._now() - began - (stats.load_seconds - loaded)
                if features is None:
                    break
                self._check_model(features)
                stats.batches += 1
                stats.images += len(features)
                stats.bytes += features.nbytes
                yield pending.popleft(), features
        finally:
            answers.close()
            stats._ended = self._now()

    def _check_model(self, features: Features) -> None:
        """A server that comes back with other weights must not pass for the same teacher."""
        first = self._fingerprint = self._fingerprint or features.fingerprint
        if features.fingerprint != first:
            raise ModelMismatch(
                f"features came from the model with fingerprint {features.fingerprint}, those of the batches before "
                f"from {first}: the server serves another model now",
                code=grpc.StatusCode.FAILED_PRECONDITION,
            )


def with_features(
    loader: Iterable[Batch],
    client: Client,
    *,
    to_request: Callable[[Batch], ImageLike | Iterable[ImageLike]],
    outputs: TokenKind | Sequence[TokenKind] = ("cls", "patches"),
    prefetch: int = 2,
    **options: Unpack[ExtractOptions],
) -> FeatureLoader[Batch]:
    """The batches of `loader`, each with its features, while the requests of the next `prefetch` are in flight.

        for batch, features in with_features(loader, client, to_request=lambda batch: batch["views"]):
            teacher = features.torch().to(device)

    loader: a torch DataLoader or any other iterable. Where it can be iterated once for each epoch, so can the result,
        which also has its length and `stats`.
    to_request: makes of a batch what `Client.extract` takes as `images`.
    outputs, options: those of `Client.extract`.
    prefetch: how many batches the loader is read ahead. So many batches, requests and features are held in memory,
        and those of the batch that the loop works on; of one more while it waits.

    Every batch comes once, in the loader's order. Loader and `to_request` are called by the thread that iterates.
    Their errors, and those of the calls, are raised in the place of the batch that they belong to and end the epoch.
    A loop that is left early cancels what is in flight.

    While a server is away calls wait for it until the client's deadline. Where it comes back with another model than
    the one of the first features, in this epoch or a later one, ModelMismatch is raised.

    A DataLoader forks its workers when an epoch begins. That happens before the epoch's first call and after the last
    one of the epoch before, also where that one was left early: processes must not be forked while calls are in flight.
    """
    try:
        prefetch = operator.index(prefetch)
    except TypeError:
        raise TypeError(f"prefetch is {prefetch!r}; it must be a number of batches, 0 or more") from None
    if prefetch < 0:
        raise ValueError(f"prefetch is {prefetch}; it must be a number of batches, 0 or more")
    _request.options(outputs, **options)  # refused here, and not when the first epoch begins
    return FeatureLoader(loader, client, to_request, outputs, prefetch, options)

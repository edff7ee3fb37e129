"""Adds features to the batches of a training loop, prefetching those of the next batches."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, Unpack

import grpc

from dinov3_client import Client, ExtractOptions, Features, ModelMismatch, _request
from dinov3_client._checks import check_count
from dinov3_client._images import ImageLike
from dinov3_serving.features import TokenKind

Batch = TypeVar("Batch")


@dataclass
class Statistics:
    """Statistics of one epoch so far, in seconds of wall clock."""

    batches: int = 0
    images: int = 0
    """Rows of features: images, or views of images."""
    bytes: int = 0
    """Bytes received."""
    wait_seconds: float = 0.0
    """Time that the loop waited for features."""
    load_seconds: float = 0.0
    """Time that the loop waited for its loader and `to_request`."""
    _now: Callable[[], float] = field(default=time.monotonic, repr=False)
    _began: float = field(init=False, repr=False)
    _ended: float | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self._began = self._now()

    @property
    def seconds(self) -> float:
        """Duration of the epoch so far, or in all once it has ended."""
        return (self._now() if self._ended is None else self._ended) - self._began

    @property
    def wait_share(self) -> float:
        """Fraction of the epoch that the loop waited for features, 0 to 1."""
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
    """An iterable of `(batch, features)`, made by `with_features`; it can be iterated as often as its loader.

    `stats` are the Statistics of the current or last epoch. Only one epoch runs at a time: beginning another cancels
    the calls of the one before, whose iterator then raises RuntimeError.
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
        self._answers: Generator[Features, None, None] | None = None  # of the current or last epoch
        self.stats = Statistics(_now=lambda: 0.0)  # of no epoch yet

    def __len__(self) -> int:
        """The number of batches in an epoch, if the loader has a length."""
        return len(self._loader)  # type: ignore[arg-type]  # else TypeError, as of any iterable

    @property
    def sampler(self) -> Any:
        """The loader's, or None: Lightning calls its `set_epoch`."""
        return getattr(self._loader, "sampler", None)

    @property
    def batch_sampler(self) -> Any:
        """The loader's, or None: Lightning calls `set_epoch` of its sampler."""
        return getattr(self._loader, "batch_sampler", None)

    def __iter__(self) -> Iterator[tuple[Batch, Features]]:
        if self._answers is not None:
            self._answers.close()
        # A DataLoader forks its workers here: after the last call of the previous epoch, before the first of this one.
        batches = iter(self._loader)
        self.stats = Statistics(_now=self._now)
        pending: deque[Batch] = deque()
        # One more than `prefetch`: the batch that the loop waits for.
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
                if self.stats is not stats:  # a plain end would look like the end of the loader
                    raise RuntimeError(
                        "another epoch of this with_features has begun, which ended this one early; for two at a "
                        "time, make two, each with a loader of its own"
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
        """Raise ModelMismatch if the server now serves another model than in the batches before."""
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
    """Iterate over `loader` with the features of each batch, prefetching those of the next `prefetch` batches.

        for batch, features in with_features(loader, client, to_request=lambda batch: batch["views"]):
            teacher = features.torch().to(device)

    loader: a torch DataLoader or any other iterable. If it can be iterated once per epoch, so can the result, which
        also has its length and `stats`.
    to_request: converts a batch to the `images` of `Client.extract`.
    outputs, options: those of `Client.extract`.
    prefetch: how many batches to read ahead. So many batches, requests and features are in memory, plus those of the
        current batch, plus one more while the loop waits.

    Every batch comes once, in the loader's order. The iterating thread calls the loader and `to_request`. Their errors,
    and those of the calls, are raised in place of the batch that they belong to and end the epoch. Leaving the loop
    early cancels the calls in flight.

    While the server is unavailable, calls wait for it until the client's deadline. If it comes back with another model
    than that of the first features, in this epoch or a later one, ModelMismatch is raised.

    A DataLoader forks its workers when an epoch begins: before the first call of the epoch and after the last call of
    the previous one, even if that was left early. Processes must not be forked while calls are in flight.
    """
    prefetch = check_count("prefetch", prefetch, 0, "batches")
    _request.check_options(outputs, **options)  # raise errors here, not when the first epoch begins
    return FeatureLoader(loader, client, to_request, outputs, prefetch, options)

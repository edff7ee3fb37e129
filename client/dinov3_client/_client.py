"""The blocking client. Its logic is in `_session`; `_transport.blocking` executes it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from dinov3_client import _request
from dinov3_client._checks import check_count
from dinov3_client._features import Features
from dinov3_client._images import ImageLike, as_list
from dinov3_client._model import Model
from dinov3_client._pytorch import not_compiled
from dinov3_client._request import ExtractOptions, RequestOptions
from dinov3_client._session import BaseClient
from dinov3_client._transport.blocking import CancelScope, SleepFunction, run
from dinov3_client._transport.effects import Procedure, T
from dinov3_serving.features import TokenKind


class Client(BaseClient):
    """A client of a dinov3-serving server, for use from any thread.

    target: HOST:PORT; `dns:///HOST:PORT`, whose addresses take calls in turn; `unix:PATH`; or several of these, as a
        sequence or separated by commas (also `ipv4:ADDRESS:PORT,ADDRESS:PORT`). A call goes to the target with the
        fewest of this client's calls in flight; a target that cannot be reached is avoided for a while.
    connections: the most to each target. None: as many as it has frontends, up to 8. They are opened as calls need
        them, and spread over the frontends.
    deadline: seconds that a call may take in all. Until then a call is retried if no server answers or the queue of
        the server is full.
    token: sent with every call as `authorization: Bearer TOKEN`.
    tls_ca: PEM file with the authority of the server's certificate. tls_cert and tls_key: PEM files with the client's
        own certificate and private key (mutual TLS); without tls_ca the system's authorities are trusted. Without any
        of the three, the connection and the token on it are plain text.
    fingerprint: the model to accept, as in `model().fingerprint`, or in `Features.fingerprint` for a model with a
        projection. Any other model raises ModelMismatch.
    keepalive: seconds without traffic during a call after which the connection is pinged, at least 5; None: never.

    mixed_models: accept that several targets serve different models; else ModelMismatch is raised when they do.

    Nothing is sent before the first call. A client without a call in flight can be forked and pickled: each process has
    connections of its own. Errors: see `dinov3_client.Dinov3Error` and its subclasses.
    """

    # Tests replace it.
    _sleep: SleepFunction = staticmethod(threading.Event.wait)

    @staticmethod
    def _dial(target: str, options: Any, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
        if credentials is None:
            return grpc.insecure_channel(target, options)
        return grpc.secure_channel(target, credentials, options)

    @staticmethod
    def _find_loop() -> None:
        return None

    def close(self) -> None:
        """Close the connections. Calls in flight fail with a ServerError (CANCELLED)."""
        for _, channels in self._session.close():
            for channel in channels:
                channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @not_compiled
    def model(self, *, deadline: float | None = None) -> Model:
        """Return the server's model and limits.

        Raises Dinov3Error, such as Unavailable if no server answers within `deadline` seconds (None: the client's).
        """
        return self._run(self._session.model(deadline))

    @not_compiled
    def wait_ready(self, timeout: float = 60.0) -> Model:
        """Wait for up to `timeout` seconds until a server answers and its model is ready; return the model.

        Raises Unavailable or DeadlineExceeded, with the last reason, on timeout, and errors that waiting cannot fix
        (a wrong token, another model than the pinned one) at once.
        """
        return self._run(self._session.wait_ready(timeout))

    @not_compiled
    def extract(
        self,
        images: ImageLike | Iterable[ImageLike],
        outputs: TokenKind | Sequence[TokenKind] = ("cls", "patches"),
        **options: Unpack[ExtractOptions],
    ) -> Features:
        """Return the features of one image or several, which may be of different kinds and sizes.

        images: each is encoded bytes (`Model.image_formats`), a path (the file is read here and sent as it is),
            a file object (read once, from its position), a PIL image (its pixels are sent, as `convert("RGB")` gives
            them), a uint8 array [H, W, 3] (RGB) or a float32 array [3, H, W], already normalized by `model().mean` and
            `std`, which is never resized; a torch tensor [3, H, W] or [H, W, 3], uint8 or normalized; or ImageViews of
            any of these but normalized pixels. One array [N, H, W, 3] or [N, 3, H, W] stands for N images. Iterators
            are read while the call runs.
        outputs: any of "cls", "patches" and "registers"; () if `layers` name outputs of their own.
        options: see ExtractOptions.

        Raises ValueError, TypeError or OSError for errors found before anything is sent, else Dinov3Error.
        """
        return self._run(self._session.extract(images, _request.check_options(outputs, **options)))

    @not_compiled
    def extract_many(
        self,
        batches: Iterable[ImageLike | Iterable[ImageLike]],
        outputs: TokenKind | Sequence[TokenKind] = ("cls", "patches"),
        *,
        in_flight: int = 4,
        **options: Unpack[ExtractOptions],
    ) -> Generator[Features, None, None]:
        """Yield the features of each of `batches`, in order, with up to `in_flight` batches in flight.

        A batch is what `extract` takes as `images`; `outputs` and `options` are those of `extract`, and the deadline
        holds for each batch. `batches` is read in the caller's thread, while it waits for features, and at most
        `in_flight` batches ahead of them.

        An error, of a batch or of `batches` itself, is raised in place of the batch's features and ends the iteration.
        Closing the generator cancels the calls in flight.
        """
        return self._many(
            iter(batches), check_count("in_flight", in_flight, 1, "batches"), _request.check_options(outputs, **options)
        )

    def _many(
        self, batches: Iterator[ImageLike | Iterable[ImageLike]], in_flight: int, options: RequestOptions
    ) -> Generator[Features, None, None]:
        pending: deque[Future[Features]] = deque()
        more = True
        with CancelScope() as scope:
            while True:
                while more and len(pending) < in_flight:
                    try:
                        images = as_list(next(batches))
                    except StopIteration:
                        more = False
                    except Exception as error:
                        more = False
                        pending.append(_failed(error))
                    else:
                        procedure = self._session.extract(images, options)
                        pending.append(scope.start(partial(self._run, procedure, scope)))
                if not pending:
                    return
                yield pending.popleft().result()

    def _run(self, procedure: Procedure[T], scope: CancelScope | None = None) -> T:
        return run(procedure, scope or CancelScope(), self._sleep)


def _failed(error: Exception) -> Future[Features]:
    future: Future[Features] = Future()
    future.set_exception(error)
    return future

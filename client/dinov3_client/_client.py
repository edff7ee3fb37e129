"""The blocking client. What it does is in `_session`, how it waits in `_blocking`."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from dinov3_client import _many, _request
from dinov3_client._features import Features
from dinov3_client._images import ImageLike
from dinov3_client._model import Model
from dinov3_client._request import ExtractOptions, Options, TokenKind
from dinov3_client._session import Connected
from dinov3_client._transport.blocking import Scope, Sleep, run
from dinov3_client._transport.flow import Flow, T


class Client(Connected):
    """Features of a dinov3-serving server; threads may share a client.

    target: HOST:PORT; `dns:///HOST:PORT`, all of whose addresses take calls in turn; `unix:PATH`; or a sequence of
        these. A call goes to the one with the fewest of our calls in flight; one that cannot be reached is left alone
        for a while, and its calls go to the others.
    connections: to each target at most. None: as many as it has frontends, up to 8. They are opened as calls need
        them, and spread over the frontends.
    deadline: seconds that a call may take, with everything: while it lasts, a call is tried again when no server
        answers or its queue is full.
    token: sent with every call as `authorization: Bearer TOKEN`.
    tls_ca: PEM file that vouches for the server's certificate; tls_cert and tls_key: PEM files of the client's own
        certificate and its private key (mutual TLS), for a server of the system's own authorities also without tls_ca.
        Without any the connection is plain text, the token included.
    fingerprint: of the only model whose features are wanted, as `model().fingerprint` has it, or, with a projection,
        as `Features.fingerprint` has it. Whatever else a server has raises ModelMismatch.
    keepalive: seconds after which a connection on which nothing moves during a call is probed, at least 5; None: never.

    Nothing is sent before the first call. A client without a call in flight may be inherited by a forked process, and
    pickled: each process has connections of its own. Errors: see `dinov3_client.Dinov3Error` and its subclasses.
    """

    # For tests, which have no time to wait.
    _sleep: Sleep = staticmethod(threading.Event.wait)

    @staticmethod
    def _dial(target: str, options: Any, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
        if credentials is None:
            return grpc.insecure_channel(target, options)
        return grpc.secure_channel(target, credentials, options)

    def close(self) -> None:
        """Drops the connections; calls under way end with a ServerError (CANCELLED)."""
        for channel in self._session.close():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def model(self, *, deadline: float | None = None) -> Model:
        """What is served, and under which limits: asked of the server anew at each call."""
        return self._run(self._session.model(deadline))

    def wait_ready(self, timeout: float = 60.0) -> Model:
        """Wait for up to `timeout` seconds until a server answers and its model is ready.

        Raises Unavailable or DeadlineExceeded, with the last reason, when the time is over; whatever waiting does not
        mend (a wrong token, another model than the pinned one) at once.
        """
        return self._run(self._session.wait_ready(timeout))

    def extract(
        self,
        images: ImageLike | Iterable[ImageLike],
        outputs: TokenKind | Sequence[TokenKind] = ("cls", "patches"),
        **options: Unpack[ExtractOptions],
    ) -> Features:
        """The features of one image or several, which may be of different kinds and sizes.

        images: each is encoded bytes (JPEG, PNG, WebP, BMP, TIFF), a path (the file is read here and sent as it is),
            a PIL image (its pixels are sent, as `convert("RGB")` gives them), a uint8 array [H, W, 3] (RGB) or a
            float32 array [3, H, W], already normalised by `model().mean` and `std`, which is never resized; or
            ImageViews of one of these, but of float32 arrays. One array [N, H, W, 3] or [N, 3, H, W] stands for N
            images.
        outputs: any of "cls", "patches" and "registers"; () where `layers` name outputs of their own.
        options: see ExtractOptions.

        Raises ValueError, TypeError or OSError for what is wrong before anything is sent, and Dinov3Error else.
        """
        return self._run(self._session.extract(images, _request.options(outputs, **options)))

    def extract_many(
        self,
        batches: Iterable[ImageLike | Iterable[ImageLike]],
        outputs: TokenKind | Sequence[TokenKind] = ("cls", "patches"),
        *,
        in_flight: int = 4,
        **options: Unpack[ExtractOptions],
    ) -> Generator[Features, None, None]:
        """The features of each of `batches`, in their order, with the next ones under way.

        A batch is what `extract` takes as `images`; `outputs` and `options` are those of `extract`, the deadline that
        of each batch. `batches` is read in the caller's thread, while it asks for features, and never further than
        `in_flight` batches ahead of them.

        An error, of a batch or of `batches` itself, is raised where the batch's features would come, and ends the
        iteration. Closing it cancels what is in flight.
        """
        return self._many(iter(batches), _many.check_in_flight(in_flight), _request.options(outputs, **options))

    def _many(
        self, batches: Iterator[ImageLike | Iterable[ImageLike]], in_flight: int, wanted: Options
    ) -> Generator[Features, None, None]:
        pending: deque[Future[Features]] = deque()
        more = True
        with Scope() as scope:
            while True:
                while more and len(pending) < in_flight:
                    try:
                        images = _many.held(next(batches))
                    except StopIteration:
                        more = False
                    except Exception as error:
                        more = False
                        pending.append(_failed(error))
                    else:
                        flow = self._session.extract(images, wanted)
                        pending.append(scope.start(partial(self._run, flow, scope)))
                if not pending:
                    return
                yield pending.popleft().result()

    def _run(self, flow: Flow[T], scope: Scope | None = None) -> T:
        return run(flow, scope or Scope(), self._sleep)


def _failed(error: Exception) -> Future[Features]:
    future: Future[Features] = Future()
    future.set_exception(error)
    return future

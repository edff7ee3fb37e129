"""The blocking client. What it sends and reads is made in `_split` and `_response`."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from dinov3_client import _channel, _features, _images, _request, _response, _split
from dinov3_client._checks import check_deadline
from dinov3_client._errors import ModelMismatch, StatusError, Unavailable, from_rpc_error
from dinov3_client._features import Features
from dinov3_client._images import ImageLike
from dinov3_client._model import Model, read_model
from dinov3_client._request import ExtractOptions, TokenKind
from dinov3_client._retry import Attempts
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.feature_service_pb2_grpc import FeatureServiceStub

_log = logging.getLogger("dinov3_client")


class Client:
    """A connection to a dinov3-serving server; it may be shared by threads.

    `target` is HOST:PORT. `deadline` is the seconds that a call may take, with everything: while it lasts, a call
    is tried again when no server answers or its queue is full. `token` is sent with every call. `tls_ca` is the PEM
    file that vouches for the server's certificate; without it the connection is plain text, the token included.

    Nothing is sent before the first call. Errors: see `dinov3_client.Dinov3Error` and its subclasses.
    """

    def __init__(
        self,
        target: str,
        *,
        deadline: float = 60.0,
        token: str | None = None,
        tls_ca: str | os.PathLike[str] | None = None,
    ) -> None:
        self._deadline = check_deadline(deadline)
        self._target = _channel.check_target(target)
        self._metadata = _channel.metadata(token)
        credentials = _channel.credentials(tls_ca)
        self._tls = credentials is not None
        self._channel = (
            grpc.insecure_channel(target, _channel.OPTIONS)
            if credentials is None
            else grpc.secure_channel(target, credentials, _channel.OPTIONS)
        )
        self._stub: Any = FeatureServiceStub(self._channel)  # type: ignore[no-untyped-call]
        # Bytes as they are: `_wire` makes and reads them.
        self._extract: Any = self._channel.unary_unary("/dinov3_serving.v1.FeatureService/Extract")
        self._model: Model | None = None
        # For tests, which have no time to wait.
        self._now: Callable[[], float] = time.monotonic
        self._sleep: Callable[[float], None] = time.sleep
        self._rand: Callable[[], float] = random.random

    def close(self) -> None:
        """Drops the connection; calls under way end with a ServerError (CANCELLED)."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def model(self, *, deadline: float | None = None) -> Model:
        """What is served, and under which limits: asked of the server anew at each call."""
        return self._get_model(self._end(deadline))

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
        wanted = _request.options(outputs, **options)
        sources = _images.load(images, wanted.exif)
        end = self._end(wanted.deadline)
        answers = []
        try:
            queries = _split.queries(sources, wanted, self._known_model(end))
            for query in queries:
                try:
                    answers.append(_response.read(self._call(self._extract, query.data, end), query))
                except StatusError as error:
                    query.of_the_call(error)
                    raise
        except ModelMismatch:
            self._model = None  # another one is served by now: the next call asks
            raise
        return _features.join(queries, answers, wanted.on_error)

    def _known_model(self, end: float) -> Model:
        if self._model is None:
            self._model = self._get_model(end)
        return self._model

    def _get_model(self, end: float) -> Model:
        return read_model(self._call(self._stub.GetModel, pb.GetModelRequest(), end))

    def _end(self, deadline: float | None) -> float:
        return self._now() + (self._deadline if deadline is None else check_deadline(deadline))

    def _call(self, method: Callable[..., Any], message: object, end: float) -> Any:
        """One answer, after as many attempts as `_retry` allows until `end`."""
        attempts = Attempts(end, self._now, self._rand)
        while True:
            try:
                return method(message, timeout=attempts.remaining(), metadata=self._metadata)
            except grpc.RpcError as caught:
                error = from_rpc_error(caught)
            if isinstance(error, Unavailable) and error.retry_after is None:
                # It is gRPC that says so, of the connection: it names addresses, not what the user gave.
                how, other = ("with TLS", "with") if self._tls else ("in plain text", "without")
                error.message = f"cannot reach {self._target} {how} (is it up, and {other} TLS?): {error.message}"
            pause = attempts.pause(error)
            if isinstance(error, Unavailable) and error.attempts == 1:
                _log.warning("%s; trying again for up to %.0f s", error.message, attempts.remaining())
            self._sleep(pause)

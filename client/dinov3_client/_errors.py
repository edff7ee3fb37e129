"""The errors of the client.

    Dinov3Error
      StatusError            a call (or one image of it) failed; carries the gRPC status
        InvalidRequest       INVALID_ARGUMENT: `violations` name the fields at fault
        Overloaded           RESOURCE_EXHAUSTED with RetryInfo; retried until the deadline
        MessageTooLarge      RESOURCE_EXHAUSTED without it: over a message limit; never retried
        DeadlineExceeded     DEADLINE_EXCEEDED
        Unavailable          UNAVAILABLE: no server answers, or none is ready; retried until the deadline
        Unauthenticated      UNAUTHENTICATED
        ModelMismatch        FAILED_PRECONDITION: another model is served
        ServerError          INTERNAL and every other status
      ImageErrors            some images of a call failed; `errors` has a StatusError for each
      InvalidResponse        the response breaks the protocol
      MixedSizes             one packed array was asked of rows of several input sizes

Invalid arguments raise ValueError or TypeError before anything is sent. Files that cannot be read raise OSError.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple, Self

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc_status import rpc_status

from dinov3_client._text import printable

_SHOWN_IMAGES = 5
# The ids that the server makes or accepts. Others could garble a message.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class FieldViolation(NamedTuple):
    """An invalid field of the request. `field` is its protobuf path, such as `images[3].encoded`."""

    field: str
    description: str


class Dinov3Error(Exception):
    """The base of all errors of this client."""


class StatusError(Dinov3Error):
    """A call, or one image of it, failed with a gRPC status.

    code, message: the status and its text.
    violations: the invalid fields.
    retry_after: seconds after which the server suggests a retry; None if it suggests none.
    request_id: the id of the (last) request in the server's logs, if the server sent one.
    attempts: how often the call was tried.
    previous: the error of the attempt before, if there was one.
    image, path: of the error of one image, its index within the call, and the path of its file if it has one.
    """

    image: int | None = None
    path: str | None = None

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        violations: tuple[FieldViolation, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.violations = violations
        self.retry_after = retry_after
        self.request_id: str | None = None
        self.attempts = 1
        self.previous: StatusError | None = None

    def of_image(self, image: int, path: str | None) -> Self:
        """Note that this is the error of image `image` of a call, and return it."""
        self.image, self.path = image, path
        return self

    def __str__(self) -> str:
        text = self.message
        if self.image is not None:
            text = f"image {self.image}{f' ({self.path})' if self.path else ''}: {text}"
        if self.attempts > 1:
            text += f" (attempt {self.attempts}"
            if self.previous is not None and self.previous.code is not self.code:
                text += f"; the one before: {self.previous.code.name}: {self.previous.message}"
            text += ")"
        if self.request_id is not None:
            text += f" (request id {self.request_id})"
        return text


class InvalidRequest(StatusError):
    """The request, or this image of it, is invalid."""


class Overloaded(StatusError):
    """The server's queue or memory stayed full until the deadline."""


class MessageTooLarge(StatusError):
    """The request or its answer is over a message limit of gRPC."""


class DeadlineExceeded(StatusError):
    """The deadline passed before the answer came."""


class Unavailable(StatusError):
    """No server could be reached, or none was ready, until the deadline."""


class Unauthenticated(StatusError):
    """The server requires a token, or does not accept this one."""


class ModelMismatch(StatusError):
    """The server serves another model than the one that the request was made for."""


class ServerError(StatusError):
    """The server failed. The message has an id to look for in the server's log."""


class ImageErrors(Dinov3Error):
    """Some images of a call failed. `errors` maps the index of each to its error."""

    def __init__(self, message: str, *, errors: Mapping[int, StatusError] | None = None) -> None:
        super().__init__(message)
        self.errors: dict[int, StatusError] = dict(errors or {})


class InvalidResponse(Dinov3Error):
    """The response breaks the protocol: the server, or a proxy, is broken or of another version."""


class MixedSizes(Dinov3Error):
    """The rows have several input sizes, so that their patches do not fit one array."""


# RESOURCE_EXHAUSTED is Overloaded or MessageTooLarge, by its RetryInfo: see `from_status`.
_TYPES: dict[grpc.StatusCode, type[StatusError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.FAILED_PRECONDITION: ModelMismatch,
}


def from_status(code: int, message: str, details: Iterable[Any]) -> StatusError:
    """Return the error of a google.rpc.Status, given by its fields.

    Texts are made printable. Malformed details and negative pauses are ignored.
    """
    message = printable(message)
    violations: list[FieldViolation] = []
    retry_after: float | None = None
    for detail in details:
        bad_request, retry_info = BadRequest(), RetryInfo()
        with suppress(DecodeError):
            if detail.Unpack(bad_request):
                violations += [
                    FieldViolation(printable(each.field), printable(each.description))
                    for each in bad_request.field_violations
                ]
            elif detail.Unpack(retry_info) and (delay := retry_info.retry_delay.ToNanoseconds()) >= 0:
                retry_after = delay / 1e9
    status = _CODES.get(code, grpc.StatusCode.UNKNOWN)
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and retry_after is None:
        kind: type[StatusError] = MessageTooLarge
        message = (
            f"a message is over the limit: {message}; send fewer images in a call, or request fewer outputs "
            "or a smaller dtype (the server's limit is model().limits.max_message_bytes)"
        )
    elif status is grpc.StatusCode.RESOURCE_EXHAUSTED:
        kind = Overloaded
    else:
        kind = _TYPES.get(status, ServerError)
    # The text of our own gRPC library, with UNIMPLEMENTED in older versions of it.
    if status in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED) and "Compression algorithm" in message:
        message = (
            "the response is compressed, which this client refuses; configure the server or proxy to send it "
            f"uncompressed ({message})"
        )
    elif status is grpc.StatusCode.UNIMPLEMENTED:
        message = f"the server at this address does not offer dinov3_serving.v1.FeatureService ({message})"
    return kind(message, code=status, violations=tuple(violations), retry_after=retry_after)


def from_rpc_error(error: grpc.RpcError) -> StatusError:
    """Return the error of a failed call of grpc or grpc.aio."""
    call: grpc.Call = error  # type: ignore[assignment]  # both raise the call itself
    try:
        status = rpc_status.from_call(call)
    except (ValueError, DecodeError):  # malformed details, or details of another status: use the status
        status = None
    found = from_status(call.code().value[0], call.details() or call.code().name, status.details if status else ())
    for key, value in call.trailing_metadata() or ():
        if key == "x-request-id" and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            found.request_id = value
    return found


def model_mismatch(pinned: str, served: str) -> ModelMismatch:
    """Return the error for a fingerprint that the client itself found to differ."""
    return ModelMismatch(
        f"the server's model has the fingerprint {served}, the request is pinned to {pinned}",
        code=grpc.StatusCode.FAILED_PRECONDITION,
    )


def image_errors(errors: Mapping[int, StatusError], count: int) -> ImageErrors:
    """Return the error of a call of `count` images."""
    shown = [str(errors[index]) for index in sorted(errors)[:_SHOWN_IMAGES]]
    if len(errors) > _SHOWN_IMAGES:
        shown.append(f"and {len(errors) - _SHOWN_IMAGES} more, all in `errors`")
    return ImageErrors(f"{len(errors)} of {count} images failed: {'; '.join(shown)}", errors=errors)

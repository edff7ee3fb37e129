"""Every error that a caller of the client can meet.

    Dinov3Error
      StatusError            a call (or one image of it) failed; carries the gRPC status
        InvalidRequest       INVALID_ARGUMENT: `violations` name the fields at fault
        Overloaded           RESOURCE_EXHAUSTED with RetryInfo; retried until the deadline
        MessageTooLarge      RESOURCE_EXHAUSTED without it: over a message limit; never retried
        DeadlineExceeded     DEADLINE_EXCEEDED
        Unavailable          UNAVAILABLE: nobody answers, or not yet; retried until the deadline
        Unauthenticated      UNAUTHENTICATED
        ModelMismatch        FAILED_PRECONDITION: another model is served
        ServerError          INTERNAL and every other status
      ImageErrors            some images of a request failed; `errors` has a StatusError for each
      InvalidResponse        the answer is not what the protocol promises
      MixedSizes             one packed array was asked of images of several input sizes

Misuse that shows before anything is sent raises ValueError or TypeError. Files that cannot be read raise OSError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc_status import rpc_status

from dinov3_client._text import printable

_SHOWN_IMAGES = 5

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class FieldViolation(NamedTuple):
    """One field of the request that cannot be used. `field` is its protobuf path, `images[3].encoded` for one."""

    field: str
    description: str


class Dinov3Error(Exception):
    """Base of all errors of this client."""


class StatusError(Dinov3Error):
    """A call, or one image of it, that failed with a gRPC status.

    `code` is the status, `message` its text, `violations` the fields at fault, `retry_after` the seconds
    after which the server says that another try can help (None: it does not say), `attempts` how often
    the call was tried, and `previous` the error of the attempt before, where there was one.
    """

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
        self.attempts = 1
        self.previous: StatusError | None = None

    def __str__(self) -> str:
        text = self.message
        if self.attempts > 1:
            text += f" (attempt {self.attempts}"
            if self.previous is not None and self.previous.code is not self.code:
                text += f"; the one before: {self.previous.code.name}: {self.previous.message}"
            text += ")"
        return text


class InvalidRequest(StatusError):
    """The request, or this image, cannot be used as it is."""


class Overloaded(StatusError):
    """The server's queue or memory stayed full until the deadline."""


class MessageTooLarge(StatusError):
    """The request or its answer is over a message limit of gRPC."""


class DeadlineExceeded(StatusError):
    """The deadline passed before the answer came."""


class Unavailable(StatusError):
    """No server could be reached, or none was ready, until the deadline."""


class Unauthenticated(StatusError):
    """The server wants a token, or another one."""


class ModelMismatch(StatusError):
    """The server does not serve the model that the request was made for."""


class ServerError(StatusError):
    """The server failed; its message has an id that its log has too."""


class ImageErrors(Dinov3Error):
    """Some images of a request failed. `errors` maps the index of each to its error."""

    def __init__(self, message: str, *, errors: Mapping[int, StatusError] | None = None) -> None:
        super().__init__(message)
        self.errors: dict[int, StatusError] = dict(errors or {})


class InvalidResponse(Dinov3Error):
    """The answer breaks the protocol: the server, or something between, is broken or of another version."""


class MixedSizes(Dinov3Error):
    """The images came out in several input sizes, so that their patches do not fit one array."""


# The one table of statuses. RESOURCE_EXHAUSTED is told apart by RetryInfo, in `from_status`.
_TYPES: dict[grpc.StatusCode, type[StatusError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.FAILED_PRECONDITION: ModelMismatch,
}


def from_status(code: int, message: str, details: Iterable[Any]) -> StatusError:
    """The error of a google.rpc.Status given by its fields. Its texts are made printable; details that are none, or
    that ask for a pause of less than nothing, are left out."""
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
            f"a message limit of gRPC was passed: {message}; send fewer images in a call, or ask for fewer outputs "
            "or a smaller dtype (the server's limit is model().limits.max_message_bytes)"
        )
    elif status is grpc.StatusCode.RESOURCE_EXHAUSTED:
        kind = Overloaded
    else:
        kind = _TYPES.get(status, ServerError)
    if status is grpc.StatusCode.INTERNAL and "Compression algorithm" in message:  # gRPC's words, on this side
        message = (
            f"the answer came compressed, which this client refuses; have server or proxy send it plain ({message})"
        )
    if status is grpc.StatusCode.UNIMPLEMENTED:
        message = f"the server at this address does not offer dinov3_serving.v1.FeatureService ({message})"
    return kind(message, code=status, violations=tuple(violations), retry_after=retry_after)


def from_rpc_error(error: grpc.RpcError) -> StatusError:
    """The error of a failed call, of grpc or of grpc.aio."""
    call: grpc.Call = error  # type: ignore[assignment]  # what both raise is the call, too
    try:
        status = rpc_status.from_call(call)
    except (ValueError, DecodeError):  # details that disagree with the status, or are none: the status is what counts
        status = None
    return from_status(call.code().value[0], call.details() or call.code().name, status.details if status else ())


def model_mismatch(pinned: str, served: str) -> ModelMismatch:
    """For what the client finds by itself, of two fingerprints."""
    return ModelMismatch(
        f"the server's model has the fingerprint {served}, the request is pinned to {pinned}",
        code=grpc.StatusCode.FAILED_PRECONDITION,
    )


def image_errors(errors: Mapping[int, StatusError], labels: Mapping[int, str], count: int) -> ImageErrors:
    """The error to raise for a request of `count` images; `labels` names those that came from files."""
    shown = [
        f"image {index}{f' ({labels[index]})' if index in labels else ''}: {errors[index].message}"
        for index in sorted(errors)[:_SHOWN_IMAGES]
    ]
    if len(errors) > _SHOWN_IMAGES:
        shown.append(f"and {len(errors) - _SHOWN_IMAGES} more, all in `errors`")
    return ImageErrors(f"{len(errors)} of {count} images failed: {'; '.join(shown)}", errors=errors)

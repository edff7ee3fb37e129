"""Turn a ServingError into the google.rpc.Status that clients receive, as docs/errors.md describes."""

from __future__ import annotations

import logging
import traceback
from typing import NoReturn

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc_status import rpc_status

from dinov3_server.errors import InternalError, InvalidInput, Overloaded, ServingError, Unavailable
from dinov3_serving.v1 import feature_service_pb2 as pb

logger = logging.getLogger(__name__)

# A status is sent as HTTP/2 trailers, of which peers accept 8 KiB by default. They contain the message three times:
# once percent-encoded (up to 3 bytes per byte) and twice in base64 (4/3).
_MOST_MESSAGE_BYTES = 1000
_MOST_FIELD_BYTES = 200


def status_of(error: ServingError) -> pb.Status:
    """Return the status of a call, of a message of a stream, or of one image that failed with `error`."""
    message = _cut(str(error), _MOST_MESSAGE_BYTES)
    status = pb.Status(code=code_of(error).value[0], message=message)
    if isinstance(error, InvalidInput) and error.field:
        violation = BadRequest.FieldViolation(field=_cut(error.field, _MOST_FIELD_BYTES), description=message)
        status.details.append(_packed(BadRequest(field_violations=[violation])))
    elif isinstance(error, Overloaded | Unavailable):
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after * 1e9))
        status.details.append(_packed(RetryInfo(retry_delay=delay)))
    return status


def code_of(error: ServingError) -> grpc.StatusCode:
    return grpc.StatusCode[error.status]


def serving_error(error: Exception) -> ServingError:
    """Return `error` if it is a ServingError; else log its traceback and return an InternalError with the log's id."""
    if isinstance(error, ServingError):
        return error
    internal = InternalError("the server failed on this request")
    logger.error("unexpected error, id %s", internal.error_id, exc_info=error)
    return internal


def without_traceback(error: Exception) -> ServingError:
    """Return `error` as a ServingError to be stored until the answer is built, without frames that refer to pixels."""
    # Since Python 3.12 a frame of contextlib is in a reference cycle with the traceback that passed through it. If the
    # frames were not cleared, they and their views of the arena would live until the next garbage collection.
    traceback.clear_frames(error.__traceback__)
    failure = serving_error(error).with_traceback(None)
    failure.__cause__ = failure.__context__ = None
    return failure


async def abort(context: grpc.aio.ServicerContext[bytes, bytes], status: pb.Status) -> NoReturn:
    """End the call with `status`."""
    await context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort_with_status raises")


def _packed(detail: Message) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed


def _cut(text: str, most_bytes: int) -> str:
    data = text.encode(errors="replace")
    return text if len(data) <= most_bytes else data[: most_bytes - 3].decode(errors="ignore") + "…"

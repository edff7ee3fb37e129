"""Errors as a person at the other end of the wire meets them: `ServingError` to google.rpc.Status.

`docs/errors.md` is this table in words.
"""

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

# A status travels as HTTP/2 trailers, of which peers take 8 KiB by default. It holds the message three times: percent-
# encoded (up to 3 bytes a byte) and twice in base64 (4/3).
_MOST_MESSAGE_BYTES = 1000
_MOST_FIELD_BYTES = 200


def status_of(error: ServingError) -> pb.Status:
    """The status of a call, of a message of a stream, or of one image."""
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
    """`error` itself if it is one; else it is our fault: the log gets its traceback, the wire only an id."""
    if isinstance(error, ServingError):
        return error
    internal = InternalError("the server failed on this request")
    logger.error("unexpected error, id %s", internal.error_id, exc_info=error)
    return internal


def without_traceback(error: Exception) -> ServingError:
    """`error` to be kept until the answer is made: without the frames that it came through, which hold pixels."""
    # From Python 3.12 on a frame of contextlib's is part of a cycle with the traceback that passed through it: without
    # this the frames, and the views of the arena in them, would live until the next garbage collection.
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

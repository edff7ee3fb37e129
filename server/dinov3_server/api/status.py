"""Turn a ServingError into the google.rpc.Status that clients receive, as docs/errors.md describes."""

from __future__ import annotations

import logging
from typing import NoReturn

import grpc
from grpc_status import rpc_status

from dinov3_server.api.requests import REQUEST_ID
from dinov3_server.errors import InternalError, InvalidInput, Overloaded, ServingError, Unavailable
from dinov3_serving.errors import without_traceback
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.status import make_status

logger = logging.getLogger(__name__)


def status_of(error: ServingError) -> pb.Status:
    """Return the status of a call, of a message of a stream, or of one image that failed with `error`."""
    field = error.field if isinstance(error, InvalidInput) else ""
    retry_after = error.retry_after if isinstance(error, Overloaded | Unavailable) else None
    return make_status(grpc.StatusCode[error.status].value[0], str(error), field=field, retry_after=retry_after)


def serving_error(error: Exception) -> ServingError:
    """Return `error` if it is a ServingError; else log its traceback and return an InternalError with the log's id."""
    if isinstance(error, ServingError):
        return error
    internal = InternalError("the server failed on this request")
    logger.error("unexpected error, id %s", internal.error_id, exc_info=error)
    return internal


def failure_of(error: Exception) -> ServingError:
    """Return the ServingError of `error`, to be stored until the answer is built."""
    return without_traceback(serving_error(error))


async def abort(context: grpc.aio.ServicerContext[bytes, bytes], status: pb.Status, request_id: str) -> NoReturn:
    """End the call with `status`. Trailing metadata given to abort replaces what was set, so the id is added again."""
    grpc_status = rpc_status.to_status(status)
    trailing = (*(grpc_status.trailing_metadata or ()), (REQUEST_ID, request_id))
    await context.abort(grpc_status.code, grpc_status.details or "", trailing)
    raise AssertionError("abort_with_status raises")

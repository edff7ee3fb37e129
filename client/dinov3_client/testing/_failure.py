"""Errors as the service sends them."""

from __future__ import annotations

import grpc

from dinov3_serving.errors import InvalidInput, ServingError
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.status import make_status


class Failure(Exception):
    """The error of a call, of a message in a stream, or of one image.

    code, message: the gRPC status and its text.
    retry_after: seconds for a RetryInfo, after which clients retry.
    field: protobuf path of the invalid field, for a BadRequest.
    """

    def __init__(
        self, code: grpc.StatusCode, message: str, *, retry_after: float | None = None, field: str = ""
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after
        self.field = field


def status_of(error: Failure | ServingError) -> pb.Status:
    """Return the status that a server sends for an error; its fields are those of google.rpc.Status."""
    if isinstance(error, Failure):
        return make_status(error.code.value[0], error.message, field=error.field, retry_after=error.retry_after)
    field = error.field if isinstance(error, InvalidInput) else ""
    return make_status(grpc.StatusCode[error.status].value[0], str(error), field=field)

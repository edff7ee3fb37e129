"""Errors as the service sends them."""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, RetryInfo

from dinov3_serving.v1 import feature_service_pb2 as pb


class Failure(Exception):
    """The error of a call, of a message in a stream, or of one image.

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

    def status(self) -> pb.Status:
        """Return the status as sent; its fields are those of google.rpc.Status."""
        status = pb.Status(code=self.code.value[0], message=self.message)
        if self.field:
            violation = BadRequest.FieldViolation(field=self.field, description=self.message)
            status.details.append(_packed(BadRequest(field_violations=[violation])))
        if self.retry_after is not None:
            delay = Duration()
            delay.FromNanoseconds(round(self.retry_after * 1e9))
            status.details.append(_packed(RetryInfo(retry_delay=delay)))
        return status


def invalid(message: str, field: str) -> Failure:
    """Return the INVALID_ARGUMENT of a field."""
    return Failure(grpc.StatusCode.INVALID_ARGUMENT, message, field=field)


def _packed(detail: Message) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed

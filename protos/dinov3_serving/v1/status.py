"""The statuses of errors, as docs/errors.md describes them."""

from __future__ import annotations

from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, RetryInfo

from dinov3_serving.v1 import feature_service_pb2 as pb

# A status is sent as HTTP/2 trailers, of which peers accept 8 KiB by default. They contain the message three times:
# once percent-encoded (up to 3 bytes per byte) and twice in base64 (4/3).
_MOST_MESSAGE_BYTES = 1000
_MOST_FIELD_BYTES = 200


def make_status(code: int, message: str, *, field: str = "", retry_after: float | None = None) -> pb.Status:
    """Return a status, with a BadRequest if a `field` is at fault, and a RetryInfo if a retry (seconds) may help.

    Long texts are cut.
    """
    message = _cut(message, _MOST_MESSAGE_BYTES)
    status = pb.Status(code=code, message=message)
    if field:
        violation = BadRequest.FieldViolation(field=_cut(field, _MOST_FIELD_BYTES), description=message)
        status.details.append(_packed(BadRequest(field_violations=[violation])))
    if retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(round(retry_after * 1e9))
        status.details.append(_packed(RetryInfo(retry_delay=delay)))
    return status


def _packed(detail: Message) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed


def _cut(text: str, most_bytes: int) -> str:
    data = text.encode(errors="replace")
    return text if len(data) <= most_bytes else data[: most_bytes - 3].decode(errors="ignore") + "…"

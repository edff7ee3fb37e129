"""Parse requests without letting protobuf build millions of objects or copy images.

An empty image takes two bytes, so protobuf can build 45 million objects from one message, and code that counts them
would block the event loop for half a minute. So a message is first scanned in its wire format
(https://protobuf.dev/programming-guides/encoding/), guided by its descriptor. The scan ends at the first element over
the limit, so that its work is bounded however long the message is.

The scan also avoids copies of `bytes` fields, which protobuf makes when it parses and again when a field is read. Each
content is replaced by a number before protobuf parses the message; `ParsedMessage.resolve_bytes` turns that into a view
of the received data.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, NoReturn

from google.protobuf.message import DecodeError

from dinov3_server.errors import InvalidInput
from dinov3_serving import framing
from dinov3_serving.framing import AnyMessage, BytesResolver, Field, schema
from dinov3_serving.v1 import feature_service_pb2 as pb

# Shorter messages are not scanned: protobuf builds all their objects in a millisecond or two.
SHORT_BYTES = 4096
# Limit of a string, or of a packed list of numbers.
_MAX_TEXT_BYTES = 1024
# Elements of a kind that are always allowed, whatever max_images_per_request: a request has layers too.
_MIN_ELEMENTS = 64
# Allowed fields per element, and for the rest of a request. A view has at most 18, an image of pixels 7.
_FIELDS_PER_ELEMENT = 20
_OTHER_FIELDS = 256


class ParsedMessage(NamedTuple, Generic[AnyMessage]):
    """A message; `resolve_bytes(message.data)` is the content of its field `data`."""

    message: AnyMessage
    resolve_bytes: BytesResolver


class TooManyElements(InvalidInput):
    """A request has more images, views, layers or fields than are allowed."""


def parse(message: type[AnyMessage], data: bytes, max_images: int) -> ParsedMessage[AnyMessage]:
    """Parse `data` as a `message`.

    Raises:
        TooManyElements: there are more images, views (of all images) or layers than `max_images`, or more fields than
            such a message can need. Up to 64 images, views and layers always pass: later checks explain them better.
        InvalidInput: `data` is not such a message.
    """
    try:
        if len(data) < SHORT_BYTES:
            return ParsedMessage(message.FromString(data), bytes)
        scan = Scan(data, max_images)
        return ParsedMessage(scan.parse(message, schema(message.DESCRIPTOR)), scan.resolve)
    except DecodeError:
        raise _not_a_message(data, message.DESCRIPTOR.full_name) from None


def message_id(data: bytes) -> int:
    """Return the id of an ExtractStreamRequest without parsing its request. Raises InvalidInput if there is none."""
    try:
        stripped = Scan(data, 0).strip(0, len(data), {2: Field("request", None, True)}, keep_bytes=False)
        return pb.ExtractStreamRequest.FromString(data if stripped is None else stripped).id
    except DecodeError:
        raise _not_a_message(data, pb.ExtractStreamRequest.DESCRIPTOR.full_name) from None


def _not_a_message(data: bytes, name: str) -> InvalidInput:
    return InvalidInput(f"the {len(data)} bytes received are not a {name} message")


class Scan(framing.Scan):
    """A scan that ends at the first image, view, layer or field over the limits of a request."""

    def __init__(self, data: bytes, max_images: int) -> None:
        self._max_images = max_images
        self._max_elements = max(max_images, _MIN_ELEMENTS)
        self._counts: dict[str, int] = {}
        super().__init__(data, _OTHER_FIELDS + _FIELDS_PER_ELEMENT * self._max_elements)

    def check(self, field: Field, nbytes: int) -> None:
        if field.inner is not None:
            if field.is_repeated:
                count = self._counts[field.name] = self._counts.get(field.name, 0) + 1
                if count > self._max_elements:
                    self._refuse(f"more than {self._max_elements} {field.name}", field.name)
        elif not field.is_bytes and nbytes > _MAX_TEXT_BYTES:
            raise TooManyElements(f"{field.name} has {nbytes} bytes; allowed are {_MAX_TEXT_BYTES}", field=field.name)

    def refuse_fields(self) -> NoReturn:
        self._refuse(f"more than {self._max_fields} fields")

    def _refuse(self, what: str, field: str = "") -> NoReturn:
        raise TooManyElements(
            f"there are {what} in one request; allowed are {self._max_images} images, each view counts as one "
            "(--max-images-per-request): send them in several requests",
            field=field,
        )

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

from functools import cache
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto
from google.protobuf.message import DecodeError, Message

from dinov3_server.api.status import abort, status_of
from dinov3_server.errors import InvalidInput
from dinov3_serving.framing import BytesResolver, read_varint, tag
from dinov3_serving.v1 import feature_service_pb2 as pb

# Shorter messages are not scanned: protobuf builds all their objects in a millisecond or two.
SHORT_BYTES = 4096
# Limit of a string, or of a packed list of numbers.
_MAX_TEXT_BYTES = 1024
# Elements of a kind that are always allowed, whatever max_images_per_request: a request has layers too.
_MIN_ELEMENTS = 64
# Allowed fields per element, and for the rest of a request. A view has at most 11, an image of pixels 7.
_FIELDS_PER_ELEMENT = 20
_OTHER_FIELDS = 256

AnyMessage = TypeVar("AnyMessage", bound=Message)


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
        stripped = scan.strip(0, len(data), _schema(message.DESCRIPTOR))
        return ParsedMessage(message.FromString(data if stripped is None else stripped), scan.resolve)
    except DecodeError:
        raise _not_a_message(data, message.DESCRIPTOR.full_name) from None


async def parse_or_abort(message: type[AnyMessage], data: bytes, context: Any) -> AnyMessage:
    """Parse a message of health or reflection, whose errors `interceptors.CallInterceptor` does not handle."""
    try:
        return parse(message, data, 0).message
    except InvalidInput as error:
        status = status_of(error)
    return await abort(context, status)


def message_id(data: bytes) -> int:
    """Return the id of an ExtractStreamRequest without parsing its request. Raises InvalidInput if there is none."""
    try:
        stripped = Scan(data, 0).strip(0, len(data), {2: _Field("request", None, True)}, keep_bytes=False)
        return pb.ExtractStreamRequest.FromString(data if stripped is None else stripped).id
    except DecodeError:
        raise _not_a_message(data, pb.ExtractStreamRequest.DESCRIPTOR.full_name) from None


def _not_a_message(data: bytes, name: str) -> InvalidInput:
    return InvalidInput(f"the {len(data)} bytes received are not a {name} message")


class _Field(NamedTuple):
    """A length-delimited field; `inner` has the fields of a message."""

    name: str
    inner: dict[int, _Field] | None
    is_bytes: bool
    is_repeated: bool = False


@cache
def _schema(descriptor: Descriptor, prefix: str = "") -> dict[int, _Field]:
    """Return the length-delimited fields of a message by number. The types must not be recursive."""
    schema: dict[int, _Field] = {}
    declared = DescriptorProto()  # protobuf 5 has no `field.is_repeated`, protobuf 7 no `field.label`.
    descriptor.CopyToProto(declared)
    repeated = {field.number for field in declared.field if field.label == FieldDescriptorProto.LABEL_REPEATED}
    for field in descriptor.fields:
        inner = _schema(field.message_type, f"{prefix}{field.name}.") if field.message_type else None
        is_bytes = field.type == FieldDescriptor.TYPE_BYTES
        schema[field.number] = _Field(prefix + field.name, inner, is_bytes, field.number in repeated)
    return schema


class Scan:
    """A scan of the message `data`. `fields` counts the fields that it has visited."""

    def __init__(self, data: bytes, max_images: int) -> None:
        self.fields = 0
        self._data = data
        self._view = memoryview(data)
        self._max_images = max_images
        self._max_elements = max(max_images, _MIN_ELEMENTS)
        self._max_fields = _OTHER_FIELDS + _FIELDS_PER_ELEMENT * self._max_elements
        self._counts: dict[str, int] = {}
        self._contents: list[memoryview] = []

    def resolve(self, number: bytes) -> memoryview:
        """Return the content that was replaced by `number`; an empty view for a field that is not set."""
        return self._contents[int.from_bytes(number, "little")] if number else self._view[:0]

    def strip(self, position: int, end: int, schema: dict[int, _Field], keep_bytes: bool = True) -> bytes | None:
        """Return the message from `position` to `end` with a number in place of each `bytes`; None if unchanged.

        Without `keep_bytes` they are emptied. Raises DecodeError, InvalidInput.
        """
        data = self._data
        pieces: list[bytes] = []
        copied = position  # all data before this position is in `pieces`
        groups = 0  # open groups, which only unknown fields have
        while position < end:
            start = position
            self.fields += 1
            if self.fields > self._max_fields:
                self._refuse(f"more than {self._max_fields} fields")
            key = data[position]
            position += 1
            if key >= 0x80:
                key, position = read_varint(data, position - 1)
            wire = key & 7
            if wire == 2:
                length = data[position] if position < end else 0x80
                position += 1
                if length >= 0x80:
                    length, position = read_varint(data, position - 1)
                content, position = position, position + length
                field = None if groups else schema.get(key >> 3)
                if position > end:
                    raise DecodeError
                if field is not None:
                    piece = self._replacement(field, content, position) if keep_bytes or not field.is_bytes else b""
                    if piece is not None:
                        pieces += (data[copied:start], tag(key >> 3, len(piece)), piece)
                        copied = position
            elif wire == 0:
                position = read_varint(data, position)[1]
            elif wire == 5 or wire == 1:
                position += 4 if wire == 5 else 8
            elif wire == 3:
                groups += 1
            elif wire == 4 and groups:
                groups -= 1
            else:
                raise DecodeError
        if position > end or groups:
            raise DecodeError
        if not pieces:
            return None
        pieces.append(data[copied:end])
        return b"".join(pieces)

    def _replacement(self, field: _Field, start: int, end: int) -> bytes | None:
        """Return what replaces the content of a field; None if it stays."""
        if field.inner is not None:
            if field.is_repeated:
                count = self._counts[field.name] = self._counts.get(field.name, 0) + 1
                if count > self._max_elements:
                    self._refuse(f"more than {self._max_elements} {field.name}", field.name)
            return self.strip(start, end, field.inner)
        if field.is_bytes:
            self._contents.append(self._view[start:end])
            return (len(self._contents) - 1).to_bytes(4, "little") if end > start else None
        if end - start > _MAX_TEXT_BYTES:
            raise TooManyElements(
                f"{field.name} has {end - start} bytes; allowed are {_MAX_TEXT_BYTES}", field=field.name
            )
        return None

    def _refuse(self, what: str, field: str = "") -> NoReturn:
        raise TooManyElements(
            f"there are {what} in one request; allowed are {self._max_images} images, each view counts as one "
            "(--max-images-per-request): send them in several requests",
            field=field,
        )

"""What comes in, before protobuf builds objects of it.

Two bytes are enough for an object (an empty image), and protobuf builds 45 million of them from one message; code that
then counts them holds the event loop for half a minute. So a message is walked in its wire format first
(https://protobuf.dev/programming-guides/encoding/), as the descriptors of its type have it, and the walk ends at the
first thing too many: what it visits is bounded, however long the message.

The walk also spares protobuf the bytes themselves. protobuf copies each `bytes` field when it parses and again when it
is read; what is parsed here has the number of the field's content in its place, and `ParsedMessage.content`
gives a view of the message that was received.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Generic, NamedTuple, NoReturn, TypeAlias, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from dinov3_server.api.status import abort, status_of
from dinov3_server.errors import InvalidInput
from dinov3_serving.framing import read_varint, tag
from dinov3_serving.v1 import feature_service_pb2 as pb

# Shorter messages go to protobuf as they are: it builds what they can hold in a millisecond or two.
SHORT_BYTES = 4096
# Of a string or of a packed list of numbers, in bytes.
_LONGEST_TEXT = 1024
# What is read of a message at least, whatever max_images_per_request: it has layers too.
_LEAST_ELEMENTS = 64
# Fields for each element, and for the rest of a request. A view has 11 at most, an image of pixels 7.
_FIELDS_AN_ELEMENT = 20
_FIELDS_BESIDE = 256

AnyMessage = TypeVar("AnyMessage", bound=Message)
# What a `bytes` field of a message holds, given what is read from it.
BytesResolver: TypeAlias = Callable[[bytes], "bytes | memoryview"]


class ParsedMessage(NamedTuple, Generic[AnyMessage]):
    """A message; `content(message.data)` is what the field `data` holds."""

    message: AnyMessage
    content: BytesResolver


class TooManyElements(InvalidInput):
    """More of something than a request may have."""


def parse(message: type[AnyMessage], data: bytes, most_images: int) -> ParsedMessage[AnyMessage]:
    """The message that `data` are.

    Raises:
        TooManyElements: there are more images, views (of all images) or layers than `most_images`, or more fields
            than such a message can need. Up to 64 of each are left to those who know what they mean.
        InvalidInput: `data` are no such message.
    """
    try:
        if len(data) < SHORT_BYTES:
            return ParsedMessage(message.FromString(data), bytes)
        walk = Walk(data, most_images)
        light = walk.message(0, len(data), _shape(message.DESCRIPTOR))
        return ParsedMessage(message.FromString(data if light is None else light), walk.content)
    except DecodeError:
        raise InvalidInput(f"the {len(data)} bytes that were sent are no {message.DESCRIPTOR.full_name}") from None


async def parse_or_abort(message: type[AnyMessage], data: bytes, context: Any) -> AnyMessage:
    """`parse` for health and reflection, whose errors `interceptors.CallInterceptor` does not see."""
    try:
        return parse(message, data, 0).message
    except InvalidInput as error:
        status = status_of(error)
    return await abort(context, status)


def message_id(data: bytes) -> int:
    """The id of an ExtractStreamRequest whose request is left alone. Raises InvalidInput where there is none."""
    try:
        light = Walk(data, 0).message(0, len(data), {2: _Field("request", None, True)}, keep=False)
        return pb.ExtractStreamRequest.FromString(data if light is None else light).id
    except DecodeError:
        raise InvalidInput(f"the {len(data)} bytes that were sent are no ExtractStreamRequest") from None


class _Field(NamedTuple):
    """A field with a length; `inner` are those of a message."""

    name: str
    inner: dict[int, _Field] | None
    is_bytes: bool
    is_repeated: bool = False


@cache
def _shape(descriptor: Descriptor, prefix: str = "") -> dict[int, _Field]:
    """The fields of a message, by number. (The requests' types do not nest in themselves.)"""
    shape: dict[int, _Field] = {}
    for field in descriptor.fields:
        inner = _shape(field.message_type, f"{prefix}{field.name}.") if field.message_type else None
        is_bytes = field.type == FieldDescriptor.TYPE_BYTES
        shape[field.number] = _Field(prefix + field.name, inner, is_bytes, field.is_repeated)
    return shape


class Walk:
    """One walk over `data`. `fields` is how many it has visited."""

    def __init__(self, data: bytes, most_images: int) -> None:
        self.fields = 0
        self._data = data
        self._view = memoryview(data)
        self._most_images = most_images
        self._most = max(most_images, _LEAST_ELEMENTS)
        self._most_fields = _FIELDS_BESIDE + _FIELDS_AN_ELEMENT * self._most
        self._counts: dict[str, int] = {}
        self._contents: list[memoryview] = []

    def content(self, number: bytes) -> memoryview:
        """What the `bytes` field held that now holds `number`; a field that is not set holds nothing."""
        return self._contents[int.from_bytes(number, "little")] if number else self._view[:0]

    def message(self, position: int, end: int, shape: dict[int, _Field], keep: bool = True) -> bytes | None:
        """The message from `position` to `end` with numbers, or nothing, in place of `bytes`; None for as it is.

        Raises DecodeError, InvalidInput.
        """
        data = self._data
        pieces: list[bytes] = []
        copied = position  # up to here
        groups = 0  # that are open; what is in them is unknown
        while position < end:
            start = position
            self.fields += 1
            if self.fields > self._most_fields:
                self._refuse(f"more than {self._most_fields} fields")
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
                field = None if groups else shape.get(key >> 3)
                if position > end:
                    raise DecodeError
                if field is not None:
                    piece = self._field(field, content, position) if keep or not field.is_bytes else b""
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

    def _field(self, field: _Field, start: int, end: int) -> bytes | None:
        """What stands in the place of a field's content; None for the same."""
        if field.inner is not None:
            if field.is_repeated:
                count = self._counts[field.name] = self._counts.get(field.name, 0) + 1
                if count > self._most:
                    self._refuse(f"more than {self._most} {field.name}", field.name)
            return self.message(start, end, field.inner)
        if field.is_bytes:
            self._contents.append(self._view[start:end])
            return (len(self._contents) - 1).to_bytes(4, "little") if end > start else None
        if end - start > _LONGEST_TEXT:
            raise TooManyElements(
                f"{field.name} has {end - start} bytes; allowed are {_LONGEST_TEXT}", field=field.name
            )
        return None

    def _refuse(self, what: str, field: str = "") -> NoReturn:
        raise TooManyElements(
            f"{what} in one request; allowed are {self._most_images} images, each view counts as one "
            "(--max-images-per-request): send them in several requests",
            field=field,
        )

"""Protobuf's wire format, as far as client and server read and write it themselves.

See https://protobuf.dev/programming-guides/encoding/: a field is a tag (its number and wire type), for messages and
byte strings a length, and the content.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, NoReturn, TypeAlias, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto
from google.protobuf.message import DecodeError, Message

AnyMessage = TypeVar("AnyMessage", bound=Message)

# Returns the content of a `bytes` field, given its value in the parsed message.
BytesResolver: TypeAlias = Callable[[bytes], "bytes | memoryview"]

VARINT, FIXED64, LENGTH_DELIMITED, _GROUP_START, _GROUP_END, FIXED32 = range(6)  # wire types
_VARINT_BITS = 70  # ten bytes of seven bits


def varint(value: int) -> bytes:
    """Encode a number in base 128, least significant group first; the high bit of a byte says that another follows."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def read_varint(data: bytes | memoryview, position: int) -> tuple[int, int]:
    """Return the number at `position` and the position after it. Raises DecodeError."""
    value = shift = 0
    while shift < _VARINT_BITS:
        try:
            byte = data[position]
        except IndexError:
            break
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise DecodeError("a varint has no end")


def tag(number: int, nbytes: int) -> bytes:
    """Return the tag and length of field `number`, a message or byte string of `nbytes`."""
    return varint(number << 3 | LENGTH_DELIMITED) + varint(nbytes)


class Field(NamedTuple):
    """A length-delimited field; `inner` has the fields of a message."""

    name: str
    inner: Schema | None
    is_bytes: bool
    is_repeated: bool = False


Schema: TypeAlias = dict[int, Field]


@cache
def schema(descriptor: Descriptor, prefix: str = "") -> Schema:
    """Return the length-delimited fields of a message by number. The types must not be recursive."""
    fields: Schema = {}
    declared = DescriptorProto()  # protobuf 5 has no `field.is_repeated`, protobuf 7 no `field.label`.
    descriptor.CopyToProto(declared)
    repeated = {field.number for field in declared.field if field.label == FieldDescriptorProto.LABEL_REPEATED}
    for field in descriptor.fields:
        inner = schema(field.message_type, f"{prefix}{field.name}.") if field.message_type else None
        is_bytes = field.type == FieldDescriptor.TYPE_BYTES
        fields[field.number] = Field(prefix + field.name, inner, is_bytes, field.number in repeated)
    return fields


class Scan:
    """A scan of a message in its wire format, by which `bytes` fields become views of the received data.

    protobuf copies them when it parses and again when a field is read. So each content is replaced by a number, which
    protobuf parses in its place; `resolve` returns the content of a number.

    fields: how many fields the scan has visited. max_fields: after so many, `refuse_fields` is called.
    """

    def __init__(self, data: bytes, max_fields: float = math.inf) -> None:
        self.fields = 0
        self._data = data
        self._view = memoryview(data)
        self._max_fields = max_fields
        self._contents: list[memoryview] = []

    def parse(self, message: type[AnyMessage], fields: Schema) -> AnyMessage:
        """Return the message, with a number in place of each of the `bytes` of `fields`. Raises DecodeError."""
        stripped = self.strip(0, len(self._data), fields)
        return message.FromString(self._data if stripped is None else stripped)

    def resolve(self, number: bytes) -> memoryview:
        """Return the content that was replaced by `number`; an empty view for a field that is not set."""
        return self._contents[int.from_bytes(number, "little")] if number else self._view[:0]

    def check(self, field: Field, nbytes: int) -> None:
        """Check a known field before its content is read; raise to end the scan."""

    def refuse_fields(self) -> NoReturn:
        """Raise the error of a message with too many fields."""
        raise DecodeError(f"more than {self._max_fields} fields")

    def strip(self, position: int, end: int, schema: Schema, keep_bytes: bool = True) -> bytes | None:
        """Return the message from `position` to `end` with a number in place of each `bytes`; None if unchanged.

        The fields may come in any order and repeatedly: protobuf parses the result. Without `keep_bytes` the content
        of `bytes` is left out. Raises DecodeError.
        """
        data = self._data
        pieces: list[bytes] = []
        copied = position  # all data before this position is in `pieces`
        groups = 0  # open groups, which only unknown fields have
        while position < end:
            start = position
            self.fields += 1
            if self.fields > self._max_fields:
                self.refuse_fields()
            key = data[position]
            position += 1
            if key >= 0x80:
                key, position = read_varint(data, position - 1)
            wire = key & 7
            if wire == LENGTH_DELIMITED:
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
            elif wire == VARINT:
                position = read_varint(data, position)[1]
            elif wire in (FIXED32, FIXED64):
                position += 4 if wire == FIXED32 else 8
            elif wire == _GROUP_START:
                groups += 1
            elif wire == _GROUP_END and groups:
                groups -= 1
            else:
                raise DecodeError
        if position > end or groups:
            raise DecodeError
        if not pieces:
            return None
        pieces.append(data[copied:end])
        return b"".join(pieces)

    def _replacement(self, field: Field, start: int, end: int) -> bytes | None:
        """Return what replaces the content of a field; None if it stays."""
        self.check(field, end - start)
        if field.inner is not None:
            return self.strip(start, end, field.inner)
        if not field.is_bytes:
            return None
        self._contents.append(self._view[start:end])
        return (len(self._contents) - 1).to_bytes(4, "little") if end > start else None

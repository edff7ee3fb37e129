"""Protobuf's wire format, as far as client and server read and write it themselves.

See https://protobuf.dev/programming-guides/encoding/: a field is a tag (its number and wire type), for messages and
byte strings a length, and the content.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from google.protobuf.message import DecodeError

# Returns the content of a `bytes` field, given its value in the parsed message.
BytesResolver: TypeAlias = Callable[[bytes], "bytes | memoryview"]

VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5  # wire types
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

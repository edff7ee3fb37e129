"""Protobuf messages of any fields, for hypothesis: each field has values at the edges of its type."""

from __future__ import annotations

import math
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

_INT32, _INT64 = (0, 1, -1, 2, 3, 16, 2**31 - 1, -(2**31)), (2**63 - 1, -(2**63), 2**32)
_UINT32, _UINT64 = (0, 1, 2, 3, 16, 32, 2**16, 2**31, 2**32 - 1), (2**63, 2**64 - 1)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, math.nan, math.inf, -math.inf)
_TEXTS = ("", "a", "\0", "\x1b[2J", "dinov3_vits16", "é" * 100, "💥")
_BYTES = (b"", b"\0", b"\xff" * 3, bytes(16 * 16 * 3), bytes(4 * 16 * 16 * 3))

_SCALARS: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.CPPTYPE_INT32: _INT32,
    FieldDescriptor.CPPTYPE_INT64: _INT32 + _INT64,
    FieldDescriptor.CPPTYPE_UINT32: _UINT32,
    FieldDescriptor.CPPTYPE_UINT64: _UINT32 + _UINT64,
    FieldDescriptor.CPPTYPE_FLOAT: _FLOATS,
    FieldDescriptor.CPPTYPE_DOUBLE: _FLOATS,
    FieldDescriptor.CPPTYPE_BOOL: (False, True),
    FieldDescriptor.CPPTYPE_ENUM: (0, 1, 2, 3, 4, 5, 99, -1, 2**31 - 1, -(2**31)),
}


def is_repeated(field: FieldDescriptor) -> bool:
    """Return whether a field is repeated: protobuf 5 has no `is_repeated`, protobuf 7 no `label`."""
    return bool(field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED)


def messages(descriptor: Descriptor, depth: int = 5) -> st.SearchStrategy[Any]:
    """Messages of `descriptor`, nested at most `depth` deep, with any of their fields set."""
    fields = {
        field.name: _of(field, depth)
        for field in descriptor.fields
        if depth or field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE
    }
    message = GetMessageClass(descriptor)
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: message(**values))


def mutated(draw: st.DrawFn, message: Message) -> None:
    """Change one field of `message`, or of one of the messages in it: drop it, or give it a value at an edge."""
    fields = list(message.DESCRIPTOR.fields)
    inner = [each for field in fields for each in _inner(message, field)]
    if inner and draw(st.booleans()):
        mutated(draw, draw(st.sampled_from(inner)))
        return
    field = draw(st.sampled_from(fields))
    message.ClearField(field.name)
    if draw(st.booleans()):
        message.MergeFrom(type(message)(**{field.name: draw(_of(field, 2))}))


def _inner(message: Message, field: FieldDescriptor) -> list[Any]:
    if field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE:
        return []
    if is_repeated(field):
        return list(getattr(message, field.name))
    return [getattr(message, field.name)] if message.HasField(field.name) else []


def _of(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    one: st.SearchStrategy[Any]
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        one = messages(field.message_type, depth - 1)
    elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        one = st.sampled_from(_BYTES if field.type == FieldDescriptor.TYPE_BYTES else _TEXTS)
    else:
        one = st.sampled_from(_SCALARS[field.cpp_type])
    return st.lists(one, max_size=5) if is_repeated(field) else one

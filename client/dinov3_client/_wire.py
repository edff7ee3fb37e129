"""Requests and responses of megabytes, without protobuf's copies.

protobuf's Python API exchanges the contents of tensors and files as `bytes` objects: three copies to send, two to
receive. So protobuf handles the small fields only, and the fields that hold the large contents are written and read
here, in the format of https://protobuf.dev/programming-guides/encoding/ (see `dinov3_serving.framing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from google.protobuf.message import DecodeError

from dinov3_client._dtypes import Array, wire_of
from dinov3_client._errors import InvalidResponse
from dinov3_client._images import LoadedImage
from dinov3_serving.framing import FIXED32, FIXED64, LENGTH_DELIMITED, VARINT, read_varint, tag
from dinov3_serving.v1 import feature_service_pb2 as pb

# The fields of a message that hold large contents: a message with such fields, or (None) bytes that are not copied.
_Fields = Mapping[int, "_Fields | None"]
_TENSOR: _Fields = {pb.Tensor.DATA_FIELD_NUMBER: None, pb.Tensor.SCALES_FIELD_NUMBER: None}
_LAYER: _Fields = {
    pb.LayerFeatures.CLS_FIELD_NUMBER: _TENSOR,
    pb.LayerFeatures.PATCHES_FIELD_NUMBER: _TENSOR,
    pb.LayerFeatures.REGISTERS_FIELD_NUMBER: _TENSOR,
}
_BLOCK: _Fields = {
    pb.FeatureBlock.CLS_FIELD_NUMBER: _TENSOR,
    pb.FeatureBlock.PATCHES_FIELD_NUMBER: _TENSOR,
    pb.FeatureBlock.REGISTERS_FIELD_NUMBER: _TENSOR,
    pb.FeatureBlock.LAYERS_FIELD_NUMBER: _LAYER,
}
_RESPONSE: _Fields = {pb.ExtractResponse.BLOCKS_FIELD_NUMBER: _BLOCK}


def request(sources: Sequence[LoadedImage], rest: pb.ExtractRequest) -> bytes:
    """Serialise `rest` with these images, packed into one tensor if all are pixels of one layout, without views.

    The result equals protobuf's own serialisation; pixels and files are copied once.
    """
    layout = _packed_layout(sources)
    if layout is not None:
        dtype, shape = layout
        pieces = _field(
            pb.ExtractRequest.PIXELS_FIELD_NUMBER,
            _tensor(dtype, (len(sources), *shape), [s.data for s in sources if isinstance(s.data, np.ndarray)]),
        )
    else:
        pieces = []
        for source in sources:
            pieces += _field(pb.ExtractRequest.IMAGES_FIELD_NUMBER, _image(source))
    return b"".join([*pieces, rest.SerializeToString()])


class Response:
    """A parsed ExtractResponse.

    In `message` the fields `data` and `scales` of tensors are keys; `content` returns their contents as views of the
    received bytes. Raises InvalidResponse if the bytes are no such message.
    """

    def __init__(self, data: bytes) -> None:
        self._contents: list[memoryview] = []
        try:
            self.message = pb.ExtractResponse.FromString(self._strip(memoryview(data), _RESPONSE))
        except DecodeError:
            raise InvalidResponse(
                f"the {len(data)} bytes received are no {pb.ExtractResponse.DESCRIPTOR.full_name}"
            ) from None

    def content(self, field: bytes) -> memoryview:
        """Return the contents of `field`, the `data` or `scales` of a tensor of `message`."""
        return self._contents[int.from_bytes(field, "little")] if field else memoryview(b"")

    def _strip(self, message: memoryview, fields: _Fields) -> bytes:
        """Return `message` with each of its large contents replaced by a number, the key in `self._contents`.

        The fields may come in any order and repeatedly: protobuf parses the result.
        """
        pieces: list[bytes | memoryview] = []
        position, kept = 0, 0  # the bytes from `kept` to `position` stay as they are
        while position < len(message):
            start = position
            key, position = read_varint(message, position)
            wire_type = key & 7
            if wire_type == VARINT:
                _, position = read_varint(message, position)
                continue
            if wire_type == LENGTH_DELIMITED:
                length, position = read_varint(message, position)
            elif wire_type in (FIXED32, FIXED64):
                length = 4 if wire_type == FIXED32 else 8
            else:
                raise DecodeError("no version of this protocol has groups")
            end = position + length
            if end > len(message):
                raise DecodeError("a field is longer than the message around it")
            if wire_type == LENGTH_DELIMITED and key >> 3 in fields:
                content, inner = message[position:end], fields[key >> 3]
                if inner is not None:
                    small = self._strip(content, inner)
                else:
                    small = len(self._contents).to_bytes(4, "little")
                    self._contents.append(content)
                pieces += [message[kept:start], tag(key >> 3, len(small)), small]
                kept = end
            position = end
        return b"".join([*pieces, message[kept:]])


def _packed_layout(sources: Sequence[LoadedImage]) -> tuple[str, tuple[int, ...]] | None:
    layouts: set[tuple[str, tuple[int, ...]] | None] = {
        (source.data.dtype.name, source.data.shape)
        if isinstance(source.data, np.ndarray) and not source.views
        else None
        for source in sources
    }
    return layouts.pop() if len(layouts) == 1 else None


def _image(source: LoadedImage) -> list[bytes | memoryview]:
    if isinstance(source.data, bytes):
        pieces = _field(pb.Image.ENCODED_FIELD_NUMBER, [source.data])
    else:
        pixels = source.data
        pieces = _field(pb.Image.PIXELS_FIELD_NUMBER, _tensor(pixels.dtype.name, pixels.shape, [pixels]))
    return [*pieces, pb.Image(views=source.views).SerializeToString()]


def _tensor(dtype: str, shape: tuple[int, ...], arrays: Iterable[Array]) -> list[bytes | memoryview]:
    header = pb.Tensor(dtype=wire_of(dtype), shape=shape).SerializeToString()
    contents = [np.ascontiguousarray(array).data.cast("B") for array in arrays]
    return [header, *_field(pb.Tensor.DATA_FIELD_NUMBER, contents)]


def _field(number: int, content: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """Return field `number`, a message or byte string of `content`."""
    return [tag(number, sum(map(len, content))), *content]

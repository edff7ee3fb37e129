"""Requests and responses of megabytes, without protobuf's copies.

protobuf's Python API exchanges the contents of tensors and files as `bytes` objects: three copies to send, two to
receive. So protobuf handles the small fields only, and the fields that hold the large contents are written and read
here, in the format of https://protobuf.dev/programming-guides/encoding/ (see `dinov3_serving.framing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from google.protobuf.message import DecodeError

from dinov3_client._dtypes import Array, wire_of
from dinov3_client._errors import InvalidResponse
from dinov3_client._images import LoadedImage
from dinov3_serving.framing import Scan, schema, tag
from dinov3_serving.v1 import feature_service_pb2 as pb

# Only blocks hold large contents.
_BLOCKS = pb.ExtractResponse.BLOCKS_FIELD_NUMBER
_RESPONSE = {_BLOCKS: schema(pb.ExtractResponse.DESCRIPTOR)[_BLOCKS]}


def request(sources: Sequence[LoadedImage], rest: pb.ExtractRequest) -> bytes:
    """Serialize `rest` with these images, packed into one tensor if all are pixels of one layout, without views.

    The result equals protobuf's own serialization; pixels and files are copied once.
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
        scan = Scan(data)
        self.content = scan.resolve
        try:
            self.message = scan.parse(pb.ExtractResponse, _RESPONSE)
        except DecodeError:
            raise InvalidResponse(
                f"the {len(data)} bytes received are no {pb.ExtractResponse.DESCRIPTOR.full_name}"
            ) from None


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

"""Messages that are put together and taken apart by hand are those of protobuf."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov3_client import InvalidResponse, View, _views
from dinov3_client._images import LoadedImage
from dinov3_client._wire import Response, request
from dinov3_serving.v1 import feature_service_pb2 as pb

uint32 = st.integers(0, 2**32 - 1)
small = st.binary(max_size=300)
tensors = st.builds(
    pb.Tensor,
    dtype=st.integers(0, 200),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    data=small,
    scales=small,
)
maybe = st.none() | tensors
layers = st.builds(
    pb.LayerFeatures, layer=uint32, cls=maybe, patches=maybe, registers=maybe, grid_height=uint32, grid_width=uint32
)
blocks = st.builds(
    pb.FeatureBlock,
    input_size=st.none() | st.builds(pb.Size, height=uint32, width=uint32),
    grid_height=uint32,
    image_indices=st.lists(uint32, max_size=9),
    view_indices=st.lists(uint32, max_size=9),
    cls=maybe,
    patches=maybe,
    registers=maybe,
    layers=st.lists(layers, max_size=3),
)
errors = st.builds(pb.ImageError, image_index=uint32, status=st.builds(pb.Status, code=st.integers(0, 16)))
responses = st.builds(
    pb.ExtractResponse,
    blocks=st.lists(blocks, max_size=3),
    errors=st.lists(errors, max_size=3),
    timings=st.builds(pb.Timings, decode_seconds=st.floats(width=32, allow_nan=False), batches=uint32),
    frontend=uint32,
    fingerprint=st.text(max_size=9),
)


def restored(data: bytes) -> pb.ExtractResponse:
    """What was read, with the contents of its tensors put back."""
    response = Response(data)
    for block in response.message.blocks:
        for holder in (block, *block.layers):
            for kind in ("cls", "patches", "registers"):
                if holder.HasField(kind):
                    tensor = getattr(holder, kind)
                    tensor.data, tensor.scales = (bytes(response.content(f)) for f in (tensor.data, tensor.scales))
    return response.message


@given(responses)
def test_a_response_equals_what_protobuf_parses(response: pb.ExtractResponse) -> None:
    data = response.SerializeToString()
    assert restored(data) == pb.ExtractResponse.FromString(data) == response


UNKNOWN = [
    b"\xf8\x01\x96\x01",  # field 31: a number
    b"\xf9\x01" + bytes(8),  # 64 bits
    b"\xfa\x01\x03abc",  # bytes
    b"\xfd\x01" + bytes(4),  # 32 bits
]


def varint(value: int) -> bytes:
    return (bytes([value & 0x7F | 0x80]) + varint(value >> 7)) if value > 0x7F else bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


@st.composite
def shuffled(draw: st.DrawFn, fields: dict[int, Any], size: int = 6) -> bytes:
    """Fields in any order and any number, some of them unknown, as a parser has to take them."""
    pieces = [draw(st.sampled_from(UNKNOWN)) for _ in range(draw(st.integers(0, 2)))]
    for number in draw(st.lists(st.sampled_from(sorted(fields)), max_size=size)):
        pieces.append(field(number, draw(fields[number])))
    draw(st.randoms(use_true_random=False)).shuffle(pieces)
    return b"".join(pieces)


wild_tensors = shuffled({2: st.just(b"\x02\x07"), 3: small, 4: small})
wild_layers = shuffled({2: wild_tensors, 3: wild_tensors, 4: wild_tensors}, 4)
wild_blocks = shuffled(
    {
        1: st.just(b"\x08\x07"),
        4: st.just(b"\x01\x02"),
        6: wild_tensors,
        7: wild_tensors,
        8: wild_tensors,
        9: wild_layers,
    }
)
wild_responses = shuffled({1: wild_blocks, 2: st.just(b"\x08\x01"), 5: st.just(b"f00d")}, 4)


@given(wild_responses)
def test_fields_in_any_order_repeated_or_unknown(data: bytes) -> None:
    """Fields that come again are merged, as protobuf merges them."""
    expected = pb.ExtractResponse.FromString(data)
    assert restored(data).SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


@settings(max_examples=400)
@given(st.binary(max_size=80))
def test_garbage_is_an_answer_to_both_or_to_neither(data: bytes) -> None:
    never_reads_more_than_protobuf(data)


@settings(max_examples=200)
@given(responses, st.randoms(use_true_random=False))
def test_damaged_answers(response: pb.ExtractResponse, rand: random.Random) -> None:
    data = bytearray(response.SerializeToString())
    for _ in range(rand.randint(0, 3)):
        if data:
            data[rand.randrange(len(data))] = rand.randrange(256)
    never_reads_more_than_protobuf(bytes(data[: rand.randint(0, len(data))]))


def never_reads_more_than_protobuf(data: bytes) -> None:
    """Check that protobuf reads what we read, and the same."""
    try:
        found = restored(data)
    except InvalidResponse:
        return
    expected = pb.ExtractResponse.FromString(data)
    assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a",  # a block without a length
        b"\x0a\x05\x08",  # longer than what came
        b"\x0a\x04\x32\x09\x1a\x01",  # a tensor longer than its block
        b"\x0a" + b"\xff" * 10 + b"\x01",  # a length without an end
        b"\x20",  # a number that is missing
        b"\x2a\x02\xff\xfe",  # a fingerprint that is no text
        b"\x2d\x00",  # 32 bits, of which 8 came
        b"\x0b",  # a group without an end
        b"\x07",  # a wire type that does not exist
    ],
)
def test_invalid_responses_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidResponse, match=rf"the {len(data)} bytes received are no dinov3_serving\.v1\.Extract"):
        Response(data)


def test_cut_anywhere_it_never_reads_beyond() -> None:
    tensor = pb.Tensor(dtype=2, shape=[2, 3], data=bytes(range(24)), scales=b"1234")
    data = pb.ExtractResponse(
        blocks=[pb.FeatureBlock(cls=tensor, layers=[pb.LayerFeatures(patches=tensor)])], fingerprint="f00d"
    ).SerializeToString()
    for end in range(len(data)):
        try:
            expected = pb.ExtractResponse.FromString(data[:end])
        except DecodeError:
            with pytest.raises(InvalidResponse):
                Response(data[:end])
        else:
            assert restored(data[:end]) == expected


def test_contents_are_views_of_the_received_bytes() -> None:
    data = pb.ExtractResponse(
        blocks=[pb.FeatureBlock(patches=pb.Tensor(data=bytes(range(64)), scales=b"abcd"))]
    ).SerializeToString()
    response = Response(data)
    tensor = response.message.blocks[0].patches
    for content in (response.content(tensor.data), response.content(tensor.scales)):
        assert content.obj is data
        assert content.readonly
    assert response.content(tensor.data) == bytes(range(64))
    assert len(response.content(response.message.blocks[0].cls.data)) == 0  # of a tensor that did not come


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 20, 3), np.uint8)
FLOATS = np.random.default_rng(1).normal(size=(3, 6, 20)).astype(np.float32)
VIEWS = tuple(map(_views.message, (View((1, 2, 3, 4), True, 32, "bicubic"), View())))
REST = pb.ExtractRequest(
    preprocessing=pb.Preprocessing(preset=pb.PRESET_HF), outputs=pb.Outputs(cls=True), priority=2, fingerprint="f00d"
)


def tensor_of(*arrays: np.ndarray[Any, Any], packed: bool) -> pb.Tensor:
    dtype = pb.DATA_TYPE_UINT8 if arrays[0].dtype == np.uint8 else pb.DATA_TYPE_FLOAT32
    array = np.stack(arrays) if packed else arrays[0]
    return pb.Tensor(dtype=dtype, shape=array.shape, data=array.tobytes())


REQUESTS: dict[str, tuple[list[LoadedImage], pb.ExtractRequest]] = {
    "files": (
        [LoadedImage(b"one"), LoadedImage(bytes(300)), LoadedImage(b"")],
        pb.ExtractRequest(images=[pb.Image(encoded=b"one"), pb.Image(encoded=bytes(300)), pb.Image(encoded=b"")]),
    ),
    "packed pixels": (
        [LoadedImage(PIXELS), LoadedImage(PIXELS[::-1]), LoadedImage(np.asfortranarray(PIXELS))],
        pb.ExtractRequest(pixels=tensor_of(PIXELS, PIXELS[::-1], PIXELS, packed=True)),
    ),
    "packed floats": (
        [LoadedImage(FLOATS), LoadedImage(FLOATS[:, ::-1])],
        pb.ExtractRequest(pixels=tensor_of(FLOATS, FLOATS[:, ::-1], packed=True)),
    ),
    "several layouts": (
        [LoadedImage(PIXELS), LoadedImage(FLOATS), LoadedImage(PIXELS[:4])],
        pb.ExtractRequest(
            images=[pb.Image(pixels=tensor_of(array, packed=False)) for array in (PIXELS, FLOATS, PIXELS[:4])]
        ),
    ),
    "views": (
        [LoadedImage(b"one", views=VIEWS), LoadedImage(PIXELS, views=VIEWS[1:]), LoadedImage(b"two")],
        pb.ExtractRequest(
            images=[
                pb.Image(encoded=b"one", views=VIEWS),
                pb.Image(pixels=tensor_of(PIXELS, packed=False), views=VIEWS[1:]),
                pb.Image(encoded=b"two"),
            ]
        ),
    ),
    "views of pixels are never packed": (
        [LoadedImage(PIXELS, views=VIEWS), LoadedImage(PIXELS, views=VIEWS)],
        pb.ExtractRequest(images=[pb.Image(pixels=tensor_of(PIXELS, packed=False), views=VIEWS)] * 2),
    ),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_request_equals_protobufs_serialization(case: str) -> None:
    sources, images = REQUESTS[case]
    expected = pb.ExtractRequest()
    expected.CopyFrom(images)
    expected.MergeFrom(REST)
    assert request(sources, REST) == expected.SerializeToString(deterministic=True)

"""Parsing: a scan visits a bounded number of fields, and does not change what a message means."""

from __future__ import annotations

import random
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from dinov3_server.api import wire
from dinov3_server.api.wire import Scan, TooManyElements, message_id, parse
from dinov3_server.errors import InvalidInput
from dinov3_serving.framing import tag
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.messages import is_repeated

MOST = 512
IMAGE = pb.ExtractRequest(images=[pb.Image(encoded=b"x" * 5000)]).SerializeToString()


def field(number: int, content: bytes) -> bytes:
    return tag(number, len(content)) + content


def visited(kind: type[Message], data: bytes, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many fields a scan visits before it refuses `data`."""
    scans: list[Scan] = []

    class Seen(Scan):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            scans.append(self)

    monkeypatch.setattr(wire, "Scan", Seen)
    with pytest.raises(TooManyElements) as refused:
        parse(kind, data, MOST)
    assert len(str(refused.value)) < 300
    [scan] = scans
    return scan.fields


VIEW = field(3, b"")
BOMBS = {
    "images": (field(1, b""), 513),
    "views of an image": (field(1, VIEW * 100), 520),
    "views of one image": (field(1, VIEW * 3_000_000), 514),
    "layers": (field(4, field(4, b"")), 1026),
    "layers of one outputs": (field(4, field(4, b"") * 3_000_000), 514),
    "outputs over and over": (field(4, b"\x08\x01"), 20_000),
    "unknown numbers": (b"\x78\x01", 20_000),
    "unknown fields with length": (field(100, b""), 20_000),
    "unknown fixed": (b"\x7d1234", 20_000),
    "groups within groups": (b"\x7b", 20_000),
    "a shape of packed numbers": (field(2, field(2, b"\x01" * 1_000_000)), 2),
    "a shape of numbers one by one": (field(2, b"\x10\x01" * 1_000_000), 20_000),
    "a long name": (field(6, b"n" * 1_000_000), 1),
}


@pytest.mark.parametrize("nbytes", [10_000_000, 90_000_000])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_scan_of_a_bomb_visits_few_fields(bomb: str, nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    piece, most = BOMBS[bomb]
    data = piece * -(-nbytes // len(piece))
    assert visited(pb.ExtractRequest, data, monkeypatch) <= most
    del data


@pytest.mark.parametrize("bomb", BOMBS)
def test_the_id_of_a_refused_stream_message_is_known(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    piece, most = BOMBS[bomb]
    request = piece * -(-1_000_000 // len(piece))
    data = field(2, request) + b"\x08\x2a"  # the id may stand behind
    assert visited(pb.ExtractStreamRequest, data, monkeypatch) <= most + 1
    monkeypatch.undo()
    assert message_id(data) == 42
    assert message_id(b"\x08\x07" + field(2, request)) == 7
    with pytest.raises(InvalidInput):
        message_id(b"\x08\x07" + field(2, request)[:-1])


def filled(message: Any, rng: random.Random) -> None:
    """Set some of the fields of `message`, and of those within it."""
    for each in message.DESCRIPTOR.fields:
        for _ in range(rng.randint(0, 3) if is_repeated(each) else rng.randint(0, 1)):
            if each.message_type is not None:
                place = getattr(message, each.name)
                filled(place.add() if is_repeated(each) else place, rng)
                continue
            value: Any = rng.randint(0, 100)
            if each.type == FieldDescriptor.TYPE_BYTES:
                value = rng.randbytes(rng.choice([0, 1, 3, 4, 200, 20_000]))
            elif each.type == FieldDescriptor.TYPE_STRING:
                value = "n" * rng.randint(0, 100)
            elif each.type == FieldDescriptor.TYPE_BOOL:
                value = True
            elif each.type == FieldDescriptor.TYPE_ENUM:
                value = 1
            if is_repeated(each):
                getattr(message, each.name).append(value)
            else:
                setattr(message, each.name, value)


def with_contents(message: Any, content: wire.BytesResolver) -> Any:
    """Return `message` with its `bytes` fields resolved."""
    for each, value in message.ListFields():
        if each.message_type is not None:
            for one in value if is_repeated(each) else [value]:
                with_contents(one, content)
        elif each.type == FieldDescriptor.TYPE_BYTES:
            setattr(message, each.name, bytes(content(value)))
    return message


@pytest.mark.parametrize("kind", [pb.ExtractRequest, pb.ExtractStreamRequest])
def test_a_message_means_the_same_as_to_protobuf(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "SHORT_BYTES", 0)
    rng = random.Random(7)
    for _ in range(300):
        message = kind()
        filled(message, rng)
        parts = [message.SerializeToString()]
        if rng.random() < 0.3:  # a second message behind the first is merged into it
            more = kind()
            filled(more, rng)
            parts.append(more.SerializeToString())
        if rng.random() < 0.3:  # unknown fields are ignored, also in a group
            parts.insert(
                rng.randint(0, len(parts)), rng.choice([b"\x7b\x0a\x03abc\x7b\x7c\x7c", field(99, b"abc"), b"\x7d1234"])
            )
        data = b"".join(parts)
        parsed = parse(kind, data, MOST)
        assert with_contents(parsed.message, parsed.resolve_bytes) == kind.FromString(data)


def test_bytes_are_views_of_the_received_data() -> None:
    parsed = parse(pb.ExtractRequest, IMAGE, MOST)
    view = parsed.resolve_bytes(parsed.message.images[0].encoded)
    assert isinstance(view, memoryview)
    assert view.obj is IMAGE
    assert bytes(parsed.resolve_bytes(parsed.message.pixels.data)) == b""


@pytest.mark.parametrize("kind", [pb.ExtractRequest, pb.ExtractStreamRequest])
def test_damaged_messages_are_refused_as_by_protobuf(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of randomly changed or cut messages, exactly those are parsed that protobuf parses."""
    monkeypatch.setattr(wire, "SHORT_BYTES", 0)
    rng = random.Random(11)
    taken = refused = 0
    for _ in range(3000):
        message = kind()
        filled(message, rng)
        for image in getattr(message, "request", message).images:
            if image.encoded:
                image.encoded = image.encoded[:50]
        data = bytearray(message.SerializeToString())
        for _ in range(rng.randint(1, 3)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        data = data[: rng.randint(0, len(data))] if rng.random() < 0.3 else data
        try:
            expected = kind.FromString(bytes(data))
        except DecodeError:
            refused += 1
            with pytest.raises(InvalidInput):
                parse(kind, bytes(data), MOST)
            continue
        try:
            parsed = parse(kind, bytes(data), MOST)
        except TooManyElements:  # a length that became large
            continue
        taken += 1
        assert with_contents(parsed.message, parsed.resolve_bytes) == expected
    assert taken > 100
    assert refused > 100


def test_up_to_64_elements_are_left_to_later_checks() -> None:
    """A limit of two images per request does not make the scan refuse three images or forty layers."""
    images = [pb.Image(encoded=b"x" * 2000) for _ in range(3)]
    outputs = pb.Outputs(layers=[pb.LayerOutputs(layer=layer, cls=True) for layer in range(40)])
    data = pb.ExtractRequest(images=images, outputs=outputs).SerializeToString()
    parsed = parse(pb.ExtractRequest, data, 2)
    assert len(parsed.message.images) == 3
    with pytest.raises(TooManyElements, match=r"more than 64 images in one request; allowed are 2 images"):
        parse(pb.ExtractRequest, field(1, b"\x0a\x64" + b"x" * 100) * 65, 2)


def test_the_largest_sensible_request_is_accepted() -> None:
    """512 views with everything set, and pixels whose shapes are not packed."""
    view = pb.View(
        crop=pb.Box(top=1, left=2, height=3, width=4), horizontal_flip=True, size=pb.Size(height=16, width=16)
    )
    view.interpolation = pb.INTERPOLATION_BICUBIC
    data = pb.ExtractRequest(images=[pb.Image(encoded=b"x" * 100, views=[view])] * 512).SerializeToString()
    assert len(parse(pb.ExtractRequest, data, MOST).message.images) == 512
    tensor = b"\x08\x01" + b"\x10\x10\x10\x10\x10\x03" + field(3, b"x" * 768)
    assert len(parse(pb.ExtractRequest, field(1, field(2, tensor)) * 512, MOST).message.images) == 512

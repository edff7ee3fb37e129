"""Calls to attack the gRPC port: every method, valid and invalid messages, right, wrong and no credentials."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from attack.images import bomb, image_file
from dinov3_serving.framing import tag, varint
from dinov3_serving.v1 import feature_service_pb2 as pb

_SERVICE = "/dinov3_serving.v1.FeatureService/"
_HEALTH = "/grpc.health.v1.Health/"
EXTRACT, STREAM, GET_MODEL = (_SERVICE + name for name in ("Extract", "ExtractStream", "GetModel"))
CHECK, WATCH, LIST = (_HEALTH + name for name in ("Check", "Watch", "List"))
REFLECTION, REFLECTION_1 = (
    f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo" for version in ("v1alpha", "v1")
)
OTHERS = ("/", "/a", _SERVICE, _SERVICE + "Nothing", "/dinov3_serving.v1.Other/Extract", "/" + "x" * 4000)
HTTP = "HTTP"
"""Used instead of a gRPC method for the bytes of one request to the HTTP port."""
STREAMS = frozenset({STREAM, WATCH, REFLECTION, REFLECTION_1})

TOKEN = "right-token"
# Sides of the model's input: mostly small, since the model itself is not attacked.
_SIDES = (16, 16, 16, 32, 32, 32, 48, 48, 64, 64, 80, 224)


AnyMessage = TypeVar("AnyMessage", bound=Message)
Input = tuple[str, tuple[bytes, ...]]
"""A method and its messages."""
Draw = Callable[[random.Random], Input]


@dataclass(frozen=True)
class Call:
    """One input: a call and its messages, one message if the method is unary.

    `deadline` is in seconds, None for the longest; after `cancel_after` seconds the caller cancels.
    """

    method: str
    messages: tuple[bytes, ...]
    authorization: str | bytes | None = f"Bearer {TOKEN}"
    deadline: float | None = None
    cancel_after: float | None = None
    compression: grpc.Compression = grpc.Compression.NoCompression

    @property
    def name(self) -> str:
        """A short name of the method, for the counts."""
        return "other" if self.method in OTHERS else self.method.rpartition("/")[2]

    @property
    def authorized(self) -> bool:
        return self.authorization == f"Bearer {TOKEN}"


def call(seed: int, number: int, *, bombs: float = 0.001) -> Call:
    """Return the input `number` of the run `seed`. A share `bombs` of the inputs are small and expensive."""
    rng = random.Random(f"{seed} {number}")
    method, messages = (_bomb if rng.random() < bombs else rng.choices(_METHODS, _WEIGHTS)[0])(rng)
    return Call(
        method,
        messages,
        authorization=f"Bearer {TOKEN}" if rng.random() < 0.94 else rng.choice(_WRONG),
        deadline=rng.choice((0.001, 0.005, 0.02, 0.1)) if rng.random() < 0.04 else None,
        cancel_after=rng.choice((0.0, 0.001, 0.005, 0.02)) if rng.random() < 0.06 else None,
        compression=grpc.Compression.Gzip if rng.random() < 0.01 else grpc.Compression.NoCompression,
    )


_WRONG: tuple[str | bytes | None, ...] = (
    None,
    "",
    "Bearer",
    "Bearer ",
    "Bearer wrong",
    f"Basic {TOKEN}",
    f"Bearer {TOKEN} ",
    f"Bearer {TOKEN[:-1]}",
    f"Bearer  {TOKEN}",
    "Bearer " + "x" * 4000,
)


def _extract(rng: random.Random) -> Input:
    return EXTRACT, (_bytes_of(rng, _request(rng)),)


def _stream(rng: random.Random) -> Input:
    messages = []
    for index in range(rng.choice((0, 1, 1, 2, 4))):
        message = pb.ExtractStreamRequest(id=index if rng.random() < 0.9 else rng.choice((0, 2**64 - 1)))
        if rng.random() < 0.95:
            message.request.CopyFrom(_request(rng))
        if rng.random() < 0.1:
            message.timeout_seconds = rng.choice((0.001, 5.0, -1.0, math.nan, math.inf, 1e-40))
        messages.append(_bytes_of(rng, message))
    return STREAM, tuple(messages)


def _get_model(rng: random.Random) -> Input:
    return GET_MODEL, (_bytes_of(rng, pb.GetModelRequest(), damage=0.5),)


def _health(rng: random.Random) -> Input:
    service = rng.choice(("", _SERVICE.strip("/"), "nothing", "\0", "x" * 5000))
    return rng.choice((CHECK, WATCH, LIST)), (
        _bytes_of(rng, health_pb2.HealthCheckRequest(service=service), damage=0.3),
    )


def _reflection(rng: random.Random) -> Input:
    """Return a call of v1 or v1alpha, whose messages differ only in their names."""
    messages = tuple(
        _bytes_of(rng, filled(rng, reflection_pb2.ServerReflectionRequest()), damage=0.3)
        for _ in range(rng.choice((0, 1, 3)))
    )
    return rng.choice((REFLECTION, REFLECTION_1)), messages


def _other(rng: random.Random) -> Input:
    return rng.choice(OTHERS), (_bytes_of(rng, _request(rng)),)


def _http(rng: random.Random) -> Input:
    """Return a request to the HTTP port: valid, invalid or cut off."""
    method = rng.choice(("GET", "GET", "GET", "HEAD", "POST", "TRACE", "get", "", "PRI", "G\xc3T", "X" * 300))
    path = rng.choice(("/metrics", "/healthz", "/readyz", "/", "*", "/../../etc/passwd", "//metrics", "/%00", "/\xff"))
    path += rng.choice(("", "", "?a=b", "/", "?" + "x" * 70_000))
    line = f"{method} {path} {rng.choice(('HTTP/1.1', 'HTTP/1.1', 'HTTP/1.0', 'HTTP/9.9', 'HTTP/2.0', '', 'x'))}"
    headers = rng.choice(
        ("", "Host: a\r\n", "Host\r\n", ": \r\n", "A: b\r\n" * 200, "Content-Length: 99999999999\r\n", "\x00: \x00\r\n")
    )
    data = bytearray(f"{line}\r\n{headers}\r\n".encode("latin-1"))
    if rng.random() < 0.3:
        for _ in range(rng.choice((1, 4))):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif rng.random() < 0.1:
        data = bytearray(rng.randbytes(rng.choice((1, 100, 20_000))))
    if rng.random() < 0.1:
        del data[rng.randrange(len(data)) :]
    return HTTP, (bytes(data),)


_METHODS: tuple[Draw, ...] = (_extract, _stream, _get_model, _health, _reflection, _other, _http)
_WEIGHTS = (64, 16, 5, 6, 5, 2, 2)


def _bomb(rng: random.Random) -> Input:
    kind = rng.random()
    if kind < 0.5:
        request = pb.ExtractRequest(images=[pb.Image(encoded=bomb(rng)) for _ in range(rng.choice((1, 1, 2)))])
        request.preprocessing.size.CopyFrom(pb.Size(height=32, width=32))
        return EXTRACT, (request.SerializeToString(),)
    count = rng.choice((10_000, 100_000, 1_000_000))
    many = _repeated(rng, count)
    return (EXTRACT, (many,)) if kind < 0.8 else (STREAM, (_delimited(2, many),))


def _repeated(rng: random.Random, count: int) -> bytes:
    """Return a request with one part repeated `count` times: images, views, layers, dimensions or unknown fields."""
    nothing = b"\x0a\x00"  # field 1, of length 0
    return rng.choice(
        (
            nothing * count,  # images
            _delimited(1, b"\x1a\x00" * count),  # views of one image
            _delimited(4, b"\x22\x00" * count),  # layers
            _delimited(2, _delimited(2, b"\x01" * count)),  # the dimensions of packed pixels
            _delimited(2, b"\x10\x01" * count),  # and not packed on the wire
            b"\xa2\x06\x00" * count,  # field 100, unknown
            nothing + _delimited(1, _delimited(2, b"\x10\x01" * count)),  # the dimensions of one image
            b"\x1a\x00" * count,  # preprocessing, merged again and again
        )
    )


def _delimited(field: int, body: bytes) -> bytes:
    return tag(field, len(body)) + body


def _request(rng: random.Random) -> pb.ExtractRequest:
    """Return a request that is mostly valid except for its images, and sometimes has meaningless values."""
    if rng.random() < 0.08:
        return filled(rng, pb.ExtractRequest())
    request = pb.ExtractRequest(priority=_enum(rng, 0, 0, 1, 2))
    if rng.random() < 0.2:
        request.pixels.CopyFrom(_pixels(rng, images=rng.choice((1, 1, 2, 5))))
    else:
        request.images.extend(_image(rng) for _ in range(rng.choice((1, 1, 1, 2, 4))))
    if rng.random() < 0.97:
        request.preprocessing.size.CopyFrom(pb.Size(height=rng.choice(_SIDES), width=rng.choice(_SIDES)))
    request.preprocessing.preset = _enum(rng, 0, 0, 1, 2, 3)
    request.preprocessing.interpolation = _enum(rng, 0, 0, 1, 2, 3, 4)
    request.preprocessing.apply_exif_orientation = rng.random() < 0.2
    request.preprocessing.allow_truncated = rng.random() < 0.2
    if rng.random() < 0.2:
        request.preprocessing.background.CopyFrom(_color(rng))
    if rng.random() < 0.3:
        request.preprocessing.fit.CopyFrom(_fit(rng))
    if rng.random() < 0.7:
        request.outputs.CopyFrom(_outputs(rng))
    if rng.random() < 0.06:
        _disturb(rng, request)
    return request


def _outputs(rng: random.Random) -> pb.Outputs:
    outputs = pb.Outputs(
        cls=True, patches=rng.random() < 0.3, registers=rng.random() < 0.2, dtype=_enum(rng, 0, 2, 3, 4, 5)
    )
    if rng.random() < 0.2:
        layers = rng.sample(range(12), rng.choice((1, 2, 4)))
        outputs.layers.extend(pb.LayerOutputs(layer=layer, cls=True, patches=rng.random() < 0.2) for layer in layers)
    if rng.random() < 0.2:
        outputs.pooling.CopyFrom(
            pb.Pooling(grid_height=rng.choice((1, 2, 7)), grid_width=rng.choice((1, 3)), method=_enum(rng, 0, 1, 2))
        )
    outputs.patch_layout = _enum(rng, 0, 0, 1, 2)
    return outputs


def _image(rng: random.Random) -> pb.Image:
    image = pb.Image()
    if rng.random() < 0.85:
        image.encoded = image_file(rng)
    else:
        image.pixels.CopyFrom(_pixels(rng, images=None))
    for _ in range(rng.choice((0, 0, 0, 1, 3))):
        view = image.views.add(horizontal_flip=rng.random() < 0.5, interpolation=_enum(rng, 0, 1, 2, 3, 4))
        if rng.random() < 0.7:
            top, left, height, width = (rng.choice((0, 1, 8, 16, 16, 40, 2**32 - 1)) for _ in range(4))
            view.crop.CopyFrom(pb.Box(top=top, left=left, height=height, width=width))
        if rng.random() < 0.7:
            view.size.CopyFrom(pb.Size(height=rng.choice(_SIDES), width=rng.choice(_SIDES)))
    return image


def _pixels(rng: random.Random, images: int | None) -> pb.Tensor:
    """Return uint8 or float32 pixels of one or several images, whose length mostly fits their shape."""
    height, width = rng.choice((16, 32, 48, 50)), rng.choice((16, 32, 64))
    batch = () if images is None else (images,)
    if rng.random() < 0.7:
        shape, kind, nbytes = (*batch, height, width, 3), pb.DATA_TYPE_UINT8, 1
    else:
        shape, kind, nbytes = (*batch, 3, height, width), pb.DATA_TYPE_FLOAT32, 4
    count = math.prod(shape)
    value = rng.choice((0.0, 1.0, -2.5, 1000.0, -1000.0, 1e30, math.inf, math.nan))
    data = struct.pack("<f", value) * count if nbytes == 4 else rng.randbytes(64) * (count // 64) + bytes(count % 64)
    tensor = pb.Tensor(dtype=kind, shape=shape, data=data)
    if rng.random() < 0.1:
        tensor.data = data[: -rng.choice((1, 2, 100))]
    if rng.random() < 0.1:
        tensor.shape[:] = rng.choice(
            ((), (0,), (1,), (-1, 2, 3), (2**62, 4, 1, 3), (0, 0, 0, 3), (1,) * 20, shape[:-1])
        )
    return tensor


def filled(rng: random.Random, message: AnyMessage, depth: int = 0) -> AnyMessage:
    """Set random fields of `message`, to a depth of five messages, to random values, and return it."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() < (0.4 if field.message_type is None or depth < 5 else 0.0):
            _set(rng, message, field, depth)
    return message


def _disturb(rng: random.Random, message: Message) -> None:
    """Set one field of `message`, or of a nested message, to a random value."""
    inner = [value for field, value in message.ListFields() if field.message_type and not field.is_repeated]
    if inner and rng.random() < 0.7:
        _disturb(rng, rng.choice(inner))
    else:
        _set(rng, message, rng.choice(message.DESCRIPTOR.fields), depth=3)


def _set(rng: random.Random, message: Message, field: Any, depth: int) -> None:
    if field.is_repeated:
        values = getattr(message, field.name)
        for _ in range(rng.choice((0, 1, 1, 2, 5))):
            if field.message_type:
                filled(rng, values.add(), depth + 1)
            else:
                values.append(_SCALARS[field.type](rng))
    elif field.message_type:
        inner = getattr(message, field.name)
        inner.SetInParent()
        filled(rng, inner, depth + 1)
    else:
        setattr(message, field.name, _SCALARS[field.type](rng))


def _integer(bits: int, signed: bool) -> Callable[[random.Random], int]:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    edges = [
        value
        for value in (0, 1, 2, 3, 11, 12, 16, 32, 224, 255, 65536, high, low, high - 1, -1)
        if low <= value <= high
    ]
    return lambda rng: rng.choice(edges)


_TEXTS = (
    "",
    "vits16",
    "dinov3_vits16",
    "0" * 64,
    "nothing",
    "\0",
    "ä\u202e\U0001f600",
    "x" * 3000,
    "../" * 20,
    "\x1b[31m",
)
_SCALARS: dict[int, Callable[[random.Random], object]] = {
    FieldDescriptor.TYPE_BOOL: lambda rng: rng.random() < 0.5,
    FieldDescriptor.TYPE_ENUM: lambda rng: rng.choice((0, 1, 2, 3, 4, 5, 6, 99, -1, 2**31 - 1)),
    FieldDescriptor.TYPE_INT32: _integer(32, True),
    FieldDescriptor.TYPE_INT64: _integer(64, True),
    FieldDescriptor.TYPE_UINT32: _integer(32, False),
    FieldDescriptor.TYPE_UINT64: _integer(64, False),
    FieldDescriptor.TYPE_FLOAT: lambda rng: rng.choice((0.0, 1.0, -1.0, 1e-45, 3e38, math.inf, -math.inf, math.nan)),
    FieldDescriptor.TYPE_STRING: lambda rng: rng.choice(_TEXTS),
    FieldDescriptor.TYPE_BYTES: image_file,
}


def _bytes_of(rng: random.Random, message: Message, damage: float = 0.06) -> bytes:
    """Serialize `message`. A share `damage` of the messages is then damaged, or gets unknown fields."""
    data = message.SerializeToString()
    if rng.random() >= damage:
        return data
    kind, body = rng.random(), bytearray(data)
    if kind < 0.3:
        field, wire = rng.choice((0, 1, 9, 100, 2**29 - 1)), rng.randrange(8)
        body += varint(field << 3 | wire) + rng.choice((b"", b"\x00", b"\x7f" + bytes(127), b"\xff" * 11, bytes(8)))
    elif kind < 0.5 and body:
        del body[rng.randrange(len(body)) :]
    elif kind < 0.9 and body:
        for _ in range(rng.choice((1, 1, 4))):
            at = rng.randrange(min(len(body), rng.choice((4, 64, 100_000))))
            body[at] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    else:
        body = bytearray(rng.randbytes(rng.choice((1, 10, 1000))))
    return bytes(body)


def _color(rng: random.Random) -> pb.Color:
    return pb.Color(red=rng.randrange(256), green=rng.choice((0, 255, 255, 256)), blue=rng.choice((0, 7, 2**32 - 1)))


def _fit(rng: random.Random) -> pb.Fit:
    """Return a fit: one of two is possible for most sizes."""
    if rng.random() < 0.5:
        return pb.Fit(method=_enum(rng, 0, 1, 2, 3))
    fit = pb.Fit(resize_shorter=rng.choice((0, 1, 16, 256, 4096, 2**32 - 1)))
    fit.method = _enum(rng, 0, 1, 2, 3)
    if rng.random() < 0.5:
        fit.pad_color.CopyFrom(_color(rng))
    return fit


def _enum(rng: random.Random, *values: int) -> Any:
    """Return one of `values`, as a value of any enum."""
    return rng.choice(values)

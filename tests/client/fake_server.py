"""A small real gRPC server for the client's tests: scripted failures, deterministic features of the pixels."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

import grpc
import ml_dtypes
import numpy as np
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc_status import rpc_status
from PIL import Image, UnidentifiedImageError

from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.feature_service_pb2_grpc import add_FeatureServiceServicer_to_server

CHANNELS, REGISTERS, PATCH, DEPTH = 24, 4, 16, 12
# Layer 0 has fewer channels and a finer grid than the others.
LAYER_DIMS, LAYER_STRIDES = (18,) + (CHANNELS,) * 11, (8,) + (PATCH,) * 11
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = {
    pb.DATA_TYPE_FLOAT32: np.dtype(np.float32),
    pb.DATA_TYPE_FLOAT16: np.dtype(np.float16),
    pb.DATA_TYPE_BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
_MIX = np.random.default_rng(0).normal(size=(6, CHANNELS))


def tokens(pixels: np.ndarray[Any, Any], layer: int = -1) -> dict[str, np.ndarray[Any, Any]]:
    """Features of one model input, uint8 [H, W, 3] or float32 [3, H, W], as float32: cls, patches, registers.

    Those of an intermediate layer still have to be scaled by `layer_scale`.
    """
    image = pixels / 255.0 if pixels.dtype == np.uint8 else pixels.transpose(1, 2, 0)
    side = LAYER_STRIDES[layer]
    height, width = image.shape[0] // side, image.shape[1] // side
    cells = image.reshape(height, side, width, side, 3).transpose(0, 2, 1, 3, 4).reshape(height * width, -1, 3)
    patches = np.concatenate([cells.mean(1), cells.std(1)], 1) @ _MIX[:, : LAYER_DIMS[layer]]
    cls = patches.mean(0)
    registers = np.outer(np.arange(1, REGISTERS + 1), cls)
    return {name: t.astype(np.float32) for name, t in (("cls", cls), ("patches", patches), ("registers", registers))}


def layer_scale(layer: int) -> float:
    """Features of an intermediate layer are `tokens`, times this."""
    return (layer + 1) / 16


def failure(code: grpc.StatusCode, message: str, *details: Message) -> status_pb2.Status:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def retry_info(seconds: float) -> RetryInfo:
    delay = Duration()
    delay.FromNanoseconds(round(seconds * 1e9))
    return RetryInfo(retry_delay=delay)


def bad_request(path: str, description: str) -> BadRequest:
    return BadRequest(field_violations=[BadRequest.FieldViolation(field=path, description=description)])


@dataclass
class Seen:
    """A call as it arrived."""

    message: Any
    metadata: dict[str, str]
    timeout: float


class _ImageFault(Exception):
    """One image has no features."""


@dataclass
class FakeServer:
    """`script` is consumed first, one failure a call (None: answer); `edit` changes an answer before it goes.

    `arrived` is set by a call; with `hold`, its answer waits for that.
    """

    script: list[status_pb2.Status | None] = field(default_factory=list)
    edit: Callable[[pb.ExtractResponse], object] | None = None
    random_weights: bool = False
    certificate: pb.Certificate | None = None
    max_images: int = 64
    max_message_bytes: int = 64 << 20
    server_options: Sequence[tuple[str, int]] = (("grpc.max_receive_message_length", 64 << 20),)
    tls: grpc.ServerCredentials | None = None
    address: str = "127.0.0.1:0"
    hold: threading.Event | None = None
    arrived: threading.Event = field(default_factory=threading.Event)
    seen: list[Seen] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._server = grpc.server(ThreadPoolExecutor(2), options=(("grpc.so_reuseport", 0), *self.server_options))
        add_FeatureServiceServicer_to_server(self, self._server)
        if self.tls is None:
            self.port = self._server.add_insecure_port(self.address)
        else:
            self.port = self._server.add_secure_port(self.address, self.tls)
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.hold is not None:
            self.hold.set()
        self._server.stop(None).wait()

    @property
    def target(self) -> str:
        return f"localhost:{self.port}"

    @property
    def requests(self) -> list[pb.ExtractRequest]:
        return [seen.message for seen in self.seen if isinstance(seen.message, pb.ExtractRequest)]

    def GetModel(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> pb.GetModelResponse:
        self._arrive(request, context)
        return pb.GetModelResponse(
            model="dinov3_vits16",
            weights="random:7" if self.random_weights else "dinov3_vits16.pth",
            random_weights=self.random_weights,
            fingerprint="f00d",
            dtype=pb.DATA_TYPE_BFLOAT16,
            devices=["cpu"],
            embed_dim=CHANNELS,
            depth=DEPTH,
            layer_dims=LAYER_DIMS,
            layer_strides=LAYER_STRIDES,
            patch_size=PATCH,
            register_tokens=REGISTERS,
            mean=MEAN,
            std=STD,
            parameters=21_601_152,
            limits=pb.ServerLimits(
                max_message_bytes=self.max_message_bytes,
                max_images_per_request=self.max_images,
                max_image_pixels=1 << 26,
                max_image_tokens=8192,
                stream_window=8,
            ),
            frontends=2,
            frontend=1,
            server_version="0.1.0",
            certificate=self.certificate,
        )

    def Extract(self, request: pb.ExtractRequest, context: grpc.ServicerContext) -> pb.ExtractResponse:
        self._arrive(request, context)
        response = _answer(request)
        if self.edit is not None:
            self.edit(response)
        return response

    def ExtractStream(self, requests: object, context: grpc.ServicerContext) -> NoReturn:
        raise NotImplementedError

    def _arrive(self, request: Any, context: grpc.ServicerContext) -> None:
        self.arrived.set()
        self.seen.append(Seen(request, dict(context.invocation_metadata()), context.time_remaining()))
        if self.hold is not None:
            self.hold.wait(60)
        failure = self.script.pop(0) if self.script else None
        if failure is not None:
            context.abort_with_status(rpc_status.to_status(failure))


def _answer(request: pb.ExtractRequest) -> pb.ExtractResponse:
    response = pb.ExtractResponse(
        timings=pb.Timings(decode_seconds=0.25, queue_seconds=0.5, inference_seconds=0.75, batch_images=4, batches=2),
        frontend=1,
        fingerprint="f00d",
    )
    sizes: dict[tuple[int, int], list[tuple[int, np.ndarray[Any, Any] | None]]] = {}
    for index, image in enumerate(_images(request)):
        try:
            pixels = _preprocessed(image, request.preprocessing)
            sizes.setdefault(pixels.shape[:2] if pixels.dtype == np.uint8 else pixels.shape[1:], []).append(
                (index, pixels)
            )
        except _ImageFault as fault:
            status = failure(grpc.StatusCode.INVALID_ARGUMENT, str(fault), bad_request(f"images[{index}]", str(fault)))
            response.errors.add(image_index=index).status.ParseFromString(status.SerializeToString())
            size = _fixed_size(request.preprocessing)
            if size is not None:
                sizes.setdefault(size, []).append((index, None))
    for size, rows in sizes.items():
        response.blocks.append(_block(size, rows, request.outputs))
    return response


def _images(request: pb.ExtractRequest) -> list[bytes | np.ndarray[Any, Any]]:
    if request.HasField("pixels"):
        return list(_array(request.pixels))
    return [image.encoded if image.HasField("encoded") else _array(image.pixels) for image in request.images]


def _array(tensor: pb.Tensor) -> np.ndarray[Any, Any]:
    dtype = {pb.DATA_TYPE_UINT8: np.uint8, pb.DATA_TYPE_FLOAT32: np.float32}[tensor.dtype]
    return np.frombuffer(tensor.data, dtype).reshape(tuple(tensor.shape))


def _fixed_size(preprocessing: pb.Preprocessing) -> tuple[int, int] | None:
    if preprocessing.HasField("size"):
        return preprocessing.size.height, preprocessing.size.width
    return {pb.PRESET_DINOV3: (256, 256), pb.PRESET_HF: (224, 224), pb.PRESET_NONE: None}[preprocessing.preset]


def _preprocessed(image: bytes | np.ndarray[Any, Any], preprocessing: pb.Preprocessing) -> np.ndarray[Any, Any]:
    if isinstance(image, bytes):
        try:
            image = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        except UnidentifiedImageError:
            raise _ImageFault(f"not an image: {len(image)} bytes") from None
    if image.dtype == np.float32:
        return image
    size = _fixed_size(preprocessing)
    if size is not None:
        return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    if image.shape[0] % PATCH or image.shape[1] % PATCH:
        raise _ImageFault(f"{image.shape[0]}x{image.shape[1]} pixels are no multiple of {PATCH}")
    return image


def _block(
    size: tuple[int, int], rows: list[tuple[int, np.ndarray[Any, Any] | None]], outputs: pb.Outputs
) -> pb.FeatureBlock:
    block = pb.FeatureBlock(
        input_size=pb.Size(height=size[0], width=size[1]), image_indices=[index for index, _ in rows]
    )
    for layer in outputs.layers:
        block.layers.add(layer=layer.layer)
    for wanted, holder, layer, scale in [
        (outputs, block, -1, 1.0),
        *((one, block.layers[i], one.layer, layer_scale(one.layer)) for i, one in enumerate(outputs.layers)),
    ]:
        holder.grid_height, holder.grid_width = (side // LAYER_STRIDES[layer] for side in size)
        # Rows of failed images are zeros.
        found = [tokens(np.zeros((*size, 3), np.uint8) if pixels is None else pixels, layer) for _, pixels in rows]
        for kind in found[0]:
            if getattr(wanted, kind):
                packed = np.stack(
                    [t[kind] * (pixels is not None) for t, (_, pixels) in zip(found, rows, strict=True)]
                ) * np.float32(scale)
                data = packed.astype(DTYPES[outputs.dtype]).tobytes()
                getattr(holder, kind).CopyFrom(pb.Tensor(dtype=outputs.dtype, shape=packed.shape, data=data))
    return block

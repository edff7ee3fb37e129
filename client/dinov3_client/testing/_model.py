"""The model that a fake server claims to serve."""

from __future__ import annotations

from typing import get_args

from PIL import features

from dinov3_client._model import Model
from dinov3_serving.model import Limits, ParityCheck
from dinov3_serving.presets import PRESETS, FitMethod
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.model import model_message

HAS_AVIF = "avif" in features.modules and features.check_module("avif")

MODEL = Model(
    name="dinov3_vits16",
    weights="dinov3_vits16.pth",
    random_weights=False,
    fingerprint="f00d",
    dtype="bfloat16",
    devices=("cpu",),
    layer_dims=(24,) * 12,
    layer_strides=(16,) * 12,
    register_tokens=4,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    parameters=21_601_152,
    limits=Limits(
        max_message_bytes=64 << 20,
        max_images_per_request=64,
        max_image_pixels=1 << 26,
        max_image_tokens=8192,
        stream_window=8,
    ),
    frontends=1,
    frontend=0,
    server_version="0.1.0",
    parity_check=ParityCheck(False, "a fake server has no model", "", (), "", ""),
    projections=(),
    presets=PRESETS,
    image_formats=("JPEG", "PNG", "WebP", "BMP", "TIFF", "GIF", *(("AVIF",) if HAS_AVIF else ())),
    fit_methods=get_args(FitMethod),
)
"""The default model of a `FakeServer`: a ViT with 24 channels, so that features are small. Derive others with
`dataclasses.replace`."""


def message_of(model: Model, frontend: int) -> pb.GetModelResponse:
    """Return the GetModelResponse of one frontend for `model`."""
    return model_message(
        model,
        model.limits,
        devices=model.devices,
        frontends=model.frontends,
        frontend=frontend,
        server_version=model.server_version,
        presets=model.presets,
        image_formats=model.image_formats,
    )

"""The model that a fake server claims to serve."""

from __future__ import annotations

from dinov3_client._dtypes import wire_of
from dinov3_client._model import Limits, Model, ParityCheck
from dinov3_serving.presets import PRESETS
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.enums import preset_message

MODEL = Model(
    name="dinov3_vits16",
    weights="dinov3_vits16.pth",
    random_weights=False,
    fingerprint="f00d",
    dtype="bfloat16",
    devices=("cpu",),
    embed_dim=24,
    depth=12,
    layer_dims=(24,) * 12,
    layer_strides=(16,) * 12,
    patch_size=16,
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
)
"""The default model of a `FakeServer`: a ViT with 24 channels, so that features are small. Derive others with
`dataclasses.replace`; `embed_dim` and `patch_size` are the last of `layer_dims` and `layer_strides`."""


def message_of(model: Model, frontend: int) -> pb.GetModelResponse:
    """Return the GetModelResponse of one frontend for `model`."""
    limits, proof = model.limits, model.parity_check
    return pb.GetModelResponse(
        model=model.name,
        weights=model.weights,
        random_weights=model.random_weights,
        fingerprint=model.fingerprint,
        dtype=wire_of(model.dtype),
        devices=model.devices,
        embed_dim=model.embed_dim,
        depth=model.depth,
        layer_dims=model.layer_dims,
        layer_strides=model.layer_strides,
        patch_size=model.patch_size,
        register_tokens=model.register_tokens,
        mean=model.mean,
        std=model.std,
        parameters=model.parameters,
        limits=pb.ServerLimits(
            max_message_bytes=limits.max_message_bytes,
            max_images_per_request=limits.max_images_per_request,
            max_image_pixels=limits.max_image_pixels,
            max_image_tokens=limits.max_image_tokens,
            stream_window=limits.stream_window,
        ),
        frontends=model.frontends,
        frontend=frontend,
        server_version=model.server_version,
        parity_check=pb.ParityCheck(
            verified=proof.verified,
            reason=proof.reason,
            upstream_revision=proof.upstream_revision,
            outputs=[
                pb.OutputParity(
                    output=each.output,
                    dtype=wire_of(each.dtype),
                    least_cosine=each.least_cosine,
                    relative_error=each.relative_error,
                )
                for each in proof.outputs
            ],
            time=proof.time,
            not_covered=proof.not_covered,
        ),
        projections=[
            pb.Projection(
                name=each.name,
                input_channels=each.input_channels,
                output_channels=each.output_channels,
                fingerprint=each.fingerprint,
            )
            for each in model.projections
        ],
        presets=map(preset_message, model.presets),
    )

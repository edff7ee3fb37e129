"""What a server tells of its model and its limits."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from dinov3_client._dtypes import name_of
from dinov3_client._errors import InvalidResponse
from dinov3_serving.v1 import feature_service_pb2 as pb


@dataclass(frozen=True)
class Limits:
    """What the server accepts."""

    max_message_bytes: int
    """Of one request or one answer."""
    max_images_per_request: int
    max_image_pixels: int
    """Width x height of a decoded image."""
    max_image_tokens: int
    """CLS + registers + patches of one image."""
    stream_window: int
    """Unanswered requests of one ExtractStream."""


@dataclass(frozen=True)
class OutputProof:
    """How near one output is to that of Meta's code in float32, at worst."""

    output: str
    """cls or patches."""
    dtype: str
    """What the server computed in."""
    least_cosine: float
    """Of any token of any probe image."""
    relative_error: float
    """|ours - theirs| / |theirs|, Euclidean norms, of any probe image."""


@dataclass(frozen=True)
class Certificate:
    """Whether the server showed, at its start, that its features are those of Meta's own code on the same weights."""

    verified: bool
    reason: str
    """Why not; empty where verified."""
    upstream_revision: str
    """Commit of Meta's code."""
    outputs: tuple[OutputProof, ...]
    time: str
    """RFC 3339, UTC."""
    not_covered: str
    """What the proof says nothing about."""


@dataclass(frozen=True)
class Projection:
    """A linear map of the channels of patches that the server can apply: the `projection` of `extract`."""

    name: str
    input_channels: int
    """D of the layers that it can be applied to."""
    output_channels: int
    """D of the patches that come back."""
    fingerprint: str
    """Identifies its numbers; follows the model's, after a "+", in the fingerprint of an answer."""


@dataclass(frozen=True)
class Model:
    """The model that a server serves."""

    name: str
    """dinov3_vits16 for one."""
    weights: str
    """Where they came from: a file name or random:SEED."""
    random_weights: bool
    """Features have the right shapes and no meaning."""
    fingerprint: str
    """Identifies what determines the numbers: tensors, dtype, RoPE periods, backbone, preprocessing."""
    dtype: str
    """What the model computes in."""
    devices: tuple[str, ...]
    embed_dim: int
    """D, the channels of the last layer's tokens."""
    depth: int
    """Layers (a ViT's blocks, a ConvNeXt's stages); `layers` of `extract` are 0 .. depth - 1."""
    layer_dims: tuple[int, ...]
    """D of each layer."""
    layer_strides: tuple[int, ...]
    """Pixels of the model input, in height and in width, to a patch of each layer."""
    patch_size: int
    """Pixels; height and width of every model input are multiples of it."""
    register_tokens: int
    mean: tuple[float, ...]
    """Per RGB channel, of pixels in 0..1; with `std`, what float32 images are normalised by."""
    std: tuple[float, ...]
    parameters: int
    limits: Limits
    frontends: int
    """Server processes that share the port."""
    frontend: int
    """The one that answered."""
    server_version: str
    certificate: Certificate
    projections: tuple[Projection, ...]


def read_model(data: bytes) -> Model:
    """Of a GetModelResponse as it came. Raises InvalidResponse where it is none."""
    try:
        response = pb.GetModelResponse.FromString(data)
    except DecodeError:
        raise InvalidResponse(
            f"the {len(data)} bytes that came are no {pb.GetModelResponse.DESCRIPTOR.full_name}"
        ) from None
    limits = response.limits
    return Model(
        name=response.model,
        weights=response.weights,
        random_weights=response.random_weights,
        fingerprint=response.fingerprint,
        dtype=name_of(response.dtype),
        devices=tuple(response.devices),
        embed_dim=response.embed_dim,
        depth=response.depth,
        layer_dims=tuple(response.layer_dims),
        layer_strides=tuple(response.layer_strides),
        patch_size=response.patch_size,
        register_tokens=response.register_tokens,
        mean=tuple(response.mean),
        std=tuple(response.std),
        parameters=response.parameters,
        limits=Limits(
            max_message_bytes=limits.max_message_bytes,
            max_images_per_request=limits.max_images_per_request,
            max_image_pixels=limits.max_image_pixels,
            max_image_tokens=limits.max_image_tokens,
            stream_window=limits.stream_window,
        ),
        frontends=response.frontends,
        frontend=response.frontend,
        server_version=response.server_version,
        certificate=_certificate(response),
        projections=tuple(
            Projection(each.name, each.input_channels, each.output_channels, each.fingerprint)
            for each in response.projections
        ),
    )


def _certificate(response: pb.GetModelResponse) -> Certificate:
    if not response.HasField("certificate"):
        return Certificate(False, "the server tells of no proof", "", (), "", "")
    told = response.certificate
    return Certificate(
        verified=told.verified,
        reason=told.reason,
        upstream_revision=told.upstream_revision,
        outputs=tuple(
            OutputProof(proof.output, name_of(proof.dtype), proof.least_cosine, proof.relative_error)
            for proof in told.outputs
        ),
        time=told.time,
        not_covered=told.not_covered,
    )

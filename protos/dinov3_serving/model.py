"""The description of a model, as server and client share it."""

from __future__ import annotations

from dataclasses import dataclass

from dinov3_serving.features import Pooling
from dinov3_serving.images import PixelShape

Size = tuple[int, int] | PixelShape
"""(height, width) of a model input in pixels; the format of the pixels is ignored."""


@dataclass(frozen=True)
class Projection:
    """A linear map of patch channels that the server can apply: the `projection` of `extract`."""

    name: str
    input_channels: int
    """D of the layers that it applies to."""
    output_channels: int
    """D of the returned patches."""
    fingerprint: str
    """A hash of its weight and bias; follows the model's, after a "+", in the fingerprint of an answer."""


@dataclass(frozen=True)
class OutputParity:
    """The largest difference between one output and that of Meta's code in float32, over all reference images."""

    output: str
    """cls, patches or registers."""
    dtype: str
    """The dtype that the server computed in."""
    least_cosine: float
    """The least of any token of any reference image."""
    relative_error: float
    """The largest |ours - theirs| / |theirs| (Euclidean norms) of any reference image."""


@dataclass(frozen=True)
class ParityCheck:
    """The result of the comparison, at the server's start, with Meta's own code on the same weights."""

    verified: bool
    reason: str
    """Why it is not verified; empty if it is."""
    upstream_revision: str
    """The commit of Meta's code; empty if not verified."""
    outputs: tuple[OutputParity, ...]
    time: str
    """Of the comparison: RFC 3339, UTC; empty if not verified."""
    not_covered: str
    """What the check does not test."""

    def __str__(self) -> str:
        """Return one line for the log."""
        if not self.verified:
            return f"NOT VERIFIED: {self.reason}"
        figures = "; ".join(
            f"{each.output} in {each.dtype}: cosine {each.least_cosine:.6f}, relative error {each.relative_error:.1e}"
            for each in self.outputs
        )
        return f"verified against Meta's code at {self.upstream_revision} on {self.time}: {figures}"


@dataclass(frozen=True)
class Limits:
    """The server's limits."""

    max_message_bytes: int
    """Of one request or one response."""
    max_images_per_request: int
    max_image_pixels: int
    """Width * height of a decoded image."""
    max_image_tokens: int
    """CLS + registers + patches of one image."""
    stream_window: int
    """Unanswered requests of one ExtractStream."""


NOT_CHECKED = ParityCheck(False, "no comparison was run", upstream_revision="", outputs=(), time="", not_covered="")


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """The properties of a model."""

    name: str
    """For example dinov3_vits16."""
    weights: str
    """Their source: a file name or random:SEED."""
    random_weights: bool
    """Features have the right shapes and no meaning."""
    fingerprint: str
    """Identifies all that determines the features: tensors, dtype, RoPE periods, backbone, preprocessing."""
    dtype: str
    """The dtype that the model computes in."""
    layer_dims: tuple[int, ...]
    """D, the channels of the tokens, of each layer."""
    layer_strides: tuple[int, ...]
    """Height and width in pixels of one patch of each layer; the last is a multiple of the others."""
    register_tokens: int
    mean: tuple[float, ...]
    """Per RGB channel, of pixels in 0..1; float32 images must be normalized by it and `std`."""
    std: tuple[float, ...]
    parameters: int
    parity_check: ParityCheck = NOT_CHECKED
    projections: tuple[Projection, ...] = ()

    @property
    def embed_dim(self) -> int:
        """D of the last layer, and so of the final features."""
        return self.layer_dims[-1]

    @property
    def depth(self) -> int:
        """The number of layers (a ViT's blocks, a ConvNeXt's stages); they are numbered 0 .. depth - 1."""
        return len(self.layer_dims)

    @property
    def patch_size(self) -> int:
        """Height and width of a patch in pixels; those of every model input are multiples of it."""
        return self.layer_strides[-1]

    def width(self, layer: int | None) -> int:
        """Return the channels of a layer; None is the last."""
        return self.layer_dims[-1 if layer is None else layer]

    def grid(self, size: Size, layer: int | None = None, pooling: Pooling | None = None) -> tuple[int, int]:
        """Return rows and columns of the patches of a layer, for a model input of (height, width), after pooling."""
        if pooling is not None:
            return pooling.rows, pooling.columns
        stride = self.layer_strides[-1 if layer is None else layer]
        return size[0] // stride, size[1] // stride

    def tokens(self, size: Size) -> int:
        """Return the CLS, register and patch tokens of one image in the last layer: the unit of the batch budget."""
        rows, columns = self.grid(size)
        return 1 + self.register_tokens + rows * columns

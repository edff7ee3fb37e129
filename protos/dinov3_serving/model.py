"""The description of a model, as server and client share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


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


class ModelShape(Protocol):
    """The properties of a model that checks of requests need, of the server's ModelInfo and the client's Model."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def depth(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def layer_dims(self) -> tuple[int, ...]: ...
    @property
    def register_tokens(self) -> int: ...
    @property
    def projections(self) -> tuple[Projection, ...]: ...

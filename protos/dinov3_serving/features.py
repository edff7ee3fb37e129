"""The features that a request asks for, as plain data that server and client share."""

from __future__ import annotations

from typing import Literal, NamedTuple

TokenKind = Literal["cls", "patches", "registers"]
FeatureDtype = Literal["float32", "float16", "bfloat16", "int8"]
PoolingMethod = Literal["area", "bilinear"]


class Output(NamedTuple):
    """One output of a model: all tokens of one kind, of one layer.

    `layer` None is the last layer, after the final norm. Otherwise it is a 0-based layer index, and `norm` says whether
    the final norm is applied.
    """

    kind: TokenKind
    layer: int | None = None
    norm: bool = True


class Pooling(NamedTuple):
    """Resampling of patches to a grid of `rows` x `columns`.

    "area" is torch's adaptive_avg_pool2d; "bilinear" is its interpolate with align_corners=False, without antialias.
    """

    method: PoolingMethod
    rows: int
    columns: int


class OutputSpec(NamedTuple):
    """One output and how it is returned.

    Patches are pooled, then projected by the named projection, then laid out [D, rows, columns] if `channels_first`.
    Every output is converted to `dtype`.

    int8 is symmetric, with a float32 scale for each token: scale = max |x| / 127, value = x / scale rounded half to
    even; a token of zeros has the scale 0.
    """

    output: Output
    dtype: FeatureDtype
    pooling: Pooling | None = None
    projection: str | None = None
    channels_first: bool = False

    @property
    def buffer_dtypes(self) -> tuple[FeatureDtype, ...]:
        """Return the dtype of the values, followed by that of their scales for int8."""
        return ("int8", "float32") if self.dtype == "int8" else (self.dtype,)


class FeatureSpec(NamedTuple):
    """The outputs of a request, and how they are returned (see OutputSpec)."""

    outputs: tuple[Output, ...]
    dtype: FeatureDtype
    pooling: Pooling | None = None
    projection: str | None = None
    channels_first: bool = False

    def output_spec(self, output: Output) -> OutputSpec:
        """Return the spec of one output. Pooling, projection and layout apply to patches only."""
        return OutputSpec(output, *self[1:]) if output.kind == "patches" else OutputSpec(output, self.dtype)

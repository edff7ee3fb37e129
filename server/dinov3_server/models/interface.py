"""The interface between workers and models: `Runner`, and the plain data that it takes and returns.

Imports no torch, so that frontends, the scheduler and the tests' numpy runner can use it.

Shapes: R rows of a batch, H x W pixels, P patches, G registers, D channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

PixelFormat = Literal["uint8", "float32"]
TokenKind = Literal["cls", "patches", "registers"]
FeatureDtype = Literal["float32", "float16", "bfloat16", "int8"]
PoolingMethod = Literal["area", "bilinear"]

ITEM_SIZES: dict[FeatureDtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


class PixelShape(NamedTuple):
    """Size and format of one model input: `uint8` is [H, W, 3] RGB, `float32` is [3, H, W], normalised already."""

    height: int
    width: int
    format: PixelFormat

    @property
    def nbytes(self) -> int:
        return self.height * self.width * 3 * (1 if self.format == "uint8" else 4)


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


class OutputBuffer(NamedTuple):
    """One array of a row in the arena: the values of an output, or the scales of the int8 values before it."""

    output: Output
    dtype: FeatureDtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


class Projection(NamedTuple):
    """A linear map of the channels of patches, named in the server's settings."""

    name: str
    input_channels: int
    output_channels: int
    fingerprint: str  # hash of its weight and bias


@dataclass(frozen=True)
class Provisioned:
    """The weights and the upstream code that start-up found or fetched. Pickled from the provisioner to workers."""

    weights: str  # path of a file, or of a folder of shards; or "random:SEED"
    label: str  # name of the weights for people: the file's name, "hf://OWNER/REPO@REVISION" or "random:SEED"
    revision: str  # required commit of Meta's code
    checkout: str | None  # folder of that code, verified; None if it is not available
    unavailable_reason: str = ""  # why `checkout` is None


@dataclass(frozen=True)
class OutputParity:
    """Agreement of one output with that of Meta's code, over all reference images and tokens."""

    output: TokenKind
    dtype: FeatureDtype  # of the served model; Meta's features are always float32
    least_cosine: float
    relative_error: float  # largest |ours - Meta's| / |Meta's| of any reference image, Euclidean norms


@dataclass(frozen=True)
class ParityCheck:
    """Result of comparing the served features with those of Meta's code on the same weights."""

    verified: bool
    reason: str  # why not verified; "" if verified
    revision: str  # commit of Meta's code; "" if not verified
    outputs: tuple[OutputParity, ...]
    time: str  # of the comparison: RFC 3339, UTC; "" if not verified
    not_covered: str  # what the comparison does not cover

    def __str__(self) -> str:
        """Return one line for the log."""
        if not self.verified:
            return f"NOT VERIFIED: {self.reason}"
        figures = "; ".join(
            f"{each.output} in {each.dtype}: cosine {each.least_cosine:.6f}, relative error {each.relative_error:.1e}"
            for each in self.outputs
        )
        return f"verified against Meta's code at {self.revision} on {self.time}: {figures}"


NOT_CHECKED = ParityCheck(False, "no comparison was run", revision="", outputs=(), time="", not_covered="")


@dataclass(frozen=True)
class ModelInfo:
    """Description of the loaded model for the rest of the service. Pickled from worker to frontends."""

    name: str
    weights: str
    random_weights: bool
    fingerprint: str
    dtype: FeatureDtype
    device: str
    layer_dims: tuple[int, ...]  # channels of each layer's tokens
    layer_strides: tuple[int, ...]  # input pixels per patch of each layer; the last is a multiple of the others
    registers: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    parameters: int
    parity_check: ParityCheck = NOT_CHECKED
    projections: tuple[Projection, ...] = ()

    def __hash__(self) -> int:
        """Hash the fingerprint alone: models are keys of caches that every request looks into."""
        return hash(self.fingerprint)

    @property
    def embed_dim(self) -> int:
        """Channels of the last layer, and so of the final features."""
        return self.layer_dims[-1]

    @property
    def depth(self) -> int:
        return len(self.layer_dims)

    @property
    def patch_size(self) -> int:
        """Input pixels per patch of the last layer. Heights and widths of inputs must be multiples of it."""
        return self.layer_strides[-1]

    def width(self, layer: int | None) -> int:
        """Return the channels of a layer; `layer` is as in Output."""
        return self.layer_dims[-1 if layer is None else layer]

    def grid(self, shape: PixelShape, layer: int | None = None, pooling: Pooling | None = None) -> tuple[int, int]:
        """Return rows and columns of a layer's patches, after pooling if any."""
        if pooling is not None:
            return pooling.rows, pooling.columns
        stride = self.layer_strides[-1 if layer is None else layer]
        return shape.height // stride, shape.width // stride

    def tokens(self, shape: PixelShape) -> int:
        """Return the CLS, register and patch tokens of one image in the last layer: the unit of the batch budget."""
        rows, columns = self.grid(shape)
        return 1 + self.registers + rows * columns

    def projection(self, name: str) -> Projection:
        """Return the projection of that name. Raises KeyError."""
        return {projection.name: projection for projection in self.projections}[name]

    def answer_fingerprint(self, projection: str | None) -> str:
        """Return the fingerprint of features: the model's, and the projection's if one was applied."""
        return (
            self.fingerprint if projection is None else f"{self.fingerprint}+{self.projection(projection).fingerprint}"
        )

    def output_shape(self, spec: OutputSpec, shape: PixelShape) -> tuple[int, ...]:
        """Return the shape of an output of one row: [D] for cls, else [tokens, D] or [D, rows, columns]."""
        kind, layer, _ = spec.output
        width = self.width(layer)
        if kind == "cls":
            return (width,)
        if kind == "registers":
            return self.registers, width
        if spec.projection is not None:
            width = self.projection(spec.projection).output_channels
        rows, columns = self.grid(shape, layer, spec.pooling)
        return (width, rows, columns) if spec.channels_first else (rows * columns, width)

    def output_buffers(self, spec: FeatureSpec, shape: PixelShape) -> tuple[OutputBuffer, ...]:
        """Return the arrays that one row takes in the arena, in the order of the outputs.

        An int8 output has two: its values, then their scales, [] for cls, else [tokens].
        """
        buffers = []
        for output in spec.outputs:
            output_spec = spec.output_spec(output)
            values = self.output_shape(output_spec, shape)
            buffers.append(OutputBuffer(output, spec.dtype, values))
            if spec.dtype == "int8":
                tokens = (math.prod(values[1:]),) if output_spec.channels_first else values[:-1]
                buffers.append(OutputBuffer(output, "float32", tokens))
        return tuple(buffers)


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a batch: byte offsets in an arena, of its pixels and of each output buffer of `spec`."""

    arena: int
    pixel_offset: int
    output_offsets: tuple[int, ...]
    spec: FeatureSpec


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one pixel shape. They may differ in arena and in spec."""

    shape: PixelShape
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class BatchResult:
    """Result of a batch whose features are in the arenas.

    `finite[i]` is False if row i's features hold NaN or infinity, as the model computes them or in the requested dtype:
    such a row is answered with an error. Times are in seconds, by the device's own clock if it has one.
    """

    finite: tuple[bool, ...]
    copy_in: float
    forward: float
    copy_out: float


class DeviceOutOfMemory(Exception):
    """The batch did not fit into device memory. The runner has freed what it allocated; a smaller batch may fit."""


class DeviceLost(Exception):
    """The device (or its context) is unusable in this process; only a new process recovers it."""


class LaunchedBatch(Protocol):
    """A batch in flight on the device; returned by `launch`, passed to `finish`."""


class Runner(Protocol):
    """A model on a device.

    `attach` and `detach` are called on a thread of their own, one at a time, while batches of other arenas run.
    `launch` is called on the worker's scheduling thread and must not wait for the device. `finish` is called once for
    each launched batch, in launch order, on the worker's device thread, and returns when the features are in the
    arenas. Either may raise DeviceOutOfMemory, DeviceLost, or anything else for a batch that failed; after an exception
    from `launch`, `finish` is not called for that batch.

    `pipeline_depth` is how many batches may be launched and unfinished: 1 if preparing ahead gains nothing (CPU), 2 if
    one batch is copied in while another runs (CUDA).
    """

    info: ModelInfo
    pipeline_depth: int
    load_seconds: dict[str, float]  # by step of loading: the metric dinov3_model_load_seconds

    def attach(self, arena: int, memory: memoryview) -> None:
        """Register an arena, and page-lock it if the device copies from it and the system allows it."""

    def detach(self, arena: int) -> None:
        """Unregister an arena that no launched batch uses, and release every view of its memory."""

    def launch(self, batch: Batch) -> LaunchedBatch: ...

    def finish(self, launched: LaunchedBatch) -> BatchResult: ...

    def memory(self) -> dict[str, int]:
        """Return bytes of device memory by kind ("allocated", "reserved", ...); empty if unknown."""

    def close(self) -> None: ...

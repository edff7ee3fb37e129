"""What a worker drives: the runner's interface and the plain data that crosses it.

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
    """Of one model input: `uint8` is [H, W, 3] RGB, `float32` is [3, H, W] already normalised."""

    height: int
    width: int
    format: PixelFormat

    @property
    def nbytes(self) -> int:
        return self.height * self.width * 3 * (1 if self.format == "uint8" else 4)


class Output(NamedTuple):
    """One tensor of a model's features a row: all tokens of one kind, of one layer.

    `layer` None is the last one, after the final norm; else a 0-based block index, `norm` telling
    whether the final norm is applied.
    """

    kind: TokenKind
    layer: int | None = None
    norm: bool = True


class Pooling(NamedTuple):
    """Patches resampled to `rows` x `columns`: "area" as torch's adaptive_avg_pool2d, "bilinear" as its interpolate
    has it, with align_corners=False and without antialias."""

    method: PoolingMethod
    rows: int
    columns: int


class Wanted(NamedTuple):
    """An output as it is sent. Of patches, in this order: pooled, projected by the projection of that name, and laid
    out [D, rows, columns] where `channels_first`; of any output, in `dtype`.

    int8 is symmetric with a float32 scale for each token: scale = max |x| / 127, value = x / scale rounded half to
    even; a token of zeros has the scale 0.
    """

    output: Output
    dtype: FeatureDtype
    pooling: Pooling | None = None
    projection: str | None = None
    channels_first: bool = False

    @property
    def section_dtypes(self) -> tuple[FeatureDtype, ...]:
        """Of the values, and of their scales where they have any."""
        return ("int8", "float32") if self.dtype == "int8" else (self.dtype,)


class FeatureSpec(NamedTuple):
    """Everything one request wants of each of its rows: the outputs, and what becomes of them (see Wanted)."""

    outputs: tuple[Output, ...]
    dtype: FeatureDtype
    pooling: Pooling | None = None
    projection: str | None = None
    channels_first: bool = False

    def wanted(self, output: Output) -> Wanted:
        """What is sent of `output`: what is for patches alone is so of patches alone."""
        return Wanted(output, *self[1:]) if output.kind == "patches" else Wanted(output, self.dtype)


class Section(NamedTuple):
    """One array of a row in the arena: the values of an output, or the scales of the int8 values before it."""

    output: Output
    dtype: FeatureDtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


class Projection(NamedTuple):
    """A linear map of the channels of patches that the server was given by name."""

    name: str
    input_channels: int
    output_channels: int
    fingerprint: str  # of its numbers


@dataclass(frozen=True)
class Provisioned:
    """What start-up found or fetched, and a runner is built from. Pickled from the provisioner to workers."""

    weights: str  # path of a file, or of a folder of shards; or "random:SEED"
    label: str  # what people call these weights: the file's name, "hf://OWNER/REPO@REVISION", "random:SEED"
    revision: str  # of Meta's code that is wanted
    checkout: str | None  # folder of that code, verified; None where it is not there
    absent: str = ""  # why it is not there


@dataclass(frozen=True)
class OutputParity:
    """How near one output of ours is to that of Meta's code: over all probes and tokens."""

    output: TokenKind
    dtype: FeatureDtype  # that ours was computed in; Meta's is always float32
    least_cosine: float
    relative_error: float  # largest over the probes of |ours - theirs| / |theirs|, Euclidean norms


@dataclass(frozen=True)
class ParityCheck:
    """Whether the served features were shown to be those of Meta's code on the same weights."""

    verified: bool
    reason: str  # why not; "" where verified
    revision: str  # commit of Meta's code; "" where there was none
    outputs: tuple[OutputParity, ...]
    time: str  # when it was shown: RFC 3339, UTC; "" where it was not
    not_covered: str  # what the proof says nothing about

    def __str__(self) -> str:
        """One line of a log."""
        if not self.verified:
            return f"NOT VERIFIED: {self.reason}"
        figures = "; ".join(
            f"{each.output} in {each.dtype}: cosine {each.least_cosine:.6f}, relative error {each.relative_error:.1e}"
            for each in self.outputs
        )
        return f"verified against Meta's code at {self.revision} on {self.time}: {figures}"


NO_PROOF = ParityCheck(verified=False, reason="no proof was tried", revision="", outputs=(), time="", not_covered="")


@dataclass(frozen=True)
class ModelInfo:
    """What the rest of the service knows of the loaded model. Pickled from worker to frontends."""

    name: str
    weights: str
    random_weights: bool
    fingerprint: str
    dtype: FeatureDtype
    device: str
    layer_dims: tuple[int, ...]  # channels of each layer's tokens
    layer_strides: tuple[int, ...]  # pixels of the input to a patch of each layer; the last is a multiple of the others
    registers: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    parameters: int
    parity_check: ParityCheck = NO_PROOF
    projections: tuple[Projection, ...] = ()

    def __hash__(self) -> int:
        """Hash the fingerprint alone: models are keys of caches that every request looks into."""
        return hash(self.fingerprint)

    @property
    def embed_dim(self) -> int:
        """Channels of the last layer, of which the final features are."""
        return self.layer_dims[-1]

    @property
    def depth(self) -> int:
        return len(self.layer_dims)

    @property
    def patch_size(self) -> int:
        """Pixels to a patch of the last layer; heights and widths of inputs are multiples of it."""
        return self.layer_strides[-1]

    def width(self, layer: int | None) -> int:
        """Channels of a layer; `layer` is as in Output."""
        return self.layer_dims[-1 if layer is None else layer]

    def grid(self, shape: PixelShape, layer: int | None = None, pooling: Pooling | None = None) -> tuple[int, int]:
        """Rows and columns of a layer's patches."""
        if pooling is not None:
            return pooling.rows, pooling.columns
        stride = self.layer_strides[-1 if layer is None else layer]
        return shape.height // stride, shape.width // stride

    def tokens(self, shape: PixelShape) -> int:
        """CLS + registers + patches of the last layer of one image: the unit of the batch budget."""
        rows, columns = self.grid(shape)
        return 1 + self.registers + rows * columns

    def projection(self, name: str) -> Projection:
        """Raises KeyError where there is none of that name."""
        return {projection.name: projection for projection in self.projections}[name]

    def answer_fingerprint(self, projection: str | None) -> str:
        """Of the features of a request with this projection."""
        return (
            self.fingerprint if projection is None else f"{self.fingerprint}+{self.projection(projection).fingerprint}"
        )

    def output_shape(self, wanted: Wanted, shape: PixelShape) -> tuple[int, ...]:
        """Of one row of `wanted`: [D] for cls, else [tokens, D], or [D, rows, columns]."""
        kind, layer, _ = wanted.output
        width = self.width(layer)
        if kind == "cls":
            return (width,)
        if kind == "registers":
            return self.registers, width
        if wanted.projection is not None:
            width = self.projection(wanted.projection).output_channels
        rows, columns = self.grid(shape, layer, wanted.pooling)
        return (width, rows, columns) if wanted.channels_first else (rows * columns, width)

    def sections(self, spec: FeatureSpec, shape: PixelShape) -> tuple[Section, ...]:
        """What a row of `spec` is in the arena, in the order of its outputs: values, and the scales of int8 behind
        them, [] for cls, else [tokens]."""
        sections = []
        for output in spec.outputs:
            wanted = spec.wanted(output)
            values = self.output_shape(wanted, shape)
            sections.append(Section(output, spec.dtype, values))
            if spec.dtype == "int8":
                tokens = (math.prod(values[1:]),) if wanted.channels_first else values[:-1]
                sections.append(Section(output, "float32", tokens))
        return tuple(sections)


@dataclass(frozen=True, slots=True)
class Row:
    """One image in an arena: where its pixels lie and where each section of `spec` goes (byte offsets)."""

    arena: int
    pixels: int
    sections: tuple[int, ...]
    spec: FeatureSpec


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one pixel shape. They may differ in arena and in what they want."""

    shape: PixelShape
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """A batch whose features lie in the arenas.

    `finite[i]` is False where row i's features hold NaN or infinity (as the model gives them, or in the dtype asked
    for): they are an error and never an answer. The times are seconds on the device's own clock where it has one.
    """

    finite: tuple[bool, ...]
    copy_in: float
    forward: float
    copy_out: float


class DeviceOutOfMemory(Exception):
    """The batch did not fit; the runner has freed what it took for it. A smaller one may fit."""


class DeviceLost(Exception):
    """The device (or its context) is beyond repair in this process; only a new process recovers it."""


class Launched(Protocol):
    """A batch on its way through the device; made by `launch`, consumed by `finish`."""


class Runner(Protocol):
    """A model on a device.

    `attach` and `detach` are called on a thread of their own, one at a time, while batches of other arenas run.
    `launch` is called on the worker's scheduling thread and must not wait for the device; `finish` is
    called once a launched batch, in launch order, on the worker's device thread, and returns when the
    features are in the arenas. Either may raise DeviceOutOfMemory, DeviceLost, or anything else for a
    batch that failed; after an exception from `launch` the batch is not finished.

    `pipeline_depth` is how many batches may be launched and unfinished: 1 where preparing ahead gains
    nothing (CPU), 2 where one batch is copied in while another runs (CUDA).
    """

    info: ModelInfo
    pipeline_depth: int
    load_seconds: dict[str, float]  # by step of the load: dinov3_model_load_seconds

    def attach(self, arena: int, memory: memoryview) -> None:
        """Make an arena known (and page-lock it where the device copies from it, if it can be)."""

    def detach(self, arena: int) -> None:
        """Forget an arena; no launched batch uses it any more. Releases every view of its memory."""

    def launch(self, batch: Batch) -> Launched: ...

    def finish(self, launched: Launched) -> Finished: ...

    def memory(self) -> dict[str, int]:
        """Bytes of device memory by kind ("allocated", "reserved", ...); empty where unknown."""

    def close(self) -> None: ...

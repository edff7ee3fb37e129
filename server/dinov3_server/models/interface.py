"""The interface between workers and models: `Runner`, and the plain data that it takes and returns.

Imports no torch, so that frontends, the scheduler and the tests' numpy runner can use it.

Shapes: R rows of a batch, H x W pixels, P patches, G registers, D channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

# The part of this interface that checks of requests need too.
from dinov3_serving.features import FeatureDtype as FeatureDtype
from dinov3_serving.features import FeatureSpec as FeatureSpec
from dinov3_serving.features import Output as Output
from dinov3_serving.features import OutputSpec as OutputSpec
from dinov3_serving.features import Pooling as Pooling
from dinov3_serving.features import TokenKind as TokenKind
from dinov3_serving.images import PixelFormat as PixelFormat
from dinov3_serving.images import PixelShape as PixelShape
from dinov3_serving.model import NOT_CHECKED as NOT_CHECKED
from dinov3_serving.model import ModelDescription
from dinov3_serving.model import OutputParity as OutputParity
from dinov3_serving.model import ParityCheck as ParityCheck
from dinov3_serving.model import Projection as Projection

ITEM_SIZES: dict[FeatureDtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


class OutputBuffer(NamedTuple):
    """One array of a row in the arena: the values of an output, or the scales of the int8 values before it."""

    output: Output
    dtype: FeatureDtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Provisioned:
    """The weights and the upstream code that start-up found or fetched. Pickled from the provisioner to workers."""

    weights: str  # path of a file, or of a folder of shards; or "random:SEED"
    label: str  # name of the weights for people: the file's name, "hf://OWNER/REPO@REVISION" or "random:SEED"
    revision: str  # required commit of Meta's code
    checkout: str | None  # folder of that code, verified; None if it is not available
    unavailable_reason: str = ""  # why `checkout` is None


@dataclass(frozen=True, kw_only=True)
class ModelInfo(ModelDescription):
    """Description of the loaded model for the rest of the service. Pickled from worker to frontends."""

    dtype: FeatureDtype
    device: str

    def __hash__(self) -> int:
        """Hash the fingerprint alone: models are keys of caches that every request looks into."""
        return hash(self.fingerprint)

    def projection(self, name: str) -> Projection:
        """Return the projection of that name. Raises KeyError."""
        return {projection.name: projection for projection in self.projections}[name]

    def output_shape(self, spec: OutputSpec, shape: PixelShape) -> tuple[int, ...]:
        """Return the shape of an output of one row: [D] for cls, else [tokens, D] or [D, rows, columns]."""
        kind, layer, _ = spec.output
        width = self.width(layer)
        if kind == "cls":
            return (width,)
        if kind == "registers":
            return self.register_tokens, width
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

"""What the CPU's and CUDA's runner share: arenas as tensors, and the device's failures as the interface's."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from dinov3_server.backbone.model import Model
from dinov3_server.backbone.runners.plan import FeatureRun
from dinov3_server.backbone.runners.postprocessing import LinearMap, Postprocessing
from dinov3_server.models.interface import (
    Batch,
    DeviceLost,
    DeviceOutOfMemory,
    FeatureDtype,
    Finished,
    Launched,
    ModelInfo,
    Output,
    PixelShape,
)

T = TypeVar("T")

TORCH_DTYPES: dict[FeatureDtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


class TorchRunner(abc.ABC):
    """A `Runner` (see interface.py) over a torch model.

    `projections` are those of `info`, on the model's device. `load_seconds` tells how long each step of loading took,
    by the step's name.
    """

    pipeline_depth: int

    def __init__(
        self, model: Model, info: ModelInfo, projections: Mapping[str, LinearMap] = MappingProxyType({})
    ) -> None:
        self.info = info
        self._projections = projections
        self.load_seconds: dict[str, float] = {}
        self._model = model
        self._arenas: dict[int, Tensor] = {}

    def attach(self, arena: int, memory: memoryview) -> None:
        if arena in self._arenas:
            raise ValueError(f"arena {arena} is attached already")
        self._arenas[arena] = torch.frombuffer(memory, dtype=torch.uint8)

    def detach(self, arena: int) -> None:
        # torch.frombuffer holds a reference to the memoryview and nothing else here does.
        del self._arenas[arena]

    @abc.abstractmethod
    def launch(self, batch: Batch) -> Launched: ...

    @abc.abstractmethod
    def finish(self, launched: Launched) -> Finished: ...

    @abc.abstractmethod
    def memory(self) -> dict[str, int]: ...

    def close(self) -> None:
        for arena in list(self._arenas):
            self.detach(arena)

    def _in_arena(self, arena: int, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """The tensor that lies at byte `offset` of an arena."""
        memory = self._arenas.get(arena)
        if memory is None:
            raise ValueError(f"no arena {arena} is attached")
        end = offset + math.prod(shape) * dtype.itemsize
        if not 0 <= offset <= end <= memory.numel():
            raise ValueError(f"bytes {offset} to {end} are outside arena {arena} of {memory.numel()}")
        return memory[offset:end].view(dtype).view(shape)

    def _pixels_in_arena(self, arena: int, offset: int, count: int, shape: PixelShape) -> Tensor:
        return self._in_arena(arena, offset, *pixel_layout(count, shape))

    def _features_in_arena(self, run: FeatureRun, shape: PixelShape) -> list[Tensor]:
        """Where the sections of a run go, each [n, ...] in its dtype."""
        return [
            self._in_arena(run.arena, offset, TORCH_DTYPES[section.dtype], (run.count, *section.shape))
            for section, offset in zip(self.info.sections(run.spec, shape), run.offsets, strict=True)
        ]

    def _postprocessing(self, features: Mapping[Output, Tensor], shape: PixelShape) -> Postprocessing:
        return Postprocessing(features, partial(self.info.grid, shape), self._projections)

    def _guarded(self, work: Callable[[], T]) -> T:
        """work(), with the device's failures translated; after any failure nothing of it is under way."""
        try:
            return work()
        except Exception as error:
            failure = device_failure(error)
            if failure is None:
                self._settle()
                raise
        # Out of the handler the traceback is gone, and with it the tensors that its frames held.
        if isinstance(failure, DeviceOutOfMemory):
            try:
                self._settle()
            except RuntimeError as error:
                failure = DeviceLost(str(error))
        raise failure

    @abc.abstractmethod
    def _settle(self) -> None:
        """Wait until nothing of a failed batch is under way on the device, and free what it took."""


def pixel_layout(count: int, shape: PixelShape) -> tuple[torch.dtype, tuple[int, int, int, int]]:
    """The dtype and shape of a batch of pixels."""
    if shape.format == "uint8":
        return torch.uint8, (count, shape.height, shape.width, 3)
    return torch.float32, (count, 3, shape.height, shape.width)


def finite_rows(features: Sequence[Tensor]) -> Tensor:
    """[n] bool: whether every value of each row of [n, ...] tensors is finite. Integers are, and are not read."""
    finite = None
    for values in features:
        if not values.is_floating_point():
            continue
        # NaN and infinities pass through to the extremes, and no tensor as large as the values is made. `aminmax` reads
        # them once, yet takes five times as long on the CPU: with a dimension it has no vector code.
        rows = values.reshape(len(values), -1)
        ends = rows.amin(dim=1).isfinite() & rows.amax(dim=1).isfinite()
        finite = ends if finite is None else finite & ends
    assert finite is not None, "a row without outputs"
    return finite


def device_failure(error: Exception) -> Exception | None:
    """The interface's exception for an error of the device, None for any other."""
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return DeviceOutOfMemory(text)
    if isinstance(error, RuntimeError):
        if any(sign in text for sign in _OUT_OF_MEMORY):
            return DeviceOutOfMemory(text)
        if isinstance(error, _ACCELERATOR_ERRORS) or "CUDA error" in text:
            return DeviceLost(text)
    return None


# torch has no exception of its own for the host's allocator, nor for memory that cuBLAS could not get.
_OUT_OF_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
# torch 2.8 and later raise sticky errors as AcceleratorError, the earlier ones as RuntimeError("CUDA error: ...").
_ACCELERATOR_ERRORS: tuple[type[Exception], ...] = (
    (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()
)

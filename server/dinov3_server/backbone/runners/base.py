"""The base of the CPU and CUDA runners: arenas as tensors, and device errors as the interface's exceptions."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TypeVar, get_args

import torch
from torch import Tensor

from dinov3_server.backbone.runners.plan import Run
from dinov3_server.backbone.runners.postprocessing import LinearMap, Postprocessing
from dinov3_server.models.interface import (
    DeviceLost,
    DeviceOutOfMemory,
    FeatureDtype,
    ModelInfo,
    Output,
    PixelShape,
    Runner,
)
from dinov3_server.nn.model import Model

T = TypeVar("T")

TORCH_DTYPES: dict[FeatureDtype, torch.dtype] = {name: getattr(torch, name) for name in get_args(FeatureDtype)}


class TorchRunner(Runner):
    """A `Runner` (see models/interface.py) of a torch model.

    `model` computes the features; `projections` are those of `info`, on the model's device. `load_seconds` is the time
    of each step of loading.
    """

    def __init__(
        self, model: Model, info: ModelInfo, projections: Mapping[str, LinearMap] = MappingProxyType({})
    ) -> None:
        self.info = info
        self._projections = projections
        self.load_seconds: dict[str, float] = {}
        self.model = model
        self._arenas: dict[int, Tensor] = {}

    def attach(self, arena: int, memory: memoryview) -> None:
        if arena in self._arenas:
            raise ValueError(f"arena {arena} is attached already")
        self._arenas[arena] = torch.frombuffer(memory, dtype=torch.uint8)

    def detach(self, arena: int) -> None:
        # Releases the memory: the tensor of torch.frombuffer holds the only reference to the memoryview.
        del self._arenas[arena]

    def close(self) -> None:
        for arena in list(self._arenas):
            self.detach(arena)

    def _in_arena(self, arena: int, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """Return a view of an arena as a tensor, from byte `offset` on."""
        memory = self._arenas.get(arena)
        if memory is None:
            raise ValueError(f"no arena {arena} is attached")
        end = offset + math.prod(shape) * dtype.itemsize
        if not 0 <= offset <= end <= memory.numel():
            raise ValueError(f"bytes {offset} to {end} are outside arena {arena} of {memory.numel()}")
        return memory[offset:end].view(dtype).view(shape)

    def _pixels_in_arena(self, run: Run, shape: PixelShape) -> Tensor:
        (offset,) = run.offsets
        return self._in_arena(run.arena, offset, *pixel_layout(run.count, shape))

    def _features_in_arena(self, run: Run, shape: PixelShape) -> list[Tensor]:
        """Return views of a run's output buffers, each [n, ...] in its dtype."""
        return [
            self._in_arena(run.arena, offset, TORCH_DTYPES[buffer.dtype], (run.count, *buffer.shape))
            for buffer, offset in zip(self.info.output_buffers(run.spec, shape), run.offsets, strict=True)
        ]

    def _postprocessing(self, features: Mapping[Output, Tensor], shape: PixelShape) -> Postprocessing:
        return Postprocessing(features, partial(self.info.grid, shape), self._projections)

    def _guarded(self, work: Callable[[], T]) -> T:
        """Return work(). Translate device errors, and after any error wait until its work on the device has ended."""
        try:
            return work()
        except Exception as error:
            failure = device_failure(error)
            if failure is None:
                self._settle()
                raise
        # Outside of the handler, so that the traceback is gone, and with it the tensors that its frames held.
        if isinstance(failure, DeviceOutOfMemory):
            try:
                self._settle()
            except RuntimeError as error:
                failure = DeviceLost(str(error))
        raise failure

    @abc.abstractmethod
    def _settle(self) -> None:
        """Wait until the device has ended all work of a failed batch, and free its memory."""


def pixel_layout(count: int, shape: PixelShape) -> tuple[torch.dtype, tuple[int, int, int, int]]:
    """Return dtype and shape of a batch of pixels."""
    if shape.format == "uint8":
        return torch.uint8, (count, shape.height, shape.width, 3)
    return torch.float32, (count, 3, shape.height, shape.width)


def finite_rows(features: Sequence[Tensor]) -> Tensor:
    """Return [n] bool: whether every value of each row of [n, ...] tensors is finite. Integer tensors are skipped."""
    finite = None
    for values in features:
        if not values.is_floating_point():
            continue
        # NaN and infinity show in the minimum or maximum, without a temporary tensor as large as the values. `aminmax`
        # reads them once, but takes five times as long on the CPU: it is not vectorized along a dimension.
        rows = values.reshape(len(values), -1)
        is_finite = rows.amin(dim=1).isfinite() & rows.amax(dim=1).isfinite()
        finite = is_finite if finite is None else finite & is_finite
    assert finite is not None, "a row without outputs"
    return finite


def device_failure(error: Exception) -> Exception | None:
    """Return the interface's exception for a device error, None for any other error."""
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return DeviceOutOfMemory(text)
    if isinstance(error, RuntimeError):
        if any(sign in text for sign in _OUT_OF_MEMORY):
            return DeviceOutOfMemory(text)
        if isinstance(error, _ACCELERATOR_ERRORS) or "CUDA error" in text:
            return DeviceLost(text)
    return None


# torch has no exception class for out of memory in the host's allocator or in cuBLAS.
_OUT_OF_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
# torch 2.8 and later raise sticky errors as AcceleratorError, earlier versions as RuntimeError("CUDA error: ...").
_ACCELERATOR_ERRORS: tuple[type[Exception], ...] = (
    (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()
)

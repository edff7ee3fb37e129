"""The CUDA runner: copies in, computation and copies out overlap on three streams; it waits only for a batch's end.

While one batch is computed, the next is copied in and the previous one is copied out, directly between the device and
the page-locked arenas. An arena that cannot be page-locked is used all the same. The rules below hold for it too: CUDA
performs its copies in stream order, and an event recorded after them completes when the bytes have arrived. But
`launch` may then wait for the device, as CUDA stages such copies.

A slot holds the buffers and events of one batch in flight, and is reused once the batch is finished.

Readers on one stream wait for the writer's event on another, and no buffer is written again before it has been read:

- a slot's pixels: written on copy_in, read on compute, written again once the slot's batch is finished;
- a graph's fixed pixels and features (cuda_graphs.py): written and read on compute only, in stream order;
- a batch's features: written on compute, read on copy_out, kept alive until the batch is finished.

Three threads use a runner: one calls attach and detach, one launch, one finish. Only launch captures graphs.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor

from dinov3_server.backbone.runners.base import TorchRunner, device_failure, pixel_layout
from dinov3_server.backbone.runners.cuda_graphs import (
    ForwardGraph,
    ForwardResult,
    GraphCache,
    GraphKey,
    compute,
    padded,
)
from dinov3_server.backbone.runners.plan import batch_output_specs, feature_runs, pixel_runs
from dinov3_server.backbone.runners.postprocessing import LinearMap
from dinov3_server.models.interface import (
    Batch,
    BatchResult,
    DeviceOutOfMemory,
    LaunchedBatch,
    ModelInfo,
    OutputSpec,
    PixelShape,
)
from dinov3_server.nn.model import Model

logger = logging.getLogger(__name__)

# Fraction of the device's memory that graphs may hold individually (see GraphCache).
_GRAPHS_SHARE = 1 / 16


class CudaRunner(TorchRunner):
    """A `Runner` whose `launch` only enqueues work; `finish` waits for one event and reads times and flags.

    `launch` also captures a CUDA graph for a kind of batch that is frequent enough: some tens of milliseconds, once.
    """

    pipeline_depth = 2

    def __init__(
        self, model: Model, info: ModelInfo, projections: Mapping[str, LinearMap] = MappingProxyType({})
    ) -> None:
        super().__init__(model, info, projections)
        self._device = model.device
        self._locked: set[int] = set()  # arenas
        self.graphs = GraphCache(int(self.memory()["total"] * _GRAPHS_SHARE))
        # Held during a launch: waiting for the whole device on another thread would break a capture.
        self._launch_lock = threading.Lock()
        with torch.cuda.device(self._device):
            self._copy_in, self._compute, self._copy_out = (
                torch.cuda.Stream()  # type: ignore[no-untyped-call]
                for _ in range(3)
            )
            self._free = deque(_Slot() for _ in range(self.pipeline_depth))
            # The weights were created on the default stream, for which the three others do not wait.
            torch.cuda.synchronize()

    def attach(self, arena: int, memory: memoryview) -> None:
        super().attach(arena, memory)
        pages = self._arenas[arena]
        with torch.cuda.device(self._device):
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            result = int(cudart.cudaHostRegister(pages.data_ptr(), pages.numel(), 0))
        if not result:
            self._locked.add(arena)
            return
        logger.warning(
            "%d bytes of a frontend's memory cannot be page-locked (cudaHostRegister: CUDA error %d), so copies to and "
            "from the device are slower. Is the limit of locked memory (ulimit -l) too low, or is this WSL2 or gVisor?",
            len(memory),
            result,
        )
        # CUDA has also stored the error as this thread's last one, which torch would attribute to its next kernel.
        # Launch a kernel to clear it. If the device itself is lost, every batch will fail with that error.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self._device)

    def detach(self, arena: int) -> None:
        if arena in self._locked:
            self._locked.remove(arena)
            with torch.cuda.device(self._device):
                cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
                cudart.cudaHostUnregister(self._arenas[arena].data_ptr())
        super().detach(arena)

    def launch(self, batch: Batch) -> LaunchedBatch:
        slot = self._free.popleft()
        try:
            return self._guarded(lambda: self._enqueue(batch, slot))
        except BaseException:
            self._free.append(slot)
            raise

    def finish(self, launched: LaunchedBatch) -> BatchResult:
        flight = cast(_InFlight, launched)
        try:
            return self._guarded(lambda: self._collect(flight))
        finally:
            self._free.append(flight.slot)

    def memory(self) -> dict[str, int]:
        return {
            "allocated": torch.cuda.memory_allocated(self._device),
            "reserved": torch.cuda.memory_reserved(self._device),
            "total": torch.cuda.get_device_properties(self._device).total_memory,
        }

    @torch.inference_mode()
    def _enqueue(self, batch: Batch, slot: _Slot) -> _InFlight:
        count, tokens = len(batch.rows), self.info.tokens(batch.shape)
        runs = [(run, self._features_in_arena(run, batch.shape)) for run in feature_runs(batch, self.info)]
        outputs = batch_output_specs(batch)
        key = GraphKey(batch.shape, padded(count), outputs)
        with torch.cuda.device(self._device), self._launch_lock:
            graph = self.graphs.find(key)
            is_due = self.graphs.is_due(key, tokens)
            pixels = slot.pixels(key.images, batch.shape, self._device)

            with torch.cuda.stream(self._copy_in):
                slot.copy_in_begins.record()
                for piece in pixel_runs(batch):
                    pixels[piece.rows].copy_(self._pixels_in_arena(piece, batch.shape), non_blocking=True)
                slot.copy_in_ends.record()

            with torch.cuda.stream(self._compute):
                self._compute.wait_event(slot.copy_in_ends)
                slot.forward_begins.record()
                # All device memory is allocated before the first copy out, so a batch that does not fit has written
                # nothing into an arena.
                if graph is not None:
                    result = graph.replay(pixels, count)
                else:
                    # Run at the padded size before a capture at that size: see ForwardGraph.
                    result = self._forward(key, pixels if is_due else pixels[:count])
                slot.forward_ends.record()

            with torch.cuda.stream(self._copy_out):
                self._copy_out.wait_event(slot.forward_ends)
                slot.copy_out_begins.record()
                buffers = dict(zip(outputs, result.buffers, strict=True))
                for run, in_arena in runs:
                    of_spec = chain(*(buffers[run.spec.output_spec(output)] for output in run.spec.outputs))
                    for source, target in zip(of_spec, in_arena, strict=True):
                        target.copy_(source[run.rows], non_blocking=True)
                flags = slot.flags(count, len(outputs))
                flags.copy_(result.finite[:count], non_blocking=True)
                slot.copy_out_ends.record()

            if is_due:  # capture while the device is busy with this batch
                with torch.cuda.stream(self._compute):
                    self._capture(key, pixels)
        # Keep the results alive until the batch is finished: the caching allocator tracks only the stream that
        # allocated a tensor, and would reuse this memory while it is still being copied out.
        return _InFlight(batch, outputs, slot, flags, held=[result.finite, *chain(*result.buffers)])

    def _forward(self, key: GraphKey, pixels: Tensor) -> ForwardResult:
        return compute(self.model, pixels, key.outputs, partial(self._postprocessing, shape=key.shape))

    def _capture(self, key: GraphKey, pixels: Tensor) -> None:
        """Capture a graph for `key`. A failure is logged; it does not affect the batch just launched."""
        # Before the capture: during one they would be allocated in the shared pool, which other graphs overwrite.
        cached = self.model.cached_tensors(key.shape.height, key.shape.width)
        try:
            graph = ForwardGraph(partial(self._forward, key), pixels, cached, self.graphs.pool())
        except RuntimeError as error:
            if isinstance(device_failure(error), DeviceOutOfMemory):
                logger.warning(
                    "no memory for a CUDA graph of %d images of %s: they run without one", key.images, key.shape
                )
                self.graphs.refuse(key)
            else:  # if the device itself is lost, the batch's end reports it
                logger.warning("a CUDA graph could not be captured: no further ones will be", exc_info=True)
                self.graphs.stop()
        else:
            self.graphs.keep(key, graph)

    def _collect(self, flight: _InFlight) -> BatchResult:
        slot = flight.slot
        slot.copy_out_ends.synchronize()
        flight.held.clear()
        columns = {
            spec: [flight.outputs.index(spec.output_spec(output)) for output in spec.outputs]
            for spec in {row.spec for row in flight.batch.rows}
        }
        return BatchResult(
            finite=tuple(
                all(flags[column] for column in columns[row.spec])
                for row, flags in zip(flight.batch.rows, flight.flags.tolist(), strict=True)
            ),
            copy_in=slot.copy_in_begins.elapsed_time(slot.copy_in_ends) / 1000,
            forward=slot.forward_begins.elapsed_time(slot.forward_ends) / 1000,
            copy_out=slot.copy_out_begins.elapsed_time(slot.copy_out_ends) / 1000,
        )

    def _settle(self) -> None:
        with self._launch_lock:
            torch.cuda.synchronize(self._device)
            self.graphs.clear()  # free their memory for batches
            torch.cuda.empty_cache()


class _Slot:
    """Events and staging buffers of one batch in flight. Create it with its device as the current one."""

    def __init__(self) -> None:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(5)]  # type: ignore[no-untyped-call]
        self.copy_in_begins, self.copy_in_ends, self.forward_begins, self.forward_ends, self.copy_out_begins = events
        # The host waits for this one; a blocking event does not spin on a core that a frontend could use.
        self.copy_out_ends = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        self._pixels = torch.empty(0, dtype=torch.uint8)
        self._flags = torch.empty(0, dtype=torch.bool)

    def pixels(self, count: int, shape: PixelShape, device: torch.device) -> Tensor:
        """Return a buffer for a batch of pixels on the device."""
        nbytes = count * shape.nbytes
        if self._pixels.numel() < nbytes:
            self._pixels = torch.empty(0, dtype=torch.uint8)  # free the old one before allocating a larger one
            self._pixels = torch.empty(nbytes, dtype=torch.uint8, device=device)
        dtype, layout = pixel_layout(count, shape)
        return self._pixels[:nbytes].view(dtype).view(layout)

    def flags(self, count: int, outputs: int) -> Tensor:
        """Return a [count, outputs] bool buffer, in page-locked memory if possible."""
        if self._flags.numel() < count * outputs:
            try:
                self._flags = torch.empty(count * outputs, dtype=torch.bool, pin_memory=True)
            except RuntimeError:
                self._flags = torch.empty(count * outputs, dtype=torch.bool)
        return self._flags[: count * outputs].view(count, outputs)


@dataclass(frozen=True, slots=True)
class _InFlight:
    batch: Batch
    outputs: tuple[OutputSpec, ...]
    slot: _Slot
    flags: Tensor
    held: list[Tensor]

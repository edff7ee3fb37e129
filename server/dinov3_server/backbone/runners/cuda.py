"""The model on a CUDA device: copies and computation on streams of their own, nothing waited for but a batch's end.

While one batch is computed the next is copied in and the one before is copied out, straight from and to the
page-locked arenas. An arena that cannot be page-locked is used as it is. What follows holds for it too: CUDA takes its
copies in the order of their streams, and an event behind them is reached when the bytes are there. But `launch` may
wait for the device then, as CUDA stages such copies.

A slot holds what a batch in flight needs to itself; it is free again when the batch is finished.

What a stream reads, another has written before an event that it waits for, and nobody writes again before the reader
is through:

- a slot's pixels: written by copy_in, read by compute; written again once the slot's batch is finished;
- a graph's fixed pixels and features (cuda_graphs.py): written and read by compute alone, in its order;
- features on their way out: made by compute for this batch, read by copy_out, held until it is finished.

Three threads come here: one calls attach and detach, one launch, one finish. Only launch captures graphs.
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

from dinov3_server.backbone.model import Model
from dinov3_server.backbone.runners.base import TorchRunner, device_failure, pixel_layout
from dinov3_server.backbone.runners.cuda_graphs import Features, ForwardGraph, GraphCache, Key, compute, padded
from dinov3_server.backbone.runners.plan import feature_runs, pixel_runs, wanted_features
from dinov3_server.backbone.runners.postprocessing import LinearMap
from dinov3_server.models.interface import (
    Batch,
    DeviceOutOfMemory,
    Finished,
    Launched,
    ModelInfo,
    PixelShape,
    Wanted,
)

logger = logging.getLogger(__name__)

# Of the device's memory, what graphs may hold for themselves.
_GRAPHS_SHARE = 1 / 16


class CudaRunner(TorchRunner):
    """`launch` only enqueues; `finish` waits for one event and reads times and flags.

    A batch of a kind that has come often enough is also captured by `launch`: some tens of milliseconds, once.
    """

    pipeline_depth = 2

    def __init__(
        self, model: Model, info: ModelInfo, projections: Mapping[str, LinearMap] = MappingProxyType({})
    ) -> None:
        super().__init__(model, info, projections)
        self._device = model.device
        self._locked: set[int] = set()  # arenas
        self._graphs = GraphCache(int(self.memory()["total"] * _GRAPHS_SHARE))
        # Held while a batch is launched: to wait for the whole device would break a capture on the other thread.
        self._host = threading.Lock()
        with torch.cuda.device(self._device):
            self._copy_in, self._compute, self._copy_out = (
                torch.cuda.Stream()  # type: ignore[no-untyped-call]
                for _ in range(3)
            )
            self._free = deque(_Slot() for _ in range(self.pipeline_depth))
            # The weights were made on the default stream, which the three others do not wait for.
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
        # It is also this thread's last error now, which torch would take for the next kernel's. Nothing but a kernel
        # reads it, and what is read is gone. Where the device is lost, every batch will say so.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self._device)

    def detach(self, arena: int) -> None:
        if arena in self._locked:
            self._locked.remove(arena)
            with torch.cuda.device(self._device):
                cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
                cudart.cudaHostUnregister(self._arenas[arena].data_ptr())
        super().detach(arena)

    def launch(self, batch: Batch) -> Launched:
        slot = self._free.popleft()
        try:
            return self._guarded(lambda: self._enqueue(batch, slot))
        except BaseException:
            self._free.append(slot)
            raise

    def finish(self, launched: Launched) -> Finished:
        flight = cast(_Launched, launched)
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
    def _enqueue(self, batch: Batch, slot: _Slot) -> _Launched:
        count, tokens = len(batch.rows), self.info.tokens(batch.shape)
        runs = [(run, self._features_in_arena(run, batch.shape)) for run in feature_runs(batch, self.info)]
        wanted = wanted_features(batch)
        key = Key(batch.shape, padded(count), wanted)
        with torch.cuda.device(self._device), self._host:
            graph = self._graphs.find(key)
            is_due = self._graphs.is_due(key, tokens)
            pixels = slot.pixels(key.images, batch.shape, self._device)

            with torch.cuda.stream(self._copy_in):
                slot.copy_in_begins.record()
                for piece in pixel_runs(batch):
                    source = self._pixels_in_arena(piece.arena, piece.offset, piece.count, batch.shape)
                    pixels[piece.first : piece.first + piece.count].copy_(source, non_blocking=True)
                slot.copy_in_ends.record()

            with torch.cuda.stream(self._compute):
                self._compute.wait_event(slot.copy_in_ends)
                slot.forward_begins.record()
                # Everything that takes device memory comes before the first copy out: a batch that does not fit
                # has written nothing into an arena.
                if graph is not None:
                    features = graph.replay(pixels, count)
                else:
                    # Padded before a capture, which is of the padded size: see ForwardGraph.
                    features = self._forward(key, pixels if is_due else pixels[:count])
                slot.forward_ends.record()

            with torch.cuda.stream(self._copy_out):
                self._copy_out.wait_event(slot.forward_ends)
                slot.copy_out_begins.record()
                values = dict(zip(wanted, features.values, strict=True))
                for run, places in runs:
                    sections = (section for output in run.spec.outputs for section in values[run.spec.wanted(output)])
                    for section, place in zip(sections, places, strict=True):
                        place.copy_(section[run.first : run.first + run.count], non_blocking=True)
                flags = slot.flags(count, len(wanted))
                flags.copy_(features.finite[:count], non_blocking=True)
                slot.copy_out_ends.record()

            if is_due:  # now, while the device is busy with this batch
                with torch.cuda.stream(self._compute):
                    self._capture(key, pixels)
        # The caching allocator knows tensors by the stream that made them and would give this memory away while it
        # is copied out: it is held until the batch is finished.
        return _Launched(batch, wanted, slot, flags, held=[features.finite, *chain(*features.values)])

    def _forward(self, key: Key, pixels: Tensor) -> Features:
        return compute(self._model, pixels, key.wanted, partial(self._postprocessing, shape=key.shape))

    def _capture(self, key: Key, pixels: Tensor) -> None:
        """Have a graph for `key` from now on. Nothing that goes wrong here is an error of the batch just launched."""
        # Held by the graph, and asked for before the capture: in one it would be made of memory that others overwrite.
        tables = self._model.tables(key.shape.height, key.shape.width)
        try:
            graph = ForwardGraph(partial(self._forward, key), pixels, tables, self._graphs.pool())
        except RuntimeError as error:
            if isinstance(device_failure(error), DeviceOutOfMemory):
                logger.warning("no memory for a CUDA graph of %d images of %s: it runs without", key.images, key.shape)
                self._graphs.refuse(key)
            else:  # if the device itself is lost, the batch's end tells
                logger.warning("a CUDA graph could not be captured: no more are", exc_info=True)
                self._graphs.stop()
        else:
            self._graphs.keep(key, graph)

    def _collect(self, flight: _Launched) -> Finished:
        slot = flight.slot
        slot.copy_out_ends.synchronize()
        flight.held.clear()
        columns = {
            spec: [flight.wanted.index(spec.wanted(output)) for output in spec.outputs]
            for spec in {row.spec for row in flight.batch.rows}
        }
        return Finished(
            finite=tuple(
                all(of_row[column] for column in columns[row.spec])
                for row, of_row in zip(flight.batch.rows, flight.flags.tolist(), strict=True)
            ),
            copy_in=slot.copy_in_begins.elapsed_time(slot.copy_in_ends) / 1000,
            forward=slot.forward_begins.elapsed_time(slot.forward_ends) / 1000,
            copy_out=slot.copy_out_begins.elapsed_time(slot.copy_out_ends) / 1000,
        )

    def _settle(self) -> None:
        with self._host:
            torch.cuda.synchronize(self._device)
            self._graphs.clear()  # they are fast, but what does not fit without them must
            torch.cuda.empty_cache()


class _Slot:
    """Events and staging memory of one batch in flight; made with its device current."""

    def __init__(self) -> None:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(5)]  # type: ignore[no-untyped-call]
        self.copy_in_begins, self.copy_in_ends, self.forward_begins, self.forward_ends, self.copy_out_begins = events
        # The one that the host waits for: without spinning on a core that a frontend could use.
        self.copy_out_ends = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        self._pixels = torch.empty(0, dtype=torch.uint8)
        self._flags = torch.empty(0, dtype=torch.bool)

    def pixels(self, count: int, shape: PixelShape, device: torch.device) -> Tensor:
        """A batch of pixels on the device."""
        nbytes = count * shape.nbytes
        if self._pixels.numel() < nbytes:
            self._pixels = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is taken
            self._pixels = torch.empty(nbytes, dtype=torch.uint8, device=device)
        dtype, layout = pixel_layout(count, shape)
        return self._pixels[:nbytes].view(dtype).view(layout)

    def flags(self, count: int, wanted: int) -> Tensor:
        """[count, wanted] bool in page-locked memory, where there is any."""
        if self._flags.numel() < count * wanted:
            try:
                self._flags = torch.empty(count * wanted, dtype=torch.bool, pin_memory=True)
            except RuntimeError:
                self._flags = torch.empty(count * wanted, dtype=torch.bool)
        return self._flags[: count * wanted].view(count, wanted)


@dataclass(frozen=True, slots=True)
class _Launched:
    batch: Batch
    wanted: tuple[Wanted, ...]
    slot: _Slot
    flags: Tensor
    held: list[Tensor]
